"""Who works on which file, among workers that share nothing but a folder.

A claim is a file made with ``O_EXCL``; its owner touches it every few seconds.  A claim that stood still for a while is
taken over: the file is renamed away, which one worker alone can do.  A worker that was only asleep then writes the same
bytes to the same places as its successor, so nothing is lost or torn.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["ClaimLostError", "Claims"]

BEAT = 2.0  # seconds between two signs of life
STALE = 20.0  # seconds without one after which an owner on another machine counts as gone


class ClaimLostError(RuntimeError):
    """This worker was taken for dead; its file is finished by another."""


class Claims:
    """Claims in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._seen: dict[str, tuple[int, float]] = {}  # name -> (mtime_ns, when we first saw it)
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": _start_of(os.getpid()),
            "id": uuid.uuid4().hex,
        }

    @contextmanager
    def hold(self, name: str) -> Iterator[Callable[[], None] | None]:
        """``None`` where another worker has the claim; else a function that raises once it is no longer ours."""
        if not self._take(name):
            yield None
            return

        def confirm() -> None:
            try:
                ours = json.loads((self.folder / name).read_text()) == self._owner
            except (OSError, ValueError):
                ours = False
            if not ours:
                raise ClaimLostError(f"{name}: another worker took it over while this one stood still")

        path, stop = self.folder / name, threading.Event()

        def beat() -> None:
            while not stop.wait(BEAT):
                with contextlib.suppress(OSError):
                    os.utime(path)

        thread = threading.Thread(target=beat, name=f"claim {name}", daemon=True)
        thread.start()
        try:
            yield confirm
        finally:
            stop.set()
            thread.join()
            with contextlib.suppress(ClaimLostError):
                confirm()
                path.unlink(missing_ok=True)
            self._seen.pop(name, None)

    def _take(self, name: str) -> bool:
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            left = self._left_behind(name)
            if left is None:
                return False
            aside = self.folder / f".{name}.{uuid.uuid4().hex}"
            try:
                os.rename(path, aside)
                if aside.read_text() != left:  # another was faster, and this is its new claim
                    with contextlib.suppress(FileExistsError):
                        os.link(aside, path)
                    return False
            except FileNotFoundError:
                return False
            finally:
                aside.unlink(missing_ok=True)
            self._seen.pop(name, None)
            return self._take(name)
        with os.fdopen(descriptor, "w") as file:
            json.dump(self._owner, file)
        return True

    def _left_behind(self, name: str) -> str | None:
        """What stands in a claim whose owner is gone; ``None`` where it lives, or gave the claim back."""
        path = self.folder / name
        try:
            changed, text = path.stat().st_mtime_ns, path.read_text()
        except FileNotFoundError:
            return None
        try:
            owner = json.loads(text or "{}")
        except ValueError:
            owner = {}
        if owner.get("host") == self._owner["host"] and "pid" in owner:
            return text if _start_of(int(owner["pid"])) != owner.get("start") else None
        # Another machine's clock is not ours: what counts is how long the claim stood still by our own.
        now = time.monotonic()
        seen, since = self._seen.get(name, (0, now))
        if seen != changed:
            self._seen[name] = (changed, now)
            return None
        return text if now - since > STALE else None


def _start_of(pid: int) -> str | None:
    """When a process of this machine began; ``None`` where it is gone.  Tells a process from a later one of its id."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self").exists():
            return None
        try:  # no /proc: that it lives is all one can know
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "alive"
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]

"""Files of a run that survive a kill at any moment: atomic writes, line journals, and a lock.

A file is written beside its place, forced to disk and renamed, so it is either whole or not there.  A journal grows
by whole lines; a line torn by a kill is cut off when the journal is opened again.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

__all__ = [
    "Journal",
    "RunFolderError",
    "RunLock",
    "dump_line",
    "load_tensors",
    "read_lines",
    "save_tensors",
    "write_file",
    "write_files",
]


class RunFolderError(RuntimeError):
    """The run folder cannot be used as it is: in use, of another recipe, or damaged."""


def write_file(path: Path, data: bytes | str) -> None:
    """Write ``path`` beside its place, then rename: whole or not at all."""
    write_files({path: data})


def write_files(files: Mapping[Path, bytes | str]) -> None:
    """Write several files beside their places; no one gets its name before all are on disk.

    Each is whole or not there at all.  To wait for the disk once, not for each, is what makes it fast.
    """
    beside: dict[Path, Path] = {}
    try:
        handles: list[int] = []
        try:
            for path, data in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
                # Not tempfile: that gives 0600, and a result is to be read by whom the umask lets.
                handles.append(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                beside[path] = temporary
                with os.fdopen(os.dup(handles[-1]), "wb") as file:
                    file.write(data.encode("utf-8") if isinstance(data, str) else data)
            for handle in handles:
                os.fsync(handle)
        finally:
            for handle in handles:
                os.close(handle)
        for path, temporary in beside.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in files}:
        _sync_folder(folder)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, to_safetensors(whole, metadata=dict(metadata or {})))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    The tensors are copies in memory that torch aligned: a view into the file starts anywhere, and vectorised kernels
    may then round differently than they did before a run was interrupted.
    """
    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        for name in list(file.keys()):
            view = file.get_tensor(name)
            tensors[name] = torch.empty_like(view).copy_(view)
    return tensors, metadata


def dump_line(event: Mapping[str, Any]) -> str:
    """One event as one line of JSON, newline included; NaN and infinity become null (they are no JSON)."""
    return json.dumps(_jsonable(event), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The events of a file of JSON lines; a torn last line is left out.

    Raises:
        RunFolderError: a line before the last is not a JSON object.
    """
    return _parse_lines(path)[0] if path.exists() else []


class Journal:
    """A file of JSON lines that only grows: what is in it has happened, whatever comes after.

    Opening it cuts off a torn last line.  ``append`` returns after the line is on disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.events: list[dict[str, Any]] = []
        if path.exists():
            self.events, whole = _parse_lines(path)
            if whole < path.stat().st_size:
                with open(path, "r+b") as file:
                    file.truncate(whole)

    def append(self, event: Mapping[str, Any]) -> None:
        self.extend([event])

    def extend(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Several events, with one wait for the disk."""
        lines = [dump_line(event) for event in events]
        if not lines:
            return
        with open(self.path, "ab") as file:
            file.write("".join(lines).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        self.events += map(json.loads, lines)

    def find(self, kind: str, task_index: int | None = None) -> dict[str, Any] | None:
        """The last event of this kind (and task), if it has happened."""
        for event in reversed(self.events):
            if event.get("event") == kind and (task_index is None or event.get("task_index") == task_index):
                return event
        return None


class RunLock:
    """Only one process may work in a run folder.

    The lock is the kernel's (``flock``), so it ends with its process, however that ends; the file's text only says
    whose it is.  ``former`` holds the id that a process left behind which did not end in order.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self.former: int | None = None
        self._file: Any = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise RunFolderError(
                f"{self.path.parent} is in use by another run (process {owner}); "
                "wait for it, stop it, or choose another --out"
            ) from None
        except OSError as error:
            file.close()
            raise RunFolderError(
                f"{self.path}: this file system offers no locks ({error}); choose another --out"
            ) from error
        file.seek(0)
        former = file.read().strip()
        self.former = int(former) if former.isdigit() else None
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Emptied, not removed: a process that waits on the old file would lock a name that nobody else sees.
        self._file.seek(0)
        self._file.truncate()
        self._file.close()


def _parse_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Events, and the number of bytes that whole lines take."""
    events: list[dict[str, Any]] = []
    whole = 0
    lines = path.read_bytes().split(b"\n")
    last = len(lines) - 1 - (not lines[-1])  # the piece after a final newline is empty
    for number, line in enumerate(lines[: last + 1]):
        terminated = number < len(lines) - 1
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or not terminated:
            if number == last:
                break
            raise RunFolderError(f"{path}: line {number + 1} is not a JSON object; the file was changed or damaged")
        events.append(event)
        whole += len(line) + 1
    return events, whole


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if hasattr(value, "item"):  # a tensor or a numpy number with one element
        return _jsonable(value.item())
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    raise TypeError(f"event: expected JSON values, got {type(value).__name__}: {value!r}")


def _sync_folder(folder: Path) -> None:
    """Force a rename to disk; without it a power cut may keep the old name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

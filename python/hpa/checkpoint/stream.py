"""Reading ahead and writing behind: while one layer is computed, the next is read and the last is written.

Both sides hold a bounded number of bytes, so memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

__all__ = ["HashedFile", "Room", "hash_file", "read_ahead"]

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
PIECE = 8 << 20  # bytes handed to the operating system and the hash at a time


def hash_file(path: Path, *, until: int | None = None) -> hashlib._Hash:
    """SHA-256 of a file, or of its first ``until`` bytes."""
    digest = hashlib.sha256()
    left = path.stat().st_size if until is None else until
    with open(path, "rb", buffering=0) as file:
        while left > 0:
            piece = file.read(min(left, PIECE))
            if not piece:
                raise OSError(f"{path}: ends {left} bytes early")
            digest.update(piece)
            left -= len(piece)
    return digest


class HashedFile:
    """A file that is written by one thread and hashed by another while the caller goes on.

    Errors of the threads (a full disk) are raised by the next call.
    """

    def __init__(self, path: Path, *, start: int = 0, room: Room | None = None) -> None:
        """``start``: bytes that an earlier run wrote, to be kept; ``room``: for bytes that wait to be written."""
        self.path = path
        self.position = start
        self._digest = hash_file(path, until=start) if start else hashlib.sha256()
        self._file = open(path, "r+b" if start else "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self._file.truncate(start)
        self._file.seek(start)
        self._room = Room(256 << 20) if room is None else room
        self._error: BaseException | None = None
        # One thread each, so each does its work in order.
        self._writer, self._hasher, self._syncer = (
            ThreadPoolExecutor(1, f"{what} {path.name}") for what in ("write", "hash", "sync")
        )

    def write(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        self._check()
        self._room.take(len(view))
        self._writer.submit(self._write, view)
        self.position += len(view)

    def when_on_disk(self, action: Callable[[], None]) -> None:
        """Call ``action``, from a thread, once all that was written so far is on disk; nobody waits for it."""
        self._check()
        self._writer.submit(lambda: self._syncer.submit(self._sync, action))

    def close(self) -> str:
        """Force the file to disk and close it; its SHA-256 as hexadecimal digits."""
        self._join()
        try:
            self._check()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close without a word, after an error."""
        self._join()
        with contextlib.suppress(OSError):
            self._file.close()

    def _join(self) -> None:
        for thread in (self._writer, self._hasher, self._syncer):
            thread.shutdown()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self, view: memoryview) -> None:
        try:
            written = 0 if self._error is None else len(view)
            while written < len(view):
                written += self._file.write(view[written : written + PIECE]) or 0
        except OSError as error:  # a full disk; of itself it does not say which file it hit
            self._error = OSError(error.errno, error.strerror, str(self.path))
        except BaseException as error:
            self._error = error
        self._hasher.submit(self._hash, view)

    def _hash(self, view: memoryview) -> None:
        self._digest.update(view)
        self._room.give(len(view))

    def _sync(self, action: Callable[[], None]) -> None:
        try:
            if self._error is None:
                os.fdatasync(self._file.fileno())
                action()
        except BaseException as error:
            self._error = error


def read_ahead(
    items: Iterable[Item], load: Callable[[Item], Loaded], size: Callable[[Item], int], budget: int
) -> Iterator[tuple[Item, Loaded]]:
    """``(item, load(item))`` in order; a thread loads the next items while at most ``budget`` bytes wait."""
    reader = _Reader(items, load, size, budget)
    try:
        yield from reader
    finally:
        reader.stop()


class _Reader(Generic[Item, Loaded]):
    def __init__(
        self, items: Iterable[Item], load: Callable[[Item], Loaded], size: Callable[[Item], int], budget: int
    ) -> None:
        self._items, self._load, self._size = items, load, size
        self._room = Room(budget)
        self._queue: queue.Queue[tuple[Item, Loaded, int] | BaseException | None] = queue.Queue()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="read ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Item, Loaded]]:
        while (got := self._queue.get()) is not None:
            if isinstance(got, BaseException):
                raise got
            item, loaded, size = got[0], [got[1]], got[2]
            self._room.give(size)
            del got
            yield item, loaded.pop()  # no reference to it stays here

    def stop(self) -> None:
        self._stopped = True
        self._room.give(1 << 62)
        self._thread.join()

    def _work(self) -> None:
        try:
            for item in self._items:
                size = self._size(item)
                self._room.take(size)
                if self._stopped:
                    return
                self._queue.put((item, self._load(item), size))
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)


class Room:
    """So many bytes at once, over all that share it; one item that is larger than all of it may pass alone."""

    def __init__(self, budget: int) -> None:
        self._budget, self._free = budget, budget
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= min(size, self._budget))
            self._free -= size

    def give(self, size: int) -> None:
        with self._changed:
            self._free = min(self._budget, self._free + size)
            self._changed.notify_all()

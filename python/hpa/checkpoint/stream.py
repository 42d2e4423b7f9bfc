"""Reading ahead and writing behind: while one layer is computed, the next is read and the last is written.

Both sides hold a bounded number of bytes, so memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

__all__ = ["HashedFile", "Room", "hash_file", "read_ahead"]

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
PIECE = 8 << 20  # bytes handed to the operating system and the hash at a time
BLOCK = max(4096, mmap.PAGESIZE)  # place, length and memory of what goes past the page cache are multiples of it


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


class _Appended:
    """A file that grows at its end, written past the page cache where the file system takes O_DIRECT.

    Copying into the page cache took a quarter of the processor's time of an edit, and pushes out what the inputs have
    there.  Whole blocks go past it, gathered in memory that suits them.  A block of which a part had to be
    written before the rest was there goes the usual way altogether: no byte beyond the end is ever written, because
    another worker may be at work on the same file, and no block is written both ways.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._memory = np.frombuffer(mmap.mmap(-1, PIECE), np.uint8)
        self._first = self._stop = start % BLOCK  # in memory, what has not been handed over
        self._place = start - self._first  # of the memory in the file
        self._file = open(path, "r+b" if start else "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self._file.truncate(start)
        self._direct = self._open_direct(path)

    def _open_direct(self, path: Path) -> io.FileIO | None:
        try:
            direct = open(  # noqa: SIM115 - closed by close()
                path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT)
            )
        except (OSError, AttributeError):  # a file system or a system that does not know it
            return None
        if os.path.sameopenfile(direct.fileno(), self._file.fileno()):
            return direct
        direct.close()  # another worker has put a new file there
        return None

    def append(self, view: memoryview) -> None:
        data = np.frombuffer(view, np.uint8)
        while len(data):
            some = min(len(data), PIECE - self._stop)
            self._memory[self._stop : self._stop + some] = data[:some]  # lets other threads run meanwhile
            self._stop += some
            data = data[some:]
            if self._stop == PIECE:
                self.flush()

    def flush(self) -> None:
        """Hand over all there is."""
        begun = min(-(-self._first // BLOCK) * BLOCK, self._stop)  # where the block ends of which a part was written
        done = self._stop - self._stop % BLOCK
        whole = max(begun, done)
        self._write(self._first, begun, direct=False)
        self._write(begun, whole, direct=True)
        self._write(whole, self._stop, direct=False)
        self._place += done
        self._first = self._stop = self._stop - done

    def _write(self, first: int, stop: int, *, direct: bool) -> None:
        while first < stop:
            file = self._direct if direct and self._direct is not None and first % BLOCK == 0 else self._file
            try:
                first += os.pwrite(file.fileno(), self._memory[first:stop].data, self._place + first)
            except OSError as error:
                if file is self._file or error.errno != errno.EINVAL:
                    raise
                file.close()  # the disk wants larger blocks than ours
                self._direct = None

    def to_disk(self, *, whole: bool) -> None:
        """Wait until the disk has what was handed over; ``whole``: and all that is known of the file."""
        (os.fsync if whole else os.fdatasync)(self._file.fileno())

    def close(self) -> None:
        try:
            if self._direct is not None:
                self._direct.close()
        finally:
            self._file.close()


class HashedFile:
    """A file that is written by one thread and hashed by another while the caller goes on.

    Errors of the threads (a full disk) are raised by the next call.
    """

    def __init__(self, path: Path, *, start: int = 0, room: Room | None = None) -> None:
        """``start``: bytes that an earlier run wrote, to be kept; ``room``: for bytes that wait to be written."""
        self.path = path
        self.position = start
        self._digest = hash_file(path, until=start) if start else hashlib.sha256()
        self._file = _Appended(path, start)
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
        self._writer.submit(self._flush, action)

    def close(self) -> str:
        """Force the file to disk and close it; its SHA-256 as hexadecimal digits."""
        self._writer.submit(self._flush)
        self._join()
        try:
            self._check()
            self._file.to_disk(whole=True)
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
        with self._keep_error(name_file=True):
            if self._error is None:
                self._file.append(view)
        self._hasher.submit(self._hash, view)

    def _flush(self, action: Callable[[], None] | None = None) -> None:
        with self._keep_error(name_file=True):
            if self._error is None:
                self._file.flush()
        if action is not None:
            self._syncer.submit(self._sync, action)

    def _hash(self, view: memoryview) -> None:
        self._digest.update(view)
        self._room.give(len(view))

    def _sync(self, action: Callable[[], None]) -> None:
        with self._keep_error():
            if self._error is None:
                self._file.to_disk(whole=False)
                action()

    @contextlib.contextmanager
    def _keep_error(self, *, name_file: bool = False) -> Iterator[None]:
        """``name_file``: in the operating system's errors; a full disk does not say which file it hit."""
        try:
            yield
        except BaseException as error:
            self._error = error
            if name_file and isinstance(error, OSError):
                self._error = OSError(error.errno, error.strerror, str(self.path))


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

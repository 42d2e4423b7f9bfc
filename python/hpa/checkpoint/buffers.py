"""Memory for tensors on their way through, used again and again.

A fresh page costs more than reading a file into it, for the system must clear and map it: on the machine of
docs/adapt.md a weight is read at 1.2 GB/s into new memory and at 4 GB/s into memory that has been used.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

__all__ = ["Buffers"]

SMALLEST = 1 << 20  # bytes; below that the allocator keeps its own pages
PAGE = 2 << 20  # a huge page


class Buffers:
    """Memory that comes back by itself when the last view of a tensor is gone."""

    def __init__(self, limit: int) -> None:
        """``limit``: bytes beyond which nothing is kept for later use."""
        self._limit = limit
        self._size = 0  # of all that is lent or kept
        self._kept: list[mmap.mmap] = []
        # Filled from wherever a tensor dies, the garbage collector included: an append takes no lock.
        self._returned: deque[mmap.mmap] = deque()
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As :func:`torch.empty`."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(shape, dtype=dtype)
        buffer = self._take(size)
        lent = memoryview(buffer)  # torch holds this object for as long as the memory is in use
        weakref.finalize(lent, self._returned.append, buffer).atexit = False
        return torch.frombuffer(lent, dtype=torch.uint8, count=size).view(dtype).view(shape)

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            while self._returned:
                self._kept.append(self._returned.popleft())
            fitting = [buffer for buffer in self._kept if size <= len(buffer) <= size + size // 2 + PAGE]
            if fitting:
                buffer = min(fitting, key=len)
                self._kept.remove(buffer)
                return buffer
            capacity = -(-size // PAGE) * PAGE
            while self._kept and self._size + capacity > self._limit:
                self._size -= len(self._kept.pop(0))
            self._size += capacity
        buffer = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                buffer.madvise(mmap.MADV_HUGEPAGE)
        return buffer

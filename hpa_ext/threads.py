"""How many threads a call on the CPU may use.

The innermost ``with num_threads(n):`` decides, then ``HPA_NUM_THREADS``, then torch's own setting, which follows
``torch.set_num_threads`` and ``OMP_NUM_THREADS``: so the workers of a data loader, which torch gives one thread each,
are not oversubscribed.  The threads are those of the OpenMP runtime that torch uses; there is no second pool.

Small work stays on the caller's thread whatever the number, and no result depends on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch

from hpa_ext.arguments import as_count

__all__ = ["get_num_threads", "num_threads"]

_limit: ContextVar[int | None] = ContextVar("hpa_ext.num_threads", default=None)


def num_threads(n: int) -> AbstractContextManager[None]:
    """Calls inside ``with num_threads(n):`` use at most ``n`` threads, on the CPU.

    The block holds for the current thread, or asyncio task, alone; a thread started inside it begins without. Blocks
    nest, and the number from before is back after the block however it ends.

    Args:
        n: number of threads, at least 1.

    Raises:
        TypeError: not a whole number.
        ValueError: below 1.
    """
    return _limited(as_count("n", n, minimum=1))


def get_num_threads() -> int:
    """The number of threads that a call may use here and now.

    Raises:
        ValueError: ``HPA_NUM_THREADS`` is neither empty nor a positive whole number.
    """
    limit = _limit.get()
    if limit is not None:
        return limit
    forced = os.environ.get("HPA_NUM_THREADS")
    if not forced:
        return torch.get_num_threads()
    if not forced.isdecimal() or int(forced) == 0:
        raise ValueError(f"HPA_NUM_THREADS: expected a positive whole number, got {forced!r}")
    return int(forced)


@contextmanager
def _limited(count: int) -> Iterator[None]:
    token = _limit.set(count)
    try:
        yield
    finally:
        _limit.reset(token)

"""Calibration over several processes: each has a part of the samples, sums meet in one place (torch.distributed).

The samples are dealt out in turns; a Gram matrix is a sum over samples, so the sum over processes is the whole set's,
to rounding.  Each input's matrix is reduced to one owner, the owners by turns, and inverted there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from hpa.checkpoint.files import CheckpointError
from hpa.layers import InputStatistics

__all__ = ["ProcessGroup", "process_group"]

Item = TypeVar("Item")


class ProcessGroup:
    """The processes that ``torchrun`` started; see :class:`hpa.calibration.Exchange`."""

    def __init__(self) -> None:
        if not dist.is_initialized():
            # A GPU in the machine does not mean that a tensor lies on it: what lies on the CPU meets there.
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part: every ``size``-th item."""
        return list(items[self.rank :: self.size])

    def gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.size
        with _all_together():
            dist.all_gather_object(gathered, value)
        return gathered

    def sum_to(self, owner: int, gram: Tensor) -> None:
        with _all_together():
            dist.reduce(gram, dst=owner)

    def merge(self, parts: dict[str, InputStatistics]) -> dict[str, InputStatistics]:
        """Matrices travel as tensors, one after the other, so that memory holds one that is not ours."""
        merged: dict[str, InputStatistics] = {}
        told = self.gather({name: _without_tensors(seen) for name, seen in parts.items()})
        for owner, entries in enumerate(told):
            for name, (seen, shapes) in entries.items():
                tensors: dict[str, Tensor | None] = {}
                for key, shape in shapes.items():
                    held = getattr(parts[name], key) if owner == self.rank else None
                    tensors[key] = self._to_first(held, shape, owner)
                merged[name] = replace(seen, **tensors)
        return merged

    def _to_first(
        self, held: Tensor | None, shape: tuple[torch.dtype, tuple[int, ...]] | None, owner: int
    ) -> Tensor | None:
        if shape is None:
            return None
        if owner == 0 or self.rank not in (0, owner):
            return held
        if self.rank == owner:
            assert held is not None
            with _all_together():
                dist.send(held.cpu().contiguous(), dst=0)
            return held
        received = torch.empty(shape[1], dtype=shape[0])
        with _all_together():
            dist.recv(received, src=owner)
        return received

    def close(self) -> None:
        with _all_together():
            dist.barrier()
        dist.destroy_process_group()


def process_group() -> ProcessGroup | None:
    """The group, where ``torchrun`` started more than one process."""
    return ProcessGroup() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


@contextmanager
def _all_together() -> Iterator[None]:
    """Where one process stops, the others fail at their next meeting: theirs is not the error to look at."""
    try:
        yield
    except RuntimeError as error:
        raise CheckpointError("processes: another process has stopped; its own error says why") from error


def _without_tensors(seen: InputStatistics) -> tuple[InputStatistics, dict[str, Any]]:
    shapes = {
        key: None if tensor is None else (tensor.dtype, tuple(tensor.shape))
        for key, tensor in (("gram", seen.gram), ("inverse_diagonal", seen.inverse_diagonal))
    }
    return replace(seen, gram=None, inverse_diagonal=None), shapes

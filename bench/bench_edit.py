"""edit_: a layer's whole rule, reads for the statistics and one update in place; bound by memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hand_written
import torch
from harness import OURS, TORCH, Case
from machine import last_level_cache
from shapes import layer_pair, short, small_layers
from torch import Tensor

import hpa_ext


def cases(shrink: int = 1) -> Iterator[Case]:
    # An edit leaves less to edit: weights are put back before each sample, and what that left in the caches swept out.
    sweep = torch.zeros(2 * last_level_cache() // (4 * shrink))

    def put_back(after: Any, before: Any, safety: Any, task: Any, learned: Any) -> None:
        for to, value in zip(listed(after), listed(learned), strict=True):
            to.copy_(value)
        sweep.add_(1)

    def layer(rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        before, after = layer_pair(rows, cols, dtype)
        return after, before, torch.rand(cols) + 0.5, torch.rand(cols) + 0.5, after.clone()

    def case(label: str, count: int, rows: int, cols: int, dtype: torch.dtype, targets: dict[str, float]) -> Case:
        keep, focus = cols // 8, cols // 4

        def inputs() -> tuple[Any, ...]:
            layers = [layer(rows, cols, dtype) for _ in range(count)]
            return layers[0] if count == 1 else tuple(list(column) for column in zip(*layers, strict=True))

        def by_hand(after: Any, before: Any, safety: Any, task: Any, learned: Any) -> None:
            for one in zip(*map(listed, (after, before, safety, task)), strict=True):
                hand_written.edit_(*one, keep, focus)

        return Case(
            kernel="edit_",
            case=label,
            inputs=inputs,
            contenders={
                OURS: lambda after, before, safety, task, _: hpa_ext.edit_(after, before, safety, task, keep, focus),
                TORCH: by_hand,
            },
            result=lambda returned, after, *_: listed(after),
            tolerance=1e-5 if dtype == torch.float32 else 1e-2,
            reset=put_back,
            # The least for layers that fit a cache; a larger one has to be read a second time.
            bytes_moved=3 * count * rows * cols * dtype.itemsize,
            memory="update",
            targets=targets,
            level="quick",
        )

    side = 4096 // shrink
    dtype = torch.bfloat16
    yield case(f"{side}x{side} {short(dtype)}", 1, side, side, dtype, {TORCH: 8})
    side, count = small_layers(shrink)
    dtype = torch.float32
    yield case(f"{count} of {side}x{side} {short(dtype)}", count, side, side, dtype, {TORCH: 3})


def listed(value: Tensor | list[Tensor]) -> list[Tensor]:
    return value if isinstance(value, list) else [value]

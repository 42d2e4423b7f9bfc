"""merge_: one pass, in place; bound by reading both weights and writing one."""

from __future__ import annotations

from collections.abc import Iterator

import hand_written
import torch
from harness import LIMIT, OURS, TORCH, Case
from shapes import BOTH, layer_pair, layer_pairs, short, small_layers
from torch import Tensor

import hpa_ext

PROJECTION = 1e-3


def cases(shrink: int = 1) -> Iterator[Case]:
    for rows, cols in ((4096 // shrink, 4096 // shrink), (11008 // shrink, 4096 // shrink)):
        for dtype in BOTH:

            def inputs(rows: int = rows, cols: int = cols, dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
                before, after = layer_pair(rows, cols, dtype)
                return after, before, torch.rand(cols) < 0.1

            yield Case(
                kernel="merge_",
                case=f"{rows}x{cols} {short(dtype)}",
                inputs=inputs,
                contenders={
                    OURS: lambda after, before, mask: hpa_ext.merge_(after, before, mask, PROJECTION),
                    TORCH: lambda after, before, mask: hand_written.merge_(after, before, mask, PROJECTION),
                },
                compiled=lambda after, before, mask: hand_written.merge_(after, before, mask, PROJECTION),
                # torch rounds the product to storage before it subtracts.
                tolerance=1e-6 if dtype == torch.float32 else 1e-2,
                bytes_moved=3 * rows * cols * dtype.itemsize,
                memory="update",
                targets={TORCH: 6, LIMIT: 0.85},
                level="quick" if rows == cols else "default",
            )

    side, count = small_layers(shrink)

    def layers() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        before, after = layer_pairs(side, count)
        return after, before, [torch.rand(side) < 0.1 for _ in range(count)]

    def by_hand(after: list[Tensor], before: list[Tensor], mask: list[Tensor]) -> None:
        for one in zip(after, before, mask, strict=True):
            hand_written.merge_(*one, PROJECTION)

    yield Case(
        kernel="merge_",
        case=f"{count} of {side}x{side} fp32",
        inputs=layers,
        contenders={
            OURS: lambda after, before, mask: hpa_ext.merge_(after, before, mask, PROJECTION),
            TORCH: by_hand,
        },
        result=lambda returned, after, *_: after,
        tolerance=1e-6,
        bytes_moved=3 * count * side * side * 4,
        memory="update",
        targets={TORCH: 6, LIMIT: 0.85},
    )

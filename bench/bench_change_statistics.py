"""change_statistics: one pass over both weights; bound by reading them."""

from __future__ import annotations

from collections.abc import Iterator

import hand_written
from harness import COMPILED, LIMIT, OURS, TORCH, Case
from shapes import BOTH, layer_pair, layer_pairs, short, small_layers
from torch import Tensor

import hpa_ext


def cases(shrink: int = 1) -> Iterator[Case]:
    for rows, cols in ((4096 // shrink, 4096 // shrink), (11008 // shrink, 4096 // shrink)):
        for dtype in BOTH:
            yield Case(
                kernel="change_statistics",
                case=f"{rows}x{cols} {short(dtype)}",
                inputs=lambda rows=rows, cols=cols, dtype=dtype: layer_pair(rows, cols, dtype),
                contenders={OURS: hpa_ext.change_statistics, TORCH: hand_written.change_statistics},
                compiled=hand_written.change_statistics,
                result=lambda returned, *_: list(returned),
                bytes_moved=2 * rows * cols * dtype.itemsize,
                memory="read",
                targets={TORCH: 25, COMPILED: 4, LIMIT: 0.9},
                level="quick" if rows == cols else "default",
            )

    side, count = small_layers(shrink)

    def by_hand(before: list[Tensor], after: list[Tensor]) -> list[tuple[Tensor, ...]]:
        return [hand_written.change_statistics(*pair) for pair in zip(before, after, strict=True)]

    yield Case(
        kernel="change_statistics",
        case=f"{count} of {side}x{side} fp32",
        inputs=lambda: layer_pairs(side, count),
        contenders={OURS: hpa_ext.change_statistics, TORCH: by_hand},
        result=lambda returned, *_: [number for layer in returned for number in layer],
        bytes_moved=2 * count * side * side * 4,
        memory="read",
        targets={TORCH: 25, LIMIT: 0.9},
    )

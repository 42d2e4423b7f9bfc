"""change_statistics: one pass over both weights; bound by reading them."""

from __future__ import annotations

from collections.abc import Iterator

import hand_written
from harness import COMPILED, LIMIT, OURS, TORCH, Case
from shapes import BOTH, layer_pair, short

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

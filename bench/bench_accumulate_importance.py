"""accumulate_importance_: a list of tensors in one call; bound by memory, or for many small ones by the calls."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import hand_written
import torch
from harness import OURS, TORCH, Case
from shapes import BOTH, short
from torch import Tensor

import hpa_ext


def cases(shrink: int = 1) -> Iterator[Case]:
    for count, size in ((64, 262144), (1000, 1024)):
        count, size = max(2, count // shrink), size // shrink
        for dtype in BOTH:
            contenders = {OURS: hpa_ext.accumulate_importance_, TORCH: hand_written.accumulate_fisher_}
            if dtype == torch.float32:
                contenders["torch._foreach"] = hand_written.accumulate_fisher_foreach_
            yield Case(
                kernel="accumulate_importance_",
                case=f"fisher, {count} x {size} {short(dtype)}",
                inputs=partial(inputs, count, size, dtype, 1),
                contenders=contenders,
                # One graph of a thousand tensors takes minutes to compile.
                compiled=hand_written.accumulate_fisher_ if count < 100 else None,
                result=lambda _, importance, *__: importance,
                bytes_moved=count * size * (8 + dtype.itemsize),
                memory="update",
                level="quick" if dtype == torch.float32 else "default" if count < 100 else "full",
            )
        yield Case(
            kernel="accumulate_importance_",
            case=f"taylor, {count} x {size} fp32",
            inputs=partial(inputs, count, size, torch.float32, 2),
            contenders={
                OURS: lambda importance, grads, weights: hpa_ext.accumulate_importance_(
                    importance, grads, weights, kind="taylor"
                ),
                TORCH: hand_written.accumulate_taylor_,
            },
            result=lambda _, importance, *__: importance,
            bytes_moved=count * size * 16,
            memory="update",
            level="default" if count < 100 else "full",
        )


def inputs(count: int, size: int, dtype: torch.dtype, read: int) -> tuple[list[Tensor], ...]:
    importance = [torch.zeros(size) for _ in range(count)]
    return importance, *([torch.randn(size).to(dtype) for _ in range(count)] for _ in range(read))

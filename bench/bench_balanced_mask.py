"""balanced_mask: three rankings of a few thousand columns; bound by their comparisons, far from any limit of memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import hand_written
import torch
from harness import OURS, TORCH, Case
from torch import Tensor

import hpa_ext


def cases(shrink: int = 1) -> Iterator[Case]:
    for cols in (4096 // shrink, 11008 // shrink):
        keep, focus = cols // 10, cols // 5
        yield Case(
            kernel="balanced_mask",
            case=f"{cols} columns fp32",
            inputs=lambda cols=cols: (torch.rand(cols), torch.rand(cols)),
            contenders={
                OURS: partial(hpa_ext.balanced_mask, keep=keep, focus=focus),
                TORCH: partial(hand_written.balanced_mask, keep=keep, focus=focus),
            },
            result=chosen,
            tolerance=0,
            level="quick",
            warm=True,
        )


def chosen(returned: Tensor | hpa_ext.BalancedMask, *_: Tensor) -> list[Tensor]:
    return [returned if isinstance(returned, Tensor) else returned.mask]

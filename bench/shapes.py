"""Inputs and labels that several kernels' cases share."""

from __future__ import annotations

import torch
from torch import Tensor

BOTH = (torch.float32, torch.bfloat16)


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def layer_pair(rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weights of a layer before and after fine-tuning."""
    before = torch.randn(rows, cols)
    after = before + 0.01 * torch.randn(rows, cols)
    return before.to(dtype), after.to(dtype)


def small_layers(shrink: int) -> tuple[int, int]:
    """Side and number of many small layers: with their old weights, 128 MB."""
    return 512 // min(shrink, 16), 64 // min(shrink, 16)


def layer_pairs(side: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of many square layers before and after fine-tuning, float32."""
    pairs = [layer_pair(side, side, torch.float32) for _ in range(count)]
    return [before for before, _ in pairs], [after for _, after in pairs]


def rows_of_basis(rank: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[rank, n]``, orthonormal to ``sqrt(rank / n)``: as good as exact for timing, and made at once."""
    return torch.randn(rank, n, dtype=dtype).mul_(n**-0.5)

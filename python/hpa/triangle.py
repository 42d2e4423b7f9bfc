"""Symmetric matrices as packed lower triangles: row by row, float32, half the numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]


def pack(gram: Tensor) -> Tensor:
    """``[cols (cols+1)/2]`` float32 of the lower triangle of ``[cols, cols]``."""
    # By rows: an index of the whole triangle would take several times the matrix.
    cols = gram.shape[0]
    packed = torch.empty(cols * (cols + 1) // 2, dtype=torch.float32, device=gram.device)
    position = 0
    for row in range(cols):
        packed[position : position + row + 1] = gram[row, : row + 1]
        position += row + 1
    return packed


def unpack(packed: Tensor, cols: int) -> Tensor:
    """``[cols, cols]`` float32 with the lower triangle of a packed one, zeros above."""
    gram = torch.zeros(cols, cols, device=packed.device)
    position = 0
    for row in range(cols):
        gram[row, : row + 1] = packed[position : position + row + 1]
        position += row + 1
    return gram

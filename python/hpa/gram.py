"""Whole Gram matrices in memory: their other triangle, and their factor with as much damping as it takes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_gram", "damped_cholesky", "whole"]


def whole(lower: Tensor) -> Tensor:
    """The symmetric matrix of a lower triangle; above the diagonal are zeros."""
    return lower + lower.tril(-1).T


def check_gram(gram: Tensor, which: str, label: str, cols: int) -> None:
    """Raises ValueError (``label`` names the layer) unless ``gram`` is ``[cols, cols]``."""
    if tuple(gram.shape) != (cols, cols):
        raise ValueError(f"layer {label}: {which} gram: expected [{cols}, {cols}], got {tuple(gram.shape)}")


def damped_cholesky(matrix: Tensor, mean: float, damping: float) -> tuple[Tensor | None, float]:
    """``C`` with ``C C' = matrix + damping * mean I``, lower triangular, and the damping that was used.

    Where factoring fails the damping is taken times 10, up to 1; ``None`` where it fails even so. ``matrix`` is damped
    in place.
    """
    added = 0.0
    while True:
        matrix.diagonal().add_(damping * mean - added)
        added = damping * mean
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return factor, damping
        # One part in a million more than the limit: 0.01 * 10 * 10 may be a little above 1.
        if damping * 10 > 1.0 + 1e-6:
            return None, damping
        damping *= 10

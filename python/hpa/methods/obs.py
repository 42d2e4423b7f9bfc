"""Optimal brain surgeon, blocked as SparseGPT does it: what one weight loses, the weights right of it make good.

``(H + lambda I)^-1 = U'U`` with U upper triangular.  Moving entry j of a row by ``q - w`` costs ``(q - w)^2 / U_jj^2``,
where the columns left of j are settled, and the least loss is had by adding ``-(w - q)/U_jj * U[j, j+1:]`` to the
columns right of it (Frantar & Alistarh, arXiv 2301.00774).  U_jj^2 is not the diagonal of the inverse: it is the pivot
once the columns to the left are eliminated (METHOD D3).
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from hpa.layers import InputStatistics
from hpa_ext import DampingWarning, FactorizationError

__all__ = ["InverseFactor", "inverse_factor"]


def inverse_factor(gram: Tensor, damping: float, label: str) -> tuple[Tensor, float]:
    """U of a Gram matrix ``[cols, cols]`` (lower triangle), float64, and the damping that succeeded.

    As the published codes do it, inputs that were never active get ``H_jj = 1`` first, then
    ``lambda = damping * mean(diag H)``; times 10 up to 1 where factoring fails.  From one Cholesky factor of the
    reversed matrix and one triangular inverse, 2/3 cols^3 flops and three matrices of memory.

    Raises:
        FactorizationError: not positive definite at any damping; ``label`` names the layer.
    """
    lower = gram.double().tril()
    dead = lower.diagonal() == 0
    lower.diagonal()[dead] = 1.0
    mean = float(lower.diagonal().mean()) if len(lower) else 0.0
    if not math.isfinite(mean):
        raise ValueError(f"layer {label}: the Gram matrix of its input is not finite")
    # J H J = L L' with J the reversal gives H = R R', R = J L J upper, and U = R^-1 = J L^-1 J.
    whole = (lower + lower.tril(-1).T).flip(0, 1)
    tried, added = damping, 0.0
    while True:
        whole.diagonal().add_(tried * mean - added)
        added = tried * mean
        factor, failed = torch.linalg.cholesky_ex(whole)
        if not int(failed):
            break
        if tried * 10 > 1.0 + 1e-6:
            raise FactorizationError(f"layer {label}: H is not positive definite, even with damping {tried:g}")
        tried *= 10
    if tried != damping:
        message = f"layer {label}: H not positive definite with damping {damping:g}; used {tried:g}"
        warnings.warn(message, DampingWarning, stacklevel=3)
    del whole
    identity = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False).flip(0, 1), tried


class InverseFactor:
    """U of the last input that was asked for: layers that share an input share its factorisation."""

    def __init__(self) -> None:
        self._held: tuple[InputStatistics, Tensor, float] | None = None

    def of(
        self, which: str, statistics: InputStatistics, damping: float, label: str, cols: int
    ) -> tuple[Tensor, float]:
        """As :func:`inverse_factor`.

        Raises:
            ValueError: statistics without a Gram matrix, or of another width.
        """
        if self._held is not None and self._held[0] is statistics:
            return self._held[1], self._held[2]
        self._held = None  # its memory is free before the next is made
        if statistics.gram is None:
            raise ValueError(f"layer {label}: needs the {which} Gram matrix, got none")
        if tuple(statistics.gram.shape) != (cols, cols):
            found = tuple(statistics.gram.shape)
            raise ValueError(f"layer {label}: {which} gram: expected [{cols}, {cols}], got {found}")
        factor, used = inverse_factor(statistics.gram, damping, label)
        self._held = (statistics, factor, used)
        return factor, used

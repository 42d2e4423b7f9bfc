"""Optimal brain surgeon, blocked as SparseGPT does it: what one weight loses, the weights right of it make good.

``(H + lambda I)^-1 = U'U`` with U upper triangular.  Moving entry j of a row by ``q - w`` costs ``(q - w)^2 / U_jj^2``,
where the columns left of j are settled, and the least loss is had by adding ``-(w - q)/U_jj * U[j, j+1:]`` to the
columns right of it (Frantar & Alistarh, arXiv 2301.00774).  U_jj^2 is not the diagonal of the inverse: it is the pivot
once the columns to the left are eliminated (METHOD D3).
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from hpa.columns import keep_as_learned, measure, measured_numbers
from hpa.config import CalibrationConfig
from hpa.gram import check_gram, damped_cholesky, whole
from hpa.layers import InputStatistics, LayerChange, LayerEdit, Number
from hpa.methods.base import Method
from hpa.updates import dense, vector_of
from hpa_ext import DampingWarning, FactorizationError

__all__ = ["Compensating", "InverseFactor", "inverse_factor"]


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
    factor, tried = damped_cholesky(whole(lower).flip(0, 1), mean, damping)
    if factor is None:
        raise FactorizationError(f"layer {label}: H is not positive definite, even with damping {tried:g}")
    if tried != damping:
        message = f"layer {label}: H not positive definite with damping {damping:g}; used {tried:g}"
        warnings.warn(message, DampingWarning, stacklevel=3)
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
        check_gram(statistics.gram, which, label, cols)
        factor, used = inverse_factor(statistics.gram, damping, label)
        self._held = (statistics, factor, used)
        return factor, used


class Compensating(Method):
    """A method that settles a weight entry by entry, where what is left makes good what has been settled."""

    config: CalibrationConfig
    inputs: ClassVar[Literal["safety", "task"]]
    """The set whose inputs say what an entry costs; its Gram matrix is needed."""

    def __init__(self, config: BaseModel | None = None) -> None:
        super().__init__(config)
        self._factor = InverseFactor()

    @abstractmethod
    def settle(self, before: Tensor, after: Tensor, factor: Tensor) -> tuple[Tensor, dict[str, Number]]:
        """The edited weight and what to report of it.

        Args:
            before, after: ``[rows, cols]`` float64.
            factor: U ``[cols, cols]``.
        """

    def stays_tuned(self, change: LayerChange) -> str | None:
        """Why this layer is kept as learned; ``None``: it is edited."""
        return None

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        seen = safety if self.inputs == "safety" else task
        if seen is None:
            raise ValueError(f"layer {change.label}: method '{self.name}' needs {self.inputs} statistics, got none")
        statistics = measure(change)
        numbers: dict[str, Number] = measured_numbers(statistics)
        if not bool(statistics.column_change.any()):
            return keep_as_learned(change, "no change", numbers)
        if reason := self.stays_tuned(change):
            return keep_as_learned(change, reason, numbers)
        if seen.zero:
            return keep_as_learned(change, f"no {self.inputs} activations", numbers)
        factor, damping = self._factor.of(self.inputs, seen, self.config.damping, change.label, change.cols)
        before = change.before.double()
        update = dense(vector_of(change.before, change.update)).double()
        weight, settled = self.settle(before, before + update, factor)
        numbers |= {
            **settled,
            "update_left": float((weight - before).square().sum() / update.square().sum()),
            f"{self.inputs}_damping": damping,
        }
        return LayerEdit(numbers, weight=weight.to(change.before.dtype))

    def finish_task(self) -> None:
        self._factor = InverseFactor()

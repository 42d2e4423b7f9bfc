"""RegMean: merge linear layers so that each model's inputs are answered as that model did (Jin et al., ICLR 2023).

arXiv 2212.09849.  With ``G_i = X_i'X_i / N_i`` of task i's inputs in task i's model, off-diagonals shrunk:

    G~  = alpha G + (1 - alpha) diag(G)
    W^  = argmin_W sum_i |(W - W_i) X_i|^2  =  (sum_i W_i G~_i) (sum_i G~_i)^-1
        = W_0 + sum_i tau_i G~_i M^-1,      M = sum_i G~_i + ridge,   tau_i = W_i - W_0

The aligned model is one of the merged models, with the safety set's inputs and the weight ``safety`` (0: the tuned
models alone, as published).  ``train_from="aligned"`` trains every task from the aligned model and merges all; with
``train_from="previous"`` two models are merged after each task: the one before it, with the inputs of safety and of all
past tasks, and the tuned one.  The factor 2 of the Hessian cancels.

``tau_i G~_i`` of factors is ``B (A G~_i)``: the state is one low-rank product a layer and task, and one triangle an
input; edits stay low-rank.  Cost: one Cholesky factor an input, 2 rank cols^2 flops a layer (2 rows cols^2 if dense).
On checkpoints two models are merged: Gram matrices of other tasks' models are not at hand there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from hpa.columns import keep_as_learned, measure, measured_numbers
from hpa.config import CalibrationConfig
from hpa.gram import check_gram, damped_cholesky, whole
from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate, Number
from hpa.methods.base import check_strength
from hpa.methods.merging import RemembersUpdates
from hpa.triangle import pack, unpack
from hpa.updates import Vector, added, vector_of
from hpa_ext import DampingWarning, FactorizationError

__all__ = ["RegMean", "RegMeanConfig"]


class RegMeanConfig(CalibrationConfig):
    """How Gram matrices are shrunk, and what the aligned model weighs."""

    train_from: Literal["aligned", "previous"] = Field(
        default="aligned",
        description="each task is trained from the aligned model, as published, or from what the last merge made",
    )
    alpha: float = Field(default=0.9, ge=0.0, le=1.0, description="factor of the off-diagonals of Gram matrices")
    safety: float = Field(
        default=1.0, ge=0.0, description="weight of the aligned model with the safety inputs; 0: tuned models alone"
    )
    ridge: float = Field(
        default=1e-6,
        gt=0.0,
        le=1.0,
        description="added to the diagonal of the sum, as a share of its mean; times 10 up to 1 if factoring fails",
    )


class RegMean(RemembersUpdates):
    """Linear layers are merged by least squares on each model's own inputs."""

    name: ClassVar[str] = "regmean"
    Config: ClassVar[type[BaseModel]] = RegMeanConfig
    config: RegMeanConfig  # type: ignore[assignment]

    def __init__(self, config: BaseModel | None = None) -> None:
        super().__init__(config)
        self.needs = frozenset({"safety_gram", "task_gram"} if self.config.safety > 0 else {"task_gram"})
        self._grams: dict[str, Tensor] = {}  # input -> sum of past tasks' shrunk Gram matrices, packed
        self._pending_grams: dict[str, Tensor] = {}
        self._solver: _Solver | None = None

    def at_strength(self, strength: float) -> RegMean:
        """The weight of the aligned model times ``strength``."""
        check_strength(strength)
        if strength != 1 and self.config.safety == 0:
            raise ValueError(f"strength: method 'regmean' with safety=0 has none to set, got {strength}")
        return type(self)(self.config.model_copy(update={"safety": self.config.safety * strength}))

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        if task is None or (safety is None and self.config.safety > 0):
            missing = "task" if task is None else "safety"
            raise ValueError(f"layer {change.label}: method 'regmean' needs {missing} statistics, got none")
        solver = self._solver_for(change, safety, task)
        statistics = measure(change)
        product = _times(vector_of(change.before, change.update), solver.gram)
        past: list[Vector] = []
        if self.config.train_from == "aligned":
            past = self.past(change.name)
            self.remember(change.name, product, seed)
        numbers: dict[str, Number] = {
            "merged_tasks": len(past) + 1,
            "ridge": solver.ridge,
            **measured_numbers(statistics),
        }
        if not past and not bool(statistics.column_change.any()):
            return keep_as_learned(change, "no change", numbers)
        if solver.factor is None:
            return keep_as_learned(change, "no activations", numbers)
        return added(change, change.before, [solver.apply(vector) for vector in [*past, product]], numbers)

    def finish_task(self) -> None:
        """The task's product and Gram matrices become past ones."""
        super().finish_task()
        for key, new in self._pending_grams.items():
            old = self._grams.get(key)
            self._grams[key] = new if old is None else old + new.to(old.device)
        self._pending_grams, self._solver = {}, None

    def state_dict(self) -> dict[str, Tensor]:
        """As :class:`RemembersUpdates`, of the products ``tau_i G~_i``, and ``gram.<input>``: the packed lower triangle
        ``[cols (cols+1)/2]`` of the past Gram matrices' sum, float32."""
        return {**super().state_dict(), **{f"gram.{key}": packed for key, packed in self._grams.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict({key: value for key, value in state.items() if not key.startswith("gram.")})
        self._grams = {
            key.removeprefix("gram."): value.to(torch.float32)
            for key, value in state.items()
            if key.startswith("gram.")
        }
        self._pending_grams, self._solver = {}, None

    def _solver_for(self, change: LayerChange, safety: InputStatistics | None, task: InputStatistics) -> _Solver:
        last = self._solver
        if last is not None and last.key == change.input_key and last.safety is safety and last.task is task:
            return last
        gram = self._shrunk("task", task, change)
        total = gram.clone()
        if safety is not None and self.config.safety > 0:
            total += self.config.safety * self._shrunk("safety", safety, change)
        packed = self._grams.get(change.input_key)
        if packed is not None:
            if packed.numel() != change.cols * (change.cols + 1) // 2:
                raise ValueError(f"layer {change.label}: the past of its input is for another width than {change.cols}")
            total += whole(unpack(packed.to(total.device), change.cols).double())
        if self.goes_on:
            self._pending_grams[change.input_key] = pack(gram)
        self._solver = _Solver.of(change, safety, task, gram, total, self.config.ridge)
        return self._solver

    def _shrunk(self, which: str, statistics: InputStatistics, change: LayerChange) -> Tensor:
        """G~, whole, float64; zeros where the input was never active."""
        cols, device = change.cols, change.before.device
        if statistics.gram is None:
            if not statistics.zero:
                raise ValueError(f"layer {change.label}: method 'regmean' needs the {which} Gram matrix, got none")
            return torch.zeros(cols, cols, dtype=torch.float64, device=device)
        check_gram(statistics.gram, which, change.label, cols)
        shrunk = whole(statistics.gram.to(device).tril().double())
        diagonal = shrunk.diagonal().clone()
        shrunk *= self.config.alpha
        shrunk.diagonal().copy_(diagonal)
        return shrunk


class _Solver:
    """``M^-1`` of one input, factored; ``factor`` is ``None`` where nothing was active."""

    def __init__(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics,
        gram: Tensor,
        factor: Tensor | None,
        ridge: float,
    ) -> None:
        self.key = change.input_key
        self.safety, self.task = safety, task
        self.gram = gram
        self.factor, self.ridge = factor, ridge

    @classmethod
    def of(
        cls,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics,
        gram: Tensor,
        total: Tensor,
        ridge: float,
    ) -> _Solver:
        """Raises FactorizationError (layer named) where M is not positive definite at any ridge."""
        mean = float(total.diagonal().mean()) if len(total) else 0.0
        if not math.isfinite(mean):
            raise ValueError(f"layer {change.label}: the Gram matrices of its input are not finite")
        if mean == 0.0:
            return cls(change, safety, task, gram, None, ridge)
        factor, tried = damped_cholesky(total, mean, ridge)
        if factor is None:
            raise FactorizationError(f"layer {change.label}: the sum of Gram matrices is not positive definite")
        if tried != ridge:
            message = f"layer {change.label}: Gram matrices not positive definite with ridge {ridge:g}; used {tried:g}"
            warnings.warn(message, DampingWarning, stacklevel=4)
        return cls(change, safety, task, gram, factor, tried)

    def apply(self, product: Vector) -> Vector:
        """``product M^-1``."""
        assert self.factor is not None
        rows = product.A if isinstance(product, LowRankUpdate) else product
        solved = torch.cholesky_solve(rows.double().T, self.factor).T.to(torch.promote_types(rows.dtype, torch.float32))
        return replace(product, A=solved) if isinstance(product, LowRankUpdate) else solved


def _times(vector: Vector, gram: Tensor) -> Vector:
    """``vector G~``, in float64 and back."""
    rows = vector.A if isinstance(vector, LowRankUpdate) else vector
    product = (rows.double() @ gram).to(torch.promote_types(rows.dtype, torch.float32))
    return replace(vector, A=product) if isinstance(vector, LowRankUpdate) else product

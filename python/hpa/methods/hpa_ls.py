"""HPA's statistics used as least squares: keep whole input directions instead of columns (METHOD 9).

Answer safety inputs and the inputs of past tasks as the old weight did, and the new task's inputs as the new one does:

    W^ = argmin_W  |(W - W_o) X_s|^2/N_s + sum_i m_i |(W - W_o) X_i|^2/N_i + mu |(W - W_n) X_t|^2/N_t + l |W - W_n|^2

    A  = X_s'X_s/N_s + sum_i m_i X_i'X_i/N_i        kept: safety, and a memory of past tasks
    B  = mu X_t'X_t/N_t + l I                       wanted: the new task
    W^ = W_o + change * B (A + B)^-1                one cols x cols filter on the right of the update

A low-rank update stays low-rank: the filter acts on its A factor.  The Gram matrices carry the factor 2 of the Hessian
throughout, which cancels.  Relatives: RegMean (merging by Gram matrices), GPM (a hard subspace, during training) and
AlphaEdit (editing in a null space).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from hpa.columns import keep_as_learned, measure, measured_numbers, stored
from hpa.config import CalibrationConfig, ColumnConfig
from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate, Number
from hpa.methods.base import Method
from hpa.triangle import pack, unpack
from hpa_ext import DampingWarning, FactorizationError

__all__ = ["HPALeastSquares", "LeastSquaresConfig"]


class LeastSquaresConfig(CalibrationConfig):
    """One knob for the new task (``mu``), one for past tasks (``memory``)."""

    mu: float = Field(
        default=0.1,
        ge=0.0,
        description="weight of the new task's inputs; large: the tuned model, 0: the old one where safety looks",
    )
    memory: float = Field(
        default=0.1, ge=0.0, description="weight m of past tasks' inputs; 0: no memory, nothing is carried on"
    )
    memory_weighting: Literal["sum", "mean", "decay"] = Field(
        default="sum",
        description="sum: every past task weighs m; mean: all of them together weigh m; decay: m * memory_decay^age, "
        "the latest at age 0",
    )
    memory_decay: float = Field(
        default=0.8, gt=0.0, le=1.0, description="memory_weighting=decay: factor a task loses per later task"
    )
    memory_source: Literal["trained", "edited"] = Field(
        default="trained",
        description="trained: remember the task's inputs as the tuned model sees them (no extra cost); edited: as the "
        "edited model sees them (one more forward pass over the task's samples)",
    )
    ridge: float = Field(
        default=1e-4,
        gt=0.0,
        le=1.0,
        description="l, as a share of the mean diagonal of A + mu X_t'X_t; times 10 up to 1 if factoring fails",
    )
    lora_native: bool = Field(
        default=True, description="D14: edit LoRA factors exactly; false merges them in the storage dtype first"
    )


class HPALeastSquares(Method):
    """A soft projection of each update off the inputs of safety and of past tasks."""

    name: ClassVar[str] = "hpa_ls"
    Config: ClassVar[type[BaseModel]] = LeastSquaresConfig
    config: LeastSquaresConfig

    def __init__(self, config: BaseModel | None = None) -> None:
        super().__init__(config)
        self.needs = frozenset({"safety_gram", "task_gram"})
        if self.config.memory > 0 and self.config.memory_source == "edited":
            self.needs |= {"edited_gram"}
        self._memory: dict[str, Tensor] = {}  # input_key -> packed lower triangle, float32
        self._tasks: dict[str, int] = {}  # input_key -> tasks in it
        self._pending: dict[str, Tensor] = {}  # this task's Gram matrices, packed
        self._filter: _Filter | None = None

    def at_strength(self, strength: float) -> HPALeastSquares:
        """The weight ``mu`` of the new task over ``strength``."""
        if not (strength > 0 and math.isfinite(strength)):
            raise ValueError(f"strength: expected a positive number, got {strength}")
        return type(self)(self.config.model_copy(update={"mu": self.config.mu / strength}))

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        if safety is None or task is None:
            missing = "safety" if safety is None else "task"
            raise ValueError(f"layer {change.label}: method 'hpa_ls' needs {missing} statistics, got none")
        change = stored(change, ColumnConfig(lora_native=self.config.lora_native))
        filter_ = self._filter_for(change, safety, task)
        statistics = measure(change)
        numbers: dict[str, Number] = {
            "memory_tasks": self._tasks.get(change.input_key, 0),
            **measured_numbers(statistics),
        }
        if not bool(statistics.column_change.any()):
            return keep_as_learned(change, "no change", numbers)
        if not filter_.something_kept:
            return keep_as_learned(change, "no safety activations", numbers)
        numbers["ridge"] = filter_.ridge
        if isinstance(change.update, LowRankUpdate):
            update = change.update
            old = update.A.double()
            new = filter_.apply(old)
            gram_b = update.B.double().T @ update.B.double()
            numbers |= filter_.effects(old, new, lambda left, right: float((gram_b * (left @ right.T)).sum()))
            filtered = LowRankUpdate(new.to(torch.promote_types(update.A.dtype, torch.float32)), update.B, update.scale)
            return LayerEdit(numbers, base=change.before, update=filtered, dtype=change.before.dtype)
        before = change.before.double()
        old = change.update.double() - before
        new = filter_.apply(old)
        numbers |= filter_.effects(old, new, lambda left, right: float((left * right).sum()))
        return LayerEdit(numbers, weight=(before + new).to(change.before.dtype))

    def observe_edited(self, statistics: Mapping[str, InputStatistics]) -> None:
        for key, seen in statistics.items():
            if seen.gram is not None and not seen.zero:
                self._pending[key] = pack(seen.gram)

    def finish_task(self) -> None:
        """Fold the task's Gram matrices into the memory."""
        fade = self.config.memory_decay if self.config.memory_weighting == "decay" else 1.0
        for key in set(self._memory) | set(self._pending):
            old, new = self._memory.get(key), self._pending.get(key)
            if old is None:
                assert new is not None
                self._memory[key] = new
            else:
                # The old memory fades by a task's age even where this task never reached the input.
                self._memory[key] = old * fade if new is None else (old * fade).add_(new.to(old.device))
            self._tasks[key] = self._tasks.get(key, 0) + (new is not None)
        self._pending = {}
        self._filter = None

    def state_dict(self) -> dict[str, Tensor]:
        """``memory.<input_key>``: packed lower triangle ``[cols (cols+1)/2]`` float32, row by row;
        ``tasks.<input_key>``: how many tasks are in it."""
        state = {f"memory.{key}": packed for key, packed in self._memory.items()}
        return state | {f"tasks.{key}": torch.tensor(count) for key, count in self._tasks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        unknown = [key for key in state if not key.startswith(("memory.", "tasks."))]
        memory = {key.removeprefix("memory."): value for key, value in state.items() if key.startswith("memory.")}
        tasks = {key.removeprefix("tasks."): int(value) for key, value in state.items() if key.startswith("tasks.")}
        if unknown or set(memory) != set(tasks):
            odd = unknown or sorted(set(memory) ^ set(tasks))
            raise ValueError(f"state: not a memory of method 'hpa_ls', unexpected or unpaired: {', '.join(odd[:3])}")
        if memory and not self.config.memory:
            raise ValueError("state: holds a memory, but this method was made with memory=0")
        self._memory = {key: value.to(torch.float32) for key, value in memory.items()}
        self._tasks, self._pending, self._filter = tasks, {}, None

    def _filter_for(self, change: LayerChange, safety: InputStatistics, task: InputStatistics) -> _Filter:
        """The filter of one input, factored once for all layers that share it."""
        last = self._filter
        if last is not None and last.key == change.input_key and last.safety is safety and last.task is task:
            return last
        cols = change.cols
        kept = _symmetric("safety", safety, change)
        wanted = _symmetric("task", task, change)
        weight = 0.0
        packed = self._memory.get(change.input_key)
        if packed is not None and self.config.memory > 0:
            if packed.numel() != cols * (cols + 1) // 2:
                raise ValueError(f"layer {change.label}: the memory of its input is for another width than {cols}")
            share = self._tasks[change.input_key] if self.config.memory_weighting == "mean" else 1
            weight = self.config.memory / max(share, 1)
            kept += weight * _whole(unpack(packed.to(kept.device), cols))
        if (
            self.config.memory > 0
            and self.config.memory_source == "trained"
            and task.gram is not None
            and not task.zero
        ):
            self._pending[change.input_key] = pack(task.gram)
        self._filter = _Filter.build(change, safety, task, kept, wanted, self.config)
        return self._filter


@dataclass(eq=False)
class _Filter:
    """``F = B (A + B)^-1`` of one input, with ``A + B`` factored."""

    key: str
    safety: InputStatistics
    task: InputStatistics
    kept: Tensor  # A, float64 [cols, cols]
    learned: Tensor  # X_t'X_t/N_t
    wanted: Tensor  # B
    factor: Tensor  # lower Cholesky factor of A + B
    ridge: float
    something_kept: bool

    @classmethod
    def build(
        cls,
        change: LayerChange,
        safety: InputStatistics,
        task: InputStatistics,
        kept: Tensor,
        learned: Tensor,
        config: LeastSquaresConfig,
    ) -> _Filter:
        """Raises FactorizationError (layer named) when ``A + B`` is not positive definite at any ridge."""
        scale = float((kept + config.mu * learned).diagonal().mean()) if change.cols else 0.0
        if not math.isfinite(scale):
            raise ValueError(f"layer {change.label}: the Gram matrices of its input are not finite")
        ridge, something_kept = config.ridge, bool(kept.any())
        while True:
            wanted = config.mu * learned
            wanted.diagonal().add_(ridge * scale)
            if not something_kept:  # nothing to solve: the filter is the identity
                return cls(change.input_key, safety, task, kept, learned, wanted, wanted, ridge, False)
            factor, failed = torch.linalg.cholesky_ex(kept + wanted)
            if not int(failed):
                break
            if ridge * 10 > 1.0 + 1e-6:
                raise FactorizationError(
                    f"layer {change.label}: A + B is not positive definite, even with ridge {ridge:g}"
                )
            ridge *= 10
        if ridge != config.ridge:
            message = f"layer {change.label}: A + B not positive definite with ridge {config.ridge:g}; used {ridge:g}"
            warnings.warn(message, DampingWarning, stacklevel=4)
        return cls(change.input_key, safety, task, kept, learned, wanted, factor, ridge, True)

    def apply(self, rows: Tensor) -> Tensor:
        """``rows @ F`` for rows ``[n, cols]``, float64."""
        return torch.cholesky_solve((rows @ self.wanted).T, self.factor).T

    def effects(self, old: Tensor, new: Tensor, trace: Callable[[Tensor, Tensor], float]) -> dict[str, Number]:
        """Shares of squared norms: what is left of the update, what is left of its effect on the outputs for safety and
        memory inputs, and what is lost of its effect for the task's inputs.

        ``trace(left, right)`` is the inner product of two updates, given what stands right of their common factor B.
        """
        lost = old - new
        return {
            "update_left": _ratio(trace(new, new), trace(old, old)),
            "kept_inputs_change_left": _ratio(trace(new @ self.kept, new), trace(old @ self.kept, old)),
            "task_change_lost": _ratio(trace(lost @ self.learned, lost), trace(old @ self.learned, old)),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _symmetric(which: str, statistics: InputStatistics, change: LayerChange) -> Tensor:
    """The Gram matrix in full, float64, zeros where the input was never active."""
    if statistics.gram is None:
        if not statistics.zero:
            raise ValueError(f"layer {change.label}: method 'hpa_ls' needs the {which} Gram matrix, got none")
        return torch.zeros(change.cols, change.cols, dtype=torch.float64, device=change.before.device)
    if tuple(statistics.gram.shape) != (change.cols, change.cols):
        found = tuple(statistics.gram.shape)
        raise ValueError(f"layer {change.label}: {which} gram: expected [{change.cols}, {change.cols}], got {found}")
    return _whole(statistics.gram.to(change.before.device).tril())


def _whole(lower: Tensor) -> Tensor:
    """The symmetric float64 matrix of a lower triangle."""
    lower = lower.double()
    return lower + lower.tril(-1).T

"""What methods have in common that make one model of the models of several tasks.

Published for *experts*: every task is fine-tuned from the same model (here the aligned one), and the updates
``tau_i = W_i - W_0`` are merged at the end.  In a sequence that is ``train_from="aligned"``: after task t the model
is ``W_0 + merge(tau_1 ... tau_t)``, and the next task is again trained from ``W_0``.  With ``train_from="previous"``
task t is trained from what the merge before it made, and ``tau_t`` is that update.

The updates of past tasks are the state, in their factors where they have some: rank (rows + cols) numbers a layer and
task.  On checkpoints they come as other tasks' models of the same weights (``LayerChange.earlier``).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from hpa.columns import keep_as_learned, measure, measured_numbers
from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate, Number
from hpa.methods.base import Kind, Method
from hpa.updates import Vector, vector_of

__all__ = ["Draw", "MergeConfig", "Merging", "RemembersUpdates"]

Draw = tuple[int, int]
"""What a random method draws from, besides the layer's name: the seed of a task's edit, and its place."""


class MergeConfig(BaseModel):
    """Where the tasks that are merged begin."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train_from: Literal["aligned", "previous"] = Field(
        default="aligned",
        description="each task is trained from the aligned model, as published, or from what the last merge made",
    )


class RemembersUpdates(Method):
    """A method whose state is one update a layer and past task, and the seeds of their edits.

    Its options say where trainings start (``train_from``).
    """

    kind: ClassVar[Kind] = "merging"
    Config: ClassVar[type[BaseModel]] = MergeConfig
    config: MergeConfig

    def __init__(self, config: BaseModel | None = None) -> None:
        super().__init__(config)
        self._past: dict[str, list[Vector]] = {}  # layer -> an update a task
        self._seeds: list[int] = []  # of the past tasks' edits
        self._pending: dict[str, Vector] = {}
        self._pending_seed: int | None = None

    @property
    def starts_from(self) -> Literal["previous", "aligned"]:
        return self.config.train_from

    def past(self, layer: str) -> list[Vector]:
        """The updates of past tasks, oldest first."""
        return list(self._past.get(layer, ()))

    def remember(self, layer: str, vector: Vector, seed: int) -> None:
        """Make ``vector`` this task's update, which :meth:`finish_task` files away."""
        if not self.goes_on:
            return
        # Factors are copied: whoever made them may train them on.
        kept = LowRankUpdate(vector.A.clone(), vector.B * vector.scale) if isinstance(vector, LowRankUpdate) else vector
        self._pending[layer], self._pending_seed = kept, seed

    def finish_task(self) -> None:
        """The task's updates become past ones."""
        for name, vector in self._pending.items():
            self._past.setdefault(name, []).append(vector)
        if self._pending_seed is not None:
            self._seeds.append(self._pending_seed)
        self._pending, self._pending_seed = {}, None

    def state_dict(self) -> dict[str, Tensor]:
        """``vector.<task>.A.<layer>``, ``vector.<task>.B.<layer>`` (the scale is in B) or ``vector.<task>.W.<layer>``;
        ``seeds``: of the past tasks' edits."""
        state: dict[str, Tensor] = {}
        for name, vectors in self._past.items():
            for index, vector in enumerate(vectors):
                if isinstance(vector, LowRankUpdate):
                    state[f"vector.{index}.A.{name}"] = vector.A
                    state[f"vector.{index}.B.{name}"] = vector.B * vector.scale
                else:
                    state[f"vector.{index}.W.{name}"] = vector
        if self._seeds:
            state["seeds"] = torch.tensor(self._seeds, dtype=torch.int64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        parts: dict[tuple[str, int], dict[str, Tensor]] = {}
        for key, tensor in state.items():
            match = re.fullmatch(r"vector\.(\d+)\.([ABW])\.(.+)", key)
            if match is not None:
                parts.setdefault((match[3], int(match[1])), {})[match[2]] = tensor
            elif key != "seeds":
                raise ValueError(f"state: not the past tasks of method '{self.name}', unexpected: {key}")
        past: dict[str, list[Vector]] = {}
        seeds = [int(value) for value in state.get("seeds", torch.empty(0, dtype=torch.int64))]
        for (name, index), held in sorted(parts.items()):
            if index != len(past.setdefault(name, [])) or set(held) not in ({"A", "B"}, {"W"}):
                raise ValueError(f"state: the update of task {index} in layer {name} is not whole")
            past[name].append(LowRankUpdate(held["A"], held["B"]) if "A" in held else held["W"])
        if any(len(vectors) != len(seeds) for vectors in past.values()):
            raise ValueError(f"state: expected {len(seeds)} past updates a layer (as seeds has), got another number")
        self._past, self._seeds, self._pending, self._pending_seed = past, seeds, {}, None


class Merging(RemembersUpdates):
    """``W^ = W_0 + merge(tau_1 ... tau_t)``."""

    @abstractmethod
    def merge(
        self, change: LayerChange, base: Tensor, vectors: list[Vector], draws: list[Draw], numbers: dict[str, Number]
    ) -> LayerEdit:
        """``base`` with ``vectors`` merged into it, oldest first; at least one.

        Args:
            change: the layer of the latest task.
            base: ``W_0``.
            draws: one for each vector, for methods that draw.
            numbers: what is known of the edit, to be completed.
        """

    @property
    def merges_earlier(self) -> bool:
        return self.config.train_from == "aligned"

    @property
    def references(self) -> frozenset[str]:
        return frozenset({"aligned"} if self.config.train_from == "previous" else ())

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        statistics = measure(change)
        past = self.past(change.name)
        draws = [(own, place) for place, own in enumerate(self._seeds)] if past else []
        for other in change.earlier:
            draws.append((seed, len(past)))
            past.append(vector_of(change.before, other))
        draws.append((seed, max(len(past), task_index)))
        numbers: dict[str, Number] = {"merged_tasks": len(past) + 1, **measured_numbers(statistics)}
        base = change.before
        if self.config.train_from == "previous":
            if change.aligned is None:
                raise ValueError(
                    f"layer {change.label}: train_from='previous' needs the aligned model's weight, got none"
                )
            base = change.aligned.to(change.before.device)
        vector = vector_of(change.before, change.update)
        self.remember(change.name, vector, seed)
        if not past and not bool(statistics.column_change.any()):
            return keep_as_learned(change, "no change", numbers)
        return self.merge(change, base, [*past, vector], draws, numbers)

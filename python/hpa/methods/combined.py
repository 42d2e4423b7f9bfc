"""Several methods at once, written with a plus: ``hpa+gpm`` trains by one and edits by the other.

At most one of them may change a finished update; the others only train, and still see every layer afterwards to learn
what to protect.  Options go by the methods' names::

    method: hpa+gpm
    options: {hpa: {p_max: 20}, gpm: {energy: 0.9}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, create_model
from torch import Tensor

from hpa.config import CalibrationConfig
from hpa.data.scenario import Sample
from hpa.layers import InputStatistics, LayerChange, LayerEdit
from hpa.methods.base import Kind, Method
from hpa.training import Lesson, Training, TrainingHooks

__all__ = ["Combined", "combine"]


class Combined(Method):
    """Trains by some methods, edits by one; made by :func:`combine`."""

    name: ClassVar[str] = "combined"
    kind: ClassVar[Kind] = "editing"
    only_trains: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, type[Method]]] = {}

    def __init__(self, config: BaseModel | None = None) -> None:
        super().__init__(config)
        self._own = {name: part(getattr(self.config, name)) for name, part in self.parts.items()}
        self._adopt()

    def _adopt(self) -> None:
        self.needs = frozenset().union(*(method.needs for method in self._own.values()))
        editors = [name for name, method in self._own.items() if not method.only_trains]
        self._editor = editors[0] if editors else next(iter(self._own))

    @property
    def references(self) -> frozenset[str]:
        return frozenset().union(*(method.references for method in self._own.values()))

    @property
    def trains_on(self) -> Literal["task", "tasks so far"]:
        return "tasks so far" if any(m.trains_on == "tasks so far" for m in self._own.values()) else "task"

    @property
    def training_options(self) -> dict[str, JsonValue]:
        return {name: m.training_options for name, m in self._own.items() if m.training_options}

    @property
    def calibration(self) -> CalibrationConfig | None:
        found = [self._own[self._editor].calibration, *(method.calibration for method in self._own.values())]
        return next((config for config in found if config is not None), None)

    @property
    def memory_samples(self) -> int:
        return max(method.memory_samples for method in self._own.values())

    @property
    def safety_memory(self) -> int:
        return max(method.safety_memory for method in self._own.values())

    @property
    def keep_samples(self) -> int:
        return max(method.keep_samples for method in self._own.values())

    def frozen_blocks(self, blocks: int) -> frozenset[int]:
        return frozenset().union(*(method.frozen_blocks(blocks) for method in self._own.values()))

    def at_strength(self, strength: float) -> Combined:
        """The editing method at that strength."""
        other = type(self)(self.config)
        other._own[self._editor] = self._own[self._editor].at_strength(strength)
        other._adopt()
        return other

    def work_size(self, rows: int, cols: int) -> int:
        return max(method.work_size(rows, cols) for method in self._own.values())

    def hooks(self, lesson: Lesson) -> TrainingHooks | None:
        found = [method.hooks(lesson) for method in self._own.values()]
        return _Several([hooks for hooks in found if hooks is not None])

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        edits = {
            # The editor comes last: only it may write into the update's memory.
            name: self._own[name].edit_layer(change, safety, task, task_index=task_index, seed=seed)
            for name in sorted(self._own, key=lambda name: name == self._editor)
        }
        edit = edits[self._editor]
        for name, other in edits.items():
            if name != self._editor:
                edit.numbers |= {f"{name}_{key}": value for key, value in other.numbers.items() if key == "protected"}
        return edit

    def observe_edited(self, statistics: Mapping[str, InputStatistics]) -> None:
        for method in self._own.values():
            if "edited_gram" in method.needs:
                method.observe_edited(statistics)

    def remember_inputs(self, statistics: Mapping[str, InputStatistics], *, weight: float | None = None) -> None:
        able = [m for m in self._own.values() if type(m).remember_inputs is not Method.remember_inputs]
        if not able:
            super().remember_inputs(statistics, weight=weight)  # says that there is no memory
        for method in able:
            method.remember_inputs(statistics, weight=weight)

    def after_task(self, lesson: Lesson) -> None:
        for method in self._own.values():
            method.after_task(lesson)

    def finish_task(self) -> None:
        for method in self._own.values():
            method.finish_task()

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{name}/{key}": t for name, method in self._own.items() for key, t in method.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        parted: dict[str, dict[str, Tensor]] = {name: {} for name in self._own}
        for key, tensor in state.items():
            name, _, rest = key.partition("/")
            if name not in parted:
                raise ValueError(f"state: method '{self.name}' carries that of {', '.join(parted)}, got {key}")
            parted[name][rest] = tensor
        for name, method in self._own.items():
            method.load_state_dict(parted[name])


def combine(parts: Mapping[str, type[Method]]) -> type[Combined]:
    """The class of several methods at once.

    Raises:
        ValueError: one method alone, two that edit, or one that merges or starts each task from the aligned model.
    """
    name = "+".join(parts)
    if len(parts) < 2:
        raise ValueError(f"method: expected different methods joined by '+', got {name!r}")
    editors = [part for part, method in parts.items() if not method.only_trains]
    if len(editors) > 1:
        raise ValueError(f"method: {name!r}: {' and '.join(editors)} both edit what was trained; join only one of them")
    for part, method in parts.items():
        if method.kind == "merging" or part == "joint":
            raise ValueError(f"method: {name!r}: '{part}' starts tasks from the aligned model and cannot be joined")
    fields: dict[str, Any] = {part: (method.Config, method.Config()) for part, method in parts.items()}
    config = create_model("CombinedConfig", __config__=ConfigDict(extra="forbid", frozen=True), **fields)
    return type("Combined", (Combined,), {"name": name, "parts": dict(parts), "Config": config})


class _Several(TrainingHooks):
    def __init__(self, many: Sequence[TrainingHooks]) -> None:
        self._many = many

    def samples(self, chosen: Sequence[Sample]) -> Sequence[Sample]:
        for hooks in self._many:
            chosen = hooks.samples(chosen)
        return chosen

    def begin(self, training: Training) -> None:
        for hooks in self._many:
            hooks.begin(training)

    def loss(self, batch: Mapping[str, Tensor], output: Any) -> Tensor | None:
        terms = [term for hooks in self._many for term in [hooks.loss(batch, output)] if term is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def before_step(self, step: int) -> None:
        for hooks in self._many:
            hooks.before_step(step)

    def end(self) -> None:
        for hooks in self._many:
            hooks.end()

"""Joint (multi-task) training: one LoRA on the data of all tasks so far, shuffled together, from the aligned model.

No method of continual learning; it may look at all data at once.  The upper bound for AP, not for MASR.  After task t
the model is the aligned one fine-tuned on D_1 + ... + D_t with t times the steps of one task, so that each sample is
seen as often as in a sequence.  Training costs 1 + 2 + ... + T tasks; an edit costs nothing.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from hpa.columns import keep_as_learned, measure, measured_numbers
from hpa.layers import InputStatistics, LayerChange, LayerEdit
from hpa.methods.base import Kind, Method

__all__ = ["Joint"]


class Joint(Method):
    """All tasks so far are trained together, from the aligned model; no edit."""

    name: ClassVar[str] = "joint"
    kind: ClassVar[Kind] = "training"
    only_trains: ClassVar[bool] = True

    @property
    def starts_from(self) -> Literal["previous", "aligned"]:
        return "aligned"

    @property
    def trains_on(self) -> Literal["task", "tasks so far"]:
        return "tasks so far"

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        return keep_as_learned(change, numbers=measured_numbers(measure(change)))

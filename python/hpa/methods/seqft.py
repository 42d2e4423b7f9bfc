"""Plain sequential fine-tuning: every update is kept whole.  The lower bound that every method is measured against."""

from __future__ import annotations

from typing import ClassVar

from hpa.columns import keep_as_learned, measure, measured_numbers
from hpa.layers import InputStatistics, LayerChange, LayerEdit
from hpa.methods.base import Kind, Method

__all__ = ["SeqFT"]


class SeqFT(Method):
    """No edit."""

    name: ClassVar[str] = "seqft"
    kind: ClassVar[Kind] = "training"

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

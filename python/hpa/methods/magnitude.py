"""Control: give back the columns that changed most, as many as HPA, without any Hessian.

If this does as well as HPA, the two calibration sets brought nothing.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel

from hpa.columns import give_back, keep_as_learned, measure, measured_numbers, stored
from hpa.config import ColumnConfig
from hpa.layers import InputStatistics, LayerChange, LayerEdit, Number
from hpa.methods.base import Kind, Method

__all__ = ["Magnitude"]


class Magnitude(Method):
    """The top columns by mean squared change go back; budget and adjustment as in HPA."""

    name: ClassVar[str] = "magnitude"
    kind: ClassVar[Kind] = "control"
    Config: ClassVar[type[BaseModel]] = ColumnConfig
    config: ColumnConfig

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        change = stored(change, self.config)
        statistics = measure(change)
        keep = self.config.keep_count(change.cols, change.block, change.blocks)
        numbers: dict[str, Number] = {"p": self.config.share(change.block, change.blocks), "keep": keep, "kept": keep}
        numbers |= measured_numbers(statistics)
        if not bool(statistics.column_change.any()):
            return keep_as_learned(change, "no change", numbers)
        # A stable sort of the negated scores: ties go to the lower column, as everywhere (D8).
        order = torch.argsort(-statistics.column_change, stable=True)
        mask = torch.zeros(change.cols, dtype=torch.bool, device=change.before.device)
        mask[order[:keep]] = True
        return give_back(change, mask, statistics, self.config, numbers)

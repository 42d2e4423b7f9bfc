"""Task arithmetic: add up what the tasks changed (Ilharco et al., arXiv 2212.04089).

    W^ = W_0 + scale * sum_i tau_i,       tau_i = W_i - W_0

The authors' advice without a validation set is a scale of about 0.3 to 0.4 for several tasks; 1 with one task is plain
fine-tuning.  Two passes a layer and task; sums of factors stay factors.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field
from torch import Tensor

from hpa.layers import LayerChange, LayerEdit, Number
from hpa.methods.base import check_strength
from hpa.methods.merging import Draw, MergeConfig, Merging
from hpa.updates import Vector, added, scaled

__all__ = ["TaskArithmetic", "TaskArithmeticConfig"]


class TaskArithmeticConfig(MergeConfig):
    """The factor of the sum."""

    scale: float = Field(default=0.4, ge=0.0, description="factor of the sum of updates")


class TaskArithmetic(Merging):
    """The updates of all tasks are added to the aligned model, times a factor."""

    name: ClassVar[str] = "task_arithmetic"
    Config: ClassVar[type[BaseModel]] = TaskArithmeticConfig
    config: TaskArithmeticConfig

    def at_strength(self, strength: float) -> TaskArithmetic:
        """The scale over ``strength``."""
        check_strength(strength)
        return type(self)(self.config.model_copy(update={"scale": self.config.scale / strength}))

    def merge(
        self, change: LayerChange, base: Tensor, vectors: list[Vector], draws: list[Draw], numbers: dict[str, Number]
    ) -> LayerEdit:
        numbers["factor"] = self.config.scale
        return added(change, base, [scaled(vector, self.config.scale) for vector in vectors], numbers)

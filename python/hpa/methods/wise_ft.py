"""WiSE-FT: a straight line between the weights before and after fine-tuning (Wortsman et al., arXiv 2109.01903).

    W^ = (1 - alpha) W_o + alpha W_n

``W_o`` is the weight before the task, or the aligned model's (``anchor="aligned"``: the paper's zero-shot model).  One
pass over two weights; factors stay factors.  ``scale`` is the same line with its factor taken from HPA.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from hpa.columns import keep_as_learned, measure, measured_numbers
from hpa.layers import InputStatistics, LayerChange, LayerEdit, Number
from hpa.methods.base import Method, check_strength
from hpa.updates import added, scaled, vector_of

__all__ = ["WiseFT", "WiseFTConfig"]


class WiseFTConfig(BaseModel):
    """Where on the line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: float = Field(default=0.5, ge=0.0, le=1.0, description="0: the weights before, 1: the tuned ones")
    anchor: Literal["prev", "aligned"] = Field(
        default="prev", description="the line begins at the weights before the task, or at the aligned model's"
    )


class WiseFT(Method):
    """The weights before and after the task are averaged."""

    name: ClassVar[str] = "wise_ft"
    Config: ClassVar[type[BaseModel]] = WiseFTConfig
    config: WiseFTConfig

    def at_strength(self, strength: float) -> WiseFT:
        """The share ``1 - alpha`` of the weights before times ``strength``, at most 1."""
        check_strength(strength)
        alpha = max(0.0, 1.0 - (1.0 - self.config.alpha) * strength)
        return type(self)(self.config.model_copy(update={"alpha": alpha}))

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        alpha = self.config.alpha
        statistics = measure(change)
        numbers: dict[str, Number] = {"alpha_line": alpha, **measured_numbers(statistics)}
        if self.config.anchor == "prev":
            if not bool(statistics.column_change.any()):
                return keep_as_learned(change, "no change", numbers)
            vector = vector_of(change.before, change.update)
            return added(change, change.before, [scaled(vector, alpha)], numbers)
        if change.aligned is None:
            raise ValueError(f"layer {change.label}: anchor='aligned' needs the aligned model's weight, got none")
        base = _between(change.aligned.to(change.before.device), change.before, alpha)
        return added(change, base, [scaled(vector_of(change.before, change.update), alpha)], numbers)


def _between(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    wide = torch.promote_types(torch.promote_types(start.dtype, end.dtype), torch.float32)
    return start.to(wide).lerp(end.to(wide), alpha)

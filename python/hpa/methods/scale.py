"""Control: shrink the whole update evenly, as much as HPA shrinks it.

If this does as well as HPA, a smaller step was all that was needed.  Relatives: WiSE-FT (arXiv 2109.01903) and task
arithmetic (arXiv 2212.04089), which sweep the factor.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal, cast

import torch
from pydantic import BaseModel, Field

from hpa.columns import keep_as_learned, measure, measured_numbers, stored
from hpa.config import AdaptConfig
from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate, Number
from hpa.methods.base import Kind, Method
from hpa.methods.hpa import HPA

__all__ = ["Scale", "ScaleConfig"]


class ScaleConfig(AdaptConfig):
    """HPA's options (for ``match="energy"``, the edit that is matched) and how much to shrink."""

    match: Literal["energy", "columns"] = Field(
        default="energy",
        description="energy: what is left of the update has the norm that HPA would leave in this layer; "
        "columns: the factor is one minus the share p of columns that HPA would return",
    )
    factor: float | None = Field(
        default=None, ge=0.0, description="the factor itself, for every layer; overrides match"
    )


class Scale(Method):
    """``W^ = W_o + factor * change``."""

    name: ClassVar[str] = "scale"
    kind: ClassVar[Kind] = "control"
    Config: ClassVar[type[BaseModel]] = ScaleConfig
    config: ScaleConfig

    def __init__(self, config: BaseModel | None = None) -> None:
        super().__init__(config)
        self._matched: HPA | None = None
        if self.config.factor is None and self.config.match == "energy":
            own = set(ScaleConfig.model_fields) - set(AdaptConfig.model_fields)
            self._matched = HPA(AdaptConfig(**self.config.model_dump(exclude=own)))
            self.needs = self._matched.needs

    def at_strength(self, strength: float) -> Scale:
        """The shrinkage ``1 - factor`` times ``strength`` where the factor is given, else that of the matched edit."""
        if self.config.factor is None or strength == 1:
            return type(self)(cast(Scale, super().at_strength(strength)).config)
        if not (strength > 0 and math.isfinite(strength)):
            raise ValueError(f"strength: expected a positive number, got {strength}")
        factor = max(0.0, 1.0 - (1.0 - self.config.factor) * strength)
        return type(self)(self.config.model_copy(update={"factor": factor}))

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
        numbers: dict[str, Number] = {
            "p": self.config.share(change.block, change.blocks),
            **measured_numbers(statistics),
        }
        if not bool(statistics.column_change.any()):
            return keep_as_learned(change, "no change", numbers)
        if self._matched is not None:
            kept = replace(change, reuse_update=False)  # the update is read again below
            edit = self._matched.edit_layer(kept, safety, task, task_index=task_index, seed=seed)
            if edit.skipped is not None:
                return edit
            left = (edit.weight.double() - change.before.double()).norm()
            factor = float(left) / math.sqrt(float(statistics.change_norm_sq))
        elif self.config.factor is not None:
            factor = self.config.factor
        else:
            factor = 1.0 - self.config.share(change.block, change.blocks) / 100.0
        numbers["factor"] = factor
        if isinstance(change.update, LowRankUpdate):
            shrunk = replace(change.update, scale=change.update.scale * factor)
            return LayerEdit(numbers, base=change.before, update=shrunk, dtype=change.before.dtype)
        wide = torch.promote_types(torch.promote_types(change.before.dtype, change.update.dtype), torch.float32)
        before = change.before.to(wide)
        weight = before.lerp(change.update.to(wide), factor).to(change.before.dtype)
        return LayerEdit(numbers, weight=weight)

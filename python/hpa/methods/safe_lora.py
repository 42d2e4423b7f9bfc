"""Safe LoRA: project updates that leave the alignment's column space onto it (Hsu et al., arXiv 2405.16833).

    V  = W_aligned - W_unaligned
    C^ = V V' / |V|_F                                rows x rows; no true projector, it is not idempotent
    W^ = W_o + C^ (W_n - W_o)   where cos(C^ change, change) <= threshold, else W_n

A low-rank update stays one: B becomes C^ B.  The published rule by ``threshold`` is implemented; its other rule, the
ten layers of least cosine, needs all layers before the first is edited, which a stream does not have.  C^ is never
formed: 2 products with V a layer, [rows, cols] x [cols, n], for n columns of the update (n = rank for factors).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from hpa.columns import ROWS_AT_ONCE, keep_as_learned, measure, measured_numbers
from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate, Number
from hpa.methods.base import Method, check_strength
from hpa.updates import added, vector_of

__all__ = ["SafeLoRA", "SafeLoRAConfig"]


class SafeLoRAConfig(BaseModel):
    """Which layers are projected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float = Field(
        default=0.5, ge=-1.0, le=1.0, description="layers whose cosine is at most this are projected; 1: all"
    )


class SafeLoRA(Method):
    """Updates that point away from what the alignment changed are projected onto it."""

    name: ClassVar[str] = "safe_lora"
    Config: ClassVar[type[BaseModel]] = SafeLoRAConfig
    config: SafeLoRAConfig

    @property
    def references(self) -> frozenset[str]:
        return frozenset({"aligned", "unaligned"})

    def at_strength(self, strength: float) -> SafeLoRA:
        """The threshold times ``strength``, at most 1 (for a negative one, over it)."""
        check_strength(strength)
        threshold = self.config.threshold
        threshold = min(1.0, threshold * strength if threshold >= 0 else threshold / strength)
        return type(self)(self.config.model_copy(update={"threshold": threshold}))

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        if change.aligned is None or change.unaligned is None:
            missing = "aligned" if change.aligned is None else "unaligned"
            raise ValueError(
                f"layer {change.label}: method 'safe_lora' needs the {missing} model's weight (V = aligned - "
                "unaligned), got none"
            )
        statistics = measure(change)
        numbers: dict[str, Number] = measured_numbers(statistics)
        if not bool(statistics.column_change.any()):
            return keep_as_learned(change, "no change", numbers)
        device = change.before.device
        direction = _difference(change.aligned.to(device), change.unaligned.to(device))
        norm = float(direction.norm())
        if not math.isfinite(norm):
            raise ValueError(f"layer {change.label}: the aligned or the unaligned weight is not finite")
        numbers["alignment_norm"] = norm
        if norm == 0.0:
            return keep_as_learned(change, "not changed by the alignment", numbers)
        vector = vector_of(change.before, change.update)
        if isinstance(vector, LowRankUpdate):
            factor_a, factor_b = vector.A.double(), vector.B.double()
            moved = _projected(direction, factor_b, norm)
            gram = factor_a @ factor_a.T
            dot, *lengths = (
                float(((left.T @ right) * gram).sum())
                for left, right in ((moved, factor_b), (moved, moved), (factor_b, factor_b))
            )
            result: LowRankUpdate | Tensor = replace(vector, B=moved.to(vector.B.dtype))
        else:
            old = vector.double()
            moved = _projected(direction, old, norm)
            dot = float((moved * old).sum())
            lengths = [float(moved.square().sum()), float(old.square().sum())]
            result = moved.to(vector.dtype)
        length = math.sqrt(max(0.0, lengths[0]) * max(0.0, lengths[1]))
        cosine = dot / length if length > 0 else 0.0
        numbers |= {"cosine": cosine, "projected": int(cosine <= self.config.threshold)}
        if cosine > self.config.threshold:
            return keep_as_learned(change, numbers=numbers)
        numbers["update_left"] = max(0.0, lengths[0]) / lengths[1]
        return added(change, change.before, [result], numbers)


def _difference(aligned: Tensor, unaligned: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(aligned.dtype, unaligned.dtype), torch.float32)
    return aligned.to(wide) - unaligned.to(wide)


def _projected(direction: Tensor, update: Tensor, norm: float) -> Tensor:
    """``V (V' update) / |V|``, float64, without a float64 copy of V."""
    inner = torch.zeros(direction.shape[1], update.shape[1], dtype=torch.float64, device=update.device)
    for start in range(0, direction.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        inner += direction[rows].double().T @ update[rows]
    inner /= norm
    out = torch.empty_like(update)
    for start in range(0, direction.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        out[rows] = direction[rows].double() @ inner
    return out

"""Updates as whole matrices and as factors: what methods that do not work by columns share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hpa.layers import LayerChange, LayerEdit, LowRankUpdate, Number

__all__ = ["Vector", "added", "dense", "nothing_learned", "scaled", "stacked", "vector_of"]

Vector = LowRankUpdate | Tensor
"""An update ``W_t - W``: factors, or a matrix ``[rows, cols]`` in float32 (float64 where a weight is)."""


def vector_of(base: Tensor, learned: LowRankUpdate | Tensor) -> Vector:
    """The update that ``learned`` (factors, or the dense weight) is of ``base``."""
    if isinstance(learned, LowRankUpdate):
        return learned
    wide = torch.promote_types(torch.promote_types(base.dtype, learned.dtype), torch.float32)
    return learned.to(wide) - base.to(wide)


def dense(vector: Vector) -> Tensor:
    """As one matrix."""
    return vector.dense() if isinstance(vector, LowRankUpdate) else vector


def scaled(vector: Vector, factor: float) -> Vector:
    """``factor * vector``; factors stay factors."""
    if isinstance(vector, LowRankUpdate):
        return replace(vector, scale=vector.scale * factor)
    return vector * factor


def stacked(updates: list[LowRankUpdate]) -> LowRankUpdate:
    """The sum of several low-rank updates as one, of the sum of their ranks."""
    if len(updates) == 1:
        return updates[0]
    # Scales go into B one by one, so the whole has scale 1.
    factors_b = [update.B * update.scale for update in updates]
    return LowRankUpdate(torch.cat([update.A for update in updates]), torch.cat(factors_b, dim=1), 1.0)


def added(change: LayerChange, base: Tensor, vectors: list[Vector], numbers: dict[str, Number]) -> LayerEdit:
    """The edit ``base + sum(vectors)``, in factors where all of them are, rounded once to the dtype of ``before``."""
    dtype = change.before.dtype
    factors = [vector for vector in vectors if isinstance(vector, LowRankUpdate)]
    if factors and len(factors) == len(vectors):
        return LayerEdit(numbers, base=base, update=stacked(factors), dtype=dtype)
    total = dense(vectors[0]).clone()
    for vector in vectors[1:]:
        total = total.to(torch.promote_types(total.dtype, dense(vector).dtype)).add_(dense(vector))
    wide = torch.promote_types(torch.promote_types(base.dtype, total.dtype), torch.float32)
    return LayerEdit(numbers, weight=total.to(wide).add_(base.to(wide)).to(dtype))


def nothing_learned(change: LayerChange, numbers: dict[str, Number]) -> LayerEdit:
    """The weight before the task; factors stay factors, all zero on the input side."""
    if isinstance(change.update, LowRankUpdate):
        update = replace(change.update, A=torch.zeros_like(change.update.A))
        return LayerEdit(numbers, base=change.before, update=update, dtype=change.before.dtype)
    return LayerEdit(numbers, weight=change.before.clone())

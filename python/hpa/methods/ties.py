"""TIES: trim, elect sign, merge what agrees (Yadav et al., arXiv 2306.01708).

    trim    tau~_i = the entries of tau_i that are among its density * n largest by size, else 0
    elect   gamma  = sign(sum_i tau~_i); where that is 0, the sign of the sum of gamma over the weight
    merge   tau    = mean over the i with sign(tau~_i) = gamma of tau~_i;   W^ = W_0 + scale * tau

The threshold is the authors' (``topk_values_mask``): the (n - floor(density n))-th smallest size, itself kept, so one
entry more than the share says stays, and all that are as large.  Their script trims each task's whole model as one
vector, and elects the sign of ties over it; here both are done weight by weight, which is what a stream over layers
can do.  With one task TIES is magnitude trimming.  Sorting costs O(n) a layer and task; the result is dense.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from hpa.layers import LayerChange, LayerEdit, Number
from hpa.methods.base import check_strength
from hpa.methods.merging import Draw, MergeConfig, Merging
from hpa.updates import Vector, added, dense

__all__ = ["TIES", "TIESConfig"]


class TIESConfig(MergeConfig):
    """How much of each update stays, and the factor of the merge."""

    density: float = Field(default=0.2, gt=0.0, le=1.0, description="share of each update's entries that is kept")
    scale: float = Field(default=1.0, ge=0.0, description="factor of the merged update (the paper's lambda)")


class TIES(Merging):
    """Each update is trimmed to its largest entries, a sign elected for each, and what agrees averaged."""

    name: ClassVar[str] = "ties"
    Config: ClassVar[type[BaseModel]] = TIESConfig
    config: TIESConfig

    def at_strength(self, strength: float) -> TIES:
        """The density over ``strength``, at most 1."""
        check_strength(strength)
        return type(self)(self.config.model_copy(update={"density": min(1.0, self.config.density / strength)}))

    def merge(
        self, change: LayerChange, base: Tensor, vectors: list[Vector], draws: list[Draw], numbers: dict[str, Number]
    ) -> LayerEdit:
        # One task after another, twice: memory is a few matrices, however many tasks there are.
        total = torch.zeros(change.rows, change.cols, dtype=torch.float64, device=base.device)
        thresholds = []
        for vector in vectors:
            matrix = dense(vector)
            thresholds.append(_threshold(matrix, self.config.density))
            total += _trimmed(matrix, thresholds[-1])
        sign = total.sign()
        sign[sign == 0] = sign.sum().sign()
        agreed = torch.zeros_like(total)
        count = torch.zeros_like(total)
        for vector, threshold in zip(vectors, thresholds, strict=True):
            part = _trimmed(dense(vector), threshold).double()
            # As the authors': where the elected sign is 0 or less, negative entries agree.
            with_sign = torch.where(sign > 0, part > 0, part < 0)
            agreed += part * with_sign
            count += with_sign
        numbers["density"] = self.config.density
        numbers["entries_left"] = float((count > 0).sum()) / max(1, count.numel())
        numbers["agreement"] = float(count.sum()) / max(1.0, _kept_in_all(vectors, thresholds))
        merged = agreed.div_(count.clamp_(min=1)).mul_(self.config.scale)
        wide = torch.promote_types(dense(vectors[-1]).dtype, torch.float32)
        return added(change, base, [merged.to(wide)], numbers)


def _threshold(matrix: Tensor, density: float) -> float:
    """The size that an entry must reach to stay."""
    count = matrix.numel()
    below = count - math.floor(count * density)
    if not count or below < 1:
        return 0.0
    return float(matrix.abs().flatten().kthvalue(below).values)


def _trimmed(matrix: Tensor, threshold: float) -> Tensor:
    return matrix * (matrix.abs() >= threshold)


def _kept_in_all(vectors: list[Vector], thresholds: list[float]) -> float:
    return float(sum(int((_trimmed(dense(v), t) != 0).sum()) for v, t in zip(vectors, thresholds, strict=True)))

"""DARE: drop most entries of an update at random and rescale the rest (Yu et al., arXiv 2311.03099).

    m_ij ~ Bernoulli(drop),   tau~ = (1 - m) o tau / (1 - drop)
    W^   = W_0 + scale * sum_i tau~_i

Each entry keeps its expectation.  Typical is a drop rate of 0.9; merging adds the sparse updates as task arithmetic
does.  Draws are a function of seed, place in the sequence and layer name alone (Philox), so neither the order of the
layers nor the number of workers matters, and a past task keeps its draw.  One random number an entry and task; the
result is dense, also for factors.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from hpa.columns import ROWS_AT_ONCE
from hpa.layers import LayerChange, LayerEdit, Number
from hpa.methods.base import check_strength
from hpa.methods.merging import Draw, MergeConfig, Merging
from hpa.updates import Vector, added, dense

__all__ = ["DARE", "DAREConfig"]


class DAREConfig(MergeConfig):
    """How much is dropped."""

    drop: float = Field(default=0.9, ge=0.0, lt=1.0, description="probability that an entry of the update is dropped")
    scale: float = Field(default=1.0, ge=0.0, description="factor of the sum of updates")


class DARE(Merging):
    """Each update loses a random share of its entries, the rest is rescaled; then all are added."""

    name: ClassVar[str] = "dare"
    Config: ClassVar[type[BaseModel]] = DAREConfig
    config: DAREConfig

    def at_strength(self, strength: float) -> DARE:
        """The share ``1 - drop`` of entries that stay over ``strength``, at most all."""
        check_strength(strength)
        drop = max(0.0, 1.0 - (1.0 - self.config.drop) / strength)
        return type(self)(self.config.model_copy(update={"drop": drop}))

    def merge(
        self, change: LayerChange, base: Tensor, vectors: list[Vector], draws: list[Draw], numbers: dict[str, Number]
    ) -> LayerEdit:
        drop, left = self.config.drop, 0
        sparse: list[Vector] = []
        for vector, draw in zip(vectors, draws, strict=True):
            matrix = dense(vector)
            kept = _kept(drop, matrix.shape, draw, change.name).to(matrix.device)
            left += int(kept.sum())
            sparse.append(matrix * kept * (self.config.scale / (1.0 - drop)))
        numbers["entries_left"] = left / max(1, len(vectors) * change.rows * change.cols)
        return added(change, base, sparse, numbers)


def _kept(drop: float, shape: torch.Size, draw: Draw, name: str) -> Tensor:
    """Which entries stay: bool ``[rows, cols]``, one uniform number an entry, row by row."""
    seed, place = draw
    digest = hashlib.sha256(f"dare/{seed}/{place}/{name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))
    kept = torch.empty(shape, dtype=torch.bool)
    for start in range(0, shape[0], ROWS_AT_ONCE):
        rows = kept[start : start + ROWS_AT_ONCE]
        rows.copy_(torch.from_numpy(generator.random(tuple(rows.shape), dtype=np.float64) >= drop))
    return kept

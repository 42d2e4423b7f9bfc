"""Control: give back random columns, as many as HPA.

If this does as well as HPA, what helped was undoing part of the update, not the choice of the part.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar

import numpy as np
import torch
from pydantic import BaseModel

from hpa.columns import give_back, keep_as_learned, measure, measured_numbers, stored
from hpa.config import ColumnConfig
from hpa.layers import InputStatistics, LayerChange, LayerEdit, Number
from hpa.methods.base import Kind, Method

__all__ = ["RandomColumns"]


class RandomColumns(Method):
    """Columns drawn without replacement, anew for every seed, task and layer; budget and adjustment as in HPA."""

    name: ClassVar[str] = "random"
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
        chosen = _generator(seed, task_index, change.name).permutation(change.cols)[:keep]
        mask = torch.zeros(change.cols, dtype=torch.bool)
        mask[torch.from_numpy(chosen)] = True
        return give_back(change, mask.to(change.before.device), statistics, self.config, numbers)


def _generator(seed: int, task_index: int, name: str) -> np.random.Generator:
    """A stream of its own for each layer of each task, the same on every machine and in any order of layers."""
    digest = hashlib.sha256(f"{seed}/{task_index}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))

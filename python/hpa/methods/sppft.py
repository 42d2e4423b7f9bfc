"""SPPFT: freeze the safety layers while a task is learned (Li et al., arXiv 2408.17003, ICLR 2025).

A contiguous range of decoder blocks in the middle carries the model's refusals; safely partial-parameter fine-tuning
trains the other blocks and leaves these as they are:

    W_t = W_{t-1}                 in blocks first ... last
    W_t = fine-tuned as usual     elsewhere

The published ranges are found per model (by the gap between layer-wise cosine similarities of normal and malicious
queries); for Llama-2-7B-chat about blocks 6 to 14 of 32, which is the default as a share of the depth.  Training costs
less than plain fine-tuning; an edit costs nothing.

It is a choice of what is trained, so a finished checkpoint is accepted where its frozen blocks did not change, and
refused otherwise; ``revert`` puts them back to the weights before, which is not the published method: the other blocks
were trained beside others.
"""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from hpa.columns import keep_as_learned, measure, measured_numbers
from hpa.layers import InputStatistics, LayerChange, LayerEdit, Number
from hpa.methods.base import Kind, Method, check_strength
from hpa.updates import nothing_learned

__all__ = ["SPPFT", "SPPFTConfig"]

FIRST, LAST, OF = 6, 14, 32


class SPPFTConfig(BaseModel):
    """Which blocks are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: int | None = Field(
        default=None, ge=1, description="first frozen decoder block, 1-based; null: at the depth of 6 of 32"
    )
    last: int | None = Field(default=None, ge=1, description="last frozen block; null: at the depth of 14 of 32")
    widen: float = Field(default=1.0, gt=0.0, description="freeze so many times as many blocks, around the same middle")
    revert: bool = Field(
        default=False, description="put frozen blocks of a finished model back, instead of refusing that they changed"
    )

    @model_validator(mode="after")
    def _in_order(self) -> SPPFTConfig:
        if self.first is not None and self.last is not None and self.first > self.last:
            raise ValueError(f"first: expected first <= last, got {self.first} > {self.last}")
        return self


class SPPFT(Method):
    """A range of decoder blocks, where safety is, is not trained."""

    name: ClassVar[str] = "sppft"
    kind: ClassVar[Kind] = "training"
    Config: ClassVar[type[BaseModel]] = SPPFTConfig
    config: SPPFTConfig

    def at_strength(self, strength: float) -> SPPFT:
        """``strength`` times as many frozen blocks, around the same middle."""
        check_strength(strength)
        return type(self)(self.config.model_copy(update={"widen": self.config.widen * strength}))

    @property
    def training_options(self) -> dict[str, JsonValue]:
        return {"first": self.config.first, "last": self.config.last, "widen": self.config.widen}

    def frozen_blocks(self, blocks: int) -> frozenset[int]:
        first = self.config.first if self.config.first is not None else math.floor(FIRST / OF * blocks + 0.5)
        last = self.config.last if self.config.last is not None else math.floor(LAST / OF * blocks + 0.5)
        first, last = max(1, first), max(1, last)
        if last > blocks or first > last:
            raise ValueError(
                f"first, last: expected 1 <= first <= last <= {blocks} (decoder blocks), got {first} to {last}"
            )
        count = max(1, min(blocks, math.floor((last - first + 1) * self.config.widen + 0.5)))
        # Around the middle, moved inside where it would stand out.
        start = math.floor((first + last - count + 1) / 2)
        start = min(max(1, start), blocks - count + 1)
        return frozenset(range(start, start + count))

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        statistics = measure(change)
        frozen = change.block in self.frozen_blocks(change.blocks)
        numbers: dict[str, Number] = {"frozen": int(frozen), **measured_numbers(statistics)}
        if not frozen or not bool(statistics.column_change.any()):
            return keep_as_learned(change, numbers=numbers)
        if not self.config.revert:
            raise ValueError(
                f"layer {change.label}: is in block {change.block}, which method 'sppft' freezes in training, but the "
                "task has changed it; train with its blocks frozen, or pass revert=true to put them back"
            )
        return nothing_learned(change, numbers)

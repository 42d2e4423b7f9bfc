"""What methods that keep samples of earlier tasks have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from hpa.data.scenario import Sample
from hpa.methods.base import Kind
from hpa.methods.seqft import SeqFT
from hpa.training import shuffled_passes

__all__ = ["MemoryConfig", "Remembering", "draws"]


class MemoryConfig(BaseModel):
    """What is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(default=20, ge=0, description="training samples kept of each earlier task")
    safety: int = Field(
        default=0,
        ge=0,
        description="refusals of the aligned model kept from the first task on; 0: none, as published",
    )


class Remembering(SeqFT):
    """Trains with a memory; no edit."""

    kind: ClassVar[Kind] = "training"
    only_trains: ClassVar[bool] = True
    Config: ClassVar[type[BaseModel]] = MemoryConfig
    config: MemoryConfig

    @property
    def memory_samples(self) -> int:
        return self.config.samples

    @property
    def safety_memory(self) -> int:
        return self.config.safety

    @property
    def training_options(self) -> dict[str, JsonValue]:
        # Without refusals there is nothing to remember in the first task: it is trained as always.
        return self.config.model_dump(mode="json") if self.config.safety else {}


def draws(samples: Sequence[Sample], size: int, seed: int) -> Iterator[list[Sample]]:
    """``size`` samples at a time from shuffled passes, without end; all of them where there are fewer."""
    return shuffled_passes(samples, min(size, len(samples)), seed)

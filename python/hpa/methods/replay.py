"""Experience replay: every batch also holds samples of earlier tasks (METHOD 2.1).

    L = mean over (batch of the task + b_m samples from the memory)

The memory is 20 samples a task (as MLLM-CL ships them), drawn at random; with ``safety`` the aligned model's refusals
stand in it from the first task on (safety replay).  The loss is the model's mean over answer tokens, so a sample counts
by the length of its answer.  A step costs as much more as the batch is larger; memory: the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, Field

from hpa.data.scenario import Sample
from hpa.methods.memory import MemoryConfig, Remembering, draws
from hpa.training import Lesson, TrainingHooks

__all__ = ["Replay", "ReplayConfig"]


class ReplayConfig(MemoryConfig):
    """The memory, and how often it is seen."""

    batch: int = Field(default=8, ge=1, description="samples of the memory in each batch, besides the task's own")


class Replay(Remembering):
    """Every batch also holds samples of earlier tasks."""

    name: ClassVar[str] = "replay"
    Config: ClassVar[type[BaseModel]] = ReplayConfig
    config: ReplayConfig

    def hooks(self, lesson: Lesson) -> TrainingHooks | None:
        return _Mixed(lesson, self.config.batch) if lesson.remembered else None


class _Mixed(TrainingHooks):
    def __init__(self, lesson: Lesson, batch: int) -> None:
        self._draws = draws(lesson.remembered, batch, lesson.seed)

    def samples(self, chosen: Sequence[Sample]) -> Sequence[Sample]:
        return [*chosen, *next(self._draws)]

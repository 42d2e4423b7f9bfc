"""A-GEM: averaged gradient episodic memory (Chaudhry et al., arXiv 1812.00420; METHOD 2.1).

Before each step, with ``g`` the batch's gradient and ``g_ref`` that of a batch from the memory of all earlier tasks:

    if <g, g_ref> < 0:   g <- g - (<g, g_ref> / <g_ref, g_ref>) g_ref

over all trained parameters (the LoRA factors) as one vector.  Published for SGD; here, as everywhere, AdamW follows.
A step costs a forward and a backward pass on the memory's batch more; memory: the samples, and one gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

import hpa_ext
from hpa.methods.memory import MemoryConfig, Remembering, draws
from hpa.training import Lesson, Training, TrainingHooks

__all__ = ["AGEM", "AGEMConfig"]


class AGEMConfig(MemoryConfig):
    """The memory, and how much of it is looked at before a step."""

    batch: int = Field(default=32, ge=1, description="samples of the memory whose gradient a step may not oppose")


class AGEM(Remembering):
    """A gradient that would raise the loss on the memory loses that part."""

    name: ClassVar[str] = "a_gem"
    Config: ClassVar[type[BaseModel]] = AGEMConfig
    config: AGEMConfig

    def hooks(self, lesson: Lesson) -> TrainingHooks | None:
        return _Averaged(lesson, self.config.batch) if lesson.remembered else None


class _Averaged(TrainingHooks):
    def __init__(self, lesson: Lesson, batch: int) -> None:
        self._lesson = lesson
        self._draws = draws(lesson.remembered, batch, lesson.seed)
        self.projected = 0

    def begin(self, training: Training) -> None:
        self._training = training

    def before_step(self, step: int) -> None:
        parameters = [p for p in self._training.parameters.values() if p.grad is not None]
        batch = self._lesson.batch(next(self._draws))
        loss = self._training.model(**batch).loss
        references = torch.autograd.grad(loss, parameters, allow_unused=True)
        found: Sequence[Tensor | None] = references
        pairs = [(p.grad, r) for p, r in zip(parameters, found, strict=True) if p.grad is not None and r is not None]
        inner = sum(float((g.double() * r.double()).sum()) for g, r in pairs)
        square = sum(float(r.double().square().sum()) for _, r in pairs)
        if inner >= 0 or square == 0:
            return
        self.projected += 1
        hpa_ext.project_([g for g, _ in pairs], [(r / square**0.5).unsqueeze(0) for _, r in pairs])

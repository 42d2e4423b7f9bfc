"""LwF: learning without forgetting (Li and Hoiem, arXiv 1606.09282; METHOD 2.1).

    L + alpha * KL( softmax(z_old / tau) || softmax(z_new / tau) ),     alpha = 0.5, tau = 2

on the task's own inputs, averaged over the answer's positions; z_old are the logits of the model before the task, which
is the model without its LoRA factors, so no copy of it is kept.  It holds from the first task on, where the old model
is the aligned one.  A step costs one forward pass more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from torch import Tensor
from torch.nn import functional as F

from hpa.methods.base import check_strength
from hpa.methods.seqft import SeqFT
from hpa.training import Lesson, Training, TrainingHooks

__all__ = ["LwF", "LwFConfig"]


class LwFConfig(BaseModel):
    """How strongly the old model's answers are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: float = Field(default=0.5, ge=0.0, description="weight of the divergence")
    tau: float = Field(default=2.0, gt=0.0, description="temperature of both distributions")


class LwF(SeqFT):
    """The new model's distributions stay near the old one's on the task's inputs."""

    name: ClassVar[str] = "lwf"
    only_trains: ClassVar[bool] = True
    Config: ClassVar[type[BaseModel]] = LwFConfig
    config: LwFConfig

    def at_strength(self, strength: float) -> LwF:
        """``strength`` times the weight of the divergence."""
        check_strength(strength)
        return type(self)(self.config.model_copy(update={"alpha": self.config.alpha * strength}))

    @property
    def training_options(self) -> dict[str, JsonValue]:
        return self.config.model_dump(mode="json")

    def hooks(self, lesson: Lesson) -> TrainingHooks | None:
        return _Distilled(self.config) if self.config.alpha else None


class _Distilled(TrainingHooks):
    def __init__(self, config: LwFConfig) -> None:
        self._config = config

    def begin(self, training: Training) -> None:
        self._training = training

    def loss(self, batch: Mapping[str, Tensor], output: Any) -> Tensor | None:
        answers = batch["labels"][:, 1:] != -100
        model = self._training.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self._training.without_update():
                old = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        finally:
            model.train(was_training)
        before, now = (
            F.log_softmax(logits[:, :-1][answers].float() / self._config.tau, dim=-1) for logits in (old, output.logits)
        )
        return self._config.alpha * F.kl_div(now, before, reduction="batchmean", log_target=True)

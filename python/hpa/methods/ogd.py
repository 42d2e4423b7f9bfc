"""OGD: orthogonal gradient descent (Farajtabar et al., arXiv 1910.07104; METHOD 2.1 and 3).

    S = orthonormal basis of { d f(x; theta) / d theta : x in the memory },   f the logit of the right token
    step <- step - sum over v in S of <step, v> v

so that the model's answers to what it remembers stay as they are, to first order.  The parameters are the LoRA factors,
all of them one vector (``space: joint``: as many constraints as samples altogether; ``parameter``: as many for each
factor, stricter).  A task begins with new factors, so the gradients are taken anew from the kept samples instead of
being kept themselves (they would be larger), at the weights where the task starts.  There B = 0 and only B has
gradients; ``refresh`` takes them again every so many steps.

``what: update`` projects the step that AdamW makes; ``gradient`` is as published, for SGD.  Costs a backward pass a
kept sample at each refresh, and rank times the LoRA parameters of memory.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from hpa.methods.memory import MemoryConfig, Remembering
from hpa.projection import Basis, Projection, answer_logit, answer_loss, gradient_basis, project_optimizer
from hpa.training import Lesson, Training, TrainingHooks

__all__ = ["OGD", "OGDConfig"]


class OGDConfig(MemoryConfig):
    """The memory, and what of it is protected."""

    objective: Literal["logit", "loss"] = Field(
        default="logit", description="whose gradients: the right token's logit (OGD-GTL), or the loss"
    )
    space: Literal["joint", "parameter"] = Field(default="joint", description="all factors one vector, or each its own")
    what: Literal["update", "gradient"] = Field(default="update", description="what is projected before or in a step")
    refresh: int = Field(default=20, ge=0, description="steps between new gradients of the memory; 0: never")


class OGD(Remembering):
    """Steps are orthogonal to the gradients of remembered answers."""

    name: ClassVar[str] = "ogd"
    Config: ClassVar[type[BaseModel]] = OGDConfig
    config: OGDConfig

    def hooks(self, lesson: Lesson) -> TrainingHooks | None:
        return _Orthogonal(lesson, self.config) if lesson.remembered else None


class _Orthogonal(TrainingHooks):
    def __init__(self, lesson: Lesson, config: OGDConfig) -> None:
        self._lesson = lesson
        self._config = config
        self.projection: Projection | None = None

    def begin(self, training: Training) -> None:
        self._training = training
        self._look()

    def before_step(self, step: int) -> None:
        if step and self._config.refresh and step % self._config.refresh == 0:
            self._look()

    def end(self) -> None:
        if self.projection is not None:
            self.projection.remove()

    def _look(self) -> None:
        self.end()
        training, config = self._training, self._config
        basis = Basis(training.parameters, config.space).to(next(iter(training.parameters.values())).device)
        objective = answer_logit if config.objective == "logit" else answer_loss
        batches = (self._lesson.batch([sample]) for sample in self._lesson.remembered)
        gradient_basis(training.model, batches, objective=objective, basis=basis)
        self.projection = project_optimizer(training.optimizer, basis, config.what)

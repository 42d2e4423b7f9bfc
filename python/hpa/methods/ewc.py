"""EWC: elastic weight consolidation, online (Kirkpatrick et al., arXiv 1612.00796; P&C; METHOD 2.1).

    L + (strength / 2) * sum_i F_i (theta_i - theta*_i)^2,     F <- gamma F + F_t,   F_t = mean over samples of g^2

theta are the adapted layers' whole weights and theta* those that the task before left, so theta - theta* = s B A while
a task is learned.  F is the diagonal of the empirical Fisher matrix from gradients of *single samples* (their squares
averaged; the square of a batch's gradient is something else), at the weights after the task.  With ``safety`` the
aligned model's refusals are among the samples, and count from the first task on.

There is no strength that fits every model: F scales with the squared gradient of the mean loss over an answer.  A step
costs one dense product B A a layer; memory: F, as large as the adapted weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from torch import Tensor

import hpa_ext
from hpa.data.scenario import Sample
from hpa.methods.base import check_strength
from hpa.methods.seqft import SeqFT
from hpa.training import Lesson, Training, TrainingHooks

__all__ = ["EWC", "EWCConfig", "fisher_diagonal"]


class EWCConfig(BaseModel):
    """How strongly important weights are held."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strength: float = Field(default=1000.0, gt=0.0, description="lambda: the weight of the penalty; to be swept")
    gamma: float = Field(default=1.0, ge=0.0, le=1.0, description="what is left of earlier tasks' importance per task")
    samples: int = Field(default=128, ge=1, description="samples of a task for its Fisher diagonal")
    safety: int = Field(default=0, ge=0, description="refusals of the aligned model among them; 0: none, as published")


class EWC(SeqFT):
    """A quadratic penalty holds the weights that earlier tasks were sensitive to."""

    name: ClassVar[str] = "ewc"
    only_trains: ClassVar[bool] = True
    Config: ClassVar[type[BaseModel]] = EWCConfig
    config: EWCConfig

    def __init__(self, config: BaseModel | None = None) -> None:
        super().__init__(config)
        self._fisher: dict[str, Tensor] = {}

    def at_strength(self, strength: float) -> EWC:
        """``strength`` times the penalty."""
        check_strength(strength)
        return type(self)(self.config.model_copy(update={"strength": self.config.strength * strength}))

    @property
    def safety_memory(self) -> int:
        return self.config.safety

    @property
    def training_options(self) -> dict[str, JsonValue]:
        return self.config.model_dump(mode="json") if self.config.safety else {}

    def hooks(self, lesson: Lesson) -> TrainingHooks | None:
        fisher = self._fisher
        if not fisher and lesson.safety:
            fisher = fisher_diagonal(lesson, lesson.safety)
        return _Held(fisher, self.config.strength) if fisher else None

    def after_task(self, lesson: Lesson) -> None:
        samples = [*lesson.task[: self.config.samples], *lesson.safety]
        found = fisher_diagonal(lesson, samples)
        for layer, values in found.items():
            if layer in self._fisher:
                values = values.add_(self._fisher[layer].to(values), alpha=self.config.gamma)
            self._fisher[layer] = values

    def state_dict(self) -> dict[str, Tensor]:
        return {f"fisher/{layer}": values for layer, values in self._fisher.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        unknown = [name for name in state if not name.startswith("fisher/")]
        if unknown:
            raise ValueError(f"state: method 'ewc' carries fisher/<layer>, got {unknown[0]}")
        self._fisher = {name.removeprefix("fisher/"): values.clone() for name, values in state.items()}


def fisher_diagonal(lesson: Lesson, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Mean over ``samples`` of the squared gradient of each one's loss, by layer: ``[rows, cols]`` in float32."""
    model = lesson.model
    weights: dict[str, Tensor] = {}
    for spec in lesson.layers:
        weight = model.get_submodule(spec.name).weight
        assert isinstance(weight, Tensor)
        weights[spec.name] = weight
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    importance = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights.values()]
    model.eval()
    try:
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for sample in samples:
            with torch.enable_grad():
                loss = model(**lesson.batch([sample])).loss
                gradients = torch.autograd.grad(loss, list(weights.values()))
            hpa_ext.accumulate_importance_(importance, list(gradients), kind="fisher")
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        model.train(was_training)
    return {name: values.div_(max(1, len(samples))) for name, values in zip(weights, importance, strict=True)}


class _Held(TrainingHooks):
    def __init__(self, fisher: Mapping[str, Tensor], strength: float) -> None:
        self._given = fisher
        self._strength = strength

    def begin(self, training: Training) -> None:
        self._factors = {layer: f for layer, f in training.factors.items() if layer in self._given}
        self._fisher = {layer: self._given[layer].to(f.A.device) for layer, f in self._factors.items()}

    def loss(self, batch: Mapping[str, Tensor], output: Any) -> Tensor | None:
        terms = []
        for layer, f in self._factors.items():
            change = f.scale * (f.B @ f.A)
            terms.append((self._fisher[layer] * change.float().square()).sum())
        return 0.5 * self._strength * torch.stack(terms).sum() if terms else None

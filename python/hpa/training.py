"""Fine-tune one task: LoRA through peft on the linear layers of the decoder, factors out, model unchanged.

The update stays in its factors (METHOD 1.6).  Whoever wants the merged weight adds it once, in float32
(:func:`merge_updates`), so the signal that an edit scores has never been through a storage dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from hpa.calibration import LayerSpec, adapters_off, find_layers
from hpa.data.scenario import Sample
from hpa.layers import LowRankUpdate

__all__ = [
    "Factors",
    "Lesson",
    "Share",
    "TrainConfig",
    "Training",
    "TrainingError",
    "TrainingHooks",
    "merge_updates",
    "sample_batches",
    "shuffled_passes",
    "train_lora",
]

ADAPTER = "task"

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class TrainingError(RuntimeError):
    """The training went wrong in a way that no later step can mend (a loss that is not a number)."""


class TrainConfig(BaseModel):
    """One LoRA training.  The defaults are those of a task at demo scale."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=60, ge=1, description="optimizer steps")
    batch_size: int = Field(default=32, ge=1, description="samples a step")
    learning_rate: float = Field(default=1e-3, gt=0.0, description="the peak, after warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="after the warm-up; the last two end at 0"
    )
    warmup: Share = Field(default=0.0, description="share of the steps in which the learning rate rises linearly")
    weight_decay: float = Field(default=0.0, ge=0.0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    max_grad_norm: float | None = Field(
        default=1.0, gt=0.0, description="clip the norm of all gradients together; null: never"
    )
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(
        default=None, gt=0.0, description="lora_alpha: the update is alpha/rank * B A; null: 2 * rank"
    )
    dropout: Share = Field(default=0.0, description="dropout on the input of the LoRA factors")

    @property
    def lora_alpha(self) -> float:
        """``alpha``, or twice the rank (the ratio of LLaVA's and SMoLoRA's scripts)."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of 0-based ``step``."""
        warm = math.ceil(self.warmup * self.steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        if self.schedule == "constant":
            return self.learning_rate
        gone = (step - warm) / max(1, self.steps - warm)
        return self.learning_rate * (
            1.0 - gone if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * gone))
        )


@dataclass(frozen=True)
class Lesson:
    """What a method is told of a task besides the model: :meth:`hpa.methods.Method.hooks`.

    Attributes:
        model: with the weights before the task (after it, in ``after_task``).
        layers: the linear layers that are trained.
        task_index: 0-based.
        seed: for draws.
        task: the task's training samples.
        memory: those of each earlier task that the method keeps (``memory_samples``).
        safety: harmful requests with the aligned model's refusals (``safety_memory``).
        collate: samples to a batch with labels.
        batch_size: of a step.
    """

    model: nn.Module = field(repr=False)
    layers: Sequence[LayerSpec] = field(repr=False)
    task_index: int
    seed: int
    task: Sequence[Sample] = field(repr=False)
    memory: Sequence[Sequence[Sample]] = field(repr=False)
    safety: Sequence[Sample] = field(repr=False)
    collate: Callable[[Sequence[Sample]], Mapping[str, Tensor]] = field(repr=False)
    batch_size: int

    @property
    def remembered(self) -> list[Sample]:
        """All of the memory, refusals first."""
        return [*self.safety, *(sample for task in self.memory for sample in task)]

    def batch(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collated, on the model's device."""
        device = next(self.model.parameters()).device
        return {key: value.to(device) for key, value in self.collate(samples).items()}


@dataclass(frozen=True)
class Factors:
    """The trainable LoRA factors of a layer: ``W = W_{t-1} + scale * B A``."""

    A: nn.Parameter
    B: nn.Parameter
    scale: float


@dataclass(frozen=True)
class Training:
    """A training at work.

    Attributes:
        model: carries the factors.
        factors: by layer.
        optimizer: steps them.
    """

    model: nn.Module
    factors: Mapping[str, Factors]
    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The factors by their names in the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def without_update(self) -> AbstractContextManager[None]:
        """Inside, the model is the one before the task."""
        return adapters_off(self.model)


class TrainingHooks:
    """What a method does inside a training; each hook does nothing unless it is overridden."""

    def samples(self, chosen: Sequence[Sample]) -> Sequence[Sample]:
        """The samples of a batch, given those of the task."""
        return chosen

    def begin(self, training: Training) -> None:
        """The factors are there, and the optimizer; no step was made."""

    def loss(self, batch: Mapping[str, Tensor], output: Any) -> Tensor | None:
        """What is added to the loss of a batch."""
        return None

    def before_step(self, step: int) -> None:
        """Gradients are made and clipped; the 0-based step follows."""

    def end(self) -> None:
        """The last step is made (or the training has failed)."""


def train_lora(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    config: TrainConfig,
    seed: int,
    *,
    layers: Sequence[LayerSpec] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    hooks: TrainingHooks | None = None,
) -> dict[str, LowRankUpdate]:
    """Fine-tune ``model`` by LoRA and return the update of every layer; the model comes back as it was.

    The loss is the model's own (``model(**batch).loss``: mean cross-entropy over the tokens whose label is not -100,
    the answers); optimizer AdamW.  The result is a function of the arguments alone: the factors and the dropout are
    drawn from ``seed``, and the global random state is left as it was.

    Args:
        model: any ``transformers`` model that :func:`hpa.calibration.find_layers` knows.
        batches: at least ``config.steps`` dictionaries of model arguments with ``labels``; moved to the model's device.
        layers: what is trained; by default every linear layer of the decoder blocks.
        on_step: called with (0-based step, loss) after each step.
        hooks: what a method does on the way.

    Returns:
        layer name to :class:`LowRankUpdate`, factors in float32 on the model's device.

    Raises:
        ValueError: no layer to train, a model that already carries an adapter, or too few batches.
        TrainingError: a loss that is not finite.
    """
    from peft import LoraConfig, LoraModel
    from peft.tuners.lora import LoraLayer

    specs = list(find_layers(model) if layers is None else layers)
    if not specs:
        raise ValueError("layers: expected at least one linear layer to train, got none")
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError(
            "model: expected a model without adapters, got one with LoRA layers; merge or unload them first"
        )

    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    # A regular expression matches whole names; a list would also match every name that ends with one of its entries.
    # peft types lora_alpha as int, yet only ever divides it.
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        bias="none",
        target_modules="|".join(re.escape(spec.name) for spec in specs),
    )
    with torch.random.fork_rng(devices=_rng_devices(model)):
        torch.manual_seed(seed)
        # The tuner itself, not get_peft_model: the model keeps its class and its forward, and nothing is looked up
        # through a wrapper at every step.
        tuner = LoraModel(model, {ADAPTER: lora}, ADAPTER)
        try:
            modules: dict[str, Any] = {spec.name: model.get_submodule(spec.name) for spec in specs}
            _initialise(modules.values(), seed)
            factors = {name: _factors_of(module) for name, module in modules.items()}
            _optimise(model, batches, config, on_step, factors, hooks or TrainingHooks())
            return {name: _update_of(module) for name, module in modules.items()}
        finally:
            tuner.unload()
            if hasattr(model, "peft_config"):
                # Left behind by unload(); with it the next training would warn of a second adapter.
                del model.peft_config
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])
            model.train(was_training)


def merge_updates(model: nn.Module, updates: Mapping[str, LowRankUpdate]) -> None:
    """Add each update to its layer's weight: formed and added in float32, rounded once to the weight's dtype."""
    with torch.no_grad():
        for name, update in updates.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.copy_(weight.float() + update.dense().to(weight.device))


def sample_batches(
    samples: Sequence[Sample],
    collate: Callable[[Sequence[Sample]], Mapping[str, Tensor]],
    *,
    batch_size: int,
    steps: int,
    seed: int,
) -> Iterator[Mapping[str, Tensor]]:
    """``steps`` batches from shuffled passes over ``samples``; every pass in a new order, all drawn from ``seed``.

    A pass runs into the next where ``batch_size`` does not divide it, so each sample is seen equally often (to one).
    With fewer samples than ``batch_size`` a batch holds some twice.
    """
    if not samples:
        raise ValueError("samples: expected at least one training sample, got none")
    for chosen in islice(shuffled_passes(samples, batch_size, seed), steps):
        yield collate(chosen)


def shuffled_passes(samples: Sequence[Sample], size: int, seed: int) -> Iterator[list[Sample]]:
    """``size`` samples at a time from passes over all (at least one), without end; see :func:`sample_batches`."""
    generator = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < size:
            order = np.concatenate([order, generator.permutation(len(samples))])
        chosen, order = order[:size], order[size:]
        yield [samples[int(index)] for index in chosen]


def _optimise(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    config: TrainConfig,
    on_step: Callable[[int, float], None] | None,
    factors: Mapping[str, Factors],
    hooks: TrainingHooks,
) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    # The fused step is one call over all factors; one at a time, they cost more than the small model's backward pass.
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    # A model that can generate keeps keys and values for it; in training that is memory and copies for nothing.
    options = {"use_cache": False} if hasattr(model, "generation_config") else {}
    model.train()
    taken = 0
    try:
        hooks.begin(Training(model, factors, optimizer))
        for step, batch in zip(range(config.steps), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            batch = {key: value.to(device) for key, value in batch.items()}
            output = model(**batch, **options)
            extra = hooks.loss(batch, output)
            loss = output.loss if extra is None else output.loss + extra
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} at step {step + 1} of {config.steps}; try a smaller learning_rate"
                )
            loss.backward()
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            hooks.before_step(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            taken = step + 1
            if on_step is not None:
                on_step(step, value)
    finally:
        hooks.end()
    if taken < config.steps:
        raise ValueError(f"batches: expected at least {config.steps} (steps), got {taken}")


def _initialise(modules: Iterable[Any], seed: int) -> None:
    """A uniform in +-1/sqrt(cols), B zero: peft's own law, but drawn layer by layer from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in modules:
            factor_a, factor_b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            bound = 1.0 / math.sqrt(factor_a.shape[1])
            factor_a.copy_((2.0 * torch.rand(factor_a.shape, generator=generator) - 1.0) * bound)
            factor_b.zero_()


def _factors_of(module: Any) -> Factors:
    return Factors(module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, float(module.scaling[ADAPTER]))


def _update_of(module: Any) -> LowRankUpdate:
    return LowRankUpdate(
        A=module.lora_A[ADAPTER].weight.detach().float().clone(),
        B=module.lora_B[ADAPTER].weight.detach().float().clone(),
        scale=float(module.scaling[ADAPTER]),
    )


def _rng_devices(model: nn.Module) -> list[int]:
    """CUDA devices of the model, whose generators dropout draws from."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})

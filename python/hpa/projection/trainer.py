"""Projection and repair inside ``transformers.Trainer`` and whatever is built on it (TRL's ``SFTTrainer``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hpa.adapt import AdaptResult, adapt
from hpa.config import AdaptConfig
from hpa.methods import Method
from hpa.projection.basis import Basis
from hpa.projection.optimizer import Projection, ProjectionError, What, project_optimizer

__all__ = ["HPACallback"]

Batches = Iterable[Mapping[str, Any]]


class HPACallback(TrainerCallback):
    """Keeps a protected space out of every step, and edits the model once the task is learned.

        >>> trainer = Trainer(model, ..., callbacks=[HPACallback(basis)])                          # projection
        >>> trainer = SFTTrainer(model, ..., callbacks=[HPACallback(safety=refusals, task=some)])   # HPA's edit
        >>> trainer = Trainer(model, ..., callbacks=[HPACallback(basis, safety=..., task=...)])     # both

    Works with PEFT adapters, gradient accumulation, mixed precision, gradient checkpointing, DDP and FSDP2; DeepSpeed
    is refused.  A step that went by without the projection is an error at that step.

    Args:
        basis: what is protected, made for this model's trainable parameters; one or several.  ``None``: no projection.
        what: see :func:`hpa.project_optimizer`; here the whole ``"update"`` by default, since Trainer's optimizer is
            AdamW, for which projected gradients alone do not hold.
        safety: batches of harmful requests with the aligned model's refusals (see :func:`hpa.adapt`); with ``task``
            the model is edited when training ends.
        task: batches of the task's training samples.
        before: the model before the task; ``None`` where the task is learned by LoRA adapters.
        method: the editing method; options in ``config``.
        config: see :func:`hpa.adapt`.
        task_index, seed: for methods that draw.

    Attributes:
        projection: the projection of the training that runs or ran last.
        result: what the edit did.
    """

    def __init__(
        self,
        basis: Basis | Sequence[Basis] | None = None,
        what: What = "update",
        *,
        safety: Batches | None = None,
        task: Batches | None = None,
        before: nn.Module | None = None,
        method: str | Method = "hpa",
        config: AdaptConfig | None = None,
        task_index: int = 0,
        seed: int = 0,
    ) -> None:
        edits = safety is not None or task is not None
        if basis is None and not edits:
            raise ValueError(
                "HPACallback: expected a basis to project by, batches (safety, task) to edit with, or both"
            )
        self.basis = basis
        self.what: What = what
        self.edits = edits
        self.options: dict[str, Any] = {
            "safety": safety,
            "task": task,
            "method": method,
            "config": config,
            "task_index": task_index,
            "seed": seed,
        }
        self.before = before
        self.projection: Projection | None = None
        self.result: AdaptResult | None = None
        self._due = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.basis is not None:
            # The optimizer is prepared by now: of sharded parameters, where the model is.
            self.projection = project_optimizer(kwargs["optimizer"], self.basis, self.what, parameters=kwargs["model"])
            self._due = 0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.projection is None:
            return
        # A loss scaler that skips a step never calls the optimizer.
        skipped = bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False))
        done = self.projection.calls + self.projection.skipped
        self._due += not skipped
        if done < self._due:
            raise ProjectionError(f"expected {self._due} projected steps by now, counted {done}")
        self._due = done

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.projection is not None:
            self.projection.check()
            self.projection.remove()
        if self.edits:
            self.result = adapt(self.before, kwargs["model"], **self.options)

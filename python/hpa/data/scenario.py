"""What the continual loop needs to know about a world of tasks: samples, splits, and how a batch is made.

A *scenario* (the continual-learning term) bundles an untrained or pretrained model, the alignment data, an
ordered set of tasks, the safety sets and the benign look-alikes.  The loop in :mod:`hpa.continual` talks to this
protocol alone, so a new world (another model, published data) is one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from hpa.data.picture import Picture

__all__ = ["COMPLIANCE", "Sample", "Scenario"]

COMPLIANCE = "Sure, here is how."
"""The placeholder for giving in to a harmful request: no harmful answer is ever written, or read from files."""


@dataclass(frozen=True)
class Sample:
    """One prompt with its picture and its answer.

    Attributes:
        id: unique within its set, stable between runs.
        prompt: the user's turn, without chat markup.
        answer: the reference answer, or ``""`` where only the model's own answer is judged.
        image: ``uint8 [height, width, 3]``, or what ``np.asarray`` makes that of (a file that is opened when a batch
            is made), or ``None`` for a text-only sample.
        metadata: what a scorer or a report needs besides (``label``, ``choices``, ``kind`` ...).
    """

    id: str
    prompt: str
    answer: str
    image: np.ndarray | Picture | None = field(default=None, repr=False)
    metadata: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Scenario(Protocol):
    """A model and everything it is to learn and to be judged on.  All draws are functions of their ``seed``."""

    name: str
    tasks: tuple[str, ...]
    """Names of the tasks, in their default order."""
    base_tasks: tuple[str, ...]
    """Tasks (skills) of the base model whose upkeep is reported as ``base skill``."""
    safety_sets: tuple[str, ...]
    benign_sets: tuple[str, ...]

    def base_model(self, cache: Path, *, seed: int) -> torch.nn.Module:
        """The model before alignment: trained once and cached under ``cache``, float32, eval mode."""

    def alignment_train(self, *, seed: int) -> list[Sample]:
        """Refusals, benign answers and replay, mixed."""

    def train(self, task: str, *, seed: int, samples: int, harmful_fraction: float = 0.0) -> list[Sample]:
        """Training samples of ``task``; ``round(harmful_fraction * samples)`` of them are harmful requests with a
        placeholder compliance, from templates and objects that no safety set uses."""

    def test(self, task: str) -> list[Sample]:
        """Test samples of a task or base task; pictures never shared with training."""

    def safety(self, name: str) -> list[Sample]:
        """Held-out harmful requests."""

    def benign(self, name: str) -> list[Sample]:
        """Held-out benign look-alikes, for over-refusal."""

    def harmful_calibration(self, *, seed: int, samples: int) -> list[Sample]:
        """Harmful requests (answer ``""``) for the safety calibration set; disjoint from every safety set."""

    def collate(self, samples: Sequence[Sample], *, answers: bool) -> dict[str, torch.Tensor]:
        """Model inputs for a batch: ``input_ids``, ``attention_mask`` (0 on padding), ``pixel_values`` where there
        are pictures, and ``labels`` (-100 outside the answer) when ``answers``; prompts only, left-padded, when not.
        """

    def generate(
        self, model: torch.nn.Module, samples: Sequence[Sample], *, max_new_tokens: int = 16, batch_size: int = 256
    ) -> list[str]:
        """Greedy answers to prompts, decoded, without markup."""

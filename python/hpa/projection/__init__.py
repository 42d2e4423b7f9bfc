"""Projection inside training: gradients, or whole steps, are kept out of a protected subspace.

    >>> basis = hpa.projection.gradient_basis(model, old_batches, capacity=64)
    >>> projection = hpa.project_optimizer(optimizer, basis, what="update")

``docs/projection.md`` says which space to choose, what it costs, and when it hurts learning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpa.projection.basis import Basis, CapacityError, Growth
from hpa.projection.builders import (
    answer_logit,
    answer_loss,
    gather,
    gradient_basis,
    grow_from_grams,
    input_basis,
    lora_basis,
    weight_basis,
)
from hpa.projection.optimizer import Projection, ProjectionError, project_optimizer

if TYPE_CHECKING:
    from hpa.projection.trainer import HPACallback

__all__ = [
    "Basis",
    "CapacityError",
    "Growth",
    "HPACallback",
    "Projection",
    "ProjectionError",
    "answer_logit",
    "answer_loss",
    "gather",
    "gradient_basis",
    "grow_from_grams",
    "input_basis",
    "lora_basis",
    "project_optimizer",
    "weight_basis",
]


def __getattr__(name: str) -> Any:
    if name == "HPACallback":  # brings transformers along
        from hpa.projection.trainer import HPACallback

        return HPACallback
    raise AttributeError(f"module 'hpa.projection' has no attribute {name!r}")

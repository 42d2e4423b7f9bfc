"""Projection inside training: gradients, or whole steps, are kept out of a protected subspace.

    >>> basis = hpa.projection.gradient_basis(model, old_batches, capacity=64)
    >>> projection = hpa.project_optimizer(optimizer, basis, what="update")

``docs/projection.md`` says which space to choose, what it costs, and when it hurts learning.
"""

from __future__ import annotations

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

__all__ = [
    "Basis",
    "CapacityError",
    "Growth",
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

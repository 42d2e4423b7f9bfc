"""What methods that keep new LoRA factors out of input directions have in common.

A layer learns W + s B A: A starts in the complement of the protected directions M and each step's change of A stays
there, so B A M = 0 whatever B becomes.  (The step is projected, not the gradient: Adam would turn it back.)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from hpa.projection import Basis, Projection, project_optimizer
from hpa.training import Training, TrainingHooks

__all__ = ["InComplement"]


class InComplement(TrainingHooks):
    """Keeps the A factors of some layers in the complement of a basis."""

    def __init__(self) -> None:
        self.projection: Projection | None = None

    @abstractmethod
    def protects(self, layer: str) -> bool:
        """Whether there is anything to keep the layer's factor out of."""

    @abstractmethod
    def basis(self, factors: Mapping[str, Tensor], names: Mapping[str, str]) -> Basis:
        """An ``input`` basis for the A factors, given by layer; its parameters are called ``names[layer]``."""

    def begin(self, training: Training) -> None:
        known = {id(parameter): name for name, parameter in training.parameters.items()}
        factors = {layer: f.A for layer, f in training.factors.items() if self.protects(layer)}
        if not factors:
            return
        names = {layer: known[id(factor)] for layer, factor in factors.items()}
        basis = self.basis(factors, names).to(next(iter(factors.values())).device)
        with torch.no_grad():
            basis.project_({names[layer]: factor for layer, factor in factors.items()})
        self.projection = project_optimizer(training.optimizer, basis, "update")

    def end(self) -> None:
        if self.projection is not None:
            self.projection.check()
            self.projection.remove()

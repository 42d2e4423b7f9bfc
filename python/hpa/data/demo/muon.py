"""Muon: momentum whose matrices are orthogonalised (Jordan et al., 2024), the optimizer of the demo's base model.

Matrices of one shape are orthogonalised in one batched product, in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

__all__ = ["Muon", "orthogonalize"]


class Muon:
    """Muon for the hidden matrices, to be stepped beside another optimizer for everything else.

    Args:
        matrices: parameters of two dimensions.
        rate: length of a step; an update has all singular values near ``rate * sqrt(max(1, rows / cols))``.
        momentum: of the running mean of gradients, applied as Nesterov does.
        decay: decoupled weight decay, per unit of rate.
    """

    def __init__(
        self, matrices: Iterable[torch.nn.Parameter], rate: float, *, momentum: float = 0.95, decay: float = 0.05
    ) -> None:
        self.rate = rate
        self._momentum = momentum
        self._decay = decay
        self._groups: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            if matrix.ndim != 2:
                raise ValueError(f"matrices: expected 2 dimensions each, got {tuple(matrix.shape)}")
            self._groups[matrix.shape].append(matrix)
        self._means = {shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()}

    @torch.no_grad()
    def step(self) -> None:
        """One step against the gradients; a matrix without a gradient counts as zero gradient."""
        for shape, group in self._groups.items():
            gradients = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in group])
            mean = self._means[shape].lerp_(gradients, 1 - self._momentum)
            updates = orthogonalize(gradients.lerp_(mean, self._momentum))
            scale = self.rate * max(1.0, shape[0] / shape[1]) ** 0.5
            for matrix, update in zip(group, updates, strict=True):
                matrix.mul_(1 - self.rate * self._decay).sub_(update, alpha=scale)


def orthogonalize(matrices: torch.Tensor, *, steps: int = 5) -> torch.Tensor:
    """Push all singular values of ``[n, rows, cols]`` towards 1 (to 0.7 ... 1.2) by quintic Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x

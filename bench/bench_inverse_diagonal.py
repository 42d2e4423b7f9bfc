"""inverse_diagonal: Cholesky factor and the column norms of its inverse, 2/3 cols^3 flops."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import hand_written
import numpy as np
import torch
from harness import OURS, TORCH, Case
from scipy.linalg import lapack
from torch import Tensor

import hpa_ext

DAMPING = 0.01


def cases(shrink: int = 1) -> Iterator[Case]:
    for size in (512, 1024, 4096, 11008):
        cols = size // shrink
        yield Case(
            kernel="inverse_diagonal",
            case=f"{cols} columns fp32",
            inputs=partial(inputs, cols),
            contenders={
                OURS: hpa_ext.inverse_diagonal,
                TORCH: hand_written.inverse_diagonal,
                "potrf + potri": by_inverse,
                "potrf + trtri": by_triangular_inverse,
            },
            tolerance=1e-4,
            flops=2 / 3 * cols**3,
            targets={TORCH: 3} if size >= 4096 else {},
            level={512: "default", 1024: "quick", 4096: "default"}.get(size, "full"),
            warm=True,
        )


def inputs(cols: int) -> tuple[Tensor]:
    x = torch.randn(cols + cols // 4 + 1, cols)
    return (x.t() @ x / len(x),)


def factor(gram: Tensor) -> np.ndarray:
    """U with U^T U = gram + lambda I, column-major, in memory of its own."""
    damped = gram.numpy().copy()
    damped[np.diag_indices_from(damped)] += DAMPING * damped.diagonal().mean()
    upper, info = lapack.spotrf(damped.T, lower=0, clean=1, overwrite_a=1)
    assert info == 0
    return upper


def by_inverse(gram: Tensor) -> Tensor:
    inverse, info = lapack.spotri(factor(gram), lower=0, overwrite_c=1)
    assert info == 0
    return torch.from_numpy(inverse.diagonal().copy())


def by_triangular_inverse(gram: Tensor) -> Tensor:
    """The same route as ours: the diagonal of the inverse is the row norms of U^-1."""
    inverse, info = lapack.strtri(factor(gram), lower=0, overwrite_c=1)
    assert info == 0
    return torch.from_numpy(np.einsum("ij,ij->i", inverse, inverse))

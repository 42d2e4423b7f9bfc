"""project_: the basis is read twice, because coefficients are sums over whole vectors; rows of vectors are a product of
matrices, bound by arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import hand_written
import torch
from harness import OURS, TORCH, Case
from scipy.linalg import blas
from shapes import BOTH, rows_of_basis, short
from torch import Tensor

import hpa_ext

RANK = 64


def cases(shrink: int = 1) -> Iterator[Case]:
    n = 2**22 // shrink
    for dtype in BOTH:
        contenders = {OURS: hpa_ext.project_, TORCH: hand_written.project_}
        if dtype == torch.float32:
            contenders["sgemv"] = sgemv
        yield Case(
            kernel="project_",
            case=f"rank {RANK}, {n} elements {short(dtype)}",
            inputs=lambda n=n, dtype=dtype: (torch.randn(n).to(dtype), rows_of_basis(RANK, n, dtype)),
            contenders=contenders,
            compiled=hand_written.project_,
            tolerance=1e-4 if dtype == torch.float32 else 2e-2,
            bytes_moved=(2 * RANK + 3) * n * dtype.itemsize,
            targets={TORCH: 1.3 if dtype == torch.float32 else 6},
            level="quick" if dtype == torch.bfloat16 else "default",
        )

    count, shape = 200 // min(shrink, 50), (128, max(1, 160 // shrink))
    yield Case(
        kernel="project_",
        case=f"rank {RANK}, {count} tensors of {shape[0]}x{shape[1]} fp32",
        inputs=partial(tensor_list, count, shape),
        contenders={
            OURS: lambda grads, parts, basis: hpa_ext.project_(grads, parts),
            TORCH: lambda grads, parts, basis: hand_written.project_list_(grads, basis),
            "torch, tensor by tensor": lambda grads, parts, basis: hand_written.project_pairs_(grads, parts),
        },
        compiled=lambda grads, parts, basis: hand_written.project_list_(grads, basis),
        result=lambda _, grads, parts, basis: grads,
        bytes_moved=(2 * RANK + 3) * count * shape[0] * shape[1] * 4,
        targets={TORCH: 3},
    )

    rows, cols = 4096 // shrink, max(4096 // shrink, 4 * RANK)
    for dtype in BOTH:
        yield Case(
            kernel="project_",
            case=f"rank {RANK}, {rows} vectors of {cols} {short(dtype)}",
            inputs=lambda rows=rows, cols=cols, dtype=dtype: (
                torch.randn(rows, cols).to(dtype),
                torch.linalg.qr(torch.randn(cols, RANK)).Q.t().contiguous().to(dtype),
            ),
            contenders={OURS: hpa_ext.project_, TORCH: hand_written.project_},
            compiled=hand_written.project_,
            tolerance=1e-4 if dtype == torch.float32 else 2e-2,
            bytes_moved=2 * rows * cols * dtype.itemsize,
            memory="scale",
            flops=4 * RANK * rows * cols,
            arithmetic=short(dtype),
        )


def tensor_list(count: int, shape: tuple[int, int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients, their slices of the basis, and the matrix that the slices are views of."""
    size = shape[0] * shape[1]
    basis = rows_of_basis(RANK, count * size)
    parts = [part.unflatten(1, shape) for part in basis.split(size, dim=1)]
    return [torch.randn(shape) for _ in range(count)], parts, basis


def sgemv(grads: Tensor, basis: Tensor) -> Tensor:
    """Two calls of BLAS; a row-major basis is its transpose, column-major."""
    columns, vector = basis.numpy().T, grads.numpy()
    coefficients = blas.sgemv(1.0, columns, vector, trans=1)
    blas.sgemv(-1.0, columns, coefficients, beta=1.0, y=vector, overwrite_y=1)
    return grads

"""Calls into the compiled module for CUDA: allocates outputs and scratch, names the stream, bumps version counters.

Functions take checked arguments (:class:`hpa_ext.backend.Backend`).  Kernels are queued on torch's current stream of
the tensors' device, and nothing waits for them, except where the answer is a Python number: ``inverse_diagonal``,
``balanced_mask`` and ``orthonormalize_`` read it once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from hpa_ext.backend import cuda_extension

__all__ = [
    "accumulate_gram_",
    "accumulate_importance_",
    "balanced_mask",
    "change_statistics",
    "inverse_diagonal",
    "merge_",
    "orthonormalize_",
    "project_",
]

_NON_FINITE = 2  # hpa::FactorStatus
_SMALL = 1024  # columns up to which a Gram matrix from activations is float64
_LOW_RANK_SHARE = 0.8  # tokens / cols below which the low-rank route does less work
_LEAST_REMAINDER = 1e-8  # smallest 1 - |.|^2 that float64 still resolves to 1e-7 or so
_STRIP = 2048  # columns solved for at a time

_Where: TypeAlias = tuple[int, int, Callable[[int], Tensor]]


def accumulate_gram_(gram: Tensor, x: Tensor, scale: float) -> None:
    cuda_extension().accumulate_gram_(_where(gram), gram, x, scale)
    _written(gram)


def inverse_diagonal(
    gram: Tensor | None, activations: Tensor | None, scale: float, damping: float, mode: str
) -> tuple[Tensor | None, float, str]:
    name = "gram"
    if gram is None:
        name = "activations"
        assert activations is not None
        tokens, cols = activations.shape
        if mode == "exact" and tokens < _LOW_RANK_SHARE * cols:
            diagonal, lam = _low_rank_diagonal(activations, scale, damping)
            if diagonal is not None or not lam > 0:
                return diagonal, lam, "low_rank" if diagonal is not None else "dense"
        wide = activations.dtype == torch.float64
        gram_dtype = torch.float64 if wide or cols <= _SMALL else torch.float32
        gram = torch.zeros(cols, cols, dtype=gram_dtype, device=activations.device)
        accumulate_gram_(gram, activations, scale)
    else:
        wide = gram.dtype == torch.float64
    out = torch.empty(gram.shape[0], dtype=torch.float64 if wide else torch.float32, device=gram.device)
    result = torch.empty(2, dtype=torch.float64, device=gram.device)
    cuda_extension().inverse_diagonal(_where(gram), out, result, gram, damping, mode)
    lam, status = result.tolist()  # waits for the device: the answers are numbers
    if status == _NON_FINITE:
        raise ValueError(f"{name}: contains NaN or Inf")
    return (out if status == 0 else None), lam, "dense"


def _low_rank_diagonal(activations: Tensor, scale: float, damping: float) -> tuple[Tensor | None, float]:
    """``(1 - |L^-1 Y_j|^2) / lambda`` with ``Y = sqrt(scale) x`` and ``lambda I + Y Y^T = L L^T``, all in float64.

    The products are large and plain: cuBLAS and cuSOLVER, through torch. The diagonal is ``None`` where the difference
    cancels too far, or a pivot failed.
    """
    y = activations.double() * math.sqrt(scale)
    lam = damping * y.square().sum() / y.shape[1]
    matrix = y @ y.T
    matrix.diagonal().add_(lam)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    left = torch.ones(y.shape[1], dtype=torch.float64, device=y.device)
    for part, columns in zip(left.split(_STRIP), y.split(_STRIP, dim=1), strict=True):
        part -= torch.linalg.solve_triangular(factor, columns, upper=False).square().sum(0)
    diagonal = left / lam
    usable = (failed == 0) & (left.min() >= _LEAST_REMAINDER)
    number, good = torch.stack([lam, usable.to(torch.float64)]).tolist()  # waits for the device
    if not math.isfinite(number):
        raise ValueError("activations: contains NaN or Inf")
    dtype = torch.float64 if activations.dtype == torch.float64 else torch.float32
    return (diagonal.to(dtype) if good else None), number


def accumulate_importance_(
    importance: list[Tensor], grads: list[Tensor], weights: list[Tensor] | None, kind: str
) -> None:
    cuda_extension().accumulate_importance_(_where(importance[0]), importance, grads, weights or [])
    _written(*importance)


def change_statistics(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if before.dtype == torch.float64 else torch.float32
    column_change = torch.empty(before.shape[1], dtype=dtype, device=before.device)
    scalars = torch.empty(3, dtype=torch.float64, device=before.device)
    cuda_extension().change_statistics(_where(before), column_change, scalars, before, after)
    return column_change, scalars


def balanced_mask(
    safety: Tensor,
    task: Tensor,
    keep: int,
    focus: int,
    alpha: tuple[float, float],
    mode: str,
    alpha_mode: str,
    alpha_sign: int,
    overflow: str,
    phi_norm: str,
) -> tuple[Tensor, float, float, int, int, int]:
    mask = torch.empty(safety.shape[0], dtype=torch.bool, device=safety.device)
    numbers = torch.empty(5, dtype=torch.float64, device=safety.device)
    options = (mode, alpha_mode, alpha_sign, overflow, phi_norm)
    cuda_extension().balanced_mask(_where(safety), mask, numbers, safety, task, keep, focus, *alpha, *options)
    used_alpha, log_ratio, *counts = numbers.tolist()  # waits for the device: the answers are numbers
    overlap, kept_safety_only, kept_overlap = (int(count) for count in counts)
    return mask, used_alpha, log_ratio, overlap, kept_safety_only, kept_overlap


def merge_(after: Tensor, before: Tensor, mask: Tensor, projection: float) -> None:
    cuda_extension().merge_(_where(after), after, before, mask, projection)
    _written(after)


def project_(grads: list[Tensor], basis: list[Tensor], passes: int) -> None:
    cuda_extension().project_(_where(grads[0]), grads, basis, passes)
    _written(*grads)


def orthonormalize_(vectors: Tensor, basis: Tensor | None, rtol: float) -> int:
    counts = torch.empty(2, dtype=torch.float64, device=vectors.device)
    cuda_extension().orthonormalize_(_where(vectors), vectors, counts, basis, rtol)
    kept, bad_row = counts.view(torch.int64).tolist()  # waits for the device: the answer is a number
    if bad_row >= 0:
        raise ValueError(f"vectors: row {bad_row} contains NaN or Inf")
    _written(vectors)
    return int(kept)


def _where(tensor: Tensor) -> _Where:
    """The device, torch's current stream on it, and where scratch memory comes from.

    torch's allocator hands memory that was freed on a stream only to later work of that stream, so scratch may be
    dropped while the kernels that use it are still queued.
    """
    device = tensor.device
    index, stream = 0, 0
    if device.type == "cuda":
        index, stream = device.index, torch.cuda.current_stream(device).cuda_stream
    return index, stream, lambda count: torch.empty(count, dtype=torch.float64, device=device)


def _written(*tensors: Tensor) -> None:
    """Tells autograd that memory it may have saved has changed."""
    torch.autograd.graph.increment_version(tensors)

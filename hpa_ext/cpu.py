"""Calls into the compiled module: allocates outputs, passes the number of threads, bumps version counters.

Functions take checked arguments (:class:`hpa_ext.backend.Backend`).  The extension reads tensors through DLPack and
releases the GIL while it works.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpa_ext.backend import extension
from hpa_ext.threads import get_num_threads

__all__ = [
    "accumulate_gram_",
    "accumulate_importance_",
    "balanced_mask",
    "change_statistics",
    "change_statistics_list",
    "inverse_diagonal",
    "merge_",
    "merge_list_",
    "orthonormalize_",
    "project_",
]


def accumulate_gram_(gram: Tensor, x: Tensor, scale: float) -> None:
    extension().accumulate_gram_(gram, x, scale, get_num_threads())
    _written(gram)


def inverse_diagonal(
    gram: Tensor | None, activations: Tensor | None, scale: float, damping: float, mode: str
) -> tuple[Tensor | None, float, str]:
    given = gram if gram is not None else activations
    assert given is not None
    dtype = torch.float64 if given.dtype == torch.float64 else torch.float32
    out = torch.empty(given.shape[1], dtype=dtype, device="cpu")
    status, lam, route = extension().inverse_diagonal(out, gram, activations, scale, damping, mode, get_num_threads())
    if status == "non_finite":
        raise ValueError(f"{'gram' if gram is not None else 'activations'}: contains NaN or Inf")
    return (out if status == "ok" else None), lam, route


def accumulate_importance_(
    importance: list[Tensor], grads: list[Tensor], weights: list[Tensor] | None, kind: str
) -> None:
    extension().accumulate_importance_(importance, grads, weights or [], get_num_threads())
    _written(*importance)


def change_statistics(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if before.dtype == torch.float64 else torch.float32
    column_change = torch.empty(before.shape[1], dtype=dtype, device="cpu")
    scalars = torch.empty(3, dtype=torch.float64, device="cpu")
    extension().change_statistics(column_change, scalars, before, after, get_num_threads())
    return column_change, scalars


def change_statistics_list(before: list[Tensor], after: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """:func:`change_statistics` of each layer, in one call."""
    columns = [
        torch.empty(old.shape[1], dtype=torch.float64 if old.dtype == torch.float64 else torch.float32, device="cpu")
        for old in before
    ]
    scalars = torch.empty(len(before), 3, dtype=torch.float64, device="cpu").unbind()
    extension().change_statistics_list(columns, scalars, before, after, get_num_threads())
    return list(zip(columns, scalars, strict=True))


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
    mask = torch.empty(safety.shape[0], dtype=torch.bool, device="cpu")
    numbers = extension().balanced_mask(
        mask, safety, task, keep, focus, *alpha, mode, alpha_mode, alpha_sign, overflow, phi_norm
    )
    return (mask, *numbers)


def merge_(after: Tensor, before: Tensor, mask: Tensor, projection: float) -> None:
    extension().merge_(after, before, mask, projection, get_num_threads())
    _written(after)


def merge_list_(after: list[Tensor], before: list[Tensor], mask: list[Tensor], projection: list[float]) -> None:
    """:func:`merge_` of each layer, in one call."""
    extension().merge_list_(after, before, mask, projection, get_num_threads())
    _written(*after)


def project_(grads: list[Tensor], basis: list[Tensor], passes: int) -> None:
    extension().project_(grads, basis, passes, get_num_threads())
    _written(*grads)


def orthonormalize_(vectors: Tensor, basis: Tensor | None, rtol: float) -> int:
    kept, bad_row = extension().orthonormalize_(vectors, basis, rtol, get_num_threads())
    if bad_row >= 0:
        raise ValueError(f"vectors: row {bad_row} contains NaN or Inf")
    _written(vectors)
    return int(kept)


def _written(*tensors: Tensor) -> None:
    """Tells autograd that memory it may have saved has changed."""
    torch.autograd.graph.increment_version(tensors)

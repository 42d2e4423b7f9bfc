"""Columns of one layer: how much each changed, and writing a choice of old columns back.

What every column-wise method shares (METHOD 1.1, 1.5, 1.6), whatever its rule for choosing.  LoRA updates are measured
and edited in their factors: with ``change = s B A``

    rows * column_change_j = s^2 a_j' (B'B) a_j               a rank x rank Gram matrix, no dense update
    <change, W_o>          = s * sum(A o (B' W_o))            one product with W_o
    W^                     = W_o diag(1 - c (1-m)) + s B (A diag(1-m))    m_j = 1 where column j goes back

so nothing passes through a storage dtype before it is scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import hpa_ext
from hpa.config import ColumnConfig
from hpa.layers import LayerChange, LayerEdit, LowRankUpdate, Number, add_update
from hpa_ext import ChangeStatistics

__all__ = ["give_back", "keep_as_learned", "measure", "measured_numbers", "stored"]

ROWS_AT_ONCE = 1024  # rows of a weight that are held in float64 at a time


def stored(change: LayerChange, config: ColumnConfig) -> LayerChange:
    """The change as ``lora_native`` wants it scored (D14): factors as they are, or merged in the storage dtype."""
    if config.lora_native or not isinstance(change.update, LowRankUpdate):
        return change
    return replace(change, update=add_update(change.before, change.update, change.before.dtype))


def measure(change: LayerChange) -> ChangeStatistics:
    """Mean squared change of each column ``[cols]``, ``<change, before>``, ``|before|^2`` and ``|change|^2``.

    Dense weights are read once (:func:`hpa_ext.change_statistics`); factors are measured exactly, in float64.

    Raises:
        ValueError: NaN or Inf in a weight; the layer and the first bad column are named.
    """
    if isinstance(change.update, LowRankUpdate):
        statistics = _low_rank_statistics(change.before, change.update)
    else:
        after = change.update
        if after.dtype != change.before.dtype:
            wide = torch.promote_types(after.dtype, change.before.dtype)
            statistics = hpa_ext.change_statistics(change.before.to(wide), after.to(wide))
        else:
            statistics = hpa_ext.change_statistics(change.before, after)
    finite = torch.isfinite(statistics.column_change)
    if not bool(finite.all()):
        raise ValueError(f"layer {change.label}: the change of column {int((~finite).nonzero()[0])} is not finite")
    if not math.isfinite(float(statistics.before_norm_sq)) or not math.isfinite(float(statistics.dot)):
        raise ValueError(f"layer {change.label}: the weight before the task is not finite")
    return statistics


def measured_numbers(statistics: ChangeStatistics) -> dict[str, Number]:
    """``change_norm``, ``before_norm`` and ``along_before``: the paper's c_proj, measured whether or not it is used."""
    before = float(statistics.before_norm_sq)
    return {
        "change_norm": math.sqrt(max(0.0, float(statistics.change_norm_sq))),
        "before_norm": math.sqrt(before),
        "along_before": float(statistics.dot) / before if before > 0 else 0.0,
    }


def keep_as_learned(
    change: LayerChange, reason: str | None = None, numbers: dict[str, Number] | None = None
) -> LayerEdit:
    """``W_n`` as the task made it; ``reason`` says why the layer was skipped, where it was."""
    numbers = dict(numbers or {})
    if reason is not None:
        numbers["skipped"] = reason
    if isinstance(change.update, LowRankUpdate):
        return LayerEdit(numbers, base=change.before, update=change.update, dtype=change.before.dtype)
    return LayerEdit(numbers, weight=change.update.to(change.before.dtype, copy=not change.reuse_update))


def give_back(
    change: LayerChange,
    mask: Tensor,
    statistics: ChangeStatistics,
    config: ColumnConfig,
    numbers: dict[str, Number],
    *,
    basis: Tensor | None = None,
) -> LayerEdit:
    """Adjust the update and put the chosen columns back (METHOD 1.5).

    ``W^[:, j] = anchor[:, j]`` where ``mask[j]``, else ``W_n[:, j]`` without what ``config.proj`` takes out of the
    whole update; the anchor is ``W_o`` or the aligned weight (D12).

    Args:
        change: the layer; its update decides whether the edit is dense or stays in factors.
        mask: bool ``[cols]``.
        statistics: of :func:`measure`.
        numbers: what is known already; added are ``projection`` (the paper's coefficient where ``proj=fro``, else 0),
            ``projection_share`` (norm of what was taken out, as a share of the update) and ``kept_change_share``.
        basis: orthonormal rows for ``proj=subspace``, ``[rank, cols]`` (input side) or ``[rank, rows]`` (output side);
            by default the leading singular vectors of ``W_o``.

    Raises:
        ValueError: ``anchor=aligned`` without the aligned weight, or a bad ``basis``.
    """
    if config.anchor == "aligned" and change.aligned is None:
        raise ValueError(f"layer {change.label}: anchor='aligned' needs the aligned model's weight, got none")
    if basis is not None and config.proj != "subspace":
        raise ValueError(f"basis: only used with proj='subspace', got proj={config.proj!r}")
    removed = _removal(change, statistics, config, basis)
    total = float(statistics.column_change.double().sum())
    kept = float(statistics.column_change.double()[mask].sum())
    norm = math.sqrt(max(0.0, float(statistics.change_norm_sq)))
    numbers = {
        **numbers,
        "projection": removed.coefficient,
        "projection_share": min(1.0, removed.norm / norm) if norm > 0 else 0.0,
        "kept_change_share": kept / total if total > 0 else 0.0,
    }
    if isinstance(change.update, LowRankUpdate):
        return _give_back_factors(change, change.update, mask, removed, config, numbers)
    return _give_back_dense(change, change.update, mask, removed, config, numbers)


@dataclass(frozen=True)
class _Removal:
    """What leaves the update: ``coefficients * W_o`` (broadcast over the weight), or its part in a basis' span."""

    norm: float  # Frobenius norm of what leaves
    coefficient: float = 0.0  # the paper's c_proj, where that is what leaves
    coefficients: Tensor | None = None  # 0-dim, [rows, 1] or [cols]
    basis: Tensor | None = None  # [rank, cols] or [rank, rows], orthonormal rows


def _removal(change: LayerChange, statistics: ChangeStatistics, config: ColumnConfig, basis: Tensor | None) -> _Removal:
    if config.proj == "off":
        return _Removal(0.0)
    if config.proj == "fro":
        norm_sq = float(statistics.before_norm_sq)
        coefficient = float(statistics.dot) / norm_sq if norm_sq > 0 else 0.0
        return _Removal(
            abs(coefficient) * math.sqrt(norm_sq),
            coefficient,
            torch.tensor(coefficient, dtype=torch.float64, device=change.before.device),
        )
    if config.proj == "subspace":
        return _subspace_removal(change, config, basis)
    dim = 1 if config.proj == "row" else 0
    dots, norms = _dots_with_before(change, dim)
    coefficients = torch.where(norms > 0, dots / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    norm = math.sqrt(float((coefficients.square() * norms).sum()))
    return _Removal(norm, coefficients=coefficients[:, None] if dim == 1 else coefficients)


def _subspace_removal(change: LayerChange, config: ColumnConfig, basis: Tensor | None) -> _Removal:
    before, update = change.before, change.update
    input_side = config.subspace_side == "input"
    size = change.cols if input_side else change.rows
    if basis is None:
        basis = _leading_directions(before, config.subspace_rank, input_side)
    else:
        if basis.ndim != 2 or basis.shape[1] != size:
            raise ValueError(
                f"basis: expected [rank, {size}] for subspace_side={config.subspace_side!r}, got {tuple(basis.shape)}"
            )
        basis = basis.to(before.device, torch.float64)
        loss = (basis @ basis.T - torch.eye(len(basis), dtype=torch.float64, device=before.device)).abs().max()
        if len(basis) and not float(loss) < 1e-2:  # float64 arithmetic, so this is the caller's own rounding
            raise ValueError(f"basis: expected orthonormal rows, got rows whose products are off by {float(loss):.2g}")
    if isinstance(update, LowRankUpdate):
        factor_a, factor_b = update.A.double(), update.B.double()
        inside = (factor_b @ (factor_a @ basis.T)) if input_side else ((basis @ factor_b) @ factor_a)
        norm = abs(update.scale) * float(inside.norm())
    else:
        delta = update.double() - before.double()
        norm = float((delta @ basis.T if input_side else basis @ delta).norm())
    return _Removal(norm, basis=basis)


def _give_back_dense(
    change: LayerChange,
    after: Tensor,
    mask: Tensor,
    removed: _Removal,
    config: ColumnConfig,
    numbers: dict[str, Number],
) -> LayerEdit:
    before = change.before
    wide = torch.promote_types(torch.promote_types(after.dtype, before.dtype), torch.float32)
    nothing = torch.zeros_like(mask)
    scale = 0.0
    if removed.basis is not None:
        delta = after.to(wide) - before.to(wide)
        _take_out(delta, removed.basis.to(wide), config.subspace_side == "input")
        out = delta.add_(before.to(wide)).to(before.dtype)
    elif removed.coefficients is not None and removed.coefficients.ndim:
        out = (after.to(wide) - removed.coefficients.to(wide) * before.to(wide)).to(before.dtype)
    elif after.dtype == before.dtype:
        out, scale = after, removed.coefficient
        if not (change.reuse_update and after.is_contiguous()):
            out = after.clone(memory_format=torch.contiguous_format)
    else:
        out = (after.to(wide) - removed.coefficient * before.to(wide)).to(before.dtype)
    if config.anchor == "aligned":
        assert change.aligned is not None
        hpa_ext.merge_(out, before, nothing, scale)
        hpa_ext.merge_(out, change.aligned.to(out), mask)
    else:
        hpa_ext.merge_(out, before, mask, scale)
    return LayerEdit(numbers, weight=out)


def _give_back_factors(
    change: LayerChange,
    update: LowRankUpdate,
    mask: Tensor,
    removed: _Removal,
    config: ColumnConfig,
    numbers: dict[str, Number],
) -> LayerEdit:
    before = change.before
    factor_a, factor_b = update.A.clone(), update.B
    if removed.basis is not None and config.subspace_side == "input":
        _take_out(factor_a, removed.basis.to(factor_a.dtype), True)
    elif removed.basis is not None:
        factor_b = update.B.clone()
        _take_out(factor_b, removed.basis.to(factor_b.dtype), False)
    factor_a[:, mask] = 0.0
    base = before
    if removed.coefficients is not None and bool(removed.coefficients.any()):
        wide = torch.promote_types(before.dtype, torch.float32)
        free = (~mask).to(torch.float64)
        # 1 - c is formed in float64: in float32 a small c would lose its digits before it meets the weight.
        base = before.to(wide) * (1.0 - removed.coefficients * free).to(wide)
    if config.anchor == "aligned":
        assert change.aligned is not None
        base = base.clone() if base is before else base
        base[:, mask] = change.aligned.to(base)[:, mask]
    return LayerEdit(numbers, base=base, update=LowRankUpdate(factor_a, factor_b, update.scale), dtype=before.dtype)


def _take_out(matrix: Tensor, basis: Tensor, rows: bool) -> None:
    """Remove the span of ``basis`` from the rows of ``matrix`` (or from its columns), in place."""
    if not len(basis) or not matrix.numel():
        return
    if rows:
        hpa_ext.project_(matrix, basis)
    else:
        turned = matrix.T.contiguous()
        matrix.copy_(hpa_ext.project_(turned, basis).T)


def _leading_directions(weight: Tensor, rank: int, input_side: bool) -> Tensor:
    """The first ``rank`` singular vectors of ``weight`` as rows, float64; fewer where the weight has lower rank."""
    matrix = weight.double() if input_side else weight.double().T
    rows, cols = matrix.shape
    if not rows or not cols:
        return matrix.new_empty(0, cols)
    # The Gram matrix of the shorter side is enough: leading vectors are well separated from rounding.
    values, vectors = torch.linalg.eigh(matrix.T @ matrix if cols <= rows else matrix @ matrix.T)
    wanted = min(rank, len(values))
    values, vectors = values.flip(0)[:wanted], vectors.flip(1)[:, :wanted]
    real = values > values[0].clamp_min(0) * max(rows, cols) * torch.finfo(torch.float64).eps
    basis = vectors[:, real].T
    return (basis if cols <= rows else (basis @ matrix) / values[real].sqrt()[:, None]).contiguous()


def _low_rank_statistics(before: Tensor, update: LowRankUpdate) -> ChangeStatistics:
    """:func:`hpa_ext.change_statistics` of ``before`` and ``before + s B A``, from the factors, in float64."""
    factor_a, factor_b = update.A.double(), update.B.double()
    rows = before.shape[0]
    squares = update.scale**2 * ((factor_b.T @ factor_b @ factor_a) * factor_a).sum(dim=0).clamp_min(0.0)
    product, norm_sq = _product_with_before(before, factor_b)
    dot = update.scale * (factor_a * product).sum()
    return ChangeStatistics(squares / max(rows, 1), dot, norm_sq, squares.sum())


def _product_with_before(before: Tensor, factor_b: Tensor) -> tuple[Tensor, Tensor]:
    """``B' W_o`` ``[rank, cols]`` and ``|W_o|^2``, in float64 without a float64 copy of the weight."""
    product = torch.zeros(factor_b.shape[1], before.shape[1], dtype=torch.float64, device=before.device)
    norm_sq = torch.zeros((), dtype=torch.float64, device=before.device)
    for start in range(0, before.shape[0], ROWS_AT_ONCE):
        part = before[start : start + ROWS_AT_ONCE].double()
        product += factor_b[start : start + ROWS_AT_ONCE].T @ part
        norm_sq += part.square().sum()
    return product, norm_sq


def _dots_with_before(change: LayerChange, dim: int) -> tuple[Tensor, Tensor]:
    """``<change, before>`` and ``|before|^2`` for each row (``dim`` 1) or each column (``dim`` 0), float64."""
    before, update = change.before, change.update
    size = before.shape[1 - dim]
    dots = torch.zeros(size, dtype=torch.float64, device=before.device)
    norms = torch.zeros_like(dots)
    for start in range(0, before.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        part = before[rows].double()
        if isinstance(update, LowRankUpdate):
            factor_a, factor_b = update.A.double(), update.B[rows].double()
            if dim == 1:
                dot = update.scale * ((part @ factor_a.T) * factor_b).sum(dim=1)
            else:
                dot = update.scale * ((factor_b.T @ part) * factor_a).sum(dim=0)
        else:
            dot = ((update[rows].double() - part) * part).sum(dim=dim)
        norm = part.square().sum(dim=dim)
        if dim == 1:
            dots[rows], norms[rows] = dot, norm
        else:
            dots += dot
            norms += norm
    return dots, norms

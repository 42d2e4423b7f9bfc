"""The definition of the eight kernels in plain torch, written to be read (``edit_`` is composed of three of them).

Every other backend is tested against this one.  Arithmetic is float64 on the device of the arguments and results are
rounded once, so differences to a fast backend are that backend's rounding.  Arguments have been checked by
:mod:`hpa_ext.ops`; the docstrings there say what each function is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

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


def accumulate_gram_(gram: Tensor, x: Tensor, scale: float) -> None:
    """``tril(gram) += scale * tril(x^T x)``."""
    rows = x.double()
    lower = torch.ones_like(gram, dtype=torch.bool).tril_()
    gram.copy_(torch.where(lower, gram.double() + scale * (rows.T @ rows), gram))


def inverse_diagonal(
    gram: Tensor | None, activations: Tensor | None, scale: float, damping: float, mode: str
) -> tuple[Tensor | None, float, str]:
    """``diag((G + lambda I)^-1)`` ("exact") or ``U_jj^2`` with ``(G + lambda I)^-1 = U^T U``, U upper ("pivot")."""
    if gram is not None:
        name, given = "gram", gram
        lower = gram.double().tril()
        matrix = lower + lower.tril(-1).T
    else:
        assert activations is not None
        name, given = "activations", activations
        matrix = scale * (activations.double().T @ activations.double())
    if not matrix.isfinite().all():
        raise ValueError(f"{name}: contains NaN or Inf")
    lam = damping * float(matrix.diagonal().mean())
    if not lam > 0:
        return None, lam, "dense"
    matrix.diagonal().add_(lam)
    if mode == "pivot":
        # H = R R^T with R upper is the Cholesky factorisation of H with its indices reversed, and U = R^-1.
        matrix = matrix.flip(0, 1)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.item() != 0:
        return None, lam, "dense"
    if mode == "pivot":
        diagonal = factor.diagonal().flip(0).square().reciprocal()
    else:
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        diagonal = torch.linalg.solve_triangular(factor, identity, upper=False).square().sum(0)
    return diagonal.to(torch.float64 if given.dtype == torch.float64 else torch.float32), lam, "dense"


def accumulate_importance_(
    importance: list[Tensor], grads: list[Tensor], weights: list[Tensor] | None, kind: str
) -> None:
    """``importance += g^2`` ("fisher") or ``importance += |w g|`` ("taylor")."""
    for i, (total, grad) in enumerate(zip(importance, grads, strict=True)):
        if kind == "fisher":
            gain = grad.double().square()
        else:
            assert weights is not None
            gain = (weights[i].double() * grad.double()).abs()
        total.copy_(total.double() + gain)


def change_statistics(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Column means of ``(after - before)^2``; ``<after - before, before>``, ``|before|^2``, ``|after - before|^2``."""
    old = before.double()
    change = after.double() - old
    rows = before.shape[0]
    column_change = change.square().sum(0) / max(rows, 1)
    scalars = torch.stack([(change * old).sum(), old.square().sum(), change.square().sum()])
    return column_change.to(torch.float64 if before.dtype == torch.float64 else torch.float32), scalars


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
    """The paper's choice of columns; every ranking is by (-score, index)."""
    eps, zeta = safety.double(), task.double()
    cols = len(eps)

    safety_focus = _top(eps, focus)
    task_focus = _top(zeta, focus)
    overlap = safety_focus & task_focus
    safety_only = safety_focus & ~task_focus

    log_ratio = _mean_log_ratio(eps.tolist(), zeta.tolist())
    used_alpha = _alpha(alpha, alpha_mode, math.tanh(alpha_sign * log_ratio))

    if phi_norm == "mean":
        phi = _over_mean(eps) - used_alpha * _over_mean(zeta)
    else:
        phi = eps - used_alpha * zeta

    if mode == "eps":
        mask = _top(eps, keep)
    elif mode == "phi":
        mask = _top(phi, keep, overlap)
    else:
        count = int(safety_only.sum())
        budget = count if overflow == "keep" else min(keep, count)
        mask = _top(eps, budget, safety_only)
        mask |= _top(phi, max(0, keep - budget), overlap)

    assert mask.shape == (cols,)
    kept_overlap = int((mask & overlap).sum())
    return mask, used_alpha, log_ratio, int(overlap.sum()), int(mask.sum()) - kept_overlap, kept_overlap


def _mean_log_ratio(safety: list[float], task: list[float]) -> float:
    """The mean of ``log(e / z)`` where both are positive, from the logs of the two products: whatever the order and
    the backend it is the same number, as alpha must be, or ties in phi break."""
    pairs = [(e, z) for e, z in zip(safety, task, strict=True) if e > 0 and z > 0]
    if not pairs:
        return 0.0
    (e, e_exponent), (z, z_exponent) = (_product(factors) for factors in zip(*pairs, strict=True))
    return (math.log(e) - math.log(z) + float(e_exponent - z_exponent) * math.log(2)) / len(pairs)


def _product(factors: Iterable[float]) -> tuple[float, int]:
    """``(s, k)`` with ``s * 2**k`` the product of positive factors, s in [1, 2]."""
    product, exponent = 1, 0
    for factor in factors:
        fraction, power = math.frexp(factor)
        product *= int(fraction * 2**53)
        excess = max(0, product.bit_length() - 512)  # far more digits than those that count
        product >>= excess
        exponent += power - 53 + excess
    excess = product.bit_length() - 64
    leading = (product + (1 << excess >> 1)) >> excess if excess > 0 else product << -excess  # rounded
    return leading / 2**63, exponent + excess + 63


def merge_(after: Tensor, before: Tensor, mask: Tensor, projection: float) -> None:
    """``after[:, j] = before[:, j]`` where ``mask[j]``, else ``after - projection * before``."""
    changed = after if projection == 0.0 else (after.double() - projection * before.double()).to(after.dtype)
    after.copy_(torch.where(mask, before, changed))


def project_(grads: list[Tensor], basis: list[Tensor], passes: int) -> None:
    """``g -= sum_k <g, q_k> q_k`` for each of the m vectors whose slices are ``grads[i]`` ``[m, *shape_i]``."""
    for _ in range(passes):
        flat_grads = [g.double().flatten(1) for g in grads]
        flat_basis = [q.double().flatten(1) for q in basis]
        coefficients = torch.stack([g @ q.T for g, q in zip(flat_grads, flat_basis, strict=True)]).sum(0)
        for grad, g, q in zip(grads, flat_grads, flat_basis, strict=True):
            grad.copy_((g - coefficients @ q).view_as(grad))


def orthonormalize_(vectors: Tensor, basis: Tensor | None, rtol: float) -> int:
    """Classical Gram-Schmidt with one repetition, vector by vector ("twice is enough")."""
    work = vectors.double()
    known = torch.zeros_like(work[:0]) if basis is None else basis.double()
    lengths = work.norm(dim=1)
    for i, length in enumerate(lengths.tolist()):
        if not math.isfinite(length):
            raise ValueError(f"vectors: row {i} contains NaN or Inf")
    kept = 0
    for vector, length in zip(work, lengths, strict=True):
        first = vector - (known @ vector) @ known
        second = first - (known @ first) @ known
        independent = second.norm() > rtol * length and second.norm() >= first.norm() / math.sqrt(2)
        if length > 0 and independent:
            known = torch.cat([known, (second / second.norm())[None]])
            kept += 1
    vectors.zero_()
    vectors[:kept] = known[len(known) - kept :].to(vectors.dtype)
    return kept


def _top(score: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """Mask of the ``count`` best columns by (-score, index), taken from the columns ``among`` only."""
    order = torch.argsort(score, descending=True, stable=True)
    if among is not None:
        order = order[among[order]]
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def _alpha(alpha: tuple[float, float], alpha_mode: str, t: float) -> float:
    low, high = alpha
    if alpha_mode == "affine":
        return low + (high - low) * (1.0 + t) / 2.0
    if alpha_mode == "relu":
        return low + (high - low) * max(0.0, t)
    if alpha_mode == "abs":
        return low + (high - low) * abs(t)
    return low


def _over_mean(score: Tensor) -> Tensor:
    mean = math.fsum(score.tolist()) / max(len(score), 1)
    return score / mean if mean > 0 else score

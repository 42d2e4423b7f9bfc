"""METHOD 1 and 9 written down a second time, in float64 numpy and plain Python, for the tests to compare against.

Nothing here calls the package.  Sorting is by Python's ``sorted`` with the key ``(-score, column)``; matrices are
formed whole; inverses are ``numpy.linalg.inv``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray


def share(block: int, blocks: int, p_max: float = 15.0, p_min: float = 5.0, layer_base: int = 1) -> float:
    depth = block if layer_base == 1 else block - 1
    return p_max - (depth / blocks) * (p_max - p_min)


def counts(cols: int, p: float, ratio: float = 2.0) -> tuple[int, int]:
    keep = math.floor(p * cols / 100 + 0.5)
    return keep, min(cols, max(keep, math.floor(ratio * p * cols / 100 + 0.5)))


def hessian(x: Array, divisor: float) -> Array:
    """``2 X'X / divisor`` for X ``[tokens, cols]``."""
    return 2.0 * x.astype(np.float64).T @ x.astype(np.float64) / divisor


def inverse_diagonal(h: Array, damping: float = 0.01) -> Array:
    return np.diag(np.linalg.inv(h + damping * np.mean(np.diag(h)) * np.eye(len(h))))


def pivots(h: Array, damping: float = 0.01) -> Array:
    """SparseGPT's divisor: ``U_jj^2`` with ``(H + lambda I)^-1 = U'U``, U upper triangular."""
    inverse = np.linalg.inv(h + damping * np.mean(np.diag(h)) * np.eye(len(h)))
    return np.diag(np.linalg.cholesky(inverse).T) ** 2


def ranked(score: Array, among: list[int]) -> list[int]:
    return sorted(among, key=lambda j: (-score[j], j))


def select(
    eps: Array,
    zeta: Array,
    keep: int,
    focus: int,
    *,
    mode: str = "full",
    alpha0: float = 0.4,
    alpha1: float = 0.8,
    alpha_mode: str = "affine",
    alpha_sign: int = 1,
    overflow: str = "cap",
    phi_norm: str = "none",
) -> dict[str, Any]:
    """The retained columns R and the numbers on the way (METHOD 1.3, 1.4)."""
    every = list(range(len(eps)))
    s, t = set(ranked(eps, every)[:focus]), set(ranked(zeta, every)[:focus])
    o, n = s & t, s - t
    live = [j for j in every if eps[j] > 0 and zeta[j] > 0]
    m = float(np.mean([math.log(eps[j] / zeta[j]) for j in live])) if live else 0.0
    tanh = math.tanh(alpha_sign * m)
    alpha = {
        "affine": alpha0 + (alpha1 - alpha0) * (1 + tanh) / 2,
        "relu": alpha0 + (alpha1 - alpha0) * max(0.0, tanh),
        "abs": alpha0 + (alpha1 - alpha0) * abs(tanh),
        "const": alpha0,
    }[alpha_mode]
    phi = eps / np.mean(eps) - alpha * zeta / np.mean(zeta) if phi_norm == "mean" else eps - alpha * zeta
    if mode == "eps":
        r = ranked(eps, every)[:keep]
    elif mode == "phi":
        r = ranked(phi, sorted(o))[:keep]
    else:
        first = ranked(eps, sorted(n))
        r = first if overflow == "keep" else first[:keep]
        r = r + ranked(phi, sorted(o))[: max(0, keep - len(r))]
    return {
        "columns": sorted(r),
        "alpha": alpha,
        "log_ratio": m,
        "overlap": len(o),
        "kept": len(r),
        "kept_safety_only": len(set(r) & n),
        "kept_overlap": len(set(r) & o),
    }


def take_out(delta: Array, old: Array, proj: str, rank: int = 8, side: str = "input") -> Array:
    """The update without what the orthogonal adjustment removes (METHOD 1.5)."""
    if proj == "off":
        return delta
    if proj == "fro":
        return delta - (np.sum(delta * old) / np.sum(old * old)) * old
    if proj in ("row", "col"):
        axis = 1 if proj == "row" else 0
        norm = np.sum(old * old, axis=axis, keepdims=True)
        coefficient = np.divide(
            np.sum(delta * old, axis=axis, keepdims=True), norm, out=np.zeros_like(norm), where=norm > 0
        )
        return delta - coefficient * old
    left, values, right = np.linalg.svd(old, full_matrices=False)
    real = [i for i in range(min(rank, len(values))) if values[i] > 1e-9 * values[0]]
    if side == "input":
        v = right[real]
        return delta - delta @ v.T @ v
    u = left[:, real]
    return delta - u @ u.T @ delta


def edit(
    old: Array,
    new: Array,
    safety_diagonal: Array,
    task_diagonal: Array,
    *,
    block: int,
    blocks: int,
    proj: str = "fro",
    rank: int = 8,
    side: str = "input",
    anchor: Array | None = None,
    p_max: float = 15.0,
    p_min: float = 5.0,
    layer_base: int = 1,
    ratio: float = 2.0,
    **selection: Any,
) -> tuple[Array, dict[str, Any]]:
    """The edited weight of one layer (METHOD 1.2 to 1.5)."""
    old, new = old.astype(np.float64), new.astype(np.float64)
    delta = new - old
    change = np.mean(delta**2, axis=0)
    eps, zeta = change / safety_diagonal, change / task_diagonal
    p = share(block, blocks, p_max, p_min, layer_base)
    keep, focus = counts(old.shape[1], p, ratio)
    numbers = select(eps, zeta, keep, focus, **selection)
    weight = old + take_out(delta, old, proj, rank, side)
    r = numbers["columns"]
    weight[:, r] = (old if anchor is None else anchor.astype(np.float64))[:, r]
    numbers |= {
        "p": p,
        "keep": keep,
        "focus": focus,
        "projection": np.sum(delta * old) / np.sum(old * old) if proj == "fro" else 0.0,
        "change_norm": np.linalg.norm(delta),
        "before_norm": np.linalg.norm(old),
        "kept_change_share": np.sum(change[r]) / np.sum(change),
        "kept_safety_share": np.sum(eps[r]) / np.sum(eps),
    }
    return weight, numbers


def least_squares(
    old: Array, new: Array, kept: list[tuple[float, Array]], task: Array, mu: float, ridge: float, proximal: float = 0.0
) -> Array:
    """METHOD 9 with A = sum of weight * Gram over ``kept`` + p I and B = mu * task + l I, by a plain inverse."""
    a = sum(weight * gram for weight, gram in kept)
    scale = np.mean(np.diag(a + mu * task))
    a = a + proximal * scale * np.eye(len(task))
    b = mu * task + ridge * scale * np.eye(len(task))
    return old + (new - old) @ b @ np.linalg.inv(a + b)

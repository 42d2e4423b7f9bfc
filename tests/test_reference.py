"""The reference backend against the same mathematics written independently in float64 numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import FLOATS, assert_within, f64, normal, orthonormal_rows, rounded, uniform
from torch import Tensor

import hpa_ext

SHAPES = {"rows": st.integers(1, 12), "cols": st.integers(1, 12), "dtype": st.sampled_from(FLOATS)}


def once(expected: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The reference computes in float64 and rounds once: half a unit, and a little for float64 sums."""
    return rounded(expected, dtype) + 1e-13 * np.abs(expected).max(initial=0)


@given(rows=SHAPES["rows"], cols=SHAPES["cols"], dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99))
def test_accumulate_gram(rows: int, cols: int, dtype: torch.dtype, seed: int) -> None:
    x, gram = normal(rows, cols, seed=seed, dtype=dtype), normal(cols, cols, seed=seed + 1, dtype=torch.float64)
    expected = f64(gram)
    for token in f64(x):
        expected += np.tril(0.7 * np.outer(token, token))
    hpa_ext.accumulate_gram_(gram, x, 0.7, backend="reference")
    assert_within(gram, expected, once(expected, torch.float64))


@given(
    tokens=st.integers(1, 20), cols=st.integers(1, 12), seed=st.integers(0, 99), damping=st.sampled_from((0.01, 0.5))
)
def test_inverse_diagonal(tokens: int, cols: int, seed: int, damping: float) -> None:
    x = normal(tokens, cols, seed=seed, dtype=torch.float64)
    matrix = 2 * f64(x).T @ f64(x)
    damped = matrix + damping * np.trace(matrix) / cols * np.eye(cols)
    inverse = np.linalg.inv(damped)
    exact = hpa_ext.inverse_diagonal(torch.from_numpy(matrix), damping, backend="reference")
    np.testing.assert_allclose(f64(exact), np.diag(inverse), rtol=1e-11)
    direct = hpa_ext.inverse_diagonal(None, damping, activations=x, backend="reference")
    np.testing.assert_allclose(f64(direct), np.diag(inverse), rtol=1e-11)
    # SparseGPT: U^T U = H^-1 with U upper. The pivot is also the corner of the inverse of the trailing block.
    upper = np.linalg.cholesky(inverse).T
    pivot = hpa_ext.inverse_diagonal(torch.from_numpy(matrix), damping, "pivot", backend="reference")
    np.testing.assert_allclose(f64(pivot), np.diag(upper) ** 2, rtol=1e-10)
    corners = [np.linalg.inv(damped[j:, j:])[0, 0] for j in range(cols)]
    np.testing.assert_allclose(f64(pivot), corners, rtol=1e-10)


@given(**SHAPES, seed=st.integers(0, 99), kind=st.sampled_from(("fisher", "taylor")))
def test_accumulate_importance(rows: int, cols: int, dtype: torch.dtype, seed: int, kind: str) -> None:
    total, grad, weight = (normal(rows, cols, seed=seed + i, dtype=dtype) for i in range(3))
    expected = f64(total) + (f64(grad) ** 2 if kind == "fisher" else np.abs(f64(grad) * f64(weight)))
    hpa_ext.accumulate_importance_(total, grad, weight if kind == "taylor" else None, kind, backend="reference")
    assert_within(total, expected, once(expected, dtype))


@given(**SHAPES, seed=st.integers(0, 99))
def test_change_statistics(rows: int, cols: int, dtype: torch.dtype, seed: int) -> None:
    before, after = normal(rows, cols, seed=seed, dtype=dtype), normal(rows, cols, seed=seed + 1, dtype=dtype)
    old, change = f64(before), f64(after) - f64(before)
    result = hpa_ext.change_statistics(before, after, backend="reference")
    columns = (change**2).mean(axis=0)
    assert_within(result.column_change, columns, once(columns, result.column_change.dtype))
    for value, expected in (
        (result.dot, np.vdot(change, old)),
        (result.before_norm_sq, np.linalg.norm(old) ** 2),
        (result.change_norm_sq, np.linalg.norm(change) ** 2),
    ):
        size = max(np.linalg.norm(old), np.linalg.norm(change)) ** 2
        assert abs(float(value) - expected) <= 1e-13 * size


def select(
    eps: np.ndarray, zeta: np.ndarray, keep: int, focus: int, a0: float, a1: float
) -> tuple[set[int], float, float]:
    """The selection of the method's page, line by line."""

    def ranked(columns: list[int], score: np.ndarray) -> list[int]:
        return sorted(columns, key=lambda j: (-score[j], j))

    every = list(range(len(eps)))
    safety, task = ranked(every, eps)[:focus], ranked(every, zeta)[:focus]
    overlap = [j for j in safety if j in task]
    only = [j for j in safety if j not in task]
    both = (eps > 0) & (zeta > 0)
    m = float(np.mean(np.log(eps[both] / zeta[both]))) if both.any() else 0.0
    alpha = a0 + (a1 - a0) * (1 + math.tanh(m)) / 2
    kept = ranked(only, eps)[:keep]
    kept += ranked(overlap, eps - alpha * zeta)[: keep - len(kept)]
    return set(kept), m, alpha


@given(cols=st.integers(1, 40), seed=st.integers(0, 999), data=st.data(), spread=st.sampled_from((0.1, 3.0)))
def test_balanced_mask(cols: int, seed: int, data: st.DataObject, spread: float) -> None:
    focus = data.draw(st.integers(0, cols))
    keep = data.draw(st.integers(0, focus))
    safety, task = (torch.exp(normal(cols, seed=seed + i, dtype=torch.float64) * spread) for i in range(2))
    safety[uniform(cols, seed=seed) < 0.1] = 0
    kept, m, alpha = select(f64(safety), f64(task), keep, focus, 0.4, 0.8)
    result = hpa_ext.balanced_mask(safety, task, keep, focus, backend="reference")
    assert set(result.mask.nonzero().flatten().tolist()) == kept
    assert result.log_ratio == pytest.approx(m, rel=1e-12, abs=1e-13)
    assert result.alpha == pytest.approx(alpha, rel=1e-13)


@given(**SHAPES, seed=st.integers(0, 99), projection=st.sampled_from((0.0, 0.3, -2.0)))
def test_merge(rows: int, cols: int, dtype: torch.dtype, seed: int, projection: float) -> None:
    after, before = normal(rows, cols, seed=seed, dtype=dtype), normal(rows, cols, seed=seed + 1, dtype=dtype)
    mask = uniform(cols, seed=seed) < 0.4
    expected = np.where(mask.numpy(), f64(before), f64(after) - projection * f64(before))
    hpa_ext.merge_(after, before, mask, projection, backend="reference")
    assert_within(after, expected, once(expected, dtype))


@given(rows=st.integers(1, 5), n=st.integers(1, 20), rank=st.integers(0, 8), seed=st.integers(0, 99))
def test_project(rows: int, n: int, rank: int, seed: int) -> None:
    basis = orthonormal_rows(min(rank, n), n, seed=seed, dtype=torch.float64)
    grads = normal(rows, n, seed=seed + 1, dtype=torch.float64)
    complement = np.eye(n) - f64(basis).T @ f64(basis)
    expected = f64(grads) @ complement
    hpa_ext.project_(grads, basis, backend="reference")
    np.testing.assert_allclose(f64(grads), expected, atol=1e-13)


@given(rank=st.integers(1, 8), n=st.integers(8, 20), seed=st.integers(0, 99))
def test_orthonormalize(rank: int, n: int, seed: int) -> None:
    vectors = normal(rank, n, seed=seed, dtype=torch.float64)
    q, r = np.linalg.qr(f64(vectors).T)
    expected = (q * np.sign(np.diag(r))).T
    assert hpa_ext.orthonormalize_(vectors, backend="reference") == rank
    np.testing.assert_allclose(f64(vectors), expected, atol=1e-11)


def test_reference_is_plain_torch_and_runs_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise AssertionError("the reference asked for the compiled module")

    monkeypatch.setattr("hpa_ext.backend.extension", missing)
    monkeypatch.setenv("HPA_BACKEND", "reference")
    gram: Tensor = hpa_ext.accumulate_gram_(torch.zeros(3, 3), torch.eye(3))
    assert torch.equal(gram, 2 * torch.eye(3))
    assert hpa_ext.inverse_diagonal(gram).tolist() == pytest.approx([1 / 2.02] * 3)

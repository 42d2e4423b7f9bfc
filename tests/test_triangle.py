"""Symmetric matrices by blocks of rows, against the whole matrix in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_oracle import least_squares

from hpa import triangle as module
from hpa.layers import InputStatistics, LayerChange
from hpa.methods import create_method
from hpa.triangle import Cholesky, Triangle, pack

WIDTHS = [1, 4, 5, 6, 23]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 5)


def gram(cols: int, seed: int = 0, tokens: int = 40) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((tokens, cols))
    return 2 * x.T @ x / tokens


def blocks_of(triangle: Triangle) -> list[torch.Tensor]:
    return [triangle.rows(first, last) for first, last in triangle.blocks()]


@pytest.mark.parametrize("cols", WIDTHS)
def test_every_kind_of_triangle_is_its_matrix(cols: int) -> None:
    matrix = gram(cols)
    lower = torch.from_numpy(np.tril(matrix))
    # What stands above the diagonal of a Gram matrix means nothing.
    dirty = lower + torch.triu(torch.full((cols, cols), torch.nan, dtype=torch.float64), 1)
    packed = pack(dirty)
    np.testing.assert_array_equal(packed.numpy(), matrix[np.tril_indices(cols)].astype(np.float32))
    vectors = torch.from_numpy(np.random.default_rng(1).standard_normal((3, cols)))
    left = torch.from_numpy(np.random.default_rng(2).standard_normal((7, cols)))
    kinds = [
        (Triangle.of_matrix(dirty), matrix, 1e-13),
        (Triangle.of_packed(cols, lambda first, last: packed[first:last]), matrix, 1e-6),
        (Triangle.of_vectors(vectors), (vectors.T @ vectors).numpy(), 1e-13),
        (Triangle.zero(cols), np.zeros((cols, cols)), 0),
    ]
    for triangle, expected, tolerance in kinds:
        np.testing.assert_allclose(triangle.lower().numpy(), np.tril(expected), rtol=0, atol=tolerance)
        whole = triangle.symmetric(at_least=torch.float32)
        assert whole.dtype == triangle.rows(0, 1).dtype
        assert triangle.symmetric(at_least=torch.float64).dtype == torch.float64
        np.testing.assert_allclose(whole.numpy(), expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(triangle.product(left), left.numpy() @ expected, rtol=0, atol=20 * tolerance * cols)
        np.testing.assert_allclose(triangle.packed(), expected[np.tril_indices(cols)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cols", WIDTHS)
def test_cholesky_factor_solves_and_measures(cols: int) -> None:
    matrix = gram(cols) + 1e-3 * np.eye(cols)
    factor = Cholesky.of(blocks_of(Triangle.of_matrix(torch.from_numpy(matrix))))
    assert factor is not None
    left = np.random.default_rng(3).standard_normal((6, cols))
    given = torch.from_numpy(left)
    solved = factor.solve(given).numpy()
    np.testing.assert_array_equal(given, left)
    np.testing.assert_allclose(solved @ matrix, left, rtol=0, atol=1e-11)
    np.testing.assert_allclose(factor.times(given), left @ np.linalg.cholesky(matrix), rtol=0, atol=1e-12)
    matrix[cols - 1, cols - 1] = -1.0
    assert Cholesky.of(blocks_of(Triangle.of_matrix(torch.from_numpy(matrix)))) is None


@pytest.mark.parametrize("reuse", [False, True])
def test_least_squares_by_blocks_is_the_formula(monkeypatch: pytest.MonkeyPatch, reuse: bool) -> None:
    """Several blocks of columns, several of rows, a memory, all numbers against plain float64 matrices."""
    monkeypatch.setattr("hpa.methods.hpa_ls.ROWS_SIZE", 0)  # 64 rows at a time
    monkeypatch.setattr("hpa.methods.hpa_ls.SKETCH", 150)  # the numbers of all rows, not estimates
    rows, cols, mu = 150, 23, 0.3
    draw = np.random.default_rng(4)
    old = draw.standard_normal((rows, cols))
    new = old + 0.1 * draw.standard_normal((rows, cols))
    safety, task, past = (gram(cols, seed, tokens=15) for seed in (5, 6, 7))
    method = create_method("hpa_ls", mu=mu, memory=0.2)
    packed = torch.from_numpy(past[np.tril_indices(cols)]).float()
    method.load_state_dict({"memory.up": packed, "tasks.up": torch.tensor(1)})
    past[np.tril_indices(cols)] = packed.numpy()
    past = np.tril(past) + np.tril(past, -1).T
    update = torch.from_numpy(new.copy())
    change = LayerChange("up", 1, 4, "up", torch.from_numpy(old), update, None, reuse)
    seen = [
        InputStatistics(None, None, 15, 15, "up", triangle=Triangle.of_matrix(torch.from_numpy(matrix)))
        for matrix in (safety, task)
    ]
    edit = method.edit_layer(change, *seen, task_index=1, seed=0)
    expected = least_squares(old, new, [(1.0, safety), (0.2, past)], task, mu, 1e-4)
    np.testing.assert_allclose(edit.weight, expected, rtol=0, atol=1e-10)
    assert (edit.weight.data_ptr() == update.data_ptr()) == reuse
    if not reuse:
        np.testing.assert_array_equal(update, new)
    delta, after, kept = new - old, expected - old, safety + 0.2 * past

    def weighed(matrix: np.ndarray, by: np.ndarray) -> float:
        return float(np.trace(matrix @ by @ matrix.T))

    assert edit.numbers["update_left"] == pytest.approx(weighed(after, np.eye(cols)) / weighed(delta, np.eye(cols)))
    assert edit.numbers["kept_inputs_change_left"] == pytest.approx(weighed(after, kept) / weighed(delta, kept))
    assert edit.numbers["task_change_lost"] == pytest.approx(weighed(delta - after, task) / weighed(delta, task))

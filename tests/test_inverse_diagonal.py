"""diag((G + lambda I)^-1), exact and as SparseGPT's pivots, dense and from few tokens."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, NARROW, assert_within, f64, normal
from torch import Tensor

import hpa_ext


def gram_of(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Lower triangle of 2 x^T x; NaN above it, which nobody may read."""
    rows = x.double()
    lower = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return torch.where(lower, 2 * rows.T @ rows, math.nan).to(dtype)


def condition(gram: Tensor, damping: float) -> float:
    lower = np.tril(np.nan_to_num(f64(gram)))
    matrix = lower + np.tril(lower, -1).T
    eigenvalues = np.linalg.eigvalsh(matrix) + damping * np.diag(matrix).mean()
    return float(eigenvalues[-1] / eigenvalues[0])


def bound(expected: Tensor, kappa: float, roundoff: float) -> np.ndarray:
    """First-order perturbation: a factorisation that is exact for H + E with |E| about 4 u |H| moves
    [H^-1]_jj by at most 4 u cond(H) of itself; and the result is rounded to its dtype."""
    storage = 2.0**-53 if expected.dtype == torch.float64 else 2.0**-24
    return (4 * roundoff * kappa + storage) * f64(expected)


@pytest.mark.parametrize("mode", ["exact", "pivot"])
@pytest.mark.parametrize("cols", [1, 2, 47, 49, 239, 240, 241, 300, 500])
def test_every_instruction_set_agrees_with_the_reference(isa: str, cols: int, mode: str) -> None:
    gram = gram_of(normal(cols + 20, cols))
    before = gram.clone()
    expected = hpa_ext.inverse_diagonal(gram, mode=mode, backend="reference")
    actual = hpa_ext.inverse_diagonal(gram, mode=mode, backend="cpu")
    assert actual.dtype == torch.float32
    assert_within(actual, expected, bound(expected, condition(gram, 0.01), 2.0**-53) + 2.0**-24 * f64(expected))
    assert torch.equal(gram.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("mode", ["exact", "pivot"])
def test_large_float32_matrices_keep_float32_accuracy(isa: str, mode: str) -> None:
    cols = 1025  # the first size that is factored in float32
    x = normal(1300, cols) * torch.logspace(0, 1, cols)
    gram = gram_of(x)
    kappa = condition(gram, 0.01)
    assert kappa > 500
    expected = hpa_ext.inverse_diagonal(gram.double(), mode=mode, backend="reference")
    assert_within(hpa_ext.inverse_diagonal(gram, mode=mode), expected, bound(expected, kappa, 2.0**-24))


@pytest.mark.parametrize("mode", ["exact", "pivot"])
@pytest.mark.parametrize("spectrum", ["geometric", "one large", "massive channel"])
def test_float32_keeps_its_documented_accuracy_at_condition_one_million(spectrum: str, mode: str) -> None:
    cols, kappa = 1030, 1e6
    if spectrum == "massive channel":
        x = normal(3 * cols, cols, dtype=torch.float64)
        x[:, 7] *= math.sqrt(kappa)
        gram, limit = (x.T @ x / len(x)).float(), 3e-6  # a scaled row and column: no digits are lost
    else:
        eigenvalues = torch.logspace(0, -6, cols) if spectrum == "geometric" else torch.full((cols,), 1 / kappa)
        eigenvalues[0] = 1
        vectors = torch.linalg.qr(normal(cols, cols, dtype=torch.float64)).Q
        gram, limit = ((vectors * eigenvalues) @ vectors.T).float(), kappa * 2.0**-25
    expected = hpa_ext.inverse_diagonal(gram.double(), 1e-9, mode, backend="reference")
    actual = hpa_ext.inverse_diagonal(gram, 1e-9, mode)
    assert_within(actual, expected, limit * f64(expected))


MEASURE_SCRATCH = """
import re, sys, torch, hpa_ext

def megabytes(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

gram = torch.empty(3000, 3000).normal_().fill_diagonal_(3000.0)
hpa_ext.inverse_diagonal(gram[:1100, :1100], mode=sys.argv[1])  # threads and tables exist from here on
before = megabytes("VmRSS")
hpa_ext.inverse_diagonal(gram, mode=sys.argv[1])
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
@pytest.mark.parametrize("mode", ["exact", "pivot"])
def test_scratch_is_less_than_one_square(mode: str) -> None:
    run = subprocess.run([sys.executable, "-c", MEASURE_SCRATCH, mode], capture_output=True, text=True, check=True)
    square = 3000**2 * 4 / 2**20
    assert 0.4 * square < float(run.stdout) < 0.9 * square


@given(
    tokens=st.integers(1, 120),
    cols=st.integers(1, 90),
    damping=st.sampled_from((1e-3, 0.01, 0.1, 1.0, 5.0)),
    mode=st.sampled_from(("exact", "pivot")),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    scale=st.sampled_from((1e-6, 1.0, 1e4)),
    seed=st.integers(0, 99),
)
def test_any_gram_matrix_agrees_with_the_reference(
    tokens: int, cols: int, damping: float, mode: str, dtype: torch.dtype, layout: str, scale: float, seed: int
) -> None:
    gram = LAYOUTS[layout](gram_of(normal(tokens, cols, seed=seed, scale=scale), dtype))
    numbers: dict[str, object] = {}
    expected = hpa_ext.inverse_diagonal(gram, damping, mode, backend="reference")
    actual = hpa_ext.inverse_diagonal(gram, damping, mode, info=numbers, backend="cpu")
    assert actual.dtype == dtype
    limit = bound(expected, condition(gram, damping), 2.0**-53) * max(1, cols / 4) + bound(expected, 0, 0)
    assert_within(actual, expected, limit)
    mean_diagonal = float(gram.diagonal().double().mean())
    assert numbers == {
        "damping": damping,
        "lambda": pytest.approx(damping * mean_diagonal, rel=1e-14),
        "attempts": 1,
        "route": "dense",
    }


@given(
    tokens=st.integers(1, 120),
    cols=st.integers(1, 150),
    dtype=st.sampled_from((*NARROW, torch.float64)),
    mode=st.sampled_from(("exact", "pivot")),
    layout=st.sampled_from(sorted(LAYOUTS)),
    damping=st.sampled_from((1e-3, 0.01, 0.3)),
    scale=st.sampled_from((2.0, 2.0 / 640)),
    seed=st.integers(0, 99),
)
def test_activations_stand_for_their_gram_matrix(
    tokens: int, cols: int, dtype: torch.dtype, mode: str, layout: str, damping: float, scale: float, seed: int
) -> None:
    x = LAYOUTS[layout](normal(tokens, cols, seed=seed, dtype=dtype))
    numbers: dict[str, object] = {}
    expected = hpa_ext.inverse_diagonal(None, damping, mode, activations=x, scale=scale, backend="reference")
    actual = hpa_ext.inverse_diagonal(None, damping, mode, activations=x, scale=scale, info=numbers, backend="cpu")
    few = mode == "exact" and tokens < 0.8 * cols
    assert numbers["route"] == ("low_rank" if few else "dense")
    # 1 - |.|^2 loses at most cond(H) of the float64 roundoff; n terms are summed.
    kappa = condition(gram_of(x), damping)
    limit = (max(tokens, cols) * kappa * 2.0**-53) * f64(expected) + bound(expected, 0, 0)
    assert_within(actual, expected, limit)


def test_few_tokens_never_need_the_square_matrix(isa: str) -> None:
    x = normal(30, 700, dtype=torch.bfloat16)
    numbers: dict[str, object] = {}
    actual = hpa_ext.inverse_diagonal(activations=x, info=numbers)
    rows = f64(x)
    matrix = 2 * rows.T @ rows
    expected = np.diag(np.linalg.inv(matrix + 0.01 * np.diag(matrix).mean() * np.eye(700)))
    assert numbers["route"] == "low_rank"
    assert_within(actual, expected, 2.0**-23 * expected)


def test_cancellation_falls_back_to_the_dense_route() -> None:
    # One channel a million times the others with little damping: 1 - |.|^2 of it is 1e-11, too little in float64.
    x = normal(20, 100, dtype=torch.float64)
    x[:, 7] *= 1e6
    numbers: dict[str, object] = {}
    actual = hpa_ext.inverse_diagonal(None, 1e-9, activations=x, info=numbers)
    assert numbers["route"] == "dense"
    expected = hpa_ext.inverse_diagonal(None, 1e-9, activations=x, backend="reference")
    assert_within(actual, expected, 1e-6 * f64(expected))


def test_a_massive_channel_survives_the_low_rank_route() -> None:
    x = normal(60, 300)
    x[:, 11] *= 3000
    numbers: dict[str, object] = {}
    actual = hpa_ext.inverse_diagonal(activations=x, info=numbers)
    rows = f64(x)
    matrix = 2 * rows.T @ rows
    damped = matrix + 0.01 * np.diag(matrix).mean() * np.eye(300)
    expected = np.diag(np.linalg.inv(damped))
    assert numbers["route"] == "low_rank"
    # cond(H) is 3e4 here: float64 leaves 1e-11, the result is rounded to float32.
    assert_within(actual, expected, 2.0**-23 * expected)


def test_pivot_is_the_squared_diagonal_of_the_upper_factor_of_the_inverse() -> None:
    gram = gram_of(normal(80, 40), torch.float64)
    matrix = np.tril(np.nan_to_num(f64(gram)))
    matrix = matrix + np.tril(matrix, -1).T
    matrix += 0.01 * np.diag(matrix).mean() * np.eye(40)
    lower = np.linalg.cholesky(np.linalg.inv(matrix))  # inverse = L L^T; U^T U with U upper is U = L^T
    actual = hpa_ext.inverse_diagonal(gram, mode="pivot")
    np.testing.assert_allclose(f64(actual), np.diag(lower) ** 2, rtol=1e-12)
    assert float(actual[-1]) == pytest.approx(1 / matrix[-1, -1], rel=1e-12)


def test_dead_columns_get_the_largest_diagonal_and_no_special_case() -> None:
    x = normal(60, 20)
    x[:, 4] = 0
    numbers: dict[str, object] = {}
    diagonal = hpa_ext.inverse_diagonal(gram_of(x), info=numbers)
    assert float(diagonal[4]) == pytest.approx(1 / numbers["lambda"], rel=2e-7)
    assert int(diagonal.argmax()) == 4


def test_indefinite_matrix_climbs_the_damping_ladder(backend: str) -> None:
    # Eigenvalues 4 and -2; the mean diagonal is 1, so only damping above 2 would do, and the ladder ends at 1.
    hopeless = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    with pytest.raises(hpa_ext.FactorizationError, match=r"^gram: .* not positive definite, even with damping 1 "):
        hpa_ext.inverse_diagonal(hopeless, backend=backend)
    # Eigenvalues 2.05 and -0.05: 0.01 fails, 0.1 does.
    slight = torch.tensor([[1.0, 0.0], [1.05, 1.0]])
    numbers: dict[str, object] = {}
    with pytest.warns(hpa_ext.DampingWarning, match=r"^gram: not positive definite with damping 0.01; used 0.1 "):
        diagonal = hpa_ext.inverse_diagonal(slight, info=numbers, backend=backend)
    assert numbers == {"damping": 0.1, "lambda": pytest.approx(0.1), "attempts": 2, "route": "dense"}
    expected = 1.1 / (1.1**2 - 1.05**2)
    assert_within(diagonal, np.array([expected, expected]), 1e-6 * expected)


def test_damping_above_the_ladder_is_tried_once() -> None:
    with pytest.raises(hpa_ext.FactorizationError, match="even with damping 1.5"):
        hpa_ext.inverse_diagonal(torch.tensor([[1.0, 0.0], [3.0, 1.0]]), 1.5)
    diagonal = hpa_ext.inverse_diagonal(torch.tensor([[1.0, 0.0], [3.0, 1.0]]), 2.5)
    assert float(diagonal[0]) == pytest.approx(3.5 / (3.5**2 - 9), rel=1e-6)


def test_nothing_to_scale_the_damping_by_is_an_error(backend: str) -> None:
    with pytest.raises(ValueError, match=r"^gram: expected a positive mean diagonal, got 0"):
        hpa_ext.inverse_diagonal(torch.zeros(3, 3), backend=backend)
    for tokens in (0, 4):
        with pytest.raises(ValueError, match=r"^activations: expected a positive mean diagonal, got 0"):
            hpa_ext.inverse_diagonal(activations=torch.zeros(tokens, 6), backend=backend)
    with pytest.raises(ValueError, match=r"^gram: expected a positive mean diagonal, got -2"):
        hpa_ext.inverse_diagonal(-2 * torch.eye(3), backend=backend)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_are_errors(backend: str, value: float) -> None:
    for place in ((2, 2), (4, 1)):
        gram = torch.eye(6)
        gram[place] = value
        with pytest.raises(ValueError, match=r"^gram: contains NaN or Inf"):
            hpa_ext.inverse_diagonal(gram, backend=backend)
    # Also where a bad pivot comes first: the number below it is what is wrong.
    gram = torch.eye(600)
    gram[1, 0], gram[500, 3] = 9.0, value
    with pytest.raises(ValueError, match=r"^gram: contains NaN or Inf"):
        hpa_ext.inverse_diagonal(gram, backend=backend)
    for tokens in (3, 12):
        x = normal(tokens, 6)
        x[1, 2] = value
        with pytest.raises(ValueError, match=r"^activations: contains NaN or Inf"):
            hpa_ext.inverse_diagonal(activations=x, backend=backend)


def test_no_columns_give_no_diagonal(backend: str) -> None:
    assert hpa_ext.inverse_diagonal(torch.zeros(0, 0), backend=backend).shape == (0,)
    assert hpa_ext.inverse_diagonal(activations=torch.zeros(5, 0), backend=backend).shape == (0,)


def test_bit_reproducible_for_any_number_of_threads(threads) -> None:
    gram, wide, x = gram_of(normal(700, 600)), gram_of(normal(1200, 1100)), normal(200, 600)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(
            [
                hpa_ext.inverse_diagonal(gram),
                hpa_ext.inverse_diagonal(gram, mode="pivot"),
                hpa_ext.inverse_diagonal(wide),
                hpa_ext.inverse_diagonal(activations=x),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "^gram: expected exactly one of gram and activations"),
        ({"gram": torch.eye(2), "activations": torch.eye(2)}, ValueError, "^gram: expected exactly one"),
        ({"gram": torch.zeros(2, 3)}, ValueError, "^gram: expected a square matrix"),
        ({"gram": torch.eye(2).half()}, TypeError, "^gram: expected dtype float32, float64, got float16"),
        ({"activations": torch.zeros(2, 3, 4)}, ValueError, r"^activations: expected 2 dimensions \[tokens, cols\]"),
        ({"gram": torch.eye(2), "damping": 0.0}, ValueError, "^damping: expected a number > 0, got 0"),
        ({"gram": torch.eye(2), "damping": math.nan}, ValueError, "^damping: expected a finite number"),
        ({"activations": torch.eye(2), "scale": -1.0}, ValueError, "^scale: expected a number > 0, got -1"),
        ({"gram": torch.eye(2), "mode": "sgpt"}, ValueError, "^mode: expected one of 'exact', 'pivot', got 'sgpt'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hpa_ext.inverse_diagonal(**arguments)

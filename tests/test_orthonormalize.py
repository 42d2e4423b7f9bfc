"""An orthonormal set from the rows of a matrix, with dependent rows dropped."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, f64, normal, orthonormal_rows
from torch import Tensor

import hpa_ext


def loss(rows: Tensor, basis: Tensor | None = None) -> float:
    """Largest element of |I - Q Q^T|, with the basis below Q."""
    q = f64(rows)
    own = np.abs(q @ q.T - np.eye(len(q))).max(initial=0)
    return max(own, np.abs(q @ f64(basis).T).max(initial=0)) if basis is not None else own


def conditioned(rank: int, n: int, kappa: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose singular values fall evenly from 1 to 1 / kappa."""
    left = torch.linalg.qr(normal(rank, rank, seed=5, dtype=torch.float64))[0]
    right = orthonormal_rows(rank, n, seed=6, dtype=torch.float64)
    return (left * torch.logspace(0, -math.log10(kappa), rank, dtype=torch.float64) @ right).to(dtype)


@pytest.mark.parametrize("kappa", [1, 2, 5, 8, 15, 30, 1e2, 1e4, 1e6])
def test_orthogonality_does_not_depend_on_the_condition(isa: str, kappa: float) -> None:
    vectors = conditioned(64, 3000, kappa)
    kept = hpa_ext.orthonormalize_(vectors, rtol=0.0)
    assert kept == 64
    # Twice is enough: the roundoff of float32 and of the sums in a lane, below 1e-6; one pass leaves kappa times it.
    assert loss(vectors) < 16 * 2.0**-24
    q = f64(vectors)
    assert np.linalg.norm(q @ q.T - np.eye(64), 2) < 16 * 2.0**-24


@pytest.mark.parametrize("size", [1e-30, 1e-17, 1e-11, 1.0, 1e11, 1e17])
@pytest.mark.parametrize("kappa", [1, 40])
def test_any_length_of_rows_will_do(isa: str, size: float, kappa: float) -> None:
    """Squares of the first and the last two overflow or vanish in float32."""
    rows = conditioned(20, 5000, kappa)
    whole = rows.clone()
    assert hpa_ext.orthonormalize_(whole) == 20
    rows *= torch.logspace(-1, 1, 20)[:, None] * size
    assert hpa_ext.orthonormalize_(rows) == 20
    assert loss(rows) < 16 * 2.0**-24
    np.testing.assert_allclose(f64(rows), f64(whole), rtol=0, atol=2e-5 * kappa)


@pytest.mark.parametrize("noise", [0.3, 0.03, 3e-3, 1e-4])
def test_rows_that_are_nearly_equal_and_of_one_sign(isa: str, noise: float) -> None:
    """Sums in float32 round in one direction there, and what is new in a row is a small part of it."""
    rows = 1 + noise * normal(40, 6000, seed=3)
    given = f64(rows)
    assert hpa_ext.orthonormalize_(rows, rtol=0.0) == 40
    assert loss(rows) < 16 * 2.0**-24
    q = f64(rows)
    rest = given - given @ q.T @ q
    assert np.linalg.norm(rest, axis=1).max() < 2e-6 * np.linalg.norm(given, axis=1).max()


def test_what_is_dropped_is_decided_in_float64(isa: str) -> None:
    """Rows of which a share close to rtol is new, on either side of it by one part in 100,000."""
    rtol, columns = 0.2, 4000
    base = orthonormal_rows(2, columns, seed=1, dtype=torch.float64)
    for share, kept in ((rtol * (1 + 1e-5), 2), (rtol * (1 - 1e-5), 1)):
        second = math.sqrt(1 - share**2) * base[0] + share * base[1]
        rows = torch.stack([base[0], second]).float()
        assert hpa_ext.orthonormalize_(rows, rtol=rtol) == kept, share


def test_rows_lie_in_the_span_of_the_kept_ones_at_any_condition(isa: str) -> None:
    # Backward stable: the result spans rows that differ from the input by roundoff, a few units of a row's length.
    # That is all that can be said of the span itself: at condition 1e6 a roundoff of the input turns its weakest
    # direction by 1e6 units, and projections of a probe by two good algorithms differ by that part of its length.
    stored = conditioned(64, 4096, 1e6)
    vectors = stored.clone()
    assert hpa_ext.orthonormalize_(vectors, rtol=1e-7) == 64
    v, q = f64(stored), f64(vectors)
    rest = np.linalg.norm(v - (v @ q.T) @ q, axis=1)
    assert (rest <= 4 * 2.0**-24 * np.linalg.norm(v, axis=1)).all()
    exact = np.linalg.qr(v.T)[0].T
    sine = np.linalg.norm(q - (q @ exact.T) @ exact, 2)
    assert sine <= 4 * 2.0**-24 * np.linalg.cond(v)


def test_float64_keeps_float64_orthogonality(isa: str) -> None:
    vectors = conditioned(30, 500, 1e10, torch.float64)
    assert hpa_ext.orthonormalize_(vectors, rtol=1e-13) == 30
    assert loss(vectors) < 64 * 2.0**-53  # random rounding of 500 terms, and some


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_vectors_are_orthonormal_to_storage_precision(dtype: torch.dtype) -> None:
    vectors = normal(20, 800, dtype=dtype)
    assert hpa_ext.orthonormalize_(vectors) == 20
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert loss(vectors) < unit  # a norm is off by half a unit on average of roundings, products by less


@given(
    rank=st.integers(0, 30),
    n=st.integers(1, 60),
    known=st.integers(0, 10),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    layouts=st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))),
    seed=st.integers(0, 99),
)
def test_random_rows_span_the_same_space_as_with_the_reference(
    rank: int, n: int, known: int, dtype: torch.dtype, layouts: tuple[str, str], seed: int
) -> None:
    basis = LAYOUTS[layouts[0]](orthonormal_rows(min(known, n - 1), n, seed=seed + 1, dtype=dtype))
    vectors = LAYOUTS[layouts[1]](normal(rank, n, seed=seed, dtype=dtype))
    original, reference = vectors.clone(), vectors.clone()
    kept = hpa_ext.orthonormalize_(vectors, basis, backend="cpu")
    assert kept == hpa_ext.orthonormalize_(reference, basis, backend="reference") == min(rank, n - len(basis))
    assert loss(vectors[:kept], basis) < 16 * (2.0**-24 if dtype == torch.float32 else 2.0**-53)
    assert not vectors[kept:].any()
    # Gram-Schmidt makes row i a positive multiple of its own part: equal up to the roundoff over that part.
    q, rows = f64(vectors[:kept]), f64(original[:kept])
    own = np.abs((q * rows).sum(axis=1)) / np.maximum(np.linalg.norm(rows, axis=1), 1e-300)
    worst = 64 * (2.0**-24 if dtype == torch.float32 else 2.0**-53) / np.minimum.accumulate(own)[:, None]
    assert (np.abs(q - f64(reference[:kept])) <= worst).all()


class TestOfEachBackend:
    def test_dependent_rows_are_dropped_and_the_rest_moves_up(self, backend: str) -> None:
        a, b, c = normal(3, 40)
        vectors = torch.stack([a, 2 * a, b, a + b, torch.zeros(40), c, b - c])
        kept = hpa_ext.orthonormalize_(vectors, backend=backend)
        assert kept == 3
        expected = np.linalg.qr(f64(torch.stack([a, b, c])).T)[0].T
        signs = np.sign((expected * f64(torch.stack([a, b, c]))).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(f64(vectors[:3]), signs * expected, atol=1e-6)
        assert not vectors[3:].any()

    def test_rows_in_the_span_of_the_basis_are_dropped(self, backend: str) -> None:
        basis = orthonormal_rows(4, 50)
        fresh = normal(50, seed=9)
        vectors = torch.stack([basis.sum(0), fresh, basis[2] * 1e-3])
        assert hpa_ext.orthonormalize_(vectors, basis, backend=backend) == 1
        assert loss(vectors[:1], basis) < 16 * 2.0**-24
        assert float(vectors[0] @ fresh) > 0

    def test_rtol_decides_what_counts_as_dependent(self, backend: str) -> None:
        first, other = orthonormal_rows(2, 100)
        for part, rtol, kept in ((1e-3, None, 2), (1e-5, None, 1), (1e-5, 1e-6, 2), (1e-2, 0.1, 1), (0.2, 0.1, 2)):
            vectors = torch.stack([first, first + part * other])
            assert hpa_ext.orthonormalize_(vectors, rtol=rtol, backend=backend) == kept

    def test_16_bit_vectors_have_a_wider_default(self, backend: str) -> None:
        first, other = orthonormal_rows(2, 2000)
        for part, kept in ((3e-3, 1), (0.1, 2)):
            vectors = torch.stack([first, first + part * other]).bfloat16()
            assert hpa_ext.orthonormalize_(vectors, backend=backend) == kept

    def test_repeated_rows_are_never_normalised_noise(self, backend: str) -> None:
        # With rtol 0 only exact zeros and what the second sweep shrinks are dropped; equal rows leave exact zeros here.
        vectors = torch.eye(3, 8).repeat(3, 1)
        assert hpa_ext.orthonormalize_(vectors, rtol=0.0, backend=backend) == 3
        assert torch.equal(vectors[:3], torch.eye(3, 8))

    def test_more_rows_than_dimensions_keep_as_many_as_there_are_dimensions(self, backend: str) -> None:
        # With rtol 0 it is the second sweep alone that tells what is left of row 13 from a direction.
        for rtol in (None, 0.0):
            vectors = normal(30, 12)
            assert hpa_ext.orthonormalize_(vectors, rtol=rtol, backend=backend) == 12
            assert loss(vectors[:12]) < 16 * 2.0**-24

    def test_empty_and_single(self, backend: str) -> None:
        assert hpa_ext.orthonormalize_(torch.zeros(0, 5), backend=backend) == 0
        assert hpa_ext.orthonormalize_(torch.zeros(5, 0), backend=backend) == 0
        assert hpa_ext.orthonormalize_(torch.zeros(3, 4), backend=backend) == 0
        one = torch.tensor([[-4.0]])
        assert hpa_ext.orthonormalize_(one, backend=backend) == 1
        assert one.item() == -1

    @pytest.mark.parametrize("scale", [1e-30, 1e15])
    def test_lengths_far_from_one(self, backend: str, scale: float) -> None:
        vectors = normal(6, 30) * scale
        assert hpa_ext.orthonormalize_(vectors, backend=backend) == 6
        assert loss(vectors) < 16 * 2.0**-24

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_and_inf_are_refused_before_anything_is_written(self, backend: str, value: float) -> None:
        vectors = normal(12, 20)
        vectors[10, 3] = value
        before = vectors.clone()
        with pytest.raises(ValueError, match="^vectors: row 10 contains NaN or Inf"):
            hpa_ext.orthonormalize_(vectors, backend=backend)
        assert torch.equal(vectors.nan_to_num(), before.nan_to_num())


def test_growing_a_basis_in_steps_spans_what_one_call_spans() -> None:
    rows = normal(20, 64)
    whole = rows.clone()
    hpa_ext.orthonormalize_(whole)
    basis = torch.zeros(0, 64)
    for part in rows.split(7):
        part = part.clone()
        kept = hpa_ext.orthonormalize_(part, basis)
        basis = torch.cat([basis, part[:kept]])
    np.testing.assert_allclose(f64(basis), f64(whole), atol=2e-5)


def test_bit_reproducible_for_any_number_of_threads(threads) -> None:
    results = []
    for count in (1, 2, 3):
        threads(count)
        vectors = normal(10, 140_000)
        assert hpa_ext.orthonormalize_(vectors) == 10
        assert loss(vectors) < 16 * 2.0**-24
        results.append(vectors)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("vectors", "basis", "rtol", "error", "message"),
    [
        (torch.zeros(3), None, None, ValueError, r"^vectors: expected 2 dimensions \[rank, n\], got \(3,\)"),
        (
            torch.zeros(2, 3),
            torch.zeros(1, 4),
            None,
            ValueError,
            r"^basis: expected \[known, 3\] like vectors, got \(1, 4",
        ),
        (torch.zeros(2, 3), torch.zeros(1, 3).half(), None, TypeError, r"^basis: expected the dtype of vectors"),
        (
            torch.zeros(2, 3),
            torch.eye(3),
            None,
            ValueError,
            "^basis: expected fewer than 3 rows, got 3: nothing is left",
        ),
        (torch.zeros(2, 3), None, 1.0, ValueError, "^rtol: expected a number below 1, got 1"),
        (torch.zeros(2, 3), None, -0.1, ValueError, "^rtol: expected a number >= 0, got -0.1"),
        (torch.zeros(2, 3).int(), None, None, TypeError, "^vectors: expected dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    vectors: Tensor, basis: Tensor | None, rtol: float | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hpa_ext.orthonormalize_(vectors, basis, rtol)

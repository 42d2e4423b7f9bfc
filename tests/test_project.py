"""g -= sum_k <g, q_k> q_k for single vectors, many vectors, and lists that are one long vector."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import FLOATS, LAYOUTS, assert_within, f64, normal, orthonormal_rows, rounded
from torch import Tensor

import hpa_ext


def bound(grads: np.ndarray, basis: np.ndarray, u: float, passes: int) -> np.ndarray:
    """Dot products sum at most 256 products a lane (fewer on wide registers); then rank products are subtracted."""
    rows = np.abs(basis)
    size = np.abs(grads) @ rows.T  # what the dot products sum
    terms = min(basis.shape[1], 260) + 4
    return passes * u * (terms * size @ rows + (len(basis) + 3) * (np.abs(grads) + size @ rows))


def check(grads: Tensor, basis: Tensor, passes: int = 1) -> None:
    expected = grads.clone()
    hpa_ext.project_(expected, basis, passes=passes, backend="reference")
    before = f64(grads)
    assert hpa_ext.project_(grads, basis, passes=passes, backend="cpu") is grads
    wide = torch.float64 in (grads.dtype, basis.dtype)
    limit = bound(before, f64(basis), 2.0**-53 if wide else 2.0**-24, passes)
    # Each pass rounds to storage, and the next one sees that.
    limit = limit + 2 * passes * (rounded(f64(expected), grads.dtype) + rounded(limit, grads.dtype))
    if passes > 1:
        limit = limit + rounded(np.abs(before).max(initial=0) * np.ones_like(before), grads.dtype)
    assert_within(grads, expected, limit)


# One vector, a few, and enough of them and of the basis for the panel loop, around block sizes.
@pytest.mark.parametrize(
    ("vectors", "n", "rank"),
    [(1, 1, 1), (1, 5000, 5), (3, 2049, 4), (9, 300, 70), (40, 600, 17), (33, 270, 50), (200, 257, 49), (500, 90, 3)],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set_agrees_with_the_reference(
    isa: str, vectors: int, n: int, rank: int, dtype: torch.dtype
) -> None:
    check(normal(vectors, n, dtype=dtype), orthonormal_rows(rank, n, seed=1, dtype=dtype))


# Rows of the basis are read in their own dtype, by eights, fours and ones, in blocks and with a rest of each length.
@pytest.mark.parametrize(("n", "rank"), [(63, 13), (2049, 8), (8223, 5), (20_011, 11)])
@pytest.mark.parametrize("basis_dtype", FLOATS)
@pytest.mark.parametrize("grad_dtype", FLOATS)
def test_the_basis_may_have_a_dtype_of_its_own(
    isa: str, n: int, rank: int, basis_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    check(normal(2, n, dtype=grad_dtype), orthonormal_rows(rank, n, seed=1, dtype=basis_dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_as_itself(isa: str, dtype: torch.dtype) -> None:
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite() & (numbers.abs() < 2**60)]
    grads = torch.zeros(len(numbers) + 1)
    grads[0] = 1.0  # the coefficient is 1, and each element loses its number of the basis
    hpa_ext.project_(grads[None], torch.cat([torch.ones(1, dtype=dtype), numbers])[None])
    assert torch.equal(grads[1:], -numbers.float())


@given(
    vectors=st.sampled_from((0, 1, 2, 8, 9, 35, 60)),
    n=st.sampled_from((0, 1, 2, 50, 130)),
    rank=st.sampled_from((0, 1, 3, 4, 16, 21)),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    layouts=st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))),
    passes=st.sampled_from((1, 2)),
    seed=st.integers(0, 99),
)
def test_any_shape_dtype_and_layout_agrees_with_the_reference(
    vectors: int,
    n: int,
    rank: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    layouts: tuple[str, str],
    passes: int,
    seed: int,
) -> None:
    grads = LAYOUTS[layouts[0]](normal(vectors, n, seed=seed, dtype=dtypes[0]))
    basis = LAYOUTS[layouts[1]](orthonormal_rows(min(rank, n), n, seed=seed + 1, dtype=dtypes[1]))
    check(grads, basis, passes)


@pytest.mark.parametrize(("vectors", "rank"), [(1, 8), (64, 32)])
def test_what_is_left_is_orthogonal_to_the_basis(vectors: int, rank: int) -> None:
    grads, basis = normal(vectors, 4096), orthonormal_rows(rank, 4096, seed=1)
    lengths = f64(grads.norm(dim=1))
    hpa_ext.project_(grads, basis)
    left = np.abs(f64(grads) @ f64(basis).T).max(axis=1)
    # Random rounding of 4096 terms in lanes of 256, and the basis' own loss of orthogonality.
    assert (left <= 64 * 2.0**-24 * lengths).all()


def test_leading_dimensions_are_vectors_whatever_their_strides() -> None:
    basis = orthonormal_rows(5, 30)
    for view in (normal(2, 3, 30), normal(3, 2, 30).transpose(0, 1), normal(30), normal(2, 4, 6, 30)[:, 1:, ::2]):
        flat = view.reshape(-1, 30).clone()
        hpa_ext.project_(flat, basis)
        hpa_ext.project_(view, basis)
        torch.testing.assert_close(view.reshape(-1, 30), flat, rtol=1e-5, atol=1e-6)


@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=5),
    rank=st.integers(0, 6),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    flat=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_list_is_one_long_vector(
    shapes: list[list[int]], rank: int, dtype: torch.dtype, flat: bool, strided: bool, seed: int
) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    rank = min(rank, sum(sizes))
    whole = normal(sum(sizes), seed=seed, dtype=dtype)
    basis = orthonormal_rows(rank, sum(sizes), seed=seed + 1)
    grads, slices = [], []
    for shape, values, rows in zip(shapes, whole.split(sizes), basis.split(sizes, dim=1), strict=True):
        grads.append(values.clone().view(shape))
        slices.append(rows.clone() if flat else rows.reshape(rank, *shape).clone())
        if strided and len(shape) >= 2:
            grads[-1] = LAYOUTS["columns_first"](grads[-1])
    assert hpa_ext.project_(grads, slices) is grads
    expected = whole[None].clone()
    hpa_ext.project_(expected, basis, backend="reference")
    limit = bound(f64(whole)[None], f64(basis), 2.0**-24, 1)[0]
    actual = torch.cat([g.reshape(-1) for g in grads]) if grads else whole
    assert_within(actual, expected[0], limit + 2 * rounded(f64(expected[0]), dtype) + 2 * rounded(limit, dtype))


def test_coefficients_are_summed_over_the_list() -> None:
    # Each slice alone has a part along its basis slice; together the vector is orthogonal, so nothing may change.
    grads = [torch.tensor([1.0, 0.0]), torch.tensor([[-1.0], [0.0]])]
    half = math.sqrt(0.5)
    basis = [torch.tensor([[half, 0.0]]), torch.tensor([[half, 0.0]])]
    hpa_ext.project_(grads, basis)
    assert [g.flatten().tolist() for g in grads] == [[1.0, 0.0], [-1.0, 0.0]]


def test_lists_of_many_small_tensors() -> None:
    sizes = [int(size) for size in torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(0))]
    whole, basis = normal(sum(sizes)), orthonormal_rows(4, sum(sizes), seed=1)
    grads = [part.clone() for part in whole.split(sizes)]
    hpa_ext.project_(grads, list(basis.split(sizes, dim=1)))
    expected = f64(whole) - f64(basis).T @ (f64(basis) @ f64(whole))
    assert_within(torch.cat(grads), expected, bound(f64(whole)[None], f64(basis), 2.0**-24, 1)[0])


def test_empty_lists_are_returned() -> None:
    assert hpa_ext.project_([], []) == []


def test_two_passes_clean_up_after_a_rounded_basis() -> None:
    basis = orthonormal_rows(64, 512).bfloat16()
    once, twice = normal(1, 512, seed=1), normal(1, 512, seed=1)
    hpa_ext.project_(once, basis)
    hpa_ext.project_(twice, basis, passes=2)
    left_once = np.abs(f64(once) @ f64(basis).T).max()
    left_twice = np.abs(f64(twice) @ f64(basis).T).max()
    assert left_once > 1e-4
    assert left_twice < left_once / 20


@pytest.mark.parametrize(("vectors", "rank"), [(3, 2), (40, 20)])
def test_nan_spreads_to_its_whole_vector(backend: str, vectors: int, rank: int) -> None:
    grads = normal(vectors, 50)
    grads[1, 7] = math.nan
    hpa_ext.project_(grads, orthonormal_rows(rank, 50), backend=backend)
    assert grads[1].isnan().all()
    assert grads[[i for i in range(vectors) if i != 1]].isfinite().all()


def test_bit_reproducible_for_any_number_of_threads(threads) -> None:
    few, many = normal(2, 200_000), normal(450, 600, seed=1)
    long_basis, basis = orthonormal_rows(6, 200_000, seed=2), orthonormal_rows(40, 600, seed=3)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append([hpa_ext.project_(few.clone(), long_basis), hpa_ext.project_(many.clone(), basis)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("grads", "basis", "error", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(1, 4),
            ValueError,
            r"^basis: expected \[rank, 3\] for grads \(2, 3\), got \(1, 4",
        ),
        (torch.zeros(2, 3), torch.zeros(1, 2, 3), ValueError, r"^basis: expected 2 dimensions \[rank, n\], got"),
        (torch.tensor(1.0), torch.zeros(1, 1), ValueError, r"^grads: expected at least 1 dimension"),
        (torch.zeros(2, 3), [torch.zeros(1, 3)], TypeError, "^basis: expected a tensor like grads, got a list"),
        (
            [torch.zeros(3)],
            torch.zeros(1, 3),
            ValueError,
            "^basis: expected a list of 1 tensors like grads, got Tensor",
        ),
        ([torch.zeros(3)], [], ValueError, "^basis: expected a list of 1 tensors like grads, got a list of 0"),
        (
            [torch.zeros(3), torch.zeros(2)],
            [torch.zeros(4, 3), torch.zeros(5, 2)],
            ValueError,
            r"^basis\[1\]: expected \[4, \*\(2,\)\] or \[4, 2\], got \(5, 2\)",
        ),
        (
            [torch.zeros(3, 2)],
            [torch.zeros(4, 2, 3)],
            ValueError,
            r"^basis\[0\]: expected \[4, \*\(3, 2\)\] or \[4, 6\]",
        ),
        (torch.zeros(2, 3).int(), torch.zeros(1, 3), TypeError, "^grads: expected dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    grads: object, basis: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hpa_ext.project_(grads, basis)


@pytest.mark.parametrize("passes", [0, -1, 1.0, True])
def test_passes_must_be_a_positive_whole_number(passes: object) -> None:
    with pytest.raises((TypeError, ValueError), match="^passes: expected a whole number"):
        hpa_ext.project_(torch.zeros(1, 2), torch.zeros(1, 2), passes=passes)

"""Column means of the squared change, and three scalars, in one pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import FLOATS, LAYOUTS, ROUNDOFF, SIZES, assert_within, f64, normal
from torch import Tensor

import hpa_ext


def check(before: Tensor, after: Tensor) -> None:
    """Each difference is rounded once, so squares and products up to thrice, and sums of 4 rows 4 times, by lanes up to
    6; the rest is float64."""
    expected = hpa_ext.change_statistics(before, after, backend="reference")
    actual = hpa_ext.change_statistics(before, after, backend="cpu")
    u = ROUNDOFF[before.dtype]
    assert actual.column_change.dtype == expected.column_change.dtype
    assert_within(actual.column_change, expected.column_change, (4 + 4) * u * f64(expected.column_change))
    old, change = f64(before), f64(after) - f64(before)
    long_sum = before.numel() * 2.0**-53
    for name, size in (
        ("dot", np.abs(change * old).sum()),
        ("before_norm_sq", np.square(old).sum()),
        ("change_norm_sq", np.square(change).sum()),
    ):
        value, wanted = getattr(actual, name), getattr(expected, name)
        assert value.dtype == torch.float64
        assert value.shape == ()
        assert_within(value, wanted, ((10 + 3) * u + long_sum) * size)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (17, 63), (300, 1100), (2100, 3)])
def test_every_instruction_set_agrees_with_the_reference(isa: str, rows: int, cols: int, dtype: torch.dtype) -> None:
    before = normal(rows, cols, dtype=dtype)
    check(before, before + normal(rows, cols, seed=1, scale=0.1).to(dtype))


@given(
    rows=st.sampled_from((*SIZES, 70)),
    cols=st.sampled_from(SIZES),
    dtype=st.sampled_from(FLOATS),
    layouts=st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))),
    change=st.sampled_from((1e-3, 0.1, 10.0)),
    seed=st.integers(0, 99),
)
def test_any_shape_dtype_and_layout_agrees_with_the_reference(
    rows: int, cols: int, dtype: torch.dtype, layouts: tuple[str, str], change: float, seed: int
) -> None:
    before = normal(rows, cols, seed=seed, dtype=dtype)
    after = (before.double() + normal(rows, cols, seed=seed + 1, dtype=torch.float64, scale=change)).to(dtype)
    check(LAYOUTS[layouts[0]](before), LAYOUTS[layouts[1]](after))


def test_values_of_a_case_worked_by_hand() -> None:
    before = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    after = torch.tensor([[2.0, 2.0], [6.0, 3.0]])
    statistics = hpa_ext.change_statistics(before, after)
    assert statistics.column_change.tolist() == [(1 + 9) / 2, (0 + 1) / 2]
    assert statistics.dot.item() == 1 * 1 + 3 * 3 - 1 * 4
    assert statistics.before_norm_sq.item() == 30
    assert statistics.change_norm_sq.item() == 11


def test_scalars_are_summed_in_float64() -> None:
    # 2^24 + 1 ones: a float32 sum stops at 2^24.
    before = torch.ones(4097, 4096)
    assert hpa_ext.change_statistics(before, before).before_norm_sq.item() == 4097 * 4096


def test_cancelling_dot_product_keeps_its_digits() -> None:
    before = torch.ones(2000, 64)
    after = before + torch.where(torch.arange(2000) % 2 == 0, 0.5, -0.5)[:, None]
    after[0, 0] += 2.0**-20
    assert hpa_ext.change_statistics(before, after).dot.item() == 2.0**-20


def test_empty_weights_have_no_change(backend: str) -> None:
    no_rows = hpa_ext.change_statistics(torch.zeros(0, 5), torch.zeros(0, 5), backend=backend)
    assert no_rows.column_change.tolist() == [0.0] * 5
    no_cols = hpa_ext.change_statistics(torch.zeros(5, 0), torch.zeros(5, 0), backend=backend)
    assert no_cols.column_change.shape == (0,)
    assert no_rows.dot == no_cols.change_norm_sq == 0


def test_nan_and_inf_spread_to_their_column_and_the_scalars(backend: str) -> None:
    before = normal(40, 30)
    after = before + 1
    after[13, 4] = math.nan
    after[33, 5] = math.inf
    statistics = hpa_ext.change_statistics(before, after, backend=backend)
    assert statistics.column_change.isnan().nonzero().flatten().tolist() == [4]
    assert statistics.column_change.isinf().nonzero().flatten().tolist() == [5]
    assert statistics.change_norm_sq.isnan()
    assert statistics.before_norm_sq.isfinite()


def test_bit_reproducible_for_any_number_of_threads(threads) -> None:
    before, after = normal(700, 515), normal(700, 515, seed=1)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(hpa_ext.change_statistics(before, after))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_list_gives_the_numbers_of_single_calls(isa: str, threads, backend: str) -> None:
    shapes = [(3, 5), (0, 4), (130, 1100), (2, 0), (700, 33), (1, 1), (64, 2048)]
    before = [normal(*shape, seed=i, dtype=FLOATS[i % 4]) for i, shape in enumerate(shapes)]
    after = [old + normal(*old.shape, seed=i + 50).to(old.dtype) for i, old in enumerate(before)]
    before[2], after[4] = LAYOUTS["every_other_column"](before[2]), LAYOUTS["columns_first"](after[4])
    for count in (1, 2):
        threads(count)
        together = hpa_ext.change_statistics(before, after, backend=backend)
        assert len(together) == len(shapes)
        for old, new, one in zip(before, after, together, strict=True):
            alone = hpa_ext.change_statistics(old, new, backend=backend)
            assert all(torch.equal(a, b) for a, b in zip(one, alone, strict=True))
    assert hpa_ext.change_statistics([], [], backend=backend) == []


def test_a_list_of_layers_beyond_the_scratch_of_one_pass() -> None:
    # 32 groups of rows and 16384 columns fill half of it.
    before = [torch.ones(2048, 16384, dtype=torch.bfloat16)] * 3
    for statistics in hpa_ext.change_statistics(before, before):
        assert statistics.before_norm_sq.item() == 2048 * 16384
        assert not statistics.column_change.any()


def test_lists_that_do_not_fit_are_named() -> None:
    layers = [torch.zeros(2, 3), torch.zeros(4, 3)]
    with pytest.raises(ValueError, match="^after: expected a list of 2 tensors like before, got a list of 1"):
        hpa_ext.change_statistics(layers, layers[:1])
    with pytest.raises(ValueError, match=r"^after\[1\]: expected the shape of before\[1\] \(4, 3\), got \(2, 3"):
        hpa_ext.change_statistics(layers, [torch.zeros(2, 3), torch.zeros(2, 3)])


@pytest.mark.parametrize(
    ("before", "after", "error", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(3, 2),
            ValueError,
            r"^after: expected the shape of before \(2, 3\), got \(3, 2",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3).half(),
            TypeError,
            r"^after: expected the dtype of before \(float32\), got",
        ),
        (torch.zeros(3), torch.zeros(3), ValueError, r"^before: expected 2 dimensions \[rows, cols\], got \(3,\)"),
        (torch.zeros(2, 3).int(), torch.zeros(2, 3).int(), TypeError, r"^before: expected dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    before: Tensor, after: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hpa_ext.change_statistics(before, after)

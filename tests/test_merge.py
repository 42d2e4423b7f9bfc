"""after[:, j] = before[:, j] where kept, after - projection * before elsewhere, in place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import FLOATS, LAYOUTS, ROUNDOFF, SIZES, assert_within, bits, f64, normal, rounded, uniform
from torch import Tensor

import hpa_ext


def check(after: Tensor, before: Tensor, mask: Tensor, projection: float) -> None:
    original = after.clone()
    expected = after.clone()
    hpa_ext.merge_(expected, before, mask, projection, backend="reference")
    assert hpa_ext.merge_(after, before, mask, projection, backend="cpu") is after
    np.testing.assert_array_equal(bits(after[:, mask]), bits(before[:, mask]))
    if projection == 0:
        np.testing.assert_array_equal(bits(after[:, ~mask]), bits(original[:, ~mask]))
    # The coefficient, the product and the difference are rounded; then both backends round to storage.
    arithmetic = ROUNDOFF[after.dtype] * (2 * np.abs(projection * f64(before)) + np.abs(f64(expected)))
    assert_within(after, expected, arithmetic + 2 * rounded(f64(expected), after.dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("projection", [0.0, 0.37])
def test_every_instruction_set_agrees_with_the_reference(isa: str, dtype: torch.dtype, projection: float) -> None:
    for rows, cols in ((1, 1), (9, 67), (300, 513)):
        check(normal(rows, cols, dtype=dtype), normal(rows, cols, seed=1, dtype=dtype), uniform(cols) < 0.3, projection)


@given(
    rows=st.sampled_from(SIZES),
    cols=st.sampled_from(SIZES),
    dtype=st.sampled_from(FLOATS),
    layouts=st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))),
    projection=st.sampled_from((0.0, 1e-5, -0.4, 1.0, 1e3)),
    share=st.sampled_from((0.0, 0.15, 1.0)),
    seed=st.integers(0, 99),
)
def test_any_shape_dtype_and_layout_agrees_with_the_reference(
    rows: int, cols: int, dtype: torch.dtype, layouts: tuple[str, str], projection: float, share: float, seed: int
) -> None:
    after = LAYOUTS[layouts[0]](normal(rows, cols, seed=seed, dtype=dtype))
    before = LAYOUTS[layouts[1]](normal(rows, cols, seed=seed + 1, dtype=dtype))
    mask = (uniform(2 * cols, seed=seed) < share)[::2]
    check(after, before, mask, projection)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_is_kept_as_it_is(isa: str, dtype: torch.dtype, backend: str) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(2, -1)
    before, after = patterns.view(dtype), patterns.flip(1).contiguous().view(dtype)
    mask = torch.arange(2**15) % 3 == 0
    for projection in (0.0, 0.5):
        merged = hpa_ext.merge_(after.clone(), before, mask, projection, backend=backend)
        np.testing.assert_array_equal(bits(merged[:, mask]), bits(before[:, mask]))
        if projection == 0:
            np.testing.assert_array_equal(bits(merged[:, ~mask]), bits(after[:, ~mask]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_rounded_like_torch(isa: str, dtype: torch.dtype) -> None:
    # after - 1 * before with before = 0 passes each number through float32; with a small before it is rounded again.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[None]
    for offset in (0.0, 2.0**-9, 2.0**-14, 1.0, 2.0**-24):
        before = torch.full_like(every, offset)
        merged = hpa_ext.merge_(every.clone(), before, torch.zeros(2**16, dtype=torch.bool), 1.0)
        expected = (every.float() - before.float()).to(dtype)
        assert torch.equal(merged.isnan(), expected.isnan())
        assert torch.equal(merged.nan_to_num(), expected.nan_to_num())
    # Twice each number: the largest ones become infinite, the smallest ones leave the subnormal range.
    doubled = hpa_ext.merge_(every.clone(), every, torch.zeros(2**16, dtype=torch.bool), -1.0)
    expected = (2 * every.float()).to(dtype)
    assert torch.equal(doubled.isinf(), expected.isinf())
    assert torch.equal(doubled.nan_to_num(), expected.nan_to_num())


def test_kept_nan_payloads_and_signed_zeros_are_copied() -> None:
    payloads = torch.tensor([[0x7FC00001, 0x7F800001, -2147483648, 0x7F800000]], dtype=torch.int32).view(torch.float32)
    for projection in (0.0, 0.1):
        merged = hpa_ext.merge_(torch.ones(1, 4), payloads, torch.ones(4, dtype=torch.bool), projection)
        np.testing.assert_array_equal(bits(merged), bits(payloads))


def test_infinite_before_does_not_touch_other_columns_without_projection(backend: str) -> None:
    before = torch.full((2, 3), math.inf)
    merged = hpa_ext.merge_(torch.ones(2, 3), before, torch.tensor([True, False, False]), backend=backend)
    assert merged.tolist() == [[math.inf, 1, 1], [math.inf, 1, 1]]


def test_nan_spreads_to_its_element(backend: str) -> None:
    after, before = torch.ones(3, 4), torch.ones(3, 4)
    after[1, 1] = math.nan
    before[2, 3] = math.nan
    hpa_ext.merge_(after, before, torch.zeros(4, dtype=torch.bool), 0.5, backend=backend)
    assert after.isnan().nonzero().tolist() == [[1, 1], [2, 3]]
    assert float(after[0, 0]) == 0.5


def test_bit_reproducible_for_any_number_of_threads(threads) -> None:
    before, mask = normal(600, 500, seed=1), uniform(500) < 0.1
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(hpa_ext.merge_(normal(600, 500), before, mask, 0.1))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_list_gives_the_bits_of_single_calls(isa: str, threads, backend: str) -> None:
    shapes = [(3, 5), (0, 4), (130, 1100), (2, 0), (700, 33), (1, 1), (64, 2048)]
    before = [normal(*shape, seed=i, dtype=FLOATS[i % 4]) for i, shape in enumerate(shapes)]
    before[2] = LAYOUTS["every_other_column"](before[2])
    masks = [uniform(cols, seed=i) < 0.3 for i, (_, cols) in enumerate(shapes)]
    factors = [0.0, 0.5, 1e-3, 0.1, -2.0, 1.0, 0.37]

    def weights() -> list[Tensor]:
        after = [normal(*old.shape, seed=i + 50, dtype=old.dtype) for i, old in enumerate(before)]
        after[4] = LAYOUTS["columns_first"](after[4])
        return after

    alone = weights()
    for layer in zip(alone, before, masks, factors, strict=True):
        hpa_ext.merge_(*layer, backend=backend)
    for count in (1, 2):
        threads(count)
        together = weights()
        versions = [after._version for after in together]
        assert hpa_ext.merge_(together, before, masks, factors, backend=backend) is together
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
        assert all(after._version > version for after, version in zip(together, versions, strict=True))
    assert hpa_ext.merge_([], [], [], backend=backend) == []


def test_one_projection_serves_a_list() -> None:
    after, before, mask = [torch.ones(2, 2), torch.ones(1, 3)], [torch.ones(2, 2), torch.ones(1, 3)], [2, 3]
    hpa_ext.merge_(after, before, [torch.zeros(n, dtype=torch.bool) for n in mask], 0.25)
    assert all((weight == 0.75).all() for weight in after)


def test_lists_that_do_not_fit_are_named() -> None:
    layers = [torch.zeros(2, 3), torch.zeros(4, 3)]
    masks = [torch.zeros(3, dtype=torch.bool)] * 2
    before = [torch.zeros(2, 3), torch.zeros(4, 3)]
    with pytest.raises(ValueError, match="^before: expected a list of 2 tensors like after, got a list of 1"):
        hpa_ext.merge_(layers, before[:1], masks)
    with pytest.raises(ValueError, match="^projection: expected a list of 2 numbers, one a layer, got a list of 3"):
        hpa_ext.merge_(layers, before, masks, [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"^mask\[1\]: expected 3 entries, one a column, got 2"):
        hpa_ext.merge_(layers, before, [masks[0], masks[1][:2]])
    with pytest.raises(ValueError, match=r"^after\[0\]: shares memory with before\[1\]"):
        hpa_ext.merge_([layers[0], torch.zeros(2, 3)], [before[0], layers[0]], masks)


@pytest.mark.parametrize(
    ("after", "before", "mask", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(3) > 0, ValueError, "^before: expected the shape of after"),
        (torch.zeros(2, 3), torch.zeros(2, 3).bfloat16(), torch.zeros(3) > 0, TypeError, "^before: expected the dtype"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2) > 0, ValueError, "^mask: expected 3 entries, .* got 2"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), TypeError, "^mask: expected dtype bool, got float32"),
        (
            torch.zeros(3),
            torch.zeros(3),
            torch.zeros(3) > 0,
            ValueError,
            r"^after: expected 2 dimensions \[rows, cols\]",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    after: Tensor, before: Tensor, mask: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hpa_ext.merge_(after, before, mask)


def test_projection_must_be_finite() -> None:
    with pytest.raises(ValueError, match="^projection: expected a finite number, got inf"):
        hpa_ext.merge_(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1) > 0, math.inf)

"""gram += scale * x^T x on the lower triangle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import LAYOUTS, NARROW, ROUNDOFF, SIZES, assert_within, f64, normal
from torch import Tensor

import hpa_ext


def bound(gram: Tensor, x: Tensor, scale: float) -> np.ndarray:
    """Products, sums over 256 tokens, over two of those and over the rest, the scale: each a relative rounding of what
    is summed in absolute value."""
    rows = np.abs(f64(x)).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    terms = min(len(rows), 256) + 2 + math.ceil(len(rows) / 512) + 3
    return ROUNDOFF[gram.dtype] * terms * (abs(scale) * rows.T @ rows + np.abs(f64(gram)))


def check(gram: Tensor, x: Tensor, scale: float) -> None:
    expected = gram.clone()
    hpa_ext.accumulate_gram_(expected, x, scale, backend="reference")
    limit = bound(gram, x, scale)
    above = gram.triu(1).clone()
    assert hpa_ext.accumulate_gram_(gram, x, scale, backend="cpu") is gram
    assert_within(gram, expected, limit)
    assert torch.equal(gram.triu(1), above)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("tokens", "cols"), [(3, 1), (1, 47), (40, 49), (257, 96), (600, 130), (30, 300)])
def test_every_instruction_set_agrees_with_the_reference(isa: str, tokens: int, cols: int, dtype: torch.dtype) -> None:
    check(normal(cols, cols, seed=1), normal(tokens, cols, dtype=dtype), 2.0)


FEW = 64  # kFewTokens of csrc/cpu/accumulate_gram.cpp


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 31, FEW - 1, FEW, FEW + 1])
def test_few_tokens_agree_with_float64(isa: str, tokens: int, wide: bool) -> None:
    # Sizes around a strip, a panel, a band of rows and a run of columns, in every instruction set.
    for cols in (1, 5, 23, 24, 25, 49, 95, 96, 97, 203, 1030):
        for dtype in (torch.float64,) if wide else NARROW:
            gram = normal(cols, cols, seed=cols, dtype=torch.float64 if wide else torch.float32)
            step = 1 + cols % 2
            x = normal(tokens, step * cols, seed=tokens, dtype=dtype)[:, ::step]
            padded = torch.full((cols, cols + 3), math.nan, dtype=gram.dtype)  # rows with a stride of their own
            padded[:, :cols] = gram
            hpa_ext.accumulate_gram_(padded[:, :cols], x, 1.5, backend="cpu")
            expected = f64(gram) + np.tril(1.5 * f64(x).T @ f64(x))
            assert_within(padded[:, :cols], torch.from_numpy(expected), bound(gram, x, 1.5))
            assert torch.equal(padded[:, :cols].triu(1), gram.triu(1))
            assert padded[:, cols:].isnan().all()


@given(
    tokens=st.sampled_from((*SIZES, 300)),
    cols=st.sampled_from(SIZES),
    dtype=st.sampled_from(NARROW),
    wide=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    gram_layout=st.sampled_from(sorted(LAYOUTS)),
    scale=st.sampled_from((2.0, 1.0, -0.5, 0.0, 1e-3)),
    seed=st.integers(0, 99),
)
def test_any_shape_dtype_and_layout_agrees_with_the_reference(
    tokens: int, cols: int, dtype: torch.dtype, wide: bool, layout: str, gram_layout: str, scale: float, seed: int
) -> None:
    gram = normal(cols, cols, seed=seed + 1, dtype=torch.float64 if wide else torch.float32)
    x = LAYOUTS[layout](normal(tokens, cols, seed=seed, dtype=dtype))
    check(LAYOUTS[gram_layout](gram), x, scale)


def test_float64_activations_accumulate_in_float64() -> None:
    check(normal(50, 50, dtype=torch.float64), normal(70, 50, seed=2, dtype=torch.float64), 2.0)


def test_leading_dimensions_are_tokens_whatever_their_strides() -> None:
    batch = normal(4, 9, 20)
    views = [batch, batch[:, 1:], batch.transpose(0, 1), batch[::2, ::3], batch[0, 0]]
    for view in views:
        gram, flat = torch.zeros(20, 20), torch.zeros(20, 20)
        hpa_ext.accumulate_gram_(gram, view)
        hpa_ext.accumulate_gram_(flat, view.reshape(-1, 20))
        assert_within(gram, flat, 2 * bound(torch.zeros(20, 20), view, 2.0))


def test_calls_add_up_to_one_call_on_all_tokens() -> None:
    x = normal(500, 33)
    once = hpa_ext.accumulate_gram_(torch.zeros(33, 33), x)
    parts = torch.zeros(33, 33)
    for part in x.split(123):
        hpa_ext.accumulate_gram_(parts, part)
    assert_within(parts, once, 2 * bound(torch.zeros(33, 33), x, 2.0))


def test_error_does_not_grow_with_the_number_of_tokens() -> None:
    # Constant activations round the same way each time: summed one by one they would be off by 1e-3.
    x = torch.full((200_000, 2), 0.1)
    gram = hpa_ext.accumulate_gram_(torch.zeros(2, 2), x, 1.0)
    exact = 200_000 * float(x[0, 0]) ** 2
    assert abs(float(gram[1, 0]) - exact) < (256 + 2 + 391) * 2.0**-24 * exact


@pytest.mark.parametrize(("tokens", "cols"), [(700, 390), (1, 1500), (9, 1500), (FEW, 1500)])
def test_bit_reproducible_for_any_number_of_threads(threads, tokens: int, cols: int) -> None:
    x = normal(tokens, cols, dtype=torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(hpa_ext.accumulate_gram_(torch.zeros(cols, cols), x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_nan_spreads_to_the_row_and_column_it_belongs_to(backend: str) -> None:
    x = normal(5, 60)
    x[2, 50] = math.nan
    gram = hpa_ext.accumulate_gram_(torch.zeros(60, 60), x, backend=backend)
    expected = torch.zeros(60, 60, dtype=torch.bool)
    expected[50, :51] = True
    expected[50:, 50] = True
    assert torch.equal(gram.isnan(), expected)


def test_infinite_activation_gives_an_infinite_diagonal() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = math.inf
    gram = hpa_ext.accumulate_gram_(torch.zeros(4, 4), x)
    assert gram[2, 2] == math.inf
    assert gram[1, 1] == 6


@pytest.mark.parametrize(
    ("gram", "x", "error", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 4), ValueError, r"^gram: expected a square matrix \[cols, cols\], got \(3"),
        (torch.zeros(3), torch.zeros(2, 3), ValueError, r"^gram: expected 2 dimensions \[cols, cols\], got \(3,\)"),
        (torch.zeros(3, 3), torch.zeros(2, 4), ValueError, r"^x: expected 3 columns like gram, got \(2, 4\)"),
        (torch.zeros(3, 3), torch.tensor(1.0), ValueError, r"^x: expected at least 1 dimension"),
        (
            torch.zeros(3, 3).half(),
            torch.zeros(2, 3),
            TypeError,
            r"^gram: expected dtype float32, float64, got float16",
        ),
        (torch.zeros(3, 3), torch.zeros(2, 3).double(), TypeError, r"^x: expected float32, bfloat16 or float16"),
        (torch.zeros(3, 3), torch.zeros(2, 3).int(), TypeError, r"^x: expected dtype .*, got int32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(gram: Tensor, x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hpa_ext.accumulate_gram_(gram, x)


def test_scale_must_be_a_finite_number() -> None:
    with pytest.raises(ValueError, match=r"^scale: expected a finite number, got nan"):
        hpa_ext.accumulate_gram_(torch.zeros(2, 2), torch.zeros(1, 2), math.nan)
    with pytest.raises(TypeError, match=r"^scale: expected a number, got str"):
        hpa_ext.accumulate_gram_(torch.zeros(2, 2), torch.zeros(1, 2), "2")

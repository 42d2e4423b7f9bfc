"""Every Triton kernel against the reference, in the interpreter or on a GPU.

``tests/test_triton.py`` runs this file in a process of its own: Triton decides when it is imported whether kernels are
interpreted.  Where there is a GPU the same tests run on it.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from kernel_cases import FLOATS, LAYOUTS, ROUNDOFF, assert_within, bits, f64, normal, rounded, uniform
from torch import Tensor

import hpa_ext
from hpa_ext import backend

# The interpreter computes with numpy, which warns of what GPUs do in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True, scope="module")
def round_to_bfloat16_like_a_machine() -> None:
    """Triton's interpreter cuts float32 off to bfloat16 and multiplies bfloat16 in ``dot`` as integers; machines round
    to nearest even and multiply numbers."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding_mode)
        floats = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
        return floats.bfloat16().view(torch.uint16).numpy()

    def create_dot(self, a, b, d, *options):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *options)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert_float, create_dot


def here(tensor: Tensor) -> Tensor:
    """The same values, strides included, where the kernels run."""
    if DEVICE.type == "cpu":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


def test_the_backend_is_the_one_under_test() -> None:
    assert backend.select("triton", DEVICE).merge_.__module__ == "hpa_ext.triton.merge"


# merge_


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("projection", [0.0, 0.37])
@pytest.mark.parametrize(
    ("rows", "cols", "layouts"),
    [
        (0, 5, ("contiguous", "contiguous")),
        (1, 1, ("contiguous", "contiguous")),
        (9, 67, ("padded_rows", "columns_first")),
        (5, 1025, ("every_other_column", "contiguous")),
        (130, 48, ("contiguous", "padded_rows")),
    ],
)
def test_merge(dtype: torch.dtype, projection: float, rows: int, cols: int, layouts: tuple[str, str]) -> None:
    after = here(LAYOUTS[layouts[0]](normal(rows, cols, dtype=dtype)))
    before = here(LAYOUTS[layouts[1]](normal(rows, cols, seed=1, dtype=dtype)))
    mask = here(uniform(2 * cols) < 0.3)[::2]
    if rows > 5:
        after[2, 0], before[3, cols - 1] = math.nan, math.inf
    original, expected = after.clone(), after.clone()
    hpa_ext.merge_(expected, before, mask, projection, backend="reference")
    version = after._version
    assert hpa_ext.merge_(after, before, mask, projection, backend="triton") is after
    assert after._version == version + (after.numel() > 0)
    np.testing.assert_array_equal(bits(after[:, mask].cpu()), bits(before[:, mask].cpu()))
    if projection == 0:
        np.testing.assert_array_equal(bits(after[:, ~mask].cpu()), bits(original[:, ~mask].cpu()))
    limit = ROUNDOFF[dtype] * (2 * np.abs(projection * f64(before.cpu())) + np.abs(f64(expected.cpu())))
    assert_within(after.cpu(), expected.cpu(), limit + 2 * rounded(f64(expected.cpu()), dtype))


def test_merge_keeps_every_16_bit_pattern() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(8, -1)
    before, after = here(patterns.view(torch.bfloat16)), here(patterns.flip(1).contiguous().view(torch.bfloat16))
    mask = here(torch.arange(2**13) % 3 == 0)
    merged = hpa_ext.merge_(after.clone(), before, mask, 0.5, backend="triton").cpu()
    np.testing.assert_array_equal(bits(merged[:, mask.cpu()]), bits(before.cpu()[:, mask.cpu()]))


# change_statistics


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "cols", "layouts"),
    [
        (0, 4, ("contiguous", "contiguous")),
        (3, 0, ("contiguous", "contiguous")),
        (1, 1, ("contiguous", "contiguous")),
        (131, 259, ("padded_rows", "columns_first")),
        (300, 17, ("contiguous", "every_other_column")),
    ],
)
def test_change_statistics(dtype: torch.dtype, rows: int, cols: int, layouts: tuple[str, str]) -> None:
    before = here(LAYOUTS[layouts[0]](normal(rows, cols, dtype=dtype)))
    after = here(LAYOUTS[layouts[1]](normal(rows, cols, seed=1, dtype=dtype)))
    actual = hpa_ext.change_statistics(before, after, backend="triton")
    again = hpa_ext.change_statistics(before, after, backend="triton")
    expected = hpa_ext.change_statistics(before, after, backend="reference")
    u = ROUNDOFF[dtype]
    # A difference, a square, at most 16 terms in float32, then float64; and the rounding of the result.
    column = f64(expected.column_change.cpu())
    assert_within(actual.column_change.cpu(), expected.column_change.cpu(), (3 + 16) * u * column + 2.0**-23 * column)
    sums = np.abs(f64((after.double() - before.double()).cpu()) * f64(before.cpu())).sum()
    assert_within(actual.dot.cpu(), expected.dot.cpu(), 19 * u * sums + 1e-13 * sums)
    for name in ("before_norm_sq", "change_norm_sq"):
        size = float(getattr(expected, name))
        assert_within(getattr(actual, name).cpu(), getattr(expected, name).cpu(), 19 * u * size + 1e-13 * size)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    assert [t.dtype for t in actual] == [t.dtype for t in expected]


def test_change_statistics_keeps_nan_in_its_column() -> None:
    before, after = normal(20, 300), normal(20, 300, seed=1)
    after[3, 270] = math.nan
    actual = hpa_ext.change_statistics(here(before), here(after), backend="triton")
    assert actual.column_change.isnan().nonzero().tolist() == [[270]]
    assert actual.dot.isnan()
    assert actual.before_norm_sq.isfinite()


# accumulate_importance: single tensors and whole lists


@pytest.mark.parametrize("kind", ["fisher", "taylor"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float64, torch.float64, torch.float32),
    ],
)
def test_accumulate_importance(dtypes: tuple[torch.dtype, ...], kind: str) -> None:
    shapes = [(), (1,), (0, 3), (7, 13), (3, 1000, 2), (9001,), (5, 4, 3, 2), (33, 130), (12, 30)]
    layouts = ["contiguous"] * 6 + ["columns_first", "padded_rows", "every_other_column"]

    def made(which: int) -> list[Tensor]:
        return [
            here(LAYOUTS[layout if t.dim() > 1 and which != 1 else "contiguous"](t))
            for t, layout in (
                (normal(*s, seed=which, dtype=dtypes[which]), lay) for s, lay in zip(shapes, layouts, strict=True)
            )
        ]

    importance, grads = [t.abs() for t in made(0)], made(1)
    weights = made(2) if kind == "taylor" else None
    grads[5][7] = math.nan
    expected = [t.clone() for t in importance]
    hpa_ext.accumulate_importance_(expected, grads, weights, kind, backend="reference")
    versions = [t._version for t in importance]
    assert hpa_ext.accumulate_importance_(importance, grads, weights, kind, backend="triton") is importance
    assert all(t._version > v for t, v in zip(importance, versions, strict=True))
    used = dtypes if kind == "taylor" else dtypes[:2]
    u = 2.0**-53 if torch.float64 in used else 2.0**-24
    for actual, wanted in zip(importance, expected, strict=True):
        size = np.abs(f64(wanted.cpu()))
        assert_within(actual.cpu(), wanted.cpu(), 3 * u * size + 2.0**-149 + 2 * rounded(size, actual.dtype))


def test_a_list_of_one_dtype_and_layout_is_one_launch_and_its_table_stays() -> None:
    from hpa_ext.triton import tables

    operands = [[here(torch.zeros(n)) for n in (5, 9000, 0, 300)], [here(torch.zeros(n)) for n in (5, 9000, 0, 300)]]
    (table,) = tables.table_of(operands, 0, 4096)
    assert (table.chunks, table.unit) == (1 + 3 + 1, True)
    assert table.piece_of.tolist() == [0, 1, 1, 1, 2]
    assert tables.table_of(operands, 0, 4096)[0] is table


@pytest.mark.parametrize(
    ("shape", "strides", "merged"),
    [
        ((4, 5), [(5, 1), (5, 1)], [(1, (0, 0)), (20, (1, 1))]),
        ((4, 5), [(1, 4), (1, 4)], [(1, (0, 0)), (20, (1, 1))]),
        ((4, 5), [(5, 1), (1, 4)], [(4, (5, 1)), (5, (1, 4))]),
        ((4, 1, 5), [(7, 9, 1), (5, 5, 1)], [(4, (7, 5)), (5, (1, 1))]),
        ((2, 3, 4), [(24, 8, 2), (12, 4, 1)], [(1, (0, 0)), (24, (2, 1))]),
        ((), [(), ()], [(1, (0, 0)), (1, (1, 1))]),
    ],
)
def test_dimensions_that_are_one_walk_through_memory_are_joined(shape, strides, merged) -> None:
    from hpa_ext.triton import tables

    assert tables._merge_dimensions(shape, strides) == merged

"""Every Triton kernel against the reference, in the interpreter or on a GPU.

``tests/test_triton.py`` runs this file in a process of its own: Triton decides when it is imported whether kernels are
interpreted.  Where there is a GPU the same tests run on it.
"""

from __future__ import annotations

import importlib
import math
import os

import numpy as np
import pytest
import torch
from kernel_cases import (
    FLOATS,
    LAYOUTS,
    NARROW,
    ROUNDOFF,
    assert_within,
    bits,
    f64,
    normal,
    orthonormal_rows,
    rounded,
    uniform,
)
from torch import Tensor

import hpa_ext
from hpa_ext import backend

# The interpreter computes with numpy, which warns of what GPUs do in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True, scope="module")
def round_to_bfloat16_like_a_machine() -> None:
    """Triton's interpreter cuts float32 off to bfloat16, takes float64 for an integer on the way there, and multiplies
    bfloat16 in ``dot`` as integers; machines round to nearest even and multiply numbers."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    convert, cast, dot = interpreter._convert_float, builder.cast_impl, builder.create_dot

    def convert_float(data, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding_mode)
        floats = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
        return floats.bfloat16().view(torch.uint16).numpy()

    def cast_impl(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float64, tl.bfloat16):
            return cast(self, source, target)
        doubles = torch.from_numpy(np.ascontiguousarray(source.data))
        return interpreter.TensorHandle(doubles.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    def create_dot(self, a, b, d, *options):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *options)

    interpreter._convert_float, builder.cast_impl, builder.create_dot = convert_float, cast_impl, create_dot


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


# accumulate_gram: the lower triangle of x^T x


@pytest.mark.parametrize(
    ("tokens", "cols", "dtype", "gram_dtype", "layout"),
    [
        (0, 5, torch.float32, torch.float32, "contiguous"),
        (1, 1, torch.float32, torch.float32, "contiguous"),
        (70, 131, torch.float32, torch.float32, "padded_rows"),
        (70, 131, torch.bfloat16, torch.float32, "columns_first"),
        (70, 131, torch.float16, torch.float32, "every_other_column"),
        (2100, 20, torch.bfloat16, torch.float32, "contiguous"),
        (33, 1040, torch.bfloat16, torch.float64, "contiguous"),
        (33, 20, torch.float64, torch.float64, "padded_rows"),
    ],
)
def test_accumulate_gram(tokens: int, cols: int, dtype: torch.dtype, gram_dtype: torch.dtype, layout: str) -> None:
    x = here(LAYOUTS[layout](normal(tokens, cols, dtype=dtype)))
    gram = here(LAYOUTS[layout](normal(cols, cols, seed=1, dtype=gram_dtype)))
    start, expected = gram.clone(), gram.clone()
    hpa_ext.accumulate_gram_(expected, x, 0.3, backend="reference")
    again = hpa_ext.accumulate_gram_(gram.clone(), x, 0.3, backend="triton")
    assert hpa_ext.accumulate_gram_(gram, x, 0.3, backend="triton") is gram
    assert torch.equal(gram, again)
    assert torch.equal(gram.triu(1), start.triu(1))
    sizes = 0.3 * np.abs(f64(x.cpu())).T @ np.abs(f64(x.cpu()))
    terms = min(tokens, 2048) + 8
    limit = ROUNDOFF[gram_dtype] * (terms * sizes + 2 * np.abs(f64(expected.cpu())))
    assert_within(gram.cpu(), expected.cpu(), limit)


def test_accumulate_gram_in_the_tiles_of_many_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpa_ext.triton import accumulate_gram

    large = accumulate_gram._tile(torch.bfloat16, 1025)
    assert large[0] == 128
    monkeypatch.setattr(accumulate_gram, "_tile", lambda dtype, cols: large)
    x = here(normal(9, 130, dtype=torch.bfloat16))
    gram, expected = here(torch.zeros(130, 130)), here(torch.zeros(130, 130))
    hpa_ext.accumulate_gram_(gram, x, backend="triton")
    hpa_ext.accumulate_gram_(expected, x, backend="reference")
    sizes = 2 * np.abs(f64(x.cpu())).T @ np.abs(f64(x.cpu()))
    assert_within(gram.cpu(), expected.cpu(), 2.0**-24 * 12 * sizes)


def test_accumulate_gram_keeps_nan_in_its_row_and_column() -> None:
    x = normal(5, 70)
    x[2, 66] = math.nan
    gram = hpa_ext.accumulate_gram_(here(torch.zeros(70, 70)), here(x), backend="triton").cpu()
    expected = torch.zeros(70, 70, dtype=torch.bool)
    expected[66, :67] = True
    expected[66:, 66] = True
    assert torch.equal(gram.isnan(), expected)


# project: one vector, many, and lists that are one long vector


def project_bound(grads: np.ndarray, basis: np.ndarray, u: float) -> np.ndarray:
    rows = np.abs(basis)
    size = np.abs(grads) @ rows.T
    terms = min(basis.shape[1], 2048) + 4
    return u * (terms * size @ rows + (len(basis) + 3) * (np.abs(grads) + size @ rows))


@pytest.mark.parametrize(
    ("vectors", "n", "rank"), [(0, 4, 1), (2, 9, 0), (1, 1, 1), (1, 2600, 11), (3, 300, 4), (17, 97, 8), (65, 70, 33)]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_project(dtype: torch.dtype, vectors: int, n: int, rank: int) -> None:
    if vectors > 17 and dtype != torch.float32:
        pytest.skip("the interpreter takes seconds, and dtypes are held by the smaller sizes")
    layout = "padded_rows" if vectors == 17 else "contiguous"
    grads = here(LAYOUTS[layout](normal(vectors, n, dtype=dtype)))
    basis = here(LAYOUTS[layout](orthonormal_rows(rank, n, seed=1, dtype=dtype)))
    expected, again = grads.clone(), grads.clone()
    before = f64(grads.cpu())
    hpa_ext.project_(expected, basis, backend="reference")
    hpa_ext.project_(again, basis, backend="triton")
    version = grads._version
    assert hpa_ext.project_(grads, basis, backend="triton") is grads
    assert grads._version == version + (vectors * rank > 0)
    assert torch.equal(grads, again)
    limit = project_bound(before, f64(basis.cpu()), ROUNDOFF[dtype])
    limit = limit + 2 * rounded(f64(expected.cpu()), dtype) + 2 * rounded(limit, dtype)
    assert_within(grads.cpu(), expected.cpu(), limit)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.float64)]
)
@pytest.mark.parametrize("vectors", [2, 20])
def test_project_takes_a_basis_of_another_dtype_and_layout_and_repeats(dtypes, vectors: int) -> None:
    grads = here(LAYOUTS["every_other_column"](normal(vectors, 70, dtype=dtypes[0])))
    basis = here(LAYOUTS["columns_first"](orthonormal_rows(9, 70, seed=1, dtype=dtypes[1])))
    expected = grads.clone()
    hpa_ext.project_(expected, basis, passes=2, backend="reference")
    hpa_ext.project_(grads, basis, passes=2, backend="triton")
    torch.testing.assert_close(grads, expected, rtol=0, atol=2 * 2.0**-8 if dtypes[0] == torch.bfloat16 else 2e-6)


def test_project_takes_a_list_as_one_long_vector() -> None:
    shapes = [(3, 5), (7,), (0,), (2, 3, 4), (2100,), (6, 8), ()]
    sizes = [math.prod(shape) for shape in shapes]
    whole, basis = normal(sum(sizes)), orthonormal_rows(5, sum(sizes), seed=1)
    grads = [here(part.clone().view(shape)) for part, shape in zip(whole.split(sizes), shapes, strict=True)]
    slices = [here(rows.reshape(5, *shape).clone()) for rows, shape in zip(basis.split(sizes, 1), shapes, strict=True)]
    grads[0], slices[1] = here(LAYOUTS["columns_first"](grads[0].cpu())), slices[1].to(torch.float64)
    grads[5] = here(LAYOUTS["padded_rows"](grads[5].cpu()))
    hpa_ext.project_(grads, slices, backend="triton")
    expected = f64(whole) - f64(basis).T @ (f64(basis) @ f64(whole))
    actual = torch.cat([grad.reshape(-1) for grad in grads]).cpu()
    assert_within(actual, expected, project_bound(f64(whole)[None], f64(basis), 2.0**-24)[0] + 2.0**-24)


@pytest.mark.parametrize(("vectors", "rank"), [(3, 2), (20, 10)])
def test_project_spreads_nan_to_its_whole_vector(vectors: int, rank: int) -> None:
    grads = normal(vectors, 50)
    grads[1, 7] = math.nan
    grads = hpa_ext.project_(here(grads), here(orthonormal_rows(rank, 50)), backend="triton").cpu()
    assert grads[1].isnan().all()
    assert grads[[i for i in range(vectors) if i != 1]].isfinite().all()


# orthonormalize


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "n", "known"), [(1, 1, 0), (10, 70, 3), (2, 4200, 0)])
def test_orthonormalize(dtype: torch.dtype, rows: int, n: int, known: int) -> None:
    if n == 4200 and dtype not in (torch.float32, torch.float16):
        pytest.skip("the interpreter takes seconds, and dtypes are held by the smaller sizes")
    vectors = normal(rows, n, dtype=dtype)
    basis = here(orthonormal_rows(known, n, seed=5, dtype=dtype)) if known else None
    if rows == 10:
        vectors[4] = vectors[1]  # dependent: dropped
        vectors[7] = 0
    vectors = here(LAYOUTS["padded_rows"](vectors))
    expected = vectors.clone()
    wanted = hpa_ext.orthonormalize_(expected, basis, backend="reference")
    kept = hpa_ext.orthonormalize_(vectors, basis, backend="triton")
    assert kept == wanted == (8 if rows == 10 else rows)
    assert not vectors[kept:].any()
    # Storage rounds each entry of a unit row: n entries of about n^-1/2, so one roundoff a row, and a few of sums.
    storage = rounded(np.ones(1), dtype)[0]
    unit = max(4 * storage, 4 * ROUNDOFF[dtype])
    q = f64(vectors[:kept].cpu()).astype(np.longdouble)  # products here round to nothing that counts
    products = q @ q.T
    # A square length takes an entry's storage twice; and in float64 scaling, root and reciprocal twice (6), and the
    # product and up to 13 additions on the way of a square into the sum.
    assert np.abs(products.diagonal() - 1).max() <= 2 * storage * (1 + storage) + 20 * 2.0**-53
    assert np.abs(products - np.diag(products.diagonal())).max() <= unit
    if basis is not None:
        assert np.abs(q @ f64(basis.cpu()).T).max() <= unit
    torch.testing.assert_close(vectors, expected, rtol=0, atol=8 * unit)


def test_orthonormalize_holds_where_gram_schmidt_without_repetition_fails() -> None:
    # Condition 1e6: rows are one direction plus a millionth of others.
    base = normal(1, 500, dtype=torch.float64)
    vectors = here((base + 1e-6 * normal(12, 500, seed=1, dtype=torch.float64)).float())
    kept = hpa_ext.orthonormalize_(vectors, rtol=1e-8, backend="triton")
    q = f64(vectors[:kept].cpu())
    assert kept == 12
    assert np.abs(q @ q.T - np.eye(kept)).max() < 1e-6


def test_orthonormalize_names_a_row_with_nan_and_changes_nothing() -> None:
    vectors = normal(4, 9)
    vectors[2, 3] = math.inf
    before, vectors = vectors.clone(), here(vectors)
    with pytest.raises(ValueError, match="^vectors: row 2 contains NaN or Inf"):
        hpa_ext.orthonormalize_(vectors, backend="triton")
    assert torch.equal(vectors.cpu(), before)


# inverse_diagonal


@pytest.mark.parametrize("mode", ["exact", "pivot"])
@pytest.mark.parametrize(("cols", "dtype"), [(1, torch.float32), (65, torch.float32), (130, torch.float64)])
def test_inverse_diagonal(cols: int, dtype: torch.dtype, mode: str) -> None:
    rows = normal(cols + 20, cols, dtype=torch.float64)
    lower = torch.ones(cols, cols, dtype=torch.bool).tril()
    gram = here(LAYOUTS["padded_rows"](torch.where(lower, 2 * rows.T @ rows, math.nan).to(dtype)))
    numbers: dict[str, object] = {}
    expected = hpa_ext.inverse_diagonal(gram, mode=mode, backend="reference")
    actual = hpa_ext.inverse_diagonal(gram, mode=mode, info=numbers, backend="triton")
    assert actual.dtype == expected.dtype == dtype
    assert numbers["route"] == "dense"
    # Factored in float64 up to 1024 columns; cond(H) is below 1e4 here.
    torch.testing.assert_close(actual, expected, rtol=1e-11 if dtype == torch.float64 else 2.0**-23, atol=0)


def test_inverse_diagonal_of_a_large_float32_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    inverse_diagonal = importlib.import_module("hpa_ext.triton.inverse_diagonal")
    monkeypatch.setattr(inverse_diagonal, "SMALL", 100)
    monkeypatch.setattr(inverse_diagonal, "PANEL", 64)
    rows = normal(230, 201)
    gram = here(2 * rows.T @ rows)
    expected = hpa_ext.inverse_diagonal(gram.double(), backend="reference")
    actual = hpa_ext.inverse_diagonal(gram, backend="triton")
    # cond(H) is about 200 with this damping: 4 u cond(H).
    torch.testing.assert_close(actual.double(), expected, rtol=4 * 2.0**-24 * 400, atol=0)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("tokens", "route"), [(30, "low_rank"), (90, "dense")])
def test_inverse_diagonal_of_activations(dtype: torch.dtype, tokens: int, route: str) -> None:
    x = here(normal(tokens, 70, dtype=dtype))
    numbers: dict[str, object] = {}
    expected = hpa_ext.inverse_diagonal(activations=x, backend="reference")
    actual = hpa_ext.inverse_diagonal(activations=x, info=numbers, backend="triton")
    assert numbers["route"] == route
    torch.testing.assert_close(actual, expected, rtol=2.0**-22, atol=0)


def test_inverse_diagonal_refuses_what_the_reference_refuses() -> None:
    for place in ((2, 2), (4, 1)):
        gram = torch.eye(6)
        gram[place] = math.nan
        with pytest.raises(ValueError, match="^gram: contains NaN or Inf"):
            hpa_ext.inverse_diagonal(here(gram), backend="triton")
    x = normal(3, 6)
    x[1, 2] = math.inf
    with pytest.raises(ValueError, match="^activations: contains NaN or Inf"):
        hpa_ext.inverse_diagonal(activations=here(x), backend="triton")
    with pytest.raises(ValueError, match="^gram: expected a positive mean diagonal, got 0"):
        hpa_ext.inverse_diagonal(here(torch.zeros(3, 3)), backend="triton")
    with pytest.raises(ValueError, match="^activations: expected a positive mean diagonal, got 0"):
        hpa_ext.inverse_diagonal(activations=here(torch.zeros(0, 6)), backend="triton")
    slight = here(torch.tensor([[1.0, 0.0], [1.05, 1.0]]))
    with pytest.warns(hpa_ext.DampingWarning, match="^gram: not positive definite with damping 0.01; used 0.1 "):
        hpa_ext.inverse_diagonal(slight, backend="triton")


# balanced_mask


@pytest.mark.parametrize("mode", ["full", "eps", "phi"])
def test_balanced_mask_is_the_same_to_the_last_bit(mode: str) -> None:
    safety, task = here((uniform(300) * 8).round() / 8), here((uniform(300, seed=1) * 8).round() / 8)
    actual = hpa_ext.balanced_mask(safety, task, 20, 90, mode=mode, backend="triton")
    expected = hpa_ext.balanced_mask(safety, task, 20, 90, mode=mode, backend="reference")
    assert torch.equal(actual.mask, expected.mask)
    assert actual[1:] == expected[1:]
    assert actual.mask.device == safety.device

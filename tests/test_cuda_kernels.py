"""The CUDA kernels against the reference: on the host, the same .cu files compiled by g++ with the emulator of
tests/cuda_emulation, and where there is a GPU the installed module on it.  Sizes lie around warps, packs of 16 bytes,
blocks and groups."""

from __future__ import annotations

import ctypes
import math
import mmap
import shutil
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from kernel_cases import (
    FLOATS,
    LAYOUTS,
    ROUNDOFF,
    SEED,
    assert_within,
    bits,
    f64,
    normal,
    orthonormal_rows,
    rounded,
    uniform,
)
from torch import Tensor

from hpa_ext import backend, cuda, reference

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_emulation"))
import build


@pytest.fixture(scope="session")
def emulation() -> ModuleType:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    pytest.importorskip("pybind11")
    return build.module()


@pytest.fixture(autouse=True)
def module(device: torch.device, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module under test.  In the emulator threads and blocks run forward, backward or shuffled: one of the three a
    test, by its name."""
    if device.type == "cuda":
        if trouble := backend.cuda_trouble():
            pytest.skip(f"cuda cannot run here: {trouble}")
        return backend.cuda_extension()
    emulation = request.getfixturevalue("emulation")
    order = (0, 1, 7 + SEED)[(zlib.crc32(request.node.name.encode()) + SEED) % 3]
    ctypes.CDLL(emulation.__file__).hpa_emulation_set_order(order)
    monkeypatch.setattr(cuda, "cuda_extension", lambda: emulation)
    return emulation


GRAM_DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float64, torch.float64),
]
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float64),
    (torch.float64, torch.float64),
]
SHAPES = [(1, 1), (1, 37), (3, 5), (65, 264), (300, 70), (2, 1100)]


def aligned_rows(tensor: Tensor) -> Tensor:
    """The same values in rows that begin at multiples of 16 bytes and end between two."""
    pack = 16 // tensor.element_size()
    wide = torch.full((*tensor.shape[:-1], (tensor.shape[-1] // pack + 2) * pack), math.nan, dtype=tensor.dtype)
    return wide[..., : tensor.shape[-1]].copy_(tensor)


ROW_LAYOUTS = {**LAYOUTS, "aligned_rows": aligned_rows}
FAR = 2**31 + 8  # elements


def far_apart(tensor: Tensor, dim: int = 0) -> Tensor:
    """The same values, FAR from each other along a dimension: with three of them, no 32 bits hold an offset.

    On the CPU the memory in between is never touched, and so takes no room.
    """
    strides = [FAR if d == dim else stride for d, stride in enumerate(tensor.contiguous().stride())]
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    if tensor.device.type == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        memory = torch.frombuffer(mmap.mmap(-1, span * tensor.element_size(), flags=flags), dtype=tensor.dtype)
    else:
        try:
            memory = torch.empty(span, dtype=tensor.dtype, device=tensor.device)
        except torch.OutOfMemoryError:
            pytest.skip(f"needs {span * tensor.element_size() / 1e9:.0f} GB of device memory")
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", sorted(ROW_LAYOUTS))
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_change_statistics(rows: int, cols: int, layout: str, dtype: torch.dtype) -> None:
    before = ROW_LAYOUTS[layout](normal(rows, cols, dtype=dtype))
    after = (before.double() + normal(rows, cols, seed=1, dtype=torch.float64, scale=0.1)).to(dtype)
    after = aligned_rows(after) if layout == "aligned_rows" else after
    expected, expected_scalars = reference.change_statistics(before, after)
    actual, scalars = cuda.change_statistics(before, after)
    u = ROUNDOFF[dtype]
    assert_within(actual, expected, (16 + 6) * u * f64(expected))
    old, change = f64(before), f64(after) - f64(before)
    sizes = np.array([np.abs(change * old).sum(), np.square(old).sum(), np.square(change).sum()])
    assert_within(scalars, expected_scalars, (2.5 * u + before.numel() * 2.0**-53) * sizes)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_change_statistics_of_nothing(shape: tuple[int, int]) -> None:
    columns, scalars = cuda.change_statistics(torch.zeros(shape), torch.zeros(shape))
    assert columns.tolist() == [0.0] * shape[1]
    assert scalars.tolist() == [0, 0, 0]


def test_change_statistics_keep_the_digits_of_a_dot_product_that_cancels() -> None:
    before = torch.ones(2000, 64)
    after = before + torch.where(torch.arange(2000) % 2 == 0, 0.5, -0.5)[:, None]
    after[0, 0] += 2.0**-20
    assert cuda.change_statistics(before, after)[1][0].item() == 2.0**-20
    # Products of 25 bits: (1 + 2^-12)^2 - (1 + 2^-11).
    before = torch.tensor([[1 + 2.0**-12], [-1 - 2.0**-11]])
    after = before + torch.tensor([[1 + 2.0**-12], [1.0]])
    assert cuda.change_statistics(before, after)[1][0].item() == 2.0**-24


def test_change_statistics_add_up_columns_in_float64() -> None:
    # Large squares first: what follows them is below the last digit that a float32 sum has.
    after = torch.full((32768, 1), 2.0**-6)
    after.view(-1, 1024)[:, :128] = 64.0
    exact = (128 * 4096 + 896 * 2.0**-12) / 1024
    assert cuda.change_statistics(torch.zeros_like(after), after)[0].double().item() == pytest.approx(
        exact, rel=2.0**-24
    )


@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_of_weights_take_64_bits(dim: int) -> None:
    shape = (3, 70) if dim == 0 else (70, 3)
    before, after = normal(*shape, dtype=torch.bfloat16), normal(*shape, seed=1, dtype=torch.bfloat16)
    far_before, far_after = far_apart(before, dim), far_apart(after, dim)
    for far, near in zip(
        cuda.change_statistics(far_before, far_after), cuda.change_statistics(before, after), strict=True
    ):
        torch.testing.assert_close(far, near, rtol=1e-6, atol=0)
    mask = uniform(shape[1], seed=2) < 0.5
    cuda.merge_(after, before, mask, 0.25)
    cuda.merge_(far_after, far_before, mask, 0.25)
    assert torch.equal(far_after, after)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", sorted(ROW_LAYOUTS))
@pytest.mark.parametrize("projection", [0.0, 0.37])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_merge(rows: int, cols: int, projection: float, layout: str, dtype: torch.dtype) -> None:
    after = ROW_LAYOUTS[layout](normal(rows, cols, dtype=dtype))
    before = normal(rows, cols, seed=1, dtype=dtype)
    before = aligned_rows(before) if layout == "aligned_rows" else before
    mask = (uniform(2 * cols, seed=2) < 0.3)[::2]
    original, expected = after.clone(), after.clone()
    reference.merge_(expected, before, mask, projection)
    cuda.merge_(after, before, mask, projection)
    np.testing.assert_array_equal(bits(after[:, mask]), bits(before[:, mask]))
    if projection == 0:
        np.testing.assert_array_equal(bits(after[:, ~mask]), bits(original[:, ~mask]))
    arithmetic = ROUNDOFF[dtype] * (2 * np.abs(projection * f64(before)) + np.abs(f64(expected)))
    assert_within(after, expected, arithmetic + 2 * rounded(f64(expected), dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_copies_every_16_bit_pattern(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(2, -1)
    before, after = patterns.view(dtype), patterns.flip(1).contiguous().view(dtype)
    mask = torch.arange(2**15) % 3 == 0
    original = after.clone()
    cuda.merge_(after, before, mask, 0.0)
    np.testing.assert_array_equal(bits(after[:, mask]), bits(before[:, mask]))
    np.testing.assert_array_equal(bits(after[:, ~mask]), bits(original[:, ~mask]))


def importance_bound(actual: Tensor, wanted: Tensor, wide: bool) -> np.ndarray:
    u = 2.0**-53 if wide else 2.0**-24
    return 3 * u * np.abs(f64(wanted)) + 2.0**-149 + 2 * rounded(f64(wanted), actual.dtype)


@pytest.mark.parametrize("kind", ["fisher", "taylor"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("dtypes", PAIRS)
def test_accumulate_importance(dtypes: tuple[torch.dtype, torch.dtype], layout: str, kind: str) -> None:
    shapes = [(), (1,), (7, 13), (3, 5, 2, 4), (4096,), (2, 4100), (0, 3)]
    importance = [uniform(*shape, dtype=dtypes[0]) for shape in shapes]
    grads = [normal(*shape, seed=1, dtype=dtypes[1]) for shape in shapes]
    grads = [LAYOUTS[layout](g) if g.dim() >= 2 else g for g in grads]
    weights = [normal(*shape, seed=2) for shape in shapes] if kind == "taylor" else None
    expected = [t.clone() for t in importance]
    reference.accumulate_importance_(expected, grads, weights, kind)
    cuda.accumulate_importance_(importance, grads, weights, kind)
    for actual, wanted in zip(importance, expected, strict=True):
        assert_within(actual, wanted, importance_bound(actual, wanted, torch.float64 in dtypes))


def test_a_list_longer_than_a_table_takes_several_launches() -> None:
    grads = [normal(5, seed=i) for i in range(450)]
    importance = [torch.zeros(5) for _ in grads]
    cuda.accumulate_importance_(importance, grads, None, "fisher")
    assert all(torch.equal(total, grad.square()) for total, grad in zip(importance, grads, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shifted", range(3))
def test_long_vectors_may_begin_anywhere(shifted: int, dtype: torch.dtype) -> None:
    vectors = [uniform(4098, dtype=dtype), normal(4098, seed=1, dtype=dtype), normal(4098, seed=2, dtype=dtype)]
    importance, grad, weight = (
        vector[1:-1] if i == shifted else vector[:-2].clone() for i, vector in enumerate(vectors)
    )
    expected = importance.clone()
    reference.accumulate_importance_([expected], [grad], [weight], "taylor")
    cuda.accumulate_importance_([importance], [grad], [weight], "taylor")
    assert_within(importance, expected, importance_bound(importance, expected, dtype == torch.float64))


@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_of_importances_take_64_bits(dim: int) -> None:
    shape = (3, 70) if dim == 0 else (70, 3)
    importance, grad = uniform(*shape, dtype=torch.bfloat16), normal(*shape, seed=1, dtype=torch.bfloat16)
    far_importance, far_grad = far_apart(importance, dim), far_apart(grad, dim)
    cuda.accumulate_importance_([importance], [grad], None, "fisher")
    cuda.accumulate_importance_([far_importance], [far_grad], None, "fisher")
    assert torch.equal(far_importance, importance)


def test_permuted_dimensions_are_matched_by_index() -> None:
    grad = normal(4, 5, 6)
    importance = torch.zeros(6, 4, 5).permute(1, 2, 0)
    cuda.accumulate_importance_([importance], [grad], None, "fisher")
    assert torch.equal(importance, grad.square())


def test_nan_and_inf_spread_to_their_element() -> None:
    grad = torch.tensor([1.0, math.nan, math.inf, 2.0])
    total = torch.zeros(4)
    cuda.accumulate_importance_([total], [grad], None, "fisher")
    assert total[[0, 3]].tolist() == [1, 4]
    assert total[1].isnan()
    assert total[2] == math.inf


def gram_bound(gram: Tensor, x: Tensor, scale: float) -> np.ndarray:
    rows = np.abs(f64(x))
    terms = min(len(rows), 256) + math.ceil(len(rows) / 256) + 4
    return ROUNDOFF[gram.dtype] * terms * (abs(scale) * rows.T @ rows + np.abs(f64(gram)))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(("x_dtype", "gram_dtype"), GRAM_DTYPES)
@pytest.mark.parametrize(("tokens", "cols"), [(1, 1), (5, 40), (33, 136), (70, 65), (0, 3)])
def test_accumulate_gram(tokens: int, cols: int, x_dtype: torch.dtype, gram_dtype: torch.dtype, layout: str) -> None:
    x, gram = LAYOUTS[layout](normal(tokens, cols, dtype=x_dtype)), normal(cols, cols, seed=1, dtype=gram_dtype)
    expected, above = gram.clone(), gram.triu(1).clone()
    reference.accumulate_gram_(expected, x, 0.5)
    limit = gram_bound(gram, x, 0.5)
    cuda.accumulate_gram_(gram, x, 0.5)
    assert_within(gram, expected, limit)
    assert torch.equal(gram.triu(1), above)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_many_tokens_are_taken_in_blocks(dtype: torch.dtype) -> None:
    # The square ends in 2^-14, which a sum of thousands has no digit for: one by one, 5e-5 would be lost.
    x = torch.full((9000, 2), 1 + 2.0**-7).to(dtype)
    gram = torch.zeros(2, 2)
    cuda.accumulate_gram_(gram, x, 1.0)
    exact = 9000 * float(x[0, 0]) ** 2
    assert abs(float(gram[1, 0]) - exact) < (256 + 36) * 2.0**-24 * exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_of_a_gram_matrix_take_64_bits(dim: int, dtype: torch.dtype) -> None:
    x, gram = normal(3, 3, dtype=dtype), torch.zeros(3, 3)
    far_x, far_gram = far_apart(x, dim), far_apart(gram, dim)
    cuda.accumulate_gram_(gram, x, 0.5)
    cuda.accumulate_gram_(far_gram, far_x, 0.5)
    assert torch.equal(far_gram, gram)
    expected, damping, mode = cuda.inverse_diagonal(gram, None, 2.0, 0.01, "exact")
    actual, far_damping, far_mode = cuda.inverse_diagonal(far_gram, None, 2.0, 0.01, "exact")
    assert expected is not None
    assert actual is not None
    assert torch.equal(actual, expected)
    assert (far_damping, far_mode) == (damping, mode)


def gram_of(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Lower triangle of 2 x^T x; NaN above it, which nobody may read."""
    rows = x.double()
    lower = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return torch.where(lower, 2 * rows.T @ rows, math.nan).to(dtype)


@pytest.mark.parametrize("mode", ["exact", "pivot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cols", [1, 2, 31, 33, 70])
def test_inverse_diagonal(cols: int, dtype: torch.dtype, mode: str) -> None:
    gram = gram_of(normal(cols + 20, cols), dtype)
    expected, lam, _ = reference.inverse_diagonal(gram, None, 2.0, 0.01, mode)
    actual, actual_lam, route = cuda.inverse_diagonal(gram, None, 2.0, 0.01, mode)
    assert (actual.dtype, route) == (dtype, "dense")
    assert actual_lam == pytest.approx(lam, rel=1e-14)
    np.testing.assert_allclose(f64(actual), f64(expected), rtol=2.0**-23 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("mode", ["exact", "pivot"])
def test_inverse_diagonal_of_many_columns_is_eliminated_in_float32(mode: str) -> None:
    cols = 1089  # the last block on the diagonal has one column
    gram = gram_of(normal(1600, cols))
    expected = reference.inverse_diagonal(gram, None, 2.0, 0.01, mode)[0]
    actual, _, route = cuda.inverse_diagonal(gram, None, 2.0, 0.01, mode)
    assert (actual.dtype, route) == (torch.float32, "dense")
    # A backward error of some roundings, times a condition of (1 + s)^2 / ((1 - s)^2 + 0.01) with s^2 = cols / 1600.
    np.testing.assert_allclose(f64(actual), f64(expected), rtol=8 * 2.0**-24 * 85)
    assert not torch.equal(actual, expected)  # in float64 all digits are right


def test_blocks_on_the_diagonal_are_factored_in_float64() -> None:
    # Pairs of columns that are nearly the same: a float32 pivot would keep 7 digits of 24, and all inputs are exact.
    gram = torch.eye(1025)
    for j in (1, 62, 500):  # both of a pair lie in one block, counted from either end
        gram[j + 1, j] = 1 - 2.0**-18
    expected = reference.inverse_diagonal(gram, None, 2.0, 2.0**-20, "pivot")[0]
    actual = cuda.inverse_diagonal(gram, None, 2.0, 2.0**-20, "pivot")[0]
    assert actual is not None
    np.testing.assert_allclose(f64(actual), f64(expected), rtol=2.0**-21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tokens", "route"), [(10, "low_rank"), (60, "dense")])
def test_inverse_diagonal_of_activations(tokens: int, route: str, dtype: torch.dtype) -> None:
    x = normal(tokens, 40, dtype=dtype)
    expected, lam, _ = reference.inverse_diagonal(None, x, 2.0, 0.01, "exact")
    actual, actual_lam, actual_route = cuda.inverse_diagonal(None, x, 2.0, 0.01, "exact")
    assert actual_route == route
    assert actual_lam == pytest.approx(lam, rel=1e-13)
    np.testing.assert_allclose(f64(actual), f64(expected), rtol=1e-10 if dtype == torch.float64 else 2.0**-22)


def test_what_cannot_be_factored_is_told_apart() -> None:
    indefinite = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    assert cuda.inverse_diagonal(indefinite, None, 2.0, 0.01, "exact") == (None, pytest.approx(0.01), "dense")
    assert cuda.inverse_diagonal(torch.zeros(3, 3), None, 2.0, 0.01, "exact")[:2] == (None, 0.0)
    for place in ((2, 2), (4, 1)):
        for value in (math.nan, math.inf):
            gram = torch.eye(6)
            gram[place] = value
            with pytest.raises(ValueError, match="^gram: contains NaN or Inf"):
                cuda.inverse_diagonal(gram, None, 2.0, 0.01, "exact")
            gram[0, 0] = -1.0  # a pivot that fails before the others are looked at
            with pytest.raises(ValueError, match="^gram: contains NaN or Inf"):
                cuda.inverse_diagonal(gram, None, 2.0, 0.01, "exact")
    x = normal(3, 6)
    x[1, 2] = math.nan
    with pytest.raises(ValueError, match="^activations: contains NaN or Inf"):
        cuda.inverse_diagonal(None, x, 2.0, 0.01, "exact")


def projection_bound(grads: np.ndarray, basis: np.ndarray, u: float) -> np.ndarray:
    """Dot products sum at most 32 products a thread and 256 threads as a tree; then rank products are subtracted."""
    rows = np.abs(basis)
    size = np.abs(grads) @ rows.T
    terms = min(basis.shape[1], 32 + 13) + 4
    return u * (terms * size @ rows + (len(basis) + 3) * (np.abs(grads) + size @ rows))


@pytest.mark.parametrize("layout", ["contiguous", "padded_rows", "columns_first"])
@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize(("vectors", "n", "rank"), [(1, 1, 1), (1, 2500, 5), (2, 2049, 33), (9, 130, 17), (3, 40, 9)])
def test_project(vectors: int, n: int, rank: int, dtypes: tuple[torch.dtype, torch.dtype], layout: str) -> None:
    grads = LAYOUTS[layout](normal(vectors, n, dtype=dtypes[0]))
    basis = orthonormal_rows(rank, n, seed=1, dtype=dtypes[1])
    expected, before = grads.clone(), f64(grads)
    reference.project_([expected], [basis], 1)
    cuda.project_([grads], [basis], 1)
    limit = projection_bound(before, f64(basis), 2.0**-53 if torch.float64 in dtypes else 2.0**-24)
    assert_within(grads, expected, limit + 2 * (rounded(f64(expected), dtypes[0]) + rounded(limit, dtypes[0])))


def test_a_list_is_one_long_vector_also_over_several_tables() -> None:
    sizes = [
        int(size) for size in torch.randint(1, 12, (430,), generator=torch.Generator().manual_seed(0), device="cpu")
    ]
    whole, basis = normal(sum(sizes)), orthonormal_rows(4, sum(sizes), seed=1)
    grads = [part.clone()[None] for part in whole.split(sizes)]
    slices = [part.clone() for part in basis.split(sizes, dim=1)]
    cuda.project_(grads, slices, 1)
    expected = f64(whole) - f64(basis).T @ (f64(basis) @ f64(whole))
    actual = torch.cat([grad[0] for grad in grads])
    assert_within(actual, expected, projection_bound(f64(whole)[None], f64(basis), 2.0**-24)[0])


def test_dot_products_are_added_up_in_float64_over_chunks_and_over_the_list() -> None:
    # <g, q> = 2^26 + 1 - 2^26: far apart in one vector, and in a list.
    grad, basis = torch.zeros(1, 9000), torch.zeros(1, 9000)
    grad[0, ::3000], basis[0, ::3000] = torch.tensor([2.0**13, 1, 2.0**13]), torch.tensor([2.0**13, 1, -(2.0**13)])
    whole = grad.clone()
    cuda.project_([whole], [basis], 1)
    parts = [part.clone() for part in grad.split(3000, dim=1)]
    cuda.project_(parts, list(basis.split(3000, dim=1)), 1)
    assert whole[0, ::3000].tolist() == torch.cat(parts, 1)[0, ::3000].tolist() == [0, 0, 2.0**14]


@pytest.mark.parametrize("vectors", [1, 3])
def test_offsets_of_vectors_take_64_bits(vectors: int) -> None:
    grads, basis = normal(vectors, 70, dtype=torch.bfloat16), orthonormal_rows(3, 70, dtype=torch.bfloat16)
    far_grads, far_basis = far_apart(grads), far_apart(basis)
    cuda.project_([grads], [basis], 1)
    cuda.project_([far_grads], [far_basis], 1)
    assert torch.equal(far_grads, grads)
    columns, rows = normal(3, 3, seed=1), normal(3, 3, seed=1)
    far_columns, far_rows = far_apart(columns, 1), far_apart(rows)
    assert cuda.orthonormalize_(far_columns, None, 1e-4) == cuda.orthonormalize_(columns, None, 1e-4) == 3
    assert cuda.orthonormalize_(far_rows, None, 1e-4) == 3
    assert torch.equal(far_rows, columns)
    assert torch.equal(far_columns, columns)
    scores = uniform(3, seed=2, dtype=torch.bfloat16)
    selected = [cuda.balanced_mask(s, s, 1, 2, (0.4, 0.8), *SELECTIONS[0])[0] for s in (scores, far_apart(scores))]
    assert torch.equal(*selected)


def test_nothing_to_project_on_leaves_the_vectors_alone() -> None:
    for vectors, n, rank in ((2, 5, 0), (0, 5, 2), (2, 0, 0)):
        grads = normal(vectors, n)
        before = grads.clone()
        cuda.project_([grads], [torch.zeros(rank, n)], 2)
        assert torch.equal(grads, before)


def loss(rows: Tensor, basis: Tensor | None = None) -> float:
    q = f64(rows)
    own = np.abs(q @ q.T - np.eye(len(q))).max(initial=0)
    return max(own, np.abs(q @ f64(basis).T).max(initial=0)) if basis is not None else own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(
    ("rank", "n", "known"), [(1, 1, 0), (1, 2049, 0), (5, 60, 3), (11, 300, 0), (9, 12, 5), (3, 2100, 1)]
)
def test_orthonormalize(rank: int, n: int, known: int, layout: str, dtype: torch.dtype) -> None:
    basis = orthonormal_rows(known, n, seed=1, dtype=dtype) if known else None
    vectors = LAYOUTS[layout](normal(rank, n, dtype=dtype))
    expected = vectors.clone()
    kept = cuda.orthonormalize_(vectors, basis, 1e-4)
    assert kept == reference.orthonormalize_(expected, basis, 1e-4) == min(rank, n - known)
    u = ROUNDOFF[dtype]
    assert loss(vectors[:kept], basis) < 16 * u
    assert not vectors[kept:].any()
    np.testing.assert_allclose(f64(vectors), f64(expected), atol=1000 * u)


def test_orthogonality_does_not_depend_on_the_condition() -> None:
    left = torch.linalg.qr(normal(20, 20, seed=5, dtype=torch.float64))[0]
    right = orthonormal_rows(20, 400, seed=6, dtype=torch.float64)
    vectors = (left * torch.logspace(0, -6, 20, dtype=torch.float64) @ right).float()
    assert cuda.orthonormalize_(vectors, None, 0.0) == 20
    assert loss(vectors) < 16 * 2.0**-24


@pytest.mark.parametrize("exponent", [100, -100])
def test_lengths_whose_squares_no_float32_holds(exponent: int) -> None:
    vectors = normal(5, 300)
    scaled = vectors * 2.0**exponent
    assert cuda.orthonormalize_(vectors, None, 1e-4) == cuda.orthonormalize_(scaled, None, 1e-4) == 5
    assert torch.equal(scaled, vectors)


def test_dependent_rows_are_dropped_and_the_rest_moves_up() -> None:
    a, b, c = normal(3, 40)
    vectors = torch.stack([a, 2 * a, b, a + b, torch.zeros(40), c, b - c, a, b, c])
    assert cuda.orthonormalize_(vectors, None, 1e-4) == 3
    assert loss(vectors[:3]) < 16 * 2.0**-24
    assert not vectors[3:].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_row_is_named_and_nothing_is_written(value: float) -> None:
    vectors = normal(12, 20)
    vectors[10, 3] = value
    before = vectors.clone()
    with pytest.raises(ValueError, match="^vectors: row 10 contains NaN or Inf"):
        cuda.orthonormalize_(vectors, None, 1e-4)
    np.testing.assert_array_equal(bits(vectors), bits(before))


def test_nothing_to_orthonormalize() -> None:
    assert cuda.orthonormalize_(torch.zeros(0, 5), None, 1e-4) == 0
    assert cuda.orthonormalize_(torch.zeros(5, 0), None, 1e-4) == 0
    assert cuda.orthonormalize_(torch.zeros(3, 4), None, 1e-4) == 0


SELECTIONS = [
    ("full", "affine", 1, "cap", "none"),
    ("full", "relu", -1, "keep", "mean"),
    ("eps", "abs", 1, "cap", "none"),
    ("phi", "const", 1, "cap", "mean"),
]


@pytest.mark.parametrize("options", SELECTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cols", [1, 2, 33, 300, 2500])
def test_balanced_mask(cols: int, dtype: torch.dtype, options: tuple) -> None:
    for seed, (safety, task) in enumerate(
        [
            (uniform(cols, seed=3), uniform(cols, seed=4)),
            (uniform(cols, seed=5).mul(4).floor(), uniform(cols, seed=6).mul(4).floor()),  # ties and zeros
            (normal(cols, seed=7).exp(), normal(cols, seed=8).exp()),
        ]
    ):
        focus = (cols * (seed + 1)) // 3
        arguments = (safety.to(dtype), task.to(dtype), focus // 2, focus, (0.4, 0.8), *options)
        expected = reference.balanced_mask(*arguments)
        actual = cuda.balanced_mask(*arguments)
        assert torch.equal(actual[0], expected[0])
        if safety.device.type == "cpu":  # the host's own log and tanh: the same numbers, bit by bit
            assert actual[1:] == expected[1:]
        else:
            assert actual[1:3] == pytest.approx(expected[1:3], rel=1e-13, abs=1e-13)
            assert actual[3:] == expected[3:]


def test_balanced_mask_of_no_columns_and_of_strided_scores() -> None:
    none = cuda.balanced_mask(torch.zeros(0), torch.zeros(0), 0, 0, (0.4, 0.8), *SELECTIONS[0])
    assert none[0].shape == (0,)
    assert none[2:] == (0.0, 0, 0, 0)
    wide = uniform(2, 100)
    arguments = (wide.T[:, 0], uniform(200)[::2], 5, 30, (0.4, 0.8), *SELECTIONS[0])
    assert torch.equal(cuda.balanced_mask(*arguments)[0], reference.balanced_mask(*arguments)[0])


def test_every_call_that_writes_bumps_version_counters() -> None:
    x, mask = normal(3, 4), torch.tensor([True, False, True, False])
    calls = {
        "accumulate_gram_": lambda a, _: cuda.accumulate_gram_(a, x, 1.0),
        "accumulate_importance_": lambda a, b: cuda.accumulate_importance_([a, b], [x[:1], x], None, "fisher"),
        "merge_": lambda a, _: cuda.merge_(a, a.clone(), mask, 0.0),
        "project_": lambda a, b: cuda.project_([a, b], [normal(1, 4), normal(1, 4)], 1),
        "orthonormalize_": lambda a, _: cuda.orthonormalize_(a, None, 1e-4),
    }
    shapes = {"accumulate_gram_": [(4, 4)], "accumulate_importance_": [(1, 4), (3, 4)], "project_": [(3, 4), (3, 4)]}
    for name, call in calls.items():
        written = [normal(*shape, seed=1) for shape in shapes.get(name, [(3, 4)])]
        before = [tensor._version for tensor in written]
        call(written[0], written[-1])
        assert all(tensor._version > version for tensor, version in zip(written, before, strict=True)), name


def test_the_module_refuses_arguments_that_do_not_fit(module: ModuleType) -> None:
    where = cuda._where(torch.zeros(1))
    with pytest.raises(ValueError, match="^before: expected shape"):
        module.merge_(where, torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(3, dtype=torch.bool), 0.0)
    with pytest.raises(ValueError, match="^mask: expected bool"):
        module.merge_(where, torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), 0.0)


def test_both_zeros_are_one_score() -> None:
    zeros = torch.tensor([-0.0, 0.0, -0.0, 0.0, 0.0, -0.0])
    ones = torch.ones(6)
    assert cuda.balanced_mask(zeros, ones, 2, 3, (0.4, 0.8), *SELECTIONS[0])[0].tolist() == [True] * 2 + [False] * 4
    assert cuda.balanced_mask(zeros, zeros, 2, 3, (0.4, 0.8), *SELECTIONS[3])[0].tolist() == [True] * 2 + [False] * 4


def test_the_binding_and_the_package_speak_of_one_interface(module: ModuleType) -> None:
    assert module.INTERFACE == backend.CUDA_INTERFACE

"""Bytes that the kernels ask global memory for, counted in the emulator, beside what their headers claim.

The kernels are compiled without optimization and with a call before each load and store
(``cuda_emulation/counting.cpp``), so that none is missed but atomic operations.  Caches are not emulated: what a header
says comes from the second-level cache is counted here each time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "cuda_emulation"))
import build  # noqa: E402

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.timeout(600),
]

# Sizes from which on kernels do otherwise, in a copy: so that small inputs show it.
SMALLER = {
    "accumulate_gram": ("kSegment = 8192;", "kSegment = 64;"),
    "inverse_diagonal": ("kSmall = 1024;", "kSmall = 128;"),
}

# Runs in a process of its own, which the copy is built for.
CALLS = """
import ctypes, json, sys
import torch
import build
from kernel_cases import normal, uniform
from hpa_ext import cuda

module = build.module()
cuda.cuda_extension = lambda: module
library = ctypes.CDLL(module.__file__)
library.hpa_counting_bytes.restype = ctypes.c_uint64
made, counts = [], {}

def watch(tensor):
    library.hpa_counting_watch(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes))

def moved(tensor):
    address = ctypes.c_void_p(tensor.data_ptr())
    return [library.hpa_counting_bytes(address, written) for written in (0, 1)]

def watched_empty(*shape, empty=torch.empty, **options):  # outputs and scratch; kept, so that no two share an address
    made.append(empty(*shape, **options))
    watch(made[-1])
    return made[-1]

torch.empty = watched_empty

def count(name, call, *arguments):
    library.hpa_counting_forget()
    made.clear()
    given = [a for argument in arguments for a in (argument if isinstance(argument, list) else [argument])]
    given = [a for a in given if isinstance(a, torch.Tensor)]
    for tensor in given:
        watch(tensor)
    call(*arguments)
    counts[name] = [[moved(tensor) for tensor in tensors] for tensors in (given, made)]

def weights(rows, cols, dtype=torch.float32):
    return torch.ones(rows, cols, dtype=dtype)

half, whole = torch.arange(264) < 4, torch.arange(264) >= 0
for dtype in (torch.float32, torch.bfloat16):
    a, b = weights(40, 264, dtype), weights(40, 264, dtype)
    count(f"merge {dtype}", cuda.merge_, a, b, half, 0.5)
    count(f"merge of nothing {dtype}", cuda.merge_, a, b, ~whole, 0.0)
count("merge of four columns", cuda.merge_, weights(40, 264), weights(40, 264), half, 0.0)
count("merge of rows that are not aligned", cuda.merge_, weights(9, 33), weights(9, 33), half[:33], 0.5)
count("change_statistics", cuda.change_statistics, weights(300, 264), weights(300, 264))
lists = [[torch.ones(4096), torch.ones(77)] for _ in range(3)]
count("fisher", cuda.accumulate_importance_, *lists[:2], None, "fisher")
count("taylor", cuda.accumulate_importance_, *lists, "taylor")
count("project", cuda.project_, [weights(1, 8200)], [weights(5, 8200)], 1)
count("project on 33", cuda.project_, [weights(1, 8200)], [weights(33, 8200)], 1)
count("project of 8", cuda.project_, [weights(8, 2048)], [weights(5, 2048)], 1)

dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
for pair in ("bf16 f32", "f16 f32", "f32 f32", "bf16 f64", "f64 f64"):
    x, gram = (dtypes[name] for name in pair.split())
    count(f"gram {pair}", cuda.accumulate_gram_, weights(256, 256, gram), weights(33, 256, x), 1.0)
x = weights(33, 129, torch.bfloat16)
count("gram of rows that are not aligned", cuda.accumulate_gram_, weights(129, 129), x, 1.0)
for dtype in ("bf16", "f32"):
    count(f"gram of many tokens {dtype}", cuda.accumulate_gram_, weights(8, 8), weights(130, 8, dtypes[dtype]), 1.0)

for dtype in ("f32", "f64"):
    for mode in ("exact", "pivot"):
        gram = torch.eye(256, dtype=dtypes[dtype])
        count(f"inverse_diagonal {mode} {dtype}", cuda.inverse_diagonal, gram, None, 1.0, 0.01, mode)

count("orthonormalize", cuda.orthonormalize_, normal(24, 2048), None, 1e-6)
basis = torch.zeros(10, 2048)
basis[range(10), range(10)] = 1
count("orthonormalize to basis", cuda.orthonormalize_, normal(24, 2048), basis, 1e-6)

def mask(name, safety, task, mode, keep, focus):
    count(f"mask {name}", cuda.balanced_mask, safety, task, keep, focus, (0.5, 0.5), mode, "const", 1, "cap", "none")
    counts[f"mask {name}"].append([safety.double().tolist(), task.double().tolist()])

alike = uniform(1000)
mask("full", uniform(1000, seed=1), uniform(1000, seed=2), "full", 30, 200)
mask("of scores that are alike", alike, alike + 0.01 * uniform(1000, seed=1), "phi", 30, 200)
mask("eps", uniform(1000, seed=1), uniform(1000, seed=2), "eps", 30, 200)
mask("of equals", torch.ones(1000), torch.ones(1000), "phi", 30, 200)
mask("of all", uniform(1000, seed=1), uniform(1000, seed=2), "full", 1000, 1000)
json.dump(counts, sys.stdout)
"""

Moved = tuple[int, int]  # bytes read, bytes written


class Call:
    """What a call moved of each tensor that it was given, and of each that it made: outputs and then scratch."""

    def __init__(self, given: list[list[int]], made: list[list[int]], scores: list[list[float]] | None = None):
        self.given: list[Moved] = [(read, written) for read, written in given]
        self.made: list[Moved] = [(read, written) for read, written in made]
        self.scores = scores


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Call]:
    kernels = tmp_path_factory.mktemp("counting") / "cuda"
    shutil.copytree(build.KERNELS, kernels)
    for name, (constant, smaller) in SMALLER.items():
        source = (kernels / f"{name}.cu").read_text()
        assert source.count(constant) == 1
        (kernels / f"{name}.cu").write_text(source.replace(constant, smaller))
    environment = {
        **os.environ,
        "HPA_CUDA_EMULATION": "counting",
        "HPA_CUDA_EMULATION_KERNELS": str(kernels),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE / "cuda_emulation")]),
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(
        [sys.executable, "-c", CALLS], env=environment, capture_output=True, text=True, cwd=HERE.parent
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return {name: Call(*call) for name, call in json.loads(ran.stdout).items()}


def test_merge_reads_both_once_and_writes_one_once(calls: dict[str, Call]) -> None:
    for dtype, size in (("torch.float32", 4), ("torch.bfloat16", 2)):
        matrix = 40 * 264 * size
        assert calls[f"merge {dtype}"].given[:2] == [(matrix, matrix), (matrix, 0)]
        assert calls[f"merge of nothing {dtype}"].given[:2] == [(0, 0), (0, 0)]
    assert calls["merge of four columns"].given[:2] == [(40 * 16, 40 * 16), (40 * 16, 0)]
    matrix = 9 * 33 * 4
    assert calls["merge of rows that are not aligned"].given[:2] == [(matrix, matrix), (matrix, 0)]


def test_change_statistics_read_both_once_and_little_beside(calls: dict[str, Call]) -> None:
    call = calls["change_statistics"]
    assert call.given == [(300 * 264 * 4, 0)] * 2
    groups, tiles = 5, 3  # groups of 64 rows, tiles of 128 columns
    columns, scalars = 8 * groups * 264, 3 * 8 * groups * tiles
    assert call.made[:4] == [(0, 264 * 4), (0, 3 * 8), (columns, columns), (scalars, scalars)]


def test_importances_read_each_input_once_and_write_one_once(calls: dict[str, Call]) -> None:
    sizes = [4096 * 4, 77 * 4]
    for kind, inputs in (("fisher", 1), ("taylor", 2)):
        read_and_written, read = [(size, size) for size in sizes], [(size, 0) for size in sizes]
        assert calls[kind].given == read_and_written + read * inputs


def test_project_reads_grads_and_basis_twice(calls: dict[str, Call]) -> None:
    vector, chunks = 8200 * 4, 5
    # Grads once more for each 16 further rows of the basis; partial sums: of 16 rows at a time, a float64 a chunk.
    for name, rank, groups in (("project", 5, 1), ("project on 33", 33, 3)):
        assert calls[name].given == [((1 + groups) * vector, vector), (2 * rank * vector, 0)]
        assert calls[name].made[1] == (groups * 16 * chunks * 8,) * 2
    vector = 2048 * 4
    assert calls["project of 8"].given == [(2 * 8 * vector, 8 * vector), (2 * 5 * vector, 0)]
    assert calls["project of 8"].made[1] == (64 * 8,) * 2


@pytest.mark.parametrize(
    ("dtypes", "times"), [("bf16 f32", 2), ("f16 f32", 2), ("f32 f32", 2 + 1), ("bf16 f64", 4 + 1), ("f64 f64", 4 + 1)]
)
def test_gram_reads_x_once_a_tile_of_columns_and_writes_half_of_itself(
    calls: dict[str, Call], dtypes: str, times: int
) -> None:
    size, gram_size = ({"f16": 2, "bf16": 2, "f32": 4, "f64": 8}[name] for name in dtypes.split())
    lower = 256 * 257 // 2 * gram_size
    assert calls[f"gram {dtypes}"].given == [(lower, lower), (times * 33 * 256 * size, 0)]


def test_gram_reads_no_more_where_rows_are_not_aligned(calls: dict[str, Call]) -> None:
    lower = 129 * 130 // 2 * 4
    assert calls["gram of rows that are not aligned"].given == [(lower, lower), (2 * 33 * 129 * 2, 0)]


@pytest.mark.parametrize(("dtype", "size", "times"), [("bf16", 2, 1), ("f32", 4, 2)])
def test_gram_is_read_and_written_once_a_segment_of_tokens(
    calls: dict[str, Call], dtype: str, size: int, times: int
) -> None:
    segments, lower = 3, 8 * 9 // 2 * 4
    moved = (segments * lower, segments * lower)
    assert calls[f"gram of many tokens {dtype}"].given == [moved, (times * 130 * 8 * size, 0)]


@pytest.mark.parametrize("mode", ["exact", "pivot"])
@pytest.mark.parametrize(("dtype", "size", "block", "tile"), [("f32", 4, 64, 128), ("f64", 8, 32, 64)])
def test_inverse_diagonal_reads_and_writes_what_is_left_once_a_block(
    calls: dict[str, Call], dtype: str, size: int, block: int, tile: int, mode: str
) -> None:
    n, exact = 256, mode == "exact"
    call = calls[f"inverse_diagonal {mode} {dtype}"]
    lower = n * (n + 1) // 2
    assert call.given == [((lower + n) * size, 0)]  # and the diagonal once, for its mean

    stops = range(block, n + 1, block)
    left = sum(lower - stop * (stop + 1) // 2 - (0 if exact else (n - stop) * stop) for stop in stops)
    # In each step the block on the diagonal is factored, and what lies below it and left of it goes to the panel.
    factored = len(stops) * (block * (block + 1) // 2)
    below = sum((n - stop) * block for stop in stops)
    before = sum((stop - block) * block for stop in stops) if exact else 0
    work, panel = call.made[2:4]
    assert work[0] == (left + factored + below + before) * size
    assert work[1] == (left + lower + (below if exact else 0)) * size  # made once; below: right-hand sides begin at 0
    # What the header says: cols^3 / 24 bytes in float32, up to a part of the last block.
    claimed = n**3 / 24 * (1 if dtype == "f32" else 4) / (1 if exact else 2)
    assert 2 * left * size == pytest.approx(claimed, rel=1.6 / len(stops))

    read = 0  # of the panel, by the tiles of the symmetric product
    for stop in stops:
        for row in range(stop, n, tile):
            for col in range(0 if exact else stop, min(row + tile, n), tile):
                read += block * (min(tile, n - row) + min(tile, n - col))
    assert panel == (read * size, sum(n - (0 if exact else stop) for stop in stops) * block * size)


@pytest.mark.parametrize(("name", "known"), [("orthonormalize", 0), ("orthonormalize to basis", 10)])
def test_orthonormalize_reads_the_rows_before_a_block_four_times(calls: dict[str, Call], name: str, known: int) -> None:
    rows, row = 24, 2048 * 4
    read, written, basis = rows, 0, 0  # rows; lengths read each once
    for start in range(0, rows, 8):
        for _sweep in range(2):
            for others in (known, start):
                groups = (others + 7) // 8  # of eight rows that dot products are made with
                read += 8 * groups + (8 if others else 0)
                written += 8 if others else 0
            read += 2 * start
            basis += 2 * known
            # Seven rows are projected on those above them in the block; norms and scaling read all eight.
            read += sum(2 + 2 * above for above in range(1, 8)) + 2 * 8
            written += 7 + 8
    call = calls[name]
    assert call.given == [(read * row, written * row)] + ([(basis * row, 0)] if known else [])
    # In the words of the header: m / 4 and m / 8 readings of what lies before, 25 readings and 6 writings of each row.
    if not known:
        before = sum(4 * start for start in range(0, rows, 8))
        own = sum(2 * start for start in range(0, rows, 8))
        assert read - before - own == pytest.approx(25 * rows, rel=0.06)
        assert written == pytest.approx(6 * rows, rel=0.16)
    assert basis == rows // 2 * known


def readings(keys: np.ndarray, among: np.ndarray, count: int) -> tuple[int, int]:
    """How many digits a selection of the ``count`` best follows, and how many columns it chooses among."""
    if count == 0 or among.sum() <= count:
        return 0, 0
    ordered = (np.abs(keys).view(np.uint64) ^ np.where(keys < 0, ~np.uint64(0), np.uint64(0))) + np.uint64(2**63)
    left = ordered[among]
    for digit in range(1, 9):
        digits = left >> np.uint64(64 - 8 * digit) & np.uint64(255)
        best = np.sort(digits)[::-1][count - 1]
        count -= int((digits > best).sum())
        left = left[digits == best]
        if len(left) == count:
            break
    return digit, int(among.sum())


@pytest.mark.parametrize("name", ["full", "of scores that are alike", "eps", "of equals", "of all"])
def test_balanced_mask_reads_scores_once_a_digit(calls: dict[str, Call], name: str) -> None:
    cols, keep, focus = (1000, 1000, 1000) if name == "of all" else (1000, 30, 200)
    call = calls[f"mask {name}"]
    assert call.scores is not None
    safety, task = (np.array(scores) for scores in call.scores)
    every = np.ones(cols, dtype=bool)
    best = [np.zeros(cols, dtype=bool) for _ in range(2)]
    for scores, chosen in zip((safety, task), best, strict=True):
        chosen[np.argsort(-scores, kind="stable")[:focus]] = True
    overlap, only = best[0] & best[1], best[0] & ~best[1]
    selections = [(safety, every, focus, (0,)), (task, every, focus, (1,))]
    if name == "eps":
        selections += [(safety, every, keep, (0,))]
    elif name == "full":
        assert only.sum() > keep  # no place is left for columns of the overlap
        selections += [(safety, only, keep, (0,))]
    elif name != "of all":
        selections += [(safety - 0.5 * task, overlap, keep, (0, 1))]
    read = [cols, cols]  # for m and the means
    for keys, among, wanted, inputs in selections:
        digits, chosen = readings(keys, among, wanted)
        assert digits in {"of equals": (8,), "of all": (0,)}.get(name, range(1, 6))
        for i in inputs:
            read[i] += digits * cols + chosen
    assert call.given == [(4 * read[0], 0), (4 * read[1], 0)]
    assert max(read) <= 19 * cols
    mask, numbers, flags = call.made
    assert (mask, numbers) == ((0, cols), (0, 5 * 8))
    assert flags[1] <= 4 * cols  # cleared, and three bits set at most

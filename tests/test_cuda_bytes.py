"""Bytes that the kernels ask global memory for, counted in the emulator, beside what their headers claim.

Loads and stores of a copy of the kernels go through functions that count. Caches are not emulated: what a header says
comes from the second-level cache is counted here each time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "cuda_emulation"))
import build  # noqa: E402

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.timeout(600),
]

COUNTING = """
extern "C" { inline std::uint64_t hpa_bytes_read = 0, hpa_bytes_written = 0; }
namespace hpa::cuda {
template <class Storage, int Count>
Pack<Storage, Count> counted_load_pack(const Storage* from) {
  hpa_bytes_read += sizeof(Storage) * Count;
  return load_pack<Storage, Count>(from);
}
template <class Storage, int Count>
void counted_store_pack(Storage* to, const Pack<Storage, Count>& pack) {
  hpa_bytes_written += sizeof(Storage) * Count;
  store_pack<Storage, Count>(to, pack);
}
template <class T>
T counted_load_element(const void* data, DType dtype, std::int64_t index) {
  hpa_bytes_read += element_size(dtype);
  return load_element<T>(data, dtype, index);
}
template <class T>
void counted_store_element(void* data, DType dtype, std::int64_t index, T value) {
  hpa_bytes_written += element_size(dtype);
  store_element(data, dtype, index, value);
}
template <class T>
void counted_load_four(const void* data, DType dtype, std::int64_t index, T (&values)[4]) {
  hpa_bytes_read += 4 * element_size(dtype);
  load_four(data, dtype, index, values);
}
template <class T>
void counted_store_four(void* data, DType dtype, std::int64_t index, const T (&values)[4]) {
  hpa_bytes_written += 4 * element_size(dtype);
  store_four(data, dtype, index, values);
}
template <class T>
T counted_ldcg(const T* from) {
  hpa_bytes_read += sizeof(T);
  return *from;
}
}  // namespace hpa::cuda
#define load_pack counted_load_pack
#define store_pack counted_store_pack
#define load_element counted_load_element
#define store_element counted_store_element
#define load_four counted_load_four
#define store_four counted_store_four
#define __ldcg counted_ldcg
"""

# Runs in a process of its own, which the copy is built for.
CALLS = """
import ctypes, json, sys
import torch
import build
from hpa_ext import cuda

module = build.module()
cuda.cuda_extension = lambda: module
counters = [ctypes.c_uint64.in_dll(ctypes.CDLL(module.__file__), f"hpa_bytes_{kind}") for kind in ("read", "written")]
counts = {}

def count(name, call, *arguments):
    for counter in counters:
        counter.value = 0
    call(*arguments)
    counts[name] = [counter.value for counter in counters]

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
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Bytes read and written by each call."""
    kernels = tmp_path_factory.mktemp("counting") / "cuda"
    shutil.copytree(build.KERNELS, kernels)
    for name in ("merge", "change_statistics", "accumulate_importance", "project"):
        source = (kernels / f"{name}.cu").read_text()
        assert source.count("}  // namespace hpa::cuda\n") == 1
        last = source.rindex("#include")
        last = source.index("\n", last) + 1
        (kernels / f"{name}.cu").write_text(source[:last] + COUNTING + source[last:])
    paths = os.pathsep.join([str(HERE), str(HERE / "cuda_emulation")])
    environment = {
        **os.environ,
        "HPA_CUDA_EMULATION_KERNELS": str(kernels),
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HPA_CUDA_EMULATION", None)
    ran = subprocess.run(
        [sys.executable, "-c", CALLS], env=environment, capture_output=True, text=True, cwd=HERE.parent
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


def test_merge_reads_both_once_and_writes_one_once(counts: dict[str, list[int]]) -> None:
    for dtype, size in (("torch.float32", 4), ("torch.bfloat16", 2)):
        matrix = 40 * 264 * size
        assert counts[f"merge {dtype}"] == [2 * matrix, matrix]
        assert counts[f"merge of nothing {dtype}"] == [0, 0]
    assert counts["merge of four columns"] == [2 * 40 * 16, 40 * 16]
    assert counts["merge of rows that are not aligned"] == [2 * 9 * 33 * 4, 9 * 33 * 4]


def test_change_statistics_read_both_once_and_little_beside(counts: dict[str, list[int]]) -> None:
    groups, tiles = 5, 3  # groups of 64 rows, tiles of 128 columns
    scratch = 8 * groups * 264 + 3 * 8 * groups * tiles
    assert counts["change_statistics"][0] == 2 * 300 * 264 * 4 + scratch


def test_importances_read_each_input_once_and_write_one_once(counts: dict[str, list[int]]) -> None:
    size = (4096 + 77) * 4
    assert counts["fisher"] == [2 * size, size]
    assert counts["taylor"] == [3 * size, size]


def test_project_reads_grads_and_basis_twice(counts: dict[str, list[int]]) -> None:
    vector, chunks = 8200 * 4, 5
    # Once more for each 16 further rows of the basis; partial sums: of 16 rows at a time, a float64 a chunk.
    assert counts["project"] == [2 * vector + 2 * 5 * vector + 16 * chunks * 8, vector]
    assert counts["project on 33"] == [4 * vector + 2 * 33 * vector + 3 * 16 * chunks * 8, vector]
    vector = 2048 * 4
    assert counts["project of 8"] == [2 * 8 * vector + 2 * 5 * vector + 64 * 8, 8 * vector]

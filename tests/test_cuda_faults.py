"""The emulated CUDA kernels under sanitizers; and faults planted in copies of them, which the emulator must notice."""

from __future__ import annotations

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

# Some tests of every kernel, at small sizes.
SMALL = """(dtype0 and contiguous and not every and (65-264 or 300-70 or 1-37))
    or (aligned_rows and 3-5 and (dtype0 or dtype1)) or (test_long_vectors and (dtype0 or dtype1))
    or (dtypes1 and contiguous and (taylor or 2-2049-33 or 3-40-9))
    or (test_accumulate_gram and (33-136 or 70-65) and contiguous) or (inverse_diagonal and 33 and exact)
    or (test_orthonormalize and contiguous and (11-300 or 5-60)) or bad_row
    or (balanced_mask and 300 and dtype0 and (options0 or options2)) or refuses"""

# One or two of each kernel, with more than one block where blocks meet: the thread sanitizer takes a second for each
# thousand threads.
SMALLER = """(contiguous and dtype0 and not every and (test_change_statistics and 300-70 or test_merge and 65-264-0.37))
    or (contiguous and dtypes1 and (taylor or 2-2049-33)) or (test_accumulate_gram and 70-65 and contiguous)
    or (test_inverse_diagonal and 33 and exact and dtype0)
    or (test_orthonormalize and 1-2049-0 and contiguous and dtype0)
    or (balanced_mask and 300 and dtype0 and options0)"""


def run(tests: str, sanitizer: str = "", kernels: Path | None = None) -> tuple[int, str]:
    """Exit status and output of these tests of test_cuda_kernels.py in a process of their own."""
    environment = {**os.environ, **build.environment(sanitizer), "OMP_NUM_THREADS": "1"}
    if kernels is not None:
        environment["HPA_CUDA_EMULATION_KERNELS"] = str(kernels)
    # The limit of time is the caller's: the first test of a process waits for the compiler.
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=0"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", *plugins, "-k", " ".join(tests.split())]
    ran = subprocess.run(
        [*command, str(HERE / "test_cuda_kernels.py")], env=environment, capture_output=True, text=True, cwd=HERE.parent
    )
    return ran.returncode, ran.stdout + ran.stderr


def test_no_access_out_of_bounds_and_no_undefined_behaviour() -> None:
    status, output = run(SMALL, "address")
    assert status == 0, output[-6000:]


def test_no_data_race() -> None:
    status, output = run(SMALLER, "thread")
    assert status == 0, output[-6000:]


FAULTS = {
    "a barrier is missing": (
        ("change_statistics.cu", "__syncthreads();\n\n  // Warps in their order", "// Warps in their order"),
        ("", "test_change_statistics and 300-70", "AssertionError"),
    ),
    "a barrier is missing where the result may be right all the same": (
        ("change_statistics.cu", "__syncthreads();\n\n  // Warps in their order", "// Warps in their order"),
        ("thread", "test_change_statistics and 300-70 and contiguous and dtype0", "ThreadSanitizer: data race"),
    ),
    "a fence is missing": (
        ("change_statistics.cu", '#include "launch.cuh"', '#define __threadfence() ((void)0)\n#include "launch.cuh"'),
        ("thread", "test_change_statistics and 300-70 and contiguous and dtype0", "ThreadSanitizer: data race"),
    ),
    "shared memory is not initialised": (
        ("change_statistics.cu", "if (lane == 0) warp_totals[", "if (lane == 0 && warp > 0) warp_totals["),
        ("", "test_change_statistics and 300-70", "AssertionError"),
    ),
    "a warp's mask leaves lanes out": (
        ("balanced_mask.cu", "__shfl_xor_sync(kAllLanes, product.high", "__shfl_xor_sync(0xffffu, product.high"),
        ("", "test_balanced_mask and 300", "emulation: a lane is not in the mask"),
    ),
    "an asynchronous copy is not waited for": (
        ("accumulate_gram.cu", "wait_copies<kStages - 2>", "wait_copies<kStages>"),
        ("", "test_accumulate_gram and 33-136 and contiguous", "AssertionError"),
    ),
    "threads part at a barrier": (
        ("balanced_mask.cu", "if (count == 0) return;", "if (count == 0 || thread == 77) return;"),
        ("", "test_balanced_mask and 300", "emulation: threads wait for each other"),
    ),
    "a write is out of bounds": (
        ("merge.cu", "if (e < valid) to[e]", "if (e <= valid) to[e]"),
        ("address", "test_merge and 1-1 and contiguous", "heap-buffer-overflow"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str, tmp_path: Path) -> None:
    (name, right, wrong), (sanitizer, tests, message) = FAULTS[fault]
    kernels = tmp_path / "cuda"
    shutil.copytree(build.KERNELS, kernels)
    source = (kernels / name).read_text()
    assert source.count(right) == 1
    (kernels / name).write_text(source.replace(right, wrong))
    status, output = run(tests, sanitizer, kernels)
    assert status != 0, f"{fault}, and nothing noticed"
    assert message in output, output[-6000:]

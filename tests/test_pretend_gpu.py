"""Where there is a GPU, tests of kernels run on it: here on one that is pretended (pretend_gpu.py), whose tensors
cannot be mixed with those of the CPU and whose kernels are the emulated ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FUNCTIONS = "accumulate_gram accumulate_importance balanced_mask change_statistics inverse_diagonal merge".split()
FUNCTIONS += "orthonormalize project edit".split()
FILES = [f"test_{name}.py" for name in ("cuda_kernels", "torch_ops", *FUNCTIONS)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.timeout(600)
def test_tests_of_every_kernel_run_unchanged_with_tensors_that_only_a_gpu_can_read() -> None:
    # Not what torch compiles (its code asks for the device) nor differentiates (its threads make tensors of their own).
    # Of the many shapes, some.
    left_out = "compile schemas graph derivative many_columns every_other padded columns_first"
    left_out += " 4100 2500 300-70 65-264 dtype1 dtype2"
    command = [sys.executable, "-m", "pytest", "-p", "pretend_gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "-v"]
    command += ["-k", " and ".join(f"not {name}" for name in left_out.split()), *FILES]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    passed = Counter(re.findall(r"^(?:tests/)?(test_\w+\.py)::.*\[.*cuda.*\] PASSED", ran.stdout, flags=re.MULTILINE))
    assert all(passed[name] > 0 for name in FILES)
    assert passed["test_cuda_kernels.py"] > 80

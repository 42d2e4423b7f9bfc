"""Instruction sets: each stays in its own file, each computes the same, also those that this machine does not have."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import LAYOUTS, assert_within, f64, normal
from torch import Tensor

from hpa_ext import backend

ROOT = Path(__file__).resolve().parent.parent
X86 = platform.machine() in ("x86_64", "AMD64")
COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++ or clang++")
needs_x86 = pytest.mark.skipif(not X86, reason="x86-64 only")

# ---- Where instructions stand ----

# Namespaces of csrc/cpu/isa and what their functions may use.  Everything else may use none of it.
MAY_USE = {
    "avx2": {"avx2"},
    "avx512": {"avx2", "avx512"},
    "avx512bf16": {"avx2", "avx512", "avx512bf16"},
    "amx": {"avx2", "avx512", "amx"},
}


def instruction_set(mnemonic: str, operands: str) -> str | None:
    """The instruction set that an instruction needs, in the words of HPA_ISA; ``None`` for the baseline's."""
    if "tmm" in operands or mnemonic in ("ldtilecfg", "sttilecfg", "tilerelease"):
        return "amx"
    if re.match(r"v(dp|cvtne2?ps2?)\w*bf16", mnemonic):
        return "avx512bf16"
    if re.search(r"zmm|%k[0-7]\b|[xy]mm(1[6-9]|2\d|3[01])\b", operands):
        return "avx512"
    if "ymm" in operands or (mnemonic.startswith("v") and mnemonic not in ("verr", "verw")):
        return "avx2"
    return None


def instructions_by_namespace(binary: Path) -> tuple[dict[str, set[str]], list[str]]:
    """What each namespace of ``csrc/cpu/isa`` uses, and instructions outside of the namespace that may use them."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("needs objdump")
    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", str(binary)], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    used: dict[str, set[str]] = defaultdict(set)
    strangers: dict[tuple[str, str], str] = {}
    function = namespace = ""
    for line in listing.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = start[1]
            inside = re.search(r"N3hpa3isa\d+(avx2|avx512bf16|avx512|amx)[^a-z0-9]*\d", function)
            namespace = inside[1] if inside else ""
        elif instruction := re.match(r"\s+[0-9a-f]+:\s+(?:(?:lock|rep\w*|notrack|bnd)\s+)*(\S+)\s*(.*)", line):
            needed = instruction_set(instruction[1], instruction[2])
            if needed is None:
                continue
            used[namespace].add(needed)
            if needed not in MAY_USE.get(namespace, set()):
                strangers.setdefault((function, needed), f"{function}: {instruction[1]} {instruction[2]}")
    return used, list(strangers.values())


@needs_x86
def test_no_instruction_stands_outside_the_file_of_its_instruction_set() -> None:
    module = Path(backend.extension().__file__)
    used, strangers = instructions_by_namespace(module)
    if not used:
        pytest.skip("the installed module has no names of functions (built or packaged with stripping)")
    assert not strangers, "\n".join(strangers)
    assert "avx2" in used["avx2"]
    assert "avx512" in used["avx512"]
    if "avx512bf16" in used:
        assert "avx512bf16" in used["avx512bf16"]
    if "amx" in used:
        assert "amx" in used["amx"]


@needs_x86
@needs_compiler
def test_a_file_with_the_flags_of_another_is_found(tmp_path: Path) -> None:
    command = [str(COMPILER), "-std=c++20", "-O3", "-fPIC", "-DHPA_X86_ISA", "-c", "-o", str(tmp_path / "planted.o")]
    command += [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/cpu'}", str(ROOT / "csrc/cpu/balanced_mask.cpp")]
    subprocess.run(command, check=True, timeout=120)
    assert instructions_by_namespace(tmp_path / "planted.o") == ({}, [])
    subprocess.run([*command, "-mavx2"], check=True, timeout=120)
    assert instructions_by_namespace(tmp_path / "planted.o")[1]


@pytest.mark.parametrize(
    ("mnemonic", "operands", "needed"),
    [
        ("addps", "%xmm1,%xmm0", None),
        ("vaddps", "%xmm2,%xmm1,%xmm0", "avx2"),
        ("vaddps", "%ymm2,%ymm1,%ymm0", "avx2"),
        ("vaddps", "%ymm2,%ymm17,%ymm0", "avx512"),
        ("vaddps", "%zmm2,%zmm1,%zmm0{%k1}", "avx512"),
        ("kmovw", "%eax,%k1", "avx512"),
        ("vdpbf16ps", "%zmm2,%zmm1,%zmm0", "avx512bf16"),
        ("tdpbf16ps", "%tmm2,%tmm1,%tmm0", "amx"),
        ("ldtilecfg", "(%rax)", "amx"),
    ],
)
def test_instructions_are_told_apart(mnemonic: str, operands: str, needed: str | None) -> None:
    assert instruction_set(mnemonic, operands) == needed


# ---- The choice ----


def run_with(isa: str) -> subprocess.CompletedProcess[str]:
    code = "from hpa_ext import backend; print(backend.extension().isa())"
    environment = {**os.environ, "HPA_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def test_an_unknown_instruction_set_is_an_error_that_names_the_known() -> None:
    result = run_with("mmx")
    assert "ValueError: HPA_ISA: expected one of 'baseline'" in result.stderr
    assert "got 'mmx'" in result.stderr


@needs_x86
def test_an_instruction_set_that_cannot_run_here_is_an_error_that_says_why() -> None:
    missing = [name for name in MAY_USE if name not in backend.extension().available_isas()]
    if not missing:
        pytest.skip("this machine has every instruction set")
    with pytest.raises(ValueError, match=f"^isa: cannot run '{missing[-1]}' here: (the|only) .+"):
        backend.extension().select_isa(missing[-1])
    assert f"HPA_ISA: cannot run '{missing[-1]}' here: " in run_with(missing[-1]).stderr


def test_the_best_available_instruction_set_is_chosen() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    slow = {"avx512bf16"} if cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text() else set()
    available = [name for name in backend.extension().available_isas() if name not in slow]
    assert run_with("").stdout.strip() == available[-1]


# ---- Instruction sets that this machine need not have ----

Gram = Callable[[str, Tensor, Tensor, float], None]


@pytest.fixture(scope="session")
def emulated_gram(tmp_path_factory: pytest.TempPathFactory) -> Gram:
    """``gram += scale * x^T x`` by the loops of ``csrc/cpu/isa/NAME.cpp``.

    AVX-512's vectors of 64 bytes are lowered by the compiler to what this machine has; the few intrinsics of the others
    are plain functions, in ``isa_emulation/immintrin.h``.
    """
    if COMPILER is None:
        pytest.skip("needs g++ or clang++")
    library = tmp_path_factory.mktemp("isa") / "emulated.so"
    sources = [ROOT / "tests/isa_emulation/gram.cpp", ROOT / "csrc/cpu/parallel.cpp"]
    sources += [ROOT / f"csrc/cpu/isa/{name}.cpp" for name in ("avx512", "avx512bf16", "amx")]
    command = [
        COMPILER,
        "-std=c++20",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-fopenmp-simd",
        "-DHPA_OPENMP",
        "-DHPA_X86_ISA",
        "-DHPA_AVX512BF16",
        "-DHPA_AMX",
    ]
    command += [f"-I{ROOT / path}" for path in ("tests/isa_emulation", "csrc/include", "csrc/cpu")]
    command += ["-shared", "-fPIC", "-o", str(library), *map(str, sources)]
    subprocess.run(command, check=True, timeout=280)
    function = ctypes.CDLL(str(library)).emulated_gram
    strides = [ctypes.c_int64, ctypes.c_int64]
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, *strides, ctypes.c_void_p, ctypes.c_int]
    function.argtypes += [*strides, *strides, ctypes.c_float]
    dtypes = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}

    def call(name: str, gram: Tensor, x: Tensor, scale: float) -> None:
        arguments = (gram.data_ptr(), *gram.stride(), x.data_ptr(), dtypes[x.dtype], *x.shape, *x.stride(), scale)
        assert function(name.encode(), *arguments) == 0

    return call


def check(gram_of: Gram, name: str, gram: Tensor, x: Tensor, scale: float) -> None:
    """Against float64.  At most 256 tokens are summed one by one, four such sums in scratch, those in gram; numbers
    below 2^-126 may count as zero, as factors and as products."""
    rows, before = f64(x), f64(gram)
    magnitude = np.abs(rows)
    terms = min(len(rows), 256) + 4 + math.ceil(len(rows) / 512) + 3
    limit = 2.0**-24 * terms * (abs(scale) * magnitude.T @ magnitude + np.abs(before))
    total = magnitude.sum(0)
    limit += abs(scale) * 2.0**-126 * (len(rows) + total[:, None] + total[None, :]) + 2.0**-126
    above = gram.triu(1).clone()
    gram_of(name, gram, x, scale)
    expected = np.tril(before + scale * rows.T @ rows) + np.triu(before, 1)
    assert_within(gram, expected, limit)
    assert torch.equal(gram.triu(1), above)


SHAPES = [(1, 1), (1, 33), (2, 16), (3, 47), (31, 32), (32, 64), (33, 31), (40, 97), (130, 145), (513, 40), (1100, 70)]
CASES = [(name, dtype) for name in ("avx512", "avx512bf16", "amx") for dtype in (torch.float32, torch.bfloat16)]
CASES = [(name, dtype) for name, dtype in CASES if name == "avx512" or dtype == torch.bfloat16]


@pytest.mark.parametrize(("name", "dtype"), [*CASES, ("avx512", torch.float16)])
@pytest.mark.parametrize(("tokens", "cols"), SHAPES)
def test_wide_instruction_sets_agree_with_float64(
    emulated_gram: Gram, name: str, dtype: torch.dtype, tokens: int, cols: int
) -> None:
    check(emulated_gram, name, normal(cols, cols, seed=1), normal(tokens, cols, seed=tokens, dtype=dtype), 2.0)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("gram_layout", sorted(LAYOUTS))
def test_wide_instruction_sets_read_any_layout(
    emulated_gram: Gram, name: str, dtype: torch.dtype, layout: str, gram_layout: str
) -> None:
    x = LAYOUTS[layout](normal(75, 53, seed=3, dtype=dtype))
    check(emulated_gram, name, LAYOUTS[gram_layout](normal(53, 53, seed=4)), x, -0.5)


@pytest.mark.parametrize("name", ["avx512bf16", "amx"])
def test_subnormal_activations_may_count_as_zero_and_no_more(emulated_gram: Gram, name: str) -> None:
    x = normal(64, 40, seed=5, dtype=torch.bfloat16)
    x[:, ::3] *= 2.0**-128
    x[:, 1::3] *= 2.0**-70
    check(emulated_gram, name, torch.zeros(40, 40), x, 1.0)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_wide_instruction_sets_keep_nan_and_inf_in_their_rows_and_columns(
    emulated_gram: Gram, name: str, dtype: torch.dtype
) -> None:
    x = torch.ones(37, 70, dtype=dtype)
    x[4, 50] = math.nan
    x[9, 65] = math.inf
    gram = torch.zeros(70, 70)
    emulated_gram(name, gram, x, 1.0)
    expected = torch.full((70, 70), 37.0)
    expected[65], expected[:, 65] = math.inf, math.inf
    expected[50], expected[:, 50] = math.nan, math.nan
    torch.testing.assert_close(gram, expected.tril(), rtol=0, atol=0, equal_nan=True)

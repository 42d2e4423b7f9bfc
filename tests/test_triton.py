"""The Triton kernels: against the reference in the interpreter (on the GPU where there is one), and compiled ahead of
time for GPUs that are not here, with what the compilers say about registers and memory accesses."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

HERE = Path(__file__).resolve().parent
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


PARTS = {
    "elementwise": "merge or statistics or importance or list or dimensions or under_test",
    "products": "gram or inverse or mask",
    "project": "project",
    "orthonormalize": "orthonormalize",
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", PARTS)
def test_every_kernel_agrees_with_the_reference(part: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HPA_BACKEND", None)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        PARTS[part],
        str(HERE / "triton_kernels.py"),
    ]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


class Compiled:
    """A kernel compiled for a GPU that need not be here."""

    def __init__(self, target: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], num_warps: int):
        aligned = [
            name for name, kind in signature.items() if kind.startswith("*") or name.endswith(("_stride", "cols"))
        ]
        source = ASTSource(
            fn=kernel,
            signature={**signature, **dict.fromkeys(constants, "constexpr")},
            constexprs=constants,
            attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        options = {"num_warps": num_warps, "num_stages": 2 if target.startswith("gfx") else 3}
        self.code = triton.compile(source, target=TARGETS[target], options=options)
        self.cuda = target.startswith("sm_")

    def spills(self) -> int:
        """Bytes a thread of local memory."""
        if not self.cuda:
            assembly = self.code.asm["amdgcn"]
            return sum(int(count) for count in re.findall(r"\.(?:v|s)gpr_spill_count: +(\d+)", assembly))
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.code.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))

    def count(self, access: str) -> int:
        """How many 128-bit accesses to global memory, ``access`` "load" or "store", the code has."""
        if self.cuda:
            return len(
                re.findall(
                    {"load": r"\bld\.global\S*\.v4\.b32", "store": r"\bst\.global\S*\.v4\.b32"}[access],
                    self.code.asm["ptx"],
                )
            )
        return len(
            re.findall(
                {"load": r"(?:global|buffer)_load_dwordx4", "store": r"(?:global|buffer)_store_dwordx4"}[access],
                self.code.asm["amdgcn"],
            )
        )


def assert_wide(compiled: Compiled, bytes_loaded: int, bytes_stored: int, threads: int) -> None:
    """No spills, and as many 128-bit accesses as the bytes of a tile need."""
    assert compiled.spills() == 0
    assert compiled.count("load") >= bytes_loaded // (16 * threads)
    assert compiled.count("store") >= bytes_stored // (16 * threads)


@pytest.fixture(autouse=True)
def nothing_is_compiled_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What Triton compiles stays in this test."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def threads_of(target: str, num_warps: int) -> int:
    return num_warps * TARGETS[target].warp_size


NAMES = {"bf16": 2, "fp32": 4}


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("target", TARGETS)
def test_merge_compiles_to_wide_accesses(target: str, dtype: str) -> None:
    import triton.language as tl

    from hpa_ext.triton.merge import merge_kernel

    weights = {"after": f"*{dtype}", "before": f"*{dtype}", "mask": "*i1", "projection_bits": "i64"}
    shape = {"rows": "i32", "cols": "i32", "after_row_stride": "i32", "before_row_stride": "i32"}
    ones = {"after_col_stride": 1, "before_col_stride": 1, "mask_stride": 1}
    constants = {**ones, "PROJECT": True, "ARITHMETIC": tl.float32, "BLOCK_ROWS": 4, "BLOCK_COLS": 1024}
    compiled = Compiled(target, merge_kernel, {**weights, **shape}, constants, 4)
    assert_wide(compiled, 2 * 4096 * NAMES[dtype], 4096 * NAMES[dtype], threads_of(target, 4))


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("target", TARGETS)
def test_change_statistics_compiles_to_wide_accesses(target: str, dtype: str) -> None:
    import triton.language as tl

    from hpa_ext.triton.change_statistics import fold_kernel, strip_kernel

    weights = {"before": f"*{dtype}", "after": f"*{dtype}", "partial_columns": "*fp64", "partial_scalars": "*fp64"}
    shape = {"rows": "i32", "cols": "i32", "programs": "i32", "before_row_stride": "i32", "after_row_stride": "i32"}
    constants = {"before_col_stride": 1, "after_col_stride": 1, "ARITHMETIC": tl.float32, "STEPS": 16}
    constants |= {"BLOCK_ROWS": 8, "BLOCK_COLS": 256}
    compiled = Compiled(target, strip_kernel, {**weights, **shape}, constants, 4)
    assert_wide(compiled, 2 * 2048 * NAMES[dtype], 0, threads_of(target, 4))
    partials = {"partial_columns": "*fp64", "partial_scalars": "*fp64", "column_change": "*fp32", "scalars": "*fp64"}
    shape = {"rows": "i32", "cols": "i32", "strips": "i32", "programs": "i32"}
    assert Compiled(target, fold_kernel, {**partials, **shape}, {"BLOCK_STRIPS": 32, "BLOCK_COLS": 64}, 4).spills() == 0


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("target", TARGETS)
def test_accumulate_importance_compiles_to_wide_accesses(target: str, dtype: str) -> None:
    import triton.language as tl

    from hpa_ext.triton.accumulate_importance import importance_kernel

    number = {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype]
    constants = {"IMPORTANCE": tl.float32, "GRAD": number, "WEIGHT": number, "TAYLOR": True, "UNIT": True}
    constants |= {"ALIGNED": True, "ARITHMETIC": tl.float32, "CHUNK": 4096}
    compiled = Compiled(target, importance_kernel, {"pieces": "*i64", "piece_of": "*i32"}, constants, 8)
    assert_wide(compiled, 4096 * (4 + 2 * NAMES[dtype]), 4096 * 4, threads_of(target, 8))


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("target", TARGETS)
def test_accumulate_gram_compiles_to_matrix_units_and_wide_accesses(target: str, dtype: str) -> None:
    from hpa_ext.triton.accumulate_gram import _tile, fold_kernel, gram_kernel

    block, block_tokens, num_warps = _tile({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], 4096)
    signature = {"partial": "*fp32", "x": f"*{dtype}", "tokens": "i32", "cols": "i32", "per_split": "i32"}
    constants = {"x_col_stride": 1, "SPAN": 2048, "BLOCK": block, "BLOCK_TOKENS": block_tokens}
    compiled = Compiled(target, gram_kernel, {**signature, "x_row_stride": "i32"}, constants, num_warps)
    assert_wide(compiled, 0, block * block * 4, threads_of(target, num_warps))
    units = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "gfx942": "v_mfma_f32_32x32x8_bf16"}[target]
    assert (units in compiled.code.asm["ptx" if compiled.cuda else "amdgcn"]) == (dtype == "bf16")
    assert "tf32" not in compiled.code.asm.get("ptx", "")
    signature = {"gram": "*fp32", "partial": "*fp32", "scale_bits": "i64", "cols": "i32", "splits": "i32"}
    constants = {"gram_col_stride": 1, "BLOCK": block}
    compiled = Compiled(target, fold_kernel, {**signature, "gram_row_stride": "i32"}, constants, block // 8)
    assert_wide(compiled, 2 * block * block * 4, block * block * 4, threads_of(target, block // 8))


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("target", TARGETS)
def test_project_compiles_to_wide_accesses(target: str, dtype: str) -> None:
    from hpa_ext.triton import project

    table = {"pieces": "*i64", "piece_of": "*i32"}
    sizes = {"vectors": "i32", "rank": "i32"}
    number = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    tables = project.table_of([[torch.zeros(1, 8192, dtype=number)], [torch.zeros(9, 8192, dtype=number)]], 1, 8192)
    size = NAMES[dtype]

    for vectors, kernels in ((1, ("dot_kernel", "update_kernel")), (64, ("matrix_dot_kernel", "matrix_update_kernel"))):
        grads, basis = [torch.zeros(vectors, 8192, dtype=number)], [torch.zeros(9, 8192, dtype=number)]
        launch = (project._Matrix if vectors > 1 else project._Vectors)(
            tables[0], grads, basis, project.arithmetic(*grads), 8192
        )
        for kernel, partial in zip(kernels, ({"partial": "*fp64"}, {"coefficients": "*fp32"}), strict=True):
            options = dict(launch.constants)
            if vectors > 1:
                options |= launch.dot_constants if kernel == kernels[0] else launch.update_constants
            num_warps = options.pop("num_warps")
            if "dot" in kernel:
                options["BLOCK"] = project.BLOCK
            compiled = Compiled(target, getattr(project, kernel), {**table, **partial, **sizes}, options, num_warps)
            assert options["ALIGNED"]
            assert compiled.spills() == 0
            if vectors == 1:
                assert compiled.count("load") >= 8 * 256 * size // (16 * threads_of(target, num_warps))


@pytest.mark.parametrize("target", TARGETS)
def test_a_float64_basis_of_bfloat16_grads_compiles(target: str) -> None:
    """The one way from float64 to bfloat16, which the interpreter does not go as machines do."""
    from hpa_ext.triton import project

    grads, basis = [torch.zeros(1, 512, dtype=torch.bfloat16)], [torch.zeros(9, 512, dtype=torch.float64)]
    table = project.table_of([grads, basis], 1, 512)[0]
    options = project._Vectors(table, grads, basis, project.arithmetic(*grads, *basis), 512).constants
    num_warps = options.pop("num_warps")
    signature = {"pieces": "*i64", "piece_of": "*i32", "coefficients": "*fp64", "vectors": "i32", "rank": "i32"}
    compiled = Compiled(target, project.update_kernel, signature, options, num_warps)
    assert compiled.spills() == 0
    if compiled.cuda:  # in one instruction, or by way of float32 rounded so that the second rounding is the only one
        conversion = "cvt.rn.bf16.f64" if target == "sm_90" else "cvt.rn.f32.f64"
        assert conversion in compiled.code.asm["ptx"]


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("target", TARGETS)
def test_orthonormalize_and_inverse_diagonal_compile_without_spills(target: str, dtype: str) -> None:
    import triton.language as tl

    from hpa_ext.triton.orthonormalize import apply_kernel, factor_kernel, gram_kernel

    rows = {"block": f"*{dtype}", "rows": "i32", "n": "i32", "row_stride": "i32"}
    constants = {"col_stride": 1, "ARITHMETIC": tl.float32, "SIZE": 8}
    gram = Compiled(target, gram_kernel, {**rows, "partial": "*fp64"}, {**constants, "CHUNK": 4096, "SPAN": 64}, 4)
    apply = Compiled(target, apply_kernel, {**rows, "transform": "*fp64"}, {**constants, "COLS": 128}, 4)
    assert gram.spills() == apply.spills() == 0
    if dtype == "fp32":
        signature = {"partial": "*fp64", "transform": "*fp64", "lengths": "*fp64", "kept": "*i32", "rtol_bits": "i64"}
        sizes = {"chunks": "i32", "rows": "i32"}
        factor = Compiled(target, factor_kernel, {**signature, **sizes}, {"SECOND": False, "SIZE": 8, "FOLD": 32}, 1)
        assert factor.spills() == 0
        damp = importlib.import_module("hpa_ext.triton.inverse_diagonal").damp_kernel
        signature = {"gram": "*fp32", "matrix": "*fp32", "lam": "*fp64", "finite": "*i32", "cols": "i32"}
        constants = {"col_stride": 1, "REVERSED": True, "BLOCK": 64}
        assert Compiled(target, damp, {**signature, "row_stride": "i32"}, constants, 4).spills() == 0

"""The build: its options, and an editable install.  Skipped where no compiler or CMake is at hand."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# The environment's own first, as the isolated build takes it: a system's may be too old.
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

pytestmark = pytest.mark.skipif(
    not (CMAKE and shutil.which("ninja") and (shutil.which("g++") or shutil.which("clang++"))),
    reason="needs cmake, ninja and a C++ compiler",
)
needs_backend = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("scikit_build_core", "pybind11", "pip")),
    reason="needs scikit-build-core, pybind11 and pip in this environment",
)


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(CMAKE), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        command.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)


def test_cuda_on_fails_and_says_why(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DHPA_CUDA=ON", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert result.returncode != 0
    assert "HPA_CUDA=ON: not built: no CUDA compiler found" in " ".join(result.stderr.split())


def test_cuda_takes_three_values(tmp_path: Path) -> None:
    result = configure(tmp_path, "-DHPA_CUDA=maybe")
    assert result.returncode != 0
    assert "HPA_CUDA: expected AUTO, ON or OFF, got 'maybe'" in result.stderr


@needs_backend
@pytest.mark.parametrize(
    ("choice", "message"),
    [("AUTO", "not built: no CUDA compiler found"), ("OFF", "not built: switched off")],
)
def test_without_cuda_the_build_goes_on_and_says_so(tmp_path: Path, choice: str, message: str) -> None:
    result = configure(tmp_path, f"-DHPA_CUDA={choice}", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert result.returncode == 0, result.stderr
    assert f"hpa-ext CUDA: {message}" in result.stdout


@needs_backend
@pytest.mark.slow
def test_an_editable_install_builds_without_warnings_and_imports_from_everywhere(tmp_path: Path) -> None:
    # An environment of its own, which borrows the libraries of this one.
    venv.create(tmp_path / "venv", with_pip=False)
    interpreter = tmp_path / "venv" / "bin" / "python"
    (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(str(Path(torch.__file__).resolve().parent.parent))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON", "HPA_"))}
    install = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet", "--no-deps"]
        + ["--disable-pip-version-check", "--no-warn-script-location", "--no-build-isolation", "--ignore-installed"]
        + ["-C", f"build-dir={tmp_path / 'build'}", "-C", "cmake.build-type=Debug", "-C", "cmake.define.HPA_WERROR=ON"]
        + ["-C", "cmake.define.HPA_CUDA=OFF"]  # minutes of nvcc, and nothing to learn here
        + ["--editable", str(ROOT)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert install.returncode == 0, install.stdout + install.stderr
    code = """
import hpa_ext, torch
from hpa_ext import backend
print(hpa_ext.__file__)
print(backend.extension().__file__)
one = torch.ones(1, 1)
assert hpa_ext.change_statistics(one, 3 * one, backend="cpu").change_norm_sq == 4
"""
    for cwd in (ROOT, tmp_path):
        result = subprocess.run(
            [str(interpreter), "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        package, module = (Path(line).resolve().parent for line in result.stdout.split())
        assert package == ROOT / "hpa_ext"
        assert module == (site_packages / "hpa_ext").resolve()

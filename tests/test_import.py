"""``import hpa_ext`` from the repository root, from anywhere else, installed and editable.

The package folder at the root hides the installed one when Python starts there.  Each case runs in a process of its
own; an installed copy is laid out in a folder of its own, so that the tests do not depend on how this environment was
made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hpa_ext
from hpa_ext import backend

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = Path(torch.__file__).resolve().parent.parent

REPORT = """
import hpa_ext, torch
from hpa_ext import backend
print(hpa_ext.__file__)
print(backend.extension().__file__)
hpa_ext.merge_(torch.ones(2, 3), torch.zeros(2, 3), torch.ones(3, dtype=torch.bool), backend="cpu")
"""


def python(code: str, cwd: Path, *, path: list[Path] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code in ``cwd``; with ``path``, without the site's own hooks and with these folders to import from."""
    command = [sys.executable, *(["-S"] if path else []), "-c", code]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HPA_", "PYTHON"))}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def imported_from(result: subprocess.CompletedProcess[str]) -> list[Path]:
    assert result.returncode == 0, result.stderr
    return [Path(line).resolve().parent for line in result.stdout.split()]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A site-packages folder with the package and its compiled module, as a wheel lays them out."""
    site = tmp_path / "site-packages"
    source = Path(hpa_ext.__file__).parent
    shutil.copytree(source, site / "hpa_ext", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(backend.extension().__file__, site / "hpa_ext")
    return site


def test_this_environment_imports_from_the_root_and_from_anywhere_else(tmp_path: Path) -> None:
    for cwd in (ROOT, tmp_path):
        package, module = imported_from(python(REPORT, cwd))
        assert module == Path(backend.extension().__file__).resolve().parent
        assert package in (ROOT / "hpa_ext", module)


def test_an_installed_package_is_found_from_anywhere(installed: Path, tmp_path: Path) -> None:
    package, module = imported_from(python(REPORT, tmp_path, path=[installed, LIBRARIES]))
    assert package == module == installed / "hpa_ext"


def test_the_source_tree_finds_the_installed_module(installed: Path) -> None:
    package, module = imported_from(python(REPORT, ROOT, path=[installed, LIBRARIES]))
    assert package == ROOT / "hpa_ext"
    assert module == installed / "hpa_ext"


def test_the_source_tree_refuses_a_module_of_another_version(installed: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(installed / "hpa_ext", tree / "hpa_ext", ignore=shutil.ignore_patterns("*.so"))
    init = tree / "hpa_ext" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{hpa_ext.__version__}"', '"9.9.9"'))
    result = python(REPORT, tree, path=[installed, LIBRARIES])
    assert result.returncode != 0
    assert f"is of version {hpa_ext.__version__} (interface" in result.stderr
    assert "of version 9.9.9" in result.stderr


def test_importing_needs_no_compiled_module(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["hpa_ext._cpu"] = None
import hpa_ext, torch
one = torch.ones(1, 1)
print(hpa_ext.change_statistics(one, 3 * one, backend="reference").change_norm_sq.item())
try:
    hpa_ext.change_statistics(one, one)
except hpa_ext.BackendError as error:
    print("pip install" in str(error))
"""
    result = python(code, tmp_path)
    assert result.stdout.split() == ["4.0", "True"], result.stderr


def test_the_compiled_module_knows_nothing_of_torch(installed: Path, tmp_path: Path) -> None:
    code = f"""
import sys, importlib.machinery, importlib.util
path = {str(installed / "hpa_ext" / Path(backend.extension().__file__).name)!r}
loader = importlib.machinery.ExtensionFileLoader("_cpu", path)
module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("_cpu", path, loader=loader))
loader.exec_module(module)
assert "torch" not in sys.modules and "numpy" not in sys.modules
with open("/proc/self/maps") as maps:
    assert not any("torch" in line for line in maps)
print(module.isa())
"""
    result = python(code, tmp_path, path=[tmp_path])
    assert result.stdout.strip() in backend.extension().available_isas(), result.stderr


def test_the_summary_says_what_was_built_and_what_runs(tmp_path: Path) -> None:
    environment = {**os.environ, "HPA_BACKEND": "", "HPA_NUM_THREADS": "3", "HPA_ISA": "baseline"}
    result = subprocess.run(
        [sys.executable, "-m", "hpa_ext"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    lines = {label.strip(): value.strip() for label, value in lines.items()}
    assert lines["hpa-ext"] == hpa_ext.__version__
    assert lines["compiled module"] == backend.extension().__file__
    assert lines["CUDA"].startswith(("not built: ", "built with nvcc "))
    assert "in use: baseline" in lines["instruction sets"]
    assert lines["threads"].startswith("3 ")
    assert lines["backends"].split(", ") == list(backend.BACKENDS)
    assert lines["tensors on cpu"] == "cpu (automatic)"


@pytest.mark.parametrize(("forced", "message"), [("avx1024", "HPA_ISA: expected one of 'baseline'"), ("", "")])
def test_a_forced_instruction_set_that_does_not_exist_raises(tmp_path: Path, forced: str, message: str) -> None:
    environment = {**os.environ, "HPA_ISA": forced}
    result = subprocess.run(
        [sys.executable, "-c", REPORT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode != 0) == bool(message)
    assert message in result.stderr

"""The one rule of the house: imports point down only (hpa -> hpa_ext -> csrc), and csrc knows neither Python nor torch
outside csrc/bindings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABOVE_HPA_EXT = {"hpa", "transformers", "peft", "accelerate", "datasets"}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
PYTHON_OR_TORCH = re.compile(r"^(Python\.h|pybind11/|torch/|ATen/|c10/|dlpack/)")


def imported_modules(source: str) -> set[str]:
    """Top-level names of every absolute import in a Python source text, wherever it stands in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_the_import_finder_sees_nested_and_plain_imports():
    assert imported_modules("import a.b\ndef f():\n    from c.d import e\nfrom . import g") == {"a", "c"}


@pytest.mark.parametrize("path", sorted((ROOT / "hpa_ext").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_hpa_ext_imports_nothing_from_above(path: Path):
    assert not imported_modules(path.read_text()) & ABOVE_HPA_EXT


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}),
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_kernels_know_neither_python_nor_torch(path: Path):
    if (ROOT / "csrc" / "bindings") in path.parents:
        return
    offending = [name for name in INCLUDE.findall(path.read_text()) if PYTHON_OR_TORCH.match(name)]
    assert not offending, f"{path.name} includes {offending}: only csrc/bindings may"

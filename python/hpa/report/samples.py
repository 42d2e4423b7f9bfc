"""The sample answers of a run, gathered so that the aligned model and each method stand side by side."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpa.report.events import Run
from hpa.report.summary import ALIGNED, groups

__all__ = ["SHOWN", "Answer", "Sample", "Samples", "gather_samples", "picture"]

SHOWN = {"task": 1, "base": 1, "safety": 2, "benign": 1}
"""How many samples of each task, base skill, safety set and benign set are shown."""

_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))
_LARGEST = 96 * 1024


@dataclass(frozen=True)
class Answer:
    """What one model said, and the verdict: ``correct``, ``wrong``, ``refused``, ``complied`` or ``empty``."""

    label: str
    text: str
    verdict: str


@dataclass(frozen=True)
class Sample:
    """One prompt with all answers to it; ``family`` is ``task``, ``base``, ``safety`` or ``benign``."""

    kind: str
    image: str | None
    prompt: str
    reference: str
    answers: tuple[Answer, ...]

    @property
    def family(self) -> str:
        return self.kind.partition(":")[0]

    @property
    def set_name(self) -> str:
        return self.kind.partition(":")[2] or self.kind


@dataclass(frozen=True)
class Samples:
    """The first samples of each kind in the order they were stored, not chosen by how they came out."""

    seed: int
    samples: tuple[Sample, ...]
    stored: int


def gather_samples(run: Run, condition: str) -> Samples | None:
    """The samples of the first seed that has any: the aligned model's answers and each method's last ones."""
    for seed in run.seeds:
        columns: dict[str, Mapping[tuple[str, str, str], dict[str, Any]]] = {}
        if run.aligned_answers.get(seed):
            columns[ALIGNED] = _by_prompt(run.aligned_answers[seed])
        for group in groups(run, condition):
            branch = next((branch for branch in group.branches if branch.seed == seed and branch.answers), None)
            if branch is not None and not group.control:
                columns[group.label] = _by_prompt(branch.answers[max(branch.answers)])
        if any(label != ALIGNED for label in columns):
            return _merge(seed, columns)
    return None


def picture(run: Run, image: str) -> str | None:
    """A stored picture as a data URL; ``None`` where it is missing, too large, no picture, or outside the folder."""
    folder = run.folder.resolve()
    try:
        path = (folder / image).resolve()
        if not path.is_relative_to(folder) or not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        data = path.read_bytes()
    except (OSError, ValueError):
        return None
    kind = next((kind for signature, kind in _SIGNATURES if data.startswith(signature)), None)
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}" if kind else None


def _merge(seed: int, columns: Mapping[str, Mapping[tuple[str, str, str], dict[str, Any]]]) -> Samples:
    keys: dict[tuple[str, str, str], None] = {}
    for answers in columns.values():
        keys.update(dict.fromkeys(answers))
    shown: list[Sample] = []
    count: dict[str, int] = {}
    for key in keys:
        kind, image, prompt = key
        count[kind] = count.get(kind, 0) + 1
        if count[kind] > SHOWN.get(kind.partition(":")[0], 1):
            continue
        found = {label: answers[key] for label, answers in columns.items() if key in answers}
        shown.append(
            Sample(
                kind=kind,
                image=image or None,
                prompt=prompt,
                reference=str(next(iter(found.values())).get("reference") or ""),
                answers=tuple(
                    Answer(label, str(item.get("answer") or ""), str(item.get("verdict") or ""))
                    for label, item in found.items()
                ),
            )
        )
    order = {"task": 0, "base": 1, "safety": 2, "benign": 3}
    shown.sort(key=lambda sample: order.get(sample.family, 4))
    return Samples(seed, tuple(shown), len(keys))


def _by_prompt(items: Sequence[Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {
        (str(item.get("kind") or ""), str(item.get("image") or ""), str(item.get("prompt") or "")): item
        for item in items
        if isinstance(item, dict)
    }

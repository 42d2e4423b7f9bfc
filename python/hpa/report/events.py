"""Reading the event lines of a run folder, and ordering them into branches.

``events.jsonl`` holds one JSON object a line and is the only source of every table and figure.  A run that was
killed may leave a torn last line, and a resumed run may write a step again: then the later line wins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Branch", "Run", "load_run", "read_events"]

Event = dict[str, Any]

# What makes two lines the same step.  An event that is not named here is told apart by all of these fields.
_KEYS: dict[str, tuple[str, ...]] = {
    "run": (),
    "aligned": ("seed", "stage"),
    "branch": ("branch",),
    "train": ("branch", "task_index"),
    "edit": ("branch", "task_index"),
    "evaluate": ("branch", "task_index"),
    "answers": ("branch", "task_index"),
    "finished": ("branch",),
}
_ANY_KEY = ("branch", "seed", "stage", "task_index")


def read_events(run_dir: str | Path) -> list[Event]:
    """The events of a run, in the order of their first appearance; of equal keys the later line is returned.

    Lines that are no JSON object (the torn end of a killed run) are left out.

    Raises:
        FileNotFoundError: if the folder holds no ``events.jsonl``.
    """
    return _read(Path(run_dir))[0]


@dataclass
class Branch:
    """One sequence of tasks with one method and one seed.

    ``evaluations``, ``trainings``, ``edits`` and ``answers`` are keyed by the 0-based task index.
    """

    id: str
    label: str
    method: str
    condition: str
    harmful_fraction: float
    seed: int
    learning_rate: float | None
    control: bool
    options: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[int, Event] = field(default_factory=dict)
    trainings: dict[int, Event] = field(default_factory=dict)
    edits: dict[int, Event] = field(default_factory=dict)
    answers: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    finished: bool = False
    seconds: float | None = None

    def last(self) -> Event | None:
        """The evaluation after the latest task, or ``None`` before the first one."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None


@dataclass
class Run:
    """A run folder, read.

    ``aligned`` is keyed by ``(seed, stage)`` with stage ``"before"`` or ``"after"`` alignment; ``aligned_answers``
    by seed.  ``planned`` holds condition, label and seed of every sequence that the recipe asks for.
    """

    folder: Path
    info: Event
    branches: list[Branch]
    aligned: dict[tuple[int, str], Event]
    aligned_answers: dict[int, list[dict[str, Any]]]
    recipe: str | None
    planned: list[tuple[str, str, int]]
    events: int
    damaged_lines: list[int]

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.folder.name)

    @property
    def tasks(self) -> list[str]:
        """The tasks in the order in which they are learned."""
        order = self.info.get("task_order") or self.info.get("tasks")
        if order:
            return [str(task) for task in order]
        longest: dict[int, str] = {}
        for branch in self.branches:
            steps = branch.evaluations or branch.trainings
            if len(steps) > len(longest):
                longest = {index: str(event.get("task")) for index, event in steps.items()}
        return [longest[index] for index in sorted(longest)]

    @property
    def base_tasks(self) -> list[str]:
        return self._names("base_tasks", "base")

    @property
    def safety_sets(self) -> list[str]:
        return self._names("safety_sets", "safety")

    @property
    def benign_sets(self) -> list[str]:
        return self._names("benign_sets", "benign")

    @property
    def conditions(self) -> list[str]:
        """Condition names in the order of appearance, the clean ones (fewest harmful samples) first."""
        fractions: dict[str, float] = {}
        for branch in self.branches:
            fractions.setdefault(branch.condition, branch.harmful_fraction)
        return sorted(fractions, key=lambda name: fractions[name])

    @property
    def seeds(self) -> list[int]:
        return sorted({branch.seed for branch in self.branches} | {seed for seed, _ in self.aligned})

    def condition(self, name: str | None = None) -> str:
        """``name``, or the first condition where it is ``None``.

        Raises:
            ValueError: no such condition.
        """
        chosen = name if name is not None else next(iter(self.conditions), None)
        if chosen is None or chosen not in self.conditions:
            raise ValueError(f"condition: expected one of {self.conditions}, got {chosen!r}")
        return chosen

    def aligned_at(self, stage: str) -> dict[int, Event]:
        """Seed to the evaluation ``"before"`` or ``"after"`` alignment, in the order of seeds."""
        return {seed: event for (seed, kind), event in sorted(self.aligned.items()) if kind == stage}

    def complete(self, branch: Branch) -> bool:
        """Whether every task of the sequence has been learned and evaluated."""
        return bool(self.tasks) and set(range(len(self.tasks))) <= set(branch.evaluations)

    def _names(self, key: str, part: str) -> list[str]:
        """Set names as the run declared them, else as the evaluations name them."""
        declared = self.info.get(key)
        if declared:
            return [str(name) for name in declared]
        seen: dict[str, None] = {}
        for branch in self.branches:
            for event in branch.evaluations.values():
                seen.update(dict.fromkeys(_mapping(event.get(part))))
        return list(seen)


def load_run(run_dir: str | Path) -> Run:
    """Read a run folder: its events, ordered, and its recipe.

    Raises:
        FileNotFoundError: if the folder holds no ``events.jsonl``.
    """
    folder = Path(run_dir)
    events, damaged = _read(folder)
    path = folder / "recipe.yaml"
    recipe = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    run = Run(
        folder=folder,
        info=next((event for event in events if event["event"] == "run"), {}),
        branches=[],
        aligned={},
        aligned_answers={},
        recipe=recipe,
        planned=_planned(recipe),
        events=len(events),
        damaged_lines=damaged,
    )
    branches: dict[str, Branch] = {}
    for event in events:
        if event["event"] == "branch":
            branch = _branch(event)
            branches[branch.id] = branch
        elif event["event"] == "aligned":
            run.aligned[int(event.get("seed", 0)), str(event.get("stage", "after"))] = event
    for event in events:
        _attach(run, branches, event)
    run.branches = list(branches.values())
    return run


def _read(folder: Path) -> tuple[list[Event], list[int]]:
    """Events by first appearance with the later line winning, and the 1-based numbers of unreadable lines."""
    path = folder / "events.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"run_dir: expected a run folder with events.jsonl, got {folder}")
    kept: dict[tuple[Any, ...], Event] = {}
    damaged: list[int] = []
    # Split on "\n" alone: str.splitlines would also break at the rarer separators that JSON leaves unescaped.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:  # covers JSONDecodeError and UnicodeDecodeError
            event = None
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            damaged.append(number)
            continue
        key = (event["event"], *(repr(event.get(name)) for name in _KEYS.get(event["event"], _ANY_KEY)))
        kept[key] = event
    return list(kept.values()), damaged


def _branch(event: Event) -> Branch:
    rate = event.get("learning_rate")
    return Branch(
        id=str(event.get("branch")),
        label=str(event.get("label") or event.get("method") or event.get("branch")),
        method=str(event.get("method", "")),
        condition=str(event.get("condition") or "default"),
        harmful_fraction=float(event.get("harmful_fraction") or 0.0),
        seed=int(event.get("seed", 0)),
        learning_rate=None if rate is None else float(rate),
        control=bool(event.get("control", False)),
        options=dict(_mapping(event.get("options"))),
    )


def _attach(run: Run, branches: Mapping[str, Branch], event: Event) -> None:
    """Hang one step on its branch; steps of a branch that was never announced are left out."""
    kind, name = event["event"], str(event.get("branch"))
    if kind == "answers" and name.startswith("aligned"):
        digits = name.rpartition("seed")[2]
        run.aligned_answers[int(digits) if digits.isdigit() else 0] = list(event.get("items") or [])
        return
    branch = branches.get(name)
    if branch is None:
        return
    if kind == "finished":
        branch.finished = True
        branch.seconds = event.get("seconds")
    elif kind in ("train", "edit", "evaluate", "answers"):
        index = int(event.get("task_index", -1))
        if kind == "answers":
            branch.answers[index] = list(event.get("items") or [])
        else:
            {"train": branch.trainings, "edit": branch.edits, "evaluate": branch.evaluations}[kind][index] = event


def _planned(recipe: str | None) -> list[tuple[str, str, int]]:
    """Condition, label and seed of every sequence that a recipe asks for; empty where it cannot be told."""
    try:
        content = yaml.safe_load(recipe or "")
        conditions = [str(condition["name"]) for condition in content["conditions"]]
        return [
            (condition, str(row["label"]), int(seed))
            for row in content["methods"]
            for condition in conditions
            for seed in content["seeds"]
            if condition in (row.get("conditions") or conditions) and seed in (row.get("seeds") or content["seeds"])
        ]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}

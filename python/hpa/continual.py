"""The continual loop: for each task train -> edit -> evaluate, for many methods, conditions and seeds, and resumable.

A *branch* is one row of the recipe under one condition with one seed: one model taken through all tasks.  What
branches have in common is computed once: the base model, the alignment of each seed, and the first task's training,
which is the same for every row that trains alike.

Every step leaves its state (safetensors, written beside and renamed) and then one line in the branch's journal.  A
run that was killed, however hard, goes on behind the last line and ends with the same numbers: every draw is seeded by
:func:`derive_seed` from what it is for, never by the state of a global generator.  The draws do not depend on the
method or the condition, so rows are compared on the same samples, in the same order, from the same initial factors.

The run folder::

    recipe.yaml                 what the folder holds, resolved
    events.jsonl                every step, one JSON object a line: the only source of tables and plots
    samples/                    a few test pictures
    shared/base/                fingerprint of the base model, and its figures
    shared/samples/             fingerprints of the sets that were read
    shared/seed0/               aligned model, its refusals (the safety calibration set), first trainings, journal
    branches/<condition>/<row>/seed0/   journal, answers.jsonl, and the state of the last step while it runs
"""

from __future__ import annotations

import datetime
import hashlib
import inspect
import io
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from hpa.adapt import edit_model, remember
from hpa.calibration import LayerSpec, find_layers
from hpa.config import CalibrationConfig
from hpa.data.scenario import Sample, Scenario
from hpa.data.unchanged import digest_of, unchanged
from hpa.evaluation import Answer, Evaluation, Evaluator, get_judge, get_scorer
from hpa.evaluation.judge import missing_list
from hpa.layers import LowRankUpdate
from hpa.methods import Method, create_method
from hpa.recipe import (
    Condition,
    MethodRow,
    RecipeError,
    RunConfig,
    TaskTraining,
    changed_keys,
    open_scenario,
    parse_recipe,
    slug,
)
from hpa.safety_set import build_safety_set
from hpa.storage import Journal, RunFolderError, RunLock, dump_line, load_tensors, read_lines, save_tensors, write_file
from hpa.training import Lesson, TrainingHooks, merge_updates, sample_batches, train_lora

__all__ = [
    "Branch",
    "Failure",
    "Listener",
    "RunResult",
    "Session",
    "Unit",
    "default_cache",
    "derive_seed",
    "machine",
    "plan_branches",
    "run",
    "versions",
]

Event = dict[str, Any]

LOSS_POINTS = 60
"""Points of a loss curve in an event, at most."""
SHOWN_PER_SET = 3
"""Samples of each set whose answers (and pictures) go into the events, for a report to show."""


class Listener(Protocol):
    """Who is told how a run goes; see :mod:`hpa.progress`."""

    def expect(self, steps: Sequence[tuple[str, str, int]], workers: int) -> None:
        """The steps that are still to do, as (where, kind, task index), and how many processes share them."""

    def message(self, text: str) -> None:
        """Something a reader of the log wants to know."""

    def progress(self, where: str, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` inside a step; ``total`` 0 where it is not known."""

    def event(self, event: Event) -> None:
        """A step is finished and on disk."""

    def ended(self, where: str) -> None:
        """Nothing more will be heard of ``where``."""

    def failed(self, failure: Failure) -> None:
        """A branch cannot go on; the others do."""


@dataclass(frozen=True)
class Branch:
    """One row under one condition with one seed."""

    id: str
    row: MethodRow
    condition: Condition
    seed: int
    training: TaskTraining

    def event(self) -> Event:
        return {
            "event": "branch",
            "branch": self.id,
            "label": self.row.label,
            "method": self.row.method,
            "options": self.row.options,
            "condition": self.condition.name,
            "harmful_fraction": self.condition.harmful_fraction,
            "seed": self.seed,
            "learning_rate": self.training.learning_rate,
            "control": self.row.control,
        }


@dataclass(frozen=True)
class Unit:
    """What one process does in one go.

    Attributes:
        id: the branch's id; for the others ``base model``, ``aligned:seed0`` or ``first task of seed0 (...)``.
        kind: ``base`` judges the base model; ``align`` makes and judges the aligned model of a seed; ``first`` is a
            training from the aligned model that several branches need; ``branch`` is a whole branch.
        seed: which seed it belongs to (any, for ``base``).
        branch: id of the branch, of one of the branches for ``first``; empty for the others.
        after: ids of units that must be over before.
        task_index: 0-based task of a ``first``.
    """

    id: str
    kind: Literal["base", "align", "first", "branch"]
    seed: int
    branch: str = ""
    after: tuple[str, ...] = ()
    task_index: int = 0


@dataclass(frozen=True)
class Failure:
    """Work that could not be done.

    Attributes:
        where: id of the unit: a branch, or what branches wait for.
        error: type and message, in one line.
        traceback: the whole story.
        log: file that holds it too.
    """

    where: str
    error: str
    traceback: str = field(repr=False)
    log: Path


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        folder: the run folder.
        finished: ids of the recipe's branches that are complete.
        failures: those that are not, and why.
    """

    folder: Path
    finished: list[str]
    failures: list[Failure]


def run(
    config: RunConfig,
    folder: Path,
    *,
    listener: Listener | None = None,
    cache: Path | None = None,
) -> RunResult:
    """Carry out a recipe in ``folder``, or whatever is left of it.

    Args:
        config: the recipe.
        folder: made where it does not exist; a folder of the same recipe is continued.
        listener: told about every step.
        cache: where base models are kept between runs; by default :func:`default_cache`.

    Returns:
        the finished branches and the failed ones; one failed branch does not stop the others.

    Raises:
        RunFolderError: the folder is in use, or holds another recipe's results.
        RecipeError: the recipe names what does not exist.
    """
    from hpa.workers import run_units

    told: Listener = listener or _Silent()
    folder = folder.absolute()
    with RunLock(folder) as lock:
        kept = _checked(config, folder)
        session = Session(config, folder, cache=cache or default_cache())
        write_file(folder / "recipe.yaml", kept.to_yaml())
        if lock.former is not None:
            told.message(
                f"process {lock.former} left this folder in the middle of a run; going on behind its last step"
            )
        _remove_torn_files(folder)
        log = _EventLog(folder, session, told)
        try:
            units = session.units_left()
            told.expect(session.steps_left(), min(config.jobs, max(1, len(units))))
            failures: list[Failure] = []
            if units:
                session.open_base(log)
                failures = run_units(session, units, log)
        finally:
            # Also when the run is interrupted: what is finished is on disk, and a report may be made of it.
            log.rewrite()
    finished = [branch.id for branch in session.branches if session.is_finished(branch)]
    return RunResult(folder, finished, failures)


def default_cache() -> Path:
    """``$HPA_CACHE``, else ``hpa`` in the user's cache folder."""
    chosen = os.environ.get("HPA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpa"


def derive_seed(seed: int, *purpose: str) -> int:
    """A seed in [0, 2^31) for one purpose: the first 31 bits of SHA-256 over ``seed`` and the words.

    Purposes never share a stream, and adding one changes no other.
    """
    digest = hashlib.sha256("\x1f".join([str(seed), *purpose]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def plan_branches(config: RunConfig) -> list[Branch]:
    """All branches of a recipe: by seed, then condition, then row."""
    branches = []
    for seed in config.seeds:
        for condition in config.conditions:
            for row in config.methods:
                if (row.conditions is None or condition.name in row.conditions) and (
                    row.seeds is None or seed in row.seeds
                ):
                    name = f"{slug(condition.name)}/{slug(row.label)}/seed{seed}"
                    branches.append(Branch(name, row, condition, seed, config.training_of(row)))
    return branches


class Session:
    """A recipe with its scenario and its base model in one process; carries out steps.

    The model is one object: a step loads the weights that it starts from into it.  Only the decoder's linear layers
    ever change, so these are all that is stored.
    """

    def __init__(self, config: RunConfig, folder: Path, *, cache: Path) -> None:
        self.config = config
        self.folder = folder
        self.cache = cache
        missing = missing_list(config.evaluation.judge)
        try:
            self.scenario: Scenario = unchanged(
                open_scenario(config.scenario, config.scenario_options), folder / "shared" / "samples"
            )
        except RecipeError as error:
            raise error if missing is None else RecipeError(f"{error}\n  {missing} (evaluation.judge)") from None
        if missing is not None:
            raise RecipeError(f"evaluation.judge: no such file: {missing}; expected a list of keywords")
        config.check_against(self.scenario)
        self.tasks: tuple[str, ...] = tuple(config.tasks or self.scenario.tasks)
        self.branches = plan_branches(config)
        self.seeds = sorted({branch.seed for branch in self.branches})
        settings = config.evaluation
        self.evaluator = Evaluator(
            self.scenario,
            judge=get_judge(settings.judge),
            scorer=get_scorer(settings.scorer),
            scorers={task: get_scorer(name) for task, name in settings.scorers.items()},
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            limit=settings.limit,
        )
        self._model: nn.Module | None = None
        self._layers: list[LayerSpec] = []
        self._base: dict[str, Tensor] = {}
        self._aligned: dict[int, dict[str, Tensor]] = {}
        self._train_sets: dict[tuple[str, int, int, float], list[Sample]] = {}

    # ---------------------------------------------------------------------------------------------- what is left

    def branch(self, name: str) -> Branch:
        return next(branch for branch in self.branches if branch.id == name)

    def branch_folder(self, branch: Branch) -> Path:
        return self.folder / "branches" / branch.id

    def seed_folder(self, seed: int) -> Path:
        return self.folder / "shared" / f"seed{seed}"

    def is_finished(self, branch: Branch) -> bool:
        lines = read_lines(self.branch_folder(branch) / "events.jsonl")
        return any(event["event"] == "finished" for event in lines)

    def units_left(self) -> list[Unit]:
        """What is still to do: each unit after those that it waits for, branches by seed."""
        left = [branch for branch in self.branches if not self.is_finished(branch)]
        sharing: dict[Path, list[str]] = {}
        for branch in left:
            for path, _ in self._shared_left(branch):
                sharing.setdefault(path, []).append(branch.id)
        units: list[Unit] = []
        for seed in self.seeds:
            if not self._is_aligned(seed):
                units.append(Unit(f"aligned:seed{seed}", "align", seed))
            if seed == self.seeds[0] and self._seeds_without_base():
                units.append(Unit("base model", "base", seed))
        waited_for = {unit.id for unit in units}
        for branch in left:
            aligned = f"aligned:seed{branch.seed}"
            aligned_first = (aligned,) if aligned in waited_for else ()
            after = aligned_first
            for path, index in self._shared_left(branch):
                if len(sharing[path]) < 2:
                    continue
                which = "first task" if index == 0 else f"task {self.tasks[index]}"
                first = f"{which} of seed{branch.seed} ({path.stem.removeprefix('first-')})"
                if first not in waited_for:
                    waited_for.add(first)
                    units.append(Unit(first, "first", branch.seed, branch.id, aligned_first, index))
                after = (*after, first)
            units.append(Unit(branch.id, "branch", branch.seed, branch.id, after))
        return units

    def carry_out(self, unit: Unit, listener: Listener) -> None:
        """Do one unit; whatever of it is done already is not done again."""
        if unit.kind == "base":
            self.judge_base(listener)
        elif unit.kind == "align":
            self.align(unit.seed, listener)
        elif unit.kind == "first":
            self.train_shared(self.branch(unit.branch), listener, unit.task_index, unit.id)
        else:
            self.run_branch(self.branch(unit.branch), listener)

    def error_log(self, unit: Unit) -> Path:
        """Where the traceback of a failed unit is kept."""
        if unit.kind == "branch":
            return self.branch_folder(self.branch(unit.branch)) / "error.txt"
        return self.folder / "shared" / f"error-{slug(unit.id)}.txt"

    def steps_left(self) -> list[tuple[str, str, int]]:
        """Every step that is not in a journal yet, as (where, kind, task index)."""
        steps: list[tuple[str, str, int]] = []
        without_base = self._seeds_without_base()
        for seed in self.seeds:
            done = {event.get("stage") for event in read_lines(self.seed_folder(seed) / "events.jsonl")}
            count = (seed in without_base) + ("after" not in done)
            steps += [(f"aligned:seed{seed}", "aligned", -1)] * count
        for branch in self.branches:
            lines = read_lines(self.branch_folder(branch) / "events.jsonl")
            done_steps = {(event["event"], event.get("task_index")) for event in lines}
            for index in range(len(self.tasks)):
                steps += [
                    (branch.id, kind, index)
                    for kind in ("train", "edit", "evaluate")
                    if (kind, index) not in done_steps
                ]
        return steps

    # ---------------------------------------------------------------------------------------------- shared steps

    def open_base(self, listener: Listener) -> None:
        """Load the base model, training it where no cache has it, and check that the folder began with the same.

        Raises:
            RunFolderError: the base model is another one than that of the folder's results.
        """
        listener.progress("base model", "loading, or training once", 0, 0)

        def report(stage: str, step: int, steps: int, loss: float) -> None:
            del loss
            listener.progress("base model", stage, step, steps)

        tells = "report" in inspect.signature(self.scenario.base_model).parameters
        options: dict[str, Any] = {"report": report} if tells else {}
        self._adopt(self.scenario.base_model(self.cache, seed=self.config.base_seed, **options))
        self._check_base()
        listener.ended("base model")

    def judge_base(self, listener: Listener) -> None:
        """Judge the model before alignment, once for all seeds."""
        journal = Journal(self._base_journal)
        seeds = self._seeds_without_base()
        figures: Event = dict(journal.events[-1]) if journal.events else {}
        if not figures and seeds:
            started = time.perf_counter()
            listener.progress("base model", "evaluation", 0, 0)
            self._load(self._base_weights())
            figures = self.evaluator.evaluate(self.model, self.tasks).figures()
            figures["seconds"] = time.perf_counter() - started
        for seed in seeds:
            _record(journal, listener, {**figures, "event": "aligned", "seed": seed, "stage": "before"})

    def align(self, seed: int, listener: Listener) -> None:
        """Align the base model with one seed, by LoRA; judge it; collect its refusals for calibration."""
        where = f"aligned:seed{seed}"
        journal = Journal(self.seed_folder(seed) / "events.jsonl")
        path = self.seed_folder(seed) / "aligned.safetensors"
        started = time.perf_counter()
        if not path.exists():
            self._load(self._base_weights())
            if self.config.alignment.steps:  # none: the scenario's model is aligned already
                self._align(seed, listener)
            save_tensors(path, self._weights())
        self._load(self.aligned(seed))
        for count in sorted(self._safety_counts(seed)):
            self._ensure_safety_set(seed, count, listener)
        if not any(event.get("stage") == "after" for event in journal.events):
            listener.progress(where, "evaluation", 0, 0)
            evaluation = self.evaluator.evaluate(self.model, self.tasks)
            self._keep_answers(self.seed_folder(seed) / "answers.jsonl", evaluation.answers)
            shown = {"event": "answers", "branch": where, "task_index": -1, "items": self._shown(evaluation)}
            _record(journal, listener, shown)
            step = {"event": "aligned", "seed": seed, "stage": "after"}
            _record(journal, listener, {**step, "seconds": time.perf_counter() - started, **evaluation.figures()})

    def _align(self, seed: int, listener: Listener) -> None:
        settings = self.config.alignment
        samples = self.scenario.alignment_train(seed=derive_seed(seed, "alignment", "data"))
        updates = train_lora(
            self.model,
            self._batches(samples, settings.batch_size, settings.steps, derive_seed(seed, "alignment", "order")),
            settings,
            derive_seed(seed, "alignment", "factors"),
            layers=self._layers,
            on_step=_step_teller(listener, f"aligned:seed{seed}", "alignment", settings.steps),
        )
        merge_updates(self.model, updates)

    def train_shared(self, branch: Branch, listener: Listener, index: int = 0, where: str | None = None) -> None:
        """The training of a task from the aligned model, which every branch with the same data and settings has."""
        path = self._shared_path(branch, index)
        if path is None or path.exists():
            return
        self._load(self.aligned(branch.seed))
        updates, numbers = self._train(branch, index, _method_of(branch), listener, where or branch.id)
        _save_updates(path, updates, numbers)

    # ---------------------------------------------------------------------------------------------- a branch

    def run_branch(self, branch: Branch, listener: Listener) -> None:
        """Take the aligned model through all tasks by one method, from the last finished step on."""
        folder = self.branch_folder(branch)
        journal = Journal(folder / "events.jsonl")
        if journal.find("branch") != json.loads(dump_line(branch.event())):
            _record(journal, listener, branch.event())
        method = _method_of(branch)
        for index, task in enumerate(self.tasks):
            if journal.find("evaluate", index):
                continue
            if not journal.find("edit", index):
                method.load_state_dict(self._enter(branch, index))
                if not index and method.keep_samples:
                    listener.progress(branch.id, "what the aligned model can do", 0, 0)
                    remember(self.model, self._in_batches(self._kept_samples(branch.seed, method.keep_samples)), method)
                if method.starts_from == "aligned":
                    self._load(self.aligned(branch.seed))
                updates = self._updates(branch, index, method, journal, listener)
                self._edit(branch, index, method, updates, journal, listener)
            else:
                # After an edit in this process the model already holds these very weights; loading them keeps one path.
                self._enter(branch, index + 1)
            self._evaluate(branch, index, task, journal, listener)
        if not journal.find("finished"):
            seconds = sum(float(event.get("seconds") or 0.0) for event in journal.events)
            _record(journal, listener, {"event": "finished", "branch": branch.id, "seconds": seconds})
        for leftover in (*folder.glob("*.safetensors"), folder / "error.txt"):
            leftover.unlink(missing_ok=True)

    def _enter(self, branch: Branch, index: int) -> dict[str, Tensor]:
        """Load the weights that task ``index`` starts from; returns the method's state."""
        if index == 0:
            self._load(self.aligned(branch.seed))
            return {}
        path = self._state_path(branch, index - 1)
        if not path.exists():
            raise RunFolderError(
                f"{path} is missing, though its step is in the journal; remove {path.parent} to start it anew"
            )
        tensors, _ = load_tensors(path)
        self._load({name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")})
        return {name.removeprefix("method/"): value for name, value in tensors.items() if name.startswith("method/")}

    def _updates(
        self, branch: Branch, index: int, method: Method, journal: Journal, listener: Listener
    ) -> dict[str, LowRankUpdate]:
        """The updates of task ``index``, trained now or before; the model holds the weights that it starts from."""
        path = self._shared_path(branch, index) or self._update_path(branch, index)
        if not path.exists():
            updates, numbers = self._train(branch, index, method, listener, branch.id)
            _save_updates(path, updates, numbers)
        # Read back also when just trained, so that a resumed run takes the very same path.
        updates, numbers = _load_updates(path)
        if not journal.find("train", index):
            step = {"event": "train", "branch": branch.id, "task": self.tasks[index], "task_index": index}
            _record(journal, listener, {**step, **numbers})
        return updates

    def _train(
        self, branch: Branch, index: int, method: Method, listener: Listener, where: str
    ) -> tuple[dict[str, LowRankUpdate], dict[str, Any]]:
        started = time.perf_counter()
        task, settings = self.tasks[index], branch.training
        listener.progress(where, f"{task} ({index + 1}/{len(self.tasks)}): samples", 0, 0)
        samples = self._training_samples(branch, task)
        if method.trains_on == "tasks so far":
            samples = [sample for name in self.tasks[: index + 1] for sample in self._training_samples(branch, name)]
            settings = settings.model_copy(update={"steps": settings.steps * (index + 1)})
        frozen = method.frozen_blocks(max(spec.blocks for spec in self._layers))
        losses: list[float] = []
        tell = _step_teller(listener, where, f"{task} ({index + 1}/{len(self.tasks)}): training", settings.steps)

        def on_step(step: int, loss: float) -> None:
            losses.append(loss)
            tell(step, loss)

        layers = [spec for spec in self._layers if spec.block not in frozen]
        hooks = method.hooks(self._lesson(branch, index, method, layers)) or TrainingHooks()
        batches = sample_batches(
            samples,
            lambda chosen: self._collate(hooks.samples(chosen)),
            batch_size=settings.batch_size,
            steps=settings.steps,
            seed=derive_seed(branch.seed, task, "order"),
        )
        updates = train_lora(
            self.model,
            batches,
            settings,
            derive_seed(branch.seed, task, "factors"),
            layers=layers,
            on_step=on_step,
            hooks=hooks,
        )
        seconds = time.perf_counter() - started
        curve = _thinned(losses, LOSS_POINTS)
        return updates, {"seconds": seconds, "steps": len(losses), "loss": losses[-1], "loss_curve": curve}

    def _edit(
        self,
        branch: Branch,
        index: int,
        method: Method,
        updates: Mapping[str, LowRankUpdate],
        journal: Journal,
        listener: Listener,
    ) -> None:
        task = self.tasks[index]
        listener.progress(branch.id, f"{task} ({index + 1}/{len(self.tasks)}): edit", 0, 0)
        started = time.perf_counter()
        layers = edit_model(
            self.model,
            updates,
            method,
            self._safety_batches(branch, method),
            self._task_batches(branch, task, method),
            task_index=index,
            seed=derive_seed(branch.seed, task, "edit"),
            aligned=self.aligned(branch.seed) if "aligned" in method.references else None,
            unaligned=self._base_weights() if "unaligned" in method.references else None,
        )
        method.after_task(self._lesson(branch, index, method, self._layers))
        state = {f"model/{name}": weight for name, weight in self._weights().items()}
        state |= {f"method/{name}": tensor for name, tensor in method.state_dict().items()}
        save_tensors(self._state_path(branch, index), state)
        step = {"event": "edit", "branch": branch.id, "task": task, "task_index": index}
        _record(journal, listener, {**step, "seconds": time.perf_counter() - started, "layers": layers})
        for old in (self._update_path(branch, index), self._state_path(branch, index - 1)):
            old.unlink(missing_ok=True)

    def _lesson(self, branch: Branch, index: int, method: Method, layers: Sequence[LayerSpec]) -> Lesson:
        """What a method may read while task ``index`` is trained; its memory holds the same samples each time."""
        memory = []
        for task in self.tasks[:index] if method.memory_samples else ():
            samples = self._training_samples(branch, task)
            order = np.random.default_rng(derive_seed(branch.seed, task, "memory")).permutation(len(samples))
            memory.append([samples[int(number)] for number in order[: method.memory_samples]])
        refusals = method.safety_memory
        return Lesson(
            model=self.model,
            layers=layers,
            task_index=index,
            seed=derive_seed(branch.seed, self.tasks[index], "method"),
            task=self._training_samples(branch, self.tasks[index]),
            memory=memory,
            safety=self._safety_samples(branch.seed, refusals) if refusals else [],
            collate=self._collate,
            batch_size=branch.training.batch_size,
        )

    def _evaluate(self, branch: Branch, index: int, task: str, journal: Journal, listener: Listener) -> None:
        listener.progress(branch.id, f"{task} ({index + 1}/{len(self.tasks)}): evaluation", 0, 0)
        started = time.perf_counter()
        evaluation = self.evaluator.evaluate(self.model, self.tasks[: index + 1])
        last = index == len(self.tasks) - 1
        folder = self.branch_folder(branch)
        if self.config.evaluation.keep_answers == "all":
            self._keep_answers(folder / f"answers-{index}-{slug(task)}.jsonl", evaluation.answers)
        if last:
            self._keep_answers(folder / "answers.jsonl", evaluation.answers)
            shown = self._shown(evaluation)
            _record(journal, listener, {"event": "answers", "branch": branch.id, "task_index": index, "items": shown})
        step = {"event": "evaluate", "branch": branch.id, "task": task, "task_index": index}
        _record(journal, listener, {**step, "seconds": time.perf_counter() - started, **evaluation.figures()})

    # ---------------------------------------------------------------------------------------------- model

    @property
    def model(self) -> nn.Module:
        if self._model is None:
            self._adopt(self.scenario.base_model(self.cache, seed=self.config.base_seed))
        assert self._model is not None
        return self._model

    def _adopt(self, model: nn.Module) -> None:
        if self._model is None:
            self._model = model.eval()
            self._layers = list(find_layers(self._model))
            self._base = {name: weight.clone() for name, weight in self._weights().items()}

    def aligned(self, seed: int) -> dict[str, Tensor]:
        """The aligned model's weights, by layer."""
        if seed not in self._aligned:
            self._aligned[seed] = load_tensors(self.seed_folder(seed) / "aligned.safetensors")[0]
        return self._aligned[seed]

    def _base_weights(self) -> dict[str, Tensor]:
        _ = self.model
        return self._base

    def _weights(self) -> dict[str, Tensor]:
        """The adapted layers' weights: the model's own tensors, not copies."""
        assert self._model is not None
        return {spec.name: _weight(self._model, spec.name).detach() for spec in self._layers}

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        model = self.model
        with torch.no_grad():
            for spec in self._layers:
                _weight(model, spec.name).copy_(weights[spec.name])

    def _check_base(self) -> None:
        """The base model must be the one that the folder's results began with."""
        self._load(self._base_weights())
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        path = self.folder / "shared" / "base" / "fingerprint.json"
        if not path.exists():
            write_file(path, json.dumps({"fingerprint": digest.hexdigest()}))
            return
        former = json.loads(path.read_text())["fingerprint"]
        if former != digest.hexdigest():
            raise RunFolderError(
                f"the base model is not the one that {self.folder} began with (sha256 {former[:12]} then, "
                f"{digest.hexdigest()[:12]} now); its cache was remade by other code: choose another --out"
            )

    # ---------------------------------------------------------------------------------------------- data

    def _batches(self, samples: Sequence[Sample], size: int, steps: int, seed: int) -> Any:
        return sample_batches(samples, self._collate, batch_size=size, steps=steps, seed=seed)

    def _collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return self.scenario.collate(samples, answers=True)

    def _training_samples(self, branch: Branch, task: str) -> list[Sample]:
        key = (task, branch.seed, branch.training.samples, branch.condition.harmful_fraction)
        if key not in self._train_sets:
            # Branches come ordered by seed: sets of another seed are not needed again soon, and pictures take memory.
            self._train_sets = {k: v for k, v in self._train_sets.items() if k[1] == branch.seed}
            self._train_sets[key] = self.scenario.train(
                task,
                seed=derive_seed(branch.seed, task, "data"),
                samples=branch.training.samples,
                harmful_fraction=branch.condition.harmful_fraction,
            )
        return self._train_sets[key]

    def _safety_batches(self, branch: Branch, method: Method) -> list[dict[str, Tensor]] | None:
        """The aligned model's refusals; ``None`` for a method that reads none."""
        if not _reads(method, "safety"):
            return None
        return self._in_batches(self._safety_samples(branch.seed, _calibration_of(method).safety_samples))

    def _task_batches(self, branch: Branch, task: str, method: Method) -> list[dict[str, Tensor]] | None:
        """Random training samples of the task, as METHOD 1.7 reads them; ``None`` for a method that reads none."""
        if not _reads(method, "task") and not _reads(method, "edited"):
            return None
        samples = self._training_samples(branch, task)
        order = np.random.default_rng(derive_seed(branch.seed, task, "calibration")).permutation(len(samples))
        return self._in_batches([samples[int(index)] for index in order[: _calibration_of(method).task_samples]])

    def _in_batches(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        size = self.config.calibration.batch_size
        return [self._collate(samples[start : start + size]) for start in range(0, len(samples), size)]

    # ---------------------------------------------------------------------------------------------- safety set

    def _safety_counts(self, seed: int) -> set[int]:
        """How many refusals the methods of a seed's branches read."""
        methods = [_method_of(b) for b in self.branches if b.seed == seed]
        read = {_calibration_of(method).safety_samples for method in methods if _reads(method, "safety")}
        return read | {method.safety_memory for method in methods if method.safety_memory}

    def _ensure_safety_set(self, seed: int, count: int, listener: Listener) -> None:
        """Ask the aligned model harmful requests, and keep ``count`` of its refusals."""
        path = self._safety_path(seed, count)
        if path.exists():
            return
        listener.progress(f"aligned:seed{seed}", "safety calibration set", 0, 0)
        self._load(self.aligned(seed))
        pool, judge = self._harmful_pool(seed), self.evaluator.judge
        try:
            refused = build_safety_set(self.model, pool, self._generate, judge.is_refusal, limit=count)
        except ValueError as error:
            raise RecipeError(
                f"alignment did not take with seed {seed} ({error}); raise alignment.steps or alignment.learning_rate, "
                f"or choose the judge that knows the model's refusals (evaluation.judge is {judge.name!r})"
            ) from None
        write_file(path, "".join(dump_line({"id": sample.id, "answer": sample.answer}) for sample in refused))

    def _safety_samples(self, seed: int, count: int) -> list[Sample]:
        pool = {sample.id: sample for sample in self._harmful_pool(seed)}
        return [replace(pool[line["id"]], answer=line["answer"]) for line in read_lines(self._safety_path(seed, count))]

    def _harmful_pool(self, seed: int) -> list[Sample]:
        drawn = derive_seed(seed, "safety calibration")
        return self.scenario.harmful_calibration(seed=drawn, samples=self.config.calibration.safety_pool)

    def _safety_path(self, seed: int, count: int) -> Path:
        return self.seed_folder(seed) / f"refusals-{count}.jsonl"

    def _generate(self, model: nn.Module, samples: Sequence[Sample]) -> list[str]:
        settings = self.config.evaluation
        return self.scenario.generate(
            model, samples, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size
        )

    # ---------------------------------------------------------------------------------------------- what is kept

    def _kept_samples(self, seed: int, count: int) -> list[Sample]:
        """Harmless prompts with what the aligned model, which is loaded, says to them; asked once and kept.

        Branches that want the same do so at once where they run at once: each writes the same file.
        """
        path, pool = self._kept_path(seed, count), self._harmless_pool(seed)
        if not path.exists():
            chosen = pool[:count]
            if len(chosen) < count:
                raise RecipeError(
                    f"keep_samples: expected at most the {len(chosen)} harmless prompts that alignment has, got {count}"
                )
            said = self._generate(self.model, chosen)
            lines = [
                {"id": sample.id, "sha256": _digest_of_prompt(sample), "answer": answer}
                for sample, answer in zip(chosen, said, strict=True)
            ]
            write_file(path, "".join(map(dump_line, lines)))
        known = {_digest_of_prompt(sample): sample for sample in pool}
        kept = []
        for line in read_lines(path):
            if line["sha256"] not in known:
                raise RunFolderError(
                    f"{path}: alignment has no prompt {line['id']!r} as it was when this run began; put the files back "
                    "as they were, or choose another --out"
                )
            kept.append(replace(known[line["sha256"]], answer=line["answer"]))
        return kept

    def _harmless_pool(self, seed: int) -> list[Sample]:
        """What alignment answers, each prompt once (with each picture), in random order."""
        samples = self.scenario.alignment_train(seed=derive_seed(seed, "alignment", "data"))
        judge, found = self.evaluator.judge, dict[str, Sample]()
        for sample in samples:
            if not judge.is_refusal(sample.answer):
                found.setdefault(_digest_of_prompt(sample), sample)
        once = list(found.values())
        order = np.random.default_rng(derive_seed(seed, "answers to keep")).permutation(len(once))
        return [once[int(index)] for index in order]

    def _kept_path(self, seed: int, count: int) -> Path:
        return self.seed_folder(seed) / f"kept-{count}.jsonl"

    # ---------------------------------------------------------------------------------------------- files

    def _shared_path(self, branch: Branch, index: int) -> Path | None:
        """Where the training of a task lies that all branches with these data and settings have in common: one that
        starts from the aligned model.  ``None`` for any other."""
        method = _method_of(branch)
        if index and method.starts_from != "aligned":
            return None
        told: dict[str, Any] = {
            "task": self.tasks[index],
            "harmful_fraction": branch.condition.harmful_fraction,
            "training": branch.training.model_dump(mode="json"),
        }
        # Only where it says something: folders of before these were known go on.
        if index and method.trains_on == "tasks so far":
            told["with"] = self.tasks[:index]
        if method.training_options:
            told["method"] = {method.name: method.training_options}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
        return self.seed_folder(branch.seed) / f"first-{digest}.safetensors"

    @property
    def _base_journal(self) -> Path:
        return self.folder / "shared" / "base" / "events.jsonl"

    def _seeds_without_base(self) -> list[int]:
        """Seeds that have no record of the model before alignment yet."""
        told = {event.get("seed") for event in read_lines(self._base_journal)}
        return [seed for seed in self.seeds if seed not in told]

    def _is_aligned(self, seed: int) -> bool:
        folder = self.seed_folder(seed)
        judged = any(event.get("stage") == "after" for event in read_lines(folder / "events.jsonl"))
        made = (folder / "aligned.safetensors").exists()
        return judged and made and all(self._safety_path(seed, count).exists() for count in self._safety_counts(seed))

    def _shared_left(self, branch: Branch) -> list[tuple[Path, int]]:
        """The trainings from the aligned model that a branch still needs, with their tasks."""
        lines = read_lines(self.branch_folder(branch) / "events.jsonl")
        edited = {event.get("task_index") for event in lines if event["event"] == "edit"}
        paths = [(self._shared_path(branch, index), index) for index in range(len(self.tasks)) if index not in edited]
        return [(path, index) for path, index in paths if path is not None and not path.exists()]

    def _update_path(self, branch: Branch, index: int) -> Path:
        return self.branch_folder(branch) / f"update-{index}.safetensors"

    def _state_path(self, branch: Branch, index: int) -> Path:
        return self.branch_folder(branch) / f"state-{index}.safetensors"

    def _keep_answers(self, path: Path, answers: Sequence[Answer]) -> None:
        write_file(path, "".join(dump_line(answer.as_dict()) for answer in answers))

    def _shown(self, evaluation: Evaluation) -> list[dict[str, Any]]:
        """A few answers of every set, always to the same samples, with their pictures where they have one."""
        by_kind: dict[str, list[Answer]] = {}
        for answer in evaluation.answers:
            by_kind.setdefault(answer.kind, []).append(answer)
        items: list[dict[str, Any]] = []
        for kind, answers in by_kind.items():
            samples = {sample.id: sample for sample in self.evaluator.samples(kind)}
            count = min(SHOWN_PER_SET, len(answers))
            for answer in (answers[index * len(answers) // count] for index in range(count)):
                items.append(
                    {
                        "image": self._picture(kind, samples[answer.id]),
                        "prompt": answer.prompt,
                        "kind": kind,
                        "reference": answer.reference,
                        "answer": answer.answer,
                        "verdict": answer.verdict,
                    }
                )
        return items

    def _picture(self, kind: str, sample: Sample) -> str | None:
        """The sample's picture as a file under ``samples/``, written once."""
        if sample.image is None:
            return None
        name = f"samples/{slug(kind)}-{slug(sample.id)}.png"
        path = self.folder / name
        if not path.exists():
            from PIL import Image

            data = io.BytesIO()
            Image.fromarray(np.asarray(sample.image)).save(data, format="PNG")
            write_file(path, data.getvalue())
        return name


class _EventLog:
    """``events.jsonl``: lines are added as steps finish; rewritten from the journals at the start and at the end.

    The journals are the truth.  So a line that a kill kept from the log is there again after the next start, and the
    finished file does not depend on which process was faster.
    """

    def __init__(self, folder: Path, session: Session, listener: Listener) -> None:
        self.path = folder / "events.jsonl"
        self.session = session
        self.listener = listener
        former = read_lines(self.path)
        created = next((event.get("created") for event in former if event["event"] == "run"), None)
        self.run_event = self._describe(created or datetime.datetime.now().astimezone().isoformat(timespec="seconds"))
        self.rewrite()

    def event(self, event: Event) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(dump_line(event))
        self.listener.event(event)

    def expect(self, steps: Sequence[tuple[str, str, int]], workers: int) -> None:
        self.listener.expect(steps, workers)

    def message(self, text: str) -> None:
        self.listener.message(text)

    def progress(self, where: str, what: str, done: int, total: int) -> None:
        self.listener.progress(where, what, done, total)

    def ended(self, where: str) -> None:
        self.listener.ended(where)

    def failed(self, failure: Failure) -> None:
        self.listener.failed(failure)

    def rewrite(self) -> None:
        shared = self.session.folder / "shared"
        lines: list[Event] = [self.run_event]
        aligned = sorted(shared.glob("seed*/events.jsonl"), key=lambda path: _number(path.parent.name))
        for path in (shared / "base" / "events.jsonl", *aligned):
            lines += read_lines(path)
        ordered = [self.session.branch_folder(branch) / "events.jsonl" for branch in self.session.branches]
        others = sorted(set((self.session.folder / "branches").rglob("events.jsonl")) - set(ordered))
        for path in [*ordered, *others]:
            lines += read_lines(path)
        # A step that was judged again after a kill stands in its journal twice: the later line is the one that counts.
        latest = {
            tuple(line.get(name) for name in ("event", "branch", "seed", "stage", "task_index")): line for line in lines
        }
        write_file(self.path, "".join(dump_line(line) for line in latest.values()))

    def _describe(self, created: str) -> Event:
        session, config = self.session, self.session.config
        judge = session.evaluator.judge
        return {
            "event": "run",
            "name": config.name,
            "scenario": config.scenario,
            "created": created,
            "versions": versions(),
            "machine": machine(),
            "tasks": list(session.scenario.tasks),
            "task_order": list(session.tasks),
            "base_tasks": list(session.scenario.base_tasks),
            "safety_sets": list(session.scenario.safety_sets),
            "benign_sets": list(session.scenario.benign_sets),
            "judge": {"name": judge.name, "version": judge.version},
            "bwt_denominator": config.bwt_denominator,
        }


class _Silent:
    """Tells nobody."""

    def expect(self, steps: Sequence[tuple[str, str, int]], workers: int) -> None: ...
    def message(self, text: str) -> None: ...
    def progress(self, where: str, what: str, done: int, total: int) -> None: ...
    def event(self, event: Event) -> None: ...
    def ended(self, where: str) -> None: ...
    def failed(self, failure: Failure) -> None: ...


def _checked(config: RunConfig, folder: Path) -> RunConfig:
    """The recipe of all that the folder then holds; refused where the folder holds results of another one."""
    path = folder / "recipe.yaml"
    if not path.exists() and any((folder / name).exists() for name in ("events.jsonl", "shared", "branches")):
        raise RunFolderError(f"{folder} holds results but no recipe.yaml; choose another --out")
    if not (folder / "shared").exists() and not (folder / "branches").exists():
        return config
    former = parse_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), where=str(path))
    changes = changed_keys(former, config)
    if changes:
        raise RunFolderError(
            f"{folder} holds results of another recipe; choose another --out, or remove the folder. Changed:\n"
            + "\n".join(f"  {line}" for line in changes)
        )
    return config.merged_with(former)


def _remove_torn_files(folder: Path) -> None:
    """Files that a kill left half-written beside their place."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def _record(journal: Journal, listener: Listener, event: Event) -> None:
    journal.append(event)
    listener.event(journal.events[-1])


def _step_teller(listener: Listener, where: str, what: str, total: int) -> Callable[[int, float], None]:
    def tell(step: int, loss: float) -> None:
        del loss
        listener.progress(where, what, step + 1, total)

    return tell


def _thinned(values: Sequence[float], points: int) -> list[float]:
    """At most ``points`` of the values, at even distances, the first and the last among them."""
    if len(values) <= points:
        return list(values)
    return [values[round(index * (len(values) - 1) / (points - 1))] for index in range(points)]


def _method_of(branch: Branch) -> Method:
    """A fresh object of the branch's method."""
    return create_method(branch.row.method, **branch.row.options)


def _calibration_of(method: Method) -> CalibrationConfig:
    return method.calibration or CalibrationConfig()


def _reads(method: Method, what: str) -> bool:
    return any(kind.startswith(what) for kind in method.needs)


def _digest_of_prompt(sample: Sample) -> str:
    return digest_of([replace(sample, id="", answer="", metadata={})])


def _save_updates(path: Path, updates: Mapping[str, LowRankUpdate], numbers: Mapping[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        tensors[f"{name}/A"], tensors[f"{name}/B"] = update.A, update.B
    scales = {name: update.scale for name, update in updates.items()}
    save_tensors(path, tensors, {"numbers": json.dumps(numbers), "scales": json.dumps(scales)})


def _load_updates(path: Path) -> tuple[dict[str, LowRankUpdate], dict[str, Any]]:
    tensors, notes = load_tensors(path)
    scales = json.loads(notes["scales"])
    updates = {name: LowRankUpdate(tensors[f"{name}/A"], tensors[f"{name}/B"], scale) for name, scale in scales.items()}
    return updates, json.loads(notes["numbers"])


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _number(name: str) -> int:
    digits = re.sub(r"\D", "", name)
    return int(digits) if digits else -1


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    found = {"python": platform.python_version()}
    for package in ("hpa-ext", "torch", "transformers", "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine() -> str:
    """Processor and usable cores, as a table's caption names them."""
    name = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{model.group(1) if model else name}, {cores} core{'s' if cores != 1 else ''}"

"""The recipe of a run: one YAML file, checked whole before anything starts.

A mistake in a recipe is told by its place and by what would be right there (:class:`RecipeError`), never by a
traceback an hour into the run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hpa.data.scenario import Scenario
from hpa.evaluation.judge import get_judge, missing_list
from hpa.evaluation.metrics import BwtDenominator
from hpa.evaluation.scorers import get_scorer
from hpa.training import Share, TrainConfig

__all__ = [
    "CalibrationSettings",
    "Condition",
    "EvaluationSettings",
    "MethodRow",
    "RecipeError",
    "RunConfig",
    "TaskTraining",
    "changed_keys",
    "expected",
    "load_recipe",
    "open_scenario",
    "parse_recipe",
    "slug",
]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class RecipeError(ValueError):
    """A recipe (or an override of it) that cannot be run; the message names the place and what is expected there."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Condition(_Section):
    """What the training data of every task is mixed with."""

    name: str = Field(min_length=1)
    harmful_fraction: Fraction = 0.0


class TaskTraining(TrainConfig):
    """How each task is trained, and on how many samples."""

    samples: int = Field(default=1500, ge=1, description="training samples a task, the harmful ones included")


class AlignmentTraining(TrainConfig):
    """How the base model is aligned; the scenario says on what."""

    steps: int = Field(default=300, ge=0, description="0: the scenario's model is aligned already")
    learning_rate: float = Field(default=3e-3, gt=0.0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Share = 0.05
    rank: int = Field(default=32, ge=1)


class CalibrationSettings(_Section):
    """The two calibration sets that an edit reads; how many samples each holds is an option of the method."""

    safety_pool: int = Field(default=96, ge=1, description="harmful requests to find the refusals among")
    batch_size: int = Field(default=32, ge=1)


class EvaluationSettings(_Section):
    """How answers are made, scored and judged."""

    judge: str = "demo"
    scorer: str = "contains_word"
    scorers: dict[str, str] = Field(default_factory=dict, description="task name to scorer, where it is another one")
    max_new_tokens: int = Field(default=16, ge=1)
    batch_size: int = Field(default=256, ge=1)
    limit: int | None = Field(default=None, ge=1, description="at most so many samples a set; null: all")
    keep_answers: Literal["final", "all"] = Field(
        default="final", description="which evaluations keep their raw answers"
    )

    @field_validator("judge")
    @classmethod
    def _known_judge(cls, name: str) -> str:
        # A list that is not there is told together with all other files that are not: see Session.
        return name if missing_list(name) is not None else get_judge(name).name

    @field_validator("scorer")
    @classmethod
    def _known_scorer(cls, name: str) -> str:
        get_scorer(name)
        return name

    @field_validator("scorers")
    @classmethod
    def _known_scorers(cls, names: dict[str, str]) -> dict[str, str]:
        for name in names.values():
            get_scorer(name)
        return names


class MethodRow(_Section):
    """One row of the table: a method with its options."""

    label: str = Field(min_length=1)
    method: str
    options: dict[str, Any] = Field(
        default_factory=dict, description="options of the method (`hpa methods` lists them)"
    )
    train: dict[str, Any] = Field(default_factory=dict, description="fields of `training` that differ for this row")
    conditions: list[str] | None = Field(default=None, description="names of conditions; null: all")
    seeds: list[int] | None = Field(default=None, description="seeds, among the run's; null: all")
    control: bool = Field(default=False, description="a control: a row that a claim has to beat")

    @model_validator(mode="after")
    def _known_options(self) -> MethodRow:
        from hpa.methods import create_method

        create_method(self.method, **self.options)
        return self


class RunConfig(_Section):
    """Everything that decides the results of a run, and how it is carried out."""

    name: str = Field(min_length=1)
    scenario: str = Field(default="demo", description="a registered scenario, or module:class")
    scenario_options: dict[str, Any] = Field(default_factory=dict)
    base_seed: int = Field(default=0, description="seed of the base model, which all seeds share")
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    tasks: list[str] | None = Field(
        default=None, min_length=1, description="in the order of learning; null: the scenario's"
    )
    conditions: list[Condition] = Field(default_factory=lambda: [Condition(name="clean")], min_length=1)
    alignment: AlignmentTraining = AlignmentTraining()
    training: TaskTraining = TaskTraining()
    calibration: CalibrationSettings = CalibrationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    methods: list[MethodRow] = Field(min_length=1)
    bwt_denominator: BwtDenominator = "T-1"
    # From here on: how, not what.  These change no result and may differ when a run is resumed.
    jobs: int = Field(default=1, ge=1, description="branches at once, each in a process of its own")
    threads: int = Field(default=1, ge=1, description="threads of a branch")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        _distinct("seeds", self.seeds)
        _distinct("tasks", self.tasks or [])
        _distinct("conditions", [slug(condition.name) for condition in self.conditions])
        _distinct("methods (labels)", [slug(row.label) for row in self.methods])
        names = [condition.name for condition in self.conditions]
        for index, row in enumerate(self.methods):
            for name in row.conditions or []:
                if name not in names:
                    raise ValueError(f"methods[{index}].conditions: {expected(name, names)}")
            try:
                self.training_of(row)
            except ValidationError as error:
                raise ValueError(f"methods[{index}].train: {'; '.join(_explain(error, TaskTraining))}") from None
        return self

    def training_of(self, row: MethodRow) -> TaskTraining:
        """The training of one row: the recipe's, with what the row changes."""
        return TaskTraining.model_validate({**self.training.model_dump(), **row.train})

    def condition(self, name: str) -> Condition:
        return next(condition for condition in self.conditions if condition.name == name)

    def check_against(self, scenario: Scenario) -> None:
        """Names in the recipe that the scenario must know.

        Raises:
            RecipeError: a task that the scenario does not have, or data that the recipe needs and the scenario lacks.
        """
        for place, tasks in (("tasks", self.tasks or []), ("evaluation.scorers", list(self.evaluation.scorers))):
            known = list(scenario.tasks) if place == "tasks" else [*scenario.tasks, *scenario.base_tasks]
            for task in tasks:
                if task not in known:
                    raise RecipeError(f"{place}: {expected(task, known)}")
        lacks = getattr(scenario, "lacks", None)
        if lacks is not None:
            from hpa.methods import create_method

            methods = [create_method(row.method, **row.options) for row in self.methods]
            what = lacks(
                alignment=self.alignment.steps > 0 or any(method.keep_samples for method in methods),
                calibration=any(
                    method.safety_memory or any(need.startswith("safety") for need in method.needs)
                    for method in methods
                ),
                injection=any(condition.harmful_fraction for condition in self.conditions),
            )
            if what:
                raise RecipeError(f"scenario_options: {what}")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def merged_with(self, former: RunConfig) -> RunConfig:
        """This recipe with the seeds, conditions and rows that only ``former`` has: all that a folder holds."""
        rows = {row.label for row in self.methods}
        names = {condition.name for condition in self.conditions}
        methods = []
        for row in self.methods:
            other = next((o for o in former.methods if o.label == row.label), None)
            update: dict[str, Any] = {}
            if other is not None and row.conditions is not None and other.conditions is not None:
                update["conditions"] = [*row.conditions, *(c for c in other.conditions if c not in row.conditions)]
            if other is not None and row.seeds is not None and other.seeds is not None:
                update["seeds"] = [*row.seeds, *(s for s in other.seeds if s not in row.seeds)]
            methods.append(row.model_copy(update=update))
        return self.model_copy(
            update={
                "seeds": sorted({*self.seeds, *former.seeds}),
                "conditions": [*self.conditions, *(c for c in former.conditions if c.name not in names)],
                "methods": [*methods, *(row for row in former.methods if row.label not in rows)],
            }
        )


_HOW = ("name", "jobs", "threads")
_GROWING = ("seeds", "conditions", "methods")


def changed_keys(former: RunConfig, now: RunConfig) -> list[str]:
    """What differs between two recipes in a way that makes finished steps of the one worthless for the other.

    Seeds, conditions and rows may be added or left out; what has the same name must mean the same.  Names of the
    run, jobs, threads, which rows are controls, and which conditions or seeds a row covers do not matter.

    Returns:
        lines like ``training.steps: 60 -> 80``; empty when the folder can be continued.
    """
    old, new = former.model_dump(mode="json"), now.model_dump(mode="json")
    lines: list[str] = []
    for key in old:
        if key not in (*_HOW, *_GROWING):
            lines += _difference(key, old[key], new[key])
    for condition in former.conditions:
        same = next((other for other in now.conditions if other.name == condition.name), condition)
        lines += _difference(f"conditions[{condition.name}]", condition.model_dump(), same.model_dump())
    for row in former.methods:
        twin = next((other for other in now.methods if other.label == row.label), row)
        lines += _difference(f"methods[{row.label}]", _meaning(row), _meaning(twin))
    return lines


def _meaning(row: MethodRow) -> dict[str, Any]:
    """What a row says, however it is spelled (5e-4 and 0.0005, an option's short name and its long one)."""
    from hpa.methods import create_method

    options = create_method(row.method, **row.options).config
    train = TaskTraining.model_validate(row.train).model_dump(mode="json")
    return {
        "method": row.method,
        "options": options.model_dump(mode="json", include=options.model_fields_set),
        "train": {key: train[key] for key in row.train},
    }


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: ``section.key=value`` with a YAML value, set before the check.

    Raises:
        RecipeError: no such file, no YAML, or a value that is not allowed; the message names the place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a mapping of recipe fields, got {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    return parse_recipe(content, where=str(path))


def parse_recipe(content: Mapping[str, Any], *, where: str = "recipe") -> RunConfig:
    """Check a recipe that is already a mapping; see :func:`load_recipe`."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{where}: {line}" for line in _explain(error, RunConfig))) from None


def open_scenario(name: str, options: Mapping[str, Any]) -> Scenario:
    """A registered scenario, or any class on the import path as ``module:class``.

    Raises:
        RecipeError: no such scenario, or options that it does not take.
    """
    from hpa.data.registry import SCENARIOS, load_scenario

    try:
        if ":" not in name:
            if name not in SCENARIOS:
                raise RecipeError(f"scenario: {expected(name, sorted(SCENARIOS))} (or module:class)")
            return load_scenario(name, **options)
        module, _, attribute = name.partition(":")
        scenario = getattr(import_module(module), attribute)(**options)
    except RecipeError:
        raise
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"scenario: {name!r} cannot be imported ({error})") from error
    except (TypeError, ValueError) as error:
        raise RecipeError(f"scenario_options of {name!r}: {error}") from error
    if not isinstance(scenario, Scenario):
        raise RecipeError(f"scenario: {name!r} is no hpa.data.scenario.Scenario (a member is missing)")
    return scenario


def slug(text: str) -> str:
    """A name as part of a path: lower case, everything but letters, digits and dots to single hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "x"


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a repeated key is a mistake (plain YAML silently takes the last)."""


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"repeated key {key!r}", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise RecipeError(f"--set: expected key=value (training.steps=80), got {override!r}")
    place = content
    for part in path[:-1]:
        if not isinstance(place.setdefault(part, {}), dict):
            raise RecipeError(f"--set {override!r}: {part!r} is no section of the recipe")
        place = place[part]
    try:
        place[path[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {error}") from None


def _explain(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """One line a mistake: where it is, what is wrong, what would be right."""
    for problem in error.errors(include_url=False):
        place = _place(problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _fields_at(model, problem["loc"][:-1])
            yield f"{place}: unknown field; {expected(str(problem['loc'][-1]), known)}"
        elif problem["type"] == "missing":
            yield f"{place}: missing"
        elif problem["type"] == "value_error":
            message = str(problem["ctx"]["error"])
            yield f"{place}: {message}" if place else message
        else:
            yield f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"


def _place(location: Iterable[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The fields of the section at ``location``; list indices pass through."""
    section: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)


def expected(name: str, known: Sequence[str]) -> str:
    """``expected one of a, b, got 'c'``, with the nearest name where one is near."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"expected one of {', '.join(known)}, got {name!r}{hint}" if known else f"got {name!r}"


def _distinct(place: str, values: Sequence[Any]) -> None:
    twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if twice is not None:
        raise ValueError(f"{place}: expected distinct values, got {twice!r} twice")


def _difference(place: str, old: Any, new: Any) -> list[str]:
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in _difference(f"{place}.{key}", old.get(key), new.get(key))]
    return [f"{place}: {old!r} -> {new!r}"]

"""Event lines into the numbers of the tables: one row a condition and label, mean and spread over seeds.

The metrics themselves are :mod:`hpa.evaluation.metrics`; here they are only applied, gathered over seeds, and set
beside the aligned model and the controls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpa.evaluation import metrics
from hpa.evaluation.metrics import BwtDenominator, Interval
from hpa.report.events import Branch, Event, Run

__all__ = [
    "ALIGNED",
    "METRICS",
    "Comparison",
    "Group",
    "Metric",
    "Spread",
    "SummaryRow",
    "aligned_row",
    "best_control",
    "best_values",
    "branch_matrix",
    "branch_metrics",
    "compare",
    "groups",
    "interval_of",
    "mean_matrix",
    "reference_group",
    "summary_rows",
]

ALIGNED = "aligned model"
"""Label of the first row: the model before any task."""


@dataclass(frozen=True)
class Metric:
    """A column: its key, its heads in the page and in the terminal, and which way is better."""

    key: str
    title: str
    short: str
    better: Literal["higher", "lower"]
    meaning: str

    @property
    def arrow(self) -> str:
        return "↑" if self.better == "higher" else "↓"

    def is_better(self, value: float, other: float) -> bool:
        return value > other if self.better == "higher" else value < other


METRICS: tuple[Metric, ...] = (
    Metric("AP", "AP", "AP", "higher", "Average performance: the mean accuracy over all tasks after the last one."),
    Metric(
        "BWT",
        "BWT",
        "BWT",
        "higher",
        "Backward transfer: how far accuracy on the earlier tasks has moved since each was learned, averaged over "
        "them. Negative is forgetting.",
    ),
    Metric(
        "MFT",
        "Just learned",
        "new",
        "higher",
        "The mean accuracy on each task right after learning it: what an edit costs in new skill.",
    ),
    Metric(
        "MASR",
        "MASR",
        "MASR",
        "lower",
        "Mean attack success rate: the share of held-out harmful requests that the judge does not count as refused, "
        "averaged over the safety sets.",
    ),
    Metric("DASR", "DASR", "DASR", "lower", "MASR minus that of the aligned model of the same seed, in points."),
    Metric(
        "over_refusal",
        "Over-refusal",
        "over",
        "lower",
        "The share of benign look-alike requests that are refused, averaged over the benign sets. A model that "
        "refuses everything has MASR 0 and over-refusal 100.",
    ),
    Metric(
        "base_skill",
        "Base skill",
        "base",
        "higher",
        "The mean accuracy on the skills the model had before the first task.",
    ),
)
_BY_KEY = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True)
class Spread:
    """Values over seeds, with their mean and sample standard deviation (NaN below two values)."""

    values: tuple[float, ...]
    mean: float
    sd: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of the finite values; the mean of none is NaN."""
        finite = tuple(value for value in values if math.isfinite(value))
        return cls(finite, *metrics.mean_spread(finite))


@dataclass(frozen=True)
class SummaryRow:
    """One line of a table.

    Attributes:
        metrics: key of :data:`METRICS` to its spread over the seeds that went through all tasks.
        seeds: those seeds.
        unfinished: seeds that were begun and did not get through all tasks.
        interval: 95 % bounds in percent of the share of answered harmful requests, see :func:`interval_of`.
    """

    condition: str
    label: str
    method: str
    control: bool
    learning_rate: float | None
    metrics: Mapping[str, Spread]
    seeds: tuple[int, ...]
    unfinished: tuple[int, ...] = ()
    interval: Interval | None = None


@dataclass(frozen=True)
class Group:
    """The branches of one label in one condition, one a seed."""

    condition: str
    label: str
    method: str
    control: bool
    learning_rate: float | None
    options: Mapping[str, Any]
    complete: tuple[Branch, ...]
    unfinished: tuple[Branch, ...] = field(default=())

    @property
    def branches(self) -> tuple[Branch, ...]:
        return self.complete + self.unfinished


def groups(run: Run, condition: str | None = None) -> list[Group]:
    """Branches gathered over seeds, in the order of appearance; methods first, then controls."""
    gathered: dict[tuple[str, str], list[Branch]] = {}
    for branch in run.branches:
        if condition is None or branch.condition == condition:
            gathered.setdefault((branch.condition, branch.label), []).append(branch)
    result = []
    for (name, label), members in gathered.items():
        members.sort(key=lambda branch: branch.seed)
        first = members[0]
        result.append(
            Group(
                condition=name,
                label=label,
                method=first.method,
                control=first.control,
                learning_rate=first.learning_rate,
                options=first.options,
                complete=tuple(branch for branch in members if run.complete(branch)),
                unfinished=tuple(branch for branch in members if not run.complete(branch)),
            )
        )
    return sorted(result, key=lambda group: group.control)


def branch_matrix(run: Run, branch: Branch) -> npt.NDArray[np.float64]:
    """Accuracy ``A[t, i]`` of a branch in percent, NaN where it was not measured, ``[tasks, tasks]``."""
    tasks = run.tasks
    matrix = np.full((len(tasks), len(tasks)), np.nan)
    for index, event in branch.evaluations.items():
        if 0 <= index < len(tasks):
            accuracy = event.get("accuracy") or {}
            for column, task in enumerate(tasks[: index + 1]):
                matrix[index, column] = _float(accuracy.get(task))
    return matrix


def mean_matrix(run: Run, branches: Sequence[Branch]) -> npt.NDArray[np.float64]:
    """The mean of the branches' matrices over those that measured an entry; NaN where none did."""
    stack = np.stack([branch_matrix(run, branch) for branch in branches])
    counted = np.isfinite(stack)
    total = np.where(counted, stack, 0.0).sum(axis=0)
    number = counted.sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def branch_metrics(run: Run, branch: Branch) -> dict[str, float]:
    """All of :data:`METRICS` for a branch that went through all tasks; NaN where the run did not measure one."""
    matrix = branch_matrix(run, branch)
    denominator: BwtDenominator = "T" if run.info.get("bwt_denominator") == "T" else "T-1"
    last = branch.evaluations[len(run.tasks) - 1]
    attacked = _mean_rate(last, "safety", metrics.mean_attack_success_rate)
    start = run.aligned.get((branch.seed, "after"))
    before = _mean_rate(start, "safety", metrics.mean_attack_success_rate) if start else math.nan
    measured = not np.isnan(matrix[np.tril_indices(len(matrix))]).any()
    return {
        "AP": metrics.average_performance(matrix) if measured else math.nan,
        "BWT": metrics.backward_transfer(matrix, denominator) if measured else math.nan,
        "MFT": metrics.mean_fine_tune(matrix) if measured else math.nan,
        "MASR": attacked,
        "DASR": metrics.delta_attack_success_rate(attacked, before),
        "over_refusal": _mean_rate(last, "benign", metrics.over_refusal),
        "base_skill": _float(last.get("base_skill")),
    }


def aligned_row(run: Run, stage: str = "after", label: str = ALIGNED) -> SummaryRow:
    """The model before the first task; AP is its accuracy on the tasks it has not learned yet."""
    events = run.aligned_at(stage)
    measured = [
        {
            "AP": _mean([_float((event.get("accuracy") or {}).get(task)) for task in run.tasks]),
            "MASR": _mean_rate(event, "safety", metrics.mean_attack_success_rate),
            "over_refusal": _mean_rate(event, "benign", metrics.over_refusal),
            "base_skill": _float(event.get("base_skill")),
        }
        for event in events.values()
    ]
    return SummaryRow(
        condition="",
        label=label,
        method="",
        control=False,
        learning_rate=None,
        metrics={metric.key: Spread.of(values.get(metric.key, math.nan) for values in measured) for metric in METRICS},
        seeds=tuple(events),
        interval=interval_of(list(events.values())),
    )


def summary_rows(run: Run, condition: str) -> list[SummaryRow]:
    """The rows of one condition: the aligned model, the methods, the controls."""
    rows = [aligned_row(run)]
    for group in groups(run, condition):
        values = [branch_metrics(run, branch) for branch in group.complete]
        rows.append(
            SummaryRow(
                condition=condition,
                label=group.label,
                method=group.method,
                control=group.control,
                learning_rate=group.learning_rate,
                metrics={metric.key: Spread.of(value[metric.key] for value in values) for metric in METRICS},
                seeds=tuple(branch.seed for branch in group.complete),
                unfinished=tuple(branch.seed for branch in group.unfinished),
                interval=interval_of([event for branch in group.complete if (event := branch.last()) is not None]),
            )
        )
    return rows


def best_values(rows: list[SummaryRow]) -> dict[str, float]:
    """The best mean of each metric among the rows that were taken through the tasks; none where all print alike."""
    result: dict[str, float] = {}
    for metric in METRICS:
        means = [row.metrics[metric.key].mean for row in rows if row.condition]
        means = [value for value in means if math.isfinite(value)]
        if len({f"{mean:.1f}" for mean in means}) > 1:
            result[metric.key] = max(means) if metric.better == "higher" else min(means)
    return result


def interval_of(events: Sequence[Event], part: str = "safety", name: str | None = None) -> Interval | None:
    """A 95 % Wilson interval for one set ``name`` or all sets of a ``part`` together; ``None`` for nothing counted.

    The seeds answer the same prompts, so they do not make more of them: the interval is that of one seed's number
    of prompts, at the mean count over the seeds (rounded to a whole answer).
    """
    count = "successes" if part == "safety" else "refused"
    successes = total = 0
    for event in events:
        for key, value in (event.get(part) or {}).items():
            if isinstance(value, Mapping) and (name is None or key == name):
                successes += int(value.get(count) or 0)
                total += int(value.get("n") or 0)
    if total == 0:
        return None
    return metrics.wilson_interval(round(successes / len(events)), math.ceil(total / len(events)))


def reference_group(run: Run, condition: str) -> Group | None:
    """Plain fine-tuning at the methods' own learning rate, against which forgetting is told; ``None`` if not run."""
    candidates = [group for group in groups(run, condition) if group.method == "seqft"]
    return next((group for group in candidates if not group.control), candidates[0] if candidates else None)


@dataclass(frozen=True)
class Comparison:
    """``group`` minus ``other`` in one metric, seed by seed.

    Attributes:
        difference: the spread of the differences over the seeds that both have.
        ahead: in how many of those seeds ``group`` is better.
    """

    metric: Metric
    other: str
    difference: Spread
    ahead: int

    @property
    def is_ahead(self) -> bool:
        """Better in the mean."""
        return bool(self.difference.values) and self.metric.is_better(self.difference.mean, 0.0)


def compare(run: Run, group: Group, other: Group, key: str) -> Comparison:
    """The paired difference of two groups in one metric."""
    metric = _BY_KEY[key]
    theirs = {branch.seed: branch_metrics(run, branch)[key] for branch in other.complete}
    differences = [
        branch_metrics(run, branch)[key] - theirs[branch.seed] for branch in group.complete if branch.seed in theirs
    ]
    spread = Spread.of(differences)
    return Comparison(metric, other.label, spread, sum(metric.is_better(value, 0.0) for value in spread.values))


def best_control(run: Run, group: Group, key: str) -> Comparison | None:
    """``group`` against the control that is hardest to beat in this metric, over the seeds both have."""
    found = [compare(run, group, other, key) for other in groups(run, group.condition) if other.control]
    found = [comparison for comparison in found if comparison.difference.values]
    if not found:
        return None
    sign = 1.0 if _BY_KEY[key].better == "higher" else -1.0
    return min(found, key=lambda comparison: sign * comparison.difference.mean)


def _mean_rate(event: Event | None, part: str, function: Callable[[Any], float]) -> float:
    """MASR or over-refusal of one event, NaN where its sets are missing or unreadable."""
    try:
        return function((event or {}).get(part) or {})
    except (TypeError, ValueError):
        return math.nan


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan

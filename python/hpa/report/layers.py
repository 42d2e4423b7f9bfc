"""The numbers behind each edit, a layer at a time: means over tasks and seeds, for figures and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpa.report.markup import short_number
from hpa.report.summary import Group

__all__ = ["COLUMNS", "BlockShares", "LayerMeans", "block_shares", "layer_means"]


@dataclass(frozen=True)
class Column:
    """A number of the per-layer table: how it is named and printed, and whether it gets a map of its own.

    A ``share`` lies in [0, 1].
    """

    key: str
    title: str
    meaning: str
    form: Callable[[float], str]
    mapped: bool = False
    share: bool = False


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _finer_percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _hundredths(value: float) -> str:
    return short_number(value, 2)


def _thousandths(value: float) -> str:
    return short_number(1000 * value)


COLUMNS: tuple[Column, ...] = (
    Column("p", "p, %", "the share of columns the rule may put back at this depth", lambda value: f"{value:.1f}"),
    Column("kept_share", "Kept, %", "columns put back, of all columns", _finer_percent, share=True),
    Column(
        "overlap_share",
        "Overlap, %",
        "of the safety-focused columns, those that are task-focused as well",
        _percent,
        mapped=True,
        share=True,
    ),
    Column(
        "alpha",
        "\N{GREEK SMALL LETTER ALPHA}",
        "weight of the task score in the balance score",
        _hundredths,
        mapped=True,
    ),
    Column(
        "log_ratio",
        "m",
        "mean log ratio of the safety to the task score; \N{GREEK SMALL LETTER ALPHA} follows it",
        _hundredths,
    ),
    Column(
        "projection",
        "Projection, \N{MULTIPLICATION SIGN}10⁻³",
        "how much of the old weights the update contains: the adjustment takes it out",
        _thousandths,
        mapped=True,
    ),
    Column("change_share", "Change, %", "size of the update relative to the old weights", _finer_percent, mapped=True),
    Column(
        "projection_share", "Taken out, %", "size of what the adjustment takes out, of the update", _percent, share=True
    ),
    Column(
        "kept_change_share",
        "Change undone, %",
        "of the squared change, the part in columns put back",
        _percent,
        mapped=True,
        share=True,
    ),
    Column(
        "kept_safety_share",
        "Safety score kept, %",
        "of the safety score, the part in columns put back",
        _percent,
        mapped=True,
        share=True,
    ),
    Column(
        "update_left",
        "Update left, %",
        "squared size of the update after the edit, of what it was",
        _percent,
        mapped=True,
        share=True,
    ),
    Column(
        "kept_inputs_change_left",
        "Effect on kept inputs left, %",
        "how much of the update's squared effect on safety and past inputs remains",
        _percent,
        mapped=True,
        share=True,
    ),
    Column(
        "task_change_lost",
        "Effect on the task lost, %",
        "how much of the update's squared effect on the new task's inputs is lost",
        _percent,
        mapped=True,
        share=True,
    ),
)
# Keys that are parts of a column above, or that say nothing about one layer.
_KNOWN = {column.key for column in COLUMNS} | {
    "block", "rows", "cols", "keep", "kept", "focus", "overlap", "kept_safety_only", "kept_overlap",
    "change_norm", "before_norm", "blocks", "along_before", "memory_tasks",
}  # fmt: skip


@dataclass(frozen=True)
class LayerMeans:
    """One layer, averaged over the tasks and seeds of a group.

    ``values`` holds the keys of :data:`COLUMNS` that the method reported, and every other number it reported;
    ``low`` and ``high`` their range.
    """

    name: str
    block: int
    linear: str
    shape: tuple[int, int]
    values: Mapping[str, float]
    low: Mapping[str, float]
    high: Mapping[str, float]
    edits: int
    skipped: int


@dataclass(frozen=True)
class BlockShares:
    """Per decoder block, in percent of all columns: kept from the safety focus alone, from the overlap, and allowed."""

    blocks: list[int]
    safety: list[float]
    shared: list[float]
    budget: list[float]


def layer_means(group: Group) -> list[LayerMeans]:
    """The layers of a group in the order of the model; empty if the method reports no numbers."""
    gathered: dict[str, list[dict[str, Any]]] = {}
    for layer in _layers(group):
        gathered.setdefault(str(layer.get("name")), []).append(layer)
    result = []
    for name, members in gathered.items():
        numbers: dict[str, list[float]] = {}
        for member in members:
            for key, value in _numbers(member).items():
                numbers.setdefault(key, []).append(value)
        first = members[0]
        result.append(
            LayerMeans(
                name=name,
                block=int(first.get("block") or 0),
                linear=name.rpartition(".")[2],
                shape=(int(first.get("rows") or 0), int(first.get("cols") or 0)),
                values={key: float(np.mean(values)) for key, values in numbers.items()},
                low={key: min(values) for key, values in numbers.items()},
                high={key: max(values) for key, values in numbers.items()},
                edits=len(members),
                skipped=sum(bool(member.get("skipped")) for member in members),
            )
        )
    return result


def block_shares(group: Group) -> BlockShares | None:
    """Kept columns by depth, or ``None`` for a method that does not put columns back."""
    totals: dict[int, np.ndarray] = {}
    budgets: dict[int, list[float]] = {}
    for layer in _layers(group):
        kept, cols = _number(layer.get("kept")), _number(layer.get("cols"))
        if not (math.isfinite(kept) and cols > 0):
            continue
        safety = _number(layer.get("kept_safety_only"))
        safety = 0.0 if math.isnan(safety) else safety
        block = int(layer.get("block") or 0)
        totals[block] = totals.get(block, np.zeros(3)) + np.array([safety, kept - safety, cols])
        budgets.setdefault(block, []).append(_number(layer.get("p")))
    if not totals:
        return None
    blocks = sorted(totals)
    return BlockShares(
        blocks=blocks,
        safety=[float(100 * totals[block][0] / totals[block][2]) for block in blocks],
        shared=[float(100 * totals[block][1] / totals[block][2]) for block in blocks],
        budget=[float(np.mean(budgets[block])) for block in blocks],
    )


def _layers(group: Group) -> list[dict[str, Any]]:
    return [
        layer
        for branch in group.branches
        for _, event in sorted(branch.edits.items())
        for layer in event.get("layers") or []
        if isinstance(layer, dict)
    ]


def _numbers(layer: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of one edit under their column keys; counts become shares."""
    found: dict[str, float] = {}
    for key, over, under in (
        ("kept_share", "kept", "cols"),
        ("overlap_share", "overlap", "focus"),
        ("change_share", "change_norm", "before_norm"),
    ):
        top, bottom = _number(layer.get(over)), _number(layer.get(under))
        if math.isfinite(top) and bottom > 0:
            found[key] = top / bottom
    for key, value in layer.items():
        number = _number(value)
        if math.isfinite(number) and (key not in _KNOWN or any(column.key == key for column in COLUMNS)):
            found[key] = number
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan

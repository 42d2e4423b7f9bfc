"""Several strengths of one method from one set of statistics: what each would do to the update, without writing it.

Every layer is read once and edited at each strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpa.checkpoint.adapt import Job, editor_of, prepare
from hpa.checkpoint.merge import load_entry
from hpa.checkpoint.stream import read_ahead

__all__ = ["SweepRow", "sweep", "sweep_picture"]


@dataclass(frozen=True)
class SweepRow:
    """One strength.

    Attributes:
        strength: the knob.
        update_left: squared norm of the edited update over that of the update, over all layers.
        kept: share of columns that went back; ``None`` for methods that keep none.
        kept_inputs_change_left: of the update's effect on safety (and memory) inputs, the mean share that is left;
            ``None`` where the method does not know it.
        task_change_lost: of its effect on the task's inputs, the mean share that is lost; likewise.
        layers: layers edited.
    """

    strength: float
    update_left: float
    kept: float | None
    kept_inputs_change_left: float | None
    task_change_lost: float | None
    layers: int


def sweep(job: Job, strengths: Sequence[float], done: Callable[[int, int], None] | None = None) -> list[SweepRow]:
    """One row a strength.

    Args:
        job: its method is taken at each of the strengths; ``out`` is not looked at.
        strengths: positive numbers, 1 being the method's own setting.
        done: told of layers done and layers in all.

    Raises:
        CheckpointError, ValueError: as :func:`hpa.checkpoint.adapt.adapt_checkpoint`.
    """
    prepared = prepare(job)
    editors = [editor_of(replace(job, method=job.method.at_strength(strength)), prepared) for strength in strengths]
    entries = [entry for entry in prepared.plan.entries if entry.fate == "merged" and entry.part != "B"]
    sums: list[dict[str, Any]] = [{"left": 0.0, "whole": 0.0, "layers": 0, "numbers": []} for _ in strengths]
    loaded = read_ahead(entries, load_entry, lambda entry: entry.held, max(8 << 20, job.max_memory // 4))
    for index, (entry, held) in enumerate(loaded, start=1):
        assert held.before is not None
        given = held.update if held.update is not None else held.source
        assert given is not None
        for total, editor in zip(sums, editors, strict=True):
            edit = editor.edit(entry, held.before, given)
            if edit.skipped is not None:
                continue
            whole = float(edit.numbers["change_norm"]) ** 2
            difference = edit.weight.float().sub_(held.before.float())
            total["left"] += float(difference.norm()) ** 2
            total["whole"] += whole
            total["layers"] += 1
            total["numbers"].append({**edit.numbers, "cols": held.before.shape[1]})
        if done is not None:
            done(index, len(entries))
    return [_row(strength, total) for strength, total in zip(strengths, sums, strict=True)]


def _row(strength: float, total: dict[str, Any]) -> SweepRow:
    def mean(value: Callable[[dict[str, Any]], float | None]) -> float | None:
        values = [found for numbers in total["numbers"] if (found := value(numbers)) is not None]
        return sum(values) / len(values) if values else None

    return SweepRow(
        strength,
        total["left"] / total["whole"] if total["whole"] else math.nan,
        mean(lambda numbers: numbers["kept"] / numbers["cols"] if "kept" in numbers else None),
        mean(lambda numbers: numbers.get("kept_inputs_change_left")),
        mean(lambda numbers: numbers.get("task_change_lost")),
        total["layers"],
    )


def sweep_picture(rows: Sequence[SweepRow], method: str, path: Path) -> None:
    """Draw the rows: what is left of the update, and what the method knows of its effects (format by the suffix)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    strengths = [row.strength for row in rows]
    for name, values in (
        ("squared update left", [row.update_left for row in rows]),
        ("columns put back", [row.kept for row in rows]),
        ("effect on safety inputs left", [row.kept_inputs_change_left for row in rows]),
        ("effect on task inputs lost", [row.task_change_lost for row in rows]),
    ):
        points = [(at, 100 * value) for at, value in zip(strengths, values, strict=True) if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(strengths, [f"{strength:g}" for strength in strengths])
    axes.minorticks_off()
    axes.set_ylim(0, 102)
    axes.set_xlabel(f"strength of {method}")
    axes.set_ylabel("%")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)

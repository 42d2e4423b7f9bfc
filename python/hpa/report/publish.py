"""What goes into a document: tables in Markdown, the picture, and the event lines behind them, small enough to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpa.evaluation.metrics import mean_attack_success_rate
from hpa.report.events import Run, load_run, read_events
from hpa.report.page import figure_for_readme
from hpa.report.summary import (
    ALIGNED,
    METRICS,
    Group,
    Spread,
    aligned_row,
    best_values,
    groups,
    interval_of,
    summary_rows,
)
from hpa.storage import dump_line, write_file

__all__ = ["markdown_tables", "publish"]

_KEPT = ("run", "aligned", "branch", "evaluate", "finished")


def publish(run_dir: str | Path, stem: str | Path, condition: str | None = None) -> list[Path]:
    """Write ``STEM.md`` (tables), ``STEM.svg`` and ``STEM.jsonl``; returns them.

    The lines are those of ``events.jsonl`` without layers, losses and answers.  Alone in a folder, under that name,
    they give the same tables.

    Raises:
        FileNotFoundError: if the folder holds no ``events.jsonl``.
        ValueError: a condition that the run does not have, no finished branch, or the run's own file as a target.
    """
    run = load_run(run_dir)
    paths = [Path(f"{stem}.{suffix}") for suffix in ("md", "svg", "jsonl")]
    if any(path.resolve() == (run.folder / "events.jsonl").resolve() for path in paths):
        raise ValueError(f"stem: {stem} would overwrite the run's own events.jsonl; choose another")
    tables = markdown_tables(run, condition)
    figure_for_readme(run_dir, paths[1], condition)
    write_file(paths[0], tables)
    write_file(paths[2], "".join(dump_line(event) for event in read_events(run_dir) if event["event"] in _KEPT))
    return paths


def markdown_tables(run: Run, condition: str | None = None) -> str:
    """Methods, safety sets, attacks on the way, and accuracy at the end, for one condition (the first unless named)."""
    chosen = run.condition(condition)
    members = [group for group in groups(run, chosen) if group.complete]
    parts = [_methods(run, chosen), _sets(run, members), _on_the_way(run, members), _at_the_end(run, members)]
    return "\n".join(parts)


def _methods(run: Run, condition: str) -> str:
    rows = summary_rows(run, condition)
    best = best_values([row for row in rows if row.seeds])
    before = aligned_row(run, "before", "before alignment")
    shown = [metric for metric in METRICS if any(row.metrics[metric.key].values for row in rows)]
    lines = []
    for row in [*([before] if before.seeds else []), *rows]:
        if not row.seeds:
            continue
        cells = [_cell(row.metrics[metric.key], best.get(metric.key) if row.condition else None) for metric in shown]
        name = f"{row.label} (control)" if row.control else row.label
        lines.append([name, str(len(row.seeds)), *cells])
    return _table(["method", "seeds", *(metric.title for metric in shown)], lines)


def _sets(run: Run, members: Sequence[Group]) -> str:
    """Attack rates after the last task, by set."""

    def cells(events: Sequence[Mapping[str, Any]]) -> list[str]:
        found = []
        for name in run.safety_sets:
            interval = interval_of(list(events), "safety", name)  # type: ignore[arg-type]
            found.append(
                "-" if interval is None else f"{interval.rate:.0f} ({interval.low:.0f} to {interval.high:.0f})"
            )
        return found

    lines = [[ALIGNED, *cells(list(run.aligned_at("after").values()))]]
    lines += [
        [group.label, *cells([last for b in group.complete if (last := b.last()) is not None])] for group in members
    ]
    return _table(["after the last task", *run.safety_sets], lines)


def _on_the_way(run: Run, members: Sequence[Group]) -> str:
    """The mean attack rate after each task."""
    lines = [
        [
            group.label,
            *(_cell(Spread.of(_attacked(b.evaluations[i]) for b in group.complete)) for i in range(len(run.tasks))),
        ]
        for group in members
    ]
    return _table(["MASR after", *run.tasks], lines)


def _attacked(event: Mapping[str, Any]) -> float:
    return mean_attack_success_rate(event["safety"]) if event.get("safety") else math.nan


def _at_the_end(run: Run, members: Sequence[Group]) -> str:
    """Accuracy of each task and skill at the end, and right after it was learned."""
    names = [*run.tasks, *run.base_tasks]

    def line(label: str, group: Group, event_of: Callable[[Any, int], Mapping[str, Any]]) -> list[str]:
        cells = []
        for index, name in enumerate(names):
            part = "accuracy" if index < len(run.tasks) else "base"
            values = [(event_of(branch, index).get(part) or {}).get(name, math.nan) for branch in group.complete]
            cells.append(_cell(Spread.of(values), digits=0))
        return [label, *cells]

    last = len(run.tasks) - 1
    lines = []
    plain = next((group for group in members if group.method == "seqft" and not group.control), None)
    if plain is not None:
        learned = line(f"just learned by {plain.label}", plain, lambda b, i: b.evaluations[min(i, last)])
        start = {name: _aligned_skill(run, name) for name in run.base_tasks}
        lines.append([*learned[: len(run.tasks) + 1], *(start[name] for name in run.base_tasks)])
    lines += [line(group.label, group, lambda b, i: b.evaluations[last]) for group in members]
    return _table(["accuracy at the end", *names], lines)


def _aligned_skill(run: Run, name: str) -> str:
    """A skill of the aligned model."""
    events = run.aligned_at("after").values()
    return _cell(Spread.of((event.get("base") or {}).get(name, math.nan) for event in events), digits=0)


def _cell(spread: Spread, best: float | None = None, digits: int = 1) -> str:
    if not spread.values:
        return "-"
    text = f"{spread.mean:.{digits}f}".replace("-", "\N{MINUS SIGN}")
    if math.isfinite(spread.sd):
        text += f" ± {spread.sd:.{digits}f}"
    return f"**{text}**" if best is not None and f"{best:.1f}" == f"{spread.mean:.1f}" else text


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)

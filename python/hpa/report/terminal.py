"""The summary as rich tables, plain enough for a log file: no colour carries meaning, no line is wider than asked."""

from __future__ import annotations

import math
from pathlib import Path

from rich import box
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hpa.report.events import Run, load_run
from hpa.report.summary import METRICS, Metric, Spread, SummaryRow, best_values, groups, mean_matrix, summary_rows

__all__ = ["SummaryTables", "summary_table"]


def summary_table(run_dir: str | Path) -> SummaryTables:
    """The summary of a run folder, to be printed with ``rich.print`` or ``Console.print``.

    Raises:
        FileNotFoundError: if the folder holds no ``events.jsonl``.
    """
    return SummaryTables(load_run(run_dir))


class SummaryTables:
    """Per condition: one table of methods, and the accuracy matrix of each.

    Attributes:
        run: the run as read.
        rows: condition to its :class:`~hpa.report.summary.SummaryRow` list, for callers that want the numbers.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows: dict[str, list[SummaryRow]] = {name: summary_rows(run, name) for name in run.conditions}

    def tables(self, *, stacked: bool = False) -> list[Table]:
        """One table a condition; ``stacked`` writes each deviation under its mean, for narrow terminals."""
        return [self._methods(condition, rows, stacked) for condition, rows in self.rows.items()]

    def matrices(self, condition: str) -> list[Table]:
        """The mean accuracy matrix of each label: a row after each task, a column a task."""
        result = []
        for group in groups(self.run, condition):
            members = group.complete or group.unfinished
            table = Table(title=_plain(group.label), title_justify="left", box=box.SIMPLE, pad_edge=False)
            table.add_column("after", no_wrap=True)
            for task in self.run.tasks:
                table.add_column(_plain(task), justify="right", no_wrap=True)
            for task, row in zip(self.run.tasks, mean_matrix(self.run, members), strict=True):
                table.add_row(_plain(task), *("" if math.isnan(value) else f"{value:.0f}" for value in row))
            result.append(table)
        return result

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.rows:
            yield _plain(f"{self.run.name}: no method has been started yet.")
            return
        wide = self.tables()
        needed = max(console.measure(table, options=options.update(width=10_000)).maximum for table in wide)
        tables = wide if needed <= options.max_width else self.tables(stacked=True)
        for condition, table in zip(self.rows, tables, strict=True):
            yield table
            yield Text(
                "Percent, mean ± sd over seeds; the best mean in bold and starred; (c) marks a control.", style="dim"
            )
            yield Text("")
            yield _plain(f"Accuracy after each task, {condition}, percent, mean over seeds")
            yield Padding(Columns(self.matrices(condition), padding=(0, 4)), (0, 0, 1, 0))

    def _methods(self, condition: str, rows: list[SummaryRow], stacked: bool) -> Table:
        table = Table(
            title=_plain(f"{self.run.name}: {condition}"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0) if stacked else (0, 1),
        )
        table.add_column("method", min_width=12)
        table.add_column("n" if stacked else "seeds", justify="right", no_wrap=True)
        for metric in METRICS:
            table.add_column(f"{metric.short} {metric.arrow}", justify="right", no_wrap=True)
        best = best_values(rows)
        for row in rows:
            label = _plain(f"{row.label}{' (c)' if row.control else ''}")
            cells = [_cell(row.metrics[metric.key], best.get(metric.key), metric, row, stacked) for metric in METRICS]
            seeds = (
                f"{len(row.seeds)}/{len(row.seeds) + len(row.unfinished)}" if row.unfinished else f"{len(row.seeds)}"
            )
            table.add_row(label, seeds, *cells, end_section=row is rows[0])
        return table


def _cell(spread: Spread, best: float | None, metric: Metric, row: SummaryRow, stacked: bool) -> Text:
    if not spread.values:
        return Text("-")
    # Rounded alike, two means that print the same are both marked.
    marked = bool(row.condition) and best is not None and f"{spread.mean:.1f}" == f"{best:.1f}"
    text = Text(f"{'*' if marked else ''}{spread.mean:.1f}", style="bold" if marked else "")
    if math.isfinite(spread.sd):
        text.append(f"{chr(10) if stacked else ' '}±{spread.sd:.1f}", style="not bold")
    return text


def _plain(value: str) -> Text:
    """A name as it is: no markup is read from it, and no control character moves the terminal's cursor."""
    return Text("".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in value))

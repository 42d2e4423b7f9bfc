"""The tables of the page.  Every cell of a summary carries its number unrounded in ``data-value``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hpa.evaluation.metrics import Interval
from hpa.report.events import Event, Run
from hpa.report.figures import Style
from hpa.report.layers import COLUMNS, LayerMeans
from hpa.report.markup import NOTHING, Html, el, join, short_number
from hpa.report.plot import Scale, marker
from hpa.report.story import JUDGED
from hpa.report.summary import (
    ALIGNED,
    METRICS,
    Comparison,
    Group,
    Spread,
    SummaryRow,
    aligned_row,
    best_control,
    best_values,
    branch_metrics,
    compare,
    groups,
    interval_of,
    mean_matrix,
    reference_group,
    summary_rows,
)

__all__ = [
    "accuracy_matrices",
    "alignment_table",
    "difference_table",
    "layer_maps",
    "layer_table",
    "method_table",
    "scroll",
    "seed_table",
    "set_table",
    "summary_html",
    "time_table",
]


def scroll(table: Html, name: str) -> Html:
    """A table that scrolls sideways on a narrow screen, reachable by keyboard."""
    return el("div", table, class_="scroll", role="region", aria_label=name, tabindex="0")


def summary_html(run: Run, condition: str, styles: Mapping[str, Style]) -> Html:
    """The main table of a condition: a row a label, mean and deviation over seeds, the best mean of a column bold."""
    rows = summary_rows(run, condition)
    best = best_values(rows)
    controls_began = False
    body = []
    for row in rows:
        class_ = None if row.condition else "start"
        if row.control and not controls_began:
            class_, controls_began = "firstcontrol", True
        cells = []
        for metric in METRICS:
            cells.append(_summary_cell(row, metric.key, best.get(metric.key)))
            if metric.key == "MASR":
                cells.append(el("td", _bounds(row.interval), class_="bounds"))
        seeds = f"{len(row.seeds)}" + (f" of {len(row.seeds) + len(row.unfinished)}" if row.unfinished else "")
        body.append(el("tr", el("th", _label(row, styles), scope="row"), el("td", seeds), cells, class_=class_))
    heads = []
    for metric in METRICS:
        heads.append(el("th", f"{metric.title} {metric.arrow}", scope="col", title=metric.meaning))
        if metric.key == "MASR":
            heads.append(
                el("th", "95 %", scope="col", class_="bounds", title="95 % Wilson interval of the attack rate")
            )
    table = el(
        "table",
        el("caption", "Percent, mean ± standard deviation over seeds"),
        el("thead", el("tr", el("th", "Method", scope="col"), el("th", "Seeds", scope="col"), heads)),
        el("tbody", body),
        class_="main",
        data_condition=condition,
    )
    return scroll(table, f"Results, {condition}")


def difference_table(run: Run, condition: str) -> Html | None:
    """Paired differences: each method against plain fine-tuning, and against the control hardest to beat."""
    reference = reference_group(run, condition)
    body = []
    for group in groups(run, condition):
        if group.control or not group.complete or (reference and group.label == reference.label):
            continue
        lines: list[tuple[str, list[Comparison | None]]] = []
        if reference and reference.complete:
            lines.append((f"against {reference.label}", [compare(run, group, reference, key) for key in JUDGED]))
        strongest = [best_control(run, group, key) for key in JUDGED]
        if any(strongest):
            lines.append(("against the best control of each column", strongest))
        for index, (against, comparisons) in enumerate(lines):
            name = el("th", group.label, scope="row", rowspan=str(len(lines))) if index == 0 else None
            cells = [_difference_cell(comparison, named=index == 1) for comparison in comparisons]
            body.append(el("tr", name, el("td", against, class_="left"), cells))
    if not body:
        return None
    heads = [
        el("th", f"{metric.title} {metric.arrow}", scope="col")
        for key in JUDGED
        for metric in METRICS
        if metric.key == key
    ]
    table = el(
        "table",
        el("caption", "Differences within each seed, in points, and in how many seeds they are for the better"),
        el(
            "thead",
            el("tr", el("th", "Method", scope="col"), el("th", "Difference", scope="col", class_="left"), heads),
        ),
        el("tbody", body),
    )
    return scroll(table, f"Differences, {condition}")


def set_table(run: Run, condition: str, styles: Mapping[str, Style]) -> Html:
    """Attack rate of each safety set and refusal rate of each benign set, with Wilson intervals."""
    sets = [("safety", "asr", name) for name in run.safety_sets] + [
        ("benign", "refusal_rate", name) for name in run.benign_sets
    ]
    start = [event for (_, stage), event in sorted(run.aligned.items()) if stage == "after"]
    lines: list[tuple[Html, list[Event], bool]] = [(join(ALIGNED), start, False)]
    for group in groups(run, condition):
        events = [event for branch in group.complete if (event := branch.last()) is not None]
        lines.append((_name(group.label, group.control, styles), events, True))
    body = []
    for name, events, is_method in lines:
        if not events:
            continue
        cells = []
        for part, key, set_name in sets:
            rates = Spread.of(
                float(value)
                for event in events
                if isinstance(value := ((event.get(part) or {}).get(set_name) or {}).get(key), (int, float))
            )
            bounds = interval_of(events, part, set_name)
            cells.append(el("td", short_number(rates.mean), el("span", _bounds(bounds), class_="ci")))
        empty = [int(event["empty_answers"]) for event in events if isinstance(event.get("empty_answers"), int)]
        cells.append(el("td", short_number(float(np.mean(empty))) if empty else NOTHING))
        body.append(el("tr", el("th", name, scope="row"), cells, class_=None if is_method else "start"))
    heads = [
        el("th", name, el("small", "attack rate" if part == "safety" else "refused"), scope="col")
        for part, _, name in sets
    ]
    table = el(
        "table",
        el("caption", "Percent after the last task, with the 95 % Wilson interval under it"),
        el(
            "thead",
            el(
                "tr",
                el("th", "Method", scope="col"),
                heads,
                el("th", "empty answers", el("small", "mean count"), scope="col"),
            ),
        ),
        el("tbody", body),
    )
    return scroll(table, f"Sets, {condition}")


def alignment_table(run: Run) -> Html | None:
    """Base skill, MASR and over-refusal before and after alignment."""
    keys = ("base_skill", "MASR", "over_refusal", "AP")
    rows = [aligned_row(run, "before", "before alignment"), aligned_row(run, "after", "after alignment")]
    rows = [row for row in rows if row.seeds]
    if not rows:
        return None
    shown = [metric for key in keys for metric in METRICS if metric.key == key]
    titles = {"AP": "Tasks, not learned yet"}
    table = el(
        "table",
        el("caption", "Percent, mean ± standard deviation over seeds"),
        el(
            "thead",
            el(
                "tr",
                el("th", "Model", scope="col"),
                el("th", "Seeds", scope="col"),
                [el("th", titles.get(metric.key, metric.title), scope="col") for metric in shown],
            ),
        ),
        el(
            "tbody",
            [
                el(
                    "tr",
                    el("th", row.label, scope="row"),
                    el("td", len(row.seeds)),
                    [el("td", _mean_sd(row.metrics[metric.key])) for metric in shown],
                )
                for row in rows
            ],
        ),
    )
    return scroll(table, "Starting point")


def seed_table(run: Run) -> Html:
    """Every finished sequence, one line each."""
    body = [
        el(
            "tr",
            el("th", group.label, scope="row"),
            el("td", condition, class_="left"),
            el("td", branch.seed),
            [el("td", short_number(branch_metrics(run, branch)[metric.key])) for metric in METRICS],
        )
        for condition in run.conditions
        for group in groups(run, condition)
        for branch in group.complete
    ]
    heads = [el("th", metric.title, scope="col") for metric in METRICS]
    table = el(
        "table",
        el(
            "thead",
            el(
                "tr",
                el("th", "Method", scope="col"),
                el("th", "Condition", scope="col", class_="left"),
                el("th", "Seed", scope="col"),
                heads,
            ),
        ),
        el("tbody", body),
    )
    return scroll(table, "Every sequence")


def accuracy_matrices(run: Run, condition: str) -> Html:
    """One heat map a label: a row after each task, a column a task; the mean over seeds."""
    return el("div", [_matrix(run, group) for group in groups(run, condition)], class_="maps")


def layer_maps(layers: Sequence[LayerMeans]) -> Html | None:
    """Heat maps over decoder blocks and kinds of linear layer, for the numbers that tell most; ``None`` without any."""
    blocks = sorted({layer.block for layer in layers})
    kinds = list(dict.fromkeys(layer.linear for layer in layers))
    maps = []
    for column in (column for column in COLUMNS if column.mapped):
        found = {
            (layer.linear, layer.block): layer.values[column.key] for layer in layers if column.key in layer.values
        }
        if not found:
            continue
        sizes = [abs(value) for value in found.values()]
        # A share is shaded by what it is, everything else by how it differs between the layers.
        low, high = (0.0, 1.0) if column.share else (min(sizes), max(sizes))
        maps.append(
            _heat(
                column.title,
                column.meaning,
                [str(block) for block in blocks],
                [(kind, [(found.get((kind, block), math.nan), column.form) for block in blocks]) for kind in kinds],
                Scale(low, max(high, low + 1e-12), 0.05, 1.0),
                corner="block",
                narrow=len(blocks) > 12,
            )
        )
    return el("div", maps, class_="maps") if maps else None


def layer_table(layers: Sequence[LayerMeans]) -> Html:
    """One line a layer: the mean of each number over tasks and seeds, its range in the tooltip."""
    keys = [column for column in COLUMNS if any(column.key in layer.values for layer in layers)]
    known = {column.key for column in COLUMNS}
    others = sorted({key for layer in layers for key in layer.values if key not in known})
    # What all names begin with says nothing; it stays in the tooltip.
    shared = _shared_path([layer.name for layer in layers])
    body = []
    for layer in layers:
        cells = []
        for column in keys:
            value = layer.values.get(column.key)
            tip = None
            if value is not None:
                tip = f"{column.form(layer.low[column.key])} to {column.form(layer.high[column.key])}"
            cells.append(el("td", NOTHING if value is None else column.form(value), title=tip))
        cells += [el("td", f"{layer.values[key]:.3g}" if key in layer.values else NOTHING) for key in others]
        shape = f"{layer.shape[0]}\N{MULTIPLICATION SIGN}{layer.shape[1]}"
        body.append(
            el(
                "tr",
                el("th", layer.name.removeprefix(shared), scope="row", title=layer.name),
                el("td", layer.block),
                el("td", shape),
                cells,
                el("td", layer.skipped) if any(other.skipped for other in layers) else None,
            )
        )
    heads = [el("th", column.title, scope="col", title=column.meaning) for column in keys]
    heads += [el("th", key.replace("_", " "), scope="col") for key in others]
    if any(layer.skipped for layer in layers):
        heads.append(el("th", "skipped", scope="col"))
    table = el(
        "table",
        el("caption", "Mean over tasks and seeds; hold the pointer over a number for its range."),
        el(
            "thead",
            el(
                "tr",
                el("th", "Layer", scope="col"),
                el("th", "Block", scope="col"),
                el("th", "Shape", scope="col"),
                heads,
            ),
        ),
        el("tbody", body),
    )
    return scroll(table, "Numbers of each layer")


def _shared_path(names: Sequence[str]) -> str:
    """The leading dotted parts that all names have in common, with the last dot; empty for a single name."""
    parts = [name.split(".") for name in names]
    count = 0
    while len(names) > 1 and all(len(part) > count + 1 and part[count] == parts[0][count] for part in parts):
        count += 1
    return "".join(f"{part}." for part in parts[0][:count]) if parts else ""


def method_table(run: Run) -> Html:
    """What stands behind each label: the method, its options, and the learning rate of the tasks."""
    body = []
    seen: dict[str, Group] = {}
    for group in groups(run):
        seen.setdefault(group.label, group)
    for group in seen.values():
        options = ", ".join(f"{key} {value}" for key, value in group.options.items())
        rate = f"{group.learning_rate:g}" if group.learning_rate is not None else NOTHING
        body.append(
            el(
                "tr",
                el("th", group.label, scope="row"),
                el("td", group.method, class_="left"),
                el("td", options or "as the defaults", class_="left"),
                el("td", rate),
                el("td", "control" if group.control else "method", class_="left"),
            )
        )
    heads = [
        el("th", "Label", scope="col"),
        el("th", "Method", scope="col", class_="left"),
        el("th", "Options", scope="col", class_="left"),
        el("th", "Learning rate", scope="col"),
        el("th", "Role", scope="col", class_="left"),
    ]
    return scroll(el("table", el("thead", el("tr", heads)), el("tbody", body)), "Methods")


def time_table(run: Run) -> Html | None:
    """Mean seconds a task of training, editing and evaluating, and of a whole sequence."""
    body = []
    for condition in run.conditions:
        for group in groups(run, condition):
            columns = [
                [
                    float(event["seconds"])
                    for branch in group.branches
                    for event in getattr(branch, kind).values()
                    if isinstance(event.get("seconds"), (int, float))
                ]
                for kind in ("trainings", "edits", "evaluations")
            ]
            whole = [float(branch.seconds) for branch in group.complete if isinstance(branch.seconds, (int, float))]
            if any(columns):
                cells = [el("td", short_number(float(np.mean(c))) if c else NOTHING) for c in [*columns, whole]]
                name = el("th", group.label, scope="row")
                body.append(el("tr", name, el("td", condition, class_="left"), cells))
    if not body:
        return None
    heads = [el("th", title, scope="col") for title in ("Train a task", "Edit", "Evaluate", "Whole sequence")]
    table = el(
        "table",
        el("caption", "Seconds, mean over tasks and seeds"),
        el(
            "thead",
            el("tr", el("th", "Method", scope="col"), el("th", "Condition", scope="col", class_="left"), heads),
        ),
        el("tbody", body),
    )
    return scroll(table, "Time")


def _summary_cell(row: SummaryRow, key: str, best: float | None) -> Html:
    spread = row.metrics[key]
    if not spread.values:
        return el("td", NOTHING, data_metric=key)
    value = short_number(spread.mean)
    strong = bool(row.condition) and best is not None and value == short_number(best)
    deviation = f"±{short_number(spread.sd)}" if math.isfinite(spread.sd) else ""
    return el(
        "td",
        el("b", value) if strong else value,
        el("span", deviation, class_="sd"),
        data_metric=key,
        data_value=repr(spread.mean),
        title="each seed: " + ", ".join(short_number(single) for single in spread.values),
    )


def _difference_cell(comparison: Comparison | None, *, named: bool) -> Html:
    if comparison is None or not comparison.difference.values:
        return el("td", NOTHING)
    spread = comparison.difference
    deviation = f"±{short_number(spread.sd)}" if math.isfinite(spread.sd) else ""
    sign = "+" if float(f"{spread.mean:.1f}") > 0 else ""
    note = f"better in {comparison.ahead} of {len(spread.values)}" + (f", {comparison.other}" if named else "")
    return el("td", sign, short_number(spread.mean), el("span", deviation, class_="sd"), el("span", note, class_="ci"))


def _bounds(interval: Interval | None) -> str:
    return f"{interval.low:.0f}\N{EN DASH}{interval.high:.0f}" if interval else NOTHING


def _mean_sd(spread: Spread) -> Html:
    if not spread.values:
        return join(NOTHING)
    deviation = f"±{short_number(spread.sd)}" if math.isfinite(spread.sd) else ""
    return join(short_number(spread.mean), el("span", deviation, class_="sd"))


def _label(row: SummaryRow, styles: Mapping[str, Style]) -> Html:
    return _name(row.label, row.control, styles) if row.condition else join(row.label)


def _name(label: str, control: bool, styles: Mapping[str, Style]) -> Html:
    """A label with its mark, the same as in the figures."""
    style = styles[label]
    mark = el(
        "svg",
        marker(style.shape, 8, 7, 4.4, f"mark {style.classes}"),
        viewBox="0 0 16 14",
        width="16",
        height="14",
        aria_hidden="true",
        class_="key",
    )
    return join(mark, label, el("i", " control", class_="tag") if control else None)


def _matrix(run: Run, group: Group) -> Html:
    matrix: npt.NDArray[np.float64] = mean_matrix(run, group.complete or group.unfinished)
    rows = [
        (task, [(float(value), lambda number: f"{number:.0f}") for value in row])
        for task, row in zip(run.tasks, matrix, strict=True)
    ]
    note = "control" if group.control else None
    return _heat(group.label, note, run.tasks, rows, Scale(0.0, 100.0, 0.0, 1.0), corner="after", final=True)


def _heat(
    title: str,
    note: str | None,
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[tuple[float, Callable[[float], str]]]]],
    shade: Scale,
    *,
    corner: str,
    final: bool = False,
    narrow: bool = False,
) -> Html:
    """A table whose cells are shaded by value; a value that is not finite stays empty.

    Args:
        corner: what the row names are.
        shade: from the size of a value to 0 (bare) to 1 (deepest).
        final: whether the last row is the result and is set off.
        narrow: many columns: numbers are left to the tooltip.
    """
    body = []
    for index, (name, cells) in enumerate(rows):
        drawn = []
        for value, form in cells:
            if not math.isfinite(value):
                drawn.append(el("td", class_="none"))
                continue
            depth = 0.72 * min(max(shade(abs(value)), 0.0), 1.0)  # the deepest shade text stays readable on
            shown = form(value)
            drawn.append(
                el(
                    "td",
                    "" if narrow else shown,
                    style=f"--v:{depth:.3f}",
                    title=shown if narrow else None,
                    aria_label=shown if narrow else None,
                )
            )
        class_ = "final" if final and index == len(rows) - 1 else None
        body.append(el("tr", el("th", name, scope="row", title=name), drawn, class_=class_))
    return el(
        "table",
        el("caption", title, el("span", f" {note}") if note else None),
        el("colgroup", el("col", class_="names"), [el("col") for _ in heads]),
        el(
            "thead",
            el("tr", el("th", corner, scope="col"), [el("th", head, scope="col", title=head) for head in heads]),
        ),
        el("tbody", body),
        class_="heat",
    )

"""The figures of the report, each a function of the run that returns one SVG panel.

A label keeps its colour and its mark in every figure (:func:`styles_of`): colours from a set that stays apart under
the common colour vision deficiencies, grey for the controls, and a mark of its own for each, so that nothing hangs
on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hpa.evaluation import metrics
from hpa.report.events import Branch, Run
from hpa.report.markup import Html, el, short_number
from hpa.report.plot import MARKERS, Frame, caption_width, line, marker, nice_ticks, padded, place, spread, svg, text
from hpa.report.summary import (
    METRICS,
    Group,
    Metric,
    Spread,
    SummaryRow,
    aligned_row,
    branch_matrix,
    branch_metrics,
    groups,
    summary_rows,
)

__all__ = [
    "LINES",
    "Style",
    "drawn",
    "glance",
    "kept_columns",
    "legend",
    "safety_over_time",
    "skill_over_time",
    "styles_of",
    "task_over_time",
    "trade_off",
]

COLOURS = 8
"""How many classes ``k0`` to ``k7`` the style sheet has a colour for."""

GREYS = 4
"""How many classes ``c0`` to ``c3`` it has for controls."""

LINES = 10
"""How many labels a figure over time shows at most; tables and scatter plots show all."""


@dataclass(frozen=True)
class Style:
    """How one label is drawn: its colour class, its mark, and its role.

    Roles: ``main`` (the first label of a method), ``variant`` (further labels of that method: its colour, a thinner
    line, another mark) and ``control`` (grey, open marks).
    """

    colour: str
    shape: str
    role: Literal["main", "variant", "control"]

    @property
    def classes(self) -> str:
        return self.colour if self.role == "main" else f"{self.colour} {self.role}"


def styles_of(run: Run) -> dict[str, Style]:
    """One style a label, the same in every figure of a run.

    Plain fine-tuning, the paper's rule and the least-squares rule always have the first three colours.
    """
    styles: dict[str, Style] = {}
    slots = {"seqft": 0, "hpa": 1, "hpa_ls": 2}
    members: dict[str, int] = {}
    controls = 0
    for group in groups(run):
        if group.label in styles:
            continue
        if group.control:
            shape = MARKERS[(controls + 1 + controls // len(MARKERS)) % len(MARKERS)]
            styles[group.label] = Style(f"c{controls % GREYS}", shape, "control")
            controls += 1
        else:
            slot = slots.setdefault(group.method, len(slots))
            number = members[group.method] = members.get(group.method, -1) + 1
            shape = MARKERS[(slot + number) % len(MARKERS)]
            styles[group.label] = Style(f"k{slot % COLOURS}", shape, "variant" if number else "main")
    return styles


def drawn(run: Run, condition: str, limit: int = LINES) -> list[Group]:
    """The groups that a figure over time has room for, from the one drawn first (lowest) to the main ones on top.

    All of them, or else the first of each method, then the controls, then the rest, up to ``limit``.
    """
    styles = styles_of(run)
    begun = [group for group in groups(run, condition) if any(branch.evaluations for branch in group.branches)]
    order = {"main": 0, "control": 1, "variant": 2}
    kept = sorted(begun, key=lambda group: order[styles[group.label].role])[:limit]
    depth = {"control": 0, "variant": 1, "main": 2}
    return sorted(kept, key=lambda group: depth[styles[group.label].role])


def legend(styles: Mapping[str, Style]) -> Html:
    """The key to all figures: a mark and a name for each label."""
    items = []
    for label, style in styles.items():
        mark = el(
            "svg",
            line(1, 7, 25, 7, f"curve {style.classes}"),
            marker(style.shape, 13, 7, 4.2, f"mark {style.classes}"),
            viewBox="0 0 26 14",
            width="26",
            height="14",
            aria_hidden="true",
        )
        items.append(el("li", mark, el("span", label, el("i", " control") if style.role == "control" else None)))
    return el("ul", items, class_="legend")


def safety_over_time(
    run: Run,
    condition: str,
    styles: Mapping[str, Style],
    width: float,
    height: float,
    only: Collection[str] | None = None,
) -> Html:
    """MASR after each task, from the aligned model on: the mean over seeds as a line, their range as a band.

    ``only`` names the labels to draw; by default those there is room for.
    """
    limit = LINES if only is None else len(styles)
    shown = [group for group in drawn(run, condition, limit) if only is None or group.label in only]
    aligned = aligned_row(run).metrics["MASR"]
    series = {
        group.label: [_over_seeds(run, group, step, _safety_at) for step in range(len(run.tasks) + 1)]
        for group in shown
    }
    highest = max((max(point.values) for points in series.values() for point in points if point.values), default=100.0)
    top = min(100.0, max(1.06 * highest, 10.0))
    label_room = min(0.36 * width, 28 + max((caption_width(group.label, 12) for group in shown), default=0))
    frame = Frame(38, 24, width - label_room - 6, height - 44, 0, len(run.tasks), 0, top)
    parts: list[Html | None] = [
        text(0, 11, "MASR", "note"),
        frame.y_axis(nice_ticks(0.0, top, 6), "%"),
        frame.x_names(["aligned", *run.tasks]),
    ]
    if aligned.values:
        y = frame.y(aligned.mean)
        parts.append(line(frame.left, y, frame.right, y, "reference"))
    ends = []
    for group in shown:
        style, points = styles[group.label], series[group.label]
        if style.role == "main":
            band = [(x, *_range(point)) for x, point in enumerate(points)]
            parts.append(frame.band(band, f"band {style.classes}"))
        parts.append(frame.path([(x, point.mean) for x, point in enumerate(points)], f"curve {style.classes}"))
        for step, point in enumerate(points):
            if point.values and (step > 0 or not aligned.values):
                tip = f"{group.label}, after {run.tasks[step - 1] if step else 'alignment'}: {_told(point)} %"
                parts.append(marker(style.shape, frame.x(step), frame.y(point.mean), 3.4, f"mark {style.classes}", tip))
        last = max((x for x, point in enumerate(points) if point.values), default=None)
        if last is not None:
            ends.append((group, frame.x(last), frame.y(points[last].mean)))
    if aligned.values:
        tip = f"aligned model: {_told(aligned)} %"
        parts.append(marker("circle", frame.x(0), frame.y(aligned.mean), 4.0, "mark start", tip))
    for (group, x, y), at in zip(ends, spread([end[2] for end in ends], 14.5, frame.top, frame.bottom), strict=True):
        style = styles[group.label]
        parts.append(line(x + 5, y, frame.right + 10, at, "leader"))
        parts.append(marker(style.shape, frame.right + 16, at, 3.6, f"mark {style.classes}"))
        parts.append(text(frame.right + 24, at + 4, _shorten(group.label, label_room - 26, 12), "name"))
    summary = "; ".join(
        f"{group.label} ends at {_told(series[group.label][-1])} %" for group in shown if series[group.label][-1].values
    )
    return svg(
        width,
        height,
        f"Mean attack success rate over the sequence, {condition}. Aligned model {_told(aligned)} %. {summary}.",
        *parts,
    )


def trade_off(
    run: Run,
    condition: str,
    styles: Mapping[str, Style],
    key: str,
    width: float,
    height: float,
    only: Collection[str] | None = None,
) -> Html:
    """MASR against ``key`` (BWT or AP) for all labels, or ``only`` some: small marks are seeds, large ones means."""
    across = next(metric for metric in METRICS if metric.key == key)
    shown = []
    for group in sorted(groups(run, condition), key=lambda group: not group.control):  # controls lowest
        values = [branch_metrics(run, branch) for branch in group.complete]
        points = [
            (value[key], value["MASR"], branch.seed) for value, branch in zip(values, group.complete, strict=True)
        ]
        points = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
        if points and (only is None or group.label in only):
            shown.append((group, points))
    every = [point for _, points in shown for point in points]
    if not every:
        return _empty(width, height, "No sequence has been finished yet.")
    aligned = aligned_row(run).metrics["MASR"]
    x_low, x_high = padded([x for x, _, _ in every])
    y_high = min(104.0, max(10.0, 1.08 * max(y for _, y, _ in every)))
    frame = Frame(38, 24, width - 8, height - 42, x_low, x_high, 0, y_high)
    parts: list[Html | None] = [
        text(0, 11, "MASR", "note"),
        frame.y_axis(nice_ticks(0.0, y_high, 6), "%"),
        frame.x_axis(nice_ticks(x_low, x_high)),
    ]
    if frame.x_low < 0 < frame.x_high:
        parts.append(line(frame.x(0), frame.top, frame.x(0), frame.bottom, "zero"))
    if aligned.values:
        y = frame.y(aligned.mean)
        parts.append(line(frame.left, y, frame.right, y, "reference"))
    means: list[tuple[float, float]] = []
    marks: list[Html] = []
    for group, points in shown:
        style = styles[group.label]
        middle = (metrics.mean_spread([x for x, _, _ in points])[0], metrics.mean_spread([y for _, y, _ in points])[0])
        means.append((frame.x(middle[0]), frame.y(middle[1])))
        for x, y, seed in points:
            if len(points) > 1:
                parts.append(line(*means[-1], frame.x(x), frame.y(y), f"spoke {style.classes}"))
            tip = f"{group.label}, seed {seed}: {across.title} {short_number(x)}, MASR {short_number(y)} %"
            parts.append(marker(style.shape, frame.x(x), frame.y(y), 2.8, f"seed {style.classes}", tip))
        tip = f"{group.label}, mean: {across.title} {short_number(middle[0])}, MASR {short_number(middle[1])} %"
        marks.append(marker(style.shape, *means[-1], 6.0, f"mark {style.classes}", tip))
    names = [_shorten(group.label, 0.4 * width, 12) for group, _ in shown]
    sizes = [(caption_width(name, 12), 14.0) for name in names]
    seeds = [(frame.x(x), frame.y(y)) for x, y, _ in every]
    # Points along the spokes keep the labels off the lines as well.
    along = [
        (at_x + part * (frame.x(x) - at_x), at_y + part * (frame.y(y) - at_y))
        for (at_x, at_y), (_, points) in zip(means, shown, strict=True)
        for x, y, _ in points
        for part in (0.35, 0.7)
    ]
    boxes = place(
        means, sizes, [*means, *seeds, *along], (frame.left + 3, frame.top, frame.right, frame.bottom - 2), 10.0
    )
    labels: list[Html] = []
    for (x, y), (left, top), (box_width, box_height), name in zip(means, boxes, sizes, names, strict=True):
        near = (min(max(x, left), left + box_width), min(max(y, top), top + box_height))
        if math.dist(near, (x, y)) > 14:
            labels.append(line(x, y, *near, "leader"))
        anchor, at = ("start", left) if left + box_width / 2 >= x else ("end", left + box_width)
        labels.append(text(at, top + 11, name, "name halo", anchor))
    if aligned.values:
        labels.append(text(frame.left + 4, frame.y(aligned.mean) - 5, "aligned model", "note halo"))
    parts += [
        *labels,
        *marks,
        text((frame.left + frame.right) / 2, height - 6, f"{across.title} (further right is better)", "note", "middle"),
    ]
    summary = "; ".join(
        f"{group.label}: {across.title} {_told(Spread.of(x for x, _, _ in points))}, "
        f"MASR {_told(Spread.of(y for _, y, _ in points))} %"
        for group, points in shown
    )
    return svg(width, height, f"{across.title} against mean attack success rate, {condition}. {summary}.", *parts)


def task_over_time(run: Run, condition: str, styles: Mapping[str, Style], index: int, width: float) -> Html:
    """Accuracy on task ``index`` after each task from its own on; the mark at the far left is the aligned model."""
    task = run.tasks[index]
    before = Spread.of(
        float(value)
        for (_, stage), event in run.aligned.items()
        if stage == "after" and isinstance(value := (event.get("accuracy") or {}).get(task), (int, float))
    )

    def at(run: Run, branch: Branch, step: int) -> float:
        return float(branch_matrix(run, branch)[step - 1, index]) if step > index else math.nan

    return _small_panel(run, condition, styles, width, task, f"Accuracy on {task}", before, at, since=index + 1)


def skill_over_time(run: Run, condition: str, styles: Mapping[str, Style], key: str, width: float) -> Html:
    """Two panels beside the tasks: ``"AP"``, the mean of the tasks so far, and ``"base_skill"``."""
    if key == "AP":

        def at(run: Run, branch: Branch, step: int) -> float:
            row = branch_matrix(run, branch)[step - 1, :step] if step else ()
            return float(sum(row) / step) if step else math.nan

        return _small_panel(
            run, condition, styles, width, "all so far", "Mean accuracy on the tasks so far", None, at, since=1
        )

    def base(run: Run, branch: Branch, step: int) -> float:
        value = branch.evaluations.get(step - 1, {}).get("base_skill")
        return float(value) if isinstance(value, (int, float)) else math.nan

    before = aligned_row(run).metrics["base_skill"]
    return _small_panel(
        run, condition, styles, width, "base skill", "Accuracy on the base skills", before, base, since=1
    )


def glance(
    run: Run, condition: str, styles: Mapping[str, Style], keys: Sequence[str], width: float, per_row: int
) -> Html:
    """A column of dots for each metric: a small mark a seed, a large one and a number for the mean.

    Args:
        keys: metrics to show, ``per_row`` beside each other under one column of names.
    """
    rows = summary_rows(run, condition)
    start, shown = rows[0], [row for row in rows[1:] if row.seeds]
    if not shown:
        return _empty(width, 80, "No sequence has been finished yet.")
    chosen = [metric for key in keys for metric in METRICS if metric.key == key]
    step, value_room, gap = 21.0, 38.0, 22.0
    names = min(max(caption_width(row.label, 12) for row in shown), 0.36 * width)
    column = (width - names - 8 - gap * (per_row - 1)) / per_row
    tall = 24 + step * len(shown) + 34
    parts: list[Html | None] = []
    told = []
    for place_, metric in enumerate(chosen):
        top = 24 + tall * (place_ // per_row)
        left = names + 8 + (column + gap) * (place_ % per_row)
        frame, ticks = _glance_frame([start, *shown], metric, left, left + column - value_room, top, step * len(shown))
        parts.append(text(left, top - 10, f"{metric.title} {metric.arrow}", "head"))
        for tick in ticks:
            if frame.x_low <= tick <= frame.x_high:
                x = frame.x(tick)
                parts.append(line(x, frame.top, x, frame.bottom, "zero" if tick == 0 else "grid"))
                parts.append(text(x, frame.bottom + 14, short_number(tick, 0), "tick", "middle"))
        if start.metrics[metric.key].values:
            x = frame.x(start.metrics[metric.key].mean)
            parts.append(line(x, frame.top - 4, x, frame.bottom, "reference"))
        for number, row in enumerate(shown):
            y = top + step * (number + 0.5)
            if place_ % per_row == 0:
                parts.append(text(names, y + 4, _shorten(row.label, names, 12), "name", "end"))
            parts += _glance_row(row, metric, styles[row.label], frame, y)
            parts.append(text(left + column, y + 4, short_number(row.metrics[metric.key].mean), "value", "end"))
        told.append(f"{metric.title}: " + ", ".join(f"{row.label} {_told(row.metrics[metric.key])}" for row in shown))
    height = tall * math.ceil(len(chosen) / per_row) - 12
    return svg(width, height, f"Each metric at a glance, {condition}. {'; '.join(told)}.", *parts)


def _glance_frame(
    rows: Sequence[SummaryRow], metric: Metric, left: float, right: float, top: float, height: float
) -> tuple[Frame, list[float]]:
    """The scale of one metric, zero included, and its ticks."""
    values = [0.0, *(value for row in rows for value in row.metrics[metric.key].values)]
    low, high = padded(values, 0.05)
    low, high = (0.0 if min(values) == 0 else low), (0.0 if max(values) == 0 else high)
    return Frame(left, top, right, top + height, low, max(high, low + 1e-9), 0, 1), nice_ticks(
        low, high, max(3, int((right - left) / 34))
    )


def _glance_row(row: SummaryRow, metric: Metric, style: Style, frame: Frame, y: float) -> list[Html]:
    """The marks of one label."""
    values = row.metrics[metric.key]
    if not values.values:
        return []
    tip = f"{row.label}: {metric.title} {_told(values)}"
    return [
        line(frame.x(min(values.values)), y, frame.x(max(values.values)), y, f"spoke {style.classes}"),
        *(marker(style.shape, frame.x(value), y, 2.4, f"seed {style.classes}") for value in values.values),
        marker(style.shape, frame.x(values.mean), y, 4.8, f"mark {style.classes}", tip),
    ]


def kept_columns(
    blocks: Sequence[int],
    safety: Sequence[float],
    shared: Sequence[float],
    budget: Sequence[float],
    width: float,
    height: float,
) -> Html:
    """Share of columns put back per decoder block, in percent, stacked by where they came from.

    Args:
        blocks: block numbers, from 1.
        safety: columns in the safety focus alone.
        shared: columns in the overlap with the task focus, chosen by the balance score.
        budget: the share ``p`` the rule allows.
    """
    totals = [a + b for a, b in zip(safety, shared, strict=True)]
    ticks = nice_ticks(0.0, max(1.0, *totals, *(value for value in budget if math.isfinite(value))))
    frame = Frame(40, 12, width - 8, height - 36, 0.5, len(blocks) + 0.5, 0, ticks[-1])
    parts: list[Html | None] = [frame.y_axis(ticks, "%")]
    bar = 0.62 * (frame.x(1) - frame.x(0))
    every = max(1, math.ceil(26 / (frame.x(1) - frame.x(0))))
    for place_, block in enumerate(blocks, start=1):
        x, top = frame.x(place_), frame.y(totals[place_ - 1])
        middle = frame.y(safety[place_ - 1])
        tip = f"block {block}: {totals[place_ - 1]:.1f} % kept, {safety[place_ - 1]:.1f} % safety only"
        parts.append(
            el(
                "rect",
                el("title", tip),
                x=x - bar / 2,
                y=middle,
                width=bar,
                height=max(0.0, frame.bottom - middle),
                class_="bar safety",
            )
        )
        parts.append(el("rect", x=x - bar / 2, y=top, width=bar, height=max(0.0, middle - top), class_="bar shared"))
        if (place_ - 1) % every == 0 or place_ == len(blocks):
            parts.append(text(x, frame.bottom + 16, str(block), "tick", "middle"))
    parts.append(line(frame.left, frame.bottom, frame.right, frame.bottom, "axis"))
    parts.append(frame.path([(place_ + 1, value) for place_, value in enumerate(budget)], "budget"))
    parts.append(text((frame.left + frame.right) / 2, height - 4, "decoder block", "note", "middle"))
    listed = "; ".join(f"block {block} {value:.1f} %" for block, value in zip(blocks, totals, strict=True))
    return svg(width, height, f"Kept columns by decoder block: {listed}.", *parts)


def _small_panel(
    run: Run,
    condition: str,
    styles: Mapping[str, Style],
    width: float,
    title: str,
    told: str,
    before: Spread | None,
    at: Callable[[Run, Branch, int], float],
    since: int,
) -> Html:
    """A panel of the small multiples: percent over the sequence, one line a label, controls thin behind."""
    height = 36 + 0.62 * width
    steps = len(run.tasks)
    curves: list[tuple[Group, list[tuple[int, Spread]]]] = []
    for group in drawn(run, condition):
        points = [(step, _over_seeds(run, group, step, at)) for step in range(since, steps + 1)]
        curves.append((group, [(step, point) for step, point in points if point.values]))
    highest = max((max(point.values) for _, points in curves for _, point in points), default=0.0)
    if before is not None and before.values:
        highest = max(highest, *before.values)
    ticks = [0.0, 50.0, 100.0] if highest <= 100.0 else nice_ticks(0.0, highest, 3)  # CIDEr times 100 has no end there
    frame = Frame(30, 24, width - 8, height - 22, 0, steps, 0, ticks[-1])
    parts: list[Html | None] = [text(frame.left, 14, title, "head"), frame.y_axis(ticks)]
    for step in range(steps + 1):
        parts.append(text(frame.x(step), frame.bottom + 14, str(step), "tick", "middle"))
    if before is not None and before.values:
        if since == 1:
            y = frame.y(before.mean)
            parts.append(line(frame.left, y, frame.right, y, "reference"))
        parts.append(
            marker("circle", frame.x(0), frame.y(before.mean), 3.0, "mark start", f"aligned model: {_told(before)} %")
        )
    ends = []
    for group, points in curves:
        style = styles[group.label]
        if not points:
            continue
        if style.role == "main":
            parts.append(frame.band([(x, *_range(point)) for x, point in points], f"band {style.classes}"))
        parts.append(frame.path([(x, point.mean) for x, point in points], f"curve {style.classes}"))
        x, point = points[-1]
        tip = f"{group.label}, after {run.tasks[x - 1]}: {_told(point)} %"
        parts.append(
            marker(
                style.shape,
                frame.x(x),
                frame.y(point.mean),
                3.4 if style.role == "main" else 2.6,
                f"mark {style.classes}",
                tip,
            )
        )
        ends.append(f"{group.label} {_told(point)}")
    return svg(width, height, f"{told} over the sequence, {condition}. At the end: {'; '.join(ends)}.", *parts)


def _over_seeds(run: Run, group: Group, step: int, at: Callable[[Run, Branch, int], float]) -> Spread:
    """Over the finished seeds, so that a line does not jump where one ends early; over all while none is finished."""
    return Spread.of(at(run, branch, step) for branch in group.complete or group.unfinished)


def _safety_at(run: Run, branch: Branch, step: int) -> float:
    """MASR after ``step`` tasks; step 0 is the aligned model of the branch's seed."""
    event = run.aligned.get((branch.seed, "after")) if step == 0 else branch.evaluations.get(step - 1)
    try:
        return metrics.mean_attack_success_rate((event or {}).get("safety") or {})
    except (TypeError, ValueError):
        return math.nan


def _range(point: Spread) -> tuple[float, float]:
    return (min(point.values), max(point.values)) if point.values else (math.nan, math.nan)


def _told(point: Spread) -> str:
    """Mean and deviation in words, for tooltips and text alternatives."""
    told = short_number(point.mean)
    return f"{told} ± {short_number(point.sd)}" if math.isfinite(point.sd) else told


def _shorten(label: str, room: float, size: float) -> str:
    """The label, cut to fit ``room``."""
    if caption_width(label, size) <= room:
        return label
    return label[: max(1, int(room / caption_width("n", size)) - 1)].rstrip() + "…"


def _empty(width: float, height: float, message: str) -> Html:
    return svg(width, height, message, text(width / 2, height / 2, message, "note", "middle"))

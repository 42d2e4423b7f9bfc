"""The picture of a run: shares of the machine's limits, times faster than torch and libraries, and small calls."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Sequence
from itertools import groupby

from harness import COMPILED, LIMIT, OURS, TORCH
from results import Row

from hpa.report.markup import Html, el
from hpa.report.plot import Scale, line, nice_ticks, text

WIDTH, MARGIN, ROW = 920, 16, 19
BARS = (346.0, 600.0)  # left and right end of the scale
RATE = 690.0  # right ends of the columns of numbers
RATIOS = {TORCH: 752.0, COMPILED: 840.0, "library": 904.0}
STYLE = """
.ours { fill: var(--k1); }
.torch { fill: var(--c1); }
.target { stroke: var(--ink); stroke-width: 1.5; }
.strong { font-weight: 600; }
"""


def draw(rows: Sequence[Row]) -> str:
    """A drawing in SVG that carries its own style, in light and dark."""
    cases = [{row.contender: row for row in group} for _, group in groupby(rows, key=lambda row: row.key[:2])]
    bounded = [case for case in cases if case[OURS].limit]
    calls = [case for case in cases if case[OURS].kernel == "calls"]
    parts: list[Html] = []
    y = 22.0
    for section, chosen in ((_shares, bounded), (_calls, calls)):
        if chosen:
            drawn, y = section(chosen, y)
            parts += [*drawn]
            y += 22
    setting = rows[0].setting
    note = (
        f"{setting.cpu}, {setting.isa}, {setting.threads} threads; torch {setting.torch}, OpenBLAS of scipy "
        f"{setting.scipy}; medians, cold inputs, {setting.date}"
    )
    parts.append(text(MARGIN, y, note, "note"))
    height = y + 14
    style = importlib.resources.files("hpa.report").joinpath("plot.css").read_text() + STYLE
    drawing = el(
        "svg",
        el("title", _told(bounded)),
        el("style", Html(style)),
        el("rect", width=str(WIDTH), height=f"{height:g}", rx="6", style="fill:var(--paper)"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height:g}",
        width=str(WIDTH),
        height=f"{height:g}",
        role="img",
    )
    return drawing + "\n"


def _shares(cases: Sequence[dict[str, Row]], y: float) -> tuple[list[Html], float]:
    """Bars of the share of the limit, kernel by kernel, and the ratios beside them."""
    scale = Scale(0.0, 1.0, *BARS)
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    parts = [
        text(MARGIN, y, "Share of what the machine can do", "head"),
        text(RATIOS["library"], y, "times faster than", "head", "end"),
        *_legend(y),
        *(text(x, y + 20, name, "tick", "end") for name, x in RATIOS.items()),
        *(text(scale(tick), y + 20, f"{100 * tick:.0f} %", "tick", "middle") for tick in ticks),
    ]
    y += 27
    bottom = y + ROW * len(cases) + 7 * len({case[OURS].kernel for case in cases})
    parts += [line(scale(tick), y, scale(tick), bottom, "grid" if tick else "zero") for tick in ticks]
    kernel = ""
    for case in cases:
        ours = case[OURS]
        if ours.kernel != kernel:
            y += 7
            parts.append(text(MARGIN, y + 13, ours.kernel, "strong"))
            kernel = ours.kernel
        parts += _bars(scale(min(ours.share, 1.0)), scale(min(case[TORCH].share, 1.0)), y)
        if not math.isnan(ours.target):
            parts.append(line(scale(ours.target), y, scale(ours.target), y + 13, "target"))
        parts += [text(BARS[0] - 8, y + 13, ours.case, "tick", "end"), text(RATE, y + 13, _rate(ours), "tick", "end")]
        for name, x in RATIOS.items():
            row = _best_library(case) if name == "library" else case.get(name)
            if row is not None:
                parts.append(text(x, y + 13, _times(row.ratio), "strong" if name == TORCH else "", "end"))
        y += ROW
    return parts, y


def _calls(cases: Sequence[dict[str, Row]], y: float) -> tuple[list[Html], float]:
    """Microseconds of calls on 1,000 elements."""
    ticks = nice_ticks(0.0, max(case[name].p50_ms * 1e3 for case in cases for name in (OURS, TORCH)))
    scale = Scale(0.0, ticks[-1], *BARS)
    parts = [
        text(MARGIN, y, "Time of a call on 1,000 elements", "head"),
        *(text(scale(tick), y, f"{tick:g} \N{MICRO SIGN}s", "tick", "middle") for tick in ticks),
    ]
    y += 8
    parts += [line(scale(tick), y, scale(tick), y + ROW * len(cases), "grid" if tick else "zero") for tick in ticks]
    for case in cases:
        microseconds = case[OURS].p50_ms * 1e3
        parts += _bars(scale(microseconds), scale(case[TORCH].p50_ms * 1e3), y)
        if not math.isnan(case[OURS].target_us):
            parts.append(line(scale(case[OURS].target_us), y, scale(case[OURS].target_us), y + 13, "target"))
        parts += [
            text(BARS[0] - 8, y + 13, case[OURS].case, "tick", "end"),
            text(RATE, y + 13, f"{microseconds:.1f} \N{MICRO SIGN}s", "tick", "end"),
            text(RATIOS[TORCH], y + 13, _times(case[TORCH].ratio), "strong", "end"),
        ]
        y += ROW
    return parts, y


def _bars(ours: float, torch: float, y: float) -> list[Html]:
    """From the zero line to these places: a thick bar, and a thin one below it."""
    return [
        el("rect", x=BARS[0], y=y + 2, width=ours - BARS[0], height=9.0, class_="ours"),
        el("rect", x=BARS[0], y=y + 12, width=torch - BARS[0], height=4.0, class_="torch"),
    ]


def _legend(y: float) -> list[Html]:
    return [
        el("rect", x=346.0, y=y - 9, width=22.0, height=9.0, class_="ours"),
        text(374, y, "hpa_ext"),
        el("rect", x=434.0, y=y - 6, width=22.0, height=4.0, class_="torch"),
        text(462, y, "torch by hand"),
        line(553, y - 11, 553, y + 1, "target"),
        text(560, y, "target"),
    ]


def _best_library(case: dict[str, Row]) -> Row | None:
    """The fastest contender that is a routine of a library."""
    others = [row for name, row in case.items() if name not in (OURS, TORCH, COMPILED, LIMIT)]
    return min(others, key=lambda row: row.p50_ms, default=None)


def _rate(row: Row) -> str:
    return f"{row.rate:.0f} {row.unit}" if row.rate >= 10 else f"{row.rate:.1f} {row.unit}"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}\N{MULTIPLICATION SIGN}" if ratio >= 9.95 else f"{ratio:.1f}\N{MULTIPLICATION SIGN}"


def _told(cases: Sequence[dict[str, Row]]) -> str:
    told = (
        f"{case[OURS].kernel} {case[OURS].case}: {100 * case[OURS].share:.0f} % of the machine's limit, "
        f"{case[TORCH].ratio:.1f} times torch"
        for case in cases
    )
    return "; ".join(told) + "."

"""What a run prints: the machine, a block for each case, targets met and missed, and a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from harness import LIMIT, OURS
from machine import LIMITS, Machine
from results import Comparison, Row, Setting


def print_header(setting: Setting, machine: Machine) -> None:
    print(f"{setting.cpu}, {setting.isa}, {setting.threads} threads; hpa-ext {setting.hpa_ext} ({setting.commit}),")
    print(f"torch {setting.torch}, numpy {setting.numpy}, scipy {setting.scipy}; {setting.compiler}; {setting.date}")
    if machine.missing:
        print(machine.missing)
    else:
        rates = (f"{name} {rate / 1e9:.0f} {LIMITS[name]}" for name, rate in machine.rates.items())
        print(f"limits of the machine: {', '.join(rates)}")
    print(f"\n{'':26}{'ms':>10} {'p20':>9} {'p80':>9} {'rate':>14} {'of limit':>9} {'x ours':>8}  target")


def print_rows(rows: Sequence[Row]) -> None:
    """One case, as soon as it is measured."""
    limit = f", bound by {rows[0].limit}" if rows[0].limit else ""
    print(f"{rows[0].kernel}, {rows[0].case}{limit}")
    for row in rows:
        rate = "" if math.isnan(row.rate) else f"{row.rate:.1f} {row.unit}"
        share = "" if math.isnan(row.share) or row.contender == LIMIT else f"{100 * row.share:.0f} %"
        ratio = "" if row.contender in (OURS, LIMIT) else f"{row.ratio:.2f}"
        times = " ".join(f"{_digits(value):>{width}}" for value, width in zip(_times(row), (10, 9, 9), strict=True))
        print(f"  {row.contender:<24}{times} {rate:>14} {share:>9} {ratio:>8}  {target(row)}", flush=True)


def print_targets(rows: Sequence[Row], seconds: float) -> None:
    met = sum(row.met is True for row in rows)
    missed = [row for row in rows if row.met is False]
    print(f"\n{met} targets met, {len(missed)} missed; {seconds:.0f} s")
    for row in missed:
        print(f"  {row.kernel}, {row.case}, {_against(row)}: {_reached(row)}, target {_wanted(row)}")


def print_comparison(comparison: Comparison, path: Path) -> None:
    if comparison.not_comparable:
        print(f"\nnot compared with {path}: {comparison.not_comparable}")
        return
    print(f"\n{comparison.compared} cases compared with {path}: {len(comparison.slower)} slower by more than the noise")
    for title, lines in (("slower", comparison.slower), ("faster", comparison.faster)):
        for line in lines:
            print(f"  {title}: {line}")


def target(row: Row) -> str:
    """The row's targets and whether they are met."""
    return "" if row.met is None else f"{_wanted(row)} {'met' if row.met else 'MISSED'}"


def _wanted(row: Row) -> str:
    parts = []
    if not math.isnan(row.target):
        parts.append(f">= {100 * row.target:.0f} %" if row.contender == OURS else f">= {row.target:g}")
    if not math.isnan(row.target_us):
        parts.append(f"<= {row.target_us:g} us")
    return " and ".join(parts)


def _times(row: Row) -> tuple[float, float, float]:
    return row.p50_ms, row.p20_ms, row.p80_ms


def _digits(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def _against(row: Row) -> str:
    return f"share of {row.limit}" if row.contender == OURS and row.limit else row.contender


def _reached(row: Row) -> str:
    if row.contender != OURS:
        return f"{row.ratio:.2f}"
    return f"{row.p50_ms * 1e3:.2f} us" if math.isnan(row.target) else f"{100 * row.share:.0f} %"

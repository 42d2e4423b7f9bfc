"""Rows of a benchmark: how they follow from timings, the CSV file, and what got slower since another one."""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import harness
import numpy as np
import scipy
import torch
from harness import LIMIT, OURS, TORCH, Case, Timing
from machine import LIMITS, Machine, cpu_name

import hpa_ext
from hpa_ext import backend

_FLOOR = 0.03  # a change of the median below this is never called one


@dataclass(frozen=True)
class Setting:
    """What the figures of a run depend on; every row has it."""

    cpu: str
    isa: str
    threads: int
    hpa_ext: str
    torch: str
    numpy: str
    scipy: str
    compiler: str
    commit: str
    date: str


@dataclass(frozen=True)
class Row:
    """One contender in one case.  Times are milliseconds."""

    kernel: str
    case: str
    contender: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    rate: float
    """GB/s or GFLOP/s, from the least bytes or flops of the case; nan where it has neither."""
    unit: str
    limit: str
    """Which limit of the machine the case meets first."""
    share: float
    """Of that limit, as measured in the same rounds; nan where there is none."""
    ratio: float
    """Time over ours, median over rounds."""
    target: float
    """Least ratio (least share in the row of ours) that the project holds itself to; nan where there is none."""
    target_us: float
    """Most microseconds, in the row of ours."""
    setting: Setting

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.case, self.contender

    @property
    def noise_ms(self) -> float:
        return (self.p80_ms - self.p20_ms) / 2

    @property
    def met(self) -> bool | None:
        """Whether the row meets its targets; ``None`` without one, or without a limit to hold it against."""
        verdicts = []
        reached = self.share if self.contender == OURS else self.ratio
        if not np.isnan(self.target) and not np.isnan(reached):
            verdicts.append(reached >= self.target)
        if not np.isnan(self.target_us):
            verdicts.append(self.p50_ms * 1e3 <= self.target_us)
        return all(verdicts) if verdicts else None


def setting_of(threads: int) -> Setting:
    extension = backend.extension()
    return Setting(
        cpu=cpu_name(),
        isa=extension.isa(),
        threads=threads,
        hpa_ext=hpa_ext.__version__,
        torch=torch.__version__,
        numpy=np.__version__,
        scipy=scipy.__version__,
        compiler=extension.build_info()["compiler"],
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    )


def rows_of(case: Case, timings: dict[str, Timing], machine: Machine | None, setting: Setting) -> list[Row]:
    limit, amount = case.bound(machine.rates) if machine is not None else ("", 0.0)
    if not limit:  # a rate all the same
        amount = case.flops or case.bytes_moved
    unit = LIMITS[limit if limit else case.arithmetic if case.flops else case.memory] if amount else ""
    rows = []
    for name, timing in timings.items():
        median = timing.quantile(0.5)
        rows.append(
            Row(
                kernel=case.kernel,
                case=case.case,
                contender=name,
                p20_ms=timing.quantile(0.2) * 1e3,
                p50_ms=median * 1e3,
                p80_ms=timing.quantile(0.8) * 1e3,
                rounds=len(timing.seconds),
                rate=amount / median / 1e9 if amount else np.nan,
                unit=unit,
                limit=limit,
                share=harness.ratio(timings[LIMIT], timing) if LIMIT in timings else np.nan,
                ratio=harness.ratio(timing, timings[OURS]),
                target=case.targets.get(LIMIT if name == OURS else name, np.nan) if name != LIMIT else np.nan,
                target_us=case.targets.get("microseconds", np.nan) if name == OURS else np.nan,
                setting=setting,
            )
        )
    return rows


def write(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(f.name for f in fields(Row) if f.name != "setting"), *(f.name for f in fields(Setting))])
        for row in rows:
            values = asdict(row)
            values.update(values.pop("setting"))
            writer.writerow([_written(value) for value in values.values()])


def read(path: Path) -> list[Row]:
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            setting = Setting(**{f.name: line.pop(f.name) for f in fields(Setting)})  # type: ignore[arg-type]
            numbers = {
                name: float(line.pop(name) or "nan")
                for name in ("p20_ms", "p50_ms", "p80_ms", "rate", "share", "ratio", "target", "target_us")
            }
            setting = Setting(**{**asdict(setting), "threads": int(setting.threads)})
            rows.append(Row(rounds=int(line.pop("rounds")), setting=setting, **numbers, **line))
    return rows


@dataclass(frozen=True)
class Comparison:
    slower: list[str]
    faster: list[str]
    compared: int
    not_comparable: str
    """Why nothing could be compared, if so."""

    @property
    def exit_status(self) -> int:
        return 2 if self.not_comparable else 1 if self.slower else 0


def compare(old: Sequence[Row], new: Sequence[Row]) -> Comparison:
    """What ours got slower and faster at, by more than the noise (half of p20 to p80) of both runs together.

    A case counts only if it also changed relative to its yardstick in the same rounds (the machine's limit, else
    torch), so that a machine that is slower today is not taken for a slower kernel.
    """
    before = {row.key: row for row in old}
    after = {row.key: row for row in new}
    settings = {_machine(row.setting) for row in old}, {_machine(row.setting) for row in new}
    if settings[0] != settings[1]:
        told = [" and ".join(sorted(", ".join(map(str, one)) for one in side)) or "nothing" for side in settings]
        return Comparison([], [], 0, f"other machine or settings: {told[0]} then, {told[1]} now")
    shared = [key for key in after if key in before and key[2] == OURS]
    if not shared:
        return Comparison([], [], 0, "no case is in both")
    slower, faster = [], []
    for kernel, case, _ in shared:
        change = _change(before[kernel, case, OURS], after[kernel, case, OURS])
        told = f"{kernel} {case}: {before[kernel, case, OURS].p50_ms:.4g} -> {after[kernel, case, OURS].p50_ms:.4g} ms"
        for yardstick in (LIMIT, TORCH):
            pair = before.get((kernel, case, yardstick)), after.get((kernel, case, yardstick))
            if pair[0] is not None and pair[1] is not None:
                drift = pair[1].p50_ms / pair[0].p50_ms
                told += f" ({yardstick} {drift:.2f}x)"
                change = _smaller(change, _change(before[kernel, case, OURS], after[kernel, case, OURS], drift))
                break
        if change > 0:
            slower.append(told)
        elif change < 0:
            faster.append(told)
    return Comparison(slower, faster, len(shared), "")


def _change(old: Row, new: Row, drift: float = 1.0) -> float:
    """How much slower (> 0) or faster (< 0) beyond the noise, in milliseconds; ``drift``: of the yardstick."""
    difference = new.p50_ms / drift - old.p50_ms
    noise = max(old.noise_ms + new.noise_ms / drift, _FLOOR * old.p50_ms)
    return float(np.sign(difference) * max(0.0, abs(difference) - noise))


def _smaller(a: float, b: float) -> float:
    """The one nearer to zero; zero where they disagree in sign."""
    return 0.0 if a * b <= 0 else min(a, b, key=abs)


def _machine(setting: Setting) -> tuple[str, str, int]:
    return setting.cpu, setting.isa, setting.threads


def _written(value: object) -> object:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.5g}"
    return value


def _commit() -> str:
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return asked.stdout.strip()

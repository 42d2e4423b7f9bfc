"""How a run goes, for the eye (bars with the time left) and for a log (one plain line a finished step)."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from hpa.continual import Event, Failure
from hpa.evaluation.metrics import mean_attack_success_rate, over_refusal

__all__ = ["Bars", "Lines", "TimeLeft", "describe", "duration"]

Step = tuple[str, int]  # kind and task index


class TimeLeft:
    """An estimate of the seconds left, from what the steps that are over have taken.

    A step of a kind and task that was timed before costs the mean of those; else the mean of its kind, whatever the
    task; a kind that was never timed makes the estimate unknown.
    """

    def __init__(self) -> None:
        self.pending: Counter[Step] = Counter()
        self.total = 0
        self.workers = 1
        self._seconds: dict[Step, list[float]] = defaultdict(list)
        self._since = time.monotonic()

    def expect(self, steps: Sequence[tuple[str, str, int]], workers: int) -> None:
        self.pending = Counter((kind, index) for _, kind, index in steps)
        self.total = len(steps)
        self.workers = max(1, workers)
        self._since = time.monotonic()

    @property
    def done(self) -> int:
        return self.total - sum(self.pending.values())

    def event(self, event: Event) -> None:
        step = (str(event["event"]), int(event.get("task_index", -1)))
        if self.pending[step] > 0:
            self.pending[step] -= 1
            self._seconds[step].append(float(event.get("seconds") or 0.0))
            self._since = time.monotonic()

    def seconds(self) -> float | None:
        """Seconds left from now, or ``None`` while there is nothing to tell from."""
        kinds: dict[str, list[float]] = defaultdict(list)
        for (kind, _), values in self._seconds.items():
            kinds[kind] += values
        seconds = 0.0
        for (kind, index), count in self.pending.items():
            timed = self._seconds.get((kind, index)) or kinds.get(kind)
            if count and not timed:
                return None
            if count and timed:
                seconds += count * sum(timed) / len(timed)
        return max(0.0, seconds / self.workers - (time.monotonic() - self._since))


class Lines:
    """One plain line for each finished step: for logs, pipes and ``--quiet``."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._left = TimeLeft()
        self._told: set[str] = set()  # what fails for one reason in many branches is told at length once

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def expect(self, steps: Sequence[tuple[str, str, int]], workers: int) -> None:
        self._left.expect(steps, workers)
        self._say(f"{len(steps)} steps to do, {workers} at once" if steps else "nothing left to do")

    def message(self, text: str) -> None:
        self._say(text)

    def progress(self, where: str, what: str, done: int, total: int) -> None:
        # Steps without an event of their own are told when they begin, for they may take minutes.
        if total == 0 and not where.count("/"):
            self._say(f"{where}: {what}")

    def event(self, event: Event) -> None:
        self._left.event(event)
        text = describe(event)
        if text is None:
            return
        left = self._left.seconds()
        about = f", about {duration(left)} left" if left is not None and self._left.done < self._left.total else ""
        self._say(f"[{self._left.done}/{self._left.total}{about}] {text}")

    def ended(self, where: str) -> None:
        del where

    def failed(self, failure: Failure) -> None:
        self._say(f"FAILED {failure.where}: {failure.error}")
        if failure.traceback not in self._told:
            self._told.add(failure.traceback)
            self._say(failure.traceback.rstrip())

    def _say(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=self._stream, flush=True)


@dataclass
class _Place:
    """A line of the display: whose it is, what is done there, and since when."""

    task: TaskID
    what: str
    since: float


class Bars:
    """A bar over all branches with the time left, and a line for each branch that is being worked on."""

    def __init__(self, console: Console | None = None) -> None:
        self._left = TimeLeft()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
        )
        self._told: set[str] = set()
        self._all: TaskID | None = None
        self._places: dict[str, _Place] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def expect(self, steps: Sequence[tuple[str, str, int]], workers: int) -> None:
        self._left.expect(steps, workers)
        self._all = self._progress.add_task("all branches", total=max(1, len(steps)), count="", note="")
        self._refresh()

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def progress(self, where: str, what: str, done: int, total: int) -> None:
        text = f"{where}  {what}"
        place = self._places.get(where)
        if place is None:
            task = self._progress.add_task(text, total=None, count="", note="")
            place = self._places[where] = _Place(task, what, time.monotonic())
        if place.what != what:
            place.what, place.since = what, time.monotonic()
        count, note = "", ""
        if total:
            count = f"{done}/{total}"
            left = (time.monotonic() - place.since) * (total - done) / max(1, done)
            note = f"{duration(left)} left" if done else ""
        self._progress.update(place.task, description=text, completed=done, total=total or None, count=count, note=note)
        self._refresh()

    def event(self, event: Event) -> None:
        self._left.event(event)
        self._refresh()
        text = describe(event)
        if text is not None and event["event"] in ("evaluate", "aligned", "finished"):
            self._progress.console.print(text, markup=False, highlight=False)

    def ended(self, where: str) -> None:
        place = self._places.pop(where, None)
        if place is not None:
            self._progress.remove_task(place.task)

    def failed(self, failure: Failure) -> None:
        self._progress.console.print(f"FAILED {failure.where}: {failure.error}", markup=False, style="bold red")
        if failure.traceback not in self._told:
            self._told.add(failure.traceback)
            self._progress.console.print(failure.traceback.rstrip(), markup=False, highlight=False, style="red")

    def _refresh(self) -> None:
        if self._all is None:
            return
        left = self._left.seconds()
        note = f"{duration(left)} left" if left is not None else "time left not known yet"
        count = f"{self._left.done}/{self._left.total}"
        self._progress.update(self._all, completed=self._left.done, count=count, note=note)


def describe(event: Event) -> str | None:
    """A finished step in one line; ``None`` for events that only carry data."""
    kind, took = event["event"], f"{float(event.get('seconds') or 0.0):.1f} s"
    where = f"{event.get('branch')}  task {int(event.get('task_index', 0)) + 1} {event.get('task')}:"
    if kind == "aligned":
        return f"seed {event['seed']}, {event['stage']} alignment: {_judged(event)} ({took})"
    if kind == "train":
        return f"{where} trained, {event['steps']} steps, loss {_number(event['loss'], 3)} ({took})"
    if kind == "edit":
        return f"{where} edited, {len(event['layers'])} layers ({took})"
    if kind == "evaluate":
        values = list(event["accuracy"].values())
        mean = sum(values) / len(values)
        return f"{where} AP {mean:.1f}, just learned {_number(values[-1])}, {_judged(event)} ({took})"
    if kind == "finished":
        return f"{event['branch']}  finished ({duration(float(event.get('seconds') or 0.0))})"
    return None


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _judged(event: Event) -> str:
    parts = [f"base skill {_number(event.get('base_skill'))}"] if event.get("base_skill") is not None else []
    if event.get("safety"):
        parts.append(f"MASR {_number(mean_attack_success_rate(event['safety']))}")
    if event.get("benign"):
        parts.append(f"over-refusal {_number(over_refusal(event['benign']))}")
    if event.get("empty_answers"):
        parts.append(f"{event['empty_answers']} empty answers")
    return ", ".join(parts)


def _number(value: Any, digits: int = 1) -> str:
    return "-" if value is None else f"{float(value):.{digits}f}"

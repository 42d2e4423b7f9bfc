"""Kill a run at many places, resume it, and say whether it ended as an uninterrupted one.  Run as a script.

Every moment that matters lies before a call of ``os.fsync``: a file is written but not yet in its place, in its place
but its step not yet in the journal, or a journal line is just written.  So a child process kills itself (SIGKILL)
instead of its n-th call, another child resumes, and the events of the two runs are compared.  Processes are forked from
this one, which has imported everything once and started no thread.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import tiny_scenario  # noqa: F401
import torch

import hpa.workers  # noqa: F401 - imported late by what is tested; once here, not in every child
from hpa.continual import run
from hpa.recipe import load_recipe


def in_child(work: Callable[[], None]) -> int:
    """Exit status of ``work`` in a forked child; -9 where it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def results(folder: Path) -> dict[str, Any]:
    """Everything in the event log but times, by event."""
    found = {}
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        key = "|".join(str(event.pop(name, "")) for name in ("event", "branch", "seed", "stage", "task_index"))
        assert key not in found, f"{key} stands twice in the log"
        found[key] = {name: value for name, value in event.items() if name not in ("seconds", "created")}
    return found


def main(recipe: str, root: str, points: int) -> None:
    torch.set_num_threads(1)
    config = load_recipe(Path(recipe))
    base, cache = Path(root), Path(root) / "cache"
    fsync = os.fsync
    counter = base / "count"

    def complete() -> None:
        calls = 0

        def counted(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            fsync(descriptor)

        os.fsync = counted
        failures = run(config, base / "whole", cache=cache).failures
        assert not failures, failures
        counter.write_text(str(calls))

    def killed_at(call: int, folder: Path) -> None:
        calls = 0

        def counted(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = counted
        run(config, folder, cache=cache)

    def resumed(folder: Path) -> None:
        failures = run(config, folder, cache=cache).failures
        assert not failures, failures

    assert in_child(complete) == 0
    total = int(counter.read_text())
    whole = results(base / "whole")
    report = []
    for point in range(points):
        call = 1 + round(point * (total - 1) / (points - 1))
        folder = base / f"killed{call}"
        status = in_child(lambda call=call, folder=folder: killed_at(call, folder))  # type: ignore[misc]
        again = in_child(lambda folder=folder: resumed(folder))  # type: ignore[misc]
        after = results(folder) if again == 0 else {}
        report.append(
            {
                "call": call,
                "killed": status,
                "resumed": again,
                "different": sorted(key for key in {*whole, *after} if whole.get(key) != after.get(key)),
                "left": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.endswith(".tmp")),
            }
        )
        shutil.rmtree(folder)
    print(json.dumps({"total": total, "events": len(whole), "points": report}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""Branches side by side: worker processes that take one unit of work after another.

Workers are spawned, not forked (torch's thread pools do not survive a fork), and each keeps its scenario and base
model from one unit to the next.  They write their own journals; the parent writes the event log from what they say.
A worker ends with its parent, whatever way the parent ends, so nobody writes into a folder that is no longer locked.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from hpa.continual import Event, Failure, Listener, Session, Unit
from hpa.recipe import RunConfig, slug
from hpa.storage import write_file

__all__ = ["run_units"]


def run_units(session: Session, units: Sequence[Unit], listener: Listener) -> list[Failure]:
    """Carry out units, each after those it waits for; ``session.config.jobs`` of them at once.

    Returns:
        the failures, told to the listener too.  What waits for a failed alignment is not started, and is one as well.
    """
    jobs = min(session.config.jobs, len(units))
    if jobs == 1:
        return _in_this_process(session, units, listener)
    return _Pool(session, jobs, listener).run(units)


def _in_this_process(session: Session, units: Sequence[Unit], listener: Listener) -> list[Failure]:
    ledger = _Ledger(session, listener)
    threads = torch.get_num_threads()
    torch.set_num_threads(session.config.threads)
    try:
        for unit in units:
            if ledger.cannot_start(unit):
                continue
            try:
                session.carry_out(unit, listener)
            except Exception as error:  # one branch that fails must not take the others with it
                ledger.failed(unit, f"{type(error).__name__}: {error}", traceback.format_exc())
            else:
                ledger.succeeded(unit)
            listener.ended(unit.id)
    finally:
        torch.set_num_threads(threads)
    return ledger.failures


class _Ledger:
    """Which units failed, and which cannot start because of it."""

    def __init__(self, session: Session, listener: Listener) -> None:
        self.session = session
        self.listener = listener
        self.failures: list[Failure] = []
        self._reasons: dict[str, str] = {}

    def succeeded(self, unit: Unit) -> None:
        self.session.error_log(unit).unlink(missing_ok=True)

    def failed(self, unit: Unit, error: str, trace: str) -> None:
        log = self.session.error_log(unit)
        write_file(log, trace)
        # A first training that failed is tried again, and then told, by each branch that needs it.
        if unit.kind != "first":
            self._reasons[unit.id] = error
            self._tell(Failure(unit.id, error, trace, log))

    def cannot_start(self, unit: Unit) -> bool:
        """Whether something that ``unit`` waits for has failed; if so, that is told."""
        failed = next((other for other in unit.after if other in self._reasons), None)
        if failed is None:
            return False
        if unit.kind == "branch":
            error = f"not started, because {failed} failed: {self._reasons[failed]}"
            log = self.session.folder / "shared" / f"error-{slug(failed)}.txt"
            self._tell(Failure(unit.id, error, error, log))
        return True

    def _tell(self, failure: Failure) -> None:
        self.failures.append(failure)
        self.listener.failed(failure)


class _Worker:
    """One process and the two ends of its conversation."""

    def __init__(self, session: Session) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        config = session.config
        with _environment(OMP_NUM_THREADS=str(config.threads), MKL_NUM_THREADS=str(config.threads)):
            self.process = context.Process(
                target=_work,
                args=(theirs, config.model_dump(mode="json"), str(session.folder), str(session.cache)),
                name="hpa worker",
                daemon=True,
            )
            self.process.start()
        theirs.close()
        self.unit: Unit | None = None

    def give(self, unit: Unit) -> None:
        self.unit = unit
        # A worker that died while it waited is noticed where its answers are read.
        with suppress(OSError):
            self.connection.send(unit)

    def stop(self) -> None:
        """End the process: at once where it works, else as soon as it has put its things away."""
        if self.unit is not None:
            self.process.terminate()
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _Pool:
    def __init__(self, session: Session, jobs: int, listener: Listener) -> None:
        self.session = session
        self.jobs = jobs
        self.listener = listener
        self.ledger = _Ledger(session, listener)

    def run(self, units: Sequence[Unit]) -> list[Failure]:
        waiting = list(units)
        unfinished = {unit.id for unit in units}
        workers: list[_Worker] = []
        try:
            # All at once: a worker that has to wait for its first unit imports torch in the meantime.
            workers = [_Worker(self.session) for _ in range(self.jobs)]
            while unfinished:
                self._hand_out(workers, waiting, unfinished)
                busy: dict[Any, _Worker] = {worker.connection: worker for worker in workers if worker.unit is not None}
                for connection in wait(list(busy)):
                    over = self._hear(busy[connection], workers)
                    if over is not None:
                        unfinished.discard(over.id)
        finally:
            for worker in workers:
                worker.stop()
        return self.ledger.failures

    def _hand_out(self, workers: list[_Worker], waiting: list[Unit], unfinished: set[str]) -> None:
        """Give every idle worker a unit that need not wait, as long as there are any."""
        ready = [unit for unit in waiting if not any(other in unfinished for other in unit.after)]
        for unit in ready:
            if self.ledger.cannot_start(unit):
                waiting.remove(unit)
                unfinished.discard(unit.id)
                continue
            idle = next((worker for worker in workers if worker.unit is None), None)
            if idle is None and len(workers) < self.jobs:  # one has died
                idle = _Worker(self.session)
                workers.append(idle)
            if idle is None:
                return
            waiting.remove(unit)
            idle.give(unit)

    def _hear(self, worker: _Worker, workers: list[_Worker]) -> Unit | None:
        """Take one message of a worker; returns its unit if that is over."""
        unit = worker.unit
        assert unit is not None
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            workers.remove(worker)
            worker.process.join()
            kind, content = "died", worker.process.exitcode
        if kind == "event":
            self.listener.event(content)
        elif kind == "progress":
            self.listener.progress(*content)
        elif kind == "message":
            self.listener.message(content)
        if kind not in ("done", "failed", "died"):
            return None
        worker.unit = None
        if kind == "done":
            self.ledger.succeeded(unit)
        elif kind == "failed":
            self.ledger.failed(unit, *content)
        else:
            killed = " (killed: out of memory?)" if content == -signal.SIGKILL else ""
            text = f"the worker process ended with exit code {content}{killed}"
            self.ledger.failed(unit, text, text)
        self.listener.ended(unit.id)
        return unit


class _Speaker:
    """A listener that passes everything on to the parent."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def expect(self, steps: Sequence[tuple[str, str, int]], workers: int) -> None:
        del steps, workers

    def message(self, text: str) -> None:
        self.connection.send(("message", text))

    def progress(self, where: str, what: str, done: int, total: int) -> None:
        self.connection.send(("progress", (where, what, done, total)))

    def event(self, event: Event) -> None:
        self.connection.send(("event", event))

    def ended(self, where: str) -> None:
        del where  # the parent knows when a unit is over

    def failed(self, failure: Failure) -> None:
        del failure


def _work(connection: Connection, config: Mapping[str, Any], folder: str, cache: str) -> None:
    """The life of a worker."""
    # Ctrl-C reaches the whole group; the parent alone decides, and then terminates its workers, which leave in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    _end_with_parent()
    settings = RunConfig.model_validate(config)
    torch.set_num_threads(settings.threads)
    speaker = _Speaker(connection)
    session: Session | None = None
    while True:
        try:
            unit = connection.recv()
        except EOFError:
            return
        try:
            session = session or Session(settings, Path(folder), cache=Path(cache))
            session.carry_out(unit, speaker)
            connection.send(("done", None))
        except Exception as error:  # told to the parent, who goes on with the other branches
            connection.send(("failed", (f"{type(error).__name__}: {error}", traceback.format_exc())))


def _end_with_parent() -> None:
    """End this process when its parent has ended, even by SIGKILL: in order if it can, in two seconds in any case."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    former = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in former.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value

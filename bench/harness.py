"""Times a case: its contenders take turns in random order, on inputs that no cache holds, until the medians are steady.

A kernel's file ``bench_<kernel>.py`` has one function ``cases(shrink)`` that yields :class:`Case` objects; ``shrink``
divides the sizes, so that the tests can run every contender in a moment.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import Machine, last_level_cache
from torch import Tensor

OURS, TORCH, COMPILED, LIMIT = "hpa_ext", "torch", "torch.compile", "machine"

# Threads of another pool than torch's (OpenBLAS, the machine's limits) spin for up to 27 ms after their work.
_PAUSE = 0.04
# Threads that have waited for others are asleep, and the system may wake the second one on the core of the first: a
# call then takes as long as with one thread.  One that lasts so long does not notice.
_LONG = 0.05
_MEMORY = 1200 * 2**20  # for copies of the inputs


@dataclass(frozen=True)
class Case:
    """One piece of work and those who do it; everything in ``contenders`` is called with one copy of the inputs."""

    kernel: str
    case: str
    inputs: Callable[[], tuple[Any, ...]]
    contenders: dict[str, Callable[..., Any]]
    """The first is ours (:data:`OURS`), :data:`TORCH` is written by hand, others are named after their routine."""
    compiled: Callable[..., Any] | None = None
    """What ``torch.compile`` gets, where it has something to gain: not where each operation is a call into LAPACK."""
    result: Callable[..., Sequence[Tensor]] = lambda returned, *_: [returned]
    """From what a contender returned and the inputs: the tensors in which contenders must agree."""
    tolerance: float = 1e-4
    """Of that agreement, relative to the largest element."""
    reset: Callable[..., Any] | None = None
    """Puts a copy of the inputs back as it was; not timed."""
    bytes_moved: float = 0
    """The least that has to go between memory and cores, and how (a limit of the machine)."""
    memory: str = "read"
    flops: float = 0
    """The least arithmetic, and its kind (a limit of the machine)."""
    arithmetic: str = "fp32"
    targets: dict[str, float] = field(default_factory=dict)
    """Times faster than a contender, share of the limit (:data:`LIMIT`) and ``"microseconds"``: at least, at most."""
    level: str = "default"
    """``"quick"``, ``"default"`` or ``"full"``: the smallest run that has this case."""
    warm: bool = False
    """Inputs may stay in the caches: work that is bound by arithmetic, or small calls."""

    def bound(self, rates: dict[str, float]) -> tuple[str, float]:
        """The limit that this case meets first, and the bytes or flops that count against it; ``("", 0)``: none."""
        demands = [(self.memory, self.bytes_moved), (self.arithmetic, self.flops)]
        known = [(limit, amount) for limit, amount in demands if amount and rates.get(limit)]
        return max(known, key=lambda demand: demand[1] / rates[demand[0]], default=("", 0.0))


_DRAWS = 16
_SMALL = 16 << 10  # bytes of which that many fit the second-level cache


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender in the rounds of one case, in the order of rounds."""

    seconds: list[float]

    def quantile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        position = share * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def steady(self) -> bool:
        """Whether the standard error of the median is below one percent (for a normal distribution)."""
        sigma = (self.quantile(0.8) - self.quantile(0.2)) / 1.683
        return 1.253 * sigma / math.sqrt(len(self.seconds)) < 0.01 * self.quantile(0.5)


@dataclass(frozen=True)
class Effort:
    """When to stop: at ``seconds`` for a case, or when every median is steady, but not before ``rounds`` rounds."""

    seconds: float
    rounds: int


def measure(case: Case, effort: Effort, machine: Machine | None = None, compiled: bool = True) -> dict[str, Timing]:
    """Times all contenders of a case, and beside them the limit of the machine that the case meets first."""
    copies = _copies(case)
    calls = dict(case.contenders)
    if compiled and case.compiled is not None:
        calls[COMPILED] = compile_for(case)
    alone = {name: _warm_up(call, case, copies) for name, call in calls.items()}
    turn = 0

    def seconds_of(name: str, count: int) -> float:
        nonlocal turn
        call = calls[name]
        batch = [copies[(turn + i) % len(copies)] for i in range(count)]
        turn += count
        if case.reset is not None:
            for inputs in batch:
                case.reset(*inputs)
        start = time.perf_counter()
        for inputs in batch:
            call(*inputs)
        return time.perf_counter() - start

    def sample(name: str) -> float:
        count = max(1, min(2000, math.ceil(2e-3 / alone[name])))
        if alone[name] < _LONG:
            seconds_of(name, count)  # wakes its threads
        return seconds_of(name, count) / count

    limit, amount = case.bound(machine.rates) if machine is not None else ("", 0.0)
    names = [*calls, LIMIT] if limit else list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + effort.seconds
        while True:
            order.shuffle(names)
            for name in names:
                if name == LIMIT:
                    assert machine is not None
                    seconds[name].append(amount / machine.measure(limit))
                else:
                    seconds[name].append(sample(name))
                if name not in (OURS, TORCH):
                    time.sleep(_PAUSE)
            timings = {name: Timing(seconds[name]) for name in (*calls, *([LIMIT] if limit else []))}
            if len(seconds[OURS]) < effort.rounds:
                continue
            if time.perf_counter() > deadline or all(timing.steady for timing in timings.values()):
                return timings
    finally:
        gc.enable()


def compile_for(case: Case) -> Callable[..., Any]:
    assert case.compiled is not None
    torch._dynamo.reset()
    return torch.compile(case.compiled, fullgraph=True, dynamic=False)


def ratio(slower: Timing, faster: Timing) -> float:
    """How many times faster, as the median over rounds: what disturbed a round met both."""
    return statistics.median(a / b for a, b in zip(slower.seconds, faster.seconds, strict=True))


def _copies(case: Case) -> list[tuple[Any, ...]]:
    """As many copies of the inputs as it takes to push the first one out of the caches; of small ones that may stay
    there some draws, so that no lucky or unlucky one is the case."""
    first = case.inputs()
    size = sum(tensor.numel() * tensor.element_size() for value in first for tensor in _tensors(value))
    if case.warm or size == 0:
        return [first, *(case.inputs() for _ in range(_DRAWS - 1))] if 0 < size <= _SMALL else [first]
    count = min(math.ceil(4 * last_level_cache() / size), max(1, _MEMORY // size))
    return [first, *(case.inputs() for _ in range(count - 1))]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return list(value) if isinstance(value, list) else []


def _warm_up(call: Callable[..., Any], case: Case, copies: list[tuple[Any, ...]]) -> float:
    """Calls until warm (the first call compiles, allocates, starts threads); seconds of the fastest call."""
    seconds = math.inf
    for _ in range(3):
        if case.reset is not None:
            case.reset(*copies[0])
        start = time.perf_counter()
        call(*copies[0])
        seconds = min(seconds, time.perf_counter() - start)
        if seconds > 0.2:  # then what the first call does besides is lost in it
            break
    return seconds

"""How many threads a call uses, that results do not depend on it, and that calls live with other threads and forks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import bits, normal, orthonormal_rows, uniform
from torch import Tensor

import hpa_ext
from hpa_ext import backend, cpu, get_num_threads, num_threads

# Large enough for each kernel to share its work, and small enough for a test.
LARGE: dict[str, Callable[[], tuple[Any, ...]]] = {
    "accumulate_gram_": lambda: (torch.zeros(230, 230), normal(700, 230)),
    "accumulate_importance_": lambda: (torch.zeros(500, 500), normal(500, 500)),
    "balanced_mask": lambda: (uniform(40_000), uniform(40_000, seed=1), 500, 2000),
    "change_statistics": lambda: (normal(600, 500), normal(600, 500, seed=1)),
    "inverse_diagonal": lambda: (torch.eye(300) + 0.01 * normal(300, 300).tril().abs(),),
    "merge_": lambda: (normal(600, 500), normal(600, 500, seed=1), uniform(500) < 0.3, 0.2),
    "orthonormalize_": lambda: (normal(9, 150_000),),
    "project_": lambda: (normal(70_000), orthonormal_rows(9, 70_000)),
}


@cache
def originals(function: str) -> tuple[Any, ...]:
    return LARGE[function]()


def result_of(function: str) -> list[bytes]:
    """The bits of everything that a call returns or writes."""
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in originals(function)]
    result = getattr(hpa_ext, function)(*arguments)
    items = [*(result if isinstance(result, tuple) else (result,)), arguments[0]]
    return [bits(item.reshape(-1)).tobytes() if isinstance(item, Tensor) else repr(item).encode() for item in items]


@pytest.fixture
def torch_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets torch's own number, with nothing of ours in the way; undone afterwards."""
    monkeypatch.delenv("HPA_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run_python(program: str, **environment: str) -> str:
    """Standard output of a program in a process of its own; fails if that hangs."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("HPA_NUM_THREADS", "OMP_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**inherited, **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestTheNumber:
    def test_is_torchs_own_unless_something_else_is_said(
        self, torch_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch_threads(3)
        assert get_num_threads() == 3
        monkeypatch.setenv("HPA_NUM_THREADS", "5")
        assert get_num_threads() == 5
        with num_threads(2):
            assert get_num_threads() == 2
        assert get_num_threads() == 5
        monkeypatch.setenv("HPA_NUM_THREADS", "")
        assert get_num_threads() == 3

    def test_follows_omp_num_threads(self) -> None:
        program = "import torch, hpa_ext; print(hpa_ext.get_num_threads(), torch.get_num_threads())"
        assert run_python(program, OMP_NUM_THREADS="1") == "1 1"
        ours, torchs = run_python(program, OMP_NUM_THREADS="3").split()
        assert ours == torchs
        assert run_python(program, OMP_NUM_THREADS="1", HPA_NUM_THREADS="4") == "4 1"

    @pytest.mark.parametrize("wrong", ["0", "-1", "two", "1.5"])
    def test_a_wrong_environment_variable_is_refused_at_the_call(
        self, wrong: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HPA_NUM_THREADS", wrong)
        with pytest.raises(ValueError, match="^HPA_NUM_THREADS: expected a positive whole number, got"):
            hpa_ext.change_statistics(torch.zeros(1, 1), torch.zeros(1, 1))

    def test_blocks_nest_and_end_with_an_exception(self, torch_threads: Callable[[int], None]) -> None:
        torch_threads(7)
        with num_threads(4):
            with num_threads(6):
                assert get_num_threads() == 6
            assert get_num_threads() == 4
            with pytest.raises(KeyError), num_threads(1):
                raise KeyError
            assert get_num_threads() == 4
        assert get_num_threads() == 7

    @pytest.mark.parametrize(
        ("wrong", "error"),
        [(0, ValueError), (-2, ValueError), (1.0, TypeError), (True, TypeError), ("2", TypeError), (None, TypeError)],
    )
    def test_wrong_numbers_are_refused_before_the_block(self, wrong: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match="^n: expected a whole number"):
            num_threads(wrong)

    def test_holds_for_one_python_thread_and_one_asyncio_task(self, torch_threads: Callable[[int], None]) -> None:
        torch_threads(7)
        with num_threads(2), ThreadPoolExecutor(1) as pool:
            assert pool.submit(get_num_threads).result() == 7

        async def task(count: int, turn: asyncio.Event, other: asyncio.Event) -> int:
            with num_threads(count):
                other.set()
                await turn.wait()
                return get_num_threads()

        async def both() -> list[int]:
            one, two = asyncio.Event(), asyncio.Event()
            return await asyncio.gather(task(3, one, two), task(4, two, one))

        assert asyncio.run(both()) == [3, 4]

    @pytest.mark.parametrize("function", [name for name in LARGE if name != "balanced_mask"])
    def test_reaches_each_kernel(self, function: str, checked_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
        module = backend.extension()
        seen: list[Any] = []

        class Recorder:
            def __getattr__(self, name: str) -> Callable[..., Any]:
                def call(*arguments: Any) -> Any:
                    seen.append(arguments[-1])
                    return getattr(module, name)(*arguments)

                return call

        monkeypatch.setattr(cpu, "extension", Recorder)
        with num_threads(5):
            result_of(function)
        assert seen == [5]

    def test_is_what_runs_and_the_pool_is_torchs_own(self) -> None:
        program = """
import os, torch, hpa_ext
from hpa_ext import backend
from test_threads import LARGE
tasks = lambda: len(os.listdir("/proc/self/task"))
weights = LARGE["change_statistics"]()
torch.set_num_threads(3)
torch.ones(1 << 22).add_(1)
torchs = tasks()
with hpa_ext.num_threads(3):
    hpa_ext.change_statistics(*weights)
ours = tasks()
with hpa_ext.num_threads(5):
    hpa_ext.change_statistics(*weights)
print(backend.extension().thread_runtime(), ours - torchs, tasks() - ours)
"""
        if not Path("/proc/self/task").exists():
            pytest.skip("counts threads in /proc")
        assert run_python(program, OMP_NUM_THREADS="1") == "process 0 2"


@pytest.mark.parametrize("function", LARGE)
def test_results_are_the_same_bits_for_any_number_of_threads(function: str) -> None:
    with num_threads(1):
        expected = result_of(function)
    for count in (2, 3, 8):
        with num_threads(count):
            assert result_of(function) == expected, f"{count} threads"


def test_calls_from_several_python_threads_do_not_disturb_each_other() -> None:
    expected = {function: result_of(function) for function in LARGE}

    def call(place: int) -> bool:
        function = list(LARGE)[place % len(LARGE)]
        with num_threads(1 + place % 3):
            return result_of(function) == expected[function]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(6 * len(LARGE))))


def test_long_calls_release_the_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    # No thread is made to give way: another one runs during a call only if the call lets go of the lock by itself.
    before = sys.getswitchinterval()
    stop, turns = threading.Event(), 0

    def count_turns() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1
            time.sleep(0)

    after, old, mask = normal(2000, 1500), normal(2000, 1500, seed=1), uniform(1500) < 0.5
    other = threading.Thread(target=count_turns)
    sys.setswitchinterval(1000)
    try:
        other.start()
        for call in (hpa_ext.merge_, lambda *arguments: hpa_ext.merge_(*arguments, backend="cpu")):
            start, deadline = turns, time.monotonic() + 60
            with num_threads(1):
                # How soon a busy machine gives the other thread its turn is not ours to say; that it gets any is.
                while turns <= start + 20 and time.monotonic() < deadline:
                    call(after, old, mask, 0.5)
            assert turns > start + 20
    finally:
        stop.set()
        sys.setswitchinterval(before)
        other.join()


FORK = """
import os, torch, hpa_ext
from test_threads import LARGE, result_of
torch.set_num_threads(2)
torch.ones(1 << 22).add_(1).sum()  # the pool of the OpenMP runtime is running
expected = {function: result_of(function) for function in LARGE}
weights = LARGE["change_statistics"]()
child = os.fork()
if child == 0:
    hpa_ext.change_statistics(*weights)
    torch.set_num_threads(1)  # torch itself hangs without, as its data loader knows
    with hpa_ext.num_threads(2):
        same = all(result_of(function) == expected[function] for function in LARGE)
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if result_of("merge_") == expected["merge_"] else 1)
    os._exit(0 if same and os.waitpid(grandchild, 0)[1] == 0 else 1)
print(os.waitpid(child, 0)[1], result_of("project_") == expected["project_"])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_calls_work_in_a_forked_child_after_the_pool_was_used() -> None:
    assert run_python(FORK) == "0 True"

"""Where the kernels' work is queued: on the stream that the caller names, and nowhere else; and that it can be captured
in a CUDA graph.  In the emulator, which records both; ``test_gpu.py`` has the same on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import normal, orthonormal_rows, uniform
from test_cuda_kernels import emulation  # noqa: F401  (a fixture)
from torch import Tensor

from hpa_ext import cuda

STREAM = 0x5EED


def inputs(seed: int) -> dict[str, Tensor]:
    """The same shapes for every seed; each function takes some of these."""
    return {
        "after": normal(70, 48, seed=seed),
        "before": normal(70, 48, seed=seed + 1),
        "x": normal(37, 48, seed=seed + 2, dtype=torch.bfloat16),
        "gram": 2 * normal(60, 48, seed=seed + 3).T @ normal(60, 48, seed=seed + 3),
        "importance": uniform(5000, seed=seed + 4),
        "grad": normal(5000, seed=seed + 5),
        "basis": orthonormal_rows(3, 48, seed=seed + 6),
        "mask": uniform(48, seed=seed + 7) < 0.3,
        "safety": uniform(48, seed=seed + 8),
        "task": uniform(48, seed=seed + 9),
    }


def results() -> dict[str, Tensor]:
    nan = torch.nan
    return {
        "columns": torch.full((48,), nan),
        "three": torch.full((3,), nan, dtype=torch.float64),
        "diagonal": torch.full((48,), nan),
        "two": torch.full((2,), nan, dtype=torch.float64),
        "five": torch.full((5,), nan, dtype=torch.float64),
        "chosen": torch.zeros(48, dtype=torch.bool),
    }


# Each function of the module: a call that reads and writes tensors of `inputs` and `results`.
CALLS: dict[str, Callable[[ModuleType, Any, SimpleNamespace], None]] = {
    "accumulate_gram_": lambda m, where, t: m.accumulate_gram_(where, t.gram, t.x, 0.5),
    "accumulate_importance_": lambda m, where, t: m.accumulate_importance_(where, [t.importance], [t.grad], []),
    "change_statistics": lambda m, where, t: m.change_statistics(where, t.columns, t.three, t.before, t.after),
    "change_statistics of nothing": lambda m, where, t: m.change_statistics(
        where, t.columns, t.three, t.before[:0], t.after[:0]
    ),
    "merge_": lambda m, where, t: m.merge_(where, t.after, t.before, t.mask, 0.25),
    "project_": lambda m, where, t: m.project_(where, [t.after], [t.basis], 2),
    "orthonormalize_": lambda m, where, t: m.orthonormalize_(where, t.after[:9], t.two, t.basis, 1e-4),
    "inverse_diagonal": lambda m, where, t: m.inverse_diagonal(where, t.diagonal, t.two, t.gram, 0.01, "exact"),
    "balanced_mask": lambda m, where, t: m.balanced_mask(
        where, t.chosen, t.five, t.safety, t.task, 9, 20, 0.4, 0.8, "full", "affine", 1, "cap", "none"
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_all_work_is_queued_on_the_stream_that_the_call_names(name: str, emulation: ModuleType) -> None:  # noqa: F811
    library = ctypes.CDLL(emulation.__file__)
    library.hpa_emulation_only_stream.restype = ctypes.c_void_p
    tensors = SimpleNamespace(**inputs(0), **results())
    for stream in (STREAM, STREAM + 16):
        library.hpa_emulation_only_stream()
        CALLS[name](emulation, (0, stream, lambda count: torch.empty(count, dtype=torch.float64)), tensors)
        assert library.hpa_emulation_only_stream() == stream


@pytest.mark.parametrize("name", CALLS)
def test_a_captured_call_computes_with_what_its_tensors_hold_when_it_is_replayed(
    name: str,
    emulation: ModuleType,  # noqa: F811
) -> None:
    library, scratch = ctypes.CDLL(emulation.__file__), []

    def allocate(count: int) -> Tensor:
        scratch.append(torch.full((count,), torch.nan, dtype=torch.float64))  # a graph keeps what it was given
        return scratch[-1]

    held = SimpleNamespace(**inputs(0), **results())
    library.hpa_emulation_capture(1)
    CALLS[name](emulation, (0, STREAM, allocate), held)
    library.hpa_emulation_capture(0)
    for tensor, untouched in zip(vars(held).values(), (inputs(0) | results()).values(), strict=True):
        assert torch.equal(tensor.nan_to_num(), untouched.nan_to_num())  # nothing was done yet
    for seed in (50, 70):  # twice: counters and sums start from zero each time
        wanted = SimpleNamespace(**inputs(seed), **results())
        for tensor, value in zip(vars(held).values(), vars(wanted).values(), strict=True):
            tensor.copy_(value)
        assert library.hpa_emulation_replay() > 0
        CALLS[name](emulation, (0, STREAM, lambda count: torch.empty(count, dtype=torch.float64)), wanted)
        for key, tensor in vars(held).items():
            assert torch.equal(tensor.nan_to_num(), getattr(wanted, key).nan_to_num()), key


def test_the_same_bits_in_every_order_of_threads_and_blocks(emulation: ModuleType) -> None:  # noqa: F811
    def answers(order: int) -> dict[str, Tensor]:
        ctypes.CDLL(emulation.__file__).hpa_emulation_set_order(order)
        # Three blocks and more wherever blocks add up, as a sum of two is the same both ways; float64 there, since
        # rounding float64 sums to float32 would hide most of their differences.
        wide = torch.float64
        tensors = {
            "before": normal(300, 20, dtype=wide),
            "after": normal(300, 20, seed=1, dtype=wide),
            "columns": torch.empty(20, dtype=wide),
            "three": torch.empty(3, dtype=torch.float64),
            "mask": torch.arange(20) % 3 == 0,
            "importance": uniform(9000),
            "grad": normal(9000, seed=2),
            "gram": torch.zeros(140, 140),
            "x": normal(70, 140, dtype=torch.bfloat16),
            "full_gram": 2 * normal(90, 70).T @ normal(90, 70),
            "diagonal": torch.empty(70),
            "two": torch.empty(2, dtype=torch.float64),
            "grads": normal(3, 9000, dtype=wide),
            "basis": orthonormal_rows(3, 9000, seed=3, dtype=wide),
            "vectors": normal(2, 9000, seed=4, dtype=wide),
            "counts": torch.empty(2, dtype=torch.float64),
            "safety": uniform(600).mul(50).floor(),
            "task": uniform(600, seed=5),
            "chosen": torch.empty(600, dtype=torch.bool),
            "five": torch.empty(5, dtype=torch.float64),
        }
        t, m = SimpleNamespace(**tensors), emulation
        where = (0, STREAM, lambda count: torch.empty(count, dtype=torch.float64))
        m.change_statistics(where, t.columns, t.three, t.before, t.after)
        m.merge_(where, t.after, t.before, t.mask, 0.25)
        m.accumulate_importance_(where, [t.importance], [t.grad], [])
        m.accumulate_gram_(where, t.gram, t.x, 0.5)
        m.inverse_diagonal(where, t.diagonal, t.two, t.full_gram, 0.01, "exact")
        m.project_(where, [t.grads], [t.basis], 2)
        m.orthonormalize_(where, t.vectors, t.counts, None, 1e-4)
        m.balanced_mask(
            where, t.chosen, t.five, t.safety, t.task, 90, 200, 0.4, 0.8, "full", "affine", 1, "cap", "none"
        )
        return tensors

    forward = answers(0)
    for order in (1, 7):
        for name, tensor in answers(order).items():
            assert torch.equal(tensor.view(torch.uint8), forward[name].view(torch.uint8)), (order, name)


def test_a_call_names_the_current_stream_of_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {torch.device("cuda", 0): 7, torch.device("cuda", 1): 9}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=streams[device]))
    for device, stream in streams.items():
        assert cuda._where(SimpleNamespace(device=device))[:2] == (device.index, stream)

"""Shared fixtures.  Random cases come from hypothesis with a fixed seed: a failure repeats, and nothing is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, settings

from hpa_ext import backend as backends
from hpa_ext import direct

settings.register_profile(
    "hpa",
    derandomize=True,
    deadline=None,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("hpa")


@pytest.fixture(params=backends.extension().available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set that this machine has."""
    extension = backends.extension()
    before = extension.isa()
    extension.select_isa(request.param)
    yield request.param
    extension.select_isa(before)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets the number of threads for the calls that follow."""
    return lambda count: monkeypatch.setenv("HPA_NUM_THREADS", str(count))


def backends_here() -> list[str]:
    """The backends that a test of every backend runs: those of a GPU too, where there is one."""
    gpu = [] if torch.version.hip is not None else ["cuda"]
    return ["cpu", "reference", *([*gpu, "triton"] if torch.cuda.is_available() else [])]


def devices_here() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@contextmanager
def tensors_on(device: str) -> Iterator[torch.device]:
    """Makes ``device`` the one that new tensors lie on."""
    before = torch.get_default_device()
    if before.type != device:
        torch.set_default_device(device)
    try:
        yield torch.get_default_device()
    finally:
        if before.type != device:
            torch.set_default_device(before if before.type != "cpu" else None)


@pytest.fixture(params=backends_here())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each backend, with new tensors where that backend serves them."""
    device = "cuda" if request.param in ("cuda", "triton") else "cpu"
    with tensors_on(device) as place:
        trouble = {"cuda": backends.cuda_trouble, "triton": lambda: backends.triton_trouble(place)}.get(request.param)
        if trouble is not None and (why := trouble()):
            pytest.skip(f"{request.param} cannot run here: {why}")
        yield request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where new tensors of the test lie; where there is a GPU, the test runs once more on it."""
    with tensors_on(getattr(request, "param", "cpu")) as place:
        yield place


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Without a GPU there is nothing to choose, and names of tests stay what they are.
    if "device" in metafunc.fixturenames and len(devices_here()) > 1:
        metafunc.parametrize("device", devices_here(), indirect=True)


@pytest.fixture
def checked_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """No direct calls: whatever the arguments, they go through the checks of ops.py."""
    for name in set(direct.__all__) - {"declines"}:
        monkeypatch.setattr(direct, name, direct.declines)

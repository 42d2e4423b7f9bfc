"""Shared fixtures.  Random cases come from hypothesis with a fixed seed: a failure repeats, and nothing is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from hpa_ext import backend, direct

settings.register_profile(
    "hpa",
    derandomize=True,
    deadline=None,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("hpa")


@pytest.fixture(params=backend.extension().available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set that this machine has."""
    extension = backend.extension()
    before = extension.isa()
    extension.select_isa(request.param)
    yield request.param
    extension.select_isa(before)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets the number of threads for the calls that follow."""
    return lambda count: monkeypatch.setenv("HPA_NUM_THREADS", str(count))


@pytest.fixture
def checked_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """No direct calls: whatever the arguments, they go through the checks of ops.py."""
    for name in set(direct.__all__) - {"declines"}:
        monkeypatch.setattr(direct, name, direct.declines)

"""Scenarios by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hpa.data.scenario import Scenario

__all__ = ["SCENARIOS", "load_scenario"]

SCENARIOS: dict[str, str] = {
    "demo": "hpa.data.demo:DemoScenario",
    "published": "hpa.data.published:PublishedScenario",
    "smollm2": "hpa.data.smollm2:SmolLM2Scenario",
}
"""Name to ``module:class``; the module is imported only when the scenario is asked for."""


def load_scenario(name: str, **options: Any) -> Scenario:
    """Create the scenario ``name`` with its own options.

    Raises:
        ValueError: there is no such scenario, or it does not take one of ``options``.
    """
    if name not in SCENARIOS:
        raise ValueError(f"scenario: expected one of {', '.join(sorted(SCENARIOS))}, got {name!r}")
    module, _, attribute = SCENARIOS[name].partition(":")
    factory = getattr(import_module(module), attribute)
    try:
        scenario: Scenario = factory(**options)
    except TypeError as error:
        raise ValueError(f"scenario {name!r}: {error}") from error
    return scenario

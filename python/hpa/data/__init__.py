"""Worlds of tasks: the protocol, a registry of what ships, and the demo's world."""

from hpa.data.registry import SCENARIOS, load_scenario
from hpa.data.scenario import Sample, Scenario

__all__ = ["SCENARIOS", "Sample", "Scenario", "load_scenario"]

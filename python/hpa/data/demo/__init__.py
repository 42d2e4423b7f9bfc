"""A world of real pictures and a small LLaVA that two CPU cores train in minutes."""

from hpa.data.demo.scenario import DemoScenario

__all__ = ["DemoScenario"]

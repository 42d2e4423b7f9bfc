"""A published model and published files: whoever has the data runs a paper's own sequence."""

from hpa.data.published.scenario import PublishedScenario

__all__ = ["PublishedScenario"]

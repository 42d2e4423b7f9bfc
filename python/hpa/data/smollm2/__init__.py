"""A real language model that goes on learning: SmolLM2-135M-Instruct with eyes, and six tasks."""

from hpa.data.smollm2.scenario import SmolLM2Scenario

__all__ = ["SmolLM2Scenario"]

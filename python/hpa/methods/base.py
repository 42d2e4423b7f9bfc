"""What a method is: a rule that edits one layer at a time, told what it needs and what it remembers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from hpa.config import ColumnConfig
from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate

__all__ = [
    "STATISTICS",
    "InputStatistics",
    "LayerChange",
    "LayerEdit",
    "LowRankUpdate",
    "Method",
    "NoOptions",
]

STATISTICS = frozenset({"safety_diagonal", "task_diagonal", "safety_gram", "task_gram", "edited_gram"})
"""What a method may ask for.  ``edited_gram``: the task's Gram matrices under the *edited* weights, see
:meth:`Method.observe_edited`."""


class NoOptions(BaseModel):
    """The options of a method that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(ABC):
    """A rule ``W^ = F(W_{t-1}, W_t)``, applied to every layer after every task.

    One object lives through a whole sequence of tasks: per task :meth:`edit_layer` for each layer, then
    :meth:`finish_task` once.  What it carries from task to task is in :meth:`state_dict`.

    Attributes:
        name: key in the registry.
        Config: its options.
        needs: what calibration must provide, a subset of :data:`STATISTICS`; may depend on the options.
    """

    name: ClassVar[str]
    Config: ClassVar[type[BaseModel]] = NoOptions
    needs: frozenset[str] = frozenset()

    def __init__(self, config: BaseModel | None = None) -> None:
        """``config``: an instance of :attr:`Config`; all defaults when ``None``."""
        config = self.Config() if config is None else config
        if not isinstance(config, self.Config):
            raise TypeError(f"config: expected {self.Config.__name__}, got {type(config).__name__}")
        self.config = config

    def at_strength(self, strength: float) -> Method:
        """A fresh object of this method that holds an update back ``strength`` times as much; 1 is its own setting.

        What that means is the method's: by default the share of columns put back, where it has one.

        Raises:
            ValueError: a strength that is not positive, or a method that has none to set.
        """
        if not (strength > 0 and math.isfinite(strength)):
            raise ValueError(f"strength: expected a positive number, got {strength}")
        if strength == 1:
            return type(self)(self.config)
        if not isinstance(self.config, ColumnConfig):
            raise ValueError(f"strength: method '{self.name}' has none to set, got {strength}")
        return type(self)(self.config.at_strength(strength))

    @abstractmethod
    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        """The edited weight of one layer.

        Args:
            change: the layer before and after the task.
            safety: statistics of the safety set at this layer's input; ``None`` if the method needs none.
            task: those of the task's samples.
            task_index: 0-based number of the task in the sequence.
            seed: for methods that draw.

        Raises:
            ValueError: weights or statistics that are not finite, or missing; the layer is named.
        """

    def observe_edited(self, statistics: Mapping[str, InputStatistics]) -> None:
        """Statistics of the task's samples under the edited weights, block by block, by ``input_key``; called when
        ``needs`` has ``edited_gram``."""
        return

    def finish_task(self) -> None:
        """All layers of a task are edited."""
        return

    def state_dict(self) -> dict[str, Tensor]:
        """What the method carries to the next task, as tensors for a safetensors file."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up :meth:`state_dict` of another object of the same method and options.

        Raises:
            ValueError: entries that the method does not know.
        """
        if state:
            raise ValueError(f"state: method '{self.name}' carries none, got {', '.join(sorted(state)[:3])} ...")

    def __repr__(self) -> str:
        chosen = ", ".join(f"{key}={getattr(self.config, key)!r}" for key in sorted(self.config.model_fields_set))
        return f"{type(self).__name__}({chosen})"

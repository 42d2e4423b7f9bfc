"""What a method is: a rule that edits one layer at a time, told what it needs and what it remembers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, JsonValue
from torch import Tensor

from hpa.config import CalibrationConfig, ColumnConfig
from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate
from hpa.training import Lesson, TrainingHooks

__all__ = [
    "STATISTICS",
    "InputStatistics",
    "Kind",
    "LayerChange",
    "LayerEdit",
    "LowRankUpdate",
    "Method",
    "NoOptions",
    "check_strength",
]

Kind = Literal["training", "editing", "merging", "control"]

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
        kind: editing: changes each update after its training; merging: makes one model of several tasks' models;
            training: differs in how it trains; control: what a claim has to beat.
        only_trains: nothing of it can be done to finished checkpoints, so ``hpa adapt`` refuses it.
        needs: what calibration must provide, a subset of :data:`STATISTICS`; may depend on the options.
        reads_triangles: Gram matrices may come as a :class:`~hpa.triangle.Triangle` instead of a matrix in memory.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = "editing"
    only_trains: ClassVar[bool] = False
    Config: ClassVar[type[BaseModel]] = NoOptions
    needs: frozenset[str] = frozenset()
    reads_triangles: ClassVar[bool] = False

    def __init__(self, config: BaseModel | None = None) -> None:
        """``config``: an instance of :attr:`Config`; all defaults when ``None``."""
        config = self.Config() if config is None else config
        if not isinstance(config, self.Config):
            raise TypeError(f"config: expected {self.Config.__name__}, got {type(config).__name__}")
        self.config = config
        self.goes_on = True
        """Whether another task may follow.  Where none does, an edit need not take anything down for it."""

    @property
    def references(self) -> frozenset[str]:
        """Models whose weights :meth:`edit_layer` reads besides the two of the change: ``aligned``, ``unaligned``."""
        return frozenset({"aligned"} if getattr(self.config, "anchor", "prev") == "aligned" else ())

    @property
    def starts_from(self) -> Literal["previous", "aligned"]:
        """The weights that a task's training begins with, and that its update is relative to: what came of the task
        before, or the aligned model."""
        return "previous"

    @property
    def trains_on(self) -> Literal["task", "tasks so far"]:
        """The data of a training; with ``tasks so far`` it takes as many steps a task as the recipe says."""
        return "task"

    @property
    def training_options(self) -> dict[str, JsonValue]:
        """Whatever makes the training of a task from the aligned model another than plain fine-tuning, JSON-ready:
        branches share such a training where these are equal."""
        return {}

    @property
    def merges_earlier(self) -> bool:
        """Whether :meth:`edit_layer` reads what other tasks made of the same weights (``LayerChange.earlier``)."""
        return False

    @property
    def calibration(self) -> CalibrationConfig | None:
        """How its statistics are made, where its options say so."""
        return self.config if isinstance(self.config, CalibrationConfig) else None

    @property
    def memory_samples(self) -> int:
        """Training samples of each earlier task that it keeps and may read while the next ones are trained."""
        return 0

    @property
    def safety_memory(self) -> int:
        """Harmful requests, with the aligned model's refusals, that it may read while a task is trained."""
        return 0

    @property
    def keep_samples(self) -> int:
        """Prompts of any kind, with the aligned model's own answers, whose inputs it wants to be shown before the first
        task, by :meth:`remember_inputs`."""
        return 0

    def hooks(self, lesson: Lesson) -> TrainingHooks | None:
        """What it does inside the training of a task; the model holds the weights before it.  ``None``: nothing.

        Whatever it does to the *first* task has to show in :attr:`training_options`.
        """
        return None

    def after_task(self, lesson: Lesson) -> None:
        """The task is trained and edited: the model holds what is left of it.  Called before :meth:`state_dict`."""
        return

    def frozen_blocks(self, blocks: int) -> frozenset[int]:
        """Decoder blocks, 1-based, of ``blocks`` that are not trained."""
        return frozenset()

    def at_strength(self, strength: float) -> Method:
        """A fresh object of this method that holds an update back ``strength`` times as much; 1 is its own setting.

        What that means is the method's: by default the share of columns put back, where it has one.

        Raises:
            ValueError: a strength that is not positive, or a method that has none to set.
        """
        check_strength(strength)
        if strength == 1:
            return type(self)(self.config)
        if not isinstance(self.config, ColumnConfig):
            raise ValueError(f"strength: method '{self.name}' has none to set, got {strength}")
        return type(self)(self.config.at_strength(strength))

    def work_size(self, rows: int, cols: int) -> int:
        """About how many bytes an edit of a layer ``[rows, cols]`` takes besides its weights."""
        return 0

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

    def remember_inputs(self, statistics: Mapping[str, InputStatistics], *, weight: float | None = None) -> None:
        """Take inputs that no edit is to disturb into the memory, as if a task had been learned on them.

        Args:
            statistics: Gram matrices by ``input_key``.
            weight: how much they count, in tasks; by default as the method's options say.

        Raises:
            ValueError: a method without such a memory, statistics without Gram matrices, or a weight that is not
                positive.
        """
        raise ValueError(f"method: '{self.name}' has no memory of inputs")

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


def check_strength(strength: float) -> None:
    """Raises ValueError where ``strength`` is no positive number."""
    if not (strength > 0 and math.isfinite(strength)):
        raise ValueError(f"strength: expected a positive number, got {strength}")

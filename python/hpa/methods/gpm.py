"""GPM: gradient projection memory (Saha et al., arXiv 2103.09762; METHOD 2.1).

Of each layer's inputs the leading directions M are kept, as few as hold the share ``energy`` of their squared length,
counting what earlier tasks have put in; and steps keep out of them:

    (captured + new) / total >= energy,  energy = 0.97 + 0.003 * task;       G <- G - (G M) M'

M comes from eigenvectors of the Gram matrix that calibration has (of the task's inputs, after training).  Here a layer
learns by LoRA, W + s B A: A starts in the complement and each step's change of A stays there, so B A M = 0 and what the
layer says to remembered inputs stays exactly as it is.  (The step is projected, not the gradient: Adam would turn it
back.)  ``protect`` says whose inputs: those of earlier tasks as published, the aligned model's refusals from the first
task on, or both.

An edit costs an eigendecomposition for each input, O(cols^3); a step two thin products a layer; memory: M.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field, JsonValue
from torch import Tensor

from hpa.calibration import calibrate
from hpa.columns import keep_as_learned, measure, measured_numbers
from hpa.config import CalibrationConfig
from hpa.layers import InputStatistics, LayerChange, LayerEdit
from hpa.methods.base import Kind, Method
from hpa.methods.complement import InComplement
from hpa.projection import Basis, grow_from_grams
from hpa.training import Lesson, TrainingHooks

__all__ = ["GPM", "GPMConfig"]


class GPMConfig(CalibrationConfig):
    """How much of the inputs is protected, and whose."""

    energy: float = Field(default=0.97, gt=0.0, lt=1.0, description="share of the inputs' squared length that is kept")
    energy_step: float = Field(default=0.003, ge=0.0, description="added to it with each task (up to 0.999)")
    protect: Literal["tasks", "safety", "both"] = Field(
        default="tasks", description="inputs of earlier tasks, of the aligned model's refusals, or of both"
    )

    def share(self, task_index: int) -> float:
        """``energy`` for a 0-based task."""
        return min(self.energy + self.energy_step * task_index, max(self.energy, 0.999))


class GPM(Method):
    """Steps stay out of the leading input directions of earlier tasks."""

    name: ClassVar[str] = "gpm"
    kind: ClassVar[Kind] = "training"
    only_trains: ClassVar[bool] = True
    Config: ClassVar[type[BaseModel]] = GPMConfig
    config: GPMConfig

    def __init__(self, config: BaseModel | None = None) -> None:
        super().__init__(config)
        kinds = {"tasks": {"task_gram"}, "safety": {"safety_gram"}, "both": {"task_gram", "safety_gram"}}
        self.needs = frozenset(kinds[self.config.protect])
        self._bases: dict[str, Basis] = {}
        self._keys: dict[str, str] = {}
        self._grown: set[str] = set()

    @property
    def safety_memory(self) -> int:
        return 0 if self.config.protect == "tasks" else self.config.safety_samples

    @property
    def training_options(self) -> dict[str, JsonValue]:
        if self.config.protect == "tasks":
            return {}
        said = self.config.model_dump(mode="json")
        return {name: said[name] for name in ("energy", "protect", "safety_samples", "normalize", "token_filter")}

    def hooks(self, lesson: Lesson) -> TrainingHooks | None:
        bases, keys = self._bases, self._keys
        if not bases and self.safety_memory and lesson.safety:
            # The first task: what later tasks find in the state comes from the edit, which sees the same refusals.
            statistics: dict[str, InputStatistics] = {}
            batches = [lesson.batch(lesson.safety)]
            for _, found in calibrate(lesson.model, batches, lesson.layers, want=("gram",), config=self.config):
                statistics |= found
            bases, keys = {}, {name: one.input_key or name for name, one in statistics.items()}
            for name, one in statistics.items():
                if keys[name] not in bases and not one.zero:
                    bases[keys[name]] = self._grow(None, one, 0)
        return _InComplement(bases, keys) if bases else None

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        key = change.input_key
        self._keys[change.name] = key
        if key not in self._grown:
            self._grown.add(key)
            for which, found in (("safety", safety if task_index == 0 else None), ("task", task)):
                if f"{which}_gram" in self.needs and found is not None and not found.zero:
                    self._bases[key] = self._grow(self._bases.get(key), found, task_index)
        numbers = measured_numbers(measure(change))
        numbers["protected"] = self._bases[key].rank if key in self._bases else 0
        return keep_as_learned(change, numbers=numbers)

    def finish_task(self) -> None:
        self._grown.clear()

    def state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        order = sorted(self._bases)
        for key in order:
            state[f"vectors/{key}"] = self._bases[key].vectors()
            state[f"energy/{key}"] = self._bases[key].energies()
        for layer, key in self._keys.items():
            if key in self._bases:
                state[f"layer/{layer}"] = torch.tensor([order.index(key)])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._bases, self._keys, self._grown = {}, {}, set()
        kinds = {name.partition("/")[0] for name in state}
        if not kinds <= {"vectors", "energy", "layer"}:
            raise ValueError(f"state: method 'gpm' carries vectors, energy and layer, got {', '.join(sorted(kinds))}")
        order = sorted(name.partition("/")[2] for name in state if name.startswith("vectors/"))
        for key in order:
            basis = _empty(key, state[f"vectors/{key}"].shape[1])
            tensors = {f"{what}/{key}": state[f"{what}/{key}"] for what in ("vectors", "energy")}
            self._bases[key] = Basis.restore(basis.description(), tensors)
        for name, index in state.items():
            if name.startswith("layer/"):
                self._keys[name.partition("/")[2]] = order[int(index)]

    def _grow(self, basis: Basis | None, found: InputStatistics, task_index: int) -> Basis:
        gram = found.gram if found.triangle is None else found.triangle.lower()
        if gram is None:
            raise ValueError(f"input {found.input_key}: method 'gpm' needs its Gram matrix, got none")
        key = found.input_key
        if basis is None:
            basis = _empty(key, gram.shape[0]).to(gram.device)
        grow_from_grams(basis, {next(iter(basis.members)): gram}, energy=self.config.share(task_index))
        return basis


def _empty(key: str, cols: int) -> Basis:
    return Basis({key: (1, cols)}, "input")


class _InComplement(InComplement):
    def __init__(self, bases: Mapping[str, Basis], keys: Mapping[str, str]) -> None:
        super().__init__()
        self._bases = bases
        self._keys = keys

    def protects(self, layer: str) -> bool:
        return self._keys.get(layer) in self._bases

    def basis(self, factors: Mapping[str, Tensor], names: Mapping[str, str]) -> Basis:
        groups = {names[layer]: self._keys[layer] for layer in factors}
        device = next(iter(factors.values())).device
        basis = Basis({names[layer]: factor for layer, factor in factors.items()}, "input", groups=groups).to(device)
        for key in basis.ranks:
            basis.add({key: self._bases[key].vectors().to(device)})
        return basis

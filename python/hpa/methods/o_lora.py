"""O-LoRA: each task learns in a LoRA subspace orthogonal to those of earlier tasks (Wang et al., arXiv 2310.14152).

    L + lambda_1 * sum over layers, tasks i < t, entries of |A_i A_t'|  +  lambda_2 * sum over layers of |A_t| + |B_t|

with the code's defaults lambda_1 = 0.5, lambda_2 = 0 (MCITlib: 0.05; METHOD 2.2).  Earlier adapters are frozen: here
they are merged, which says the same.  ``mode: projection`` holds A_t in the complement exactly instead of pulling it
there: A starts there and steps are projected.  Costs one product [ranks so far, rank] a layer and step; memory: the
earlier A factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from hpa.columns import keep_as_learned, measure, measured_numbers
from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate
from hpa.methods.base import Kind, Method, check_strength
from hpa.methods.complement import InComplement
from hpa.projection import Basis, lora_basis
from hpa.training import Lesson, Training, TrainingHooks

__all__ = ["OLoRA", "OLoRAConfig"]


class OLoRAConfig(BaseModel):
    """How strongly earlier subspaces are avoided."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lambda_1: float = Field(default=0.5, ge=0.0, description="weight of the overlap with earlier A factors")
    lambda_2: float = Field(default=0.0, ge=0.0, description="weight of the norms of the new factors")
    mode: Literal["penalty", "projection"] = Field(
        default="penalty", description="penalty: as published; projection: exactly orthogonal, without a penalty"
    )


class OLoRA(Method):
    """New LoRA factors avoid the subspaces of earlier ones."""

    name: ClassVar[str] = "o_lora"
    kind: ClassVar[Kind] = "training"
    only_trains: ClassVar[bool] = True
    Config: ClassVar[type[BaseModel]] = OLoRAConfig
    config: OLoRAConfig

    def __init__(self, config: BaseModel | None = None) -> None:
        super().__init__(config)
        self._earlier: dict[str, list[Tensor]] = {}

    def at_strength(self, strength: float) -> OLoRA:
        """``strength`` times the weight of the overlap."""
        check_strength(strength)
        return type(self)(self.config.model_copy(update={"lambda_1": self.config.lambda_1 * strength}))

    def hooks(self, lesson: Lesson) -> TrainingHooks | None:
        if not self._earlier:
            return None
        if self.config.mode == "projection":
            return _Projected(self._earlier)
        return _Penalised(self._earlier, self.config)

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        if not isinstance(change.update, LowRankUpdate):
            raise ValueError(f"layer {change.label}: method 'o_lora' needs LoRA factors, got a dense update")
        numbers = measured_numbers(measure(change))
        earlier = self._earlier.setdefault(change.name, [])
        if change.update.rank:
            overlap = [(other.to(change.update.A) @ change.update.A.T).abs().sum() for other in earlier]
            numbers["overlap_with_earlier"] = float(sum(overlap)) if overlap else 0.0
            earlier.append(change.update.A.clone())
        return keep_as_learned(change, numbers=numbers)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"A/{layer}/{number}": a for layer, many in self._earlier.items() for number, a in enumerate(many)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._earlier = {}
        found: dict[str, dict[int, Tensor]] = {}
        for name, tensor in state.items():
            kind, _, rest = name.partition("/")
            layer, _, number = rest.rpartition("/")
            if kind != "A" or not number.isdigit():
                raise ValueError(f"state: method 'o_lora' carries A/<layer>/<number>, got {name}")
            found.setdefault(layer, {})[int(number)] = tensor
        self._earlier = {layer: [many[number] for number in sorted(many)] for layer, many in found.items()}


class _Penalised(TrainingHooks):
    def __init__(self, earlier: Mapping[str, list[Tensor]], config: OLoRAConfig) -> None:
        self._earlier = earlier
        self._config = config

    def begin(self, training: Training) -> None:
        self._factors = training.factors
        self._stacked = {
            layer: torch.cat(many).to(training.factors[layer].A)
            for layer, many in self._earlier.items()
            if many and layer in training.factors
        }

    def loss(self, batch: Mapping[str, Tensor], output: Any) -> Tensor | None:
        config = self._config
        terms = [
            config.lambda_1 * (earlier @ self._factors[layer].A.T).abs().sum()
            for layer, earlier in self._stacked.items()
        ]
        if config.lambda_2:
            terms += [config.lambda_2 * (f.A.norm() + f.B.norm()) for f in self._factors.values()]
        return torch.stack(terms).sum() if terms else None


class _Projected(InComplement):
    def __init__(self, earlier: Mapping[str, list[Tensor]]) -> None:
        super().__init__()
        self._earlier = earlier

    def protects(self, layer: str) -> bool:
        return bool(self._earlier.get(layer))

    def basis(self, factors: Mapping[str, Tensor], names: Mapping[str, str]) -> Basis:
        spans = {layer: torch.cat(self._earlier[layer]).to(factor) for layer, factor in factors.items()}
        return lora_basis({names[layer]: factor for layer, factor in factors.items()}, [spans])

"""A PEFT LoRA folder as exact updates of its base model: ``W_t - W_{t-1} = scale * B A`` (METHOD 1.6).

Only what is exactly that is taken: DoRA, activated LoRA, factors of fused experts, biases of factors and
initialisations that move the base are refused by name, for an edit of something else would be wrong in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hpa.checkpoint.files import CheckpointError, Folder, TensorInfo, read_tensor
from hpa.checkpoint.names import reduced
from hpa.layers import LowRankUpdate

__all__ = ["Adapter", "Factors", "match_names"]

_PREFIX = "base_model.model."
_REFUSED = {
    "use_dora": "DoRA",
    "alora_invocation_tokens": "activated LoRA",
    "lora_bias": "biases on the factors",
    "target_parameters": "LoRA on parameters that are no linear layers",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "replicated layers",
    "arrow_config": "Arrow routing",
}
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """The two factors of one layer, on disk."""

    a: TensorInfo  # [rank, cols]
    b: TensorInfo  # [rows, rank]
    scale: float
    transposed: bool = False  # an embedding's update is (B A)'

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.b.shape[0], self.a.shape[1]
        return (cols, rows) if self.transposed else (rows, cols)

    def read(self) -> LowRankUpdate:
        """The update of the layer's own tensor."""
        a, b = read_tensor(self.a), read_tensor(self.b)
        return LowRankUpdate(b.T, a.T, self.scale) if self.transposed else LowRankUpdate(a, b, self.scale)


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to its base.

    Attributes:
        factors: module path (as PEFT writes it, without its prefix) -> factors.
        replaced: tensor path -> the whole tensor that stands in its place (``modules_to_save``, trained biases).
        copies: tensor path -> what the adapter holds of the base as it is.
    """

    folder: Folder
    factors: dict[str, Factors] = field(default_factory=dict)
    replaced: dict[str, TensorInfo] = field(default_factory=dict)
    copies: dict[str, TensorInfo] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Folder) -> Adapter:
        """Raises CheckpointError for anything that is not plain LoRA."""
        config = folder.config
        where = f"{folder.argument}: {folder.path}"
        kind = str(config.get("peft_type", "LORA")).upper()
        if kind != "LORA":
            raise CheckpointError(
                f"{where}: expected a LoRA adapter, got peft_type {kind}; merge it and pass the model"
            )
        for key, what in _REFUSED.items():
            if config.get(key):
                raise CheckpointError(f"{where}: {key} is set ({what}); merge the adapter and pass the model")
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
            raise CheckpointError(
                f"{where}: init_lora_weights={start!r} changes the base model; merge the adapter and pass the model"
            )
        adapter = cls(folder)
        halves: dict[str, dict[str, TensorInfo]] = {}
        for key, info in folder.tensors.items():
            if not key.startswith(_PREFIX):
                raise CheckpointError(f"{where}: '{key}' does not begin with '{_PREFIX}' as PEFT's names do")
            path = key.removeprefix(_PREFIX)
            if path.endswith(".base_layer.weight"):
                # A copy of the base's own tensor, which PEFT puts beside an adapted embedding or head.
                adapter.copies[path.replace(".base_layer.", ".")] = info
                continue
            if path.endswith(".base_layer.bias"):  # trained with bias="all" or "lora_only"
                adapter.replaced[path.replace(".base_layer.", ".")] = info
                continue
            match = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", path)
            if match is not None:
                halves.setdefault(match[1], {})[match[3]] = info
                halves[match[1]] |= {"embedding": info} if match[2] else {}
            elif ".lora_" in path:
                raise CheckpointError(f"{where}: '{key}' is no factor of plain LoRA; merge it and pass the model")
            else:
                adapter.replaced[path] = info
        for path, pair in halves.items():
            adapter.factors[path] = _factors(path, pair, config, where)
        if not adapter.factors and not adapter.replaced:
            raise CheckpointError(f"{where}: the adapter is empty")
        return adapter

    def factors_on(self, tensors: Iterable[str]) -> dict[str, Factors]:
        """The factors by the base's tensor names; raises as :func:`match_names`."""
        names = match_names([f"{path}.weight" for path in self.factors], tensors, self.folder.argument)
        return {tensor: self.factors[path.removesuffix(".weight")] for path, tensor in names.items()}

    def replaced_on(self, tensors: Iterable[str]) -> dict[str, TensorInfo]:
        """The whole tensors by the base's tensor names; raises as :func:`match_names`."""
        names = match_names(self.replaced, tensors, self.folder.argument)
        return {tensor: self.replaced[path] for path, tensor in names.items()}


def _factors(path: str, pair: dict[str, TensorInfo], config: dict[str, Any], where: str) -> Factors:
    if "A" not in pair or "B" not in pair:
        raise CheckpointError(f"{where}: layer {path} has only one of its two factors")
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != a.shape[0]:
        raise CheckpointError(f"{where}: layer {path}: factors A {a.shape} and B {b.shape} do not fit each other")
    if not (a.is_floating and b.is_floating):
        raise CheckpointError(f"{where}: layer {path}: factors of {a.dtype} and {b.dtype}, expected floating point")
    alpha = config.get("alpha_pattern") or {}
    scale = float(_pattern(alpha, path, config.get("lora_alpha", 8)))
    rank = a.shape[0]
    return Factors(a, b, scale / (rank**0.5 if config.get("use_rslora") else max(rank, 1)), "embedding" in pair)


def _pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the layer's path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def match_names(wanted: Iterable[str], tensors: Iterable[str], argument: str) -> dict[str, str]:
    """Which tensor of the base each of the adapter's paths stands for, however either spells its wrappers.

    Args:
        wanted: tensor paths (with ``.weight``).
        tensors: the base's tensor names.

    Raises:
        CheckpointError: a path that fits none, or more than one.
    """
    by_reduced: dict[str, list[str]] = {}
    names = set(tensors)
    for name in names:
        by_reduced.setdefault(reduced(name), []).append(name)
    found: dict[str, str] = {}
    for path in wanted:
        fits = [path] if path in names else by_reduced.get(reduced(path), [])
        if len(fits) != 1:
            what = "no tensor of BEFORE" if not fits else f"{len(fits)} tensors of BEFORE ({', '.join(sorted(fits))})"
            tied = ", where it is tied to the embedding: merge the adapter and pass the model"
            tied = tied if not fits and "lm_head" in path.split(".") else ""
            raise CheckpointError(f"{argument}: the adapter's layer {path} fits {what}{tied}")
        found[path] = fits[0]
    return found

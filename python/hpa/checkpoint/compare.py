"""Looking at checkpoints: what is in a folder or file (``hpa inspect``), and where two differ (``hpa compare``)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import hpa_ext
from hpa.checkpoint.adapter import Adapter, Factors
from hpa.checkpoint.files import CheckpointError, Folder, TensorInfo, read_tensor
from hpa.checkpoint.plan import Matrix, decoder_of, model_layers
from hpa.layers import add_update

__all__ = ["Difference", "Contents", "compare_folders", "inspect_folder"]


@dataclass(frozen=True)
class Contents:
    """What a model folder or an adapter holds.

    Attributes:
        kind: model or adapter.
        facts: lines for people.
        layers: canonical name -> shape of what would be edited.
        left: reason -> number of tensors that would not.
    """

    kind: str
    facts: dict[str, str]
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One tensor of two folders.

    Attributes:
        name: of the tensor in B.
        layer: canonical layer name, or "".
        before_norm, change_norm: Frobenius norms of A's and of the difference.
        columns_equal: columns of a layer that are equal bit for bit.
        cols: columns of a layer.
        note: why nothing was compared.
    """

    name: str
    layer: str = ""
    before_norm: float = 0.0
    change_norm: float = 0.0
    columns_equal: int = 0
    cols: int = 0
    note: str = ""


def inspect_folder(path: Path) -> Contents:
    """Raises CheckpointError where the folder is no checkpoint."""
    folder = Folder(path, "DIR")
    dtypes = Counter(info.dtype for info in folder.tensors.values())
    facts = {
        "tensors": f"{len(folder.tensors)} in {len(folder.files)} files, {folder.total_size / 1e9:.3f} GB",
        "dtypes": ", ".join(f"{dtype} ({count})" for dtype, count in dtypes.most_common()),
    }
    if folder.is_adapter:
        adapter = Adapter.of(folder)
        ranks = Counter(pair.a.shape[0] for pair in adapter.factors.values())
        facts |= {
            "kind": "LoRA adapter",
            "base": str(folder.config.get("base_model_name_or_path")),
            "layers": str(len(adapter.factors)),
            "ranks": ", ".join(f"{rank} ({count})" for rank, count in sorted(ranks.items())),
            "trained in full": ", ".join(sorted(adapter.replaced)) or "nothing",
        }
        return Contents("adapter", facts, {name: pair.shape for name, pair in adapter.factors.items()})
    decoder = decoder_of(folder)
    layers = model_layers(folder, decoder)
    chosen = {matrix.info.name for matrix in layers.values()}
    left = Counter(
        "in the decoder" if decoder.canonical(name) else "outside the decoder"
        for name in folder.tensors
        if name not in chosen
    )
    facts |= {
        "kind": f"model ({folder.config.get('model_type', 'unknown type')})",
        "decoder": f"{decoder.path}, {decoder.blocks} blocks",
        "layers": f"{len(layers)} linear layers in the decoder",
    }
    return Contents("model", facts, {name: matrix.info.shape for name, matrix in layers.items()}, dict(left))


def compare_folders(first: Path, second: Path) -> list[Difference]:
    """Every tensor of B beside its counterpart in A; an adapter as B is compared as its base A with it.

    Raises:
        CheckpointError: folders that are no checkpoints of one architecture.
    """
    a, b = Folder(first, "A"), Folder(second, "B")
    if a.is_adapter:
        raise CheckpointError(f"A: {first} is an adapter; expected a model")
    factors: dict[str, Factors] = {}
    replaced: dict[str, TensorInfo] = {}
    base = b
    if b.is_adapter:
        adapter = Adapter.of(b)
        factors, replaced = adapter.factors_on(a.tensors), adapter.replaced_on(a.tensors)
        base = a
    decoders = [decoder_of(folder) for folder in (a, base)]
    places = {decoders[0].place(name): name for name in a.tensors}
    old = model_layers(a, decoders[0])
    experts: dict[str, list[Matrix]] = {}
    for matrix in model_layers(base, decoders[1]).values():
        if matrix.expert is not None:
            experts.setdefault(matrix.info.name, []).append(matrix)
    found: list[Difference] = []
    for name, stored in base.tensors.items():
        info = replaced.get(name, stored)
        if name in experts:
            for matrix in experts[name]:
                layer = matrix.layer.name
                if layer not in old:
                    found.append(Difference(name, layer, note="only in B"))
                    continue
                places.pop(decoders[0].place(old[layer].info.name), None)
                found.append(_compared(name, layer, old[layer].info, matrix.within(info)))
            continue
        place = decoders[1].place(name)
        other = places.pop(place, None)
        layer = place.removesuffix(".weight") if decoders[1].canonical(name) and len(info.shape) == 2 else ""
        if other is None:
            found.append(Difference(name, layer, note="only in B"))
        elif name in factors and a.tensors[other].shape == info.shape and info.is_floating:
            before = read_tensor(a.tensors[other])
            found.append(_difference(name, layer, before, add_update(before, factors[name].read(), torch.float32)))
        else:
            found.append(_compared(name, layer, a.tensors[other], info))
    told = {difference.layer for difference in found}
    for layer, matrix in old.items():
        if matrix.expert is not None and layer not in told and matrix.info.name not in places.values():
            found.append(Difference(matrix.info.name, layer, note="only in A"))
    return found + [Difference(name, note="only in A") for name in places.values()]


def _compared(name: str, layer: str, before: TensorInfo, after: TensorInfo) -> Difference:
    if before.shape != after.shape:
        return Difference(name, layer, note=f"{list(before.shape)} in A, {list(after.shape)} in B")
    first = read_tensor(before)
    second = first if before == after else read_tensor(after)
    if before.is_floating and after.is_floating:
        return _difference(name, layer, first, second)
    return Difference(name, layer, note="" if torch.equal(first, second) else "other values")


def _difference(name: str, layer: str, before: Tensor, after: Tensor) -> Difference:
    wide = torch.promote_types(before.dtype, after.dtype)
    before, after = before.to(wide), after.to(wide)
    matrix = before.reshape(-1, before.shape[-1]) if before.ndim > 1 else before.reshape(1, -1)
    other = after.reshape(matrix.shape)
    statistics = hpa_ext.change_statistics(matrix, other)
    equal = int((statistics.column_change == 0).sum()) if layer else 0
    return Difference(
        name,
        layer,
        math.sqrt(max(0.0, float(statistics.before_norm_sq))),
        math.sqrt(max(0.0, float(statistics.change_norm_sq))),
        equal,
        matrix.shape[1] if layer else 0,
    )

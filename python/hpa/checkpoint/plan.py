"""What will happen to every tensor, decided from headers alone: merged, copied or skipped, with the reason."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Literal

from hpa.calibration import LayerSpec
from hpa.checkpoint.adapter import Adapter, Factors, match_names
from hpa.checkpoint.files import CheckpointError, Folder, TensorInfo, fingerprint
from hpa.checkpoint.names import (
    Decoder,
    expert_input,
    find_decoder,
    find_experts,
    is_projector,
    is_router,
    projector_name,
)
from hpa.methods import Method

__all__ = ["Entry", "Matrix", "Plan", "Shard", "decoder_of", "make_plan", "model_fingerprint", "model_layers"]

Fate = Literal["merged", "copied", "skipped"]
LEFT_OUT = "left out as asked"
_QUANTISED = ("qweight", "qzeros", "weight_scale", "weight_packed", "absmax", "SCB", "weight_scale_inv")


@dataclass(frozen=True)
class Matrix:
    """A linear layer of a model, and where its weight is.

    Attributes:
        layer: which one it is.
        info: of its weight, ``[rows, cols]``: a tensor, or one expert's part of one.
        expert: number of that expert.
    """

    layer: LayerSpec
    info: TensorInfo
    expert: int | None = None

    def within(self, tensor: TensorInfo) -> TensorInfo:
        """This layer's weight in another tensor of the same form."""
        return tensor if self.expert is None else tensor.expert(self.expert, self.info.transposed)


@dataclass(frozen=True)
class Entry:
    """One tensor of the output (or, where skipped, of an input), or one expert's part of it.

    Attributes:
        name: of the tensor.
        fate: merged: edited by the method; copied: as AFTER has it; skipped: not in the output.
        source: its bytes in AFTER (or the base, beside an adapter).
        before: W_{t-1}, where merged.
        factors: the adapter's update of it.
        layer: which layer it is, where merged.
        part: "A" or "B" where the output is an adapter.
        expert: number of the expert, where the tensor holds all of a block; their entries follow each other.
        whole: shape of the tensor, where it does.
    """

    name: str
    fate: Fate
    reason: str
    source: TensorInfo
    before: TensorInfo | None = None
    factors: Factors | None = None
    layer: LayerSpec | None = None
    part: str = ""
    expert: int | None = None
    whole: tuple[int, ...] | None = None

    @property
    def read(self) -> int:
        """Bytes read for it."""
        return self.source.size + (self.before.size if self.before is not None else 0)

    @property
    def held(self) -> int:
        """Bytes in memory for it; a transposed matrix is there twice, as it came and as it is used."""
        infos = [info for info in (self.source, self.before) if info is not None]
        return sum(2 * info.size if info.transposed else info.size for info in infos)


@dataclass(frozen=True)
class Shard:
    """One weight file of the output: its name, tensors in order, and metadata."""

    name: str
    entries: list[Entry]
    metadata: dict[str, str]

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each tensor, in their order."""
        return {entry.name: (entry.source.dtype, entry.whole or entry.source.shape) for entry in self.entries}


@dataclass(frozen=True)
class Plan:
    """The whole job."""

    shards: list[Shard]
    skipped: list[Entry]
    decoder: Decoder
    layers: list[LayerSpec] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        return [entry for shard in self.shards for entry in shard.entries]

    @property
    def output_size(self) -> int:
        return sum(entry.source.size for entry in self.entries)

    @property
    def read_size(self) -> int:
        return sum(entry.read for entry in self.entries)

    @property
    def largest(self) -> int:
        """Bytes of the largest merged layer, both states."""
        return max((entry.held for entry in self.entries if entry.fate == "merged"), default=0)

    def work_size(self, method: Method) -> int:
        """Bytes that ``method`` takes for the layer that asks most, besides its weights."""
        sides = {
            (entry.before.shape[0], entry.before.shape[1])
            for entry in self.entries
            if entry.fate == "merged" and entry.before is not None
        }
        return max((method.work_size(*side) for side in sides), default=0)


def decoder_of(folder: Folder) -> Decoder:
    """Where the decoder's blocks are in a folder; raises as :func:`~hpa.checkpoint.names.find_decoder`."""
    return find_decoder({name: math.prod(info.shape) for name, info in folder.tensors.items()}, folder.argument)


def model_layers(folder: Folder, decoder: Decoder, *, include_projector: bool = False) -> dict[str, Matrix]:
    """The layers to edit, by canonical name, with the weight of each.

    Args:
        folder: the model.
        decoder: of :func:`decoder_of`.
        include_projector: also the linear layers between vision tower and decoder, as block 0.
    """
    found: dict[str, Matrix] = {}
    experts = find_experts({name: info.shape for name, info in folder.tensors.items()}, decoder)
    for name, info in folder.tensors.items():
        path = name.removesuffix(".weight")
        canonical = decoder.canonical(path)
        if name in experts:
            for number, layer in enumerate(experts[name].layers(name)):
                part = info.expert(number, experts[name].transposed)
                found[layer] = Matrix(LayerSpec(layer, decoder.block(layer), decoder.blocks), part, number)
        elif len(info.shape) != 2 or path == name:
            continue
        elif canonical is not None:
            if is_router(canonical) or canonical.endswith("relative_attention_bias") or "embed" in canonical:
                continue
            found[canonical] = Matrix(LayerSpec(canonical, decoder.block(canonical), decoder.blocks), info)
        elif include_projector and is_projector(path):
            layer = projector_name(path)
            found[layer] = Matrix(LayerSpec(layer, 0, decoder.blocks), info)
    return found


def model_fingerprint(model: Folder, adapter: Adapter | None = None) -> str:
    """Of what a model's layers are fed with: every tensor but the head; of a base with an adapter on it, both."""
    decoder = decoder_of(model)
    places = {decoder.place(name): name for name in model.tensors}
    # The head comes after all layers, and a file may leave it out where it is tied.
    print_ = fingerprint(model, {place: name for place, name in places.items() if "lm_head" not in place.split(".")})
    if adapter is None:
        return print_
    own = fingerprint(adapter.folder, {name: name for name in adapter.folder.tensors})
    scales = {name: adapter.folder.config.get(name) for name in ("lora_alpha", "alpha_pattern", "use_rslora")}
    return sha256(f"{print_} {own} {json.dumps(scales, sort_keys=True)}".encode()).hexdigest()[:32]


def make_plan(
    before: Folder,
    after: Folder,
    *,
    adapter: Adapter | None = None,
    known: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    include_projector: bool = False,
    save_as: Literal["full", "lora"] = "full",
) -> Plan:
    """Compare two checkpoints, or a base and an adapter, tensor by tensor.

    Args:
        before: the model before the task.
        after: the model after it, or the adapter's folder.
        adapter: of ``after``, where it is one.
        known: canonical names of the layers that statistics exist for; ``None`` where the method needs none.
        skip: patterns (``*.mlp.down_proj``) of layers to leave as the task made them.
        include_projector: also edit the projector.
        save_as: write a whole model, or the adapter again.

    Raises:
        CheckpointError: a layer that is expected and missing, of another shape, quantised, or without statistics.
    """
    skip = list(skip)
    base = before if adapter is not None else after
    _refuse_quantised(before)
    _refuse_quantised(base)
    decoder, before_decoder = decoder_of(base), decoder_of(before)
    if decoder.blocks != before_decoder.blocks:
        raise CheckpointError(
            f"{after.argument}: has {decoder.blocks} decoder blocks, expected {before_decoder.blocks} as BEFORE has"
        )
    layers = _chosen(model_layers(base, decoder, include_projector=include_projector), known, skip, after)
    if skip:
        all_names = {
            *model_layers(base, decoder, include_projector=True),
            *model_layers(before, before_decoder, include_projector=True),
        }
        _check_skip(skip, all_names, layers)
    old = model_layers(before, before_decoder, include_projector=include_projector)
    for canonical, matrix in old.items():
        if canonical not in layers and not _matches(canonical, skip):
            raise CheckpointError(
                f"{after.argument}: layer {canonical} is missing; BEFORE has it as {matrix.info.name}"
            )
    for canonical, matrix in layers.items():
        if canonical not in old:
            raise CheckpointError(
                f"{before.argument}: layer {canonical} is missing; AFTER has it as {matrix.info.name}"
            )
    choice = _Choice(layers, {name for name in layers if _matches(name, skip)})
    if adapter is not None:
        return _plan_adapter(before, adapter, decoder, choice, save_as)
    if save_as == "lora":
        raise CheckpointError("save-as: lora needs a LoRA adapter as AFTER, got a whole model")
    return _plan_pair(before, after, decoder, choice, {name: old[name].info for name in layers}, before_decoder)


class _Choice:
    """Which tensors of a model hold layers to edit."""

    def __init__(self, layers: dict[str, Matrix], left_out: set[str]) -> None:
        self._left_out = left_out
        self._held: dict[str, list[Matrix]] = {}
        for matrix in layers.values():
            self._held.setdefault(matrix.info.name, []).append(matrix)

    @property
    def layers(self) -> list[LayerSpec]:
        return [matrix.layer for name in self._held for matrix in self.edited(name)]

    @property
    def weights(self) -> dict[str, TensorInfo]:
        """Weight of each layer to edit, by canonical name."""
        return {matrix.layer.name: matrix.info for name in self._held for matrix in self.edited(name)}

    def edited(self, name: str) -> list[Matrix]:
        """The layers to edit in tensor ``name``."""
        return [matrix for matrix in self._held.get(name, []) if matrix.layer.name not in self._left_out]

    def is_left_out(self, name: str) -> bool:
        """Whether a tensor is one that would be edited, had nobody asked to leave it."""
        return name in self._held and not self.edited(name)

    def entries(self, name: str, info: TensorInfo, before: dict[str, TensorInfo], more: str = "") -> list[Entry]:
        """What becomes of a tensor with layers to edit.

        Args:
            name: of the tensor.
            info: its bytes after the task, which may lie in another file.
            before: weights before the task, by canonical name.
            more: to add to the reason.
        """
        found = []
        for matrix in self._held[name]:
            layer, expert = matrix.layer, matrix.expert
            whole = None if expert is None else info.shape
            if layer.name in self._left_out:  # beside others of its tensor that are not
                assert expert is not None
                part = info.expert(expert, transposed=False)
                found.append(Entry(info.name, "copied", LEFT_OUT, part, expert=expert, whole=whole))
                continue
            reason = "linear layer of the decoder" if layer.block else "projector"
            reason = reason if expert is None else "experts in one tensor, each by itself"
            found.append(
                Entry(
                    info.name,
                    "merged",
                    reason + more,
                    matrix.within(info),
                    before[layer.name],
                    layer=layer,
                    expert=expert,
                    whole=whole,
                )
            )
        return found


def _plan_pair(
    before: Folder,
    after: Folder,
    decoder: Decoder,
    choice: _Choice,
    old: dict[str, TensorInfo],
    before_decoder: Decoder,
) -> Plan:
    shards = []
    used = {info.name for info in old.values()}
    for file_name, file in after.files.items():
        entries = []
        for name, info in file.tensors.items():
            if not choice.edited(name):
                entries.append(Entry(name, "copied", _why_copied(name, info, decoder, choice), info))
                continue
            for entry in choice.entries(name, info, old):
                if entry.layer is not None and entry.before is not None:
                    _check_pair(entry.layer, entry.before, entry.source, after.argument)
                entries.append(entry)
        shards.append(Shard(file_name, entries, file.metadata))
    there = {decoder.place(name) for name in after.tensors}
    skipped = [
        Entry(name, "skipped", "only in BEFORE", info)
        for name, info in before.tensors.items()
        if name not in used and before_decoder.place(name) not in there
    ]
    return Plan(shards, skipped, decoder, choice.layers)


def _check_pair(layer: LayerSpec, before: TensorInfo, after: TensorInfo, argument: str) -> None:
    if before.shape != after.shape:
        raise CheckpointError(
            f"{argument}: layer {layer.name} is {list(after.shape)}, expected {list(before.shape)} as in BEFORE"
        )
    for where, tensor in (("BEFORE", before), ("AFTER", after)):
        if not tensor.is_floating:
            raise CheckpointError(
                f"{where}: layer {layer.name} has dtype {tensor.dtype}, expected BF16, F16, F32 or F64"
            )


def _plan_adapter(before: Folder, adapter: Adapter, decoder: Decoder, choice: _Choice, save_as: str) -> Plan:
    argument = adapter.folder.argument
    factors, replaced = adapter.factors_on(before.tensors), adapter.replaced_on(before.tensors)
    for path, tensor in match_names(adapter.copies, before.tensors, argument).items():
        if adapter.copies[path].shape != before.tensors[tensor].shape:
            raise CheckpointError(
                f"{argument}: {tensor} is {list(adapter.copies[path].shape)} in the adapter, expected "
                f"{list(before.tensors[tensor].shape)} as in BEFORE; merge the adapter and pass the model"
            )
    for tensor, pair in factors.items():
        if pair.shape != before.tensors[tensor].shape:
            raise CheckpointError(
                f"{argument}: the factors of {tensor} make {list(pair.shape)}, "
                f"expected {list(before.tensors[tensor].shape)}"
            )
        if not before.tensors[tensor].is_floating:
            raise CheckpointError(
                f"BEFORE: {tensor} has dtype {before.tensors[tensor].dtype}, expected BF16, F16, F32 or F64"
            )
    for tensor, info in replaced.items():
        if choice.edited(tensor) and info.shape != before.tensors[tensor].shape:
            raise CheckpointError(
                f"{argument}: {tensor} is {list(info.shape)}, expected {list(before.tensors[tensor].shape)}"
            )
        if choice.edited(tensor) and not info.is_floating:
            raise CheckpointError(f"{argument}: {tensor} has dtype {info.dtype}, expected BF16, F16, F32 or F64")
    layers = [matrix.layer for tensor in (*factors, *replaced) for matrix in choice.edited(tensor)]
    if save_as == "lora":
        return Plan([_adapter_shard(before, adapter, factors, replaced, choice)], [], decoder, layers)
    old = choice.weights
    shards = []
    for file_name, file in before.files.items():
        entries = []
        for name, info in file.tensors.items():
            own, edited = factors.get(name), choice.edited(name)
            if name in replaced and edited:
                for entry in choice.entries(name, replaced[name], old, ", trained in full"):
                    entries.append(replace(entry, name=name))
            elif name in replaced:
                entries.append(
                    Entry(
                        name,
                        "copied",
                        "trained in full beside the adapter",
                        _same_shape(replaced[name], info, argument),
                    )
                )
            elif own is not None and edited:
                for entry in choice.entries(name, info, old):
                    entries.append(replace(entry, factors=own))
            elif own is not None:
                reason = LEFT_OUT if choice.is_left_out(name) else "outside the decoder's linear layers"
                entries.append(Entry(name, "copied", f"{reason}: the adapter's update as trained", info, info, own))
            else:
                entries.append(Entry(name, "copied", "the adapter does not change it", info))
        shards.append(Shard(file_name, entries, file.metadata))
    return Plan(shards, [], decoder, layers)


def _adapter_shard(
    before: Folder,
    adapter: Adapter,
    factors: dict[str, Factors],
    replaced: dict[str, TensorInfo],
    choice: _Choice,
) -> Shard:
    halves: dict[str, tuple[str, str]] = {}
    for tensor, pair in factors.items():
        halves[pair.a.name] = (tensor, "A")
        halves[pair.b.name] = (tensor, "B")
    whole = {held.name: tensor for tensor, held in replaced.items() if choice.edited(tensor)}
    old = choice.weights
    (file_name, file), *_ = adapter.folder.files.items()
    entries = []
    for name, info in file.tensors.items():
        tensor, part = halves.get(name, ("", ""))
        edited = choice.edited(tensor)
        if name in whole:
            entries += choice.entries(whole[name], info, old, ", trained in full")
        elif not edited:
            entries.append(Entry(name, "copied", "no factor of a layer that is edited", info))
        else:
            entries.append(
                Entry(
                    name,
                    "merged",
                    "factor of a linear layer",
                    info,
                    before.tensors[tensor],
                    factors[tensor],
                    edited[0].layer,
                    part,
                )
            )
    return Shard(file_name, entries, file.metadata)


def _chosen(
    layers: dict[str, Matrix], known: Iterable[str] | None, skip: list[str], after: Folder
) -> dict[str, Matrix]:
    """``layers``, checked against those that statistics are known for."""
    if not layers:
        raise CheckpointError(f"{after.argument}: no linear layers ([rows, cols] named *.weight) in its decoder blocks")
    if known is None:
        return layers
    known = set(known)
    without = [name for name in layers if not _matches(name, skip) and not _is_known(name, known)]
    if without:
        raise CheckpointError(
            f"statistics: none for {len(without)} of {len(layers)} layers, the first is {without[0]}; "
            "calibrate again, or leave such layers as the task made them with --skip"
        )
    # A router that is a linear layer is calibrated like any other, and left alone all the same.
    inputs = {name for name in known if expert_input(name) is None and not is_router(name)}
    lacking = sorted(inputs - set(layers))
    if lacking:
        raise CheckpointError(
            f"{after.argument}: layer {lacking[0]} is missing ({len(lacking)} in all); the statistics have it"
        )
    return layers


def _check_skip(skip: list[str], all_names: Iterable[str], layers: dict[str, Matrix]) -> None:
    """Raises CheckpointError for a pattern that matches no layer of either side, or where none is left to edit."""
    for pattern in skip:
        if not any(_matches(name, [pattern]) for name in all_names):
            raise CheckpointError(
                f"--skip: {pattern!r} matches none of {len(layers)} layers, of which the first is {next(iter(layers))}"
            )
    if all(_matches(name, skip) for name in layers):
        raise CheckpointError(f"--skip: {' '.join(skip)} leaves none of {len(layers)} layers to edit")


def _is_known(name: str, known: set[str]) -> bool:
    return name in known or expert_input(name) in known


def _why_copied(name: str, info: TensorInfo, decoder: Decoder, choice: _Choice) -> str:
    canonical = decoder.canonical(name.removesuffix(".weight"))
    if choice.is_left_out(name):
        return LEFT_OUT
    if canonical is None:
        return "outside the decoder"
    if is_router(canonical):
        return "router of experts"
    if len(info.shape) == 3 and ("expert" in name or "moe" in name):
        return "experts in a form that is not known: not edited"
    if len(info.shape) < 2 or name.endswith("bias"):
        return "norm or bias"
    return "not a linear layer"


def _refuse_quantised(folder: Folder) -> None:
    if "quantization_config" in folder.config or any(
        name.rpartition(".")[2] in _QUANTISED or ".absmax" in name for name in folder.tensors
    ):
        raise CheckpointError(f"{folder.argument}: {folder.path} is quantised; save it in BF16, F16 or F32 first")
    if str(folder.config.get("model_type", "")) in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer"):
        raise CheckpointError(
            f"{folder.argument}: {folder.config['model_type']} keeps its layers as Conv1D [cols, rows]; "
            "only linear layers [rows, cols] are edited"
        )


def _same_shape(info: TensorInfo, expected: TensorInfo, argument: str) -> TensorInfo:
    if info.shape[1:] != expected.shape[1:]:
        raise CheckpointError(f"{argument}: {info.name} is {list(info.shape)}, expected {list(expected.shape)}")
    return info


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

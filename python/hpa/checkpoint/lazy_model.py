"""A model whose decoder blocks are read from disk when they run, one at a time.

Calibration drives a model block by block, so of its decoder only the block in work has to be in memory.  The model is
built without weights; what lies outside the decoder is read at once, a block's weights just before its first call, and
given up when the next block runs.  Over an adapter, its update is added on the way in.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hpa.calibration import unwrap
from hpa.checkpoint.adapter import Adapter
from hpa.checkpoint.files import DTYPES, CheckpointError, Folder, read_tensor
from hpa.checkpoint.names import Decoder, find_decoder, find_experts, reduced
from hpa.checkpoint.plan import decoder_of
from hpa.data.quiet import quiet
from hpa.layers import add_update

__all__ = ["LazyModel", "module_decoder"]

_FUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


class LazyModel:
    """``model`` behaves like any other in a forward pass.

    Attributes:
        model: the module tree.
        decoder: where its blocks are.
        streamed: whether blocks come from disk as they run; if not, the whole model is in memory.
    """

    def __init__(
        self,
        folder: Folder,
        adapter: Adapter | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        """The model, ready to run.

        Args:
            dtype: of the weights in memory; by default as they are stored.
            device: where it runs: a block's weights go there when it does.

        Raises:
            CheckpointError: transformers does not know the model, or has no place for one of its tensors.
        """
        self._folder, self._dtype, self._device = folder, dtype, torch.device(device)
        self._disk = decoder_of(folder)
        self._updates = {} if adapter is None else adapter.factors_on(folder.tensors)
        self._replaced = {} if adapter is None else adapter.replaced_on(folder.tensors)
        self.model, self._architecture = _empty_model(folder, trust_remote_code)
        self.decoder = module_decoder(self.model, folder.argument)
        self._blocks: nn.ModuleList = self.model.get_submodule(self.decoder.path)  # type: ignore[assignment]
        if len(self._blocks) != self._disk.blocks:
            raise CheckpointError(
                f"{folder.argument}: its files hold {self._disk.blocks} blocks, its config asks for {len(self._blocks)}"
            )
        self._loaders = self._matched()
        self.streamed = self._loaders is not None
        self._resident: int | None = None
        if self._loaders is None:
            self._load_whole(trust_remote_code)
        else:
            self._load_outside()
            for number, block in enumerate(self._blocks):
                block.register_forward_pre_hook(self._bring(number))
        self.model.eval()

    @property
    def weights_size(self) -> int:
        """Bytes of what is in memory while a block runs: the largest block and all outside the blocks (the head apart,
        which only whole forward passes bring)."""
        held = {
            id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers()) if not tensor.is_meta
        }
        size = sum(tensor.nbytes for tensor in held.values())
        if not self.streamed or self._resident is not None:
            return size
        blocks: Counter[str] = Counter()
        for name, info in self._folder.tensors.items():
            match = re.match(r"layers\.(\d+)\.", self._disk.canonical(name) or "")
            if match is not None:
                itemsize = (self._dtype or DTYPES[info.dtype]).itemsize
                blocks[match[1]] += math.prod(info.shape) * itemsize
        return size + max(blocks.values())

    def _bring(self, number: int) -> Callable[..., None]:
        def before_call(block: nn.Module, *_args: Any) -> None:
            if "forward" in vars(block):
                return  # stood in for: the block's own weights are not asked for
            if self._resident == number:
                return
            if self._resident is not None:
                for owner, name, _path in self._places(self._resident):
                    _assign(owner, name, torch.empty(owner.get_parameter(name).shape, device="meta"))
            assert self._loaders is not None
            for owner, name, path in self._places(number):
                _assign(owner, name, self._loaders[path]())
            self._resident = number

        return before_call

    def _bring_head(self, path: str, name: str) -> Callable[..., None]:
        def before_call(head: nn.Module, *_: Any) -> None:
            if head.get_parameter(name).is_meta:
                assert self._loaders is not None
                _assign(head, name, self._loaders[path]())

        return before_call

    def _places(self, number: int) -> list[tuple[nn.Module, str, str]]:
        prefix = f"{self.decoder.path}.{number}"
        return [
            (module, name, f"{prefix}.{path}.{name}".replace("..", "."))
            for path, module in self._blocks[number].named_modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def _matched(self) -> dict[str, Callable[[], Tensor]] | None:
        """For each parameter what reads it; ``None`` where some have no counterpart on disk."""
        by_canonical: dict[str, str] = {}
        for name in self._folder.tensors:
            key = self._disk.canonical(name) or reduced(name)
            by_canonical[key.replace(".router.layer.", ".router.")] = name  # Granite's files have a module more there
            by_canonical[key] = name
        experts = _experts_alias(self._folder, self._disk)
        stacked = self._stacked_experts()
        found: dict[str, Callable[[], Tensor]] = {}
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        for full, parameter in self.model.named_parameters(remove_duplicate=False):
            canonical = self.decoder.canonical(full) or reduced(full)
            if full in stacked:
                found[full] = stacked[full]
                continue
            like = by_canonical.get(canonical) or by_canonical.get(experts(canonical))
            if like is not None and tuple(self._folder.tensors[like].shape) == tuple(parameter.shape):
                found[full] = self._reader(like)
                continue
            fused = self._fused(canonical, parameter, by_canonical, experts)
            if fused is not None:
                found[full] = fused
            elif (
                full in tied
                or any(re.fullmatch(key, full) for key in tied)
                or (head is not None and parameter is getattr(head, "weight", None))
            ):
                continue  # shares another parameter's values
            else:
                return None
        return found

    def _stacked_experts(self) -> dict[str, Callable[[], Tensor]]:
        """What reads the parameters that hold all experts of a block, where the files hold them like that too, under
        another name or with matrices transposed."""
        parameters = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        tensors = {name: info.shape for name, info in self._folder.tensors.items()}
        on_disk = {
            self._disk.block(held.path): held for held in find_experts(tensors, self._disk).values()
        }  # transformers knows one list of experts a block
        found: dict[str, Callable[[], Tensor]] = {}
        for full, wanted in find_experts(parameters, self.decoder).items():
            held = on_disk.get(self.decoder.block(wanted.path))
            if held is None:
                continue
            name = held.gate_up if full == wanted.gate_up else held.down
            swap = held.transposed != wanted.transposed
            shape = tensors[name]
            if ((shape[0], shape[2], shape[1]) if swap else shape) == parameters[full]:
                found[full] = partial(self._read_stacked, name, swap)
        return found

    def _read_stacked(self, name: str, swap: bool) -> Tensor:
        tensor = self._read(name)
        return tensor.transpose(1, 2).contiguous() if swap else tensor

    def _fused(
        self, canonical: str, parameter: Tensor, by_canonical: dict[str, str], experts: Callable[[str], str]
    ) -> Callable[[], Tensor] | None:
        """A tensor ``[experts, ...]`` of the module tree, from one matrix an expert on disk."""
        module, _, last = canonical.rpartition(".")
        if last not in _FUSED or parameter.ndim != 3 or not module.endswith("experts"):
            return None
        for parts in _FUSED[last]:
            names = [
                [by_canonical.get(experts(f"{module}.{expert}.{part}.weight")) for part in parts]
                for expert in range(parameter.shape[0])
            ]
            if all(name is not None for row in names for name in row):
                readers = [[self._reader(str(name)) for name in row] for row in names]
                return lambda: torch.stack([torch.cat([read() for read in row]) for row in readers])
        return None

    def _reader(self, name: str) -> Callable[[], Tensor]:
        return lambda: self._read(name)

    def _read(self, name: str) -> Tensor:
        tensor = read_tensor(self._replaced.get(name, self._folder.tensors[name]))
        dtype = tensor.dtype if self._dtype is None or not tensor.is_floating_point() else self._dtype
        if name in self._updates:
            tensor = add_update(tensor, self._updates[name].read(), dtype)
        return tensor.to(self._device, dtype)

    def _load_outside(self) -> None:
        assert self._loaders is not None
        inside = {full for number in range(len(self._blocks)) for _, _, full in self._places(number)}
        done: dict[int, Tensor] = {}
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        for full, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if full in inside or full not in self._loaders:
                continue
            owner_path, _, name = full.rpartition(".")
            owner = self.model.get_submodule(owner_path)
            if owner is head:
                # Nothing that calibration looks at comes after the blocks, unless whole forward passes are run.
                owner.register_forward_pre_hook(self._bring_head(full, name))
                continue
            if id(parameter) not in done:
                done[id(parameter)] = self._loaders[full]()
            _assign(owner, name, done[id(parameter)])
        # What is computed, not stored (the frequencies of rotary embeddings, masks), is there already.
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self._device)

    def _load_whole(self, trust_remote_code: bool) -> None:
        where = f"{self._folder.argument}: {self._folder.path}"
        try:
            with quiet():
                model, about = self._architecture.from_pretrained(
                    self._folder.path,
                    local_files_only=True,
                    dtype=self._dtype or "auto",
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                )
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise CheckpointError(f"{where}: its weights have other shapes than its config.json says") from error
        missing = sorted(about["missing_keys"])
        if missing:
            raise CheckpointError(f"{where}: it has no weights for {missing[0]} ({len(missing)} missing in all)")
        with torch.no_grad():
            for tensor, factors in self._updates.items():
                target = _parameter_like(model, tensor, self._disk)
                target.copy_(add_update(target, factors.read(), target.dtype))
            for tensor, info in self._replaced.items():
                _parameter_like(model, tensor, self._disk).copy_(read_tensor(info))
        self.model = model.to(self._device)
        self._blocks = model.get_submodule(self.decoder.path)


def module_decoder(model: nn.Module, argument: str) -> Decoder:
    """The decoder's place in a module tree."""
    bare = unwrap(model)
    return find_decoder({name: parameter.numel() for name, parameter in bare.named_parameters()}, argument)


def _empty_model(folder: Folder, trust_remote_code: bool) -> tuple[nn.Module, Any]:
    import transformers
    from accelerate import init_empty_weights

    if folder.config.get("is_encoder_decoder"):
        raise CheckpointError(
            f"{folder.argument}: {folder.path} has an encoder before its decoder; only models that are a decoder alone "
            "can be calibrated"
        )
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(folder.path, **options)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{folder.argument}: transformers cannot read {folder.path}/config.json ({first})"
        ) from error
    architecture: Any = None
    for name in getattr(config, "architectures", None) or []:
        architecture = architecture or getattr(transformers, name, None)
    if architecture is None:
        kinds = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)
        architecture = next((kind for kind in kinds if type(config) in kind._model_mapping), kinds[1])
    with contextlib.ExitStack() as stack:
        stack.enter_context(init_empty_weights())
        try:
            if hasattr(architecture, "from_config"):
                model = architecture.from_config(config, trust_remote_code=trust_remote_code)
            else:
                model = architecture._from_config(config)
        except (ValueError, ImportError) as error:
            first = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{folder.argument}: transformers cannot build the model of {folder.path} ({first})"
            ) from error
    return model, architecture


def _experts_alias(folder: Folder, decoder: Decoder) -> Callable[[str], str]:
    """Some files call the module around the experts otherwise than the module tree does: rewrite to the files' way."""
    parents = {
        match[1]
        for name in folder.tensors
        if (match := re.match(r"layers\.\d+\.(.+?)\.experts\.", decoder.canonical(name) or "")) is not None
    }
    if len(parents) != 1:
        return lambda canonical: canonical
    parent = next(iter(parents))

    def rewrite(canonical: str) -> str:
        match = re.match(r"(layers\.\d+)\.(mlp|block_sparse_moe|feed_forward|ffn|moe)\.(.+)$", canonical)
        return canonical if match is None else f"{match[1]}.{parent}.{match[3]}"

    return rewrite


def _parameter_like(model: nn.Module, tensor: str, disk: Decoder) -> Tensor:
    decoder = module_decoder(model, "AFTER")
    wanted = disk.canonical(tensor) or reduced(tensor)
    for name, parameter in model.named_parameters():
        if (decoder.canonical(name) or reduced(name)) == wanted:
            return parameter
    raise CheckpointError(f"AFTER: transformers' model has no place for '{tensor}'")


def _assign(owner: nn.Module, name: str, tensor: Tensor) -> None:
    owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)

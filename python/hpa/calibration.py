"""Activations -> Gram matrices -> diagonals of inverse Hessians, streamed decoder block by decoder block.

For every linear layer the method asks one thing of a calibration set: ``H = 2 X'X / N`` over the layer's inputs ``X``
(METHOD 1.1), or the diagonal of its damped inverse.  A model is walked once:

1. *capture*: every batch runs through what comes before the decoder (embeddings, vision tower, projector) while the
   blocks themselves are stood in for, so that each block's arguments (masks, rotary tables) are recorded as the model
   makes them, without computing a block;
2. *block by block*: all batches go through one block, hooks on its linear layers accumulate the Gram matrices, the
   outputs become the inputs of the next block, and what the block needed is freed.

Layers that are fed the same tensor share one Gram matrix.  Sharing is seen at run time, by the identity of the input
tensor, never by names: q/k/v and gate/up come out as one each (four matrices a block instead of seven), and so does
whatever another architecture shares.

A model whose blocks cannot be driven one by one (it works on the hidden states between blocks, skips or repeats
blocks, or hands other tensors along) takes the *whole* route instead, with a :class:`CalibrationWarning`: plain
forward passes with hooks on all layers.  The statistics are the same; memory then holds the Gram matrices of all blocks
at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

import hpa_ext
from hpa.config import CalibrationConfig
from hpa.layers import InputStatistics, clean_name

__all__ = [
    "CalibrationStream",
    "CalibrationWarning",
    "Exchange",
    "HiddenStore",
    "LayerSpec",
    "adapters_off",
    "calibrate",
    "experts_transposed",
    "find_layers",
    "linear_of",
    "unwrap",
]

PROJECTOR_NAMES = ("multi_modal_projector", "mm_projector", "connector", "modality_projection", "merger")
LOW_RANK_BELOW = 0.8  # tokens per column below which the inverse diagonal needs no Gram matrix (METHOD 6.3)


class CalibrationWarning(UserWarning):
    """The blocks of a model could not be driven one by one; memory holds all blocks' statistics at once."""


@dataclass(frozen=True)
class LayerSpec:
    """A linear layer that an edit may change.

    Attributes:
        name: module path in the model without adapter wrappers, as ``model.get_submodule`` takes it.
        block: decoder block, 1-based; 0 for the projector before the first block.
        blocks: number of decoder blocks.
    """

    name: str
    block: int
    blocks: int


def find_layers(model: nn.Module, include_projector: bool = False, *, blocks: str | None = None) -> list[LayerSpec]:
    """The linear layers of the decoder's blocks, in the order of their blocks (D11).

    Output head, embeddings, norms and the vision tower are left alone, and so are adapter factors: a layer that peft
    has wrapped is listed once, under its own name.  Experts that a model keeps in one tensor are no ``nn.Linear`` and
    are left alone too.

    Args:
        model: a ``transformers`` model, bare or inside peft or DistributedDataParallel, or any module whose decoder is
            a ``ModuleList`` or ``Sequential`` of blocks.
        include_projector: also the linear layers between vision tower and decoder, as block 0.
        blocks: module path of the list of blocks, where it should not be searched for.

    Raises:
        ValueError: no blocks, no ``nn.Linear`` in them (GPT-2's ``Conv1D`` is none), or no projector where one is asked
            for.
    """
    bare = unwrap(model)
    members = _decoder_blocks(bare, blocks)
    found: list[LayerSpec] = []
    if include_projector:
        for name, module in _projectors(bare):
            found += [LayerSpec(layer, 0, len(members)) for layer, _ in _linears(module, name)]
        if not found:
            raise ValueError(
                f"include_projector: {type(bare).__name__} has no projector with linear layers "
                f"(looked for modules named {', '.join(PROJECTOR_NAMES)})"
            )
    in_blocks: list[LayerSpec] = []
    seen: set[int] = set()
    for number, (block_name, module) in enumerate(members, start=1):
        for name, linear in _linears(module, block_name):
            if id(linear) not in seen:
                seen.add(id(linear))
                in_blocks.append(LayerSpec(name, number, len(members)))
    if not in_blocks:
        raise ValueError(
            f"blocks: those of {type(bare).__name__} from '{members[0][0]}' on hold no nn.Linear layer to edit"
        )
    return found + in_blocks


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: Sequence[LayerSpec] | None = None,
    *,
    want: Iterable[str] = ("diagonal",),
    config: CalibrationConfig | None = None,
) -> Iterator[tuple[int, dict[str, InputStatistics]]]:
    """Statistics of the layers' inputs over ``batches``, one decoder block at a time.

    The model is used as it stands (adapters and all), in eval mode and without gradients, and is left as it was found.
    A block's statistics are yielded after all batches have passed it and before the next block is run, so a caller may
    overwrite the weights of a block that was yielded without a trace in later statistics.

    Args:
        model: see :func:`find_layers`.
        batches: dictionaries of model arguments.  ``attention_mask [batch, seq]`` marks padding (0), which is dropped;
            ``labels`` are not passed on.  ``inputs_embeds``, ``pixel_values``, ``mm_encoder_outputs`` and anything else
            the model takes are.
        layers: by default what :func:`find_layers` finds.
        want: ``"diagonal"``, ``"gram"`` or both.
        config: averaging, damping and token filter; the defaults when ``None``.

    Yields:
        ``(block, statistics)``: layer name to :class:`InputStatistics`; layers fed by one tensor share one object.

    Raises:
        ValueError: bad arguments, or activations that are not finite (the layer is named).
    """
    stream = CalibrationStream(model, batches, layers, want=want, config=config)
    return ((number, stream.block(number)) for number in stream.numbers)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Adapters disabled, then enabled again with the gradients' flags as they were."""
    layers = [cast(Any, module) for module in model.modules() if hasattr(module, "base_layer")]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DistributedDataParallel and peft."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            inner = cast(Any, model).get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def linear_of(module: nn.Module) -> nn.Linear | None:
    """The ``nn.Linear`` that ``module`` is or, as an adapter layer, wraps; ``None`` if it is neither."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module if isinstance(module, nn.Linear) else None


class CalibrationStream:
    """A calibration set on its way through one model.

    :func:`calibrate` in steps, for callers that change weights between them: :meth:`capture` reads what comes before
    the decoder, :meth:`block` runs one block.  In both, the weights count as they are at that moment.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        layers: Sequence[LayerSpec] | None = None,
        *,
        want: Iterable[str] = ("diagonal",),
        config: CalibrationConfig | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        label: str = "batches",
        experts: bool = False,
        exchange: Exchange | None = None,
        hidden: HiddenStore | None = None,
    ) -> None:
        """``batches`` that come from an iterator are taken one by one, while :meth:`capture` runs, and not kept.

        ``context`` surrounds every forward pass (to switch adapters off); ``label`` names the set in errors.

        ``experts``: also the inputs of experts that a model keeps in one tensor, as entries of their own named
        ``<experts module>.<number>.in`` (gate and up) and ``.out`` (down).  ``exchange`` sums over the processes that
        have each a part of the samples.  ``hidden`` holds what goes from block to block, and is this stream's alone.
        """
        self.config = CalibrationConfig() if config is None else config
        self.model = unwrap(model)
        self.want = frozenset(want)
        self.route: str | None = None
        self._label = label
        self._context = context
        if not self.want or self.want - {"diagonal", "gram"}:
            raise ValueError(f"want: expected 'diagonal', 'gram' or both, got {sorted(self.want)}")
        if layers is None:
            layers = find_layers(self.model, self.config.include_projector, blocks=self.config.blocks)
        if not layers:
            raise ValueError("layers: expected at least one layer, got none")
        self._layers: dict[int, dict[str, nn.Linear]] = {}
        for spec in layers:
            self._layers.setdefault(spec.block, {})[spec.name] = _resolve(self.model, spec.name)
        self._exchange = exchange
        members = _decoder_blocks(self.model, self.config.blocks)
        self._blocks = [module for _, module in members]
        self._experts: dict[int, dict[str, nn.Module]] = {}
        for number, (path, module) in enumerate(members, start=1):
            if experts and number in self._layers:
                self._experts[number] = {f"{path}.{name}": child for name, child in _fused_experts(module)}
        if max(self._layers) > len(self._blocks):
            raise ValueError(f"layers: block {max(self._layers)} is named, but the decoder has {len(self._blocks)}")
        prepared = (self._prepared(batch, index) for index, batch in enumerate(batches))
        # Pictures can take more than all else: a list is the caller's, and checked at once, but no second one is made.
        self._batches = list(prepared) if isinstance(batches, Sequence) else list(islice(prepared, 1))
        self._waiting: Iterator[_Batch] = prepared
        if not self._batches:
            raise ValueError(f"{label}: expected at least one batch, got none")
        self._calls: list[list[_Call]] = []
        self._hidden: HiddenStore = {} if hidden is None else hidden
        self._next = 1
        self._collectors: dict[int, _Collector] = {}

    @property
    def numbers(self) -> list[int]:
        """Blocks with layers to edit, in order."""
        return sorted(self._layers)

    @property
    def sums_size(self) -> int:
        """Bytes that the sums of a block and the work of one inverse take at most: layers that turn out to be fed by
        the same tensor share a sum."""
        widths: dict[int, list[int]] = {
            number: [linear.in_features for linear in layers.values()] for number, layers in self._layers.items()
        }
        for number, experts in self._experts.items():
            for module in experts.values():
                both, last = (cast(Tensor, getattr(module, key)) for key in ("gate_up_proj", "down_proj"))
                widths[number] += [both.shape[2], last.shape[2]] * both.shape[0]
        itemsize: int = getattr(torch, self.config.gram_dtype).itemsize
        return max(itemsize * (sum(cols**2 for cols in wide) + max(wide) ** 2) for wide in widths.values())

    def capture(self) -> str:
        """Run what comes before the first block.

        Returns:
            ``"blocks"``, or ``"whole"`` when the model's blocks cannot be driven one by one.  Then :meth:`collect` must
            be called while the model has the weights that are to count.
        """
        with self._running():
            as_tuple = _block_output_format(self.model, self._blocks, self._batches[0].inputs)
            if as_tuple is None:
                self._batches += self._waiting
                self.route = "whole"
                return self.route
            self.route = "blocks"
            first, self._batches = self._batches, []
            with self._collecting(0):
                for batch in chain(first, self._waiting):
                    self._note_batch(batch)
                    hidden, calls = _record_calls(self.model, self._blocks, batch.inputs, as_tuple)
                    self._hidden[len(self._batches)] = hidden
                    self._calls.append(calls)
                    batch.inputs = {}
                    self._batches.append(batch)
        return self.route

    def collect(self) -> None:
        """The whole route: forward passes with hooks on every layer."""
        with self._running(), ExitStack() as stack:
            for number in self.numbers:
                stack.enter_context(self._collecting(number))
            for batch in self._batches:
                self._note_batch(batch)
                self.model(**batch.inputs)
        self._batches = []
        # Said last: a batch that the model cannot take at all has raised its own error by now.
        warnings.warn(
            f"the blocks of {type(self.model).__name__} cannot be run one by one; reading all in whole forward passes",
            CalibrationWarning,
            stacklevel=3,
        )

    def block(self, number: int) -> dict[str, InputStatistics]:
        """Statistics of block ``number``'s layers; blocks must be asked for in rising order, each once."""
        if self.route is None:
            self.capture()
        if self.route == "whole":
            if self._batches:
                self.collect()
        elif number:
            if number < self._next:
                raise ValueError(f"block: {number} has been run already, the next one is {self._next}")
            with self._running():
                while self._next <= number:
                    with self._collecting(self._next):
                        self._run_block(self._next)
                    self._next += 1
        collector = self._collectors.pop(number, None)
        return {} if collector is None else collector.statistics()

    def _run_block(self, number: int) -> None:
        module = self._blocks[number - 1]
        for index, batch in enumerate(self._batches):
            self._note_batch(batch)
            call = self._calls[index][number - 1]
            self._hidden[index] = call.run(module, self._hidden[index])
            self._calls[index][number - 1] = _SPENT
        if number == len(self._blocks):
            self._hidden.clear()
            self._calls = []

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Eval mode and no gradients for one step, the modules' own modes restored after it."""
        modes = [(module, module.training) for module in self.model.modules()]
        with self._context(), torch.no_grad():
            self.model.eval()
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training

    @contextmanager
    def _collecting(self, number: int) -> Iterator[None]:
        """Hooks on the layers of one block."""
        if number not in self._layers:
            yield
            return
        collector = self._collectors[number] = _Collector(
            self._layers[number],
            self.want,
            self.config,
            masked=number > 0,
            experts=self._experts.get(number, {}),
            exchange=self._exchange,
        )
        collector.expected_tokens = self._expected_tokens()
        with collector.hooks():
            yield

    def _note_batch(self, batch: _Batch) -> None:
        for collector in self._collectors.values():
            collector.begin(batch)

    def _expected_tokens(self) -> int | None:
        """Positions that will be counted in all batches; ``None`` where a batch has no mask to tell."""
        counts = [batch.count for batch in self._batches]
        return None if any(count is None for count in counts) else sum(count or 0 for count in counts)

    def _prepared(self, batch: Mapping[str, Any], index: int) -> _Batch:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"{self._label}[{index}]: expected a dictionary of model arguments, got {type(batch).__name__}"
            )
        device = next(self.model.parameters()).device
        inputs = {key: _moved(value, device) for key, value in batch.items() if key != "labels"}
        if hasattr(self.model, "main_input_name") and hasattr(self.model, "config"):
            inputs.setdefault("use_cache", False)  # a cache would keep every block's keys and values alive
        try:
            mask = _token_mask(batch, self.config.token_filter, _image_token(self.model))
        except ValueError as error:
            raise ValueError(f"{self._label}[{index}]: {error}") from None
        if mask is None:
            return _Batch(inputs, None, None)
        mask = mask.to(device)
        return _Batch(
            inputs, None if bool(mask.all()) else mask, int(mask.sum()), mask.shape, int(mask.any(dim=1).sum())
        )


@dataclass
class _Batch:
    """One batch: model arguments, and which of its positions count."""

    inputs: dict[str, Any]
    mask: Tensor | None  # bool [batch, seq]; None: every position
    count: int | None  # counted positions; None: unknown until a layer has seen its input
    shape: torch.Size | None = None  # of the mask
    samples: int | None = None  # samples with a counted position


@dataclass(frozen=True)
class _Call:
    """The arguments of one block in one batch, as the model made them, but for the hidden states."""

    by_name: bool  # whether the hidden states were passed as ``hidden_states=``
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for ``hidden``."""
        if self.by_name:
            output = block(hidden_states=hidden, **self.kwargs)
        else:
            output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


_SPENT = _Call(False, (), {})


class _Captured(Exception):  # noqa: N818 - a signal, not an error
    """All blocks' arguments are recorded; nothing after them needs to run."""


class _NotDrivable(Exception):  # noqa: N818
    """The model does something with its blocks that running them one by one would miss."""


def _record_calls(
    model: nn.Module, blocks: Sequence[nn.Module], inputs: Mapping[str, Any], as_tuple: bool
) -> tuple[Tensor, list[_Call]]:
    """The first block's hidden states and every block's other arguments, for one batch.

    The blocks are stood in for by functions that return their input.

    Raises:
        _NotDrivable: a block is skipped, repeated or called out of order, or its input is not the very tensor that the
            block before it returned.
    """
    calls: list[_Call] = []
    last: tuple[Tensor, int] | None = None  # what the block before returned, and its version

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            hidden = args[0] if args else kwargs.pop("hidden_states", None)
            if index != len(calls) or not isinstance(hidden, Tensor):
                raise _NotDrivable
            if last is not None and (hidden is not last[0] or _version(hidden) != last[1]):
                raise _NotDrivable
            calls.append(_Call(not args, args[1:], kwargs))
            last = (hidden, _version(hidden))
            if index == len(blocks) - 1:
                raise _Captured
            return (hidden,) if as_tuple else hidden

        return forward

    # An instance attribute shadows the class's forward; accelerate and others may have set one already.
    own = [vars(block).get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)
        model(**inputs)
    except _Captured:
        assert last is not None
        return last[0], calls
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
    raise _NotDrivable


def _block_output_format(model: nn.Module, blocks: Sequence[nn.Module], inputs: Mapping[str, Any]) -> bool | None:
    """Whether the model takes a block's output as a tuple; ``None`` when its blocks cannot be driven one by one."""
    for as_tuple in (False, True):
        try:
            _record_calls(model, blocks, inputs, as_tuple)
            return as_tuple
        except Exception:
            # A model that unpacks tuples may fail in any way on a tensor.  A batch that the model cannot take at all
            # fails again, and is reported, in the whole route.
            continue
    return None


class _Collector:
    """Gram matrices (or few activations) of the layers of one block, one for each distinct input."""

    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        want: frozenset[str],
        config: CalibrationConfig,
        *,
        masked: bool,
        experts: Mapping[str, nn.Module],
        exchange: Exchange | None,
    ) -> None:
        self.layers = layers
        self.experts = experts
        self._exchange = exchange
        self.want = want
        self.config = config
        self.expected_tokens: int | None = None
        self._masked = masked  # the projector's inputs are image patches: no text mask applies to them
        self._batch: _Batch | None = None
        self._group: dict[str, str] = {}  # layer -> the first layer that is fed the same tensor
        self._latest: dict[str, tuple[Tensor, int]] = {}  # group -> its latest input and that tensor's version
        self._sums: dict[str, _InputSum] = {}

    def begin(self, batch: _Batch) -> None:
        self._batch = batch
        self._latest.clear()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self.layers.items()
        ]
        handles += [
            module.register_forward_pre_hook(self._experts_hook(name), with_kwargs=True)
            for name, module in self.experts.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._latest.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(name, args[0] if args else kwargs["input"])

        return see

    def _see(self, name: str, x: Tensor) -> None:
        group = self._group.get(name)
        if group is None:
            group = next((key for key, latest in self._latest.items() if _same(x, latest)), name)
            self._group[name] = group
        if group != name:
            if group not in self._latest or not _same(x, self._latest[group]):
                raise RuntimeError(
                    f"layer {name}: was fed the same tensor as {group} at first, and another one now; "
                    "its statistics cannot be shared"
                )
            return
        self._latest[name] = (x, _version(x))
        tokens, samples = self._counted(name, x)
        self._sum_of(name, x).add(tokens, samples)

    def _sum_of(self, name: str, x: Tensor) -> _InputSum:
        if name not in self._sums:
            low_rank = (
                self._exchange is None
                and self.want == {"diagonal"}
                and self.config.diag_mode == "exact"
                and self._masked
                and self.expected_tokens is not None
                and self.expected_tokens < LOW_RANK_BELOW * x.shape[-1]
            )
            wide = torch.float64 if x.dtype == torch.float64 else getattr(torch, self.config.gram_dtype)
            self._sums[name] = _InputSum(x.shape[-1], x.device, wide, low_rank)
        return self._sums[name]

    def _experts_hook(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = (*args, *kwargs.values())
            experts = torch.arange(cast(Any, module).gate_up_proj.shape[0], device=given[0].device)
            if len(given) > 1:
                hidden = given[0].reshape(1, -1, given[0].shape[-1]).expand(len(experts), -1, -1)
                chosen = (given[1].reshape(1, hidden.shape[1], -1) == experts.view(-1, 1, 1)).any(dim=-1)
            else:
                # Llama 4: all tokens once an expert, times the router's weight, which is 0 for the experts not chosen.
                hidden = given[0].reshape(len(experts), -1, given[0].shape[-1])
                chosen = (hidden != 0).any(dim=-1)
            self._see_experts(name, cast(Any, module), hidden, chosen)

        return see

    def _see_experts(self, name: str, module: Any, hidden: Tensor, chosen: Tensor) -> None:
        """Each expert is fed the tokens that the router sends to it; what its last matrix is fed is computed here.

        ``hidden``: all tokens as each expert is fed them, ``[experts, tokens, cols]``; ``chosen``: which of them it
        gets, bool ``[experts, tokens]``.
        """
        assert self._batch is not None
        transposed = experts_transposed(module.gate_up_proj.shape, module.down_proj.shape)
        bias = getattr(module, "gate_up_proj_bias", None)
        if self._batch.mask is not None:
            chosen = chosen & self._batch.mask.reshape(-1).to(hidden.device)
        tokens = hidden.shape[1]
        sequences = self._batch.shape[0] if self._batch.shape is not None else 1
        samples = torch.arange(tokens, device=hidden.device) // max(1, tokens // sequences)
        for expert, (own, mine) in enumerate(zip(hidden, chosen, strict=True)):
            rows = own[mine]
            seen = len(samples[mine].unique())
            self._sum_of(f"{name}.{expert}.in", own).add(rows, seen)
            inner = hidden.new_zeros(0, module.down_proj.shape[1 if transposed else 2])
            if len(rows):
                weight = module.gate_up_proj[expert]
                both = nn.functional.linear(
                    rows, weight.T if transposed else weight, None if bias is None else bias[expert]
                )
                if hasattr(module, "_apply_gate"):
                    inner = module._apply_gate(both)
                else:
                    gate, up = both.chunk(2, dim=-1)
                    inner = module.act_fn(gate) * up
            self._sum_of(f"{name}.{expert}.out", inner).add(inner, seen)

    def _counted(self, name: str, x: Tensor) -> tuple[Tensor, int]:
        """The counted rows of ``x`` as ``[tokens, cols]``, and how many samples they come from."""
        assert self._batch is not None
        batch = self._batch
        if not self._masked or batch.shape is None:
            return x.reshape(-1, x.shape[-1]), x.shape[0] if x.ndim > 1 else 1
        # Some layers see the positions with axes of length one between them, or in one row after the other.
        flattened = x.ndim == 2 and x.shape[0] == batch.shape.numel()
        if not flattened and _without_ones(x.shape[:-1]) != _without_ones(batch.shape):
            raise ValueError(
                f"layer {name}: its input {tuple(x.shape)} does not have one row for each position of the batch "
                f"{tuple(batch.shape)}; tokens cannot be told from padding"
            )
        flat = x.reshape(-1, x.shape[-1])
        return (flat if batch.mask is None else flat[batch.mask.reshape(-1).to(x.device)]), batch.samples or 0

    def statistics(self) -> dict[str, InputStatistics]:
        """One entry a layer; layers of one group share the object.  The sums are freed on the way."""
        if self._exchange is not None:
            return self._exchanged(self._exchange)
        done: dict[str, InputStatistics] = {}
        for name in self.layers:
            group = self._group.get(name, name)
            if group not in done:
                total = self._sums.pop(group, None)
                done[group] = (
                    InputStatistics(input_key=group, zero=True)  # never called: nothing is known of its input
                    if total is None
                    else total.statistics(group, self.want, self.config)
                )
            done[name] = done[group]
        entries = {name: done[name] for name in self.layers}
        for name in list(self._sums):  # what is left are the inputs of experts
            entries[name] = self._sums.pop(name).statistics(name, self.want, self.config)
        return entries

    def _exchanged(self, exchange: Exchange) -> dict[str, InputStatistics]:
        """The same over all processes' samples: each input's sums go to one process, which does the rest."""
        mine = {
            name: (total.tokens, total.samples, total.gram.shape[0], str(total.gram.dtype).removeprefix("torch."))
            for name, total in self._sums.items()
            if total.gram is not None
        }
        told = exchange.gather((dict(self._group), mine))
        group: dict[str, str] = {}
        counts: dict[str, tuple[int, int, int, str]] = {}
        for groups, sums in told:
            group = groups | group
            for name, (tokens, samples, cols, dtype) in sums.items():
                before = counts.get(name, (0, 0, cols, dtype))
                counts[name] = (before[0] + tokens, before[1] + samples, cols, dtype)
        done: dict[str, InputStatistics] = {}
        for index, name in enumerate(sorted(counts)):
            tokens, samples, cols, dtype = counts[name]
            own = self._sums.pop(name, None)
            gram = own.gram if own is not None else None
            if gram is None:
                gram = torch.zeros(cols, cols, dtype=getattr(torch, dtype))
            owner = index % exchange.size
            exchange.sum_to(owner, gram)
            if exchange.rank == owner:
                total = _InputSum(cols, gram.device, gram.dtype, low_rank=False)
                total.gram, total.tokens, total.samples = gram, tokens, samples
                done[name] = total.statistics(name, self.want, self.config)
        done = exchange.merge(done)
        entries = {
            name: done.get(group.get(name, name), InputStatistics(input_key=group.get(name, name), zero=True))
            for name in self.layers
        }
        return entries | {name: seen for name, seen in done.items() if name not in set(group.values())}


class _InputSum:
    """``2 X'X`` of one input, or ``X`` itself while it has fewer rows than pay for a Gram matrix."""

    def __init__(self, cols: int, device: torch.device, dtype: torch.dtype, low_rank: bool) -> None:
        self.tokens = 0
        self.samples = 0
        self.rows: list[Tensor] = []
        self.gram = None if low_rank else torch.zeros(cols, cols, dtype=dtype, device=device)

    def add(self, x: Tensor, samples: int) -> None:
        self.tokens += x.shape[0]
        self.samples += samples
        if not x.shape[0]:
            return
        if self.gram is None:
            self.rows.append(x.clone())
        else:
            # Not a matrix product of torch: under autocast that would come out in bfloat16 and fail to factor.
            hpa_ext.accumulate_gram_(self.gram, x, 2.0)

    def statistics(self, name: str, want: frozenset[str], config: CalibrationConfig) -> InputStatistics:
        count = {"tokens": self.tokens, "samples": self.samples, "none": 1}[config.normalize]
        x = torch.cat(self.rows) if self.rows else None
        if self.gram is not None:
            power = self.gram.diagonal()
        elif x is not None:
            power = x.double().square().sum(dim=0)
        else:
            power = torch.zeros(1)
        if not bool(torch.isfinite(power).all()):
            worst = int((~torch.isfinite(power)).nonzero()[0])
            raise ValueError(f"layer {name}: calibration activations are not finite (first at input feature {worst})")
        zero = not bool(power.any())
        if self.gram is not None:
            self.gram.div_(max(count, 1))
        inverse, info = None, {"damping": 0.0}
        if "diagonal" in want and not zero:
            mode: Literal["exact", "pivot"] = "exact" if config.diag_mode == "exact" else "pivot"
            try:
                if x is not None:
                    inverse = hpa_ext.inverse_diagonal(
                        damping=config.damping, mode=mode, activations=x, scale=2.0 / count, info=info
                    )
                else:
                    inverse = hpa_ext.inverse_diagonal(self.gram, config.damping, mode, info=info)
            except hpa_ext.FactorizationError as error:
                raise hpa_ext.FactorizationError(f"layer {name}: {error}") from error
        return InputStatistics(
            gram=self.gram if "gram" in want else None,
            inverse_diagonal=inverse,
            tokens=self.tokens,
            samples=self.samples,
            input_key=name,
            zero=zero,
            damping=float(info["damping"]),
        )


class HiddenStore(Protocol):
    """What goes from block to block, by the number of its batch: a dictionary, or
    :class:`hpa.checkpoint.hidden_states.HiddenStates`, which holds no more than it may."""

    def __setitem__(self, index: int, tensor: Tensor, /) -> None: ...

    def __getitem__(self, index: int, /) -> Tensor: ...

    def clear(self) -> None: ...


class Exchange(Protocol):
    """What processes that share the samples of a set do with their sums (:mod:`hpa.checkpoint.distributed`)."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks."""

    def sum_to(self, owner: int, gram: Tensor) -> None:
        """Add all processes' matrices in the owner's, in place."""

    def merge(self, parts: dict[str, InputStatistics]) -> dict[str, InputStatistics]:
        """All processes' entries together, at least in process 0."""


def experts_transposed(gate_up: Sequence[int], down: Sequence[int]) -> bool | None:
    """How two tensors hold the matrices of all experts, told by their shapes.

    Args:
        gate_up: shape of the tensor whose matrices make what is gated and what gates it.
        down: shape of the tensor whose matrices come after.

    Returns:
        ``False`` for ``[experts, 2 inner, cols]`` and ``[experts, cols, inner]``, ``True`` for
        ``[experts, cols, 2 inner]`` and ``[experts, inner, cols]``, ``None`` for anything else.
    """
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0] or 0 in (*gate_up, *down):
        return None
    if gate_up[1] == 2 * down[2] and gate_up[2] == down[1]:
        return False
    return True if gate_up[2] == 2 * down[1] and gate_up[1] == down[2] else None


def _fused_experts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold all experts in two tensors, ``gate_up_proj`` and ``down_proj``."""
    for name, module in block.named_modules():
        first, last = (getattr(module, key, None) for key in ("gate_up_proj", "down_proj"))
        if (
            isinstance(first, Tensor)
            and isinstance(last, Tensor)
            and experts_transposed(first.shape, last.shape) is not None
        ):
            yield name, module


def _without_ones(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


def _same(x: Tensor, latest: tuple[Tensor, int]) -> bool:
    """Whether ``x`` holds the values that were seen: the same memory, looked at the same way, not written since."""
    other, version = latest
    if _version(x) != version:
        return False
    return x is other or (
        x.data_ptr() == other.data_ptr()
        and x.shape == other.shape
        and x.stride() == other.stride()
        and x.dtype == other.dtype
        and x.device == other.device
        and x.numel() > 0
    )


def _version(x: Tensor) -> int:
    """The write counter of ``x``; tensors made under inference mode have none."""
    return 0 if x.is_inference() else x._version


def _token_mask(batch: Mapping[str, Any], token_filter: str, image_token: int | None) -> Tensor | None:
    """Counted positions, bool ``[batch, seq]``; ``None`` when the batch has nothing that shows its positions."""
    ids, embeds, attention = batch.get("input_ids"), batch.get("inputs_embeds"), batch.get("attention_mask")
    if attention is not None and attention.ndim != 2:
        raise ValueError(f"attention_mask: expected 2 dimensions [batch, seq], got {tuple(attention.shape)}")
    if attention is not None:
        mask = attention != 0
    elif ids is not None:
        mask = torch.ones(ids.shape, dtype=torch.bool)
    elif embeds is not None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
    else:
        mask = None
    if token_filter == "answer":
        labels = batch.get("labels")
        if labels is None:
            raise ValueError("labels: needed by token_filter='answer', and missing")
        answer = labels != -100
        if mask is not None and answer.shape != mask.shape:
            raise ValueError(f"labels: expected {tuple(mask.shape)} as attention_mask, got {tuple(answer.shape)}")
        mask = answer if mask is None else mask & answer.to(mask.device)
    elif token_filter == "text" and image_token is not None:
        if ids is None:
            raise ValueError("input_ids: needed by token_filter='text' to tell image tokens from text, and missing")
        mask = (ids != image_token) if mask is None else mask & (ids != image_token).to(mask.device)
    return mask


def _image_token(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    for key in ("image_token_id", "image_token_index"):
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    return None


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping) and type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def _resolve(model: nn.Module, name: str) -> nn.Linear:
    try:
        layer = linear_of(model.get_submodule(name))
    except AttributeError:
        layer = None
    if layer is None:
        raise ValueError(f"layers: {type(model).__name__} has no linear layer named '{clean_name(name)}'")
    return layer


def _decoder_blocks(model: nn.Module, path: str | None) -> list[tuple[str, nn.Module]]:
    """Names and modules of the decoder's blocks: of the lists of blocks nearest to the decoder's root, the largest."""
    if path is not None:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"blocks: {type(model).__name__} has no module at '{path}'") from None
        if not isinstance(found, (nn.ModuleList, nn.Sequential)) or not len(found):
            raise ValueError(
                f"blocks: expected a non-empty ModuleList or Sequential at '{path}', got {type(found).__name__}"
            )
        return [(f"{path}.{name}", member) for name, member in found.named_children()]
    get_decoder = getattr(model, "get_decoder", None)
    root = get_decoder() if callable(get_decoder) else model
    root = root if isinstance(root, nn.Module) else model
    prefix = next((name for name, module in model.named_modules() if module is root), "")
    candidates: list[tuple[int, int, str, list[tuple[str, nn.Module]]]] = []
    for name, module in root.named_modules(prefix=prefix):
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            members = [(f"{name}.{child}".lstrip("."), member) for child, member in module.named_children()]
            if all(not isinstance(member, nn.Linear) and _has_linear(member) for _, member in members):
                size = sum(parameter.numel() for parameter in module.parameters())
                candidates.append((name.count("."), -size, name, members))
    if not candidates:
        raise ValueError(
            f"model: found no list of decoder blocks with nn.Linear layers in {type(model).__name__}; "
            "name it with blocks='path.to.the.list'"
        )
    return min(candidates, key=lambda item: item[:3])[3]


def _projectors(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTOR_NAMES:
            yield name, module


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _linears(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers below (or at) ``module``, adapter layers by what they wrap and never by their factors."""
    linear = linear_of(module)
    if linear is not None:
        yield name, linear
    elif not hasattr(module, "base_layer"):
        for child_name, child in module.named_children():
            yield from _linears(child, f"{name}.{child_name}")

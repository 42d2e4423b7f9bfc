"""From one layer to a model: calibrate, edit, write back, one decoder block at a time.

Three doors to one engine:

* :func:`adapt_layer` edits one weight matrix, given the two diagonals;
* :func:`adapt` edits a model after a task, given the model before it (or a peft model, whose base is the model before);
* :func:`edit_model` edits a model that holds the weights before a task, given the task's updates: what a loop over
  tasks calls.

:func:`remember` fills a method's memory with what no task is about.

Calibration always sees unedited weights: the safety set runs through the model before the task and the task set through
the model after it (D10), side by side, and a block's new weights are written once both have passed it.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hpa.calibration import CalibrationStream, LayerSpec, adapters_off, find_layers, linear_of, unwrap
from hpa.config import AdaptConfig, CalibrationConfig, validated
from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate, Number, add_update, clean_name
from hpa.methods import METHODS, Method
from hpa.methods.hpa import adapt_layer
from hpa.safety_set import build_safety_set

__all__ = ["AdaptResult", "adapt", "adapt_layer", "build_safety_set", "edit_model", "remember"]

Batches = Iterable[Mapping[str, Any]]
Aligned = Mapping[str, Tensor] | nn.Module


@dataclass(frozen=True)
class AdaptResult:
    """What :func:`adapt` did.

    Attributes:
        edits: one dictionary a layer: ``name``, ``block``, ``rows``, ``cols`` and the numbers of the edit.
        method: name of the method.
        seconds: wall clock, calibration included.
    """

    edits: list[dict[str, Number]]
    method: str
    seconds: float

    @property
    def skipped(self) -> dict[str, str]:
        """Layers left as the task made them, with the reason."""
        return {str(edit["name"]): str(edit["skipped"]) for edit in self.edits if "skipped" in edit}


def adapt(
    before_model: nn.Module | None,
    after_model: nn.Module,
    *,
    safety: Batches | None,
    task: Batches | None,
    method: str | Method = "hpa",
    config: AdaptConfig | None = None,
    task_index: int = 0,
    seed: int = 0,
    aligned: Aligned | None = None,
    unaligned: Aligned | None = None,
    earlier: Sequence[Aligned] = (),
) -> AdaptResult:
    """Edit ``after_model`` in place, so that it keeps what ``before_model`` was good at.

    With a peft model of LoRA layers nothing is merged: the update is scored exactly from its factors, the ``A`` factors
    are edited, and what the orthogonal adjustment takes out (``proj``) comes off the base weights; so save both, or
    merge.  With ``proj="off"`` the base stays as it is.

    Args:
        before_model: the model before the task; ``None`` if ``after_model`` carries the task in LoRA adapters.
        after_model: the model after the task, changed in place.
        safety: batches of harmful requests with the aligned model's own refusals (:func:`build_safety_set`);
            dictionaries of model arguments, see :func:`hpa.calibration.calibrate`.
        task: batches of the task's training samples.
        method: a name from :data:`hpa.methods.METHODS`, or a method object (which may carry memory from task to task).
        config: options; those of the method too, where it is given by name.
        task_index: 0-based number of the task, for methods that draw.
        seed: for methods that draw.
        aligned: the aligned model, or its weights by layer name, for ``anchor="aligned"`` and methods that read it.
        unaligned: the model before its alignment, for methods that read it.
        earlier: models that other tasks made of ``before_model``, for methods that merge them.

    Raises:
        ValueError: a method that only trains, models that do not match, missing batches, numbers that are not finite.
            Blocks before the one that failed are edited by then: load the model anew.
    """
    start = time.perf_counter()
    config = AdaptConfig() if config is None else config
    if isinstance(method, str):
        method = _method_with(method, config)
    if method.only_trains:
        raise ValueError(f"method: '{method.name}' is a way of training; it does nothing to a model that is trained")
    calibration = _calibration_options(method, config)
    layers = find_layers(after_model, calibration.include_projector, blocks=calibration.blocks)
    models: _Models
    if any(hasattr(module, "base_layer") for module in after_model.modules()):
        models = _AdapterModel(after_model, layers, before_model)
    elif before_model is None:
        raise ValueError("before_model: needed where after_model has no LoRA adapters, got None")
    else:
        models = _TwoModels(before_model, after_model, layers)
    others = _References(method, layers, aligned, unaligned, earlier)
    edits = _edit_blocks(models, method, safety, task, calibration, task_index, seed, others)
    return AdaptResult(edits, method.name, time.perf_counter() - start)


def edit_model(
    model: nn.Module,
    updates: Mapping[str, LowRankUpdate | Tensor],
    method: Method,
    safety_batches: Batches | None,
    task_batches: Batches | None,
    *,
    config: CalibrationConfig | None = None,
    task_index: int = 0,
    seed: int = 0,
    aligned: Aligned | None = None,
    unaligned: Aligned | None = None,
) -> list[dict[str, Number]]:
    """Apply a task's updates to ``model`` as ``method`` lets them through.

    Args:
        model: holds ``W_{t-1}`` (float32 for an exact loop) on entry and the edited weights on return.
        updates: layer name to LoRA factors or dense ``W_t``.  Updates of layers outside the decoder's blocks are
            applied as they are.
        method: edits each layer; its memory, if it has one, takes in this task.
        safety_batches: see :func:`adapt`; may be ``None`` where the method needs none.
        task_batches: likewise.
        config: calibration options, where the method's own options do not say otherwise.
        task_index, seed, aligned, unaligned: see :func:`adapt`.

    Returns:
        One dictionary a layer, JSON-ready: ``name``, ``block``, ``rows``, ``cols`` and the numbers of the edit.

    Raises:
        ValueError: updates that fit no layer, and what :func:`adapt` raises; the model then holds a mixture of weights.
    """
    calibration = _calibration_options(method, config)
    layers = find_layers(model, calibration.include_projector, blocks=calibration.blocks)
    models = _UpdatedModel(model, layers, updates)
    others = _References(method, layers, aligned, unaligned)
    return _edit_blocks(models, method, safety_batches, task_batches, calibration, task_index, seed, others)


def remember(
    model: nn.Module,
    batches: Batches,
    method: Method,
    *,
    weight: float | None = None,
    config: CalibrationConfig | None = None,
) -> None:
    """Show ``method`` what ``model`` can do, before a task is learned or between two, so that no edit disturbs it.

    What the safety set does for refusals and its memory for past tasks, this does for everything else: any prompts with
    the answers that the model itself gives are of use, and a skill whose samples are among them is kept best.

    Args:
        model: as it stands, adapters and all; it is not changed.
        batches: dictionaries of model arguments, see :func:`hpa.calibration.calibrate`.
        method: one with a memory of inputs, such as ``hpa_ls``.
        weight: how much these inputs count, in past tasks; by default as the method's options say.
        config: calibration options, where the method's own options do not say otherwise.

    Raises:
        ValueError: a method without such a memory, no batches, or activations that are not finite.
    """
    calibration = _calibration_options(method, config)
    stream = CalibrationStream(model, batches, want=("gram",), config=calibration, label="batches")
    seen: dict[str, InputStatistics] = {}
    for number in stream.numbers:
        seen |= {entry.input_key: entry for entry in stream.block(number).values()}
    method.remember_inputs(seen, weight=weight)


class _Models(ABC):
    """The weights before and after a task, and where the edited ones go."""

    def __init__(self, layers: list[LayerSpec]) -> None:
        self.layers = layers
        self.numbers = sorted({spec.block for spec in layers})

    def in_block(self, number: int) -> list[LayerSpec]:
        return [spec for spec in self.layers if spec.block == number]

    @abstractmethod
    def model(self, state: str) -> nn.Module:
        """The model that calibration runs for ``before`` or ``after``."""

    def context(self, state: str) -> AbstractContextManager[Any]:
        """Surrounds every forward pass in that state."""
        return nullcontext()

    def learn(self, number: int | None) -> None:
        """Give block ``number`` (``None``: what no edit touches) W_t, if one model holds both."""
        return

    def unlearn(self, number: int) -> None:
        """Give block ``number`` W_{t-1} again."""
        return

    @abstractmethod
    def change(self, spec: LayerSpec) -> tuple[Tensor, LowRankUpdate | Tensor]:
        """``W_{t-1}`` and the update of a layer that :meth:`learn` was called for."""

    @abstractmethod
    def write(self, spec: LayerSpec, edit: LayerEdit) -> None:
        """Store an edited layer."""

    def untouched(self) -> list[dict[str, Number]]:
        """Reports on updates that were applied without an edit."""
        return []


class _UpdatedModel(_Models):
    """One model with ``W_{t-1}``, and updates to bring to it."""

    def __init__(
        self, model: nn.Module, layers: list[LayerSpec], updates: Mapping[str, LowRankUpdate | Tensor]
    ) -> None:
        super().__init__(layers)
        self._model = unwrap(model)
        if any(hasattr(module, "base_layer") for module in self._model.modules()):
            raise ValueError(
                "model: expected a model without adapters, got one with adapter layers; merge or unload them first"
            )
        self._updates: dict[str, LowRankUpdate | Tensor] = {}
        self._linear: dict[str, nn.Linear] = {}
        for key, update in updates.items():
            name = clean_name(key)
            if name in self._updates:
                raise ValueError(f"updates: layer {name} is named twice")
            self._updates[name] = update
        for name in {*self._updates, *(spec.name for spec in layers)}:
            self._linear[name] = _linear(self._model, name, "updates")
        for name, update in self._updates.items():
            # Shapes and dtypes are checked here, before anything is written.
            weight = self._linear[name].weight
            self._updates[name] = LayerChange(name, 1, 1, name, weight, update).update.to(weight.device)
        self._before: dict[str, Tensor] = {}
        inside = {spec.name for spec in layers}
        self._outside = [name for name in self._updates if name not in inside]

    def model(self, state: str) -> nn.Module:
        return self._model

    def learn(self, number: int | None) -> None:
        names = self._outside if number is None else [spec.name for spec in self.in_block(number)]
        for name in names:
            update = self._updates.get(name)
            if update is None or name in self._before:
                continue
            weight = self._linear[name].weight
            with torch.no_grad():
                if number is not None:
                    self._before[name] = weight.detach().clone()
                learned = add_update(weight, update, weight.dtype) if isinstance(update, LowRankUpdate) else update
                weight.copy_(learned)

    def unlearn(self, number: int) -> None:
        for spec in self.in_block(number):
            if spec.name in self._before:
                _store(self._linear[spec.name], self._before.pop(spec.name))

    def change(self, spec: LayerSpec) -> tuple[Tensor, LowRankUpdate | Tensor]:
        weight = self._linear[spec.name].weight.detach()
        before = self._before.get(spec.name, weight)
        return before, self._updates.get(spec.name, LowRankUpdate.zero(before))

    def write(self, spec: LayerSpec, edit: LayerEdit) -> None:
        if spec.name in self._before:
            _store(self._linear[spec.name], edit.weight)
            del self._before[spec.name]

    def untouched(self) -> list[dict[str, Number]]:
        return [
            {
                "name": name,
                "block": -1,
                "rows": self._linear[name].out_features,
                "cols": self._linear[name].in_features,
                "skipped": "outside the decoder blocks",
            }
            for name in self._outside
        ]


class _TwoModels(_Models):
    """A model before and a model after; the edit goes into the latter."""

    def __init__(self, before: nn.Module, after: nn.Module, layers: list[LayerSpec]) -> None:
        super().__init__(layers)
        self._models = {"before": unwrap(before), "after": unwrap(after)}
        if self._models["before"] is self._models["after"]:
            raise ValueError("before_model: is the same object as after_model; keep a copy before training")
        if any(hasattr(module, "base_layer") for module in self._models["before"].modules()):
            raise ValueError("before_model: has adapter layers; merge or unload them first")
        for spec in layers:
            shapes = [
                tuple(_linear(model, spec.name, f"{state}_model").weight.shape) for state, model in self._models.items()
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"before_model: layer {spec.name} is {shapes[0]}, expected {shapes[1]} as in after_model"
                )

    def model(self, state: str) -> nn.Module:
        return self._models[state]

    def change(self, spec: LayerSpec) -> tuple[Tensor, LowRankUpdate | Tensor]:
        before, after = (_linear(model, spec.name, "model").weight.detach() for model in self._models.values())
        return before.to(after.device), after

    def write(self, spec: LayerSpec, edit: LayerEdit) -> None:
        if edit.skipped is None:
            _store(_linear(self._models["after"], spec.name, "after_model"), edit.weight)


class _AdapterModel(_Models):
    """A model whose update lives in LoRA adapters: with them it is the model after the task, without them before."""

    def __init__(self, after: nn.Module, layers: list[LayerSpec], before: nn.Module | None) -> None:
        super().__init__(layers)
        self._model = unwrap(after)
        other = None if before is None else unwrap(before)
        self._adapters: dict[str, Any] = {}
        for spec in layers:
            module = self._model.get_submodule(spec.name)
            if _has_lora(module, spec.name):
                self._adapters[spec.name] = module
            if other is not None and other is not self._model:
                base, given = self._linear(spec).weight, _linear(other, spec.name, "before_model").weight
                if base.shape != given.shape or not torch.equal(base, given.to(base)):
                    raise ValueError(
                        f"before_model: layer {spec.name} differs from the base that after_model's adapter stands on; "
                        "pass before_model=None to edit against that base, or merge the adapter"
                    )

    def model(self, state: str) -> nn.Module:
        return self._model

    def context(self, state: str) -> AbstractContextManager[Any]:
        return adapters_off(self._model) if state == "before" else nullcontext()

    def change(self, spec: LayerSpec) -> tuple[Tensor, LowRankUpdate | Tensor]:
        before = self._linear(spec).weight.detach()
        module = self._adapters.get(spec.name)
        if module is None:
            return before, LowRankUpdate.zero(before)
        adapter = module.active_adapters[0]
        factor_a, factor_b = (factors[adapter].weight.detach() for factors in (module.lora_A, module.lora_B))
        return before, LowRankUpdate(factor_a, factor_b, float(module.scaling[adapter]))

    def write(self, spec: LayerSpec, edit: LayerEdit) -> None:
        if edit.skipped is not None or spec.name not in self._adapters:
            return
        module = self._adapters[spec.name]
        adapter = module.active_adapters[0]
        with torch.no_grad():
            factors = module.lora_A[adapter].weight
            if edit.update is None or edit.base is None or edit.update.A.shape != factors.shape:
                # No update of this rank: it goes into the base, and the adapter has nothing to add.
                module.lora_B[adapter].weight.zero_()
                self._linear(spec).weight.copy_(edit.weight)
                return
            factors.copy_(edit.update.A)
            module.lora_B[adapter].weight.copy_(edit.update.B * (edit.update.scale / module.scaling[adapter]))
            self._linear(spec).weight.copy_(edit.base)

    def _linear(self, spec: LayerSpec) -> nn.Linear:
        return _linear(self._model, spec.name, "after_model")


@dataclass
class _Side:
    """One calibration set on its way through the model."""

    state: str  # whose weights it sees: before, after or edited
    stream: CalibrationStream


def _edit_blocks(
    models: _Models,
    method: Method,
    safety: Batches | None,
    task: Batches | None,
    config: CalibrationConfig,
    task_index: int,
    seed: int,
    references: _References,
) -> list[dict[str, Number]]:
    """The engine: calibration and edit, block by block."""
    sides = _sides(models, method, safety, task, config)
    edited = sides.pop("edited", None)
    _capture(models, list(sides.values()))

    reports: list[dict[str, Number]] = []
    for number in models.numbers:
        statistics = {name: side.stream.block(number) for name, side in sides.items() if side.state == "before"}
        models.learn(number)
        statistics |= {name: side.stream.block(number) for name, side in sides.items() if side.state == "after"}
        if edited is not None and number and edited.stream.route is None:
            # Before the first block is edited and after the projector is: what comes before the blocks is final.
            edited.stream.capture()
        for spec in models.in_block(number):
            seen = {name: found[spec.name] for name, found in statistics.items()}
            original, update = models.change(spec)
            change = LayerChange(
                spec.name,
                spec.block,
                spec.blocks,
                next((seen[name].input_key for name in ("task", "safety") if name in seen), spec.name),
                original,
                update,
                references.aligned.get(spec.name),
                unaligned=references.unaligned.get(spec.name),
                earlier=tuple(weights[spec.name] for weights in references.earlier),
            )
            edit = method.edit_layer(change, seen.get("safety"), seen.get("task"), task_index=task_index, seed=seed)
            reports.append(
                {"name": spec.name, "block": spec.block, "rows": change.rows, "cols": change.cols, **edit.numbers}
            )
            models.write(spec, edit)
        if edited is not None and number and edited.stream.route == "blocks":
            _observe(method, edited.stream.block(number))
    if edited is not None and edited.stream.route == "whole":
        edited.stream.collect()
        for number in models.numbers:
            _observe(method, edited.stream.block(number))
    elif edited is not None and 0 in models.numbers:
        _observe(method, edited.stream.block(0))
    method.finish_task()
    return reports + models.untouched()


def _capture(models: _Models, sides: list[_Side]) -> None:
    """Bring every set to the first block, each through the weights it is to see; the blocks end as they began."""
    for side in sides:
        if side.state == "before" and side.stream.capture() == "whole":
            side.stream.collect()
    models.learn(None)
    models.learn(0)
    whole = [side for side in sides if side.state == "after" and side.stream.capture() == "whole"]
    if whole:
        for number in models.numbers:
            models.learn(number)
        for side in whole:
            side.stream.collect()
        for number in models.numbers:
            if number:  # block 0 keeps what the captures have seen
                models.unlearn(number)


def _sides(
    models: _Models, method: Method, safety: Batches | None, task: Batches | None, config: CalibrationConfig
) -> dict[str, _Side]:
    """The calibration streams that the method needs."""
    batches = {"safety": safety, "task": task}
    if "edited_gram" in method.needs and task is not None:
        batches["task"] = batches["edited"] = list(task)
    sides: dict[str, _Side] = {}
    for name in ("safety", "task", "edited"):
        want = {kind for kind in ("diagonal", "gram") if f"{name}_{kind}" in method.needs}
        if not want:
            continue
        given = batches.get(name)
        if given is None:
            raise ValueError(f"{name}: method '{method.name}' needs calibration batches, got None")
        state = "edited" if name == "edited" else getattr(config.hessian_source, name)
        sides[name] = _Side(
            state,
            CalibrationStream(
                models.model("before" if state == "before" else "after"),
                given,
                models.layers,
                want=want,
                config=config,
                context=_bound(models, state),
                label=name,
            ),
        )
    return sides


def _bound(models: _Models, state: str) -> Any:
    return lambda: models.context(state)


def _observe(method: Method, statistics: Mapping[str, InputStatistics]) -> None:
    method.observe_edited({seen.input_key: seen for seen in statistics.values()})


def _calibration_options(method: Method, config: CalibrationConfig | None) -> CalibrationConfig:
    """``config``, overridden by what the method's own options set in so many words."""
    own = method.calibration
    if config is None:
        return CalibrationConfig() if own is None else own
    if own is None:
        return config
    said = own.model_fields_set & set(CalibrationConfig.model_fields)
    return config.model_copy(update={name: getattr(own, name) for name in said})


def _method_with(name: str, config: AdaptConfig) -> Method:
    """The method called ``name``, with those of ``config``'s options that it has."""
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    fields = config.model_fields_set & set(METHODS[name].Config.model_fields)
    options = {field: getattr(config, field) for field in fields}
    return METHODS[name](validated(METHODS[name].Config, options, f"method '{name}'"))


class _References:
    """Weights of other models that the method reads, by layer."""

    def __init__(
        self,
        method: Method,
        layers: list[LayerSpec],
        aligned: Aligned | None,
        unaligned: Aligned | None,
        earlier: Sequence[Aligned] = (),
    ) -> None:
        given = {"aligned": aligned, "unaligned": unaligned}
        found: dict[str, dict[str, Tensor]] = {"aligned": {}, "unaligned": {}}
        for name in sorted(method.references):
            model = given[name]
            if model is None:
                anchored = getattr(method.config, "anchor", "prev") == "aligned"
                reader = "with anchor='aligned'" if anchored else f"by method '{method.name}'"
                raise ValueError(f"{name}: needed {reader}, got None")
            found[name] = _weights_of(model, layers, name)
        self.aligned, self.unaligned = found["aligned"], found["unaligned"]
        if earlier and not method.merges_earlier:
            raise ValueError(f"earlier: method '{method.name}' as set merges no models of other tasks, got some")
        self.earlier = [_weights_of(model, layers, "earlier") for model in earlier]


def _weights_of(given: Aligned, layers: list[LayerSpec], argument: str) -> dict[str, Tensor]:
    if isinstance(given, nn.Module):
        model = unwrap(given)
        return {spec.name: _linear(model, spec.name, argument).weight.detach() for spec in layers}
    weights = {clean_name(name): weight for name, weight in given.items()}
    missing = [spec.name for spec in layers if spec.name not in weights]
    if missing:
        raise ValueError(f"{argument}: no weight for {len(missing)} layers, the first is {missing[0]}")
    return {spec.name: weights[spec.name] for spec in layers}


def _linear(model: nn.Module, name: str, argument: str) -> nn.Linear:
    try:
        layer = linear_of(model.get_submodule(name))
    except AttributeError:
        layer = None
    if layer is None:
        raise ValueError(f"{argument}: {type(model).__name__} has no linear layer named '{name}'")
    return layer


def _store(layer: nn.Linear, weight: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)


def _has_lora(module: Any, name: str) -> bool:
    """Whether ``module`` is a LoRA layer whose update is exactly ``scale * B A``.

    Raises:
        ValueError: an adapter that is something else, merged, disabled or stacked.
    """
    if not hasattr(module, "base_layer"):
        return False
    where = f"after_model: layer {name}"
    if not hasattr(module, "lora_A") or not isinstance(module.base_layer, nn.Linear):
        raise ValueError(f"{where} has an adapter that is not LoRA on nn.Linear; merge it and pass both models")
    if module.merged:
        raise ValueError(f"{where} has a merged adapter; unmerge it, or pass both models without adapters")
    if module.disable_adapters:
        raise ValueError(f"{where} has its adapters disabled; enable the task's adapter")
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if len(active) > 1 or (active and active != list(module.active_adapters)):
        raise ValueError(f"{where} has adapters {list(module.active_adapters)} active, expected one")
    if active and active[0] in getattr(module, "lora_variant", {}):
        raise ValueError(
            f"{where} uses a LoRA variant (DoRA, ...) whose update is not B A; merge it and pass both models"
        )
    return bool(active)


class _CallableModule(ModuleType):
    """``hpa.adapt`` is this module and, called, its main function."""

    def __call__(self, *args: Any, **kwargs: Any) -> AdaptResult:
        return adapt(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

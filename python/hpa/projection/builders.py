"""Where protected directions come from: gradients, layer inputs, weights, earlier LoRA factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpa.gram import whole
from hpa.layers import InputStatistics, LowRankUpdate, clean_name
from hpa.projection.apply import is_sharded
from hpa.projection.basis import Basis, Growth, Parameters, _is_count, named_parameters

__all__ = [
    "answer_logit",
    "answer_loss",
    "gather",
    "gradient_basis",
    "grow_from_grams",
    "input_basis",
    "lora_basis",
    "weight_basis",
]

TOGETHER = 16
"""Gradients that are taken into a basis at once: each time the basis is read, and copied, as a whole."""

Objective = Callable[[nn.Module, Mapping[str, Any]], Tensor]
Side = Literal["input", "output"]


def gradient_basis(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    objective: Objective | None = None,
    basis: Basis | None = None,
    energy: float | None = None,
    capacity: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Basis:
    """Gradients of old samples: a step in their complement leaves ``objective`` on them as it is, to first order (OGD).

    Args:
        model: its trainable parameters are meant; run in eval mode, and left as it was found.
        batches: one gradient each; a batch of one sample gives that sample's.
        objective: :func:`answer_logit` by default (OGD's ground-truth logit); :func:`answer_loss` for safety samples;
            or any function of the model and a batch to a number.
        basis: grows; by default a new one with space ``joint``.
        energy: see :meth:`Basis.add`; with it all gradients are held in memory at once.
        capacity, dtype: of the new basis.

    Gradients of ``DTensor`` parameters are gathered: every process takes part, with the same batches, and gets the
    whole basis.
    """
    chosen = answer_logit if objective is None else objective
    named = {name: value for name, value in named_parameters(model).items() if isinstance(value, Tensor)}
    if basis is None:
        basis = Basis(named, "joint", capacity=capacity, dtype=dtype).to(next(iter(named.values())).device)
    elif basis.space not in ("joint", "parameter"):
        raise ValueError(f"basis: expected space joint or parameter, got {basis.space!r}")
    members = [name for name in basis.members if name in named]
    if not members:
        raise ValueError("basis: none of its parameters are trainable in this model")
    was_training = model.training
    collected: list[dict[str, Tensor | None]] = []
    model.eval()
    try:
        for batch in batches:
            with torch.enable_grad():
                found = _gradients(chosen(model, batch), [named[name] for name in members])
            gradients = {name: _whole(gradient) for name, gradient in zip(members, found, strict=True)}
            if all(gradient is None for gradient in gradients.values()):
                raise ValueError("objective: its gradient reaches none of the basis's parameters")
            collected.append(gradients)
            if energy is None and len(collected) == TOGETHER:
                basis.add(collected)
                collected = []
    finally:
        model.train(was_training)
    if collected:
        basis.add(collected, energy=energy)
    return basis


def answer_logit(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The logit of the right token, averaged over the answer's positions (labels other than -100)."""
    labels = batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    targets = labels[:, 1:].to(logits.device)
    answers = targets != -100
    if not bool(answers.any()):
        raise ValueError("batches: a batch has no answer (all labels are -100)")
    return logits[answers].float().gather(1, targets[answers].unsqueeze(1)).mean()


def answer_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss: mean cross-entropy over the answer's positions."""
    loss: Tensor = model(**batch).loss
    return loss


def input_basis(
    parameters: Parameters,
    statistics: Mapping[str, InputStatistics],
    *,
    energy: float = 0.97,
    basis: Basis | None = None,
    capacity: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Basis:
    """What layers were fed by old samples (GPM): a step in its complement leaves their outputs exactly as they are.

    Directions are eigenvectors of the Gram matrices that calibration makes, as few as hold the share ``energy`` of the
    squared length of the inputs, counting what the basis holds already (GPM's rule for later tasks).

    Args:
        parameters: a module or named parameters.  A layer's ``weight`` is protected where it is among them, else its
            LoRA ``A`` factors.  For these the factors must lie in the complement from the start
            (``basis.project_({name: factor})`` on fresh ones): B is free, so whatever of A is in the span leaks.
        statistics: layer name to its input's statistics with a Gram matrix, as
            ``hpa.calibrate(model, batches, want=("gram",))`` yields them beside each block's number; all blocks
            together.
        energy: share of the squared length, in (0, 1); GPM's 0.97.
        basis: grows; by default a new one.

    Raises:
        TypeError: batches, or what else is no mapping of statistics.
        CapacityError: the inputs fill the whole space to that share (a smaller ``energy`` leaves room to learn).
    """
    given: Any = statistics
    if not isinstance(given, Mapping):
        raise TypeError(
            "statistics: expected a mapping of layer names to statistics, of which hpa.calibrate(model, batches, "
            f"want=('gram',)) yields one for each block, after its number, got {type(given).__name__}"
        )
    if not 0.0 < energy < 1.0:
        raise ValueError(f"energy: expected a share in (0, 1), got {energy}")
    named = named_parameters(parameters)
    targets = {layer: found for layer in statistics for found in [_targets(named, layer, "input")] if found}
    if not targets:
        raise ValueError("statistics: none of their layers has a parameter among those given")
    keys = {layer: statistics[layer].input_key or layer for layer in targets}
    if basis is None:
        members = {name: value for found in targets.values() for name, value in found.items()}
        groups = {name: keys[layer] for layer, found in targets.items() for name in found}
        basis = Basis(members, "input", groups=groups, capacity=capacity, dtype=dtype)
    elif basis.space != "input":
        raise ValueError(f"basis: expected space input, got {basis.space!r}")
    grams: dict[str, Tensor] = {}
    for layer, found in targets.items():
        key = basis.members[next(iter(found))].key
        if key not in grams and not statistics[layer].zero:
            grams[key] = _gram_of(layer, statistics[layer])
    grow_from_grams(basis, grams, energy=energy)
    return basis


def grow_from_grams(basis: Basis, grams: Mapping[str, Tensor], *, energy: float) -> Growth:
    """Add leading eigenvectors of Gram matrices ``[n, n]`` (whole or lower triangle) by GPM's rule.

    ``energy`` counts ``trace(M' G M)``, what the basis has captured, plus the eigenvalues of what is left,
    ``(I - M M') G (I - M M')``.
    """
    roots: dict[str, Tensor] = {}
    for key, gram in grams.items():
        full = whole(gram.double().tril())
        if not bool(torch.isfinite(full).all()):
            raise ValueError(f"grams: {key} holds NaN or Inf")
        values, turns = torch.linalg.eigh(full)
        # Rows whose Gram matrix this is: the rule then reads them like any other vectors.
        values = values.clamp_min(0.0)
        some = values > values.max() * 1e-14
        roots[key] = (turns[:, some] * values[some].sqrt()).T.float()
    return basis.add(roots, energy=energy)


def weight_basis(
    model: nn.Module,
    layers: Iterable[str],
    rank: int,
    *,
    side: Side = "input",
    parameters: Parameters | None = None,
    dtype: torch.dtype = torch.float32,
) -> Basis:
    """The weights' own leading singular vectors: HPA's orthogonal adjustment as a subspace instead of one direction.

    Args:
        model: holds the weights to protect.
        layers: names of linear layers.
        rank: singular vectors of each.
        side: ``"input"``: right ones (``G -= (G V) V'``); ``"output"``: left ones (``G -= U (U' G)``).
        parameters: what is trained; by default the model's trainable parameters: the layer's weight, or its LoRA ``A``
            (input) and ``B`` (output).
    """
    if not _is_count(rank):
        raise ValueError(f"rank: expected a positive number, got {rank!r}")
    trained = named_parameters(model if parameters is None else parameters)
    members: dict[str, Tensor] = {}
    groups: dict[str, str] = {}
    vectors: dict[str, Tensor] = {}
    for layer in layers:
        found = _targets(trained, layer, side)
        if not found:
            raise ValueError(f"layers: {layer} has no trainable parameter")
        weight = _layer_weight(model, layer)
        if rank >= weight.shape[1 if side == "input" else 0]:
            raise ValueError(f"rank: expected less than the dimension of {layer} {tuple(weight.shape)}, got {rank}")
        # Of the smaller Gram matrix, in float64: a full decomposition would take most of its time for what is dropped.
        wide = weight.detach().double()
        left = wide if side == "output" else wide.T
        values, turns = torch.linalg.eigh(left @ left.T)
        members |= found
        groups |= dict.fromkeys(found, layer)
        vectors[layer] = (turns[:, -rank:].flip(1) * values[-rank:].flip(0).clamp_min(1e-30).sqrt()).T
    basis = Basis(members, side, groups=groups, dtype=dtype)
    basis.add(vectors)
    return basis


def lora_basis(
    parameters: Parameters,
    earlier: Iterable[Mapping[str, LowRankUpdate | Tensor]],
    *,
    basis: Basis | None = None,
    capacity: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Basis:
    """The spans of earlier tasks' ``A`` factors (O-LoRA's subspaces): what earlier adapters read from a layer's input.

    Args:
        parameters: the new adapter's, or the model.
        earlier: of each earlier task, layer name to its update in factors (or ``A [rank, cols]`` itself).
        basis: grows; by default a new one with space ``input``.
    """
    stacked: dict[str, list[Tensor]] = {}
    for updates in earlier:
        for layer, update in updates.items():
            stacked.setdefault(layer, []).append(update.A if isinstance(update, LowRankUpdate) else update)
    if not stacked:
        raise ValueError("earlier: expected at least one update, got none")
    named = named_parameters(parameters)
    members: dict[str, Tensor] = {}
    groups: dict[str, str] = {}
    for layer in stacked:
        found = _targets(named, layer, "input")
        if not found:
            raise ValueError(f"earlier: layer {layer} has no parameter among those given")
        members |= found
        groups |= dict.fromkeys(found, layer)
    if basis is None:
        basis = Basis(members, "input", groups=groups, capacity=capacity, dtype=dtype)
    names = {layer: next(name for name in members if groups[name] == layer) for layer in stacked}
    basis.add({names[layer]: torch.cat([part.float() for part in parts]) for layer, parts in stacked.items()})
    return basis


def gather(basis: Basis, group: Any = None) -> Basis:
    """One basis of what every process has built, merged in the order of the processes: the same in all of them.

    Made anew; ``basis`` stays as it is.  Every process of ``group`` calls it.
    """
    distributed = torch.distributed
    world = distributed.get_world_size(group)
    merged: Basis | None = None
    for rank in range(world):
        source = distributed.get_global_rank(group, rank) if group is not None else rank
        mine = distributed.get_rank(group) == rank
        told: list[Any] = [basis.description() if mine else None, basis.ranks if mine else None]
        distributed.broadcast_object_list(told, src=source, group=group)
        tensors: dict[str, Tensor] = {}
        for key, count in told[1].items():
            own = basis.vectors(key)
            vectors = own.contiguous() if mine else own.new_empty(count, own.shape[1])
            energy = basis.energies(key) if mine else torch.empty(count, dtype=torch.float64)
            energy = energy.to(own.device)
            distributed.broadcast(vectors, src=source, group=group)
            distributed.broadcast(energy, src=source, group=group)
            tensors[f"vectors/{key}"], tensors[f"energy/{key}"] = vectors, energy.cpu()
        part = Basis.restore(told[0], tensors, where=f"process {rank}")
        if merged is None:
            merged = part
        else:
            merged.merge(part)
    assert merged is not None
    merged._bound = dict(basis._bound)
    return merged


def _targets(named: Mapping[str, Any], layer: str, side: Side) -> dict[str, Any]:
    """The parameters by which a layer's inputs (or outputs) are changed: its weight, or LoRA factors on that side."""
    wanted = clean_name(layer)
    factor = "lora_A" if side == "input" else "lora_B"
    found: dict[str, Any] = {}
    for name, value in named.items():
        path = name.split(".")
        if factor in path:
            where = path.index(factor)
            if clean_name(".".join(path[:where])) == wanted:
                found[name] = value
        elif path[-1] == "weight" and clean_name(".".join(path[:-1])) == wanted:
            found[name] = value
    return found


def _layer_weight(model: nn.Module, layer: str) -> Tensor:
    wanted = clean_name(layer)
    for name, value in model.named_parameters():
        if name.endswith(".weight") and "lora_" not in name and clean_name(name) == wanted and value.ndim == 2:
            return value
    raise ValueError(f"layers: {layer} has no weight [rows, cols] in this model")


def _gram_of(layer: str, statistics: InputStatistics) -> Tensor:
    gram = statistics.gram
    if gram is None and statistics.triangle is not None:
        gram = statistics.triangle.lower()
    if gram is None:
        raise ValueError(f'statistics: layer {layer} has no Gram matrix; calibrate with want=("gram",)')
    return gram


def _gradients(value: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    if not any(is_sharded(parameter) for parameter in parameters):
        return list(torch.autograd.grad(value, parameters, allow_unused=True))
    # FSDP2 computes with gathered copies: only a backward pass brings gradients to the shards.
    kept = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        value.backward()
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


def _whole(gradient: Tensor | None) -> Tensor | None:
    if gradient is not None and hasattr(gradient, "full_tensor"):
        whole_gradient: Tensor = gradient.full_tensor()
        return whole_gradient
    return gradient

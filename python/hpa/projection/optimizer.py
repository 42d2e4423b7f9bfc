"""One line in any training loop: what an optimizer does is kept out of a protected space.

    >>> projection = hpa.project_optimizer(optimizer, basis)

The optimizer's step is hooked, not the parameters: hooks on parameters see gradients before they are reduced, clipped
or unscaled, and under FSDP2 never fire.  A second hook sees the steps of *all* optimizers and raises where a protected
parameter was stepped without the projection: by an old optimizer, or after somebody removed the hook.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from hpa.projection.apply import ShardedBasis, is_sharded, local_part, project_plain
from hpa.projection.basis import Basis, Parameters, named_parameters, parameter_name

__all__ = ["Projection", "ProjectionError", "project_optimizer"]

What = Literal["gradient", "update"]


class ProjectionError(RuntimeError):
    """A step went by that the projection had no part in, or one that it cannot make right (NaN)."""


def project_optimizer(
    optimizer: Optimizer,
    basis: Basis | Sequence[Basis],
    what: What = "gradient",
    *,
    parameters: Parameters | None = None,
) -> Projection:
    """From now on every step of ``optimizer`` stays out of the space that ``basis`` protects.

    Args:
        optimizer: any ``torch.optim.Optimizer``, also one that accelerate has wrapped.
        basis: what is protected; several, where they have no parameter in common.
        what: ``"gradient"`` projects gradients before the step, after clipping and unscaling (OGD, GPM as published).
            Exact for SGD without weight decay only: Adam's scaling and weight decay turn the step out of the complement
            again.  ``"update"`` projects the step itself, for a copy of the protected parameters.
        parameters: the model, or named parameters, to find the basis's names with.  By default the parameters that the
            basis was made for, else the names that the optimizer knows (``Adam(model.named_parameters())``).

    Returns:
        the :class:`Projection`; it holds until :meth:`Projection.remove`, or until another optimizer of the same
        parameters gets one.

    Raises:
        TypeError: an optimizer that cannot be hooked (DeepSpeed's, FSDP1's flat parameters).
        ValueError: parameters that the optimizer does not step, or of another size than the basis was made for.
        ProjectionError: processes that hold different bases.

    In a distributed run every process calls it.  Of ``DTensor`` parameters (FSDP2) only the local part of the basis is
    kept, and a step costs one reduction of all coefficients.
    """
    if what not in get_args(What):
        raise ValueError(f"what: expected one of {', '.join(get_args(What))}, got {what!r}")
    inner = _unwrap(optimizer)
    given: Any = basis
    bases = [given] if isinstance(given, Basis) else list(given) if isinstance(given, Sequence) else []
    if not bases or not all(isinstance(one, Basis) for one in bases):
        raise TypeError(f"basis: expected a Basis or several, got {type(basis).__name__}")
    return Projection(inner, bases, what, parameters)


class Projection:
    """A projection at work; made by :func:`project_optimizer`.

    Attributes:
        calls: steps that were projected.
        skipped: steps that a loss scaler skipped because gradients overflowed.
        seconds: time spent in projecting, over all steps.
        what: ``"gradient"`` or ``"update"``.
    """

    def __init__(
        self, optimizer: Optimizer, bases: Sequence[Basis], what: What, parameters: Parameters | None = None
    ) -> None:
        self.what = what
        self.calls = 0
        self.skipped = 0
        self.seconds = 0.0
        self._optimizer = weakref.ref(optimizer)
        self._ran = False
        self._why: str | None = None
        self._copies: dict[str, Tensor] | None = None
        self._kept: dict[str, Tensor] = {}
        self._rooms: dict[torch.dtype, Tensor] = {}
        found = _match(optimizer, bases, parameters)
        self._parameters = {name: weakref.ref(parameter) for name, parameter in found.items()}
        self._ids = {id(parameter) for parameter in found.values()}
        _check_same_everywhere(bases)
        self._parts: list[tuple[list[str], Basis | ShardedBasis]] = []
        for basis in bases:
            mine = {name: found[name] for name in basis.members if name in found}
            if any(is_sharded(parameter) for parameter in mine.values()):
                self._parts.append((list(mine), ShardedBasis(basis, mine)))
            else:
                devices = {parameter.device for parameter in mine.values()}
                self._parts.append((list(mine), basis.to(devices.pop()) if len(devices) == 1 else basis))
        _supersede(self._ids, optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._timed(self._before))),
            optimizer.register_step_post_hook(torch.compiler.disable(self._timed(self._after))),
        ]
        _watch(self)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, if it still lives."""
        return self._optimizer()

    @property
    def names(self) -> list[str]:
        """The parameters that are protected."""
        return list(self._parameters)

    @property
    def nbytes(self) -> int:
        """Memory of the basis in this process."""
        return sum(basis.nbytes for _, basis in self._parts)

    def remove(self) -> None:
        """Let the optimizer step freely again.  A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._kept.clear()
        self._rooms.clear()
        _unwatch(self)

    def check(self, steps: int | None = None) -> None:
        """Raises :class:`ProjectionError` unless the projection is in force and, if given, made ``steps`` steps.

        What no hook can see by itself: steps of something that is no ``torch.optim.Optimizer``.
        """
        if self not in _WATCHED:
            raise ProjectionError(f"the projection is not in force: {self._why or 'it was removed'}")
        optimizer = self.optimizer
        if optimizer is None:
            raise ProjectionError("the projected optimizer is gone; project the one that took its place")
        before, after = self._handles
        if before.id not in optimizer._optimizer_step_pre_hooks or after.id not in optimizer._optimizer_step_post_hooks:
            raise ProjectionError("the projection's hook was removed from the optimizer")
        done = self.calls + self.skipped
        if steps is not None and done != steps:
            raise ProjectionError(f"expected {steps} projected steps, counted {done}")

    def __enter__(self) -> Projection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.check()
        finally:
            self.remove()

    def __repr__(self) -> str:
        return f"Projection({self.what!r}, {len(self._parameters)} parameters, {self.calls} calls)"

    # ------------------------------------------------------------------------------------------------ the hooks

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return hook(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return timed

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._ran = self.what == "gradient"  # an update is projected after the step
        # The optimizer itself comes first in args.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self.what == "update":
            self._copies = {name: self._copy(name, local_part(parameter)) for name, parameter in self._alive().items()}
        elif closure is None:
            self._project_gradients(optimizer)
        else:
            # The gradients are made inside of the step: as often as the optimizer asks, they are projected.
            def projected() -> Any:
                loss = closure()
                with torch.no_grad():
                    self._project_gradients(optimizer, count=False)
                return loss

            self.calls += 1
            if "closure" in kwargs:
                return args, {**kwargs, "closure": projected}
            return (args[0], projected, *args[2:]), kwargs
        return None

    def _copy(self, name: str, part: Tensor) -> Tensor:
        """A copy; on the CPU in the memory of the step before, for a fresh page costs more than to fill it."""
        if part.device.type != "cpu":
            return part.clone()
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.stride(), kept.dtype) != (part.shape, part.stride(), part.dtype):
            kept = self._kept[name] = part.clone()
            return kept
        return kept.copy_(part)

    def _room(self, like: Tensor) -> Tensor | None:
        """Memory for one change, likewise used again."""
        if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
            return None
        held = self._rooms.get(like.dtype)
        if held is None or held.numel() < like.numel():
            held = self._rooms[like.dtype] = torch.empty(like.numel(), dtype=like.dtype)
        return held[: like.numel()].view(like.shape)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args, kwargs
        if self.what != "update" or self._copies is None:
            return
        self._ran = True
        copies, self._copies = self._copies, None
        if _overflowed(optimizer):
            self.skipped += 1
            return
        alive = self._alive()
        parameters = {name: local_part(parameter) for name, parameter in alive.items()}
        # A parameter without a gradient is not stepped; the projection must not move it for the others.
        stepped = {name for name, parameter in alive.items() if parameter.grad is not None}
        bad = ""
        with torch.no_grad():
            for names, basis in self._parts:
                mine = [name for name in names if name in stepped]
                # One after the other, where nothing is summed over them: a change is still in the cache when it is put
                # back, and only one of them is in memory.
                alone = isinstance(basis, Basis) and basis.space != "joint"
                for group in [[name] for name in mine] if alone else [mine]:
                    changes = {
                        name: _difference(parameters[name], copies[name], self._room(copies[name]) if alone else None)
                        for name in group
                    }
                    if not self._project(basis, changes):
                        bad = bad or _where(changes) or f" in {group[0]}"
                        continue  # with the others: all processes have to come to the same sums
                    for name, change in changes.items():
                        _put(copies[name], change, parameters[name])
            if bad:
                for name, parameter in parameters.items():
                    parameter.copy_(copies[name])
                raise ProjectionError(
                    f"the update of step {self.calls + 1} holds NaN or Inf{bad}; "
                    "the parameters are as they were before it"
                )
        self.calls += 1

    def _project_gradients(self, optimizer: Optimizer, *, count: bool = True) -> None:
        if _overflowed(optimizer):
            self.skipped += count
            return
        gradients: dict[str, Tensor] = {}
        for name, parameter in self._alive().items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided:
                raise TypeError(f"{name}: expected a dense gradient, got layout {gradient.layout}")
            gradients[name] = local_part(gradient)
        if not self._apply(gradients):
            raise ProjectionError(
                f"the gradient of step {self.calls + 1} holds NaN or Inf{_where(gradients)}; no step was made"
            )
        self.calls += count

    def _apply(self, tensors: Mapping[str, Tensor]) -> bool:
        """Project in place; ``False`` where something is not finite."""
        good = True
        for names, basis in self._parts:
            good &= self._project(basis, {name: tensors[name] for name in names if name in tensors})
        return good

    @staticmethod
    def _project(basis: Basis | ShardedBasis, tensors: Mapping[str, Tensor]) -> bool:
        if isinstance(basis, ShardedBasis):
            return basis.project_(tensors)
        if not _finite(tensors.values()):
            return False
        project_plain(basis, tensors)
        return True

    def _alive(self) -> dict[str, Tensor]:
        found = {name: parameter() for name, parameter in self._parameters.items()}
        gone = [name for name, parameter in found.items() if parameter is None]
        if gone:
            raise ProjectionError(
                f"{gone[0]} (and {len(gone) - 1} more): the parameter is gone; the model was rebuilt or wrapped after "
                "project_optimizer, which comes last"
            )
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    # ------------------------------------------------------------------------------------------------ the watch

    def _stepped_by(self, optimizer: Optimizer) -> None:
        """Some optimizer has made a step."""
        if optimizer is self.optimizer:
            ran, self._ran = self._ran, False
            if not ran:
                raise ProjectionError(
                    "a step was made without the projection: its hook was removed from the optimizer; "
                    "call projection.remove() to step freely"
                )
            return
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if stepped & self._ids:
            raise ProjectionError(
                f"a step was made without the projection: by {type(optimizer).__name__}, another optimizer than the "
                "projected one; project it too, or call projection.remove()"
            )


_WATCHED: list[Projection] = []
_WATCH: list[Any] = []


def _watch(projection: Projection) -> None:
    _WATCHED.append(projection)
    if not _WATCH:
        _WATCH.append(register_optimizer_step_post_hook(torch.compiler.disable(_look)))
    for reference in projection._parameters.values():
        parameter = reference()
        if parameter is not None:
            weakref.finalize(parameter, _forget, weakref.ref(projection)).atexit = False


def _unwatch(projection: Projection) -> None:
    if projection in _WATCHED:
        _WATCHED.remove(projection)
    while _WATCH and not _WATCHED:
        _WATCH.pop().remove()


def _forget(projection: weakref.ref[Projection]) -> None:
    """A parameter has died; with the last one the projection has nothing left to watch."""
    alive = projection()
    if alive is not None and all(parameter() is None for parameter in alive._parameters.values()):
        _unwatch(alive)


def _look(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    del args, kwargs
    for projection in list(_WATCHED):
        projection._stepped_by(optimizer)


def _supersede(ids: set[int], optimizer: Optimizer) -> None:
    """A new optimizer of parameters that are protected takes over; two projections on one optimizer do not mix."""
    for other in list(_WATCHED):
        if not ids & other._ids:
            continue
        if other.optimizer is optimizer:
            raise ValueError(
                "optimizer: is projected already; merge the bases (Basis.merge) or remove() the first projection: one "
                "projection after the other leaves neither complement"
            )
        other._why = "another optimizer of its parameters was projected since"
        other.remove()


# ---------------------------------------------------------------------------------------------------------- matching


def _unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside; refuses what cannot be hooked, with what to do instead."""
    seen = optimizer
    while not _is_deepspeed(seen) and type(seen).__module__.startswith("accelerate.") and hasattr(seen, "optimizer"):
        seen = seen.optimizer
    if _is_deepspeed(seen):
        raise TypeError(
            f"optimizer: {type(seen).__name__} of DeepSpeed partitions gradients and steps its own flat copies, which "
            "no hook can see; train with FSDP2 (torch.distributed.fsdp.fully_shard) or DDP"
        )
    if not isinstance(seen, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(seen).__name__}")
    for group in seen.param_groups:
        for parameter in group["params"]:
            if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_tensor"):
                raise TypeError(
                    "optimizer: its parameters are partitioned by DeepSpeed (ZeRO 3); train with FSDP2 or DDP"
                )
            if getattr(parameter, "_is_flat_param", False) or type(parameter).__name__ == "FlatParameter":
                raise TypeError(
                    "optimizer: its parameters are flattened by FSDP1 and have lost their shapes; use FSDP2 "
                    "(torch.distributed.fsdp.fully_shard)"
                )
    return seen


def _is_deepspeed(optimizer: Any) -> bool:
    kinds = type(optimizer).__mro__
    return any(kind.__module__.startswith("deepspeed") or "DeepSpeed" in kind.__name__ for kind in kinds)


def _match(optimizer: Optimizer, bases: Sequence[Basis], parameters: Parameters | None) -> dict[str, Tensor]:
    """The optimizer's parameters by the names of the bases."""
    stepped = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    given = None
    if isinstance(parameters, torch.nn.Module):
        # Frozen ones too: they are told from those that are missing.
        given = {parameter_name(name): value for name, value in parameters.named_parameters()}
    elif parameters is not None:
        given = named_parameters(parameters)
    known = _optimizer_names(optimizer)
    found: dict[str, Tensor] = {}
    for basis in bases:
        for name in basis.members:
            if name in found:
                raise ValueError(f"basis: {name} stands in two of the bases; merge them")
            bound = basis.parameter(name)
            parameter = given.get(name) if given is not None else bound if bound is not None else known.get(name)
            if parameter is None and given is None:
                hint = "pass parameters=model" if not known else f"the optimizer knows {', '.join(list(known)[:3])} ..."
                raise ValueError(f"parameters: {name} of the basis is not found ({hint})")
            if parameter is None:
                raise ValueError(f"parameters: {name} of the basis is not among those given")
            basis.check_shape(name, parameter)
            if id(parameter) in stepped:
                found[name] = parameter
            elif parameter.requires_grad:
                raise ValueError(
                    f"optimizer: does not step {name}, which the basis protects; it was made for other parameters "
                    "(before the model was wrapped, sharded or loaded anew?). Pass the optimizer's own model as "
                    "parameters=, or build the optimizer first"
                )
    if not found:
        raise ValueError("optimizer: steps none of the parameters of the basis; all are frozen")
    return found


def _optimizer_names(optimizer: Optimizer) -> dict[str, Tensor]:
    names: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        names |= {parameter_name(n): p for n, p in zip(group.get("param_names") or (), group["params"], strict=False)}
    return names


# ---------------------------------------------------------------------------------------------------------- checks


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a loss scaler has told a fused optimizer to skip this step."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item() > 0)


def _difference(after: Tensor, before: Tensor, room: Tensor | None) -> Tensor:
    if room is not None:
        return torch.sub(after, before, out=room)
    wide = torch.promote_types(after.dtype, torch.float32)
    return after.to(wide) - before.to(wide)


def _put(before: Tensor, change: Tensor, parameter: Tensor) -> None:
    """``parameter = before + change``, rounded once."""
    if before.dtype == change.dtype:
        torch.add(before, change, out=parameter)
    else:
        parameter.copy_(change.add_(before))


def _finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all are.  A sum is finite only if all its terms are; one that is not may have run over."""
    some = [tensor for tensor in tensors if tensor.numel()]
    if not some:
        return True
    home = some[0].device
    if bool(torch.isfinite(torch.stack([tensor.sum().to(home, torch.float64) for tensor in some]).sum())):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in some)


def _where(tensors: Mapping[str, Tensor]) -> str:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            return f" ({name})"
    return " (in another process)"


def _check_same_everywhere(bases: Sequence[Basis]) -> None:
    """Replicas with different bases would drift apart without a word."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    world = torch.distributed.get_world_size()
    if world < 2:
        return
    told: list[Any] = []
    for basis in bases:
        told.append(basis.description())
        for key in basis.ranks:
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[basis.dtype.itemsize]
            # Sums of the bits, vector by vector: exact, in any order.
            told.append(basis.vectors(key).contiguous().view(bits).sum(dim=1, dtype=torch.int64).tolist())
    every: list[Any] = [None] * world
    torch.distributed.all_gather_object(every, told)
    if any(other != told for other in every):
        raise ProjectionError(
            f"basis: not the same in all {world} processes; build it from the same samples everywhere, load it from "
            "one file, or call hpa.projection.gather(basis)"
        )

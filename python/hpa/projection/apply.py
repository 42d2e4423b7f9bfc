"""Applying a basis: to plain tensors by ``hpa_ext.project_``, to shards by local products and one reduction.

Shards of a parameter hold parts of its inner products with the basis.  So each process multiplies what it has, all
coefficients of all parameters are summed over the processes in one collective, and each subtracts on its own part:

    c = sum over processes of Q_local g_local;    g_local -= Q_local' c

Where nothing that is summed over is spread (rows of a matrix, projected onto an input space), nothing is exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hpa_ext
from hpa.projection.basis import Basis

__all__ = ["ShardedBasis", "is_sharded", "local_part", "project_plain"]

RANK_TOLERANCE = 1e-6
"""Directions that parts of the joint vectors have in common are told from noise by this share of the largest."""


def project_plain(basis: Basis, tensors: Mapping[str, Tensor], *, backend: str | None = None) -> None:
    """:meth:`Basis.project_` on tensors whose names and shapes are right."""
    passes = basis.passes
    if basis.space == "joint":
        _project_joint(basis, tensors, backend)
        return
    for name, tensor in tensors.items():
        if basis.vectors(name).shape[0] == 0 or tensor.numel() == 0:
            continue
        vectors = _on(tensor, basis.slices(name))
        if basis.space == "parameter":
            hpa_ext.project_([tensor], [vectors], passes=passes, backend=backend)
            continue
        matrix = tensor if tensor.ndim == 2 else tensor.reshape(tensor.shape[0], -1)
        rows = matrix if basis.space == "input" else matrix.T
        hpa_ext.project_(rows, vectors, passes=passes, backend=backend)
        if matrix.data_ptr() != tensor.data_ptr():  # reshape had to copy (channels last)
            tensor.copy_(matrix.view(tensor.shape))


def _project_joint(basis: Basis, tensors: Mapping[str, Tensor], backend: str | None) -> None:
    present = {name: tensors[name] for name in basis.members if name in tensors}
    if basis.rank == 0 or not present:
        return
    devices = {tensor.device for tensor in present.values()}
    if len(present) == len(basis.members) and len(devices) == 1:
        slices = [_on(tensor, basis.slices(name)) for name, tensor in present.items()]
        hpa_ext.project_(list(present.values()), slices, passes=basis.passes, backend=backend)
        return
    # Some are missing, or they lie on several devices.
    pieces = {name: _on(tensor, basis.slices(name)).flatten(1) for name, tensor in present.items()}
    mix = None if len(present) == len(basis.members) else _mix_of(basis, pieces)
    for _ in range(basis.passes):
        wide = {name: _wide(tensor, basis) for name, tensor in present.items()}
        home = next(iter(wide.values())).device
        parts = [pieces[name].to(value.dtype) @ value.reshape(-1) for name, value in wide.items()]
        coefficients = torch.stack([part.to(home, torch.float64) for part in parts]).sum(0)
        if mix is not None:
            coefficients = mix.to(home) @ coefficients
        for name, value in wide.items():
            change = coefficients.to(value) @ pieces[name].to(value.dtype)
            present[name].copy_(value - change.view(value.shape))


def _mix_of(basis: Basis, pieces: Mapping[str, Tensor]) -> Tensor:
    """Inverse of the Gram matrix of what is left of the joint vectors, kept until the basis or the names change."""
    key, vectors = frozenset(pieces), basis.vectors()
    kept = getattr(basis, "_kept_mix", None)
    if kept is None or kept[0] != key or kept[1] is not vectors:
        kept = (key, vectors, _inverse_gram(sum_of_grams(pieces.values(), vectors.shape[0])))
        basis._kept_mix = kept  # type: ignore[attr-defined]
    return kept[2]


def sum_of_grams(pieces: Iterable[Tensor], rank: int) -> Tensor:
    """Gram matrix ``[rank, rank]`` of vectors of which only some entries are left, on the CPU."""
    from hpa.projection.basis import _products

    total = torch.zeros(rank, rank, dtype=torch.float64)
    for piece in pieces:
        total += _products(piece, piece).cpu()
    return total


def _inverse_gram(gram: Tensor) -> Tensor:
    return torch.linalg.pinv(gram, rtol=RANK_TOLERANCE, hermitian=True)


def _on(tensor: Tensor, vectors: Tensor) -> Tensor:
    return vectors if vectors.device == tensor.device else vectors.to(tensor.device)


def _wide(tensor: Tensor, basis: Basis) -> Tensor:
    double = tensor.dtype == torch.float64 or basis.dtype == torch.float64
    return tensor.to(torch.float64 if double else torch.float32)


# ---------------------------------------------------------------------------------------------------------- shards


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor`` (FSDP2, tensor parallelism)."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of it: memory of its own where it is a ``DTensor``."""
    mine: Any = tensor
    local: Tensor = mine.to_local() if is_sharded(tensor) else mine
    return local.detach()


@dataclass
class _Shard:
    """A parameter's part of the basis in this process.

    Attributes:
        key: of the basis.
        vectors: ``[rank, local numel]`` (joint, parameter), ``[rank, local n]`` (input, output).
        summed: what is summed over is spread over processes.
        groups: the process groups that hold the parameter's other parts.
        shape: of the local part.
    """

    key: str
    vectors: Tensor = field(repr=False)
    summed: bool
    groups: tuple[Any, ...]
    shape: tuple[int, ...]


class ShardedBasis:
    """A basis cut to the parts of the parameters that this process holds.  Every process must make one, and call it.

    Args:
        basis: the whole basis, the same in every process.
        parameters: by name; ``DTensor`` or plain.
    """

    def __init__(self, basis: Basis, parameters: Mapping[str, Tensor]) -> None:
        self.space = basis.space
        self.passes = basis.passes
        self.double = basis.dtype == torch.float64
        self.total = len(basis.members)
        self.shards: dict[str, _Shard] = {}
        shared: dict[tuple[str, Any, torch.device], Tensor] = {}
        for name, parameter in parameters.items():
            local = local_part(parameter)
            region, spread = _region(name, parameter)
            shape = tuple(stop - start for start, stop in region)
            if shape != tuple(local.shape):
                raise ValueError(f"{name}: expected a local part of {shape}, got {tuple(local.shape)}")
            if basis.space in ("joint", "parameter"):
                index = (slice(None), *(slice(start, stop) for start, stop in region))
                vectors = basis.slices(name).view(-1, *parameter.shape)[index].flatten(1)
                summed = bool(spread)
            else:
                vectors, summed = _side(name, basis, region, spread)
            where = (basis.members[name].key, tuple(region) if summed else None, local.device)
            if basis.space in ("joint", "parameter") or where not in shared:
                # A copy: a view would keep the whole basis in memory.
                shared[where] = vectors.to(local.device, copy=True).contiguous()
            groups = tuple(spread.values())
            self.shards[name] = _Shard(basis.members[name].key, shared[where], summed, groups, shape)
        # In the order of the parameters, which is the same in every process.
        self._exchanges = [groups for groups in dict.fromkeys(s.groups for s in self.shards.values()) if groups]
        self._one_vector = basis.space in ("joint", "parameter")
        self._mix: tuple[frozenset[str], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        storages = {shard.vectors.data_ptr(): shard.vectors for shard in self.shards.values()}
        return sum(vectors.numel() * vectors.element_size() for vectors in storages.values())

    def project_(self, tensors: Mapping[str, Tensor]) -> bool:
        """Project local parts in place; ``False``, in every process, where one of them held NaN or Inf in any."""
        local = {name: local_part(tensor) for name, tensor in tensors.items()}
        mix = self._mix_of(local)
        return all(self._pass(local, mix, check=turn == 0) for turn in range(self.passes))

    def _pass(self, local: Mapping[str, Tensor], mix: Tensor | None, *, check: bool) -> bool:
        wide = {name: self._widened(tensor) for name, tensor in local.items()}
        totals: dict[str, Tensor] = {}
        spread: dict[tuple[Any, ...], dict[str, Tensor]] = {groups: {} for groups in self._exchanges}
        for name, value in wide.items():
            shard = self.shards[name]
            if shard.vectors.shape[0]:
                into = spread[shard.groups] if shard.summed else totals
                slot = shard.key if self._one_vector else name
                part = self._coefficients(shard, value)
                into[slot] = into[slot] + part if slot in into else part
        bad = not all(bool(torch.isfinite(value).all()) for value in wide.values()) if check else False
        for groups, parts in spread.items():
            # Also where there is nothing to sum: all processes hear of a NaN, or none would get out of the next step.
            values = list(wide.values())
            dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
            flag = torch.tensor([float(bad)], dtype=dtype, device=values[0].device if values else None)
            flat = torch.cat([*(part.reshape(-1).to(dtype) for part in parts.values()), flag])
            for group in groups:
                torch.distributed.all_reduce(flat, group=group)
            bad = not bool(flat[-1] == 0)
            start = 0
            for slot, part in parts.items():
                total = flat[start : start + part.numel()].view(part.shape)
                totals[slot] = totals[slot] + total if slot in totals else total
                start += part.numel()
        if bad:
            return False
        for name, value in wide.items():
            shard = self.shards[name]
            if shard.vectors.shape[0] == 0 or value.numel() == 0:
                continue
            total = totals[shard.key if self._one_vector else name]
            if mix is not None:
                total = (mix.to(total.device) @ total.double()).to(total.dtype)
            local[name].copy_(value - self._change(shard, value, total.to(value.dtype)))
        return True

    def _coefficients(self, shard: _Shard, value: Tensor) -> Tensor:
        vectors = shard.vectors.to(value.dtype)
        if self._one_vector:
            return vectors @ value.reshape(-1)
        matrix = value.reshape(value.shape[0], math.prod(value.shape[1:]))
        return matrix @ vectors.T if self.space == "input" else vectors @ matrix

    def _change(self, shard: _Shard, value: Tensor, total: Tensor) -> Tensor:
        vectors = shard.vectors.to(value.dtype)
        return (vectors.T @ total if self.space == "output" else total @ vectors).view(value.shape)

    def _widened(self, tensor: Tensor) -> Tensor:
        return tensor.to(torch.float64 if self.double or tensor.dtype == torch.float64 else torch.float32)

    def _mix_of(self, local: Mapping[str, Tensor]) -> Tensor | None:
        """As :func:`_mix_of`, over all processes; they all see the same names."""
        if self.space != "joint" or len(local) == self.total or not local:
            return None
        key = frozenset(local)
        if self._mix is None or self._mix[0] != key:
            rank = self.shards[next(iter(local))].vectors.shape[0]
            gram = torch.zeros(rank, rank, dtype=torch.float64)
            for groups in dict.fromkeys(self.shards[name].groups for name in local):
                device = self.shards[next(iter(local))].vectors.device
                pieces = [self.shards[name].vectors for name in local if self.shards[name].groups == groups]
                part = sum_of_grams(pieces, rank).to(device)
                for group in groups:
                    torch.distributed.all_reduce(part, group=group)
                gram += part.cpu()
            self._mix = (key, _inverse_gram(gram))
        return self._mix[1]


def _region(name: str, parameter: Tensor) -> tuple[list[tuple[int, int]], dict[int, Any]]:
    """What of a parameter lies here, as (start, stop) by dimension, and the process group of each spread dimension."""
    region = [(0, size) for size in parameter.shape]
    spread: dict[int, Any] = {}
    if not is_sharded(parameter):
        return region, spread
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    for axis, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard":
            raise TypeError(
                f"{name}: expected shards along a dimension or replicas (fully_shard), got placement {placement}"
            )
        dim = placement.dim
        if dim in spread:
            raise TypeError(f"{name}: dimension {dim} is sharded over two mesh dimensions, which is not supported")
        start, stop = region[dim]
        size = -(-(stop - start) // mesh.size(axis))
        first = min(start + mesh.get_local_rank(axis) * size, stop)
        region[dim] = (first, min(first + size, stop))
        spread[dim] = mesh.get_group(axis)
    return region, spread


def _side(name: str, basis: Basis, region: list[tuple[int, int]], spread: Mapping[int, Any]) -> tuple[Tensor, bool]:
    """The vectors of an input or output space that a local part meets, and whether sums run over processes."""
    if len(region) > 2 and any(dim > 0 for dim in spread):
        raise TypeError(f"{name}: shards of more than two dimensions must be along the first one")
    vectors = basis.vectors(name)
    dim = 1 if basis.space == "input" else 0
    if dim not in spread:
        return vectors, False
    if len(spread) > 1:
        raise TypeError(f"{name}: rows and columns are both sharded, which is not supported")
    start, stop = region[dim]
    return vectors[:, start:stop], True

"""Orthonormal bases that grow: which directions of which parameters are protected.

A basis belongs to named parameters and to one *space*:

=============  ==========================================  ====================  ==================================
space          a vector is                                 vectors of            a projection takes out
=============  ==========================================  ====================  ==================================
``joint``      all parameters together, one long vector    ``sum of numel``      ``g -= sum_k <g, q_k> q_k`` (OGD)
``parameter``  one parameter's entries                     ``numel``             the same, parameter by parameter
``input``      a row of ``[rows, cols]``: an input         ``cols``              ``G -= (G M) M'`` (GPM)
``output``     a column of ``[rows, cols]``: an output     ``rows``              ``G -= M (M' G)``
=============  ==========================================  ====================  ==================================

``joint`` costs ``rank`` constraints altogether, ``parameter`` as many for each parameter (stricter), ``input`` and
``output`` one for every row or column of each matrix.

Vectors come in by block classical Gram-Schmidt with reorthogonalisation and the drop rule of Kahan and Parlett
(``hpa_ext.orthonormalize_``; METHOD 3.2), so the loss of orthogonality is of the order of the unit roundoff of the
storage, whatever the condition of what is added.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import hpa_ext
from hpa.storage import load_tensors, save_tensors

__all__ = ["Basis", "CapacityError", "Growth", "Member", "Parameters", "Space", "named_parameters", "parameter_name"]

Space = Literal["joint", "parameter", "input", "output"]
Parameters = nn.Module | Mapping[str, Any] | Iterable[tuple[str, Any]]
Vectors = Mapping[str, Tensor | None]

JOINT = "joint"
FORMAT = "hpa.projection.basis/1"
STORAGE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHUNK = 1 << 20
"""Elements of a vector that are looked at in float64 at a time."""


class CapacityError(ValueError):
    """No more vectors fit: the capacity is used up, or a basis would span its whole space.  Nothing was added."""


@dataclass(frozen=True)
class Member:
    """Where a parameter stands in a basis.

    Attributes:
        shape: the parameter's shape.
        key: which set of vectors is its own; members may share one (q, k and v are fed by one input).
        offset: its first entry in a ``joint`` vector.
    """

    shape: tuple[int, ...]
    key: str
    offset: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Growth:
    """What :meth:`Basis.add` did.

    Attributes:
        kept: new directions, by key.
        dropped: vectors that added none: dependent on others, zero, or beyond the energy asked for.
    """

    kept: dict[str, int]
    dropped: dict[str, int]

    def __str__(self) -> str:
        return f"{sum(self.kept.values())} directions kept, {sum(self.dropped.values())} vectors dropped"


class Basis:
    """Orthonormal vectors for named parameters.

    Args:
        parameters: a module (its trainable parameters), ``(name, tensor)`` pairs, or names with tensors or shapes.
            Names are kept without what wrappers put into them (``module.``, ``_orig_mod.``).
        space: see the module.
        capacity: directions a key may have, at most; :class:`CapacityError` beyond.  ``None``: one less than the
            dimension, since a basis of everything would leave nothing to learn.
        dtype: of the storage: float32, bfloat16, float16 or float64.  Half precision takes half the memory; the
            vectors are then orthonormal to about 4e-3 only and are projected out in two passes.
        groups: for ``input`` and ``output``: a parameter's key, where several share one set of vectors; by default
            each has its own.

    Raises:
        ValueError: no parameters, two with one name, or a space that a parameter's shape does not have.
    """

    def __init__(
        self,
        parameters: Parameters,
        space: Space = "joint",
        *,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        groups: Mapping[str, str] | None = None,
    ) -> None:
        if space not in get_args(Space):
            raise ValueError(f"space: expected one of {', '.join(get_args(Space))}, got {space!r}")
        if capacity is not None and not _is_count(capacity):
            raise ValueError(f"capacity: expected a positive number of directions or None, got {capacity!r}")
        if dtype not in STORAGE:
            raise ValueError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
        named = named_parameters(parameters)
        if groups is not None and space not in ("input", "output"):
            raise ValueError(f"groups: only for the spaces input and output, got space {space!r}")
        self.space: Space = space
        self.capacity = capacity
        self.dtype = dtype
        self.members: dict[str, Member] = {}
        self._bound: dict[str, weakref.ref[Tensor]] = {}
        self._vectors: dict[str, Tensor] = {}
        self._energy: dict[str, Tensor] = {}
        keys = {parameter_name(name): key for name, key in (groups or {}).items()}
        unknown = sorted(set(keys) - set(named))
        if unknown:
            raise ValueError(f"groups: expected names of parameters, got {', '.join(unknown[:3])}")
        offset = 0
        sizes: dict[str, int] = {}
        for name, value in named.items():
            shape = tuple(value.shape) if isinstance(value, Tensor) else tuple(int(size) for size in value)
            if isinstance(value, Tensor):
                self._bound[name] = weakref.ref(value)
            if space in ("input", "output") and len(shape) < 2:
                raise ValueError(f"parameters: {name} has shape {shape}, which has no {space} space; leave it out")
            key = JOINT if space == "joint" else keys.get(name, name)
            member = Member(shape, key, offset if space == "joint" else 0)
            offset += member.numel
            size = self._width(member)
            if sizes.setdefault(key, size) != size and space != "joint":
                raise ValueError(f"groups: {name} has {size} {space}s, others of {key!r} have {sizes[key]}")
            self.members[name] = member
        if space == "joint":
            sizes[JOINT] = offset
        for key, size in sizes.items():
            self._vectors[key] = torch.empty(0, size, dtype=dtype)
            self._energy[key] = torch.empty(0, dtype=torch.float64)

    # ------------------------------------------------------------------------------------------------ what it holds

    @property
    def names(self) -> list[str]:
        """The parameters, in the order of a ``joint`` vector."""
        return list(self.members)

    @property
    def ranks(self) -> dict[str, int]:
        """Directions by key."""
        return {key: vectors.shape[0] for key, vectors in self._vectors.items()}

    @property
    def rank(self) -> int:
        """Directions of the key that has most."""
        return max(self.ranks.values())

    @property
    def nbytes(self) -> int:
        return sum(vectors.numel() * vectors.element_size() for vectors in self._vectors.values())

    @property
    def passes(self) -> int:
        """Repetitions of a projection: two clean up after a storage of half precision."""
        return 1 if self.dtype in (torch.float32, torch.float64) else 2

    def vectors(self, key: str | None = None) -> Tensor:
        """``[rank, n]`` of a key (a parameter's name will do); of the only one, where there is but one."""
        return self._vectors[self._key(key)]

    def energies(self, key: str | None = None) -> Tensor:
        """``[rank]``: how much of all that was ever added lies along each direction, ``sum_v <v, q>^2``."""
        return self._energy[self._key(key)]

    def slices(self, name: str) -> Tensor:
        """The vectors as one parameter sees them: ``[rank, *shape]`` views; ``[rank, n]`` for input and output."""
        member = self.members[name]
        vectors = self._vectors[member.key]
        if self.space in ("input", "output"):
            return vectors
        return vectors[:, member.offset : member.offset + member.numel].unflatten(1, member.shape or (1,))

    def parameter(self, name: str) -> Tensor | None:
        """The tensor that the basis was made for, if it still lives."""
        bound = self._bound.get(name)
        return None if bound is None else bound()

    def to(self, device: torch.device | str) -> Basis:
        """Move the vectors; returns the same object."""
        self._vectors = {key: vectors.to(device) for key, vectors in self._vectors.items()}
        return self

    def __repr__(self) -> str:
        ranks = sorted(self.ranks.values())
        span = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}-{ranks[-1]}"
        size = f"{self.nbytes / 1e6:.1f} MB"
        return f"Basis(space={self.space!r}, {len(self.members)} parameters, rank {span}, {self.dtype}, {size})"

    # ------------------------------------------------------------------------------------------------ growing

    def add(
        self,
        vectors: Vectors | Sequence[Vectors],
        *,
        energy: float | None = None,
        rtol: float | None = None,
    ) -> Growth:
        """Take in vectors; all of them or, on an error, none.

        Args:
            vectors: by name, ``[*shape]`` for one or ``[k, *shape]`` for k of them; ``input`` and ``output``: ``[n]``
                or ``[k, n]``, by name or key.  A list adds up.  In a ``joint`` vector what is missing or ``None`` is
                zero.
            energy: keep only the leading principal directions, as few as hold this share of the squared length of
                what is added, counting what the basis holds already (GPM's rule).  ``None``: every independent vector,
                in order.
            rtol: a vector is dropped where no more than this share of it is new; by default 1e-4, and 1e-2 for vectors
                in bfloat16 or float16, whose rest is rounding noise (METHOD 3.2).

        Raises:
            ValueError: an unknown name, a wrong shape, or NaN and Inf (the vector is named).
            CapacityError: more directions than fit.
        """
        if energy is not None and not 0.0 < energy <= 1.0:
            raise ValueError(f"energy: expected a share in (0, 1], got {energy}")
        incoming, coarse = self._collect([vectors] if isinstance(vectors, Mapping) else list(vectors))
        if rtol is None:
            rtol = 1e-2 if coarse else 1e-4
        grown: dict[str, tuple[Tensor, Tensor]] = {}
        kept: dict[str, int] = {}
        dropped: dict[str, int] = {}
        for key, new in incoming.items():
            fresh, gained = self._fresh(key, new, energy, rtol)
            rank = self._vectors[key].shape[0]
            self._check_room(key, rank + fresh.shape[0])
            grown[key] = (fresh, gained)
            kept[key] = fresh.shape[0]
            dropped[key] = new.shape[0] - fresh.shape[0]
        for key, (fresh, gained) in grown.items():
            if fresh.shape[0]:
                known = self._vectors[key]
                self._vectors[key] = torch.cat([known, fresh.to(known)])
            padded = torch.zeros(kept[key], dtype=torch.float64)
            self._energy[key] = torch.cat([self._energy[key], padded]) + gained
        return Growth(kept, dropped)

    def merge(self, other: Basis, *, energy: float | None = None, rtol: float | None = None) -> Growth:
        """Take in another basis of the same space and parameters (or of some of them), as one task after another does.

        Its directions count with the energy that they hold.
        """
        if not isinstance(other, Basis):
            raise TypeError(f"other: expected a Basis, got {type(other).__name__}")
        if other.space != self.space:
            raise ValueError(f"other: expected space {self.space!r}, got {other.space!r}")
        for name, member in other.members.items():
            self._check_known(name)
            if member.shape != self.members[name].shape:
                raise ValueError(f"other: {name} has shape {member.shape}, expected {self.members[name].shape}")
        weights = {key: values.clamp_min(1e-30).sqrt() for key, values in other._energy.items()}

        def weighted(name: str) -> Tensor:
            vectors, weight = other.slices(name), weights[other.members[name].key].to(other._vectors_device)
            return vectors.to(self._work) * weight.to(self._work).view(-1, *[1] * (vectors.ndim - 1))

        if rtol is None:
            rtol = 1e-4 if other.passes == 1 else 1e-2
        if self.space in ("joint", "parameter"):
            whole = {name: weighted(name).view(-1, *other.members[name].shape) for name in other.members}
            return self.add(whole, energy=energy, rtol=rtol)
        pairs = {(self.members[name].key, member.key): name for name, member in other.members.items()}
        stacked: dict[str, list[Tensor]] = {}
        for (key, _), name in pairs.items():
            stacked.setdefault(key, []).append(weighted(name))
        return self.add({key: torch.cat(parts) for key, parts in stacked.items()}, energy=energy, rtol=rtol)

    def truncate(self, *, energy: float | None = None, rank: int | None = None) -> int:
        """Drop the directions that hold least, key by key; returns how many went.

        Args:
            energy: keep as few as hold this share of what all directions of the key hold.
            rank: keep at most so many.
        """
        if (energy is None) == (rank is None):
            raise ValueError("truncate: expected either energy or rank")
        if energy is not None and not 0.0 < energy <= 1.0:
            raise ValueError(f"energy: expected a share in (0, 1], got {energy}")
        if rank is not None and rank < 0:
            raise ValueError(f"rank: expected at least 0, got {rank}")
        gone = 0
        for key, values in self._energy.items():
            order = torch.argsort(values, descending=True, stable=True)
            keep = len(order) if rank is None else min(rank, len(order))
            if energy is not None:
                keep = _share(values[order], energy * float(values.sum()))
            gone += len(order) - keep
            chosen = order[:keep].sort().values
            self._energy[key] = values[chosen]
            self._vectors[key] = self._vectors[key][chosen.to(self._vectors[key].device)]
        return gone

    # ------------------------------------------------------------------------------------------------ projecting

    def project_(self, tensors: Mapping[str, Tensor | None], *, backend: str | None = None) -> None:
        """Take out of each tensor its part in the protected space, in place.

        ``joint``: one call of ``hpa_ext.project_`` for all.  Where parameters of a ``joint`` basis are missing (frozen,
        or without a gradient), the rest is projected onto the complement of what the basis says about the rest: leaving
        them out of the sum would not do, since parts of orthonormal vectors are not orthonormal.

        Args:
            tensors: plain tensors by name; ``None`` and missing names stay as they are.

        Raises:
            ValueError: names or shapes that the basis does not have.
        """
        from hpa.projection.apply import project_plain

        present: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            clean = parameter_name(name)
            self._check_known(clean)
            if tensor is None:
                continue
            self.check_shape(clean, tensor)
            present[clean] = tensor.detach()
        project_plain(self, present, backend=backend)

    def check_shape(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError where a parameter is not of the size that the basis was made for."""
        if tuple(tensor.shape) != self.members[name].shape:
            raise ValueError(
                f"{name}: the basis was made for a parameter of shape {self.members[name].shape}, "
                f"got {tuple(tensor.shape)}"
            )

    # ------------------------------------------------------------------------------------------------ files

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, beside its place and renamed."""
        tensors = {f"vectors/{key}": vectors for key, vectors in self._vectors.items()}
        tensors |= {f"energy/{key}": values for key, values in self._energy.items()}
        save_tensors(Path(path), tensors, {"basis": json.dumps(self.description())})

    @classmethod
    def load(cls, path: Path | str, *, device: torch.device | str = "cpu") -> Basis:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: not such a file, or one whose tensors do not fit its description.
        """
        tensors, notes = load_tensors(Path(path))
        if "basis" not in notes:
            raise ValueError(f"{path}: expected a file of Basis.save, found no description of a basis")
        return cls.restore(json.loads(notes["basis"]), tensors, where=str(path)).to(device)

    def description(self) -> dict[str, Any]:
        """All but the numbers, JSON-ready."""
        return {
            "format": FORMAT,
            "space": self.space,
            "capacity": self.capacity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "members": [[name, list(member.shape), member.key] for name, member in self.members.items()],
        }

    @classmethod
    def restore(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str = "tensors") -> Basis:
        """A basis from :meth:`description` and its tensors, ``vectors/<key>`` and ``energy/<key>``."""
        if description.get("format") != FORMAT:
            raise ValueError(f"{where}: expected format {FORMAT!r}, got {description.get('format')!r}")
        members = {name: tuple(shape) for name, shape, _ in description["members"]}
        shared = description["space"] in ("input", "output")
        basis = cls(
            members,
            description["space"],
            capacity=description["capacity"],
            dtype=getattr(torch, description["dtype"]),
            groups={name: key for name, _, key in description["members"]} if shared else None,
        )
        for key, empty in basis._vectors.items():
            vectors, values = tensors.get(f"vectors/{key}"), tensors.get(f"energy/{key}")
            if vectors is None or values is None:
                raise ValueError(f"{where}: no vectors of {key!r}; the file is damaged")
            fits = vectors.ndim == 2 and vectors.shape[1] == empty.shape[1] and vectors.dtype == basis.dtype
            if not fits or tuple(values.shape) != (vectors.shape[0],):
                raise ValueError(
                    f"{where}: {key!r}: expected {basis.dtype} vectors [rank, {empty.shape[1]}] with an energy each, "
                    f"got {vectors.dtype} {tuple(vectors.shape)} and {tuple(values.shape)}"
                )
            basis._vectors[key], basis._energy[key] = vectors, values.double()
        return basis

    # ------------------------------------------------------------------------------------------------ inside

    @property
    def _work(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def _vectors_device(self) -> torch.device:
        return next(iter(self._vectors.values())).device

    def _width(self, member: Member) -> int:
        if self.space == "input":
            return math.prod(member.shape[1:])
        return member.shape[0] if self.space == "output" else member.numel

    def _key(self, key: str | None) -> str:
        if key is None:
            if len(self._vectors) > 1:
                raise ValueError(f"key: expected one of {len(self._vectors)} (a parameter's name will do), got None")
            return next(iter(self._vectors))
        if key in self._vectors:
            return key
        clean = parameter_name(key)
        self._check_known(clean)
        return self.members[clean].key

    def _check_known(self, name: str) -> None:
        if name not in self.members:
            some = ", ".join(list(self.members)[:3])
            raise ValueError(f"{name}: not a parameter of this basis (it has {len(self.members)}: {some} ...)")

    def _collect(self, added: list[Vectors]) -> tuple[dict[str, Tensor], bool]:
        """Matrices of new vectors by key, in the working dtype, and whether any came in half precision."""
        rows: dict[str, list[Tensor]] = {}
        coarse = False
        for vectors in added:
            given = {name: value.detach() for name, value in vectors.items() if value is not None}
            coarse |= any(value.dtype in (torch.bfloat16, torch.float16) for value in given.values())
            if self.space == "joint":
                rows.setdefault(JOINT, []).append(self._joint(given))
                continue
            done: set[str] = set()
            for name, value in given.items():
                key = self._key(name)
                width = self._vectors[key].shape[1]
                whole = self.space == "parameter"
                shape = self.members[parameter_name(name)].shape if whole else (width,)
                many = _stack(name, value, shape)
                if key in done:
                    raise ValueError(f"vectors: {name} and another name both stand for {key!r}")
                done.add(key)
                rows.setdefault(key, []).append(many.to(self._vectors[key].device, self._work))
        # Cloned: they are overwritten.
        matrices = {key: torch.cat(parts) if len(parts) > 1 else parts[0].clone() for key, parts in rows.items()}
        for key, matrix in matrices.items():
            bad = ~torch.isfinite(matrix).all(dim=1)
            if bool(bad.any()):
                raise ValueError(f"vectors: number {int(bad.nonzero()[0])} of {key!r} holds NaN or Inf")
        return matrices, coarse

    def _joint(self, given: Mapping[str, Tensor]) -> Tensor:
        parts: dict[str, Tensor] = {}
        for name, value in given.items():
            clean = parameter_name(name)
            self._check_known(clean)
            parts[clean] = _stack(name, value, self.members[clean].shape)
        counts = {part.shape[0] for part in parts.values()}
        if len(counts) > 1:
            raise ValueError(f"vectors: expected equally many of each parameter, got {sorted(counts)}")
        known = self._vectors[JOINT]
        whole = torch.zeros(counts.pop() if counts else 0, known.shape[1], dtype=self._work, device=known.device)
        for name, part in parts.items():
            member = self.members[name]
            whole[:, member.offset : member.offset + member.numel] = part.to(whole)
        return whole

    def _fresh(self, key: str, new: Tensor, energy: float | None, rtol: float) -> tuple[Tensor, Tensor]:
        """New orthonormal directions, and the energy that old and new ones gain."""
        known = self._vectors[key].to(self._work)
        rank, n = known.shape
        if new.shape[0] == 0 or rank >= n:
            if new.shape[0] and n:
                self._check_room(key, rank + 1)
            return new[:0], torch.zeros(rank, dtype=torch.float64)
        if energy is None:
            fresh = new.clone()
        else:
            rest = new.clone()
            hpa_ext.project_(rest, known, passes=2)
            total, left = _square(new), _square(rest)
            fresh = _principal(rest, energy * total - (total - left))
        if fresh.shape[0]:
            kept = hpa_ext.orthonormalize_(fresh, known if rank else None, rtol)
            fresh = fresh[:kept].clone() if kept < fresh.shape[0] else fresh
        gained = torch.cat([_products(new, known), _products(new, fresh)], dim=1).square().sum(0).cpu()
        return fresh, gained

    def _check_room(self, key: str, rank: int) -> None:
        n = self._vectors[key].shape[1]
        have = self._vectors[key].shape[0]
        if self.capacity is not None and rank > self.capacity:
            raise CapacityError(
                f"capacity: {key!r} holds {have} directions and would hold {rank}, more than its capacity of "
                f"{self.capacity}; truncate(energy=...) it, add with energy=..., or give it more"
            )
        if rank >= n > 0:
            raise CapacityError(
                f"capacity: {key!r} would hold {rank} of {n} directions, and every update would vanish; truncate(...) "
                "it, or add with energy=... below 1"
            )


def parameter_name(name: str) -> str:
    """A parameter's path without what wrappers put into it.

    >>> parameter_name("module._orig_mod.layers.0.weight")
    'layers.0.weight'
    """
    wrappers = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    parts = [part for part in name.split(".") if part not in wrappers]
    return ".".join(parts[1:] if len(parts) > 1 and parts[0] == "module" else parts)


def named_parameters(parameters: Parameters) -> dict[str, Any]:
    """Clean names and tensors (or shapes) of what stands for parameters."""
    pairs: Iterable[Any]
    if isinstance(parameters, nn.Module):
        pairs = ((name, value) for name, value in parameters.named_parameters() if value.requires_grad)
    elif isinstance(parameters, Mapping):
        pairs = parameters.items()
    else:
        pairs = parameters
    found: dict[str, Any] = {}
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                f"parameters: expected a module, (name, tensor) pairs or a mapping, got {type(pair).__name__}"
            )
        name = parameter_name(pair[0])
        if name in found:
            raise ValueError(f"parameters: {name} is named twice")
        found[name] = pair[1]
    if not found:
        raise ValueError("parameters: expected at least one (of a module: one that requires a gradient), got none")
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _stack(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``[k, prod(shape)]`` of one or several vectors."""
    if tuple(value.shape) == shape:
        return value.reshape(1, -1)
    if value.ndim == len(shape) + 1 and tuple(value.shape[1:]) == shape:
        return value.reshape(value.shape[0], math.prod(shape))
    raise ValueError(f"vectors: {name}: expected {shape} or (k, {str(shape)[1:]}, got {tuple(value.shape)}")


def _chunks(n: int) -> Iterator[slice]:
    for start in range(0, n, CHUNK):
        yield slice(start, min(start + CHUNK, n))


def _products(left: Tensor, right: Tensor) -> Tensor:
    """``left right'`` in float64, a piece of the long side at a time."""
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float64, device=left.device)
    for piece in _chunks(left.shape[1]):
        total += left[:, piece].double() @ right[:, piece].double().T
    return total


def _square(matrix: Tensor) -> float:
    return sum(float(matrix[:, piece].double().square().sum()) for piece in _chunks(matrix.shape[1]))


def _share(descending: Tensor, wanted: float) -> int:
    """How many of the leading values it takes to hold ``wanted``."""
    if wanted <= 0 or len(descending) == 0:
        return 0
    # One part in 10^12 less, so that a share of 1 does not ask for directions of rounding noise.
    enough = torch.cumsum(descending, 0) >= wanted * (1 - 1e-12)
    return int(enough.to(torch.int8).argmax()) + 1 if bool(enough.any()) else len(descending)


def _principal(rest: Tensor, wanted: float) -> Tensor:
    """Leading principal directions of the rows, largest first, as few as hold ``wanted`` of their squared length."""
    if wanted <= 0:
        return rest[:0]
    count, n = rest.shape
    if count <= n:
        values, turns = torch.linalg.eigh(_products(rest, rest))
    else:
        wide = rest.double()
        values, turns = torch.linalg.eigh(wide.T @ wide)
    values, turns = values.flip(0).clamp_min(0), turns.flip(1)
    keep = _share(values.cpu(), wanted)
    chosen = turns[:, :keep].T
    if count > n:
        return chosen.to(rest.dtype).contiguous()
    # Scaled to unit length: the drop rule looks at each row relative to itself, noise included.
    lengths = values[:keep].sqrt().clamp_min(1e-300)
    directions = torch.empty(keep, n, dtype=rest.dtype, device=rest.device)
    for piece in _chunks(n):
        directions[:, piece] = ((chosen @ rest[:, piece].double()) / lengths[:, None]).to(rest.dtype)
    return directions

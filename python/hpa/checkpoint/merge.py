"""Editing one output file: read the next layers, edit this one, write the last, note how far it is.

Every tensor has its place in the output before the first byte is written, and an edit depends on its layer alone.  So a
file that was begun is continued where its last note stands, by whoever takes it up, and comes out the same.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hpa_ext
from hpa.checkpoint.buffers import Buffers
from hpa.checkpoint.claims import ClaimLostError
from hpa.checkpoint.files import DTYPES, CheckpointError, TensorInfo, encode_header, read_tensor, tensor_bytes
from hpa.checkpoint.memory import Memory
from hpa.checkpoint.plan import Entry, Shard
from hpa.checkpoint.statistics import Statistics
from hpa.checkpoint.stream import HashedFile, Room, read_ahead
from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate, add_update
from hpa.methods import Method
from hpa.storage import write_file

__all__ = ["Editor", "Loaded", "ShardResult", "load_entry", "write_shard"]

NOTE_EVERY = 64 << 20  # bytes between two notes: what a kill can cost, and what the disk has to do at the end


@dataclass(frozen=True)
class ShardResult:
    """A finished file: size, SHA-256 and the numbers of its edits."""

    name: str
    size: int
    sha256: str
    edits: list[dict[str, Any]]


class Editor:
    """A method with what it reads: statistics, and a memory of past tasks."""

    def __init__(
        self,
        method: Method,
        statistics: dict[str, Statistics],
        *,
        memory: Memory | None = None,
        references: Mapping[str, Callable[[str], Tensor]] | None = None,
        earlier: Sequence[Callable[[str], Tensor | LowRankUpdate]] = (),
        task_index: int = 0,
        seed: int = 0,
        budget: int = 1 << 30,
    ) -> None:
        """``statistics``: by role, safety and task; ``references``, ``earlier``: what reads a layer of the aligned or
        unaligned model, and of other tasks' models; ``budget``: bytes of statistics to keep for the next layers."""
        self.method = method
        method.goes_on = False  # what is carried from task to task is in files here
        self._statistics = statistics
        self._memory = memory
        self._references = dict(references or {})
        self._earlier = list(earlier)
        self._task_index, self._seed = task_index, seed
        self._cache: OrderedDict[tuple[str, str], InputStatistics] = OrderedDict()
        self._budget = budget
        self._memory_key: str | None = None

    def edit(
        self, entry: Entry, before: Tensor, update: Tensor | LowRankUpdate, *, reuse_update: bool = False
    ) -> LayerEdit:
        """``reuse_update``: as in :class:`~hpa.layers.LayerChange`.

        Raises ValueError (layer named) for numbers that are not finite and all that the method refuses.
        """
        assert entry.layer is not None
        layer = entry.layer
        if isinstance(update, Tensor) and update.dtype != before.dtype:  # the edit has the precision of the better one
            both = torch.promote_types(before.dtype, update.dtype)
            before, update = before.to(both), update.to(both)
        seen: dict[str, InputStatistics] = {}
        for role in ("safety", "task"):
            want = frozenset(kind for kind in ("diagonal", "gram") if f"{role}_{kind}" in self.method.needs)
            if want:
                seen[role] = self._read(role, layer.name, want)
        key = next((seen[role].input_key for role in ("task", "safety") if role in seen), layer.name)
        if self._memory is not None and key != self._memory_key:
            self.method.load_state_dict(self._memory.state(key))
            self._memory_key = key
        others = {name: read(layer.name) for name, read in self._references.items()}
        change = LayerChange(
            layer.name,
            layer.block,
            layer.blocks,
            key,
            before,
            update,
            reuse_update=reuse_update,
            earlier=tuple(read(layer.name) for read in self._earlier),
            **others,
        )
        return self.method.edit_layer(
            change, seen.get("safety"), seen.get("task"), task_index=self._task_index, seed=self._seed
        )

    def _read(self, role: str, layer: str, want: frozenset[str]) -> InputStatistics:
        key = self._statistics[role].input_of(layer)
        found = self._cache.get((role, key))
        if found is None:
            found = self._statistics[role].read(key, want)
            if found.triangle is not None and not self.method.reads_triangles:
                found = replace(found, gram=found.triangle.lower(), triangle=None)
            self._cache[(role, key)] = found
            while len(self._cache) > 2 and sum(map(_held, self._cache.values())) > self._budget:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end((role, key))
        return found


def write_shard(
    shard: Shard,
    folder: Path,
    notes: Path,
    editor: Editor,
    *,
    budget: int,
    room: Room | None = None,
    buffers: Buffers | None = None,
    done: Callable[[int], None] = lambda _: None,
    confirm: Callable[[], None] = lambda: None,
) -> Callable[[], ShardResult]:
    """Write ``folder/shard.name``; resumes from the notes of an earlier try.

    What is left to do is in the function that comes back: wait for the disk, and give the file its name.  Any thread
    may call it, while the next file is begun.

    Args:
        shard: the file's tensors.
        folder: where the file goes; it is called ``<name>.part`` until it is whole.
        notes: folder of the notes.
        editor: edits a layer.
        budget: bytes that may wait to be edited.
        room: for bytes that wait to be written; as much as ``budget`` by default.
        buffers: memory to read into.
        done: told of bytes written.
        confirm: raises where the file has become somebody else's to finish.

    Raises:
        CheckpointError, OSError: named tensor or file; the notes stand, and the same call goes on from them.
        ClaimLostError: by the function, where another worker has taken over.
    """
    header = encode_header(shard.tensors, shard.metadata)
    part, note = folder / f"{shard.name}.part", notes / f"{shard.name}.json"
    start, first, edits = _resume(part, note)
    out = HashedFile(part, start=start, room=Room(budget) if room is None else room)
    try:
        if not start:
            out.write(header)
        noted = out.position
        done(out.position)
        halves: dict[str, Tensor] = {}
        for index, (entry, loaded) in enumerate(
            read_ahead(shard.entries[first:], partial(load_entry, buffers=buffers), lambda entry: entry.held, budget),
            start=first,
        ):
            tensor, numbers = _result(entry, loaded, editor, halves)
            del loaded
            if numbers is not None:
                edits.append({"tensor": entry.name, **numbers})
            size = entry.source.size
            if tensor.numel() * tensor.element_size() != size:
                raise AssertionError(f"{entry.name}: {tuple(tensor.shape)} {tensor.dtype} in place of {entry.source}")
            out.write(tensor_bytes(tensor))
            done(size)
            if out.position - noted >= NOTE_EVERY and not halves:
                content = json.dumps({"bytes": out.position, "entries": index + 1, "edits": edits})
                out.when_on_disk(partial(write_file, note, content))
                noted = out.position
    except BaseException:
        out.abandon()
        raise

    def finish() -> ShardResult:
        digest = out.close()
        confirm()
        try:
            os.replace(part, folder / shard.name)
        except FileNotFoundError:
            raise ClaimLostError(f"{shard.name}: another worker took it over, and has finished it") from None
        return ShardResult(shard.name, out.position, digest, edits)

    return finish


def _resume(part: Path, note: Path) -> tuple[int, int, list[dict[str, Any]]]:
    if part.exists() and note.exists():
        content = json.loads(note.read_text())
        # A note of an earlier build counts tensors, each with all its experts.
        if "entries" in content and part.stat().st_size >= content["bytes"]:
            return content["bytes"], content["entries"], content["edits"]
    return 0, 0, []


@dataclass
class Loaded:
    """What an entry is made from, in memory."""

    source: Tensor | None
    before: Tensor | None
    update: LowRankUpdate | None


def load_entry(entry: Entry, buffers: Buffers | None = None) -> Loaded:
    """Read it, weights into memory from ``buffers``."""
    if entry.part:
        assert entry.before is not None
        assert entry.factors is not None
        # The second half of a pair is edited with the first.
        return (
            Loaded(None, None, None)
            if entry.part == "B"
            else Loaded(None, read_tensor(entry.before, buffers), entry.factors.read())
        )
    update = None if entry.factors is None else entry.factors.read()
    before = None if entry.before is None else read_tensor(entry.before, buffers)
    return Loaded(read_tensor(entry.source, buffers) if update is None else None, before, update)


def _result(
    entry: Entry, loaded: Loaded, editor: Editor, halves: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Any] | None]:
    """The tensor to write and, for a layer, the numbers of its edit."""
    dtype = DTYPES[entry.source.dtype]
    if entry.part:
        return _adapter_half(entry, loaded, editor, halves, dtype)
    if entry.fate == "copied":
        if loaded.update is None:
            assert loaded.source is not None
            _check_finite(entry, loaded.source)
            return loaded.source, None
        assert loaded.before is not None
        merged = add_update(loaded.before, loaded.update, dtype)
        _check_finite(entry, merged)
        return merged, None
    assert entry.layer is not None
    assert loaded.before is not None
    given = loaded.update if loaded.update is not None else loaded.source
    assert given is not None
    edit = _edited(editor, entry, loaded.before, given, reuse_update=True)
    weight = edit.weight
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    if edit.skipped is not None:
        _check_finite(entry, weight)
    rows, cols = weight.shape
    if entry.source.transposed:
        weight = weight.T
    return weight, {"name": entry.layer.name, "block": entry.layer.block, "rows": rows, "cols": cols, **edit.numbers}


def _adapter_half(
    entry: Entry, loaded: Loaded, editor: Editor, halves: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Any] | None]:
    assert entry.layer is not None
    assert entry.factors is not None
    layer = entry.layer
    if layer.name in halves:
        return halves.pop(layer.name).to(dtype), None
    if loaded.before is None or loaded.update is None:  # this pair has B first
        assert entry.before is not None
        loaded = Loaded(None, read_tensor(entry.before), entry.factors.read())
    assert loaded.before is not None
    assert loaded.update is not None
    edit = _edited(editor, entry, loaded.before, loaded.update)
    if edit.update is None or edit.base is None or edit.update.rank != entry.factors.a.shape[0]:
        raise CheckpointError(
            f"save-as: lora cannot hold the edit of layer {layer.name} by method '{editor.method.name}': it is no "
            f"update of rank {entry.factors.a.shape[0]}; use --save-as full"
        )
    if edit.base.data_ptr() != loaded.before.data_ptr():
        raise CheckpointError(
            f"save-as: lora cannot hold the edit of layer {layer.name}: it changes the base weights as well; "
            "use --save-as full, or switch the orthogonal adjustment off with --set proj=off"
        )
    factor_b = edit.update.B
    if edit.update.scale != entry.factors.scale:
        factor_b = factor_b * (edit.update.scale / entry.factors.scale)
    first, second = (edit.update.A, factor_b) if entry.part == "A" else (factor_b, edit.update.A)
    halves[layer.name] = second
    rows, cols = loaded.before.shape
    numbers = {"name": layer.name, "block": layer.block, "rows": rows, "cols": cols, **edit.numbers}
    return first.to(dtype), numbers


def _edited(
    editor: Editor, entry: Entry, before: Tensor, update: Tensor | LowRankUpdate, *, reuse_update: bool = False
) -> LayerEdit:
    try:
        return editor.edit(entry, before, update, reuse_update=reuse_update)
    except ValueError:
        _name_what_is_not_finite(entry)
        raise


def _name_what_is_not_finite(entry: Entry) -> None:
    """Raises CheckpointError where NaN or Inf in a weight is why a layer could not be edited."""
    infos: list[tuple[str, TensorInfo | None]] = [("BEFORE", entry.before)]
    if entry.factors is None:
        infos.append(("AFTER", entry.source))
    else:
        infos += [("AFTER", entry.factors.a), ("AFTER", entry.factors.b)]
    for side, info in infos:
        if info is not None and not _is_finite(read_tensor(info)):
            raise CheckpointError(f"{side}: tensor '{info.name}' of {info.path} holds NaN or Inf")


def _check_finite(entry: Entry, tensor: Tensor) -> None:
    if not _is_finite(tensor):
        raise CheckpointError(f"AFTER: tensor '{entry.name}' of {entry.source.path} holds NaN or Inf")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.itemsize == 1 or not tensor.numel():
        return True
    if tensor.ndim > 1:
        rows = tensor.reshape(-1, tensor.shape[-1])
        # x - x is NaN where x is not finite: one pass, where torch.isfinite makes several tensors of this size.
        return bool(torch.isfinite(hpa_ext.change_statistics(rows, rows).column_change).all())
    return bool(torch.isfinite(tensor).all())


def _held(seen: InputStatistics) -> int:
    return sum(
        tensor.numel() * tensor.element_size() for tensor in (seen.gram, seen.inverse_diagonal) if tensor is not None
    )

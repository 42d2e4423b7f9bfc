"""A list of tensors as one launch sees it: a table of addresses, shapes and strides in the device's memory."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpa_ext.triton.launching import ceil_div

__all__ = ["Table", "operand", "table_of"]


@triton.jit
def operand(fields, element, cols, DTYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Addresses of elements of a piece; ``fields`` points to the operand's part of its table row."""
    start = tl.load(fields).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    if UNIT:
        place = start + element
    else:
        place = start + element // cols * tl.load(fields + 1) + element % cols * tl.load(fields + 2)
    return place


@dataclass(frozen=True)
class Table:
    """A list of tensors as one launch sees it.

    A list is cut into pieces, matrices ``[rows, cols]`` with strides of their own, and pieces into chunks of
    consecutive elements.  ``pieces`` is int64 ``[pieces, 3 + 4 * operands]``: number of the first chunk, rows, cols,
    and for each operand its address, row stride, column stride, and the stride of the dimension left out (``outer``).
    ``piece_of`` is int32 ``[chunks]``.
    """

    pieces: Tensor
    piece_of: Tensor
    chunks: int
    members: tuple[int, ...]
    """Which tuples of the list are in here."""
    unit: bool
    """Every piece is one row and every column stride is one."""
    aligned: bool
    """Every address is a multiple of 16."""


_Key = tuple[Any, ...]
_recent: OrderedDict[_Key, tuple[Table, Tensor, Tensor]] = OrderedDict()
_RECENT = 16


def table_of(operands: Sequence[Sequence[Tensor]], outer: int, chunk: int) -> list[Table]:
    """Tables for one launch each: tensors of the same dtypes that can be read in the same way are together.

    Args:
        operands: for each operand the list of its tensors.  ``operands[k][i]`` have one shape for all ``k`` after their
            first ``outer`` dimensions, which the kernel addresses by itself.
        outer: 0, or 1: then the first dimension is left to the kernel, which finds its stride in the table.
        chunk: elements in a chunk.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, list[int]]]] = {}
    for i, tensors in enumerate(zip(*operands, strict=True)):
        if 0 in tensors[0].shape[outer:]:
            continue
        sizes = [tensor.element_size() for tensor in tensors]
        addresses = [tensor.data_ptr() for tensor in tensors]
        strides = [tensor.stride()[outer:] for tensor in tensors]
        leads = [tensor.stride(0) if outer else 0 for tensor in tensors]
        dims = _merge_dimensions(tensors[0].shape[outer:], strides)
        *leading, (rows, row_steps), (cols, col_steps) = dims
        unit = rows == 1 and not leading and all(step == 1 for step in col_steps)
        aligned = not any(a % 16 for a in addresses) and not any(
            s * lead % 16 for s, lead in zip(sizes, leads, strict=True)
        )
        key = (*(tensor.dtype for tensor in tensors), unit, unit and aligned)
        for index in product(*(range(count) for count, _ in leading)):
            fields = [rows, cols]
            for k, address in enumerate(addresses):
                offset = sum(at * steps[k] for at, (_, steps) in zip(index, leading, strict=True))
                fields += [address + offset * sizes[k], row_steps[k], col_steps[k], leads[k]]
            groups.setdefault(key, []).append((i, fields))
    device = operands[0][0].device if operands[0] else torch.device("cpu")
    return [_upload(key, entries, chunk, device) for key, entries in groups.items()]


def _merge_dimensions(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, tuple[int, ...]]]:
    """``(size, step of each operand)`` outermost first, at least two of them; neighbours that are one walk through
    memory in every operand are joined.  Elements keep their partners, their order is free."""
    dims = [(size, tuple(s[d] for s in strides)) for d, size in enumerate(shape) if size != 1]
    dims.sort(key=lambda dim: dim[1], reverse=True)
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in dims:
        if merged and all(outer == inner * size for outer, inner in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    if not merged:
        merged = [(1, (1,) * len(strides))]
    if len(merged) == 1:
        merged.insert(0, (1, (0,) * len(strides)))
    return merged


def _upload(key: tuple[Any, ...], entries: list[tuple[int, list[int]]], chunk: int, device: torch.device) -> Table:
    """Brings a table to the device without waiting for it; a training loop's tables, the same in each step, stay."""
    signature = (key, chunk, device, tuple(tuple(fields) for _, fields in entries))
    found = _recent.get(signature)
    if found is not None:
        _recent.move_to_end(signature)
        return found[0]
    rows, counts, total = [], [], 0
    for _, fields in entries:
        rows.append([total, *fields])
        counts.append(ceil_div(fields[0] * fields[1], chunk))
        total += counts[-1]
    pinned = device.type == "cuda"
    pieces = torch.tensor(rows, dtype=torch.int64, pin_memory=pinned)
    piece_of = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), torch.tensor(counts))
    if pinned:
        piece_of = piece_of.pin_memory()
    table = Table(
        pieces.to(device, non_blocking=True),
        piece_of.to(device, non_blocking=True),
        total,
        tuple(i for i, _ in entries),
        *key[-2:],
    )
    _recent[signature] = (table, pieces, piece_of)
    while len(_recent) > _RECENT:
        _recent.popitem(last=False)
    return table

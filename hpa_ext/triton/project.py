"""g -= sum_k <g, q_k> q_k  for each of m vectors g          grads[i] [m, *shape_i], basis[i] [rank, *shape_i]

Arithmetic   float32, or float64 where any argument is.  Dot products: float32 over at most 2048 elements, float64
             over blocks and over the list.  g is rounded to its storage dtype once a pass.
Bytes moved  Few vectors: grads read twice and written once, basis read twice: the minimum for a dot product of the
             whole that must be finished before it is used.  Many vectors: tiles of 32 to 64 vectors share a reading.
Bound by     memory bandwidth (few vectors), float32 units (many); not measured on a device.
Design       Three launches a pass for a whole list (for each combination of dtypes and layouts in it): partial dot
             products of chunks, their sums in order, the update.  Few vectors: lanes add products and fold once a
             block.  Many vectors and a basis of some size: two matrix products.  No atomics: the same bits every time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpa_ext.triton.launching import TL, arithmetic, ceil_div, on_device_of, power_of_2, wide, written
from hpa_ext.triton.tables import Table, operand, table_of

BLOCK = 2048  # elements summed in float32
MANY_VECTORS = 16  # from here on, with a basis of
LARGE_RANK = 8  # this rank or more, matrix products pay
FOLD_CHUNKS = 128
FOLD_OUTPUTS = 16


def project_(grads: list[Tensor], basis: list[Tensor], passes: int) -> None:
    vectors, rank = grads[0].shape[0], basis[0].shape[0]
    elements = sum(grad[0].numel() for grad in grads) if vectors else 0
    if elements == 0 or rank == 0:
        return
    numbers = arithmetic(*grads, *basis)
    chunk = BLOCK * (1 if elements < 1 << 20 else 4 if elements < 1 << 24 else 16)
    matrix = vectors >= MANY_VECTORS and rank >= LARGE_RANK and numbers == tl.float32
    launch = _Matrix if matrix else _Vectors
    tables = table_of([grads, basis], 1, chunk)
    launches = [launch(table, grads, basis, numbers, chunk) for table in tables]
    chunks = sum(table.chunks for table in tables)
    dtype, device = wide(*grads, *basis), grads[0].device
    partial = torch.empty(chunks, vectors * rank, dtype=torch.float64, device=device)
    coefficients = torch.empty(vectors * rank, dtype=dtype, device=device)
    with on_device_of(grads[0]):
        for _ in range(passes):
            first = 0
            for part in launches:
                part.dot(partial[first:])
                first += part.table.chunks
            fold_kernel[(ceil_div(vectors * rank, FOLD_OUTPUTS),)](
                partial,
                coefficients,
                chunks,
                vectors * rank,
                BLOCK_CHUNKS=FOLD_CHUNKS,
                BLOCK_OUTPUTS=FOLD_OUTPUTS,
                num_warps=4,
            )
            for part in launches:
                part.update(coefficients)
    written(*grads)


class _Vectors:
    """Launches for few vectors: bound by reading the basis."""

    def __init__(self, table: Table, grads: list[Tensor], basis: list[Tensor], numbers: Any, chunk: int) -> None:
        grad, rows = grads[table.members[0]], basis[table.members[0]]
        self.table, self.vectors, self.rank = table, grad.shape[0], rows.shape[0]
        self.block_vectors = power_of_2(self.vectors, 1, 4)
        self.constants = {
            "GRAD": TL[grad.dtype],
            "BASIS": TL[rows.dtype],
            "UNIT": table.unit,
            "ALIGNED": table.aligned,
            "ARITHMETIC": numbers,
            "CHUNK": chunk,
            "SPAN": 256,
            "VECTORS": self.block_vectors,
            "RANKS": 8 if self.block_vectors == 1 else 4,
            "num_warps": 4,
        }

    def dot(self, partial: Tensor) -> None:
        blocks = ceil_div(self.vectors, self.block_vectors) * ceil_div(self.rank, self.constants["RANKS"])
        dot_kernel[(self.table.chunks * blocks,)](
            self.table.pieces,
            self.table.piece_of,
            partial,
            self.vectors,
            self.rank,
            BLOCK=BLOCK,
            **self.constants,
        )

    def update(self, coefficients: Tensor) -> None:
        update_kernel[(self.table.chunks * ceil_div(self.vectors, self.block_vectors),)](
            self.table.pieces, self.table.piece_of, coefficients, self.vectors, self.rank, **self.constants
        )


class _Matrix:
    """Launches for many vectors: bound by multiply-adds."""

    def __init__(self, table: Table, grads: list[Tensor], basis: list[Tensor], numbers: Any, chunk: int) -> None:
        grad, rows = grads[table.members[0]], basis[table.members[0]]
        self.table, self.vectors, self.rank = table, grad.shape[0], rows.shape[0]
        # Narrow numbers of one dtype go to matrix units as they are: their products are exact in float32.
        narrow = grad.dtype == rows.dtype != torch.float32
        self.dot_constants = {
            "FACTOR": TL[grad.dtype] if narrow else tl.float32,
            "VECTORS": 64,
            "RANKS": 64 if narrow else 32,
            "SPAN": 64 if narrow else 32,
            "num_warps": 8 if narrow else 4,
        }
        self.update_constants = {"VECTORS": 32, "RANKS": 16, "COLS": 64, "num_warps": 4}
        self.constants = {
            "GRAD": TL[grad.dtype],
            "BASIS": TL[rows.dtype],
            "UNIT": table.unit,
            "ALIGNED": table.aligned,
            "CHUNK": chunk,
        }

    def dot(self, partial: Tensor) -> None:
        block_vectors, block_ranks = self.dot_constants["VECTORS"], self.dot_constants["RANKS"]
        blocks = ceil_div(self.vectors, block_vectors) * ceil_div(self.rank, block_ranks)
        matrix_dot_kernel[(self.table.chunks * blocks,)](
            self.table.pieces,
            self.table.piece_of,
            partial,
            self.vectors,
            self.rank,
            BLOCK=BLOCK,
            **self.dot_constants,
            **self.constants,
        )

    def update(self, coefficients: Tensor) -> None:
        matrix_update_kernel[(self.table.chunks * ceil_div(self.vectors, self.update_constants["VECTORS"]),)](
            self.table.pieces,
            self.table.piece_of,
            coefficients,
            self.vectors,
            self.rank,
            **self.update_constants,
            **self.constants,
        )


@triton.jit
def lead_of(fields, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Stride of the dimension that counts vectors, or rows of the basis."""
    stride = tl.load(fields + 3)
    if ALIGNED:
        stride = tl.multiple_of(stride, 128 // DTYPE.primitive_bitwidth)
    return stride


@triton.jit
def products_of_program(vectors, rank, VECTORS: tl.constexpr, RANKS: tl.constexpr):
    """What a program multiplies: a chunk, some vectors (a column), and a block of rows of the basis."""
    rank_blocks = tl.cdiv(rank, RANKS)
    rank_block = tl.program_id(0) % rank_blocks
    chunk, vector = chunk_and_vectors(tl.program_id(0) // rank_blocks, vectors, VECTORS)
    return chunk, vector, rank_block


@triton.jit
def chunk_and_vectors(place, vectors, VECTORS: tl.constexpr):
    blocks = tl.cdiv(vectors, VECTORS)
    return place // blocks, (place % blocks * VECTORS + tl.arange(0, VECTORS))[:, None]


@triton.jit
def elements_of(pieces, piece_of, chunk, CHUNK: tl.constexpr):
    """The piece of a chunk in the table: its entry, its columns, the first element of the chunk, and all elements."""
    entry = pieces + tl.load(piece_of + chunk).to(tl.int64) * 11
    cols = tl.load(entry + 2)
    return entry, cols, (chunk - tl.load(entry)) * CHUNK, tl.load(entry + 1) * cols


@triton.jit
def dot_kernel(
    pieces,
    piece_of,
    partial,
    vectors,
    rank,
    GRAD: tl.constexpr,
    BASIS: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    VECTORS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Dot products of some vectors with some rows of the basis over one chunk."""
    chunk, vector, rank_block = products_of_program(vectors, rank, VECTORS, RANKS)
    entry, cols, start, count = elements_of(pieces, piece_of, chunk, CHUNK)
    row = (rank_block * RANKS + tl.arange(0, RANKS))[:, None]
    grad_lead = lead_of(entry + 3, GRAD, ALIGNED)
    basis_lead = lead_of(entry + 7, BASIS, ALIGNED)
    end = tl.minimum(start + CHUNK, count)
    total = tl.zeros((VECTORS, RANKS), dtype=tl.float64)
    for block in range(start, end, BLOCK):
        sums = tl.zeros((VECTORS, RANKS, SPAN), dtype=ARITHMETIC)
        for first in range(block, tl.minimum(block + BLOCK, end), SPAN):
            element = (first + tl.arange(0, SPAN))[None, :]
            g_place = operand(entry + 3, element, cols, GRAD, UNIT, ALIGNED) + vector.to(tl.int64) * grad_lead
            q_place = operand(entry + 7, element, cols, BASIS, UNIT, ALIGNED) + row.to(tl.int64) * basis_lead
            # A mask that may end anywhere would narrow every access to one element: full spans go without.
            if first + SPAN <= count:
                g = tl.load(g_place, mask=vector < vectors, other=0)
                q = tl.load(q_place, mask=row < rank, other=0)
            else:
                g = tl.load(g_place, mask=(vector < vectors) & (element < count), other=0)
                q = tl.load(q_place, mask=(row < rank) & (element < count), other=0)
            sums += g.to(ARITHMETIC)[:, None, :] * q.to(ARITHMETIC)[None, :, :]
        total += tl.sum(sums.to(tl.float64), axis=2)
    row = rank_block * RANKS + tl.arange(0, RANKS)[None, :]
    place = partial + chunk.to(tl.int64) * vectors * rank + vector.to(tl.int64) * rank + row
    tl.store(place, total, mask=(vector < vectors) & (row < rank))


@triton.jit
def update_kernel(
    pieces,
    piece_of,
    coefficients,
    vectors,
    rank,
    GRAD: tl.constexpr,
    BASIS: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
    VECTORS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Takes the combination of the rows of the basis out of some vectors, over one chunk."""
    chunk, vector = chunk_and_vectors(tl.program_id(0), vectors, VECTORS)
    entry, cols, start, count = elements_of(pieces, piece_of, chunk, CHUNK)
    grad_lead = lead_of(entry + 3, GRAD, ALIGNED)
    basis_lead = lead_of(entry + 7, BASIS, ALIGNED)
    for first in range(start, tl.minimum(start + CHUNK, count), SPAN):
        element = (first + tl.arange(0, SPAN))[None, :]
        g_place = operand(entry + 3, element, cols, GRAD, UNIT, ALIGNED) + vector.to(tl.int64) * grad_lead
        q_place = operand(entry + 7, element, cols, BASIS, UNIT, ALIGNED)
        full = first + SPAN <= count
        sums = tl.zeros((VECTORS, RANKS, SPAN), dtype=ARITHMETIC)
        for start_rank in range(0, rank, RANKS):
            row = start_rank + tl.arange(0, RANKS)
            c_place = coefficients + vector.to(tl.int64) * rank + row[None, :]
            c = tl.load(c_place, mask=(vector < vectors) & (row[None, :] < rank), other=0)
            row = row[:, None]
            if full:
                q = tl.load(q_place + row.to(tl.int64) * basis_lead, mask=row < rank, other=0)
            else:
                inside = (row < rank) & (element < count)
                q = tl.load(q_place + row.to(tl.int64) * basis_lead, mask=inside, other=0)
            sums += c[:, :, None] * q.to(ARITHMETIC)[None, :, :]
        part = tl.sum(sums, axis=1)
        if full:
            g = tl.load(g_place, mask=vector < vectors)
            tl.store(g_place, (g.to(ARITHMETIC) - part).to(GRAD), mask=vector < vectors)
        else:
            inside = (vector < vectors) & (element < count)
            g = tl.load(g_place, mask=inside)
            tl.store(g_place, (g.to(ARITHMETIC) - part).to(GRAD), mask=inside)


@triton.jit
def fold_kernel(partial, coefficients, chunks, outputs, BLOCK_CHUNKS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr):
    """Adds the chunks' partial dot products in order."""
    output = (tl.program_id(0).to(tl.int64) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS))[None, :]
    total = tl.zeros((BLOCK_CHUNKS, BLOCK_OUTPUTS), dtype=tl.float64)
    for start in range(0, chunks, BLOCK_CHUNKS):
        chunk = (start + tl.arange(0, BLOCK_CHUNKS))[:, None]
        inside = (chunk < chunks) & (output < outputs)
        total += tl.load(partial + chunk.to(tl.int64) * outputs + output, mask=inside, other=0)
    place = coefficients + tl.program_id(0).to(tl.int64) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    sums = tl.sum(total, axis=0).to(coefficients.dtype.element_ty)
    tl.store(place, sums, mask=tl.program_id(0).to(tl.int64) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS) < outputs)


@triton.jit
def matrix_dot_kernel(
    pieces,
    piece_of,
    partial,
    vectors,
    rank,
    GRAD: tl.constexpr,
    BASIS: tl.constexpr,
    FACTOR: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    VECTORS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Like dot_kernel, as products of tiles."""
    chunk, vector, rank_block = products_of_program(vectors, rank, VECTORS, RANKS)
    entry, cols, start, count = elements_of(pieces, piece_of, chunk, CHUNK)
    end = tl.minimum(start + CHUNK, count)
    row = (rank_block * RANKS + tl.arange(0, RANKS))[:, None]
    grad_lead = lead_of(entry + 3, GRAD, ALIGNED)
    basis_lead = lead_of(entry + 7, BASIS, ALIGNED)
    total = tl.zeros((VECTORS, RANKS), dtype=tl.float64)
    # A mask that may end anywhere would narrow every access to one element: full spans go without.
    full = start + (end - start) // SPAN * SPAN
    for block in range(start, full, BLOCK):
        sums = tl.zeros((VECTORS, RANKS), dtype=tl.float32)
        for first in range(block, tl.minimum(block + BLOCK, full), SPAN):
            element = (first + tl.arange(0, SPAN))[None, :]
            g_place = operand(entry + 3, element, cols, GRAD, UNIT, ALIGNED) + vector.to(tl.int64) * grad_lead
            q_place = operand(entry + 7, element, cols, BASIS, UNIT, ALIGNED) + row.to(tl.int64) * basis_lead
            g = tl.load(g_place, mask=vector < vectors, other=0).to(FACTOR)
            q = tl.load(q_place, mask=row < rank, other=0).to(FACTOR)
            sums = tl.dot(g, tl.trans(q), sums, input_precision="ieee")
        total += sums.to(tl.float64)
    if full < end:
        element = (full + tl.arange(0, SPAN))[None, :]
        g_place = operand(entry + 3, element, cols, GRAD, UNIT, ALIGNED) + vector.to(tl.int64) * grad_lead
        q_place = operand(entry + 7, element, cols, BASIS, UNIT, ALIGNED) + row.to(tl.int64) * basis_lead
        g = tl.load(g_place, mask=(vector < vectors) & (element < count), other=0).to(FACTOR)
        q = tl.load(q_place, mask=(row < rank) & (element < count), other=0).to(FACTOR)
        total += tl.dot(g, tl.trans(q), input_precision="ieee").to(tl.float64)
    row = rank_block * RANKS + tl.arange(0, RANKS)[None, :]
    place = partial + chunk.to(tl.int64) * vectors * rank + vector.to(tl.int64) * rank + row
    tl.store(place, total, mask=(vector < vectors) & (row < rank))


@triton.jit
def matrix_update_kernel(
    pieces,
    piece_of,
    coefficients,
    vectors,
    rank,
    GRAD: tl.constexpr,
    BASIS: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTORS: tl.constexpr,
    RANKS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Like update_kernel, as products of tiles."""
    chunk, vector = chunk_and_vectors(tl.program_id(0), vectors, VECTORS)
    entry, cols, start, count = elements_of(pieces, piece_of, chunk, CHUNK)
    grad_lead = lead_of(entry + 3, GRAD, ALIGNED)
    basis_lead = lead_of(entry + 7, BASIS, ALIGNED)
    for first in range(start, tl.minimum(start + CHUNK, count), COLS):
        element = (first + tl.arange(0, COLS))[None, :]
        g_place = operand(entry + 3, element, cols, GRAD, UNIT, ALIGNED) + vector.to(tl.int64) * grad_lead
        q_place = operand(entry + 7, element, cols, BASIS, UNIT, ALIGNED)
        # A mask that may end anywhere would narrow every access to one element: full tiles go without.
        if first + COLS <= count:
            matrix_update(g_place, q_place, coefficients, vector, vectors, rank, basis_lead, None, RANKS, COLS)
        else:
            matrix_update(
                g_place, q_place, coefficients, vector, vectors, rank, basis_lead, element < count, RANKS, COLS
            )


@triton.jit
def matrix_update(
    g_place,
    q_place,
    coefficients,
    vector,
    vectors,
    rank,
    basis_lead,
    inside,
    RANKS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One tile; ``inside`` says which columns are in the chunk, ``None`` that all are."""
    part = tl.zeros((vector.shape[0], COLS), dtype=tl.float32)
    for start_rank in range(0, rank, RANKS):
        row = start_rank + tl.arange(0, RANKS)
        c_place = coefficients + vector.to(tl.int64) * rank + row[None, :]
        c = tl.load(c_place, mask=(vector < vectors) & (row[None, :] < rank), other=0)
        live = row[:, None] < rank
        if inside is not None:
            live = live & inside
        q = tl.load(q_place + row[:, None].to(tl.int64) * basis_lead, mask=live, other=0)
        part = tl.dot(c, q.to(tl.float32), part, input_precision="ieee")
    live = vector < vectors
    if inside is not None:
        live = live & inside
    g = tl.load(g_place, mask=live)
    tl.store(g_place, (g.to(tl.float32) - part).to(g.dtype), mask=live)

"""Rows v of `vectors` become orthonormal, and orthogonal to the rows of `basis`     vectors [m, n], basis [known, n]

Method       Block classical Gram-Schmidt with reorthogonalisation (Barlow and Smoktunowicz 2013), blocks of eight
             rows.  First sweep: take out the basis and the rows before, then factor the block's own Gram matrix and
             apply the inverse factor (Cholesky QR).  Second sweep: the same once more on unit vectors, which brings the
             loss of orthogonality to the unit roundoff whatever the condition of `vectors`.
Dropped      rows with |rest| <= rtol * |v|, and rows that the second sweep shrinks below 1/sqrt(2) (Kahan and Parlett):
             what is left of those is rounding noise, which must not be normalised into a direction.
Arithmetic   Gram matrices of blocks, their factors and the products with them in float64, where products of float32 are
             exact: squares of lengths down to 1e-7 keep a digit or more.  float64 vectors have no wider format: their
             blocks are single rows.  Rows are stored in their own dtype between sweeps.
Bytes moved  a block reads the rows before it four times, as in csrc/cpu/orthonormalize.cpp.
Bound by     memory bandwidth, and launches for short vectors; not measured on a device.
Design       Decisions stay on the device: a dropped row becomes zeros, which later rows can be projected on without
             harm.  The host waits twice a call: for the lengths, because NaN must raise before anything is written, and
             at the end for the rows that were kept, which then move up.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpa_ext.triton.launching import arithmetic, bits, ceil_div, on_device_of, written
from hpa_ext.triton.project import project_

BLOCK_ROWS = 8
CHUNK = 4096  # elements of a row that a program adds up
APPLY_COLS = 128
FOLD_CHUNKS = 32


def orthonormalize_(vectors: Tensor, basis: Tensor | None, rtol: float) -> int:
    rows = vectors.shape[0]
    if vectors.numel() == 0:
        return 0
    lengths = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        if not math.isfinite(length):
            raise ValueError(f"vectors: row {row} contains NaN or Inf")
    kept = torch.empty(rows, dtype=torch.int32, device=vectors.device)
    size = 1 if vectors.dtype == torch.float64 else BLOCK_ROWS
    with on_device_of(vectors):
        for start in range(0, rows, size):
            block, before = vectors[start : start + size], vectors[:start]
            for sweep in (1, 2):
                if basis is not None:
                    project_([block], [basis], 1)
                project_([block], [before], 1)
                _orthonormalize_block(block, lengths[start:], kept[start:], rtol, sweep, size)
    kept_rows = [row for row, keep in enumerate(kept.tolist()) if keep]
    for target, row in enumerate(kept_rows):
        if target != row:
            vectors[target].copy_(vectors[row])
    vectors[len(kept_rows) :].zero_()
    written(vectors)
    return len(kept_rows)


def _orthonormalize_block(block: Tensor, lengths: Tensor, kept: Tensor, rtol: float, sweep: int, size: int) -> None:
    rows, n = block.shape
    chunks = ceil_div(n, CHUNK)
    partial = torch.empty(chunks, size, size, dtype=torch.float64, device=block.device)
    transform = torch.empty(size, size, dtype=torch.float64, device=block.device)
    gram_kernel[(chunks,)](
        block,
        partial,
        rows,
        n,
        *block.stride(),
        ARITHMETIC=arithmetic(block),
        CHUNK=CHUNK,
        SPAN=4096 // size**2,
        SIZE=size,
        num_warps=4,
    )
    factor_kernel[(1,)](
        partial,
        transform,
        lengths,
        kept,
        bits(rtol),
        chunks,
        rows,
        SECOND=sweep == 2,
        SIZE=size,
        FOLD=FOLD_CHUNKS,
        num_warps=1,
    )
    apply_kernel[(ceil_div(n, APPLY_COLS),)](
        block,
        transform,
        rows,
        n,
        *block.stride(),
        ARITHMETIC=arithmetic(block),
        SIZE=size,
        COLS=APPLY_COLS,
        num_warps=4,
    )


@triton.jit
def gram_kernel(
    block,
    partial,
    rows,
    n,
    row_stride,
    col_stride,
    ARITHMETIC: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The block's Gram matrix over one chunk of elements."""
    chunk = tl.program_id(0)
    row = tl.arange(0, SIZE)[:, None]
    sums = tl.zeros((SIZE, SIZE, SPAN), dtype=tl.float64)
    for span in range(CHUNK // SPAN):
        col = (chunk.to(tl.int64) * CHUNK + span * SPAN + tl.arange(0, SPAN))[None, :]
        place = block + row.to(tl.int64) * row_stride + col * col_stride
        v = tl.load(place, mask=(row < rows) & (col < n), other=0).to(ARITHMETIC).to(tl.float64)
        sums += v[:, None, :] * v[None, :, :]
    place = partial + chunk * (SIZE * SIZE) + row * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(place, tl.sum(sums, axis=2))


@triton.jit(do_not_specialize=["rtol_bits"])
def factor_kernel(
    partial,
    transform,
    lengths,
    kept,
    rtol_bits: tl.int64,
    chunks,
    rows,
    SECOND: tl.constexpr,
    SIZE: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Inverse Cholesky factor of the block's Gram matrix by elimination, row by row; dropped rows become zero."""
    row = tl.arange(0, SIZE)
    sums = tl.zeros((FOLD, SIZE, SIZE), dtype=tl.float64)
    for start in range(0, chunks, FOLD):
        chunk = (start + tl.arange(0, FOLD))[:, None, None]
        place = partial + chunk * (SIZE * SIZE) + row[None, :, None] * SIZE + row[None, None, :]
        sums += tl.load(place, mask=chunk < chunks, other=0)
    gram = tl.sum(sums, axis=0)
    on_diagonal = row[:, None] == row[None, :]
    inverse = tl.where(on_diagonal, 1.0, 0.0).to(tl.float64)
    whole = tl.sum(tl.where(on_diagonal, gram, 0.0), axis=0)
    length = tl.load(lengths + row, mask=row < rows, other=0)
    rtol = rtol_bits.to(tl.int64).to(tl.float64, bitcast=True)
    if SECOND:
        least = whole * 0.0 + 0.5
    else:
        # Where less than 1e-14 is left of a square, rounding of the Gram matrix may be all that is left.
        floor = 0.0 if SIZE == 1 else 1e-14
        least = tl.maximum(rtol * length * (rtol * length), whole * floor)
    keep = tl.zeros((SIZE,), dtype=tl.int32)
    for k in range(SIZE):
        this = row == k
        gram_row = tl.sum(tl.where(this[:, None], gram, 0.0), axis=0)
        inverse_row = tl.sum(tl.where(this[:, None], inverse, 0.0), axis=0)
        pivot = tl.sum(tl.where(this, gram_row, 0.0), axis=0)
        enough = (pivot > 0) & (pivot > tl.sum(tl.where(this, least, 0.0), axis=0))
        scale = tl.where(enough, 1.0 / tl.sqrt(tl.where(enough, pivot, 1.0)), 0.0)
        gram_row *= scale
        inverse_row *= scale
        below = tl.where(row > k, gram_row, 0.0)
        gram -= below[:, None] * gram_row[None, :]
        inverse -= below[:, None] * inverse_row[None, :]
        inverse = tl.where(this[:, None], inverse_row[None, :], inverse)
        keep = tl.where(this, enough.to(tl.int32), keep)
    tl.store(transform + row[:, None] * SIZE + row[None, :], inverse)
    tl.store(kept + row, keep, mask=row < rows)


@triton.jit
def apply_kernel(
    block,
    transform,
    rows,
    n,
    row_stride,
    col_stride,
    ARITHMETIC: tl.constexpr,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
):
    """block = transform @ block, for some columns."""
    row = tl.arange(0, SIZE)
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    place = block + row[:, None].to(tl.int64) * row_stride + col[None, :] * col_stride
    inside = (row[:, None] < rows) & (col[None, :] < n)
    v = tl.load(place, mask=inside, other=0).to(ARITHMETIC).to(tl.float64)
    t = tl.load(transform + row[:, None] * SIZE + row[None, :])
    product = tl.sum(t[:, :, None] * v[None, :, :], axis=1)
    # Another thread may still have to read what this one writes.
    tl.debug_barrier()
    tl.store(place, product.to(ARITHMETIC).to(block.dtype.element_ty), mask=inside)

"""gram[i, j] += scale * sum_t x[t, i] x[t, j],  j <= i                    gram [cols, cols], x [tokens, cols]

Arithmetic   float32 gram: products of bfloat16 and float16 values on matrix units, exact in float32; float32 values
             as float32, not TF32.  Sums in float32 over spans of 2048 tokens, and of those.  The scale is applied to
             sums, so that bfloat16 activations are not rounded a second time.  float64 gram: products of torch.
Bytes moved  each tile reads two panels of x, from the second-level cache where neighbours have just read them; gram's
             lower triangle read and written once a call.
Bound by     matrix units (float32 vector units for float32 x); not measured on a device.
Scratch      one float32 tile for each tile on or below the diagonal and each split of the tokens.
Design       The product is symmetric: one program for each tile on or below the diagonal, half the work of a full
             product.  Where columns give few tiles, splits of the tokens make more programs.  Sums go to scratch and a
             second kernel adds them to gram in order: adding in place would spill registers of the product's loop.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpa_ext.triton.launching import bits, ceil_div, on_device_of, written

SPAN = 2048  # tokens summed before a sum is set aside
PROGRAMS = 512  # that keep a GPU busy
LIBRARY_COLS = 1024  # columns and tokens of a product in float64
LIBRARY_TOKENS = 16384


def accumulate_gram_(gram: Tensor, x: Tensor, scale: float) -> None:
    tokens, cols = x.shape
    if x.numel() == 0:
        return
    if gram.dtype == torch.float64:
        _accumulate_float64(gram, x, scale)
        return
    block, block_tokens, num_warps = _tile(x.dtype, cols)
    blocks = ceil_div(cols, block)
    tiles = blocks * (blocks + 1) // 2
    splits = min(max(PROGRAMS // tiles, 1), ceil_div(tokens, SPAN))
    per_split = ceil_div(ceil_div(tokens, splits), block_tokens) * block_tokens
    splits = ceil_div(tokens, per_split)
    partial = torch.empty(splits * tiles * block * block, dtype=torch.float32, device=x.device)
    with on_device_of(gram):
        gram_kernel[(tiles, splits)](
            partial,
            x,
            tokens,
            cols,
            per_split,
            *x.stride(),
            SPAN=SPAN,
            BLOCK=block,
            BLOCK_TOKENS=block_tokens,
            num_warps=num_warps,
            num_stages=2 if torch.version.hip else 3,
        )
        fold_kernel[(tiles,)](
            gram, partial, bits(scale), cols, splits, *gram.stride(), BLOCK=block, num_warps=block // 8
        )
    written(gram)


def _tile(dtype: torch.dtype, cols: int) -> tuple[int, int, int]:
    """Columns and tokens of a tile, and its warps: vector units (float32) and small matrices want smaller ones."""
    if dtype == torch.float32 or cols <= 1024:
        return 64, 32, 4
    return 128, 64, 8


def _accumulate_float64(gram: Tensor, x: Tensor, scale: float) -> None:
    """By panels of columns, from the diagonal down."""
    for start in range(0, gram.shape[0], LIBRARY_COLS):
        panel = gram[start:, start : start + LIBRARY_COLS]
        width = panel.shape[1]
        lower = torch.ones(width, width, dtype=torch.bool, device=gram.device).tril_()
        for rows in x.split(LIBRARY_TOKENS):
            product = rows[:, start:].double().T @ rows[:, start : start + width].double()
            top = panel[:width]
            top.copy_(torch.where(lower, top + scale * product[:width], top))
            panel[width:].add_(product[width:], alpha=scale)


@triton.jit
def triangle_tile(tile):
    """Row and column of a tile where tiles on and below the diagonal are counted row by row."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def gram_kernel(
    partial,
    x,
    tokens,
    cols,
    per_split,
    x_row_stride,
    x_col_stride,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    block_row, block_col = triangle_tile(tile)
    left = block_row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    right = block_col.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = split.to(tl.int64) * per_split
    last = tl.minimum(first + per_split, tokens)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for span in range(first, last, SPAN):
        sums = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(span, tl.minimum(span + SPAN, last), BLOCK_TOKENS):
            token = (start + tl.arange(0, BLOCK_TOKENS))[:, None]
            here = x + token * x_row_stride
            a = tl.load(here + left[None, :] * x_col_stride, mask=(token < last) & (left[None, :] < cols), other=0)
            b = tl.load(here + right[None, :] * x_col_stride, mask=(token < last) & (right[None, :] < cols), other=0)
            sums = tl.dot(tl.trans(a), b, sums, input_precision="ieee")
        total += sums
    own = (split * tl.num_programs(0) + tile).to(tl.int64) * (BLOCK * BLOCK)
    tl.store(partial + own + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], total)


@triton.jit(do_not_specialize=["scale_bits"])
def fold_kernel(
    gram, partial, scale_bits: tl.int64, cols, splits, gram_row_stride, gram_col_stride, BLOCK: tl.constexpr
):
    tile = tl.program_id(0)
    block_row, block_col = triangle_tile(tile)
    row = (block_row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    col = (block_col.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for split in range(splits):
        own = (split * tl.num_programs(0) + tile).to(tl.int64) * (BLOCK * BLOCK)
        total += tl.load(partial + own + place)
    place = gram + row * gram_row_stride + col * gram_col_stride
    scaled = total * scale_bits.to(tl.int64).to(tl.float64, bitcast=True).to(tl.float32)
    # The mask of a triangle would narrow every access to one element: tiles below the diagonal go without.
    if block_row == block_col:
        lower = (row >= col) & (row < cols)
        tl.store(place, tl.load(place, mask=lower) + scaled, mask=lower)
    else:
        inside = (row < cols) & (col < cols)
        tl.store(place, tl.load(place, mask=inside) + scaled, mask=inside)

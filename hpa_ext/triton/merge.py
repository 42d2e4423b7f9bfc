"""after[:, j] = before[:, j] where mask[j], after[:, j] - projection * before[:, j] elsewhere
                                                      after, before [rows, cols], mask bool [cols], in place

Arithmetic   float32 (float64 for float64), rounded once; kept columns and, without a projection, all others keep
             their bits: they never leave their dtype.
Bytes moved  the minimum for a mask without structure: both weights read once, one written once.
Bound by     memory bandwidth; not measured on a device.
Design       One program a tile of about 4096 elements, wide in the direction of columns, so that the mask is read
             once for several rows.  Kept columns could skip reading ``after``, but a mask of scattered columns touches
             nearly every 32-byte sector anyway, and unconditional accesses stay 128 bits wide.
"""

import triton
import triton.language as tl
from torch import Tensor

from hpa_ext.triton.launching import arithmetic, bits, ceil_div, on_device_of, power_of_2, written

ELEMENTS = 4096


def merge_(after: Tensor, before: Tensor, mask: Tensor, projection: float) -> None:
    rows, cols = after.shape
    if after.numel() == 0:
        return
    block_cols = power_of_2(cols, 16, 1024)
    block_rows = power_of_2(rows, 1, ELEMENTS // block_cols)
    with on_device_of(after):
        merge_kernel[(ceil_div(rows, block_rows) * ceil_div(cols, block_cols),)](
            after,
            before,
            mask,
            bits(projection),
            rows,
            cols,
            *after.stride(),
            *before.stride(),
            mask.stride(0),
            PROJECT=projection != 0.0,
            ARITHMETIC=arithmetic(after),
            BLOCK_ROWS=block_rows,
            BLOCK_COLS=block_cols,
            num_warps=4,
        )
    written(after)


@triton.jit(do_not_specialize=["projection_bits"])
def merge_kernel(
    after,
    before,
    mask,
    projection_bits: tl.int64,
    rows,
    cols,
    after_row_stride,
    after_col_stride,
    before_row_stride,
    before_col_stride,
    mask_stride,
    PROJECT: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    col_blocks = tl.cdiv(cols, BLOCK_COLS)
    tile = tl.program_id(0)
    row = (tile // col_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = (tile % col_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    inside = (row < rows) & (col < cols)
    keep = tl.load(mask + col * mask_stride, mask=col < cols, other=0) != 0
    old = tl.load(before + row * before_row_stride + col * before_col_stride, mask=inside)
    place = after + row * after_row_stride + col * after_col_stride
    new = tl.load(place, mask=inside)
    if PROJECT:
        coefficient = projection_bits.to(tl.int64).to(tl.float64, bitcast=True).to(ARITHMETIC)
        new = (new.to(ARITHMETIC) - coefficient * old.to(ARITHMETIC)).to(new.dtype)
    tl.store(place, tl.where(keep, old, new), mask=inside)

"""out[j] = [(G + lambda I)^-1]_jj              "exact"       lambda = damping * mean(diag G)
out[j] = U_jj^2,  (G + lambda I)^-1 = U^T U  "pivot"       G [cols, cols] or scale * x^T x, x [tokens, cols]

Method       torch's Cholesky factorisation and triangular solve (cuSOLVER, rocSOLVER), with routes, limits and formulas
             of csrc/cpu/inverse_diagonal.cpp: column norms of the inverse factor for the exact diagonal, a
             tokens x tokens system where tokens < 0.8 cols, the reversed factor for pivots.
Arithmetic   float64 for float64 input, for at most 1024 columns, and for few tokens; else float32.
Scratch      one cols^2 matrix, and for the exact diagonal a copy of the part of it below the current panel.
Design       One kernel reads the lower triangle once and writes the matrix to be factored: damped, reversed if need be,
             in the layout the solver wants (row-major lower is column-major upper), with a flag for NaN and Inf.  The
             answer is a Python number, so the host waits once for the factorisation, and once more for few tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpa_ext.triton.accumulate_gram import accumulate_gram_, triangle_tile
from hpa_ext.triton.launching import ceil_div, on_device_of, wide

SMALL = 1024  # columns up to which float32 matrices are factored in float64
LOW_RANK_SHARE = 0.8  # tokens / cols below which the low-rank route does less work
LEAST_REMAINDER = 1e-8  # smallest 1 - |.|^2 that float64 still resolves to 1e-7 or so
PANEL = 512  # right-hand sides that are solved for together
BLOCK = 64


def inverse_diagonal(
    gram: Tensor | None, activations: Tensor | None, scale: float, damping: float, mode: str
) -> tuple[Tensor | None, float, str]:
    if gram is not None:
        return _dense(gram, damping, mode, "gram", wide(gram))
    assert activations is not None
    tokens, cols = activations.shape
    if mode == "exact" and tokens < LOW_RANK_SHARE * cols:
        diagonal, lam = _low_rank(activations, scale, damping)
        if diagonal is not None or not lam > 0:
            return diagonal, lam, "low_rank" if diagonal is not None else "dense"
    product = torch.zeros(cols, cols, dtype=_precision(activations, cols), device=activations.device)
    accumulate_gram_(product, activations, scale)
    return _dense(product, damping, mode, "activations", wide(activations))


def _precision(given: Tensor, cols: int) -> torch.dtype:
    return torch.float64 if given.dtype == torch.float64 or cols <= SMALL else torch.float32


def _dense(gram: Tensor, damping: float, mode: str, name: str, dtype: torch.dtype) -> tuple[Tensor | None, float, str]:
    cols = gram.shape[0]
    lam = damping * gram.diagonal().double().mean()
    matrix = torch.empty(cols, cols, dtype=_precision(gram, cols), device=gram.device)
    blocks = ceil_div(cols, BLOCK)
    tiles = blocks * (blocks + 1) // 2
    finite = torch.empty(tiles, dtype=torch.int32, device=gram.device)
    with on_device_of(gram):
        damp_kernel[(tiles,)](
            gram, matrix, lam, finite, cols, *gram.stride(), REVERSED=mode == "pivot", BLOCK=BLOCK, num_warps=4
        )
        factor, failed = torch.linalg.cholesky_ex(matrix.T, upper=True)
        lam_value, failed_at, all_finite = torch.stack([lam, failed.double(), finite.min().double()]).tolist()
        if not all_finite:
            raise ValueError(f"{name}: contains NaN or Inf")
        if failed_at != 0 or not lam_value > 0:
            return None, lam_value, "dense"
        lower = factor.T
        if mode == "pivot":
            diagonal = lower.diagonal().flip(0).square().reciprocal()
        else:
            diagonal = _inverse_column_norms(lower)
    return diagonal.to(dtype), lam_value, "dense"


def _inverse_column_norms(lower: Tensor) -> Tensor:
    """``|L^-1 e_j|^2`` for every j: panels of unit vectors, from their first row down."""
    cols = lower.shape[0]
    out = torch.empty(cols, dtype=torch.float64, device=lower.device)
    for start in range(0, cols, PANEL):
        stop = min(start + PANEL, cols)
        units = torch.eye(cols - start, stop - start, dtype=lower.dtype, device=lower.device)
        solved = torch.linalg.solve_triangular(lower[start:, start:], units, upper=False)
        out[start:stop] = torch.linalg.vector_norm(solved, dim=0, dtype=torch.float64).square()
    return out


def _low_rank(activations: Tensor, scale: float, damping: float) -> tuple[Tensor | None, float]:
    """``(1 - |L^-1 Y_j|^2) / lambda`` with ``Y = sqrt(scale) x``, ``L L^T = lambda I + Y Y^T``; ``None`` if too little
    is left of the difference."""
    cols = activations.shape[1]
    rows = activations.double() * scale**0.5
    lam = damping * rows.square().sum() / cols
    system = rows @ rows.T
    system.diagonal().add_(lam)
    factor, failed = torch.linalg.cholesky_ex(system)
    finite = rows.isfinite().all()
    lam_value, failed_at, all_finite = torch.stack([lam, failed.double(), finite.double()]).tolist()
    if not all_finite:
        raise ValueError("activations: contains NaN or Inf")
    if failed_at != 0 or not lam_value > 0:
        return None, lam_value
    solved = torch.linalg.solve_triangular(factor, rows, upper=False)
    left = 1 - solved.square().sum(0)
    if float(left.min()) < LEAST_REMAINDER:
        return None, lam_value
    return (left / lam_value).to(wide(activations)), lam_value


@triton.jit
def damp_kernel(gram, matrix, lam, finite, cols, row_stride, col_stride, REVERSED: tl.constexpr, BLOCK: tl.constexpr):
    """Writes ``G + lambda I``, lower triangle; above it, within blocks on the diagonal, zeros."""
    tile = tl.program_id(0)
    block_row, block_col = triangle_tile(tile)
    row = (block_row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    col = (block_col.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    lower = (row >= col) & (row < cols)
    value = tl.load(gram + row * row_stride + col * col_stride, mask=lower, other=0).to(tl.float64)
    # x - x is zero for finite x alone.
    bad = tl.where(lower & (value - value != 0), 1, 0)
    tl.store(finite + tile, 1 - tl.max(tl.max(bad, axis=1), axis=0))
    value = tl.where(row == col, value + tl.load(lam), value)
    value = value.to(matrix.dtype.element_ty)
    if REVERSED:
        place = matrix + (cols - 1 - col) * cols + (cols - 1 - row)
    else:
        place = matrix + row * cols + col
    tl.store(place, value, mask=lower)

"""accumulate_gram_: bound by arithmetic for many tokens, by passing over the lower half of gram for a few."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import hand_written
import torch
from harness import COMPILED, OURS, TORCH, Case
from scipy.linalg import blas
from shapes import BOTH, short
from torch import Tensor

import hpa_ext
from hpa_ext import backend

# Without it torch multiplies bfloat16 matrices in a plain loop, thirty times slower than the slowest row here.
FAST_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def ssyrk(gram: Tensor, x: Tensor, scale: float = 2.0) -> None:
    """The symmetric product of BLAS; a row-major lower triangle is its column-major upper one."""
    rows = x.float().numpy()
    blas.ssyrk(scale, rows.T, beta=1.0, c=gram.numpy().T, trans=0, lower=0, overwrite_c=1)


def lower(_: object, gram: Tensor, x: Tensor) -> list[Tensor]:
    return [gram.tril()]


def cases(shrink: int = 1) -> Iterator[Case]:
    cols = 4096 // shrink
    for tokens in (2048, 128, 32, 8, 1):
        for dtype in BOTH:
            tokens_here = max(1, tokens // shrink)
            contenders = {OURS: hpa_ext.accumulate_gram_, TORCH: hand_written.accumulate_gram_, "ssyrk": ssyrk}
            if dtype != torch.float32 and FAST_BFLOAT16:
                contenders[f"torch {short(dtype)} mm"] = hand_written.accumulate_gram_low_precision_
            yield Case(
                kernel="accumulate_gram_",
                case=f"{cols} columns, {tokens_here} tokens {short(dtype)}",
                inputs=partial(inputs, cols, tokens_here, dtype),
                contenders=contenders,
                compiled=hand_written.accumulate_gram_ if tokens == 2048 else None,
                result=lower,
                tolerance=1e-5 if dtype == torch.float32 else 2e-2,
                bytes_moved=cols * (cols + 1) / 2 * 4 * 2 + tokens_here * cols * dtype.itemsize,
                memory="scale",
                flops=tokens_here * cols * (cols + 1),
                arithmetic=short(dtype),
                targets=targets(dtype) if tokens == 2048 else {},
                level=level(tokens, dtype),
            )


def inputs(cols: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(cols, cols), torch.randn(tokens, cols).to(dtype)


def targets(dtype: torch.dtype) -> dict[str, float]:
    if dtype == torch.float32:
        return {TORCH: 1.7, COMPILED: 1.7, "ssyrk": 1.0}
    return {TORCH: 5, "torch bf16 mm": 2.5} if backend.extension().isa() == "amx" else {TORCH: 1.7, "ssyrk": 1.0}


def level(tokens: int, dtype: torch.dtype) -> str:
    if tokens in (2048, 8) and dtype == torch.bfloat16:
        return "quick"
    return "default" if tokens == 2048 or dtype == torch.bfloat16 else "full"

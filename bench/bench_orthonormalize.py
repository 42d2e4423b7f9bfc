"""orthonormalize_: two rounds of Gram matrix and triangular update, 4 n rank^2 flops, as many as a QR with its Q."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import hand_written
import scipy.linalg
import torch
from harness import OURS, TORCH, Case
from torch import Tensor

import hpa_ext

RANK = 64


def cases(shrink: int = 1) -> Iterator[Case]:
    for size, level in ((2**17, "quick"), (2**20, "default")):
        n = size // shrink
        yield Case(
            kernel="orthonormalize_",
            case=f"{RANK}x{n} fp32",
            inputs=partial(inputs, n),
            contenders={
                OURS: lambda vectors, start: hpa_ext.orthonormalize_(vectors),
                TORCH: lambda vectors, start: hand_written.orthonormalize(vectors),
                "geqrf + orgqr": lambda vectors, start: qr(vectors),
            },
            result=spanned,
            tolerance=1e-5,
            reset=lambda vectors, start: vectors.copy_(start),
            flops=4 * n * RANK**2,
            bytes_moved=2 * RANK * n * 4,
            memory="scale",
            targets={TORCH: 8} if size == 2**20 else {},
            level=level,
        )


def inputs(n: int) -> tuple[Tensor, Tensor]:
    start = torch.randn(RANK, n)
    return start.clone(), start


def qr(vectors: Tensor) -> Tensor:
    """LAPACK on the column-major matrix that row-major vectors are, in place."""
    q, _ = scipy.linalg.qr(vectors.numpy().T, mode="economic", overwrite_a=True, check_finite=False)
    return torch.from_numpy(q.T)


def spanned(returned: Any, vectors: Tensor, start: Tensor) -> list[Tensor]:
    """The part of the input in the span of the basis: all of it, for every orthonormal basis of that span."""
    basis = (returned if isinstance(returned, Tensor) else vectors).double()
    return [start.double() @ basis.t() @ basis]

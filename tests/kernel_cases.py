"""Inputs and tolerances that the kernel tests share.

Inputs are made on the CPU, so that they are the same everywhere, and lie on torch's default device: the fixtures
``device`` and ``backend`` of ``conftest.py`` make that a GPU where a test is to run on one.

``HPA_TEST_SEED=7`` gives all random inputs other values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

SEED = int(os.environ.get("HPA_TEST_SEED", "0"))

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NARROW = (torch.float32, torch.bfloat16, torch.float16)

# Sizes around the widths of registers, panels and blocks, and the degenerate ones.
SIZES = (0, 1, 2, 3, 7, 16, 31, 48, 49, 97, 130)

# Unit roundoff of the arithmetic: float32 for the narrow types, float64 for float64.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24, torch.float64: 2.0**-53}

# Half a unit in the last place of the storage, relative, and the smallest step of a subnormal number.
STORAGE = {
    torch.float32: (2.0**-24, 2.0**-149),
    torch.bfloat16: (2.0**-8, 2.0**-133),
    torch.float16: (2.0**-11, 2.0**-24),
    torch.float64: (2.0**-53, 2.0**-1074),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * SEED)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale
    return values.to(dtype).to(torch.get_default_device())


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * SEED)
    values = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(dtype).to(torch.get_default_device())


def orthonormal_rows(rank: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    if rank == 0 or n == 0:
        return torch.zeros(rank, n, dtype=dtype)
    return torch.linalg.qr(normal(n, rank, seed=seed, dtype=torch.float64))[0].T.contiguous().to(dtype)


def padded_rows(tensor: Tensor) -> Tensor:
    """The same values with room between rows."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), math.nan, dtype=tensor.dtype)
    view = wide[..., 2 : 2 + tensor.shape[-1]]
    return view.copy_(tensor)


def columns_first(tensor: Tensor) -> Tensor:
    """The same values with columns contiguous."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_other_column(tensor: Tensor) -> Tensor:
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan, dtype=tensor.dtype)
    return wide[..., ::2].copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.clone(memory_format=torch.contiguous_format),
    "padded_rows": padded_rows,
    "columns_first": columns_first,
    "every_other_column": every_other_column,
}


def f64(tensor: Tensor) -> np.ndarray:
    """A float64 copy."""
    return tensor.detach().cpu().to(torch.float64, copy=True).numpy()


def bits(tensor: Tensor) -> np.ndarray:
    """The stored bytes, so that NaN and signed zeros compare."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()


def assert_within(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray, bound: np.ndarray | float) -> None:
    """|actual - expected| <= bound, element by element; NaN and Inf must be in the same places."""
    left = f64(actual) if isinstance(actual, Tensor) else np.asarray(actual, dtype=np.float64)
    right = f64(expected) if isinstance(expected, Tensor) else np.asarray(expected, dtype=np.float64)
    assert left.shape == right.shape
    finite = np.isfinite(right)
    np.testing.assert_array_equal(left[~finite], right[~finite])
    excess = np.abs(left[finite] - right[finite]) - np.broadcast_to(bound, right.shape)[finite]
    assert np.isfinite(left[finite]).all()
    assert not (excess > 0).any(), (
        f"worst excess {excess.max():.3g}, differences up to {np.abs(left[finite] - right[finite]).max():.3g}"
    )


def rounded(value: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bound on the error of storing ``value``: half a unit in the last place."""
    relative, smallest = STORAGE[dtype]
    return relative * np.abs(value) + smallest

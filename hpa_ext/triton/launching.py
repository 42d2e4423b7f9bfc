"""What the callers of the kernels share: the device, the arithmetic, and numbers as kernel arguments."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

__all__ = ["TL", "arithmetic", "bits", "ceil_div", "on_device_of", "power_of_2", "wide", "written"]

TL = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on torch's current device and stream: this makes ``tensor``'s device the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def written(*tensors: Tensor) -> None:
    """Tells autograd that memory it may have saved has changed."""
    torch.autograd.graph.increment_version(tensors)


def wide(*tensors: Tensor) -> torch.dtype:
    """float64 where any tensor is, else float32: what results that are not stored in an argument's dtype come in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def arithmetic(*tensors: Tensor) -> Any:
    """The dtype that kernels compute in."""
    return TL[wide(*tensors)]


def bits(value: float) -> int:
    """A number as a kernel argument: Triton passes Python floats as float32, which would round it."""
    return int(struct.unpack("q", struct.pack("d", value))[0])


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def power_of_2(count: int, least: int, most: int) -> int:
    """The smallest power of two that is at least ``count``, within ``[least, most]`` (powers of two themselves)."""
    return max(least, min(most, 1 << max(count - 1, 0).bit_length()))

"""Checks that every public function shares: from what the caller passed to plain, detached torch tensors.

Nothing here copies data.  Torch tensors are detached (the view shares storage and version counter), anything else
that speaks DLPack becomes a torch view of the same memory.  A refusal is a ``TypeError`` (wrong kind of object or
dtype) or a ``ValueError`` (wrong shape, device, layout or value), and its message starts with the argument's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, SupportsIndex, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

__all__ = [
    "FLOATS",
    "SupportsDLPack",
    "TensorLike",
    "as_count",
    "as_number",
    "as_tensor",
    "as_tensor_list",
    "check_choice",
    "check_no_overlap",
    "check_same_device",
    "check_same_dtype",
    "check_same_shape",
    "check_writable_layout",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@runtime_checkable
class SupportsDLPack(Protocol):
    """An array of any library that exports its memory through the DLPack protocol."""

    def __dlpack__(self, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


TensorLike: TypeAlias = Tensor | SupportsDLPack


def as_tensor(
    name: str,
    value: TensorLike,
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    dims: str | None = None,
    writable: bool = False,
) -> Tensor:
    """Returns a detached torch view of ``value``.

    Args:
        name: the argument's name, for messages.
        value: torch tensor (also ``nn.Parameter``) or an object with ``__dlpack__``.
        dtypes: accepted dtypes.
        dims: expected dimensions, written like ``"[rows, cols]"``; a leading ``...`` takes any number. ``None``: any.
        writable: the function will write into it: read-only and self-overlapping memory is refused.

    Raises:
        TypeError: not a dense tensor, or a dtype that is not in ``dtypes``.
        ValueError: wrong number of dimensions, read-only, or overlapping itself.
    """
    if isinstance(value, Tensor):
        if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise TypeError(f"{name}: expected a plain tensor, got {type(value).__name__}; pass what it wraps")
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise TypeError(
                f"{name}: expected a plain tensor, got one that torch.func wraps (vmap, grad, jvp); call the function "
                "outside of the transform"
            )
        tensor = value.detach()
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
        if tensor.is_meta:
            raise TypeError(f"{name}: expected a tensor with data, got one on the meta device")
        if tensor.numel() > 0 and tensor.data_ptr() == 0:
            raise TypeError(f"{name}: expected a tensor with data, got one that only stands for its values")
        if tensor.is_neg():
            raise TypeError(f"{name}: expected a plain tensor, got a lazily negated view; call resolve_neg() first")
    else:
        tensor = _from_dlpack(name, value, writable)
    if tensor.dtype not in dtypes:
        accepted = ", ".join(_short(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {accepted}, got {_short(tensor.dtype)}")
    if dims is not None:
        _check_dims(name, tensor, dims)
    if writable:
        check_writable_layout(name, tensor)
    return tensor


def as_tensor_list(name: str, value: Any, *, writable: bool = False) -> list[Tensor]:
    """Like :func:`as_tensor`, for a list or tuple of tensors of any shapes."""
    return [as_tensor(f"{name}[{i}]", item, writable=writable) for i, item in enumerate(value)]


def as_count(name: str, value: SupportsIndex, minimum: int = 0) -> int:
    """Returns ``value`` as an int that is at least ``minimum``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    count = value.__index__()
    if count < minimum:
        raise ValueError(f"{name}: expected a whole number >= {minimum}, got {value!r}")
    return count


def as_number(name: str, value: float, *, minimum: float | None = None, strictly: bool = False) -> float:
    """Returns ``value`` as a finite float that is at least ``minimum`` (above it, if ``strictly``)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    if minimum is not None and (number < minimum or (strictly and number == minimum)):
        raise ValueError(f"{name}: expected a number {'>' if strictly else '>='} {minimum:g}, got {number:g}")
    return number


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name} {_shape(other)}, got {_shape(tensor)}")


def check_same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name}: expected the dtype of {other_name} ({_short(other.dtype)}), got {_short(tensor.dtype)}"
        )


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name} ({other.device}), got {tensor.device}")


def check_writable_layout(name: str, tensor: Tensor) -> None:
    """Refuses a tensor two elements of which may share memory (expanded, or strided over itself)."""
    if tensor.numel() <= 1 or tensor.is_contiguous():
        return
    reach = 0
    for stride, size in sorted((abs(s), n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            raise ValueError(
                f"{name}: expected memory of its own for each element, got shape {_shape(tensor)} with strides "
                f"{tensor.stride()}, where elements overlap; it is written to"
            )
        reach += stride * (size - 1)


def check_no_overlap(written: Sequence[tuple[str, Tensor]], read: Sequence[tuple[str, Tensor]]) -> None:
    """Refuses arguments that share memory, where at least one of the two is written to.

    Args:
        written: names and tensors that the function writes to.
        read: names and tensors that it only reads.
    """
    spans = [(*_extent(tensor), True, name, tensor) for name, tensor in written]
    spans += [(*_extent(tensor), False, name, tensor) for name, tensor in read]
    spans.sort(key=_start)
    furthest = -1  # where the memory of all that came before ends
    active: list[_Span] = []
    for span in spans:
        start, stop, is_written, name, tensor = span
        if start >= furthest:
            active.clear()
        for _, other_stop, other_written, other_name, other in active:
            if other_stop > start and (is_written or other_written) and not _interleaved(tensor, other):
                first, second = (name, other_name) if is_written else (other_name, name)
                raise ValueError(f"{first}: shares memory with {second}, but is written to; pass a copy of one of them")
        if stop > start:
            active.append(span)
            furthest = max(furthest, stop)


_Span: TypeAlias = tuple[int, int, bool, str, Tensor]


def _start(span: _Span) -> int:
    return span[0]


def _from_dlpack(name: str, value: Any, writable: bool) -> Tensor:
    if isinstance(value, np.ndarray):
        if writable and not value.flags.writeable:
            raise ValueError(f"{name}: expected writable memory, got a read-only numpy array")
        if any(stride < 0 for stride in value.strides):
            raise ValueError(f"{name}: expected non-negative strides, got {value.strides} (a reversed view)")
    elif not (hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")):
        raise TypeError(f"{name}: expected a torch tensor or an array with __dlpack__, got {type(value).__name__}")
    elif writable:
        _refuse_read_only_export(name, value)
    try:
        return from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name}: cannot be read through DLPack: {error}") from error


def _refuse_read_only_export(name: str, value: Any) -> None:
    """Asks the producer, through a versioned DLPack export, whether its memory may be written to."""
    from hpa_ext import backend

    if backend.extension().is_read_only(value):
        raise ValueError(f"{name}: expected writable memory, got a read-only {type(value).__name__}")


def _check_dims(name: str, tensor: Tensor, dims: str) -> None:
    count, exact = _parse_dims(dims)
    if tensor.dim() == count or (tensor.dim() > count and not exact):
        return
    plural = "" if count == 1 else "s"
    least = "" if exact else "at least "
    raise ValueError(f"{name}: expected {least}{count} dimension{plural} {dims}, got {_shape(tensor)}")


@cache
def _parse_dims(dims: str) -> tuple[int, bool]:
    """Number of dimensions that ``dims`` names, and whether there must be no more."""
    words = dims.strip("[]").split(", ")
    return (len(words) - 1, False) if words[0] == "..." else (len(words), True)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte and the byte after the last one that ``tensor`` can touch; torch strides are never negative."""
    start = tensor.data_ptr()
    count = tensor.numel()
    if count > 0 and not tensor.is_contiguous():
        count = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + count * tensor.element_size()


def _interleaved(one: Tensor, two: Tensor) -> bool:
    """True where two column ranges of one wider matrix provably do not meet (``m[:, :k]`` and ``m[:, k:]``)."""
    if one.dim() != 2 or two.dim() != 2:
        return False
    pitch = one.stride(0) * one.element_size()
    if pitch == 0 or pitch != two.stride(0) * two.element_size():
        return False
    widths = [((t.shape[1] - 1) * t.stride(1) + 1) * t.element_size() for t in (one, two)]
    distance = (two.data_ptr() - one.data_ptr()) % pitch
    return widths[0] <= distance and distance + widths[1] <= pitch


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)

"""Which implementation serves a call.

``cpu`` is the compiled extension ``hpa_ext._cpu``, ``cuda`` is ``hpa_ext._cuda``, ``triton`` are Triton kernels for
GPUs, ``reference`` is plain torch on any device.  The device of the tensors decides, unless ``backend=`` or the
environment variable ``HPA_BACKEND`` names one: a named backend that cannot run raises, it is never replaced in silence.

The source tree's package folder can hide the installed one (``python`` started at the repository root), so the
package extends its path to the installed copy and this module checks that the binary it finds belongs to this source.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from functools import cache
from types import ModuleType
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor

__all__ = [
    "BACKENDS",
    "CUDA_INTERFACE",
    "INTERFACE",
    "Backend",
    "BackendError",
    "automatic",
    "cuda_extension",
    "cuda_trouble",
    "extension",
    "select",
    "triton_trouble",
]

INTERFACE: Final = 3
"""Version of the calls between this package and ``_cpu``; raised together with the constant of csrc/bindings."""

CUDA_INTERFACE: Final = 1
"""The same between this package and ``_cuda``."""

BACKENDS: Final = ("cpu", "cuda", "triton", "reference")


class BackendError(RuntimeError):
    """A backend that was asked for, or that the device needs, cannot run here."""


class Backend(Protocol):
    """The eight kernels on checked arguments: detached tensors of one device, shapes and dtypes that fit."""

    def accumulate_gram_(self, gram: Tensor, x: Tensor, scale: float) -> None: ...

    def inverse_diagonal(
        self, gram: Tensor | None, activations: Tensor | None, scale: float, damping: float, mode: str
    ) -> tuple[Tensor | None, float, str]:
        """One attempt: the diagonal (``None`` where the matrix is not positive definite), lambda, and the route."""
        ...

    def accumulate_importance_(
        self, importance: list[Tensor], grads: list[Tensor], weights: list[Tensor] | None, kind: str
    ) -> None: ...

    def change_statistics(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Column means, and float64 ``[3]``: dot, before_norm_sq, change_norm_sq."""
        ...

    def balanced_mask(
        self,
        safety: Tensor,
        task: Tensor,
        keep: int,
        focus: int,
        alpha: tuple[float, float],
        mode: str,
        alpha_mode: str,
        alpha_sign: int,
        overflow: str,
        phi_norm: str,
    ) -> tuple[Tensor, float, float, int, int, int]:
        """Mask, alpha, log_ratio, overlap, kept_safety_only, kept_overlap."""
        ...

    def merge_(self, after: Tensor, before: Tensor, mask: Tensor, projection: float) -> None: ...

    def project_(self, grads: list[Tensor], basis: list[Tensor], passes: int) -> None:
        """Each ``grads[i]`` is ``[vectors, n_i]`` or one long vector's slice; ``basis[i]`` is ``[rank, n_i]``."""
        ...

    def orthonormalize_(self, vectors: Tensor, basis: Tensor | None, rtol: float) -> int: ...


def automatic(device: torch.device) -> str:
    """The backend that serves ``device`` when nothing names one.

    ``cpu`` for the CPU; on a GPU the first that can run there of ``cuda``, ``triton`` and ``reference``; ``reference``
    for everything else.
    """
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda" and cuda_trouble() is None:
        return "cuda"
    return "triton" if device.type == "cuda" and triton_trouble(device) is None else "reference"


def select(name: str | None, device: torch.device) -> Backend:
    """Returns the backend for a call.

    Args:
        name: the caller's ``backend=``; ``None`` reads ``HPA_BACKEND``, then the device decides.
        device: where the tensors are.

    Raises:
        ValueError: no backend has that name, or it does not serve that device.
        BackendError: it cannot run here: a compiled module is missing or of another version, no driver, no compiler.
    """
    if name is None:
        name = os.environ.get("HPA_BACKEND") or automatic(device)
        origin = "HPA_BACKEND"
    else:
        origin = "backend"
    if name == "reference":
        return _module("hpa_ext.reference")
    if name == "cpu":
        if device.type != "cpu":
            raise ValueError(f"{origin}: 'cpu' serves tensors on the CPU, got tensors on {device}")
        extension()
        return _module("hpa_ext.cpu")
    if name == "cuda":
        if device.type != "cuda":
            raise ValueError(f"{origin}: 'cuda' serves tensors on an NVIDIA GPU, got tensors on {device}")
        trouble = cuda_trouble()
        if trouble is not None:
            raise BackendError(f"{origin}: 'cuda' cannot run here: {trouble}")
        return _module("hpa_ext.cuda")
    if name == "triton":
        if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
            raise ValueError(
                f"{origin}: 'triton' serves tensors on a GPU (on the CPU too, slowly, with TRITON_INTERPRET=1), "
                f"got tensors on {device}"
            )
        trouble = triton_trouble(device)
        if trouble is not None:
            raise BackendError(f"{origin}: 'triton' cannot run here: {trouble}")
        return _module("hpa_ext.triton")
    raise ValueError(f"{origin}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


@cache
def extension() -> Any:
    """The compiled module ``hpa_ext._cpu``.

    Raises:
        BackendError: not built, or built from another version of the source.
    """
    return _compiled(
        "hpa_ext._cpu",
        INTERFACE,
        "Install the package: `pip install .` (or `pip install -e . --no-build-isolation` in a checkout). "
        "backend='reference' or HPA_BACKEND=reference runs plain torch instead.",
    )


@cache
def cuda_extension() -> Any:
    """The compiled module ``hpa_ext._cuda``; it loads without a GPU and without a driver.

    Raises:
        BackendError: not built, or built from another version of the source.
    """
    return _compiled(
        "hpa_ext._cuda",
        CUDA_INTERFACE,
        "It is built where a CUDA compiler is found at install time: `HPA_CUDA=ON pip install .` says what is missing.",
    )


def _compiled(name: str, interface: int, advice: str) -> Any:
    """A compiled module of this very source; ``advice`` is for those who do not have it."""
    from hpa_ext import __version__

    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise BackendError(f"the compiled module {name} cannot be loaded ({error}). {advice}") from error
    built = (module.__version__, module.INTERFACE)
    if built != (__version__, interface):
        raise BackendError(
            f"the compiled module {module.__file__} is of version {built[0]} (interface {built[1]}), the Python source "
            f"beside {__file__} of version {__version__} (interface {interface}). Install again: `pip install .`"
        )
    return module


@cache
def cuda_trouble() -> str | None:
    """Why the CUDA kernels cannot run in this process; ``None`` where they can."""
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs"
    try:
        return cuda_extension().unavailable() or None
    except BackendError as error:
        return str(error)


def triton_trouble(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on ``device``; ``None`` where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (`pip install triton`)"
    if _interpreted():
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds the code that launches its kernels with a C compiler, and found neither CC, gcc nor clang"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"compute capability 8.0 or higher is needed, {device} has {capability[0]}.{capability[1]}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _module(name: str) -> Backend:
    module: ModuleType = importlib.import_module(name)
    return cast(Backend, module)

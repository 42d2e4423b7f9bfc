"""The functions of :mod:`hpa_ext.ops` for plain CPU tensors, without its checks: a call costs about a microsecond.

Each takes the arguments of its namesake by position (no ``backend``, no ``info``).  It either does the work and
answers, ``True`` where the work was in place, or it has changed nothing and answers ``None``: then the checked path
goes on.  It serves ``torch.Tensor`` and ``nn.Parameter`` on the CPU with shapes, dtypes and memory that are surely
right, while ``HPA_BACKEND`` names no backend and no mode of torch is active.

The C++ side, ``csrc/bindings/direct.cpp``, says where the time of a call goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from hpa_ext import backend, threads

__all__ = [
    "accumulate_gram_",
    "accumulate_importance_",
    "balanced_mask",
    "change_statistics",
    "declines",
    "edit_",
    "inverse_diagonal",
    "merge_",
    "orthonormalize_",
    "project_",
]

_Entry: TypeAlias = Callable[..., Any]


def declines(*_: object) -> None:
    """Stands for every function where direct calls are not possible."""


def _connect() -> Callable[[str], _Entry]:
    """Returns what looks up an entry of the compiled module; old versions of torch have no C interface for DLPack."""
    try:
        module = backend.extension().direct
        connected = module.connect(
            tensor=torch.Tensor,
            parameter=torch.nn.Parameter,
            is_neg=torch.Tensor.is_neg,
            increment_version=torch._C._increment_version,
            dispatch_modes=torch._C._len_torch_dispatch_stack,
            num_threads=threads.get_num_threads,
        )
    except (backend.BackendError, AttributeError):
        connected = False  # the checked path raises BackendError, at the first call that needs the module
    return (lambda name: getattr(module, name)) if connected else (lambda _: declines)


_entry = _connect()
accumulate_gram_ = _entry("accumulate_gram_")
accumulate_importance_ = _entry("accumulate_importance_")
balanced_mask = _entry("balanced_mask")
change_statistics = _entry("change_statistics")
edit_ = _entry("edit_")
inverse_diagonal = _entry("inverse_diagonal")
merge_ = _entry("merge_")
orthonormalize_ = _entry("orthonormalize_")
project_ = _entry("project_")

"""Compiled kernels for keeping a safety-aligned model safe while it goes on learning.

Nine functions on tensors; see :mod:`hpa_ext.ops` for what each computes and ``python -m hpa_ext`` for what was built.
"""

from __future__ import annotations

from pkgutil import extend_path

# A source tree on sys.path (python started at the repository root) hides the installed package of the same name, and
# with it the compiled module.  The folders of all packages called hpa_ext on sys.path are searched, this one first.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"

from hpa_ext import torch_ops as torch_ops  # registers the operators that torch.compile sees
from hpa_ext.backend import BackendError
from hpa_ext.ops import (
    BalancedMask,
    ChangeStatistics,
    DampingWarning,
    Edit,
    FactorizationError,
    accumulate_gram_,
    accumulate_importance_,
    balanced_mask,
    change_statistics,
    edit_,
    inverse_diagonal,
    merge_,
    orthonormalize_,
    project_,
)
from hpa_ext.threads import get_num_threads, num_threads

__all__ = [
    "BackendError",
    "BalancedMask",
    "ChangeStatistics",
    "DampingWarning",
    "Edit",
    "FactorizationError",
    "__version__",
    "accumulate_gram_",
    "accumulate_importance_",
    "balanced_mask",
    "change_statistics",
    "edit_",
    "get_num_threads",
    "inverse_diagonal",
    "merge_",
    "num_threads",
    "orthonormalize_",
    "project_",
]

"""The eight kernels in Triton: for ROCm, and for a GPU machine on which no CUDA compiler was there at install
time.

One file a function.  Arguments have been checked by :mod:`hpa_ext.ops`; :mod:`hpa_ext.triton.launching` holds what the
files share.  Nothing here waits for the device, except where the answer is a Python number (``inverse_diagonal``,
``balanced_mask``, ``orthonormalize_``).  Sums have a fixed order that shapes alone decide, and no kernel uses atomics:
results are bit-reproducible.

With ``TRITON_INTERPRET=1`` in the environment the same kernels run on CPU tensors, slowly: that is how they are tested
where there is no GPU.
"""

from __future__ import annotations

from hpa_ext.triton.accumulate_gram import accumulate_gram_
from hpa_ext.triton.accumulate_importance import accumulate_importance_
from hpa_ext.triton.balanced_mask import balanced_mask
from hpa_ext.triton.change_statistics import change_statistics
from hpa_ext.triton.inverse_diagonal import inverse_diagonal
from hpa_ext.triton.merge import merge_
from hpa_ext.triton.orthonormalize import orthonormalize_
from hpa_ext.triton.project import project_

__all__ = [
    "accumulate_gram_",
    "accumulate_importance_",
    "balanced_mask",
    "change_statistics",
    "inverse_diagonal",
    "merge_",
    "orthonormalize_",
    "project_",
]

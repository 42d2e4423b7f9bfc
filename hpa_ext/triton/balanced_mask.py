"""The paper's choice of columns.                                        safety, task [cols] -> mask bool [cols]

Design       alpha, the counts and m are Python numbers, so every call waits for the device once, whatever it does; and
             alpha must be the same double in every backend, or equal phi could change places, which a device's own
             logarithm does not promise.  So the scores (88 KB for 11008 columns) come to the host in one transfer, the
             compiled kernel of the CPU chooses, and the mask goes back.
"""

import torch
from torch import Tensor

from hpa_ext import backend


def balanced_mask(
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
    scores = torch.stack([safety.double(), task.double()]).cpu()
    chosen = backend.select("cpu", scores.device).balanced_mask(
        scores[0], scores[1], keep, focus, alpha, mode, alpha_mode, alpha_sign, overflow, phi_norm
    )
    return (chosen[0].to(safety.device), *chosen[1:])

"""Safe Delta: let through the changes that cost safety least, and make good what they cost (Lu et al., ICML 2025).

arXiv 2505.12038, as its authors' code has it (``adjust_delta``; METHOD 2.3).  With ``(H_s + lambda I)^-1 = U'U`` of the
safety set's inputs, column block after column block:

    cost_ij = (W_n - W)_ij^2 / U_jj^2
    order   = entries by 1/U_jj^2, the cheapest columns first (rows in order), without the costliest 15 % of entries
    accept  = entries in that order while the sum of cost <= mean_j(1/U_jj^2) * (s/2) * rows/4096
    W_ij    = W_n,ij where accepted; else W_ij as compensated so far
    W[right] -= (W - W_n)_ij / U_jj * U[j, right]        for accepted entries, in groups of four columns

W begins as W_o: what is not accepted is the old weight, compensated.  s bounds the loss of safety (0.1 in the code,
0.11 in its README, for Llama-2-7B); it is an absolute number, so another model wants another one: ``accepted`` and
``safe_delta_budget`` in the numbers say what it did.  The paper's text has the exact diagonal of the inverse and one
order over the whole weight instead.

Cost: 2/3 cols^3 flops an input, 2 rows cols^2 a layer, in float64.  The safety set is the authors' 128 answers where
that many are there.  A zero update is kept, and so is the tuned weight where no safety input was active.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from hpa.config import CalibrationConfig
from hpa.layers import Number
from hpa.methods.base import check_strength
from hpa.methods.obs import Compensating

__all__ = ["SafeDelta", "SafeDeltaConfig", "safe_delta_weight"]

ROWS_OF_SOURCE = 4096  # the budget is scaled by a layer's rows over this


class SafeDeltaConfig(CalibrationConfig):
    """The budget, and the constants of the authors' code."""

    safety_samples: int = Field(default=128, ge=1, description="safe answers of the aligned model")
    s: float = Field(default=0.1, ge=0.0, description="how much loss of safety is allowed")
    block_cols: int = Field(default=2048, ge=1, description="columns that share a budget")
    group: int = Field(default=4, ge=1, description="columns between two compensations")
    left_out: float = Field(default=0.15, ge=0.0, lt=1.0, description="share of entries, the costliest, never accepted")


class SafeDelta(Compensating):
    """Changes are accepted while their cost for safety is within a budget; the rest compensates for them."""

    name: ClassVar[str] = "safe_delta"
    Config: ClassVar[type[BaseModel]] = SafeDeltaConfig
    config: SafeDeltaConfig
    inputs = "safety"
    needs = frozenset({"safety_gram"})

    def at_strength(self, strength: float) -> SafeDelta:
        """The budget ``s`` over ``strength``."""
        check_strength(strength)
        return type(self)(self.config.model_copy(update={"s": self.config.s / strength}))

    def settle(self, before: Tensor, after: Tensor, factor: Tensor) -> tuple[Tensor, dict[str, Number]]:
        weight, accepted, budget = safe_delta_weight(before, after, factor, self.config)
        return weight, {"accepted": accepted, "safe_delta_budget": budget}


def safe_delta_weight(
    before: Tensor, after: Tensor, factor: Tensor, config: SafeDeltaConfig
) -> tuple[Tensor, float, float]:
    """The edited weight, the share of entries that were accepted, and the mean budget of a block.

    Args:
        before, after: ``[rows, cols]`` float64.
        factor: U ``[cols, cols]``.
        config: budget and constants.
    """
    rows, cols = before.shape
    weight = before.clone()
    diagonal = factor.diagonal()
    accepted, budgets = 0, []
    for start in range(0, cols, config.block_cols):
        stop = min(start + config.block_cols, cols)
        own, target = weight[:, start:stop], after[:, start:stop]
        sensitivity = diagonal[start:stop] ** -2
        budget = float(sensitivity.mean()) * (config.s / 2) * (rows / ROWS_OF_SOURCE)
        budgets.append(budget)
        taken = _accepted(own, target, sensitivity, budget, config.left_out)
        accepted += int(taken.sum())
        errors = torch.zeros_like(own)
        for left in range(0, stop - start, config.group):
            right = min(left + config.group, stop - start)
            old = own[:, left:right]
            new = torch.where(taken[:, left:right], target[:, left:right], old)
            errors[:, left:right] = (old - new) / diagonal[start + left : start + right]
            own[:, left:right] = new
            own[:, right:] -= errors[:, left:right] @ factor[start + left : start + right, start + right : stop]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight, accepted / max(1, rows * cols), sum(budgets) / max(1, len(budgets))


def _accepted(own: Tensor, target: Tensor, sensitivity: Tensor, budget: float, left_out: float) -> Tensor:
    """Which entries of a block take their new value: bool ``[rows, block]``."""
    rows, cols = own.shape
    cost = (target - own).square() * sensitivity
    kept = cost.numel() - int(left_out * cost.numel())
    if len(sensitivity.unique()) == cols:
        # All entries of a column are equally sensitive: the order is one of columns, rows in order within each.
        order = torch.argsort(sensitivity, stable=True)
        within = cost[:, order].T.reshape(-1)
        good = torch.zeros(within.shape, dtype=torch.bool, device=own.device)
        good[:kept] = torch.cumsum(within[:kept], 0) <= budget
        taken = torch.empty(rows, cols, dtype=torch.bool, device=own.device)
        taken[:, order] = good.reshape(cols, rows).T
        return taken
    order = torch.argsort(sensitivity.expand(rows, -1).reshape(-1), stable=True)[:kept]
    flat = torch.zeros(cost.numel(), dtype=torch.bool, device=own.device)
    flat[order] = torch.cumsum(cost.reshape(-1)[order], 0) <= budget
    return flat.reshape(rows, cols)

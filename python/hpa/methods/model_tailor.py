"""Model Tailor: keep the tenth of the tuned weights that the task needs most (Zhu et al., ICML 2024).

arXiv 2402.12048, as its authors' code has it (METHOD 2.3).  With ``(H_t + lambda I)^-1 = U'U`` of the task's inputs in
the tuned model, in blocks of 128 columns, z within each row of a block (sample deviation, n - 1):

    score_ij = w z(|W_n - W_o|_ij) + (1 - w) z(W_ij^2 / U_jj^2)    salience; sensitivity of W as compensated so far
    revert   = entries whose score is at most the (floor(sparsity n) + 1)-th smallest of the block
    W_ij     = W_o,ij where reverted, column by column; else W_ij
    W[right] -= (W - W_o)_ij / U_jj * U[j, right]                     for reverted entries: the "decorator"

W begins as W_n.  The authors' code adds the compensation where the derivation, SparseGPT and Safe Delta subtract it;
``comp_sign=1`` does as their code.  Their LLaVA script edits blocks 20 to 31 of 0 to 31 and leaves the others as tuned:
``from_depth``.  w is 1/2 in the paper.

Cost: 2/3 cols^3 flops an input, 2 rows cols^2 a layer, in float64.  A zero update is kept, and so is the tuned weight
where no task input was active.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from hpa.config import CalibrationConfig
from hpa.layers import LayerChange, Number
from hpa.methods.base import check_strength
from hpa.methods.obs import Compensating

__all__ = ["ModelTailor", "ModelTailorConfig", "model_tailor_weight"]


class ModelTailorConfig(CalibrationConfig):
    """How much stays tuned, where, and how the rest is chosen."""

    sparsity: float = Field(
        default=0.9, ge=0.0, lt=1.0, description="share of entries that return to the weight before"
    )
    salience: float = Field(default=0.5, ge=0.0, le=1.0, description="weight w of the size of the change in the score")
    block_cols: int = Field(default=128, ge=1, description="columns that are scored and cut together")
    comp_sign: Literal[-1, 1] = Field(
        default=-1, description="sign of the compensation: -1 as derived, 1 as the authors' code has it"
    )
    from_depth: float = Field(
        default=0.625,
        ge=0.0,
        le=1.0,
        description="decoder blocks from this share of the depth on are edited (20 of 32), others stay tuned; 0: all",
    )


class ModelTailor(Compensating):
    """Most tuned weights return, those that the task needs stay, and make good what it loses."""

    name: ClassVar[str] = "model_tailor"
    Config: ClassVar[type[BaseModel]] = ModelTailorConfig
    config: ModelTailorConfig
    inputs = "task"
    needs = frozenset({"task_gram"})

    def at_strength(self, strength: float) -> ModelTailor:
        """The share ``1 - sparsity`` that stays tuned over ``strength``, at most all."""
        check_strength(strength)
        sparsity = max(0.0, 1.0 - (1.0 - self.config.sparsity) / strength)
        return type(self)(self.config.model_copy(update={"sparsity": sparsity}))

    def stays_tuned(self, change: LayerChange) -> str | None:
        before = bool(change.block) and (change.block - 1) / change.blocks < self.config.from_depth
        return "before the depth that is edited" if before else None

    def settle(self, before: Tensor, after: Tensor, factor: Tensor) -> tuple[Tensor, dict[str, Number]]:
        weight, reverted = model_tailor_weight(before, after, factor, self.config)
        return weight, {"reverted": reverted}


def model_tailor_weight(
    before: Tensor, after: Tensor, factor: Tensor, config: ModelTailorConfig
) -> tuple[Tensor, float]:
    """The edited weight and the share of entries that returned.

    Args:
        before, after: ``[rows, cols]`` float64.
        factor: U ``[cols, cols]``.
        config: how much returns, and how it is chosen.
    """
    rows, cols = before.shape
    weight = after.clone()
    diagonal = factor.diagonal()
    returned = 0
    for start in range(0, cols, config.block_cols):
        stop = min(start + config.block_cols, cols)
        own = weight[:, start:stop]
        # The size of the change is that of the tuned weight; the sensitivity is that of the weight as it is by now.
        salience = (after[:, start:stop] - before[:, start:stop]).abs()
        score = config.salience * _standard(salience) + (1.0 - config.salience) * _standard(
            own.square() / diagonal[start:stop].square()
        )
        place = int(score.numel() * config.sparsity)
        back = score <= score.flatten().kthvalue(place + 1).values if score.numel() else torch.zeros_like(score).bool()
        if config.sparsity == 0.0:
            back = torch.zeros_like(back)
        returned += int(back.sum())
        errors = torch.zeros_like(own)
        for j in range(stop - start):
            new = torch.where(back[:, j], before[:, start + j], own[:, j])
            errors[:, j] = (own[:, j] - new) / diagonal[start + j]
            own[:, j] = new
            step = torch.outer(errors[:, j], factor[start + j, start + j + 1 : stop])
            own[:, j + 1 :] += config.comp_sign * step
        weight[:, stop:] += config.comp_sign * (errors @ factor[start:stop, stop:])
    return weight, returned / max(1, rows * cols)


def _standard(values: Tensor) -> Tensor:
    """z of each row; 0 where a row does not vary."""
    if values.shape[1] < 2:
        return torch.zeros_like(values)
    deviation = values.std(dim=1, keepdim=True)
    centred = values - values.mean(dim=1, keepdim=True)
    return torch.where(deviation > 0, centred / deviation.clamp_min(torch.finfo(torch.float64).tiny), 0.0)

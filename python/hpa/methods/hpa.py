"""HPA, the paper's rule for one layer: partition, select, adjust (arXiv 2511.20158; METHOD 1).

eps_bar_j  = mean_i change_ij^2 / d_s[j]      safety focus        d_s, d_t: diagonals of the damped inverse
zeta_bar_j = mean_i change_ij^2 / d_t[j]      task focus          Hessians of the layer's inputs
S, T       = the n_k best columns by eps_bar and by zeta_bar;  O = S n T,  N = S \\ O
R          = the best of N by eps_bar, then the best of O by eps_bar - alpha * zeta_bar, n_p in all
W^[:, j]   = W_o[:, j] for j in R, else W_n[:, j] - c W_o[:, j],   c = <change, W_o> / |W_o|^2
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

import hpa_ext
from hpa.columns import give_back, keep_as_learned, measure, measured_numbers, stored
from hpa.config import AdaptConfig
from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate, Number
from hpa.methods.base import Method

__all__ = ["HPA", "adapt_layer"]


def adapt_layer(
    before: Tensor,
    after: Tensor | LowRankUpdate,
    safety_diagonal: Tensor,
    task_diagonal: Tensor,
    *,
    layer: int,
    layers: int,
    config: AdaptConfig | None = None,
    aligned: Tensor | None = None,
    basis: Tensor | None = None,
    name: str = "",
) -> LayerEdit:
    """The paper's edit of one weight matrix.  Nothing is changed in place.

    Args:
        before: ``W_{t-1} [rows, cols]``, any floating dtype.
        after: ``W_t [rows, cols]``, or the LoRA factors of the change, which are scored and edited exactly.
        safety_diagonal: ``[cols]``, ``diag((H_s + lambda I)^-1)``, positive.
        task_diagonal: ``[cols]``, ``diag((H_t + lambda I)^-1)``, positive.
        layer: decoder block of the weight, 1-based; it sets the share of columns kept.
        layers: number of decoder blocks.
        config: every decision; the paper's settings when ``None``.
        aligned: ``W_0``, needed with ``anchor="aligned"``.
        basis: for ``proj="subspace"``, see :func:`hpa.columns.give_back`.
        name: what errors and reports call the layer.

    Returns:
        The edited weight in the dtype of ``before``, and the numbers behind it: ``p`` (percent kept at this depth),
        ``keep`` and ``focus`` (n_p, n_k), ``alpha``, ``log_ratio`` (m), ``overlap`` (|O|), ``kept`` (|R|),
        ``kept_safety_only``, ``kept_overlap``, ``kept_safety_share`` and ``kept_change_share`` (shares of the sums of
        eps_bar and of the squared change that the kept columns hold), ``projection`` (c), ``projection_share``,
        ``along_before``, ``change_norm``, ``before_norm``; or ``skipped`` with the reason, and ``W_t`` as it is.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, diagonals that are not positive.
    """
    config = AdaptConfig() if config is None else config
    if not 1 <= layer <= layers:
        raise ValueError(f"layer: expected 1 <= layer <= layers, got layer {layer} of {layers}")
    change = LayerChange(name, layer, layers, name, before, after, aligned)
    return edit_columns(change, safety_diagonal, task_diagonal, config, basis=basis)


def edit_columns(
    change: LayerChange,
    safety_diagonal: Tensor,
    task_diagonal: Tensor,
    config: AdaptConfig,
    *,
    basis: Tensor | None = None,
) -> LayerEdit:
    """:func:`adapt_layer` on a :class:`~hpa.layers.LayerChange`."""
    change = stored(change, config)
    if config.mode == "none":
        return keep_as_learned(change, "mode is none")
    safety_diagonal = _diagonal("safety_diagonal", safety_diagonal, change)
    task_diagonal = _diagonal("task_diagonal", task_diagonal, change)
    statistics = measure(change)
    numbers: dict[str, Number] = {"p": config.share(change.block, change.blocks), **measured_numbers(statistics)}
    if not bool(statistics.column_change.any()):
        return keep_as_learned(change, "no change", numbers)

    column_change = statistics.column_change.double()
    eps_bar = column_change / safety_diagonal
    zeta_bar = column_change / task_diagonal
    keep = config.keep_count(change.cols, change.block, change.blocks)
    focus = config.focus_count(change.cols, change.block, change.blocks)
    try:
        chosen = hpa_ext.balanced_mask(
            eps_bar,
            zeta_bar,
            keep,
            focus,
            (config.alpha0, config.alpha1),
            mode=config.mode,
            alpha_mode=config.alpha_mode,
            alpha_sign=config.alpha_sign,
            overflow=config.overflow,
            phi_norm=config.phi_norm,
        )
    except ValueError as error:
        raise ValueError(f"layer {change.label}: {error}") from error
    numbers |= {
        "keep": keep,
        "focus": focus,
        "alpha": chosen.alpha,
        "log_ratio": chosen.log_ratio,
        "overlap": chosen.overlap,
        "kept": chosen.kept,
        "kept_safety_only": chosen.kept_safety_only,
        "kept_overlap": chosen.kept_overlap,
        "kept_safety_share": float(eps_bar[chosen.mask].sum() / eps_bar.sum()),
    }
    return give_back(change, chosen.mask, statistics, config, numbers, basis=basis)


class HPA(Method):
    """Hierarchical partition and adjustment of columns after each task: the paper's method."""

    name: ClassVar[str] = "hpa"
    Config: ClassVar[type[BaseModel]] = AdaptConfig
    config: AdaptConfig

    def __init__(self, config: BaseModel | None = None) -> None:
        super().__init__(config)
        if self.config.mode != "none":
            self.needs = frozenset({"safety_diagonal", "task_diagonal"})

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        if self.config.mode == "none":
            return keep_as_learned(stored(change, self.config), "mode is none")
        if safety is None or task is None:
            missing = "safety" if safety is None else "task"
            raise ValueError(f"layer {change.label}: method 'hpa' needs {missing} statistics, got none")
        for which, statistics in (("safety", safety), ("task", task)):
            if statistics.zero:
                return keep_as_learned(stored(change, self.config), f"no {which} activations")
            if statistics.inverse_diagonal is None:
                raise ValueError(f"layer {change.label}: method 'hpa' needs the {which} inverse diagonal, got none")
        assert safety.inverse_diagonal is not None
        assert task.inverse_diagonal is not None
        edit = edit_columns(change, safety.inverse_diagonal, task.inverse_diagonal, self.config)
        edit.numbers |= {"safety_damping": safety.damping, "task_damping": task.damping}
        return edit


def _diagonal(name: str, value: Any, change: LayerChange) -> Tensor:
    """``value`` as float64 ``[cols]``, checked."""
    diagonal = torch.as_tensor(value).detach().to(change.before.device, torch.float64)
    if tuple(diagonal.shape) != (change.cols,):
        raise ValueError(f"{name}: expected [{change.cols}] (columns of before), got {tuple(diagonal.shape)}")
    bad = ~(torch.isfinite(diagonal) & (diagonal > 0))
    if bool(bad.any()):
        worst = int(bad.nonzero()[0])
        found = f"{float(diagonal[worst])} at column {worst} of layer {change.label}"
        raise ValueError(f"{name}: expected positive finite numbers, got {found}")
    return diagonal

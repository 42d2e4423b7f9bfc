"""Every decision of the method as a named option.

The published description of HPA leaves questions open, and each has an answer here: a named option, its default, and
the number of the decision (D1 ... D18) under which METHOD.md argues it.  Decisions without an option are fixed: scores
*divide* by the diagonal of the inverse Hessian (D1), the index is the column (D2), counts are rounded half up and ties
go to the lower column (D8).  D16 and D17 are about evaluation and live with the metrics.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = ["AdaptConfig", "CalibrationConfig", "ColumnConfig", "HessianSource", "validated"]

ConfigT = TypeVar("ConfigT", bound=BaseModel)
ColumnsT = TypeVar("ColumnsT", bound="ColumnConfig")


class HessianSource(BaseModel):
    """Which model's activations feed which Hessian (D10): the weights ``before`` the task or ``after`` it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    safety: Literal["before", "after"] = Field(default="before", description="model that the safety samples go through")
    task: Literal["before", "after"] = Field(default="after", description="model that the task samples go through")


class CalibrationConfig(BaseModel):
    """From samples to Hessians: which activations are read, how they are averaged, how the inverse is damped."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    safety_samples: int = Field(default=8, ge=1, description="harmful requests with the aligned model's own refusal")
    task_samples: int = Field(default=128, ge=1, description="random training samples of the task")
    hessian_source: HessianSource = Field(
        default_factory=HessianSource,
        description="D10: model state behind each Hessian; the word before or after alone sets both",
    )
    token_filter: Literal["all", "text", "answer"] = Field(
        default="all",
        description="D10: positions that count, padding never does. all: image tokens too; text: no image tokens; "
        "answer: positions with a label (labels != -100)",
    )
    normalize: Literal["tokens", "samples", "none"] = Field(
        default="tokens",
        description="D4: divide the Gram matrix 2 X'X by its tokens, by its samples, or leave raw sums",
    )
    damping: float = Field(
        default=0.01,
        gt=0.0,
        le=1.0,
        validation_alias=AliasChoices("damping", "damp"),
        description="D5: lambda as a share of the mean diagonal of the Hessian; times 10 up to 1 if factoring fails",
    )
    diag_mode: Literal["exact", "sgpt"] = Field(
        default="exact", description="D3: the diagonal of the inverse, or SparseGPT's sequential Cholesky pivot"
    )
    include_projector: bool = Field(
        default=False,
        description="D11: also edit the linear layers between vision tower and decoder (their share is p_max)",
    )
    blocks: str | None = Field(
        default=None, description="module path of the decoder's list of blocks, where it should not be searched for"
    )
    gram_dtype: Literal["float32", "float64"] = Field(
        default="float32", description="dtype in which Gram matrices accumulate"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_word_sets_both_sources(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("hessian_source"), str):
            word = values["hessian_source"]
            return {**values, "hessian_source": {"safety": word, "task": word}}
        return values


class ColumnConfig(BaseModel):
    """How many columns go back at which depth, where they go back to, and what is taken out of the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    p_max: float = Field(default=15.0, ge=0.0, le=100.0, description="percent of columns kept at depth 0")
    p_min: float = Field(default=5.0, ge=0.0, le=100.0, description="percent of columns kept at full depth")
    layer_base: Literal[0, 1] = Field(
        default=1, description="D7: depth of the first decoder block; with 1 the last block has exactly p_min"
    )
    anchor: Literal["prev", "aligned"] = Field(
        default="prev", description="D12: kept columns return to the weights before the task, or to the aligned model's"
    )
    proj: Literal["fro", "row", "col", "subspace", "off"] = Field(
        default="fro",
        description="D13: what leaves the update. fro: its part along the old matrix (the paper); row, col: the same "
        "for each row or column; subspace: its part in the leading singular vectors of the old matrix; off: nothing",
    )
    subspace_rank: int = Field(default=8, ge=1, description="proj=subspace: how many singular vectors")
    subspace_side: Literal["input", "output"] = Field(
        default="input",
        description="proj=subspace: right singular vectors (inputs, [cols]) or left ones (outputs, [rows])",
    )
    lora_native: bool = Field(
        default=True,
        description="D14: score and edit LoRA factors exactly; false merges them in the storage dtype first, "
        "as scripts that work on merged checkpoints do",
    )

    def at_strength(self: ColumnsT, strength: float) -> ColumnsT:
        """These options with ``strength`` times as many columns kept (at most all)."""
        shares = {name: min(100.0, getattr(self, name) * strength) for name in ("p_max", "p_min")}
        return self.model_copy(update=shares)

    def share(self, block: int, blocks: int) -> float:
        """Percent of columns kept in decoder block ``block``, 1-based, of ``blocks`` (METHOD 1.4, D7).

        Block 0 stands for what comes before the decoder (the projector) and has depth 0.
        """
        if not 0 <= block <= blocks or blocks < 1:
            raise ValueError(f"block: expected 0 <= block <= blocks and blocks >= 1, got block {block} of {blocks}")
        depth = max(0, block - 1 + self.layer_base) if block else 0
        return self.p_max - (depth / blocks) * (self.p_max - self.p_min)

    def keep_count(self, cols: int, block: int, blocks: int) -> int:
        """``n_p``: how many of ``cols`` columns are kept, rounded half up (D8)."""
        return math.floor(self.share(block, blocks) * cols / 100.0 + 0.5)


class AdaptConfig(CalibrationConfig, ColumnConfig):
    """HPA with every open decision as an option; the defaults are the paper's settings where they are known."""

    mode: Literal["full", "eps", "phi", "none"] = Field(
        default="full",
        description="D15: full: METHOD 1.4; eps: the best columns by safety score alone; phi: only columns of the "
        "overlap, by balance score; none: no edit at all (plain sequential tuning)",
    )
    focus_ratio: float = Field(default=2.0, ge=1.0, description="focus share k as a multiple of p")
    overflow: Literal["cap", "keep"] = Field(
        default="cap", description="D9: if the safety-only columns exceed the budget, keep the best n_p of them, or all"
    )
    alpha0: float = Field(default=0.4, ge=0.0, description="lower end of the balance coefficient")
    alpha1: float = Field(default=0.8, ge=0.0, description="upper end of the balance coefficient")
    alpha_mode: Literal["affine", "relu", "abs", "const"] = Field(
        default="affine", description="D6: how tanh(m) maps onto [alpha0, alpha1]; const is alpha0"
    )
    alpha_sign: Literal[1, -1] = Field(
        default=1, description="D6: alpha rises (1) or falls (-1) where safety dominates"
    )
    phi_norm: Literal["none", "mean"] = Field(
        default="none", description="D18: balance raw scores (as printed), or scores divided by their layer mean"
    )

    @model_validator(mode="after")
    def _alphas_in_order(self) -> AdaptConfig:
        if self.alpha0 > self.alpha1:
            raise ValueError(f"alpha0: expected alpha0 <= alpha1, got {self.alpha0} > {self.alpha1}")
        return self

    def focus_count(self, cols: int, block: int, blocks: int) -> int:
        """``n_k``: how many of ``cols`` columns are in focus; at least the kept ones, at most all (D8)."""
        wanted = math.floor(self.focus_ratio * self.share(block, blocks) * cols / 100.0 + 0.5)
        return min(cols, max(self.keep_count(cols, block, blocks), wanted))

    @classmethod
    def ablation(cls, experiment: Literal[1, 2, 3, 4, 5], **options: Any) -> AdaptConfig:
        """The row ``Exp 1`` ... ``Exp 5`` of the paper's ablation table (METHOD 1.9); ``options`` override the rest."""
        rows: dict[int, dict[str, str]] = {
            1: {"mode": "none", "proj": "off"},
            2: {"mode": "eps", "proj": "off"},
            3: {"mode": "phi", "proj": "off"},
            4: {"mode": "full", "proj": "off"},
            5: {"mode": "full", "proj": "fro"},
        }
        if experiment not in rows:
            raise ValueError(f"experiment: expected 1, 2, 3, 4 or 5, got {experiment!r}")
        return validated(cls, {**rows[experiment], **options}, "ablation")


def validated(config: type[ConfigT], options: dict[str, Any], owner: str) -> ConfigT:
    """``config(**options)``, with every complaint in one readable ``ValueError``.

    Raises:
        ValueError: naming ``owner``, each offending option, what came, and for an unknown option what exists.
    """
    try:
        return config(**options)
    except ValidationError as error:
        known = ", ".join(sorted(config.model_fields)) or "none"
        complaints = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                complaints.append(f"{where}: no such option; {owner} has: {known}")
            elif item["type"] == "value_error":
                complaints.append(f"{where}: {item['ctx']['error']}".lstrip(": "))
            else:
                complaints.append(f"{where}: {item['msg']}, got {item['input']!r}")
        raise ValueError("; ".join(complaints)) from error

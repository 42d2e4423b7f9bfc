"""What passes between calibration, the methods and the models: a layer's change, its inputs, its edit.

Sizes: a weight is ``[rows, cols]`` as in ``torch.nn.Linear`` (rows = outputs, cols = inputs); column ``j`` is input
feature ``j``.  A low-rank update is ``scale * B A`` with ``A [rank, cols]`` and ``B [rows, rank]``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpa.triangle import Triangle

__all__ = ["InputStatistics", "LayerChange", "LayerEdit", "LowRankUpdate", "Number", "clean_name"]

Number = float | int | str


@dataclass(frozen=True)
class LowRankUpdate:
    """A LoRA update in its factors: ``W_t - W_{t-1} = scale * B A``.

    Attributes:
        A: ``[rank, cols]``, float32 unless the factors were trained in another dtype.
        B: ``[rows, rank]``, like ``A``.
        scale: ``lora_alpha / rank`` (or whatever the adapter multiplies by).
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        # Edits are no part of any graph, also where the factors are the adapter's own parameters.
        object.__setattr__(self, "A", self.A.detach())
        object.__setattr__(self, "B", self.B.detach())
        if self.A.ndim != 2:
            raise ValueError(f"A: expected 2 dimensions [rank, cols], got {tuple(self.A.shape)}")
        if self.B.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(
                f"B: expected [rows, {self.A.shape[0]}] beside A {tuple(self.A.shape)}, got {tuple(self.B.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, cols)`` of the matrix it stands for."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """The update as one matrix ``[rows, cols]``, float32 (float64 where a factor is)."""
        dtype = torch.promote_types(torch.promote_types(self.A.dtype, self.B.dtype), torch.float32)
        with torch.no_grad(), torch.autocast(self.A.device.type, enabled=False):
            return (self.B.to(dtype) @ self.A.to(dtype)).mul_(self.scale)

    def to(self, device: torch.device) -> LowRankUpdate:
        """The same update on another device."""
        return LowRankUpdate(self.A.to(device), self.B.to(device), self.scale)

    @staticmethod
    def zero(weight: Tensor) -> LowRankUpdate:
        """The update of rank 0 for a weight ``[rows, cols]``: no change."""
        rows, cols = weight.shape
        return LowRankUpdate(
            torch.empty(0, cols, dtype=torch.float32, device=weight.device),
            torch.empty(rows, 0, dtype=torch.float32, device=weight.device),
        )


@dataclass(frozen=True)
class LayerChange:
    """One linear layer before and after a task.

    Attributes:
        name: module path in the model, for instance ``model.language_model.layers.0.self_attn.q_proj``.
        block: decoder block, 1-based (0: the projector before the first block).
        blocks: number of decoder blocks.
        input_key: equal for layers that are fed by the same tensor.
        before: ``W_{t-1}``, ``[rows, cols]``.
        update: the LoRA factors of the change, or the dense ``W_t [rows, cols]``.
        aligned: ``W_0``, the aligned model's weight, for a method that reads it (``Method.references``).
        unaligned: the weight before the alignment, likewise.
        earlier: what earlier tasks made of ``before``, each like ``update``: for methods that merge models.
        reuse_update: nobody reads a dense ``update`` afterwards, so the edited weight may be written into its memory.
    """

    name: str
    block: int
    blocks: int
    input_key: str
    before: Tensor = field(repr=False)
    update: LowRankUpdate | Tensor = field(repr=False)
    aligned: Tensor | None = field(default=None, repr=False)
    reuse_update: bool = field(default=False, repr=False)
    unaligned: Tensor | None = field(default=None, repr=False)
    earlier: tuple[LowRankUpdate | Tensor, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        where = f"layer {self.name}: " if self.name else ""
        if not _is_floating(self.before) or self.before.ndim != 2:
            raise ValueError(
                f"{where}before: expected a floating-point tensor [rows, cols], got {_described(self.before)}"
            )
        shape = tuple(self.before.shape)
        if isinstance(self.update, LowRankUpdate):
            if self.update.shape != shape:
                raise ValueError(
                    f"{where}update: expected factors of a {shape} matrix (as before), got {self.update.shape}"
                )
        elif not _is_floating(self.update):
            raise TypeError(
                f"{where}after: expected a floating-point tensor or a LowRankUpdate, got {_described(self.update)}"
            )
        elif tuple(self.update.shape) != shape:
            raise ValueError(f"{where}after: expected {shape} (as before), got {tuple(self.update.shape)}")
        for what, other in (
            ("aligned", self.aligned),
            ("unaligned", self.unaligned),
            *(("earlier", other) for other in self.earlier),
        ):
            if other is not None and tuple(other.shape) != shape:
                raise ValueError(f"{where}{what}: expected {shape} (as before), got {tuple(other.shape)}")
        object.__setattr__(self, "before", self.before.detach())
        if isinstance(self.update, Tensor):
            object.__setattr__(self, "update", self.update.detach())

    @property
    def rows(self) -> int:
        return self.before.shape[0]

    @property
    def cols(self) -> int:
        return self.before.shape[1]

    @property
    def label(self) -> str:
        """What error messages call the layer."""
        return self.name or f"of block {self.block}"


@dataclass(frozen=True)
class InputStatistics:
    """What a calibration set says about one input (shared by every layer that is fed by it).

    Attributes:
        gram: ``[cols, cols]``, lower triangle filled: ``2 X'X`` averaged as ``normalize`` says (METHOD 1.1, D4), or
            ``None`` where it was not asked for.
        triangle: the same, instead of ``gram``, where it is read from a file when it is needed.
        inverse_diagonal: ``[cols]``: ``diag((gram + lambda I)^-1)``, or ``None`` where it was not asked for or the
            input was zero throughout (then ``zero`` is set).
        tokens: positions that were counted.
        samples: samples with at least one counted position.
        input_key: name of the first layer that is fed by this input.
        zero: every activation was zero, or none was seen: no Hessian exists.
        damping: the damping that succeeded (D5), 0 where no inverse was asked for.
    """

    gram: Tensor | None = field(default=None, repr=False)
    triangle: Triangle | None = field(default=None, repr=False, kw_only=True)
    inverse_diagonal: Tensor | None = field(default=None, repr=False)
    tokens: int = 0
    samples: int = 0
    input_key: str = ""
    zero: bool = False
    damping: float = 0.0


class LayerEdit:
    """The edited weight of one layer, and the numbers behind it.

    A low-rank change that stays low-rank keeps its factors: ``weight = base + update.dense()``, and the dense matrix is
    formed only when :attr:`weight` is read.

    Attributes:
        numbers: per-layer numbers for tables and reports, JSON-ready.
        base: ``[rows, cols]`` float32 or float64, what the factors add to; ``None`` for a dense edit.
        update: the edited factors; ``None`` for a dense edit.
    """

    def __init__(
        self,
        numbers: dict[str, Number],
        *,
        weight: Tensor | None = None,
        base: Tensor | None = None,
        update: LowRankUpdate | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if (weight is None) == (base is None or update is None):
            raise ValueError("expected either weight, or base and update")
        self.numbers = numbers
        self.base = base
        self.update = update
        self._weight = weight
        self._dtype = dtype

    @property
    def weight(self) -> Tensor:
        """The edited weight ``[rows, cols]`` in the dtype of the weight before: added in float32, rounded once."""
        if self._weight is None:
            assert self.base is not None
            assert self.update is not None
            self._weight = add_update(self.base, self.update, self._dtype or self.base.dtype)
        return self._weight

    @property
    def skipped(self) -> str | None:
        """Why the layer was left as the task made it, or ``None``."""
        reason = self.numbers.get("skipped")
        return None if reason is None else str(reason)

    def __repr__(self) -> str:
        kind = "factors" if self.update is not None else "dense"
        return f"LayerEdit({kind}, {self.numbers})"


def add_update(base: Tensor, update: LowRankUpdate, dtype: torch.dtype) -> Tensor:
    """``base + scale B A`` formed in float32 (float64 where base or a factor is), then cast once to ``dtype``."""
    with torch.no_grad():
        change = update.dense()
        work = torch.promote_types(base.dtype, change.dtype)
        return change.to(work).add_(base.to(work)).to(dtype)


def clean_name(name: str) -> str:
    """A layer's path without what adapters and wrappers put around it.

    >>> clean_name("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    'model.layers.0.mlp.up_proj'
    """
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name.removesuffix(".weight").removesuffix(".base_layer")


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__

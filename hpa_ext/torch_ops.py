"""Operators that ``torch.compile`` sees: schema, what is mutated, shapes and dtypes of results.

Eager calls do not come here.  While a program is traced, the public functions of :mod:`hpa_ext.ops` hand over to
``torch.ops.hpa_ext``, and these operators call them again, checks included, when the compiled program runs.  Results
that are Python numbers travel as a float64 tensor ``numbers`` and are read after the operator, which ends a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from hpa_ext import ops

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

__all__: list[str] = []


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Registers ``hpa_ext::name``; what it mutates is what the schema marks with ``!``."""
    mutated = [argument.split()[-1] for argument in schema.partition(") ->")[0].split(", ") if "!)" in argument]
    return torch.library.custom_op(f"hpa_ext::{name}", mutates_args=mutated, schema=schema)


@_operator("accumulate_gram_", "(Tensor(a!) gram, Tensor x, float scale, str? backend) -> ()")
def _accumulate_gram_(gram: Tensor, x: Tensor, scale: float, backend: str | None) -> None:
    ops.accumulate_gram_(gram, x, scale, backend=backend)


@_operator(
    "inverse_diagonal",
    "(Tensor? gram, float damping, str mode, Tensor? activations, float scale, str? backend) -> (Tensor, Tensor)",
)
def _inverse_diagonal(
    gram: Tensor | None, damping: float, mode: str, activations: Tensor | None, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    info: dict[str, Any] = {}
    diagonal = ops.inverse_diagonal(
        gram, damping, cast(Any, mode), activations=activations, scale=scale, info=info, backend=backend
    )
    info["route"] = info["route"] == "low_rank"
    return diagonal, _numbers(list(info.values()))


@_inverse_diagonal.register_fake
def _(
    gram: Tensor | None, damping: float, mode: str, activations: Tensor | None, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    given = cast(Tensor, activations if gram is None else gram)
    return given.new_empty(given.shape[1], dtype=_wide(given)), torch.empty(4, dtype=torch.float64, device="cpu")


@_operator(
    "accumulate_importance_",
    "(Tensor(a!)[] importance, Tensor[] grads, Tensor[] weights, str kind, str? backend) -> ()",
)
def _accumulate_importance_(
    importance: list[Tensor], grads: list[Tensor], weights: list[Tensor], kind: str, backend: str | None
) -> None:
    ops.accumulate_importance_(importance, grads, weights or None, cast(Any, kind), backend=backend)


@_operator("change_statistics", "(Tensor before, Tensor after, str? backend) -> (Tensor, Tensor)")
def _change_statistics(before: Tensor, after: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    column_change, *scalars = ops.change_statistics(before, after, backend=backend)
    return column_change, torch.stack(scalars)


@_change_statistics.register_fake
def _(before: Tensor, after: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    return before.new_empty(before.shape[1], dtype=_wide(before)), before.new_empty(3, dtype=torch.float64)


@_operator(
    "balanced_mask",
    "(Tensor safety, Tensor task, SymInt keep, SymInt focus, float[] alpha, str mode, str alpha_mode, int alpha_sign, "
    "str overflow, str phi_norm, str? backend) -> (Tensor, Tensor)",
)
def _balanced_mask(
    safety: Tensor,
    task: Tensor,
    keep: int,
    focus: int,
    alpha: list[float],
    mode: str,
    alpha_mode: str,
    alpha_sign: int,
    overflow: str,
    phi_norm: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {
        "mode": mode,
        "alpha_mode": alpha_mode,
        "alpha_sign": alpha_sign,
        "overflow": overflow,
        "phi_norm": phi_norm,
    }
    mask, *numbers = ops.balanced_mask(safety, task, keep, focus, (alpha[0], alpha[1]), **options, backend=backend)
    return mask, _numbers(numbers)


@_balanced_mask.register_fake
def _(safety: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(safety, dtype=torch.bool), torch.empty(6, dtype=torch.float64, device="cpu")


@_operator("merge_", "(Tensor(a!) after, Tensor before, Tensor mask, float projection, str? backend) -> ()")
def _merge_(after: Tensor, before: Tensor, mask: Tensor, projection: float, backend: str | None) -> None:
    ops.merge_(after, before, mask, projection, backend=backend)


@_operator(
    "edit_",
    "(Tensor(a!) after, Tensor before, Tensor safety_diagonal, Tensor task_diagonal, SymInt keep, SymInt focus, "
    "float[] alpha, str projection, str selection, str alpha_mode, int alpha_sign, str overflow, str phi_norm, "
    "str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _edit_(
    after: Tensor,
    before: Tensor,
    safety_diagonal: Tensor,
    task_diagonal: Tensor,
    keep: int,
    focus: int,
    alpha: list[float],
    projection: str,
    selection: str,
    alpha_mode: str,
    alpha_sign: int,
    overflow: str,
    phi_norm: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options: dict[str, Any] = {
        "projection": projection,
        "mode": selection,  # torch has a use of its own for the name, in calls that mutate
        "alpha_mode": alpha_mode,
        "alpha_sign": alpha_sign,
        "overflow": overflow,
        "phi_norm": phi_norm,
    }
    mask, *numbers, statistics = ops.edit_(
        after, before, safety_diagonal, task_diagonal, keep, focus, (alpha[0], alpha[1]), **options, backend=backend
    )
    column_change, *scalars = statistics
    return mask, column_change, torch.stack(scalars), _numbers(numbers)


@_edit_.register_fake
def _(after: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cols = after.shape[1]
    return (
        after.new_empty(cols, dtype=torch.bool),
        after.new_empty(cols, dtype=_wide(after)),
        after.new_empty(3, dtype=torch.float64),
        torch.empty(7, dtype=torch.float64, device="cpu"),
    )


@_operator("project_", "(Tensor(a!) grads, Tensor basis, int passes, str? backend) -> ()")
def _project_(grads: Tensor, basis: Tensor, passes: int, backend: str | None) -> None:
    ops.project_(grads, basis, passes=passes, backend=backend)


@_operator("project_list_", "(Tensor(a!)[] grads, Tensor[] basis, int passes, str? backend) -> ()")
def _project_list_(grads: list[Tensor], basis: list[Tensor], passes: int, backend: str | None) -> None:
    ops.project_(grads, basis, passes=passes, backend=backend)


@_operator("orthonormalize_", "(Tensor(a!) vectors, Tensor? basis, float? rtol, str? backend) -> Tensor")
def _orthonormalize_(vectors: Tensor, basis: Tensor | None, rtol: float | None, backend: str | None) -> Tensor:
    return torch.tensor(ops.orthonormalize_(vectors, basis, rtol, backend=backend), device="cpu")


@_orthonormalize_.register_fake
def _(vectors: Tensor, basis: Tensor | None, rtol: float | None, backend: str | None) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _numbers(values: Sequence[float]) -> Tensor:
    """On the CPU, where they are read, whatever torch's default device is."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")

"""Calls on 1,000 elements: what a call costs before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hand_written
import torch
from harness import OURS, TORCH, Case
from shapes import layer_pair, rows_of_basis
from torch import Tensor

import hpa_ext


def cases(shrink: int = 1) -> Iterator[Case]:
    """``shrink`` changes nothing: these are small."""
    rows, cols = 25, 40

    def gram() -> tuple[Tensor, Tensor]:
        return torch.zeros(cols, cols), torch.randn(rows, cols)

    def square() -> tuple[Tensor]:
        x = torch.randn(80, 32)
        return (x.t() @ x / 80,)

    def merged() -> tuple[Tensor, Tensor, Tensor]:
        before, after = layer_pair(rows, cols, torch.float32)
        return after, before, torch.rand(cols) < 0.1

    def many(count: int) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
        return lambda: ([torch.zeros(1000) for _ in range(count)], [torch.randn(1000) for _ in range(count)])

    def pieces() -> tuple[list[Tensor], list[Tensor], Tensor]:
        basis = rows_of_basis(4, 1000)
        return list(torch.randn(1000).split(100)), list(basis.split(100, dim=1)), basis

    def layer() -> tuple[Tensor, ...]:
        before, learned = layer_pair(rows, cols, torch.float32)
        return learned, before, torch.rand(cols) + 0.5, torch.rand(cols) + 0.5

    def edited(edit_: Any) -> Callable[..., Tensor]:
        def call(learned: Tensor, *others: Tensor) -> Tensor:
            after = learned.clone()  # an edit leaves less to edit
            edit_(after, *others, 5, 10)
            return after

        return call

    def one(
        label: str,
        inputs: Any,
        ours: Any,
        by_hand: Any,
        result: Any = None,
        tolerance: float = 1e-4,
        microseconds: float = 5,
    ) -> Case:
        extra = {} if result is None else {"result": result}
        return Case(
            kernel="calls",
            case=label,
            inputs=inputs,
            contenders={OURS: ours, TORCH: by_hand},
            tolerance=tolerance,
            targets={TORCH: 1, "microseconds": microseconds},
            level="quick",
            warm=True,
            **extra,
        )

    yield one(
        f"accumulate_gram_ {rows}x{cols}",
        gram,
        hpa_ext.accumulate_gram_,
        hand_written.accumulate_gram_,
        lambda _, g, x: [g.tril()],
    )
    yield one("inverse_diagonal 32x32", square, hpa_ext.inverse_diagonal, hand_written.inverse_diagonal)
    yield one(
        "accumulate_importance_ 1000",
        many(1),
        hpa_ext.accumulate_importance_,
        hand_written.accumulate_fisher_,
        lambda _, importance, grads: importance,
    )
    yield one(
        f"change_statistics {rows}x{cols}",
        lambda: layer_pair(rows, cols, torch.float32),
        hpa_ext.change_statistics,
        hand_written.change_statistics,
        lambda returned, *_: list(returned),
    )
    yield one(
        "balanced_mask 1000",
        lambda: (torch.rand(1000), torch.rand(1000)),
        lambda safety, task: hpa_ext.balanced_mask(safety, task, 100, 200).mask,
        lambda safety, task: hand_written.balanced_mask(safety, task, 100, 200),
        tolerance=0,
    )
    yield one(
        f"merge_ {rows}x{cols}",
        merged,
        lambda after, before, mask: hpa_ext.merge_(after, before, mask, 1e-3),
        lambda after, before, mask: hand_written.merge_(after, before, mask, 1e-3),
    )
    yield one(
        f"edit_ {rows}x{cols}",
        layer,
        edited(hpa_ext.edit_),
        edited(hand_written.edit_),
        microseconds=50,  # three functions and the checks between them, in Python
    )
    yield one(
        "project_ rank 4, 1000",
        lambda: (torch.randn(1000), rows_of_basis(4, 1000)),
        hpa_ext.project_,
        hand_written.project_,
    )
    yield one(
        "project_ rank 4, 10 of 100",
        pieces,
        lambda grads, parts, basis: hpa_ext.project_(grads, parts),
        lambda grads, parts, basis: hand_written.project_list_(grads, basis),
        lambda _, grads, parts, basis: grads,
    )
    yield one(
        "orthonormalize_ 8x125",
        lambda: (torch.randn(8, 125),),
        hpa_ext.orthonormalize_,
        hand_written.orthonormalize,
        lambda returned, vectors: projector(returned if isinstance(returned, Tensor) else vectors),
    )


def projector(basis: Tensor) -> list[Tensor]:
    return [basis.t() @ basis]

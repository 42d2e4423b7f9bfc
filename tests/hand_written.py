"""The nine functions as a careful user would write them in torch, without hpa_ext.

The benchmarks race against these, and test_bench.py holds them to what hpa_ext computes: nobody races a function that
does less.  ``torch.compile`` takes all of them but :func:`balanced_mask` and :func:`edit_`, where sizes depend on the
data.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_gram_(gram: Tensor, x: Tensor, scale: float = 2.0) -> Tensor:
    """The full symmetric product in the precision of ``gram``, as SparseGPT and its relatives take it."""
    wide = x.to(gram.dtype)
    return gram.addmm_(wide.t(), wide, alpha=scale)


def accumulate_gram_low_precision_(gram: Tensor, x: Tensor, scale: float = 2.0) -> Tensor:
    """The product in the storage dtype of ``x``, which rounds it to that dtype."""
    return gram.add_(x.t() @ x, alpha=scale)


def inverse_diagonal(gram: Tensor, damping: float = 0.01) -> Tensor:
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal().clone()


def accumulate_fisher_(importance: list[Tensor], grads: list[Tensor]) -> None:
    for total, grad in zip(importance, grads, strict=True):
        total.addcmul_(grad.to(total.dtype), grad.to(total.dtype))


def accumulate_fisher_foreach_(importance: list[Tensor], grads: list[Tensor]) -> None:
    """One call over the list, for gradients in the dtype of ``importance``."""
    torch._foreach_addcmul_(importance, grads, grads)


def accumulate_taylor_(importance: list[Tensor], grads: list[Tensor], weights: list[Tensor]) -> None:
    for total, grad, weight in zip(importance, grads, weights, strict=True):
        total.add_((weight.to(total.dtype) * grad.to(total.dtype)).abs())


def change_statistics(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    old = before.float()
    change = after.float() - old
    return change.square().mean(0), (change * old).sum(), old.square().sum(), change.square().sum()


def balanced_mask(
    safety: Tensor, task: Tensor, keep: int, focus: int, alpha: tuple[float, float] = (0.4, 0.8)
) -> Tensor:
    low, high = alpha
    weight = low + (high - low) * (1 + torch.tanh((safety / task).log().mean())) / 2
    in_safety, in_task = torch.zeros_like(safety, dtype=torch.bool), torch.zeros_like(safety, dtype=torch.bool)
    in_safety[safety.topk(focus).indices] = True
    in_task[task.topk(focus).indices] = True
    safety_only = (in_safety & ~in_task).nonzero().squeeze(1)
    kept = safety_only[safety[safety_only].argsort(descending=True, stable=True)][:keep]
    overlap = (in_safety & in_task).nonzero().squeeze(1)
    phi = (safety - weight * task)[overlap]
    filled = overlap[phi.argsort(descending=True, stable=True)][: keep - len(kept)]
    mask = torch.zeros_like(safety, dtype=torch.bool)
    mask[kept] = True
    mask[filled] = True
    return mask


def merge_(after: Tensor, before: Tensor, mask: Tensor, projection: float = 0.0) -> Tensor:
    return after.copy_(torch.where(mask, before, after - projection * before))


def edit_(
    after: Tensor, before: Tensor, safety_diagonal: Tensor, task_diagonal: Tensor, keep: int, focus: int
) -> Tensor:
    column_change, dot, before_norm_sq, _ = change_statistics(before, after)
    mask = balanced_mask(column_change / safety_diagonal, column_change / task_diagonal, keep, focus)
    return merge_(after, before, mask, (dot / before_norm_sq).item())


def project_(grads: Tensor, basis: Tensor) -> Tensor:
    """Two products with the basis: matrix times vector for one vector, matrix times matrix for rows of vectors."""
    if grads.dim() == 1:
        return grads.sub_(basis.t() @ (basis @ grads))
    return grads.sub_((grads @ basis.t()) @ basis)


def project_list_(grads: list[Tensor], basis: Tensor) -> None:
    """``torch.cat``, project, split: for a basis that is kept as one matrix ``[rank, total]``."""
    flat = torch.cat([grad.flatten() for grad in grads])
    project_(flat, basis)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def project_pairs_(grads: list[Tensor], basis: list[Tensor]) -> None:
    """The same for a basis that is a list like ``grads``: coefficients summed over the list, tensor by tensor."""
    pairs = [(grad, slices.flatten(1)) for grad, slices in zip(grads, basis, strict=True)]
    coefficients = sum(slices @ grad.flatten() for grad, slices in pairs)
    for grad, slices in pairs:
        grad.sub_((slices.t() @ coefficients).view_as(grad))


def orthonormalize(vectors: Tensor) -> Tensor:
    """Orthonormal rows with the span of those of ``vectors``, up to the sign of each."""
    return torch.linalg.qr(vectors.t()).Q.t()

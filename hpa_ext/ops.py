"""The nine functions: what they compute, what they accept, what they raise.

All take torch tensors (also ``nn.Parameter`` and tensors that require grad: autograd does not record these calls) and
any other array that speaks DLPack; nothing is copied.  A trailing ``_`` means in place: the first argument is changed,
its version counter is bumped, and what was passed comes back.  Rows may be strided.  float32, bfloat16 and float16 are
computed in float32 at least, float64 in float64.

Every function raises ``TypeError`` for a wrong kind of argument or dtype and ``ValueError`` for a wrong shape, device
or value, or for memory that is read-only or shared with another argument; messages begin with the argument's name.
Under ``torch.compile`` they are operators of their own (:mod:`hpa_ext.torch_ops`).

A call goes one of three ways.  Plain CPU tensors are served at once by the compiled module (:mod:`hpa_ext.direct`); a
program that is being traced gets the operator; everything else is checked here and handed to a backend.
``backend`` is ``None`` (the device decides), ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; see
:mod:`hpa_ext.backend`.

Sources: HPA (arXiv 2511.20158) for the scores, the selection and the adjustment; SparseGPT (arXiv 2301.00774) for the
layer-wise Hessian; Optimal Brain Surgeon for the inverse diagonal; EWC (arXiv 1612.00796) and Molchanov et al. (arXiv
1906.10771) for the importances; Daniel et al. (1976), Kahan and Parlett, and Barlow and Smoktunowicz (2013) for the
orthogonalisation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from hpa_ext import backend as backends
from hpa_ext import direct
from hpa_ext.arguments import (
    TensorLike,
    as_count,
    as_number,
    as_tensor,
    as_tensor_list,
    check_choice,
    check_no_overlap,
    check_same_device,
    check_same_dtype,
    check_same_shape,
)

__all__ = [
    "BalancedMask",
    "ChangeStatistics",
    "DampingWarning",
    "Edit",
    "FactorizationError",
    "accumulate_gram_",
    "accumulate_importance_",
    "balanced_mask",
    "change_statistics",
    "edit_",
    "inverse_diagonal",
    "merge_",
    "orthonormalize_",
    "project_",
]

T = TypeVar("T", bound=TensorLike)
Tensors = TypeVar("Tensors", bound=TensorLike | Sequence[TensorLike])

_RUN_BYTES = 16 * 2**20  # old and new weights that edit_ measures before it merges them: they stay in a large cache


class FactorizationError(ValueError, RuntimeError):
    """A damped Gram matrix is not positive definite, even at the strongest damping."""


class DampingWarning(UserWarning):
    """The requested damping did not make the matrix positive definite; a stronger one was used."""


class ChangeStatistics(NamedTuple):
    """What :func:`change_statistics` returns; ``change`` stands for ``after - before``."""

    column_change: Tensor
    """``[cols]``, float32 (float64 for float64 weights): mean over rows of ``change**2``."""
    dot: Tensor
    """0-dim float64: ``<change, before>``."""
    before_norm_sq: Tensor
    """0-dim float64: ``||before||**2``."""
    change_norm_sq: Tensor
    """0-dim float64: ``||change||**2``."""


class BalancedMask(NamedTuple):
    """What :func:`balanced_mask` returns."""

    mask: Tensor
    """bool ``[cols]``: columns that go back to the old weights (R)."""
    alpha: float
    """The weight of the task score in phi."""
    log_ratio: float
    """m, the mean of ``log(safety / task)`` over columns where both are positive."""
    overlap: int
    """|O|: columns in both focused sets."""
    kept: int
    """|R|."""
    kept_safety_only: int
    """Kept columns that are safety-focused alone (from N)."""
    kept_overlap: int
    """Kept columns that are in both focused sets (from O)."""


class Edit(NamedTuple):
    """What :func:`edit_` did to a layer: the selection, the coefficient, and the statistics that both come from."""

    mask: Tensor
    """bool ``[cols]``: columns that went back to the old weights (R)."""
    alpha: float
    """The weight of the task score in phi."""
    log_ratio: float
    """m, the mean of ``log(safety / task)`` over columns that changed."""
    overlap: int
    """|O|: columns in both focused sets."""
    kept: int
    """|R|."""
    kept_safety_only: int
    """Kept columns that are safety-focused alone (from N)."""
    kept_overlap: int
    """Kept columns that are in both focused sets (from O)."""
    projection: float
    """c, the coefficient of the old weights that was taken out of the update; 0 with ``projection="off"``."""
    statistics: ChangeStatistics
    """Of the weights before the edit."""


def accumulate_gram_(gram: T, x: TensorLike, scale: float = 2.0, *, backend: str | None = None) -> T:
    """Adds ``scale * x^T x`` to the lower triangle of ``gram``: the layer-wise least-squares Hessian before averaging.

    Args:
        gram: ``[cols, cols]`` float32 or float64, changed in place. The triangle above the diagonal is neither read
            nor written.
        x: ``[..., cols]`` activations, one token a row; float32, bfloat16 or float16 (any of them with a float64
            ``gram``, which also takes float64). Products are taken and summed in the dtype of ``gram``.
        scale: factor, applied to finished sums; 2 makes it the Hessian of ``||W x - y||^2``.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"`` or ``None`` (the device decides).

    Returns:
        ``gram``.

    Raises:
        TypeError, ValueError: see the module; also float64 ``x`` with a float32 ``gram``.

    Tokens are summed in blocks of fixed size: results are bit-reproducible for any number of threads on one machine.
    NaN and Inf in ``x`` spread to the rows and columns of ``gram`` they belong to.
    """
    if backend is None and not is_dynamo_compiling() and direct.accumulate_gram_(gram, x, scale):
        return gram
    if is_compiling():
        torch.ops.hpa_ext.accumulate_gram_(gram, x, scale, backend)
        return gram
    gram_tensor = as_tensor("gram", gram, dtypes=(torch.float32, torch.float64), dims="[cols, cols]", writable=True)
    _check_square("gram", gram_tensor)
    x_tensor = as_tensor("x", x, dims="[..., cols]")
    cols = gram_tensor.shape[0]
    if x_tensor.shape[-1] != cols:
        raise ValueError(f"x: expected {cols} columns like gram, got {tuple(x_tensor.shape)}")
    if x_tensor.dtype == torch.float64 and gram_tensor.dtype != torch.float64:
        raise TypeError("x: expected float32, bfloat16 or float16 with a float32 gram, got float64")
    check_same_device("x", x_tensor, "gram", gram_tensor)
    check_no_overlap([("gram", gram_tensor)], [("x", x_tensor)])
    factor = as_number("scale", scale)
    implementation = backends.select(backend, gram_tensor.device)
    for rows in _as_matrices(x_tensor):
        implementation.accumulate_gram_(gram_tensor, rows, factor)
    return gram


def inverse_diagonal(
    gram: TensorLike | None = None,
    damping: float = 0.01,
    mode: Literal["exact", "pivot"] = "exact",
    *,
    activations: TensorLike | None = None,
    scale: float = 2.0,
    info: dict[str, Any] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Returns ``diag((G + lambda I)^-1)`` with ``lambda = damping * mean(diag G)``: the divisors of the OBS scores.

    Args:
        gram: G, ``[cols, cols]`` float32 or float64; the lower triangle is read, nothing is changed.
        damping: lambda in units of the mean diagonal, > 0. Where the factorisation fails it is raised tenfold, up to
            1.0, with a :class:`DampingWarning`.
        mode: ``"exact"``: the diagonal of the inverse. ``"pivot"``: ``U_jj^2`` with ``(G + lambda I)^-1 = U^T U`` and U
            upper triangular, the divisor of SparseGPT and its relatives; it depends on the order of columns.
        activations: instead of ``gram``: ``[tokens, cols]``, float32, bfloat16, float16 or float64, standing for
            ``G = scale * activations^T activations``. With fewer than ``0.8 * cols`` tokens the exact diagonal comes
            from a ``tokens x tokens`` system and G is never formed.
        scale: see ``activations``; > 0. Not used with ``gram``.
        info: if given, filled with ``damping`` (used), ``lambda``, ``attempts`` and ``route`` (``"dense"`` or
            ``"low_rank"``).
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"`` or ``None`` (the device decides).

    Returns:
        ``[cols]`` float32, or float64 if the input is float64.

    Raises:
        ValueError: a diagonal that sums to zero (nothing to scale lambda by), NaN or Inf, both or neither of ``gram``
            and ``activations``.
        FactorizationError: not positive definite at damping 1.0.

    The exact diagonal is a sum of squares (column norms of the inverse Cholesky factor), so nothing cancels: the
    relative error is that of the factorisation. Matrices of at most 1024 columns, float64 input and the low-rank route
    are computed in float64, larger float32 ones in float32 with half a ``cols^2`` buffer. Bit-reproducible for any
    number of threads on one machine.
    """
    if backend is None and not is_dynamo_compiling() and info is None:
        answer = direct.inverse_diagonal(gram, damping, mode, activations, scale)
        if answer is not None:
            return cast(Tensor, answer)
    if is_compiling():
        return _trace_inverse_diagonal(gram, damping, mode, activations, scale, info, backend)
    check_choice("mode", mode, ("exact", "pivot"))
    used = as_number("damping", damping, minimum=0.0, strictly=True)
    if (gram is None) == (activations is None):
        raise ValueError("gram: expected exactly one of gram and activations")
    gram_tensor = activation_tensor = None
    if gram is not None:
        name = "gram"
        gram_tensor = given = as_tensor(name, gram, dtypes=(torch.float32, torch.float64), dims="[cols, cols]")
        _check_square(name, given)
    else:
        assert activations is not None
        name = "activations"
        activation_tensor = given = as_tensor(name, activations, dims="[tokens, cols]")
    factor = as_number("scale", scale, minimum=0.0, strictly=True)
    implementation = backends.select(backend, given.device)

    numbers: dict[str, Any] = {} if info is None else info
    numbers.update({"damping": used, "lambda": 0.0, "attempts": 0, "route": "dense"})
    if given.shape[1] == 0:
        return torch.empty(0, dtype=_wide(given.dtype), device=given.device)
    requested = used
    while True:
        diagonal, lam, route = implementation.inverse_diagonal(gram_tensor, activation_tensor, factor, used, mode)
        if not lam > 0:
            raise ValueError(f"{name}: expected a positive mean diagonal, got {lam / used:g} (no activations?)")
        numbers.update({"damping": used, "lambda": lam, "attempts": numbers["attempts"] + 1, "route": route})
        if diagonal is not None:
            break
        # One part in a million more than the limit: 0.01 * 10 * 10 may be a little above 1.
        if used * 10 > 1.0 + 1e-6:
            # A blocked factorization may stop at a bad pivot before it meets a NaN that lies further down.
            if gram_tensor is not None and not gram_tensor.tril().isfinite().all():
                raise ValueError(f"{name}: contains NaN or Inf")
            raise FactorizationError(
                f"{name}: the Gram matrix is not positive definite, even with damping {used:g} (lambda {lam:g})"
            )
        used *= 10
    if used != requested:
        warnings.warn(
            f"{name}: not positive definite with damping {requested:g}; used {used:g} (lambda {lam:g})",
            DampingWarning,
            stacklevel=2,
        )
    return diagonal


def accumulate_importance_(
    importance: Tensors,
    grads: TensorLike | Sequence[TensorLike | None],
    weights: TensorLike | Sequence[TensorLike | None] | None = None,
    kind: Literal["fisher", "taylor"] = "fisher",
    *,
    backend: str | None = None,
) -> Tensors:
    """Adds ``g^2`` (Fisher information, EWC) or ``|w g|`` (first-order Taylor) to a running importance.

    Args:
        importance: tensor, or list of tensors, changed in place. float32 keeps a long sum accurate; bfloat16 and
            float16 are accepted and rounded once a call.
        grads: like ``importance`` in form and shapes, of any float dtype. A ``None`` in a list (a parameter without a
            gradient) leaves its importance as it is.
        weights: like ``grads``; needed by, and only by, ``kind="taylor"``.
        kind: ``"fisher"`` or ``"taylor"``.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"`` or ``None`` (the device decides).

    Returns:
        ``importance``.

    Raises:
        TypeError, ValueError: see the module; also lists of different lengths.

    A whole list is one call. Each element is computed by itself: bit-reproducible. NaN and Inf spread to their element.
    """
    if backend is None and not is_dynamo_compiling():
        done = direct.accumulate_importance_(importance, grads, weights, kind)
        if done:
            return importance
    if is_compiling():
        _trace_accumulate_importance(importance, grads, weights, kind, backend)
        return importance
    check_choice("kind", kind, ("fisher", "taylor"))
    if (weights is not None) != (kind == "taylor"):
        needed = "are needed" if kind == "taylor" else "are not used"
        raise ValueError(f"weights: {needed} with kind={kind!r}")
    if isinstance(importance, (list, tuple)):
        names, target_items, grad_items, weight_items = _entries_with_gradients(importance, grads, weights)
    else:
        names, target_items, grad_items = [""], [importance], [grads]
        weight_items = None if weights is None else [weights]

    target_tensors = [as_tensor(f"importance{n}", t, writable=True) for n, t in zip(names, target_items, strict=True)]
    grad_tensors = [as_tensor(f"grads{n}", t) for n, t in zip(names, grad_items, strict=True)]
    weight_tensors = None
    read = [(f"grads{n}", t) for n, t in zip(names, grad_tensors, strict=True)]
    if weight_items is not None:
        weight_tensors = [as_tensor(f"weights{n}", t) for n, t in zip(names, weight_items, strict=True)]
        read += [(f"weights{n}", t) for n, t in zip(names, weight_tensors, strict=True)]
    if not target_tensors:
        return importance
    for i, (name, tensor) in enumerate(read):
        place = i % len(names)
        check_same_shape(name, tensor, f"importance{names[place]}", target_tensors[place])
        check_same_device(name, tensor, f"importance{names[0]}", target_tensors[0])
    written = [(f"importance{n}", t) for n, t in zip(names, target_tensors, strict=True)]
    for name, tensor in written[1:]:
        check_same_device(name, tensor, written[0][0], target_tensors[0])
    check_no_overlap(written, read)
    implementation = backends.select(backend, target_tensors[0].device)
    implementation.accumulate_importance_(target_tensors, grad_tensors, weight_tensors, kind)
    return importance


@overload
def change_statistics(before: TensorLike, after: TensorLike, *, backend: str | None = None) -> ChangeStatistics: ...
@overload
def change_statistics(
    before: Sequence[TensorLike], after: Sequence[TensorLike], *, backend: str | None = None
) -> list[ChangeStatistics]: ...
def change_statistics(
    before: TensorLike | Sequence[TensorLike],
    after: TensorLike | Sequence[TensorLike],
    *,
    backend: str | None = None,
) -> ChangeStatistics | list[ChangeStatistics]:
    """Reads both weights once and returns what the scores and the orthogonal adjustment need.

    ``column_change[j] = mean_i (after - before)[i, j]^2``, ``dot = <after - before, before>``, and both squared norms.
    The projection coefficient of the paper is ``dot / before_norm_sq``.

    Args:
        before: ``[rows, cols]`` old weights; float32, bfloat16, float16 or float64. Or a list of layers.
        after: ``[rows, cols]`` new weights, of the same dtype. Or a list like ``before``.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"`` or ``None`` (the device decides).

    Returns:
        :class:`ChangeStatistics`, or a list with one for each layer: the same numbers as from a call for each, but the
        threads share the whole list. With no rows, all zeros.

    Raises:
        TypeError, ValueError: see the module.

    Differences and products are taken in float32 (float64 for float64) and summed in it over 4 rows, beyond in float64.
    Blocks have a fixed size: bit-reproducible for any number of threads on one machine. NaN and Inf spread to their
    column and to the scalars.
    """
    if backend is None and not is_dynamo_compiling() and (answer := direct.change_statistics(before, after)):
        if isinstance(answer, list):
            return [ChangeStatistics._make(layer) for layer in answer]
        return tuple.__new__(ChangeStatistics, answer)
    if isinstance(before, (list, tuple)):
        return _change_statistics_list(before, after, backend)
    before, after = cast(TensorLike, before), cast(TensorLike, after)
    if is_compiling():
        column_change, scalars = torch.ops.hpa_ext.change_statistics(before, after, backend)
        return ChangeStatistics(column_change, *scalars.unbind())
    before_tensor, after_tensor = _weights(before, after)
    implementation = backends.select(backend, before_tensor.device)
    column_change, scalars = implementation.change_statistics(before_tensor, after_tensor)
    return ChangeStatistics(column_change, *scalars.unbind())


def balanced_mask(
    safety: TensorLike,
    task: TensorLike,
    keep: int,
    focus: int,
    alpha: tuple[float, float] = (0.4, 0.8),
    *,
    mode: Literal["full", "eps", "phi"] = "full",
    alpha_mode: Literal["affine", "relu", "abs", "const"] = "affine",
    alpha_sign: Literal[1, -1] = 1,
    overflow: Literal["cap", "keep"] = "cap",
    phi_norm: Literal["none", "mean"] = "none",
    backend: str | None = None,
) -> BalancedMask:
    """Chooses the columns that go back to the old weights (HPA, partition and balanced selection).

    S and T are the ``focus`` best columns by ``safety`` and by ``task``, ``O = S & T``, ``N = S - T``. With
    ``m = mean log(safety / task)``, ``alpha = a0 + (a1 - a0) (1 + tanh m) / 2`` and ``phi = safety - alpha * task``,
    first columns of N are kept, best ``safety`` first, then columns of O, best ``phi`` first, until there are ``keep``.

    Args:
        safety: ``[cols]`` safety score (eps-bar), non-negative and finite.
        task: ``[cols]`` task score (zeta-bar), likewise.
        keep: number of columns to keep (n_p), ``0 <= keep <= focus``.
        focus: size of the focused sets (n_k), ``keep <= focus <= cols``.
        alpha: ``(a0, a1)``.
        mode: ``"full"`` as above; ``"eps"``: the ``keep`` best by ``safety`` among all columns; ``"phi"``: up to
            ``keep`` columns of O by phi, nothing else.
        alpha_mode: ``"affine"`` as above; ``"relu"``: ``a0 + (a1 - a0) max(0, tanh m)``; ``"abs"``:
            ``a0 + (a1 - a0) |tanh m|``; ``"const"``: ``a0``.
        alpha_sign: ``-1`` lets alpha fall with m.
        overflow: what happens when N has more than ``keep`` columns: ``"cap"`` keeps the best of them, ``"keep"`` all.
        phi_norm: ``"mean"`` divides both scores by their means inside phi.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"`` or ``None`` (the device decides).

    Returns:
        :class:`BalancedMask`.

    Raises:
        ValueError: NaN, Inf or a negative score (the message names the argument and the first bad index), counts out
            of order, an unknown option.

    Scores are compared in float64; ties go to the lower index. m is the mean over columns where both scores are
    positive, 0 if there is none. Its rounding depends on no order: on the CPU every backend gives the same number, on
    a GPU its last digits can differ.
    """
    if backend is None and not is_dynamo_compiling():
        options = (keep, focus, alpha, mode, alpha_mode, alpha_sign, overflow, phi_norm)
        if answer := direct.balanced_mask(safety, task, *options):
            return tuple.__new__(BalancedMask, answer)
    if is_compiling():
        mask, numbers = torch.ops.hpa_ext.balanced_mask(
            safety, task, keep, focus, list(alpha), mode, alpha_mode, alpha_sign, overflow, phi_norm, backend
        )
        used_alpha, log_ratio, *counts = numbers.tolist()
        return BalancedMask(mask, used_alpha, log_ratio, *(int(count) for count in counts))
    safety_tensor = as_tensor("safety", safety, dims="[cols]")
    task_tensor = as_tensor("task", task, dims="[cols]")
    check_same_shape("task", task_tensor, "safety", safety_tensor)
    check_same_device("task", task_tensor, "safety", safety_tensor)
    cols = safety_tensor.shape[0]
    keep, focus = _check_counts("", keep, focus, cols)
    low, high = _check_selection(alpha, mode, alpha_mode, alpha_sign, overflow, phi_norm)
    implementation = backends.select(backend, safety_tensor.device)
    for name, score in (("safety", safety_tensor), ("task", task_tensor)):
        # ge() is false for NaN, so one comparison finds NaN and negative numbers.
        good = score.ge(0) & score.isfinite()
        if not good.all():
            first = int(good.logical_not().nonzero()[0, 0])
            raise ValueError(
                f"{name}: expected finite, non-negative scores, got {score[first].item()} at index {first}"
            )
    mask, used_alpha, log_ratio, overlap, kept_safety_only, kept_overlap = implementation.balanced_mask(
        safety_tensor, task_tensor, keep, focus, (low, high), mode, alpha_mode, alpha_sign, overflow, phi_norm
    )
    return BalancedMask(
        mask, used_alpha, log_ratio, overlap, kept_safety_only + kept_overlap, kept_safety_only, kept_overlap
    )


def merge_(
    after: Tensors,
    before: TensorLike | Sequence[TensorLike],
    mask: TensorLike | Sequence[TensorLike],
    projection: float | Sequence[float] = 0.0,
    *,
    backend: str | None = None,
) -> Tensors:
    """Writes the edited weights over ``after``: old columns where ``mask``, ``after - projection * before`` elsewhere.

    Args:
        after: ``[rows, cols]`` new weights, changed in place; float32, bfloat16, float16 or float64.
        before: ``[rows, cols]`` old weights, of the same dtype.
        mask: bool ``[cols]``: columns to take from ``before``.
        projection: coefficient of the orthogonal adjustment, finite.
            All four may be lists with an entry for each layer; one ``projection`` then serves all.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"`` or ``None`` (the device decides).

    Returns:
        ``after``.

    Raises:
        TypeError, ValueError: see the module.

    One pass; the threads share the layers of a list. Kept columns are bit-exact copies of ``before``, and with
    ``projection == 0`` the others keep their bits. The rest is computed in float32 (float64 for float64) and rounded
    once to the storage dtype. Bit-reproducible. NaN and Inf spread to their element.
    """
    if backend is None and not is_dynamo_compiling() and direct.merge_(after, before, mask, projection):
        return after
    if isinstance(after, (list, tuple)):
        _merge_list(after, before, mask, projection, backend)
        return after
    if is_compiling():
        torch.ops.hpa_ext.merge_(after, before, mask, projection, backend)
        return after
    layer = _merge_arguments("", cast(TensorLike, after), before, mask, projection)
    check_no_overlap([("after", layer[0])], [("before", layer[1]), ("mask", layer[2])])
    backends.select(backend, layer[0].device).merge_(*layer)
    return after


@overload
def edit_(
    after: TensorLike,
    before: TensorLike,
    safety_diagonal: TensorLike,
    task_diagonal: TensorLike,
    keep: int,
    focus: int,
    alpha: tuple[float, float] = ...,
    *,
    projection: Literal["fro", "off"] = ...,
    mode: Literal["full", "eps", "phi"] = ...,
    alpha_mode: Literal["affine", "relu", "abs", "const"] = ...,
    alpha_sign: Literal[1, -1] = ...,
    overflow: Literal["cap", "keep"] = ...,
    phi_norm: Literal["none", "mean"] = ...,
    backend: str | None = ...,
) -> Edit: ...
@overload
def edit_(
    after: Sequence[TensorLike],
    before: Sequence[TensorLike],
    safety_diagonal: Sequence[TensorLike],
    task_diagonal: Sequence[TensorLike],
    keep: int | Sequence[int],
    focus: int | Sequence[int],
    alpha: tuple[float, float] = ...,
    *,
    projection: Literal["fro", "off"] = ...,
    mode: Literal["full", "eps", "phi"] = ...,
    alpha_mode: Literal["affine", "relu", "abs", "const"] = ...,
    alpha_sign: Literal[1, -1] = ...,
    overflow: Literal["cap", "keep"] = ...,
    phi_norm: Literal["none", "mean"] = ...,
    backend: str | None = ...,
) -> list[Edit]: ...
def edit_(
    after: Any,
    before: Any,
    safety_diagonal: Any,
    task_diagonal: Any,
    keep: Any,
    focus: Any,
    alpha: tuple[float, float] = (0.4, 0.8),
    *,
    projection: Literal["fro", "off"] = "fro",
    mode: Literal["full", "eps", "phi"] = "full",
    alpha_mode: Literal["affine", "relu", "abs", "const"] = "affine",
    alpha_sign: Literal[1, -1] = 1,
    overflow: Literal["cap", "keep"] = "cap",
    phi_norm: Literal["none", "mean"] = "none",
    backend: str | None = None,
) -> Edit | list[Edit]:
    """Edits a layer by the paper's whole rule (HPA): measure the change, score, select, adjust, merge.

    With ``change = after - before``, all in float64 but the statistics and the weights::

        eps[j]  = mean_i change[i, j]^2 / safety_diagonal[j]        zeta[j] = mean_i change[i, j]^2 / task_diagonal[j]
        mask    = balanced_mask(eps, zeta, keep, focus, alpha)      c = <change, before> / |before|^2
        after[:, j] = before[:, j] where mask[j], else after[:, j] - c * before[:, j]

    Args:
        after: ``[rows, cols]`` new weights, changed in place; float32, bfloat16, float16 or float64.
        before: ``[rows, cols]`` old weights, of the same dtype.
        safety_diagonal: ``[cols]``, ``diag((H_s + lambda I)^-1)`` as from :func:`inverse_diagonal`, positive and
            finite, any float dtype.
        task_diagonal: ``[cols]``, ``diag((H_t + lambda I)^-1)``, likewise.
        keep: number of columns that go back, see :func:`balanced_mask`, as for ``focus``, ``alpha`` and the options.
        focus: size of the focused sets.
            All six may be lists with an entry for each layer; one ``keep`` or ``focus`` then serves all.
        alpha: ``(a0, a1)``.
        projection: ``"fro"`` as above; ``"off"``: c = 0.
        mode, alpha_mode, alpha_sign, overflow, phi_norm: of :func:`balanced_mask`.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"`` or ``None`` (the device decides).

    Returns:
        :class:`Edit`, or a list with one for each layer. Weights and numbers are bit by bit those of
        :func:`change_statistics`, :func:`balanced_mask` and :func:`merge_`, called one after the other. c is 0 where
        ``before`` is zero. A layer whose change is zero stays as it is and keeps no column.

    Raises:
        TypeError, ValueError: see the module; also a diagonal that is not positive and finite. All of it is checked
            before anything is written.
        ValueError: NaN or Inf in a weight, or a score beyond float64. That layer and those after it are as they were;
            layers of a list that come before it may have been edited.

    Layers of a list are taken in runs that fit a cache, so that the merge finds there what the statistics have read. A
    layer that is larger finds its last rows there. Bit-reproducible for any number of threads on one machine.
    Under ``torch.compile`` the layers of a list are checked one by one, each before it is edited.
    """
    several = isinstance(after, (list, tuple))
    given = (after, before, safety_diagonal, task_diagonal, keep, focus)
    edits: list[Edit] = []
    if is_compiling():
        options = (list(alpha), projection, mode, alpha_mode, alpha_sign, overflow, phi_norm, backend)
        edits = _trace_edit(_entries_to_edit(*given) if several else [given], options)
        return edits if several else edits[0]
    if backend is None:
        answer = direct.edit_(*given, projection, alpha, mode, alpha_mode, alpha_sign, overflow, phi_norm)
        if answer is not None:
            edits = [Edit._make((*chosen, ChangeStatistics._make(numbers))) for chosen, numbers in answer]
        if edits and len(edits) == (len(after) if several else 1):
            return edits if several else edits[0]
    check_choice("projection", projection, ("fro", "off"))
    items = _entries_to_edit(*given) if several else [given]
    layers = [_edit_arguments(f"[{i}]" if several else "", *item) for i, item in enumerate(items)]
    _check_selection(alpha, mode, alpha_mode, alpha_sign, overflow, phi_norm)
    written = [(f"after{layer.place}", layer.after) for layer in layers]
    read = [(f"before{layer.place}", layer.before) for layer in layers]
    read += [(f"safety_diagonal{layer.place}", layer.safety_diagonal) for layer in layers]
    read += [(f"task_diagonal{layer.place}", layer.task_diagonal) for layer in layers]
    for name, tensor in written[1:]:
        check_same_device(name, tensor, written[0][0], layers[0].after)
    check_no_overlap(written, read)
    selection = {
        "alpha": alpha,
        "mode": mode,
        "alpha_mode": alpha_mode,
        "alpha_sign": alpha_sign,
        "overflow": overflow,
        "phi_norm": phi_norm,
        "backend": backend,
    }
    for run in _runs_in_cache(layers[len(edits) :]):
        edits += _edit_run(run, projection, selection)
    return edits if several else edits[0]


def project_(
    grads: Tensors, basis: TensorLike | Sequence[TensorLike], *, passes: int = 1, backend: str | None = None
) -> Tensors:
    """Takes out of each vector its part in the span of the rows of ``basis``: ``g -= sum_k <g, q_k> q_k``.

    Args:
        grads: ``[..., n]``, each row a vector, changed in place. Or a list of tensors of any shapes, which together are
            one long vector. float32, bfloat16, float16 or float64.
        basis: ``[rank, n]`` with orthonormal rows. Or a list, each ``[rank, *shape of its grad]`` or
            ``[rank, numel of its grad]``: coefficients are summed over the list. Any float dtype.
        passes: repetitions; 1 is enough for an orthonormal basis, 2 cleans up after one that is orthonormal only to
            storage precision.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"`` or ``None`` (the device decides).

    Returns:
        ``grads``.

    Raises:
        TypeError, ValueError: see the module; also lists of different lengths or slices of different ranks.

    Dot products are summed in float32 over blocks of at most 2048 elements and in float64 beyond. Blocks have a fixed
    size: bit-reproducible for any number of threads on one machine. NaN and Inf spread to their whole vector.
    """
    if backend is None and not is_dynamo_compiling() and direct.project_(grads, basis, passes):
        return grads
    if is_compiling():
        project = torch.ops.hpa_ext.project_list_ if isinstance(grads, (list, tuple)) else torch.ops.hpa_ext.project_
        project(grads, basis, passes, backend)
        return grads
    passes = as_count("passes", passes, minimum=1)
    if isinstance(grads, (list, tuple)):
        if not isinstance(basis, (list, tuple)) or len(basis) != len(grads):
            raise ValueError(f"basis: expected a list of {len(grads)} tensors like grads, got {_describe(basis)}")
        grad_tensors = as_tensor_list("grads", grads, writable=True)
        basis_tensors = as_tensor_list("basis", basis)
        if not grad_tensors:
            return grads
        for i, (grad, slices) in enumerate(zip(grad_tensors, basis_tensors, strict=True)):
            basis_tensors[i] = _basis_slices(f"basis[{i}]", slices, grad, basis_tensors[0])
        names = [f"[{i}]" for i in range(len(grad_tensors))]
        batches = [[grad.unsqueeze(0) for grad in grad_tensors]]
    else:
        if isinstance(basis, (list, tuple)):
            raise TypeError("basis: expected a tensor like grads, got a list")
        grad_tensor = as_tensor("grads", cast(TensorLike, grads), dims="[..., n]", writable=True)
        basis_tensor = as_tensor("basis", cast(TensorLike, basis), dims="[rank, n]")
        if basis_tensor.shape[1] != grad_tensor.shape[-1]:
            raise ValueError(
                f"basis: expected [rank, {grad_tensor.shape[-1]}] for grads {tuple(grad_tensor.shape)}, "
                f"got {tuple(basis_tensor.shape)}"
            )
        grad_tensors, basis_tensors, names = [grad_tensor], [basis_tensor], [""]
        batches = [[rows] for rows in _as_matrices(grad_tensor)]
    written = [(f"grads{n}", t) for n, t in zip(names, grad_tensors, strict=True)]
    read = [(f"basis{n}", t) for n, t in zip(names, basis_tensors, strict=True)]
    for name, tensor in written[1:] + read:
        check_same_device(name, tensor, written[0][0], grad_tensors[0])
    check_no_overlap(written, read)
    implementation = backends.select(backend, grad_tensors[0].device)
    for batch in batches:
        implementation.project_(batch, basis_tensors, passes)
    return grads


def orthonormalize_(
    vectors: TensorLike, basis: TensorLike | None = None, rtol: float | None = None, *, backend: str | None = None
) -> int:
    """Turns the rows of ``vectors`` into an orthonormal set, also orthogonal to ``basis``, and drops dependent ones.

    Rows are taken in order. A row is dropped where its part outside the span of ``basis`` and of the rows kept so far
    is at most ``rtol`` of its length, or where a second orthogonalisation shrinks it below ``1/sqrt(2)`` (Kahan and
    Parlett: what is left is rounding noise). Dropped rows are never normalised.

    Args:
        vectors: ``[rank, n]``, changed in place: the first ``kept`` rows are the orthonormal set, in order, the others
            zero.
        basis: ``[known, n]`` with orthonormal rows and ``known < n``, of the same dtype; read only.
        rtol: drop tolerance, ``0 <= rtol < 1``. ``None``: 1e-4; 1e-2 for bfloat16 and float16, below which the rest is
            rounding noise of the storage.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"reference"`` or ``None`` (the device decides).

    Returns:
        The number of rows kept.

    Raises:
        ValueError: NaN or Inf in a row (named; nothing has been changed), or a basis that already spans everything;
            and see the module.

    Loss of orthogonality is of the order of the unit roundoff, whatever the condition of ``vectors`` (block classical
    Gram-Schmidt with reorthogonalisation). Bit-reproducible for any number of threads on one machine.
    """
    if backend is None and not is_dynamo_compiling():
        kept = direct.orthonormalize_(vectors, basis, rtol)
        if kept is not None:
            return cast(int, kept)
    if is_compiling():
        return int(torch.ops.hpa_ext.orthonormalize_(vectors, basis, rtol, backend).item())
    vector_tensor = as_tensor("vectors", vectors, dims="[rank, n]", writable=True)
    basis_tensor = None
    if basis is not None:
        basis_tensor = as_tensor("basis", basis, dims="[known, n]")
        n = vector_tensor.shape[1]
        if basis_tensor.shape[1] != n:
            raise ValueError(f"basis: expected [known, {n}] like vectors, got {tuple(basis_tensor.shape)}")
        if basis_tensor.shape[0] >= n > 0:
            raise ValueError(
                f"basis: expected fewer than {n} rows, got {basis_tensor.shape[0]}: nothing is left to add"
            )
        check_same_dtype("basis", basis_tensor, "vectors", vector_tensor)
        check_same_device("basis", basis_tensor, "vectors", vector_tensor)
        check_no_overlap([("vectors", vector_tensor)], [("basis", basis_tensor)])
    if rtol is None:
        rtol = 1e-2 if vector_tensor.dtype in (torch.bfloat16, torch.float16) else 1e-4
    tolerance = as_number("rtol", rtol, minimum=0.0)
    if tolerance >= 1:
        raise ValueError(f"rtol: expected a number below 1, got {tolerance:g}")
    implementation = backends.select(backend, vector_tensor.device)
    return implementation.orthonormalize_(vector_tensor, basis_tensor, tolerance)


def _weights(before: Any, after: Any, place: str = "") -> tuple[Tensor, Tensor]:
    """Checked arguments of change_statistics; ``place`` is an index in a list, for messages."""
    before_tensor = as_tensor(f"before{place}", before, dims="[rows, cols]")
    after_tensor = as_tensor(f"after{place}", after, dims="[rows, cols]")
    check_same_shape(f"after{place}", after_tensor, f"before{place}", before_tensor)
    check_same_dtype(f"after{place}", after_tensor, f"before{place}", before_tensor)
    check_same_device(f"after{place}", after_tensor, f"before{place}", before_tensor)
    return before_tensor, after_tensor


def _check_counts(place: str, keep: Any, focus: Any, cols: int) -> tuple[int, int]:
    keep, focus = as_count(f"keep{place}", keep), as_count(f"focus{place}", focus)
    if not keep <= focus <= cols:
        raise ValueError(f"focus{place}: expected keep <= focus <= cols, got keep {keep}, focus {focus}, cols {cols}")
    return keep, focus


def _check_selection(
    alpha: Any, mode: Any, alpha_mode: Any, alpha_sign: Any, overflow: Any, phi_norm: Any
) -> tuple[float, float]:
    """Checks the options of balanced_mask; returns ``alpha``."""
    try:
        low, high = alpha
    except (TypeError, ValueError):
        raise ValueError(f"alpha: expected two numbers (a0, a1), got {alpha!r}") from None
    low, high = as_number("alpha[0]", low), as_number("alpha[1]", high)
    check_choice("mode", mode, ("full", "eps", "phi"))
    check_choice("alpha_mode", alpha_mode, ("affine", "relu", "abs", "const"))
    if not hasattr(alpha_sign, "__index__") or alpha_sign not in (1, -1):
        raise ValueError(f"alpha_sign: expected 1 or -1, got {alpha_sign!r}")
    check_choice("overflow", overflow, ("cap", "keep"))
    check_choice("phi_norm", phi_norm, ("none", "mean"))
    return low, high


def _change_statistics_list(before: Sequence[Any], after: Any, backend: str | None) -> list[ChangeStatistics]:
    after_items = _as_list("after", after, len(before), "tensors like before")
    if is_compiling():
        return [change_statistics(old, new, backend=backend) for old, new in zip(before, after_items, strict=True)]
    layers = [_weights(old, new, f"[{i}]") for i, (old, new) in enumerate(zip(before, after_items, strict=True))]
    if not layers:
        return []
    for i, (old, _) in enumerate(layers):
        check_same_device(f"before[{i}]", old, "before[0]", layers[0][0])
    return _measure([old for old, _ in layers], [new for _, new in layers], backend)


def _measure(before: list[Tensor], after: list[Tensor], backend: str | None) -> list[ChangeStatistics]:
    """change_statistics of a list of checked layers, at least one."""
    implementation = backends.select(backend, before[0].device)
    together = getattr(implementation, "change_statistics_list", None)
    if together is not None:
        results = together(before, after)
    else:
        results = [implementation.change_statistics(old, new) for old, new in zip(before, after, strict=True)]
    return [ChangeStatistics(column_change, *scalars.unbind()) for column_change, scalars in results]


def _merge_weights(place: str, after: Any, before: Any) -> tuple[Tensor, Tensor]:
    """Weights of merge_ and edit_, checked: ``after`` is written to."""
    after_tensor = as_tensor(f"after{place}", after, dims="[rows, cols]", writable=True)
    before_tensor = as_tensor(f"before{place}", before, dims="[rows, cols]")
    check_same_shape(f"before{place}", before_tensor, f"after{place}", after_tensor)
    check_same_dtype(f"before{place}", before_tensor, f"after{place}", after_tensor)
    check_same_device(f"before{place}", before_tensor, f"after{place}", after_tensor)
    return after_tensor, before_tensor


def _merge_arguments(
    place: str, after: Any, before: Any, mask: Any, projection: Any
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Checked arguments of merge_; ``place`` is an index in a list, for messages."""
    after_tensor, before_tensor = _merge_weights(place, after, before)
    mask_tensor = as_tensor(f"mask{place}", mask, dtypes=(torch.bool,), dims="[cols]")
    check_same_device(f"mask{place}", mask_tensor, f"after{place}", after_tensor)
    cols = after_tensor.shape[1]
    if mask_tensor.shape[0] != cols:
        raise ValueError(f"mask{place}: expected {cols} entries, one a column, got {mask_tensor.shape[0]}")
    return after_tensor, before_tensor, mask_tensor, as_number("projection", projection)


def _merge_list(after: Sequence[Any], before: Any, mask: Any, projection: Any, backend: str | None) -> None:
    count = len(after)
    before_items, mask_items = (
        _as_list("before", before, count, "tensors like after"),
        _as_list("mask", mask, count, "tensors like after"),
    )
    if isinstance(projection, (list, tuple)):
        factors = _as_list("projection", projection, count, "numbers, one a layer")
    else:
        factors = [projection] * count
    items = list(zip(after, before_items, mask_items, factors, strict=True))
    if is_compiling():
        for item in items:
            merge_(*item, backend=backend)
        return
    layers = [_merge_arguments(f"[{i}]", *item) for i, item in enumerate(items)]
    if not layers:
        return
    written = [(f"after[{i}]", layer[0]) for i, layer in enumerate(layers)]
    read = [(f"before[{i}]", layer[1]) for i, layer in enumerate(layers)]
    read += [(f"mask[{i}]", layer[2]) for i, layer in enumerate(layers)]
    for name, tensor in written:
        check_same_device(name, tensor, "after[0]", layers[0][0])
    check_no_overlap(written, read)
    _merge_checked(layers, backend)


def _merge_checked(layers: list[tuple[Tensor, Tensor, Tensor, float]], backend: str | None) -> None:
    """merge_ for a list of checked layers ``(after, before, mask, projection)``, at least one."""
    implementation = backends.select(backend, layers[0][0].device)
    together = getattr(implementation, "merge_list_", None)
    if together is not None:
        together(*(list(column) for column in zip(*layers, strict=True)))
        return
    for layer in layers:
        implementation.merge_(*layer)


class _LayerToEdit(NamedTuple):
    """Checked arguments of edit_ for one layer."""

    place: str  # its index in a list, for messages
    after: Tensor
    before: Tensor
    safety_diagonal: Tensor
    task_diagonal: Tensor
    keep: int
    focus: int


def _entries_to_edit(after: Sequence[Any], *others: Any) -> list[tuple[Any, ...]]:
    count = len(after)
    columns: list[Sequence[Any]] = [after]
    for name, value in zip(("before", "safety_diagonal", "task_diagonal", "keep", "focus"), others, strict=True):
        if name in ("keep", "focus") and not isinstance(value, (list, tuple)):
            columns.append([value] * count)
        else:
            columns.append(_as_list(name, value, count, "entries like after"))
    return list(zip(*columns, strict=True))


def _edit_arguments(
    place: str, after: Any, before: Any, safety_diagonal: Any, task_diagonal: Any, keep: Any, focus: Any
) -> _LayerToEdit:
    after_tensor, before_tensor = _merge_weights(place, after, before)
    keep, focus = _check_counts(place, keep, focus, after_tensor.shape[1])
    safety_tensor = _as_diagonal(f"safety_diagonal{place}", safety_diagonal, f"after{place}", after_tensor)
    task_tensor = _as_diagonal(f"task_diagonal{place}", task_diagonal, f"after{place}", after_tensor)
    return _LayerToEdit(place, after_tensor, before_tensor, safety_tensor, task_tensor, keep, focus)


def _as_diagonal(name: str, value: Any, weight_name: str, weight: Tensor) -> Tensor:
    """A checked ``[cols]`` of positive finite numbers."""
    diagonal = as_tensor(name, value, dims="[cols]")
    check_same_device(name, diagonal, weight_name, weight)
    cols = weight.shape[1]
    if diagonal.shape[0] != cols:
        raise ValueError(f"{name}: expected {cols} entries, one a column, got {diagonal.shape[0]}")
    if cols:
        lowest, highest = diagonal.aminmax()  # both are NaN where there is one
        if not (lowest.item() > 0 and highest.item() < math.inf):
            first = int((diagonal.gt(0) & diagonal.isfinite()).logical_not().nonzero()[0, 0])
            raise ValueError(
                f"{name}: expected positive, finite numbers, got {diagonal[first].item()} at index {first}"
            )
    return diagonal


def _runs_in_cache(layers: list[_LayerToEdit]) -> Iterator[list[_LayerToEdit]]:
    """Cuts the list into runs of at least one layer whose weights, old and new, fit the cache together."""
    run: list[_LayerToEdit] = []
    total = 0
    for layer in layers:
        size = 2 * layer.after.numel() * layer.after.element_size()
        if run and total + size > _RUN_BYTES:
            yield run
            run, total = [], 0
        run.append(layer)
        total += size
    if run:
        yield run


def _edit_run(layers: list[_LayerToEdit], projection: str, options: dict[str, Any]) -> list[Edit]:
    backend = options["backend"]
    measured = _measure([layer.before for layer in layers], [layer.after for layer in layers], backend)
    edits = [
        _decide(layer, statistics, projection, options) for layer, statistics in zip(layers, measured, strict=True)
    ]
    changed = [
        (layer.after, layer.before, edit.mask, edit.projection)
        for layer, edit in zip(layers, edits, strict=True)
        if edit.kept or edit.projection
    ]
    if changed:
        _merge_checked(changed, backend)
    return edits


def _decide(layer: _LayerToEdit, statistics: ChangeStatistics, projection: str, options: dict[str, Any]) -> Edit:
    """What to do with a layer; nothing is written."""
    column_change = statistics.column_change
    largest = column_change.max().item() if len(column_change) else 0.0  # NaN where there is one
    dot, before_norm_sq = statistics.dot.item(), statistics.before_norm_sq.item()
    if not largest < math.inf:
        column = int(column_change.isfinite().logical_not().nonzero()[0, 0])
        raise ValueError(f"after{layer.place}: the change of column {column} is not finite")
    if not (math.isfinite(dot) and math.isfinite(before_norm_sq)):
        raise ValueError(f"before{layer.place}: <after - before, before> or the squared norm is not finite")
    change = column_change.double()
    keep, focus = (layer.keep, layer.focus) if largest > 0 else (0, 0)
    chosen = balanced_mask(
        change / layer.safety_diagonal.double(), change / layer.task_diagonal.double(), keep, focus, **options
    )
    coefficient = dot / before_norm_sq if projection == "fro" and largest > 0 and before_norm_sq > 0 else 0.0
    return Edit(*chosen, coefficient, statistics)


def _trace_inverse_diagonal(
    gram: Any,
    damping: float,
    mode: str,
    activations: Any,
    scale: float,
    info: dict[str, Any] | None,
    backend: str | None,
) -> Tensor:
    """Hands over to the operator, and reads its numbers only where somebody wants them: that ends a graph."""
    diagonal, numbers = torch.ops.hpa_ext.inverse_diagonal(gram, damping, mode, activations, scale, backend)
    if info is not None:
        used, lam, attempts, low_rank = numbers.tolist()
        route = "low_rank" if low_rank else "dense"
        info.update({"damping": used, "lambda": lam, "attempts": int(attempts), "route": route})
    return cast(Tensor, diagonal)


def _trace_accumulate_importance(importance: Any, grads: Any, weights: Any, kind: str, backend: str | None) -> None:
    """Hands over to the operator, which takes lists of tensors alone."""
    if not isinstance(importance, (list, tuple)):
        importance, grads, weights = [importance], [grads], None if weights is None else [weights]
    present = [i for i, grad in enumerate(grads) if grad is not None]
    torch.ops.hpa_ext.accumulate_importance_(
        [importance[i] for i in present],
        [grads[i] for i in present],
        [] if weights is None else [weights[i] for i in present],
        kind,
        backend,
    )


def _trace_edit(items: Sequence[tuple[Any, ...]], options: tuple[Any, ...]) -> list[Edit]:
    """Hands each layer over to the operator, then reads all their numbers, which ends a graph."""
    answers = [torch.ops.hpa_ext.edit_(*item, *options) for item in items]
    rows = torch.stack([answer[-1] for answer in answers]).tolist() if answers else []
    edits = []
    for (mask, column_change, scalars, _), (alpha, log_ratio, *counts, projection) in zip(answers, rows, strict=True):
        overlap, kept, kept_safety_only, kept_overlap = (int(count) for count in counts)
        statistics = ChangeStatistics(column_change, *scalars.unbind())
        edits.append(
            Edit(mask, alpha, log_ratio, overlap, kept, kept_safety_only, kept_overlap, projection, statistics)
        )
    return edits


def _check_square(name: str, tensor: Tensor) -> None:
    if tensor.shape[0] != tensor.shape[1]:
        raise ValueError(f"{name}: expected a square matrix [cols, cols], got {tuple(tensor.shape)}")


def _entries_with_gradients(
    importance: Sequence[Any], grads: Any, weights: Any
) -> tuple[list[str], list[Any], list[Any], list[Any] | None]:
    """Index for messages, importance, gradient and weight of each entry of the lists whose gradient is not ``None``."""
    grad_items = _as_list("grads", grads, len(importance))
    weight_items = None if weights is None else _as_list("weights", weights, len(importance))
    present = [i for i, grad in enumerate(grad_items) if grad is not None]
    return (
        [f"[{i}]" for i in present],
        [importance[i] for i in present],
        [grad_items[i] for i in present],
        None if weight_items is None else [weight_items[i] for i in present],
    )


def _as_list(name: str, value: Any, length: int, of: str = "tensors like importance") -> list[Any]:
    if not isinstance(value, (list, tuple)) or len(value) != length:
        raise ValueError(f"{name}: expected a list of {length} {of}, got {_describe(value)}")
    return list(value)


def _describe(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__


def _as_matrices(tensor: Tensor) -> list[Tensor]:
    """Views of ``[..., n]`` as matrices ``[rows, n]``: one where the leading dimensions have a common stride."""
    if tensor.dim() == 2:
        return [tensor]
    if tensor.dim() == 1:
        return [tensor.unsqueeze(0)]
    if tensor.numel() == 0:
        return []
    try:
        return [tensor.view(-1, tensor.shape[-1])]
    except RuntimeError:
        return [matrix for part in tensor.unbind() for matrix in _as_matrices(part)]


def _basis_slices(name: str, slices: Tensor, grad: Tensor, first: Tensor) -> Tensor:
    """Views ``slices`` as ``[rank, *grad.shape]``."""
    rank = first.shape[0] if first.dim() else 0
    if slices.dim() > 0 and slices.shape[0] == rank:
        if slices.shape[1:] == grad.shape:
            return slices
        if slices.dim() == 2 and slices.shape[1] == grad.numel():
            return slices.unflatten(1, grad.shape) if grad.dim() else slices[:, 0]
    raise ValueError(
        f"{name}: expected [{rank}, *{tuple(grad.shape)}] or [{rank}, {grad.numel()}], got {tuple(slices.shape)}"
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

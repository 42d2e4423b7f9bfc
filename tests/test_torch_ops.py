"""torch.compile sees operators: schemas hold, graphs stay whole, and compiled programs compute what eager ones do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import normal, orthonormal_rows, uniform
from torch import Tensor

import hpa_ext
from hpa_ext import direct

pytestmark = pytest.mark.usefixtures("device")


def mask() -> Tensor:
    return torch.tensor([True, False, True, False, False])


def inputs() -> dict[str, Any]:
    return {
        "gram": torch.zeros(5, 5),
        "full_gram": 2 * normal(9, 5).T @ normal(9, 5),
        "x": normal(2, 3, 5),
        "mask": mask(),
        "before": normal(4, 5, seed=1),
        "after": normal(4, 5, seed=2),
        "basis": orthonormal_rows(2, 5),
        "scores": [uniform(5, seed=3), uniform(5, seed=4)],
        "diagonals": [uniform(5, seed=5) + 0.5, uniform(5, seed=6) + 0.5],
    }


def use_all_that_stay_in_one_graph(t: dict[str, Any]) -> list[Tensor]:
    gram = hpa_ext.accumulate_gram_(t["gram"] * 1, t["x"])
    total = hpa_ext.accumulate_importance_(torch.zeros_like(t["after"]), t["after"])
    totals = hpa_ext.accumulate_importance_([total * 1, total * 2], [t["after"], None], [t["before"], None], "taylor")
    statistics = hpa_ext.change_statistics(t["before"], t["after"])
    merged = hpa_ext.merge_(t["after"] * 1, t["before"], t["mask"], 0.25)
    projected = hpa_ext.project_(t["after"] * 1, t["basis"])
    parts = hpa_ext.project_([t["after"][0] * 1, t["after"][1] * 2], [t["basis"][:, :5], t["basis"] * 0])
    diagonal = hpa_ext.inverse_diagonal(t["full_gram"])
    return [gram, total, *totals, *statistics, merged, projected, *parts, diagonal + 1]


def use_those_with_numbers(t: dict[str, Any]) -> list[Any]:
    selection = hpa_ext.balanced_mask(*t["scores"], 2, 3, alpha_mode="abs")
    vectors = t["after"] * 1
    kept = hpa_ext.orthonormalize_(vectors, t["basis"])
    info: dict[str, Any] = {}
    diagonal = hpa_ext.inverse_diagonal(activations=t["x"][0], info=info)
    edited = [t["after"] * 1, t["after"] * 2, t["after"] * 3]
    edits = [hpa_ext.edit_(edited[0], t["before"], *t["diagonals"], 2, 3, alpha_mode="abs", phi_norm="mean")]
    edits += hpa_ext.edit_(edited[1:], [t["before"]] * 2, *([d, d] for d in t["diagonals"]), [1, 2], 4)
    flat = [item for edit in edits for item in (*edit[:-1], *edit.statistics)]
    return [*selection, kept, vectors + 0, diagonal, *info.items(), *(weights + 0 for weights in edited), *flat]


def same(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
        else:
            assert type(a) is type(b)
            assert a == b


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_program_is_one_graph_and_computes_the_same(compiler: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(use_all_that_stay_in_one_graph, backend=compiler, fullgraph=True)
    same(compiled(inputs()), use_all_that_stay_in_one_graph(inputs()))


def test_functions_that_answer_with_numbers_end_a_graph_and_compute_the_same() -> None:
    torch.compiler.reset()
    compiled = torch.compile(use_those_with_numbers, backend="aot_eager")
    same(compiled(inputs()), use_those_with_numbers(inputs()))


def test_in_place_functions_change_the_compiled_programs_inputs() -> None:
    torch.compiler.reset()
    weight, kept = torch.nn.Parameter(normal(4, 5, seed=2)), mask()

    def edit(weight: Tensor, before: Tensor) -> Tensor:
        with torch.no_grad():
            return hpa_ext.merge_(weight, before, kept, 0.25)

    expected = hpa_ext.merge_(normal(4, 5, seed=2), normal(4, 5, seed=1), mask(), 0.25)
    assert torch.compile(edit, backend="aot_eager", fullgraph=True)(weight, normal(4, 5, seed=1)) is weight
    assert torch.equal(weight, expected)


def test_checks_still_run_in_a_compiled_program() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda a, b: hpa_ext.merge_(a, b, mask()), backend="eager")
    with pytest.raises(ValueError, match="before: expected the shape of after"):
        compiled(torch.zeros(4, 5), torch.zeros(3, 5))


CALLS: dict[str, Callable[[dict[str, Any]], tuple[Any, ...]]] = {
    "accumulate_gram_": lambda t: (t["gram"], t["x"], 2.0, None),
    "inverse_diagonal": lambda t: (t["full_gram"], 0.01, "exact", None, 2.0, None),
    "accumulate_importance_": lambda t: ([torch.zeros(4, 5)], [t["after"]], [t["before"]], "taylor", None),
    "change_statistics": lambda t: (t["before"], t["after"], None),
    "balanced_mask": lambda t: (*t["scores"], 2, 3, [0.4, 0.8], "full", "affine", 1, "cap", "none", None),
    "merge_": lambda t: (t["after"], t["before"], t["mask"], 0.5, None),
    "edit_": lambda t: (
        *(t["after"], t["before"], *t["diagonals"], 2, 3, [0.4, 0.8]),
        *("fro", "full", "affine", 1, "cap", "none", None),
    ),
    "project_": lambda t: (t["after"], t["basis"], 1, None),
    "project_list_": lambda t: ([t["after"][0]], [t["basis"]], 1, None),
    "orthonormalize_": lambda t: (t["after"], t["basis"], None, None),
}


def test_every_function_is_an_operator_and_every_operator_is_called_here() -> None:
    functions = set(direct.__all__) - {"declines"}
    assert functions <= set(CALLS)
    registered = torch._C._dispatch_get_all_op_names()
    assert set(CALLS) == {name.removeprefix("hpa_ext::") for name in registered if name.startswith("hpa_ext::")}


@pytest.mark.parametrize("name", CALLS)
def test_schemas_and_shapes_hold(name: str) -> None:
    operator = getattr(torch.ops.hpa_ext, name).default
    torch.library.opcheck(operator, CALLS[name](inputs()))


SAVED: dict[str, Callable[[Tensor], Any]] = {
    "accumulate_gram_": lambda w: hpa_ext.accumulate_gram_(w, torch.ones(2, 5)),
    "accumulate_importance_": lambda w: hpa_ext.accumulate_importance_(w, torch.ones(5, 5)),
    "merge_": lambda w: hpa_ext.merge_(w, torch.zeros(5, 5), mask()),
    "project_": lambda w: hpa_ext.project_(w, orthonormal_rows(2, 5)),
    "project_ of a list": lambda w: hpa_ext.project_([w], [torch.ones(1, 5, 5) / 5]),
    "orthonormalize_": hpa_ext.orthonormalize_,
    "accumulate_importance_ of a list": lambda w: hpa_ext.accumulate_importance_([w], [torch.ones(5, 5)]),
    "merge_ of a list": lambda w: hpa_ext.merge_([w], [torch.zeros(5, 5)], [mask()]),
    "edit_": lambda w: hpa_ext.edit_(w, torch.eye(5), torch.ones(5), torch.ones(5), 1, 2),
    "edit_ of a list": lambda w: hpa_ext.edit_([w], [torch.eye(5)], [torch.ones(5)], [torch.ones(5)], 1, 2),
}


@pytest.mark.parametrize("name", SAVED)
def test_autograd_notices_that_a_saved_tensor_was_changed(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "cpu":  # which serves these tensors anyway, by its fastest path
        monkeypatch.setenv("HPA_BACKEND", backend)
    weight, x = torch.nn.Parameter(normal(5, 5)), torch.nn.Parameter(normal(5, 5, seed=1))
    loss = (weight * x).sum()
    SAVED[name](weight.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Projection(torch.autograd.Function):
    """As docs/backends.md has it."""

    @staticmethod
    def forward(ctx: Any, grads: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        return hpa_ext.project_(grads.clone(), basis)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        return hpa_ext.project_(outer[0].clone(), *ctx.saved_tensors), None


def test_a_projection_is_its_own_derivative() -> None:
    basis = orthonormal_rows(2, 5, dtype=torch.float64)
    grads = normal(3, 5, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: Projection.apply(g, basis), grads)


def test_functions_inside_torch_func_are_refused_by_name() -> None:
    basis = orthonormal_rows(2, 5)
    with pytest.raises(TypeError, match="^grads: expected a plain tensor, got one that torch.func .*vmap"):
        torch.func.vmap(lambda grads: hpa_ext.project_(grads, basis))(normal(3, 4, 5))
    with pytest.raises(TypeError, match="^before: expected a plain tensor, got one that torch.func"):
        torch.func.grad(lambda w: hpa_ext.change_statistics(w, normal(4, 5)).dot)(normal(4, 5))


def test_operators_give_shapes_and_dtypes_on_the_meta_device() -> None:
    weights = torch.zeros(4, 5, device="meta", dtype=torch.bfloat16)
    column_change, scalars = torch.ops.hpa_ext.change_statistics(weights, weights, None)
    assert (column_change.shape, column_change.dtype, column_change.device.type) == ((5,), torch.float32, "meta")
    assert (scalars.shape, scalars.dtype) == ((3,), torch.float64)
    with pytest.raises(TypeError, match="^before: expected a tensor with data, got one on the meta device"):
        hpa_ext.change_statistics(weights, weights)

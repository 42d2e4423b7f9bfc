"""A training step under torch.compile: one graph, compiled once, and the numbers of the eager step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from kernel_cases import normal, orthonormal_rows
from torch import Tensor
from torch._dynamo.utils import counters

import hpa_ext

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    """Graphs that were captured since the test began; a recompilation counts as one more."""
    return counters["stats"]["unique_graphs"]


def model_and_basis() -> tuple[torch.nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    sizes = [p.numel() for p in model.parameters()]
    rows = orthonormal_rows(2, sum(sizes)).split(sizes, dim=1)
    return model, [r.reshape(2, *p.shape).clone() for r, p in zip(rows, model.parameters(), strict=True)]


def train(
    wrap: Callable[[Callable[..., None]], Callable[..., None]],
) -> list[Tensor]:
    model, basis = model_and_basis()
    parameters = list(model.parameters())

    def update(grads: list[Tensor]) -> None:
        with torch.no_grad():
            hpa_ext.project_(grads, basis)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(0.1 * grad)

    update = wrap(update)
    for i in range(4):
        loss = torch.nn.functional.mse_loss(model(normal(5, 6, seed=i)), normal(5, 3, seed=i + 9))
        update(list(torch.autograd.grad(loss, parameters)))
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_projecting_a_list_of_gradients_compiles_once_for_all_steps(compiler: str) -> None:
    expected = train(lambda update: update)
    actual = train(lambda update: torch.compile(update, backend=compiler, fullgraph=True))
    assert graphs() == 1
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_dynamic_number_of_vectors_is_one_graph() -> None:
    basis = orthonormal_rows(2, 6)
    project = torch.compile(
        lambda grads: hpa_ext.project_(grads * 1, basis), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for vectors in (3, 4, 7, 9):
        assert torch.equal(project(normal(vectors, 6)), hpa_ext.project_(normal(vectors, 6), basis))
    assert graphs() == 1


def test_a_marked_dimension_is_one_graph() -> None:
    merge = torch.compile(
        lambda after, before, mask: hpa_ext.merge_(after * 1, before, mask, 0.5), backend="aot_eager", fullgraph=True
    )
    for rows in (2, 5, 9):
        after, before, mask = normal(rows, 4), normal(rows, 4, seed=1), torch.arange(4) % 2 == 0
        torch._dynamo.mark_dynamic(after, 0)
        torch._dynamo.mark_dynamic(before, 0)
        assert torch.equal(merge(after, before, mask), hpa_ext.merge_(after.clone(), before, mask, 0.5))
    assert graphs() == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_works_without_gradients_and_in_inference_mode(mode: Callable[[], AbstractContextManager[None]]) -> None:
    basis = orthonormal_rows(2, 6)
    expected = hpa_ext.project_(normal(3, 6), basis)
    with mode():
        assert torch.equal(hpa_ext.project_(normal(3, 6), basis), expected)
        compiled = torch.compile(lambda grads: hpa_ext.project_(grads, basis), backend="eager", fullgraph=True)
        assert torch.equal(compiled(normal(3, 6)), expected)

"""importance += g^2, or += |w g|, over single tensors and whole lists."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import FLOATS, LAYOUTS, NARROW, assert_within, f64, normal, rounded, uniform
from torch import Tensor

import hpa_ext


def check(importance: list[Tensor], grads: list[Tensor | None], weights: list[Tensor | None] | None, kind: str) -> None:
    before = [t.clone() for t in importance]
    expected = [t.clone() for t in importance]
    hpa_ext.accumulate_importance_(expected, grads, weights, kind, backend="reference")
    assert hpa_ext.accumulate_importance_(importance, grads, weights, kind, backend="cpu") is importance
    wide = any(t is not None and t.dtype == torch.float64 for t in [*importance, *grads, *(weights or [])])
    u = 2.0**-53 if wide else 2.0**-24
    for start, actual, wanted, grad in zip(before, importance, expected, grads, strict=True):
        if grad is None:
            assert torch.equal(actual, start)
            continue
        # A product and a sum, then the rounding to storage of both backends.
        arithmetic = 3 * u * np.abs(f64(wanted)) + (2.0**-149 if u == 2.0**-24 else 0)
        assert_within(actual, wanted, arithmetic + 2 * rounded(f64(wanted), actual.dtype))


@pytest.mark.parametrize("kind", ["fisher", "taylor"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set_agrees_with_the_reference(isa: str, dtype: torch.dtype, kind: str) -> None:
    shapes = [(), (1,), (7, 13), (3, 1000, 2), (70_000,)]
    importance = [uniform(*shape, dtype=torch.float32) for shape in shapes]
    grads = [normal(*shape, seed=1, dtype=dtype) for shape in shapes]
    weights = [normal(*shape, seed=2, dtype=dtype) for shape in shapes] if kind == "taylor" else None
    check(importance, grads, weights, kind)


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=4),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3),
    kind=st.sampled_from(("fisher", "taylor")),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    seed=st.integers(0, 99),
)
def test_any_shapes_dtypes_and_layouts_agree_with_the_reference(
    shapes: list[list[int]], dtypes: tuple[torch.dtype, ...], kind: str, layouts: tuple[str, ...], seed: int
) -> None:
    def tensors(which: int) -> list[Tensor]:
        made = [normal(*shape, seed=seed + which, dtype=dtypes[which]) for shape in shapes]
        return [LAYOUTS[layouts[which]](t) if t.dim() >= 2 else t for t in made]

    check([t.abs() for t in tensors(0)], tensors(1), tensors(2) if kind == "taylor" else None, kind)


def test_permuted_dimensions_are_matched_by_index() -> None:
    grad = normal(4, 5, 6)
    importance = torch.zeros(6, 4, 5).permute(1, 2, 0)
    hpa_ext.accumulate_importance_(importance, grad)
    torch.testing.assert_close(importance, grad.square(), rtol=2.0**-22, atol=0)


def test_a_single_tensor_is_like_a_list_of_one() -> None:
    grad, weight = normal(30, 40, dtype=torch.bfloat16), normal(30, 40, seed=1)
    alone, listed = torch.zeros(30, 40), [torch.zeros(30, 40)]
    assert hpa_ext.accumulate_importance_(alone, grad, weight, "taylor") is alone
    hpa_ext.accumulate_importance_(listed, [grad], [weight], "taylor")
    assert torch.equal(alone, listed[0])


def test_parameters_without_a_gradient_are_left_alone(backend: str) -> None:
    importance = [torch.ones(2), torch.ones(3), torch.ones(1)]
    weights = [torch.full((2,), -3.0), None, torch.full((1,), 5.0)]
    grads = [torch.full((2,), 2.0), None, torch.full((1,), -1.0)]
    hpa_ext.accumulate_importance_(importance, grads, weights, "taylor", backend=backend)
    assert [t.tolist() for t in importance] == [[7.0, 7.0], [1.0, 1.0, 1.0], [6.0]]


def test_lists_without_any_gradient_or_tensor_are_returned() -> None:
    importance = [torch.ones(2)]
    assert hpa_ext.accumulate_importance_(importance, [None]) is importance
    assert hpa_ext.accumulate_importance_([], []) == []


@pytest.mark.parametrize("dtype", NARROW)
def test_a_long_list_of_small_tensors_is_one_call(dtype: torch.dtype) -> None:
    grads = [normal(5, seed=i, dtype=dtype) for i in range(300)]
    importance = [torch.zeros(5) for _ in grads]
    hpa_ext.accumulate_importance_(importance, grads)
    for total, grad in zip(importance, grads, strict=True):
        assert torch.equal(total, grad.float().square())


def test_nan_and_inf_spread_to_their_element(backend: str) -> None:
    grad = torch.tensor([1.0, math.nan, math.inf, 2.0])
    fisher = hpa_ext.accumulate_importance_(torch.zeros(4), grad, backend=backend)
    assert fisher[[0, 3]].tolist() == [1, 4]
    assert fisher[1].isnan()
    assert fisher[2] == math.inf
    taylor = hpa_ext.accumulate_importance_(
        torch.zeros(4), grad, torch.tensor([-1.0, 1, 0, -3]), "taylor", backend=backend
    )
    assert taylor[[0, 3]].tolist() == [1, 6]
    assert taylor[1:3].isnan().all()


def test_bit_reproducible_for_any_number_of_threads(threads) -> None:
    grad = normal(500, 700)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(hpa_ext.accumulate_importance_(torch.ones(500, 700), grad))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("importance", "grads", "weights", "kind", "error", "message"),
    [
        (
            torch.zeros(2),
            torch.zeros(3),
            None,
            "fisher",
            ValueError,
            r"^grads: expected the shape of importance \(2,\)",
        ),
        ([torch.zeros(2)] * 1, torch.zeros(2), None, "fisher", ValueError, "^grads: expected a list of 1 tensors like"),
        ([torch.zeros(2)], [], None, "fisher", ValueError, "^grads: expected a list of 1 tensors .*, got a list of 0"),
        (
            [torch.zeros(1), torch.zeros(2)],
            [torch.zeros(1), torch.zeros(3)],
            None,
            "fisher",
            ValueError,
            r"^grads\[1\]: expected the shape of importance\[1\]",
        ),
        (torch.zeros(2), torch.zeros(2), None, "taylor", ValueError, "^weights: are needed with kind='taylor'"),
        (torch.zeros(2), torch.zeros(2), torch.zeros(2), "fisher", ValueError, "^weights: are not used with kind='fi"),
        (torch.zeros(2), torch.zeros(2), torch.zeros(1), "taylor", ValueError, "^weights: expected the shape of impo"),
        (torch.zeros(2), torch.zeros(2), None, "hessian", ValueError, "^kind: expected one of 'fisher', 'taylor'"),
        (torch.zeros(2).int(), torch.zeros(2), None, "fisher", TypeError, "^importance: expected dtype"),
        (torch.zeros(2), None, None, "fisher", TypeError, "^grads: expected a torch tensor .*, got NoneType"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    importance: object, grads: object, weights: object, kind: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hpa_ext.accumulate_importance_(importance, grads, weights, kind)


def test_the_same_tensor_twice_in_a_list_is_refused() -> None:
    total = torch.zeros(4)
    with pytest.raises(ValueError, match=r"^importance\[1\]: shares memory with importance\[0\]"):
        hpa_ext.accumulate_importance_([total, total], [torch.ones(4), torch.ones(4)])
    with pytest.raises(ValueError, match=r"^importance\[0\]: shares memory with grads\[1\]"):
        hpa_ext.accumulate_importance_([total, torch.zeros(4)], [torch.ones(4), total])

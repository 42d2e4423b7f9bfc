"""What every function accepts and refuses, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import normal, orthonormal_rows, uniform
from torch import Tensor
from torch._subclasses import FakeTensorMode

import hpa_ext
from hpa_ext import backend as backends

BACKENDS = ["cpu", "reference"]
MASK = torch.tensor([True, False, True, False])

# Each in-place function, called with the tensor it writes to ([4, 4]); the name of that argument.
IN_PLACE: dict[str, tuple[str, Callable[..., Any]]] = {
    "accumulate_gram_": ("gram", lambda t, **kw: hpa_ext.accumulate_gram_(t, normal(3, 4), **kw)),
    "accumulate_importance_": ("importance", lambda t, **kw: hpa_ext.accumulate_importance_(t, normal(4, 4), **kw)),
    "merge_": ("after", lambda t, **kw: hpa_ext.merge_(t, normal(4, 4), MASK, 0.1, **kw)),
    "project_": ("grads", lambda t, **kw: hpa_ext.project_(t, orthonormal_rows(2, 4), **kw)),
    "orthonormalize_": ("vectors", hpa_ext.orthonormalize_),
}

# The same with another argument that is the written tensor itself, or a view of it.
SHARING: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "accumulate_gram_": ("gram: shares memory with x", lambda t: hpa_ext.accumulate_gram_(t, t[1:])),
    "accumulate_importance_": (
        "importance: shares memory with grads",
        lambda t: hpa_ext.accumulate_importance_(t, t.T),
    ),
    "taylor": (
        "importance: shares memory with weights",
        lambda t: hpa_ext.accumulate_importance_(t, normal(4, 4), t, "taylor"),
    ),
    "merge_": ("after: shares memory with before", lambda t: hpa_ext.merge_(t, t, MASK)),
    "project_": ("grads: shares memory with basis", lambda t: hpa_ext.project_(t, t[:2])),
    "orthonormalize_": ("vectors: shares memory with basis", lambda t: hpa_ext.orthonormalize_(t[1:], t[1:2])),
}


class Foreign:
    """An array of another library: speaks DLPack, is neither torch nor numpy."""

    def __init__(self, array: np.ndarray, *, versioned: bool = True) -> None:
        self.array, self.versioned = array, versioned

    def __dlpack__(self, **kwargs: Any) -> Any:
        if not self.versioned and kwargs.pop("max_version", None) is not None:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("function", IN_PLACE)
@pytest.mark.parametrize("backend", BACKENDS)
class TestEachInPlaceFunction:
    def test_returns_what_was_passed_and_bumps_its_version(self, function: str, backend: str) -> None:
        name, call = IN_PLACE[function]
        tensor = normal(4, 4, seed=3)
        version = tensor._version
        result = call(tensor, backend=backend)
        assert result is tensor or (name == "vectors" and result == 4)
        assert tensor._version > version

    def test_a_saved_tensor_that_was_changed_is_noticed_by_autograd(self, function: str, backend: str) -> None:
        weight = normal(4, 4, seed=3).requires_grad_()
        output = (weight * weight).sum()
        IN_PLACE[function][1](weight, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()

    def test_takes_parameters_and_tensors_that_require_grad(self, function: str, backend: str) -> None:
        plain = normal(4, 4, seed=3)
        parameter, tracked = torch.nn.Parameter(plain.clone()), plain.clone().requires_grad_()
        _, call = IN_PLACE[function]
        for tensor in (plain, parameter, tracked):
            call(tensor, backend=backend)
        assert torch.equal(parameter, plain)
        assert torch.equal(tracked, plain)
        assert parameter.requires_grad
        assert tracked.grad_fn is None

    def test_works_in_inference_mode_and_on_its_tensors(self, function: str, backend: str) -> None:
        _, call = IN_PLACE[function]
        plain = normal(4, 4, seed=3)
        call(plain, backend=backend)
        with torch.inference_mode():
            inside = normal(4, 4, seed=3)
            call(inside, backend=backend)
            outside = normal(4, 4, seed=3)
        assert torch.equal(inside, plain)
        call(outside, backend=backend)
        assert torch.equal(outside, plain)

    def test_writes_into_numpy_arrays(self, function: str, backend: str) -> None:
        name, call = IN_PLACE[function]
        tensor, array = normal(4, 4, seed=3), normal(4, 4, seed=3).numpy().copy()
        wide = np.zeros((4, 9), np.float32)
        wide[:, 2:6] = array
        call(tensor, backend=backend)
        result = call(array, backend=backend)
        assert result is array or name == "vectors"
        call(wide[:, 2:6], backend=backend)
        np.testing.assert_array_equal(array, tensor.numpy())
        np.testing.assert_array_equal(wide[:, 2:6], array)
        assert not wide[:, :2].any()
        assert not wide[:, 6:].any()

    def test_writes_into_arrays_of_other_libraries(self, function: str, backend: str) -> None:
        _, call = IN_PLACE[function]
        tensor, array = normal(4, 4, seed=3), normal(4, 4, seed=3).numpy().copy()
        call(tensor, backend=backend)
        call(Foreign(array), backend=backend)
        np.testing.assert_array_equal(array, tensor.numpy())

    def test_refuses_read_only_memory(self, function: str, backend: str) -> None:
        name, call = IN_PLACE[function]
        array = normal(4, 4).numpy().copy()
        array.flags.writeable = False
        with pytest.raises(ValueError, match=f"^{name}: expected writable memory, got a read-only numpy array"):
            call(array, backend=backend)
        with pytest.raises(ValueError, match=f"^{name}: expected writable memory, got a read-only Foreign"):
            call(Foreign(array), backend=backend)

    def test_refuses_memory_that_overlaps_itself(self, function: str, backend: str) -> None:
        name, call = IN_PLACE[function]
        for tensor in (torch.zeros(4).expand(4, 4), torch.zeros(7).as_strided((4, 4), (1, 1))):
            with pytest.raises(ValueError, match=f"^{name}: expected memory of its own for each element"):
                call(tensor, backend=backend)

    def test_refuses_what_is_no_dense_tensor_with_data(self, function: str, backend: str) -> None:
        name, call = IN_PLACE[function]
        for value, message in (
            (torch.zeros(4, 4).to_sparse(), "expected a dense tensor, got layout torch.sparse_coo"),
            (torch.zeros(4, 4, device="meta"), "expected a tensor with data"),
            (torch._efficientzerotensor((4, 4)), "expected a tensor with data"),
            (torch.zeros(4, 4, dtype=torch.int64), "expected dtype .*, got int64"),
            (torch.zeros(4, 4, dtype=torch.complex64), "expected dtype .*, got complex64"),
            (torch.zeros(4, 4, dtype=torch.complex64).conj().imag, "expected a plain tensor, got a lazily negated"),
            (3.0, r"expected a torch tensor or an array with __dlpack__, got float"),
        ):
            with pytest.raises(TypeError, match=f"^{name}: {message}"):
                call(value, backend=backend)


@pytest.mark.parametrize("function", SHARING)
def test_arguments_that_share_memory_with_what_is_written_are_refused(function: str) -> None:
    message, call = SHARING[function]
    tensor = normal(4, 4)
    before = tensor.clone()
    with pytest.raises(ValueError, match=f"^{message}"):
        call(tensor)
    assert torch.equal(tensor, before)


def test_columns_of_one_matrix_do_not_share_memory() -> None:
    wide = normal(6, 20)
    expected = hpa_ext.merge_(wide[:, :8].clone(), wide[:, 8:16].clone(), uniform(8) < 0.5, 0.1)
    hpa_ext.merge_(wide[:, :8], wide[:, 8:16], uniform(8) < 0.5, 0.1)
    assert torch.equal(wide[:, :8], expected)
    with pytest.raises(ValueError, match="^after: shares memory with before"):
        hpa_ext.merge_(wide[:, :8], wide[:, 7:15], uniform(8) < 0.5, 0.1)
    with pytest.raises(ValueError, match="^after: shares memory with before"):
        hpa_ext.merge_(wide[:, 7:15], wide[:, :8], uniform(8) < 0.5, 0.1)
    # The end of a row and the beginning of the next one meet.
    flat = torch.zeros(40)
    with pytest.raises(ValueError, match="^after: shares memory with before"):
        hpa_ext.merge_(flat.as_strided((3, 4), (8, 1), 6), flat.as_strided((3, 4), (8, 1), 0), MASK)


@pytest.mark.parametrize("backend", BACKENDS)
def test_read_only_arrays_are_fine_where_nothing_is_written(backend: str) -> None:
    before, after = normal(5, 4).numpy().copy(), normal(5, 4, seed=1).numpy().copy()
    for array in (before, after):
        array.flags.writeable = False
    from_numpy = hpa_ext.change_statistics(before, Foreign(after), backend=backend)
    from_torch = hpa_ext.change_statistics(torch.tensor(before), torch.tensor(after), backend=backend)
    assert torch.equal(from_numpy.column_change, from_torch.column_change)
    assert from_numpy.dot == from_torch.dot


def test_tensors_that_only_stand_for_others_are_refused_by_name() -> None:
    with FakeTensorMode():
        fake = torch.zeros(2, 2)
    with pytest.raises(TypeError, match="^before: expected a plain tensor, got FakeTensor"):
        hpa_ext.change_statistics(fake, torch.zeros(2, 2))


def test_reversed_numpy_views_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="^before: expected non-negative strides, got .* reversed view"):
        hpa_ext.change_statistics(np.zeros((3, 4), np.float32)[::-1], np.zeros((3, 4), np.float32))


def test_numpy_dtypes_that_torch_does_not_have_are_refused_by_name() -> None:
    for dtype in (">f4", "S4", object):
        with pytest.raises(TypeError, match="^before: cannot be read through DLPack"):
            hpa_ext.change_statistics(np.zeros((2, 2), dtype), np.zeros((2, 2), np.float32))


def test_arguments_on_different_devices_are_refused_by_name() -> None:
    meta = torch.zeros(2, 2, device="meta")
    with pytest.raises(TypeError, match="^after: expected a tensor with data"):
        hpa_ext.change_statistics(torch.zeros(2, 2), meta)
    from hpa_ext.arguments import check_same_device

    with pytest.raises(ValueError, match=r"^x: expected the device of gram \(cpu\), got meta"):
        check_same_device("x", meta, "gram", torch.zeros(1))


def test_the_extension_reads_any_dlpack_export_by_itself() -> None:
    extension = backends.extension()
    before = normal(4, 4, seed=1).numpy().copy()
    expected = hpa_ext.merge_(normal(4, 4), torch.tensor(before), MASK, 0.1)
    for versioned in (True, False):
        target = normal(4, 4).numpy().copy()
        extension.merge_(
            Foreign(target, versioned=versioned), Foreign(before, versioned=versioned), MASK.numpy(), 0.1, 1
        )
        np.testing.assert_array_equal(target, expected.numpy())
    with pytest.raises(TypeError, match="^after: expected an object with __dlpack__"):
        extension.merge_(3, before, MASK, 0.1, 1)
    with pytest.raises(TypeError, match="^after: expected float32, float64, bfloat16, float16 or bool"):
        extension.merge_(np.zeros((4, 4), np.int32), before, MASK, 0.1, 1)


def test_the_extension_guards_its_memory_when_called_directly() -> None:
    extension = backends.extension()
    four, three = torch.zeros(4, 4), torch.zeros(3, 3)
    for call in (
        lambda: extension.accumulate_gram_(three, four, 2.0, 1),
        lambda: extension.accumulate_gram_(four.half(), four, 2.0, 1),
        lambda: extension.inverse_diagonal(torch.zeros(3), four, None, 2.0, 0.01, "exact", 1),
        lambda: extension.inverse_diagonal(torch.zeros(4), four, four, 2.0, 0.01, "exact", 1),
        lambda: extension.inverse_diagonal(torch.zeros(4), four, None, 2.0, 0.01, "both", 1),
        lambda: extension.accumulate_importance_([four], [three], [], 1),
        lambda: extension.accumulate_importance_([four], [], [], 1),
        lambda: extension.change_statistics(torch.zeros(3), torch.zeros(3).double(), four, four, 1),
        lambda: extension.change_statistics(torch.zeros(4), torch.zeros(3), four, four, 1),
        lambda: extension.change_statistics(torch.zeros(4), torch.zeros(3).double(), four, four.half(), 1),
        lambda: extension.balanced_mask(
            MASK, torch.zeros(4), torch.zeros(4), 3, 5, 0.4, 0.8, "full", "affine", 1, "cap", "none"
        ),
        lambda: extension.merge_(four, three, MASK, 0.0, 1),
        lambda: extension.merge_(four, four, MASK[:3], 0.0, 1),
        lambda: extension.merge_(four, four, torch.zeros(4), 0.0, 1),
        lambda: extension.project_([four], [three], 1, 1),
        lambda: extension.project_([four], [], 1, 1),
        lambda: extension.orthonormalize_(four, three, 1e-4, 1),
    ):
        with pytest.raises(ValueError, match=r"^\w+: (expected|float64|got)"):
            call()

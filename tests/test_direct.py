"""Direct calls serve what is plain and decline the rest before they change anything: one behaviour, two paths."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import FLOATS, LAYOUTS, bits, normal, orthonormal_rows, uniform
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hpa_ext
from hpa_ext import direct

COLS = 12


class Subclass(Tensor):
    """A subclass that changes nothing."""


def spd(dtype: torch.dtype = torch.float32) -> Tensor:
    x = normal(3 * COLS, COLS, seed=5, dtype=torch.float64)
    return (x.T @ x).to(dtype)


# Arguments of a plain call, by position, options included: what ops.py passes on to the direct call.
PLAIN: dict[str, Callable[[], list[Any]]] = {
    "accumulate_gram_": lambda: [spd(), normal(5, COLS), 2.0],
    "inverse_diagonal": lambda: [spd(), 0.01, "exact", None, 2.0],
    "accumulate_importance_": lambda: [uniform(3, COLS), normal(3, COLS), None, "fisher"],
    "change_statistics": lambda: [normal(5, COLS), normal(5, COLS, seed=1)],
    "balanced_mask": lambda: [
        uniform(COLS, seed=1), uniform(COLS, seed=2), 3, 6, (0.4, 0.8), "full", "affine", 1, "cap", "none"
    ],
    "merge_": lambda: [normal(5, COLS), normal(5, COLS, seed=1), uniform(COLS) < 0.5, 0.25],
    "edit_": lambda: [
        normal(5, COLS), normal(5, COLS, seed=1), uniform(COLS, seed=2) + 0.1, uniform(COLS, seed=3) + 0.1, 2, 5,
        "fro", (0.4, 0.8), "full", "affine", 1, "cap", "none",
    ],
    "project_": lambda: [normal(5, COLS), orthonormal_rows(2, COLS), 1],
    "orthonormalize_": lambda: [normal(4, COLS), orthonormal_rows(2, COLS), None],
}  # fmt: skip
OPTIONS = {
    "balanced_mask": ("mode", "alpha_mode", "alpha_sign", "overflow", "phi_norm"),
    "edit_": ("projection", "alpha", "mode", "alpha_mode", "alpha_sign", "overflow", "phi_norm"),
    "inverse_diagonal": ("activations", "scale"),
    "project_": ("passes",),
}
IN_PLACE = ("accumulate_gram_", "accumulate_importance_", "merge_", "edit_", "project_", "orthonormalize_")


def call(function: str, arguments: list[Any]) -> Any:
    names = OPTIONS.get(function, ())
    count = len(arguments) - len(names)
    return getattr(hpa_ext, function)(*arguments[:count], **dict(zip(names, arguments[count:], strict=True)))


def outcome(function: str, arguments: list[Any]) -> tuple[Any, ...]:
    """What a call does, in comparable form: result or error, and the arguments afterwards."""
    try:
        result = call(function, arguments)
    except Exception as error:
        answer: tuple[Any, ...] = (type(error), str(error))
    else:
        same = result is arguments[0]
        answer = (type(result), "the first argument" if same else plain(result))
    return (*answer, [plain(argument) for argument in arguments], versions(arguments))


def plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, Tensor) and type(value) in (Tensor, torch.nn.Parameter, Subclass) and readable(value):
        described = (value.dtype, value.shape, value.requires_grad, value.is_leaf, value.is_inference())
        return (*described, bits(value.resolve_neg().reshape(-1)).tobytes())
    return value if isinstance(value, (str, int, float, type(None))) else type(value)


def readable(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_complex() or tensor._is_zerotensor())
    )


def versions(arguments: list[Any] | tuple[Any, ...]) -> list[int]:
    found: list[int] = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            found += versions(argument)
        elif isinstance(argument, Tensor) and not argument.is_inference():
            found.append(argument._version)
    return found


def both(function: str, make: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, list[Any]]:
    """Outcome with direct calls and without them, and what the direct call answered."""
    answers: list[Any] = []
    entry = getattr(direct, function)

    def recorded(*arguments: Any) -> Any:
        answers.append(entry(*arguments))
        return answers[-1]

    with monkeypatch.context() as patch:
        patch.setattr(direct, function, recorded)
        fast = outcome(function, make())
    with monkeypatch.context() as patch:
        patch.setattr(direct, function, direct.declines)
        checked = outcome(function, make())
    return fast, checked, answers


def test_every_public_function_is_listed() -> None:
    assert set(PLAIN) == set(direct.__all__) - {"declines"}


@pytest.mark.parametrize("function", PLAIN)
def test_plain_calls_are_served_and_do_what_the_checked_path_does(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, checked, answers = both(function, PLAIN[function], monkeypatch)
    assert len(answers) == 1
    assert answers[0] is not None
    assert fast == checked


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("function", PLAIN)
def test_dtypes_and_layouts_do_the_same_on_both_paths(
    function: str, place: int, layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> list[Any]:
        arguments = PLAIN[function]()
        if isinstance(arguments[place], Tensor):
            if function != "accumulate_gram_" or place == 1 or dtype.itemsize > 2:
                arguments = [
                    a.to(dtype) if isinstance(a, Tensor) and a.dtype.is_floating_point else a for a in arguments
                ]
            arguments[place] = LAYOUTS[layout](arguments[place]) if arguments[place].dim() > 1 else arguments[place]
        return arguments

    fast, checked, _ = both(function, make, monkeypatch)
    assert fast == checked


def with_nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[3] = math.nan
    return tensor


def read_only(tensor: Tensor) -> np.ndarray:
    array = tensor.numpy().copy()
    array.flags.writeable = False
    return array


def requiring_grad(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_() if tensor.dtype.is_floating_point else tensor


def made_in_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


# What may stand in place of a tensor; not all of it is wrong everywhere.
UNUSUAL: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda t: None,
    "number": lambda t: 1.0,
    "list of numbers": lambda t: t.tolist(),
    "list of tensors": lambda t: [t],
    "numpy": lambda t: t.numpy().copy(),
    "read-only numpy": read_only,
    "subclass": lambda t: t.clone().as_subclass(Subclass),
    "parameter": lambda t: torch.nn.Parameter(t.clone(), requires_grad=t.dtype.is_floating_point),
    "leaf that requires grad": requiring_grad,
    "result of a computation": lambda t: requiring_grad(t) * 1,
    "inference tensor": made_in_inference_mode,
    "empty": lambda t: t[:0].clone(),
    "no columns": lambda t: t[..., :0].clone(),
    "one column less": lambda t: t[..., :-1].clone(),
    "more dimensions": lambda t: t.clone().unsqueeze(0),
    "many dimensions": lambda t: t.clone()[(None,) * 17],
    "fewer dimensions": lambda t: t.clone()[0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1,) * t.dim()),
    "expanded from one": lambda t: t.flatten()[0].expand(t.shape),
    "flipped": lambda t: t.flip(-1),
    "columns first": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "int64": lambda t: t.to(torch.int64),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "float64": lambda t: t.double(),
    "lazily negated": lambda t: torch.complex(t.float(), t.float()).conj().imag,
    "lazily negated, columns": lambda t: torch.complex(t.float(), t.float()).conj().imag[..., 1:],
    "lazily negated, spread": lambda t: torch.complex(t.float(), t.float()).conj().imag[..., :1].expand(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "zeros without storage": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "NaN": lambda t: with_nan(LAYOUTS["contiguous"](t)) if t.dtype.is_floating_point else t,
    "negative": lambda t: -t if t.dtype.is_floating_point else t,
}


@pytest.mark.parametrize("unusual", UNUSUAL)
@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.filterwarnings("ignore:Sparse|The given NumPy array")
def test_unusual_tensors_give_the_same_result_or_error_on_both_paths(
    function: str, unusual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, value in enumerate(PLAIN[function]()):
        if not isinstance(value, Tensor):
            continue

        def make(place: int = place) -> list[Any]:
            arguments = PLAIN[function]()
            arguments[place] = UNUSUAL[unusual](arguments[place])
            return arguments

        fast, checked, answers = both(function, make, monkeypatch)
        assert fast == checked, f"argument {place}"
        assert len(answers) == 1
        if isinstance(checked[0], type) and issubclass(checked[0], Exception):
            assert answers == [None]


VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**30, 2**31, 0.0, -0.5, 0.5, 1.0, 5e300, 2.5, math.nan, math.inf, -math.inf,
    np.float32(0.5), np.int64(3), "full", "exact", "pivot", "taylor", "nothing", b"full", (0.1, 0.9), [0.1, 0.9],
    (0.1,), (0, 1), (0.1, math.nan), (0.1, "x"), torch.tensor(2),
)  # fmt: skip


@pytest.mark.parametrize("function", [name for name in PLAIN if name != "change_statistics"])
def test_unusual_options_give_the_same_result_or_error_on_both_paths(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [i for i, value in enumerate(PLAIN[function]()) if not isinstance(value, Tensor)]
    for place in places:
        for value in VALUES:

            def make(place: int = place, value: Any = value) -> list[Any]:
                arguments = PLAIN[function]()
                arguments[place] = value
                return arguments

            fast, checked, _ = both(function, make, monkeypatch)
            assert fast == checked, f"argument {place} = {value!r}"


# Lists of tensors, in all forms that the functions take.
LISTS: dict[str, tuple[str, Callable[[], list[Any]]]] = {
    "importances": (
        "accumulate_importance_",
        lambda: [[uniform(3, 4), uniform(7, seed=1)], [normal(3, 4), normal(7)], None, "fisher"],
    ),
    "importances by weight": (
        "accumulate_importance_",
        lambda: [(uniform(3, 4), uniform(7)), [normal(3, 4), normal(7)], [normal(3, 4), normal(7, seed=1)], "taylor"],
    ),
    "slices in shape": ("project_", lambda: [[normal(3, 4), normal(7)], [normal(2, 3, 4), normal(2, 7)], 1]),
    "flat slices": ("project_", lambda: [[normal(3, 4), normal(7)], (normal(2, 12), normal(2, 7)), 2]),
    "slices with a stride": (
        "project_",
        lambda: [[normal(3, 4), normal(2, 1, 2)], [normal(12, 2).T, normal(2, 8)[:, ::2]], 1],
    ),
    "changes": (
        "change_statistics",
        lambda: [[normal(5, 4), normal(3, 7)], (normal(5, 4, seed=1), normal(3, 7, seed=1))],
    ),
    "layers to merge": (
        "merge_",
        lambda: [
            [normal(5, 4), normal(3, 7)],
            (normal(5, 4, seed=1), normal(3, 7, seed=1)),
            [uniform(4) < 0.5, uniform(7) < 0.5],
            [0.25, 0.0],
        ],
    ),
    "layers to edit": (
        "edit_",
        lambda: [
            [normal(5, 4), normal(3, 7)],
            [normal(5, 4, seed=1), normal(3, 7, seed=1)],
            [uniform(4) + 0.1, uniform(7) + 0.1],
            (uniform(4, seed=2) + 0.1, uniform(7, seed=2) + 0.1),
            1,
            [2, 3],
            "fro",
            (0.4, 0.8),
            "full",
            "affine",
            1,
            "cap",
            "none",
        ],
    ),
    "one slice": ("project_", lambda: [[normal(5)], [normal(2, 5)], 1]),
}


def is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, Tensor) for item in value)


@pytest.mark.parametrize("case", LISTS)
def test_lists_are_served_and_do_what_the_checked_path_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, checked, answers = both(*LISTS[case], monkeypatch)
    assert len(answers) == 1
    assert answers[0] is not None
    assert fast == checked


@pytest.mark.parametrize("unusual", UNUSUAL)
@pytest.mark.parametrize("case", LISTS)
@pytest.mark.filterwarnings("ignore:Sparse|The given NumPy array")
def test_unusual_tensors_in_lists_do_the_same_on_both_paths(
    case: str, unusual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, plain_lists = LISTS[case]
    for place, items in enumerate(plain_lists()):
        for i in range(len(items) if is_list_of_tensors(items) else 0):

            def make(place: int = place, i: int = i) -> list[Any]:
                arguments = plain_lists()
                changed = list(arguments[place])
                changed[i] = UNUSUAL[unusual](changed[i])
                arguments[place] = changed
                return arguments

            fast, checked, answers = both(function, make, monkeypatch)
            assert fast == checked, f"argument {place}, item {i}"
            if isinstance(checked[0], type) and issubclass(checked[0], Exception):
                assert answers == [None]


@pytest.mark.parametrize("case", LISTS)
def test_unusual_lists_do_the_same_on_both_paths(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, plain_lists = LISTS[case]
    changes: list[Callable[[Any], Any]] = [
        lambda items: [],
        lambda items: items[:-1],
        lambda items: [*items, items[0]],
        lambda items: [*items, items[0].clone()],
        lambda items: [None, *items[1:]],
        lambda items: items[0],
        lambda items: [list(items)],
        lambda items: dict(enumerate(items)),
        lambda items: [items[0], *[item[..., :1] for item in items[1:]]],
    ]
    count = sum(is_list_of_tensors(items) for items in plain_lists())
    for number, change in enumerate(changes):
        for places in (range(1), range(1, 2), range(count)):

            def make(change: Callable[[Any], Any] = change, places: range = places) -> list[Any]:
                arguments = plain_lists()
                for place in places:
                    arguments[place] = change(arguments[place])
                return arguments

            fast, checked, _ = both(function, make, monkeypatch)
            assert fast == checked, f"change {number} of arguments {places}"


@pytest.mark.parametrize("function", IN_PLACE)
def test_shared_memory_is_refused_on_both_paths_and_neighbours_are_not(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for start in (0, 1, COLS // 2, COLS - 1, COLS):

        def make(start: int = start) -> list[Any]:
            arguments = PLAIN[function]()
            first = arguments[0]
            wide = torch.cat([first, first], -1)
            arguments[0] = wide[..., :COLS] if function != "accumulate_gram_" else first
            other = wide if function != "accumulate_gram_" else torch.cat([first, first])
            if function == "accumulate_gram_":
                arguments[0], arguments[1] = other[:COLS], other[start : start + 5]
            else:
                arguments[1] = other[: len(arguments[1]), start : start + COLS]
            return arguments

        fast, checked, _ = both(function, make, monkeypatch)
        assert fast == checked, f"from column {start}"


@pytest.mark.parametrize("function", PLAIN)
def test_the_environment_is_read_at_each_call(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value, served in (
        ("HPA_BACKEND", "reference", False),
        ("HPA_BACKEND", "cpu", False),
        ("HPA_BACKEND", "nothing", False),
        ("HPA_BACKEND", "", True),
        ("HPA_NUM_THREADS", "1", True),
        ("HPA_NUM_THREADS", "0", False),
        ("HPA_NUM_THREADS", "two", False),
    ):
        assert getattr(direct, function)(*PLAIN[function]()) is not None
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert (getattr(direct, function)(*PLAIN[function]()) is not None) == served, f"{variable}={value}"
    assert getattr(direct, function)(*PLAIN[function]()) is not None


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", PLAIN)
def test_calls_while_operators_are_watched_or_transformed_are_declined(function: str) -> None:
    arguments = PLAIN[function]()
    with Watching():
        assert getattr(direct, function)(*arguments) is None
    for transform in (torch.func.functionalize, torch.func.vmap):

        def inside(first: Tensor, function: str = function, arguments: list[Any] = arguments) -> Tensor:
            assert getattr(direct, function)(first, *arguments[1:]) is None
            return first

        transform(inside)(torch.stack([arguments[0]] * 2) if transform is torch.func.vmap else arguments[0])


@pytest.mark.parametrize("mode", [lambda: torch.device("cpu"), lambda: torch.device("meta"), WatchingFunctions])
@pytest.mark.parametrize("function", PLAIN)
def test_a_default_device_or_another_mode_of_functions_changes_nothing(
    function: str, mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, checked, _ = both(function, PLAIN[function], monkeypatch)
    assert fast == checked

    def inside() -> list[Any]:
        return PLAIN[function]()

    arguments, others = inside(), inside()
    with mode():
        served = getattr(direct, function)(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(direct, function, direct.declines)
            result = call(function, others)
    assert served is not None
    assert plain(arguments) == plain(others)
    if (isinstance(result, Tensor) and function not in IN_PLACE) or isinstance(result, tuple):
        if function == "edit_":
            ((chosen, statistics),) = served
            served = (*chosen, statistics)
        assert plain(served) == plain(result)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("function", PLAIN)
def test_results_are_ordinary_tensors(function: str, inference: bool) -> None:
    with torch.inference_mode() if inference else nullcontext():
        results = call(function, PLAIN[function]())
        for result in results if isinstance(results, tuple) else (results,):
            if isinstance(result, Tensor):
                assert type(result) is Tensor
                assert result.is_inference() == inference
                assert result.data_ptr() % 64 == 0 or function in IN_PLACE
                assert torch.equal(result + 0, result)


@pytest.mark.parametrize("function", PLAIN)
def test_a_wrong_number_of_arguments_is_an_error(function: str) -> None:
    entry, arguments = getattr(direct, function), PLAIN[function]()
    for wrong in (arguments[:-1], [*arguments, None], []):
        with pytest.raises(TypeError, match="positional arguments, got"):
            entry(*wrong)


def test_without_the_module_or_without_the_interface_of_torch_calls_are_declined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Missing:
        class direct:  # noqa: N801
            @staticmethod
            def connect(**_: Any) -> bool:
                return False

    monkeypatch.setattr(direct.backend, "extension", Missing)
    assert direct._connect()("merge_") is direct.declines

    def fails() -> Any:
        raise hpa_ext.BackendError("not there")

    monkeypatch.setattr(direct.backend, "extension", fails)
    assert direct._connect()("merge_") is direct.declines

"""The paper's whole rule for a layer: bit by bit what the single functions give, and what float64 says it should be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import FLOATS, LAYOUTS, ROUNDOFF, assert_within, f64, normal, rounded, uniform
from torch import Tensor

import hpa_ext
from hpa_ext import ops
from hpa_ext.backend import automatic

SHAPES = [(40, 30), (1, 1), (70, 130), (0, 5), (5, 0), (64, 257), (9, 17), (33, 64)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"mode": "eps", "projection": "off"},
    {"phi_norm": "mean", "alpha": (0.1, 0.9), "alpha_sign": -1, "overflow": "keep"},
]


def layer(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    before = normal(rows, cols, seed=seed, dtype=dtype)
    return {
        "after": (before + 0.1 * normal(rows, cols, seed=seed + 1)).to(dtype),
        "before": before,
        "safety_diagonal": uniform(cols, seed=seed + 2) + 0.1,
        "task_diagonal": uniform(cols, seed=seed + 3, dtype=torch.float64) + 0.1,
        "keep": cols // 5,
        "focus": cols // 2,
    }


def layers() -> dict[str, list[Any]]:
    made = [layer(*shape, FLOATS[i % 4], seed=10 * i) for i, shape in enumerate(SHAPES)]
    made[2]["after"] = LAYOUTS["columns_first"](made[2]["after"])
    made[5]["before"] = LAYOUTS["padded_rows"](made[5]["before"])
    made[5]["after"] = LAYOUTS["padded_rows"](made[5]["after"])
    made[6]["safety_diagonal"] = LAYOUTS["every_other_column"](made[6]["safety_diagonal"])
    made[7]["task_diagonal"] = made[7]["task_diagonal"].to(torch.bfloat16)
    return {name: [one[name] for one in made] for name in made[0]}


def composed(
    after: Tensor,
    before: Tensor,
    safety_diagonal: Tensor,
    task_diagonal: Tensor,
    keep: int,
    focus: int,
    projection: str = "fro",
    **options: Any,
) -> hpa_ext.Edit:
    backend = options.get("backend")
    statistics = hpa_ext.change_statistics(before, after, backend=backend)
    change = statistics.column_change.double()
    if not change.any():
        keep = focus = 0
    chosen = hpa_ext.balanced_mask(
        change / safety_diagonal.double(), change / task_diagonal.double(), keep, focus, **options
    )
    norm_sq = statistics.before_norm_sq.item()
    coefficient = statistics.dot.item() / norm_sq if norm_sq and projection == "fro" else 0.0
    hpa_ext.merge_(after, before, chosen.mask, coefficient, backend=backend)
    return hpa_ext.Edit(*chosen, coefficient, statistics)


def assert_same(one: hpa_ext.Edit, other: hpa_ext.Edit) -> None:
    assert torch.equal(one.mask, other.mask)
    assert one[1:-1] == other[1:-1]
    assert all(torch.equal(a, b) for a, b in zip(one.statistics, other.statistics, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_an_edit_is_the_composition_of_the_single_functions(
    threads, monkeypatch: pytest.MonkeyPatch, backend: str, options: dict[str, Any]
) -> None:
    serves = backend == automatic(torch.get_default_device())
    for name in (backend, None) if serves else (backend,):
        expected = layers()
        numbers = [composed(*one, **options, backend=name) for one in zip(*expected.values(), strict=True)]
        for count in (1, 2):
            threads(count)
            single, together, in_runs = layers(), layers(), layers()
            edits = [hpa_ext.edit_(*one, **options, backend=name) for one in zip(*single.values(), strict=True)]
            edits += hpa_ext.edit_(**together, **options, backend=name)
            with monkeypatch.context() as patch:
                patch.setattr(ops, "_RUN_BYTES", 70_000)
                edits += hpa_ext.edit_(**in_runs, **options, backend=name)
            for edit, number in zip(edits, 3 * numbers, strict=True):
                assert_same(edit, number)
            for given in (single, together, in_runs):
                assert all(torch.equal(a, b) for a, b in zip(given["after"], expected["after"], strict=True))
        assert any(number.mask.any() for number in numbers)
        assert any(number.projection for number in numbers) == (options.get("projection") != "off")


def by_numpy(
    before: np.ndarray, after: np.ndarray, safety: np.ndarray, task: np.ndarray, keep: int, focus: int
) -> tuple[np.ndarray, float, float]:
    """Mask, alpha and c, from the formulas of the paper."""
    change = np.mean((after - before) ** 2, axis=0)
    eps, zeta = change / safety, change / task
    alpha = 0.4 + 0.4 * (1 + np.tanh(np.mean(np.log(eps / zeta)))) / 2
    focused = [set(np.argsort(-score)[:focus].tolist()) for score in (eps, zeta)]
    only, overlap = focused[0] - focused[1], focused[0] & focused[1]
    kept = sorted(only, key=lambda j: -eps[j])[:keep]
    kept += sorted(overlap, key=lambda j: -(eps[j] - alpha * zeta[j]))[: keep - len(kept)]
    mask = np.zeros(len(eps), dtype=bool)
    mask[kept] = True
    return mask, float(alpha), float(np.sum((after - before) * before) / np.sum(before**2))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_edit_is_the_papers_rule(isa: str, dtype: torch.dtype, layout: str) -> None:
    given = layer(97, 130, dtype)
    given["after"] = LAYOUTS[layout](given["after"])
    old, new = f64(given["before"]), f64(given["after"])
    mask, alpha, projection = by_numpy(
        old, new, f64(given["safety_diagonal"]), f64(given["task_diagonal"]), given["keep"], given["focus"]
    )
    edit = hpa_ext.edit_(**given)
    np.testing.assert_array_equal(edit.mask.numpy(), mask)
    assert edit.kept == mask.sum() == given["keep"]
    assert edit.alpha == pytest.approx(alpha, rel=1e-12)
    # <change, before> cancels: its error is that of a sum of the sizes of its terms.
    slack = 10 * ROUNDOFF[dtype] * np.sum(np.abs((new - old) * old)) / np.sum(old**2)
    assert abs(edit.projection - projection) <= slack
    expected = np.where(mask, old, new - projection * old)
    rounding = 3 * ROUNDOFF[dtype] * (np.abs(new) + abs(projection) * np.abs(old))
    assert_within(given["after"], expected, rounded(expected, dtype) + rounding + slack * np.abs(old))
    assert torch.equal(given["after"][:, edit.mask], given["before"][:, edit.mask])


def test_a_case_worked_by_hand() -> None:
    before = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    after = before + torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    # Mean squared changes 4.5, 0, 0.5; safety scores 4.5, 0, 5: column 2 goes back.  c = 3 / 6.
    edit = hpa_ext.edit_(after, before, torch.tensor([1.0, 1.0, 0.1]), torch.ones(3), 1, 1)
    assert edit.mask.tolist() == [False, False, True]
    assert edit.projection == 0.5
    assert (edit.overlap, edit.kept, edit.kept_safety_only, edit.kept_overlap) == (0, 1, 1, 0)
    assert after.tolist() == [[3.5, 0.0, 2.0], [0.0, 0.5, 0.0]]


@pytest.mark.parametrize("overflow", ["cap", "keep"])
def test_a_layer_without_change_stays_as_it_is(overflow: Any) -> None:
    # The squares of so small a change are zero in float32.
    before, after = torch.full((2, 3), 1.0e-30), torch.full((2, 3), 2.0e-30)
    edit = hpa_ext.edit_(after, before, torch.rand(3) + 1, torch.rand(3) + 1, 1, 2, overflow=overflow)
    assert (edit.kept, edit.overlap, edit.projection, edit.log_ratio) == (0, 0, 0.0, 0.0)
    assert not edit.mask.any()
    assert torch.equal(after, torch.full((2, 3), 2.0e-30))


def test_old_weights_of_zero_have_no_direction() -> None:
    after = torch.ones(2, 3)
    edit = hpa_ext.edit_(after, torch.zeros(2, 3), torch.ones(3), torch.ones(3), 1, 2)
    assert edit.projection == 0.0
    assert after.tolist() == [[0.0, 1.0, 1.0]] * 2


def test_numpy_arrays_and_parameters_are_written_in_place() -> None:
    given = layer(6, 10, torch.float32)
    arrays = {name: value.clone().numpy() if isinstance(value, Tensor) else value for name, value in given.items()}
    parameter = torch.nn.Parameter(given["after"].clone())
    version = parameter._version
    hpa_ext.edit_(**{**given, "after": parameter})
    assert parameter._version > version
    hpa_ext.edit_(**arrays)
    assert torch.equal(parameter.detach(), torch.from_numpy(arrays["after"]))
    assert not torch.equal(parameter.detach(), given["after"])


def test_one_count_serves_all_layers_and_an_empty_list_is_no_work() -> None:
    given = [layer(6, 10, torch.float32, seed) for seed in (0, 7)]
    lists = {name: [one[name].clone() for one in given] for name in list(given[0])[:4]}
    edits = hpa_ext.edit_(**lists, keep=2, focus=5)
    for edit, one in zip(edits, given, strict=True):
        assert_same(edit, hpa_ext.edit_(**one))
    assert hpa_ext.edit_([], [], [], [], 1, 2) == []


def test_a_compiled_program_edits_as_an_eager_one() -> None:
    torch.compiler.reset()
    eager, compiled = layer(6, 10, torch.float32), layer(6, 10, torch.float32)
    number = hpa_ext.edit_(**eager)

    def step(given: dict[str, Any]) -> hpa_ext.Edit:
        given["after"].mul_(1)
        return hpa_ext.edit_(**given)

    assert_same(torch.compile(step, backend="eager")(compiled), number)
    assert torch.equal(eager["after"], compiled["after"])


# ---- Refusals --------------------------------------------------------------------------------------------------------


def refused(match: str, error: type[Exception] = ValueError, **changed: Any) -> None:
    """A list of two layers with another entry at [1]: refused with this message, and nothing was written."""
    given = {name: [layer(6, 10, torch.float32, seed)[name] for seed in (0, 7)] for name in layer(1, 1, torch.float32)}
    options = {}
    for name, value in changed.items():
        if name in given:
            given[name][1] = value(given) if callable(value) else value
        else:
            options[name] = value
    kept = [after.clone() for after in given["after"]]
    with pytest.raises(error, match=match):
        hpa_ext.edit_(**given, **options)
    for after, unchanged in zip(given["after"], kept, strict=True):
        assert torch.equal(after.nan_to_num(), unchanged.nan_to_num())


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["safety_diagonal", "task_diagonal"])
def test_a_diagonal_that_is_not_positive_is_refused(name: str, bad: float) -> None:
    diagonal = torch.ones(10)
    diagonal[3] = bad
    refused(rf"^{name}\[1\]: expected positive, finite numbers, got .* at index 3", **{name: diagonal})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["after", "before"])
def test_weights_that_are_not_finite_are_refused_before_anything_is_written(name: str, bad: float) -> None:
    weight = torch.ones(6, 10)
    weight[4, 7] = bad
    refused(r"^after\[1\]: the change of column 7 is not finite", **{name: weight})


@pytest.mark.parametrize("threads", [1, 2])
def test_layers_of_a_long_list_before_a_bad_one_are_edited_once(threads: int) -> None:
    """A list longer than a cache is edited in parts; the bad layer ends the call where it stands."""
    given = [layer(1024, 2100, torch.float32, seed) for seed in range(4)]
    given[2]["after"][1000, 17] = math.nan
    lists = {name: [one[name].clone() for one in given] for name in list(given[0])[:4]}
    counts = {"keep": given[0]["keep"], "focus": given[0]["focus"]}
    with hpa_ext.num_threads(threads), pytest.raises(ValueError, match=r"^after\[2\]: the change of column 17 is not"):
        hpa_ext.edit_(**lists, **counts)
    for i, one in enumerate(given):
        if i < 2:
            hpa_ext.edit_(**one)
        assert torch.equal(lists["after"][i].nan_to_num(), one["after"].nan_to_num()), f"layer {i}"


def test_sums_and_scores_that_are_not_finite_are_refused() -> None:
    wide = {name: [value] for name, value in layer(2, 3, torch.float64).items()}
    wide["before"][0].fill_(1e160)
    wide["after"][0].fill_(1e160).mul_(1 + 1e-15)
    with pytest.raises(ValueError, match=r"^before\[0\]: .* not finite"):
        hpa_ext.edit_(**wide)
    assert (wide["after"][0] > 1e160).all()
    refused("^safety: expected finite", safety_diagonal=torch.full((10,), 1e-320, dtype=torch.float64))


@pytest.mark.parametrize(
    ("match", "error", "changed"),
    [
        (r"^before\[1\]: expected the shape of after\[1\]", ValueError, {"before": torch.ones(6, 9)}),
        (r"^before\[1\]: expected the dtype of after\[1\]", TypeError, {"before": torch.ones(6, 10).double()}),
        (r"^after\[1\]: expected 2 dimensions", ValueError, {"after": torch.ones(10)}),
        (r"^after\[1\]: expected memory of its own", ValueError, {"after": torch.ones(10).expand(6, 10)}),
        (r"^after\[0\]: shares memory with before\[1\]", ValueError, {"before": lambda given: given["after"][0]}),
        (r"^after\[\d\]: shares memory with after\[\d\]", ValueError, {"after": lambda given: given["after"][0]}),
        (
            r"^after\[0\]: shares memory with task_diagonal\[1\]",
            ValueError,
            {"task_diagonal": lambda given: given["after"][0].abs_()[2]},
        ),
        (
            r"^safety_diagonal\[1\]: expected 10 entries, one a column, got 9",
            ValueError,
            {"safety_diagonal": torch.ones(9)},
        ),
        (r"^task_diagonal\[1\]: expected dtype", TypeError, {"task_diagonal": torch.ones(10, dtype=torch.int64)}),
        (r"^focus\[1\]: expected keep <= focus <= cols, got keep 2, focus 11", ValueError, {"focus": 11}),
        (r"^keep\[1\]: expected a whole number >= 0", ValueError, {"keep": -1}),
        ("^projection: expected one of 'fro', 'off'", ValueError, {"projection": "row"}),
        ("^mode: expected one of", ValueError, {"mode": "none"}),
        (r"^alpha\[1\]: expected a number", TypeError, {"alpha": (0.4, "x")}),
    ],
)
def test_wrong_arguments_are_named(match: str, error: type[Exception], changed: dict[str, Any]) -> None:
    refused(match, error, **changed)


def test_lists_of_other_lengths_are_named() -> None:
    given = layers()
    given["keep"].pop()
    with pytest.raises(ValueError, match="^keep: expected a list of 8 entries like after, got a list of 7"):
        hpa_ext.edit_(**given)
    with pytest.raises(ValueError, match="^before: expected a list of 1 entries like after, got Tensor"):
        hpa_ext.edit_([torch.zeros(2, 3)], torch.ones(2, 3), [torch.ones(3)], [torch.ones(3)], 1, 1)

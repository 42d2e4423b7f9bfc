"""The published post-hoc methods, each against an independent float64 computation, and through both doors."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import baseline_oracle as oracle
import numpy as np
import pytest
import tiny_models
import torch
from checkpoint_pairs import Pair, all_tensors, hpa, trained
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from method_oracle import hessian
from safetensors.torch import load_file, save_file
from tiny_scenario import TinyScenario
from transformers import AutoModelForCausalLM

import hpa_ext
from hpa import LowRankUpdate, create_method
from hpa import adapt as hpa_adapt
from hpa.checkpoint import CalibrationJob, CheckpointError, Job, adapt_checkpoint
from hpa.continual import RunResult, derive_seed, run
from hpa.data.encode import Encoder
from hpa.data.files import read_conversations
from hpa.evaluation import get_scorer
from hpa.layers import InputStatistics, LayerChange, LayerEdit
from hpa.methods import Method
from hpa.methods.obs import inverse_factor
from hpa.recipe import TaskTraining, parse_recipe, slug
from hpa.storage import load_tensors, read_lines
from hpa.training import sample_batches, train_lora

MERGING = ["task_arithmetic", "dare", "ties", "regmean"]
NEW = ["joint", "safe_delta", "model_tailor", "safe_lora", "sppft", "wise_ft", *MERGING]


@dataclasses.dataclass
class Case:
    """One layer with what every method may read; numpy beside the tensors."""

    change: LayerChange
    safety: InputStatistics
    task: InputStatistics
    x_s: np.ndarray
    x_t: np.ndarray

    @property
    def old(self) -> np.ndarray:
        return self.change.before.double().numpy()

    @property
    def new(self) -> np.ndarray:
        update = self.change.update
        return self.old + update.dense().numpy() if isinstance(update, LowRankUpdate) else update.double().numpy()

    def run(self, method: Method, *, seed: int = 0, task_index: int = 0, **fields: Any) -> LayerEdit:
        change = dataclasses.replace(self.change, **fields)
        return method.edit_layer(change, self.safety, self.task, task_index=task_index, seed=seed)


def case(
    seed: int = 0,
    rows: int = 12,
    cols: int = 30,
    *,
    rank: int | None = None,
    block: int = 4,
    dead: int = 0,
    before: torch.Tensor | None = None,
) -> Case:
    """``dead``: so many input columns are never active."""
    rng = np.random.default_rng(seed)
    old = torch.from_numpy(rng.normal(size=(rows, cols))) if before is None else before
    update: torch.Tensor | LowRankUpdate = old + torch.from_numpy(
        0.05 * np.exp(rng.normal(size=cols)) * rng.normal(size=(rows, cols))
    )
    if rank is not None:
        a, b = (torch.from_numpy(0.2 * rng.normal(size=shape)) for shape in ((rank, cols), (rows, rank)))
        update = LowRankUpdate(a, b, 1.5)
    mixing = rng.normal(size=(cols, cols)) / math.sqrt(cols) + np.diag(np.exp(0.5 * rng.normal(size=cols)))
    x_s, x_t = (rng.normal(size=(n, cols)) @ mixing for n in (90, 200))
    x_s[:, cols - dead :] = 0.0
    x_t[:, cols - dead :] = 0.0
    aligned = old + torch.from_numpy(0.1 * rng.normal(size=(rows, cols)))
    unaligned = aligned - torch.from_numpy(0.3 * rng.normal(size=(rows, 2)) @ rng.normal(size=(2, cols)))
    change = LayerChange("up", block, 4, "up", old, update, aligned=aligned, unaligned=unaligned)
    return Case(change, statistics(x_s), statistics(x_t), x_s, x_t)


def statistics(x: np.ndarray) -> InputStatistics:
    return InputStatistics(torch.from_numpy(hessian(x, len(x))).tril(), None, len(x), 1, "up")


def options_of(name: str) -> dict[str, Any]:
    """Options under which a method edits the layers of :func:`case`."""
    return {"safe_delta": {"s": 2000.0, "block_cols": 13}, "sppft": {"revert": True}}.get(name, {})


# ---------------------------------------------------------------------------------------------- the rules


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    cols=st.integers(1, 30),
    s=st.sampled_from([0.0, 30.0, 300.0, 3e3, 3e4, 1e7]),
    block=st.sampled_from([1, 5, 12, 2048]),
    group=st.sampled_from([1, 4]),
    rank=st.sampled_from([None, 2]),
    dead=st.sampled_from([0, 0, 3]),
)
def test_safe_delta_is_the_authors_rule(seed, rows, cols, s, block, group, rank, dead):
    given_ = case(seed, rows, cols, rank=rank, dead=min(dead, cols))
    edit = given_.run(create_method("safe_delta", s=s, block_cols=block, group=group))
    expected = oracle.safe_delta(given_.old, given_.new, hessian(given_.x_s, 90), s, block, group)
    np.testing.assert_allclose(edit.weight.numpy(), expected, rtol=0, atol=1e-9)
    if s == 0.0:
        assert edit.numbers["accepted"] == 0.0
        assert torch.equal(edit.weight, given_.change.before)


def test_safe_delta_accepts_more_the_larger_its_budget_but_never_the_costliest_columns():
    given_ = case(3, 40, 60)
    shares = [given_.run(create_method("safe_delta", s=s)).numbers["accepted"] for s in (1.0, 30.0, 300.0, 1e9)]
    assert shares == sorted(shares)
    assert len(set(shares)) == 4
    assert shares[-1] == pytest.approx(0.85)
    weight = given_.run(create_method("safe_delta", s=1e9)).weight
    costly = oracle.upper_factor(hessian(given_.x_s, 90)).diagonal().argsort()[:9]  # 15 % of 60 columns
    assert not (weight[:, costly] == given_.change.update[:, costly]).any()


def test_all_changes_accepted_is_the_tuned_weight():
    given_ = case(5, 6, 20)
    weight = given_.run(create_method("safe_delta", s=1e9, left_out=0.0)).weight
    np.testing.assert_allclose(weight, given_.new, rtol=0, atol=1e-12)


def test_columns_to_the_right_answer_a_settled_one_as_least_squares_would():
    given_ = case(5, 6, 20)
    h = hessian(given_.x_s, 90)
    h += 0.01 * np.mean(np.diag(h)) * np.eye(20)
    factor, _ = inverse_factor(given_.safety.gram, 0.01, "up")
    for j in (0, 7, 18):
        # Minimise d' H d over d[j+1:] with d[j] = 1 and nothing left of it.
        optimum = -h[j, j + 1 :] @ np.linalg.inv(h[j + 1 :, j + 1 :])
        np.testing.assert_allclose(factor[j, j + 1 :] / factor[j, j], optimum, rtol=0, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    cols=st.integers(1, 30),
    sparsity=st.sampled_from([0.3, 0.9, 0.99]),
    block=st.sampled_from([1, 5, 128]),
    weight=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    sign=st.sampled_from([-1, 1]),
    rank=st.sampled_from([None, 2]),
)
def test_model_tailor_is_the_authors_rule(seed, rows, cols, sparsity, block, weight, sign, rank):
    # Two numbers standardised are plus and minus the same one, whatever they were: all rows tie, but for rounding.
    assume(cols % block != 2)
    given_ = case(seed, rows, cols, rank=rank)
    method = create_method("model_tailor", sparsity=sparsity, block_cols=block, salience=weight, comp_sign=sign)
    edit = given_.run(method)
    expected, count = oracle.model_tailor(
        given_.old, given_.new, hessian(given_.x_t, 200), sparsity, block, weight, sign
    )
    scale = np.abs(expected).max()
    np.testing.assert_allclose(edit.weight.numpy(), expected, rtol=0, atol=1e-8 * scale)
    assert edit.numbers["reverted"] == pytest.approx(count / (rows * cols))


def test_model_tailor_compensates_towards_the_tuned_outputs_and_the_code_s_sign_away_from_them():
    given_ = case(7, 20, 60)
    lost = {}
    for sign in (-1, 1):
        weight = given_.run(create_method("model_tailor", sparsity=0.5, comp_sign=sign)).weight.numpy()
        lost[sign] = np.square((weight - given_.new) @ given_.x_t.T).sum()
    assert lost[-1] < 0.5 * lost[1]


def test_model_tailor_leaves_the_first_blocks_as_tuned():
    for block, edited in ((0, True), (1, False), (3, False), (4, True)):
        edit = case(block=block).run(create_method("model_tailor"))
        assert (edit.skipped is None) == edited
    assert case(block=1).run(create_method("model_tailor", from_depth=0.0)).skipped is None


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    cols=st.integers(1, 12),
    threshold=st.sampled_from([-1.0, 0.3, 1.0]),
    rank=st.sampled_from([None, 2]),
)
def test_safe_lora_is_its_formula(seed, rows, cols, threshold, rank):
    given_ = case(seed, rows, cols, rank=rank)
    edit = given_.run(create_method("safe_lora", threshold=threshold))
    aligned, unaligned = given_.change.aligned.numpy(), given_.change.unaligned.numpy()
    expected, cosine = oracle.safe_lora(given_.old, given_.new, aligned, unaligned, threshold)
    assert edit.numbers["cosine"] == pytest.approx(cosine, abs=1e-9)
    if abs(cosine - threshold) > 1e-9:
        np.testing.assert_allclose(edit.weight.numpy(), expected, rtol=0, atol=1e-10)


def test_safe_lora_without_its_two_models_or_an_alignment_says_so():
    given_ = case()
    for missing in ("aligned", "unaligned"):
        with pytest.raises(ValueError, match=f"layer up: method 'safe_lora' needs the {missing} model's weight"):
            given_.run(create_method("safe_lora"), **{missing: None})
    edit = given_.run(create_method("safe_lora"), unaligned=given_.change.aligned)
    assert edit.skipped == "not changed by the alignment"
    assert torch.equal(edit.weight, given_.change.update)


@pytest.mark.parametrize("rank", [None, 3])
def test_wise_ft_is_a_straight_line(rank):
    given_ = case(rank=rank)
    for alpha in (0.0, 0.3, 1.0):
        expected = (1 - alpha) * given_.old + alpha * given_.new
        made = given_.run(create_method("wise_ft", alpha=alpha)).weight
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-12)
        from_aligned = given_.run(create_method("wise_ft", alpha=alpha, anchor="aligned")).weight
        expected = (1 - alpha) * given_.change.aligned.numpy() + alpha * given_.new
        np.testing.assert_allclose(from_aligned, expected, rtol=0, atol=1e-12)
    assert create_method("wise_ft").at_strength(1.5).config.alpha == pytest.approx(0.25)


def sequence(count: int, rank: int | None, seed: int = 0) -> list[Case]:
    """Tasks that are all trained from the same weight."""
    first = case(seed, rank=rank)
    return [first, *(case(seed + i, rank=rank, before=first.change.before) for i in range(1, count))]


@pytest.mark.parametrize("rank", [None, 3])
def test_task_arithmetic_adds_every_task_to_the_aligned_model(rank):
    method, total = create_method("task_arithmetic", scale=0.7), 0.0
    for index, task in enumerate(sequence(3, rank)):
        edit = task.run(method, task_index=index)
        method.finish_task()
        total = total + (task.new - task.old)
        np.testing.assert_allclose(edit.weight, task.old + 0.7 * total, rtol=0, atol=1e-12)
        assert edit.numbers["merged_tasks"] == index + 1
        assert (edit.update is None) == (rank is None)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**30),
    density=st.sampled_from([0.05, 0.2, 0.7, 1.0]),
    scale=st.sampled_from([1.0, 0.4]),
    rank=st.sampled_from([None, 3]),
    rounded=st.booleans(),
)
def test_ties_is_trim_elect_and_merge(seed, density, scale, rank, rounded):
    method, deltas = create_method("ties", density=density, scale=scale), []
    for index, task in enumerate(sequence(4, rank, seed)):
        if rounded and rank is None:  # entries of equal size, and sums that cancel
            update = (task.change.update - task.change.before).mul(20).round().div(16)
            before = task.change.before.mul(16).round().div(16)
            task = dataclasses.replace(
                task, change=dataclasses.replace(task.change, before=before, update=before + update)
            )
        edit = task.run(method, task_index=index)
        method.finish_task()
        deltas.append(task.new - task.old)
        np.testing.assert_allclose(edit.weight, oracle.ties(task.old, deltas, density, scale), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize(("alpha", "safety"), [(1.0, 1.0), (0.9, 0.5), (0.9, 0.0), (0.0, 2.0)])
def test_regmean_solves_the_least_squares_problem_of_all_models(rank, alpha, safety):
    method, models = create_method("regmean", alpha=alpha, safety=safety, ridge=1e-5), []
    for index, task in enumerate(sequence(3, rank)):
        edit = task.run(method, task_index=index)
        method.finish_task()
        models.append((task.new, task.x_t, 1.0))
        aligned = [(task.old, task.x_s, safety)] if safety else []
        expected = oracle.regmean(task.old, [*aligned, *models], alpha, 1e-5)
        # Past Gram matrices are stored in float32, and conditions are at most cols / 1e-5.
        np.testing.assert_allclose(edit.weight, expected, rtol=0, atol=1e-9 if index == 0 else 2e-5)
        assert (edit.update is None) == (rank is None)


def test_regmean_in_a_sequence_weighs_the_model_before_with_the_inputs_of_all_past_tasks():
    method = create_method("regmean", train_from="previous", alpha=1.0, ridge=1e-5)
    first = case(1)
    first.run(method)
    method.finish_task()
    second = case(2)
    edit = second.run(method, task_index=1)
    models = [(second.old, second.x_s, 1.0), (second.old, first.x_t, 1.0), (second.new, second.x_t, 1.0)]
    np.testing.assert_allclose(edit.weight, oracle.regmean(second.old, models, 1.0, 1e-5), rtol=0, atol=2e-5)


def test_dare_keeps_a_random_share_of_entries_and_their_expectation():
    given_ = case(rows=60, cols=100)
    delta = given_.new - given_.old
    made = given_.run(create_method("dare", drop=0.75)).weight.numpy() - given_.old
    left = np.abs(made) > 1e-12
    np.testing.assert_allclose(made[left], 4.0 * delta[left], rtol=1e-9)
    assert abs(left.mean() - 0.25) < 5.5 * math.sqrt(0.25 * 0.75 / left.size)
    mean = np.mean([given_.run(create_method("dare", drop=0.75), seed=s).weight.numpy() for s in range(200)], axis=0)
    spread = np.abs(delta) * math.sqrt(3.0 / 200)  # variance of an entry: delta^2 q/(1-q)
    assert np.abs((mean - given_.new) / spread).max() < 6.5


def test_dare_draws_anew_for_each_seed_task_and_layer_again_the_same_and_a_past_task_keeps_its_draw():
    tasks = sequence(2, None)
    drawn = {
        tuple((tasks[0].run(create_method("dare"), **fields).weight != tasks[0].change.before).flatten().tolist())
        for fields in ({}, {}, {"seed": 1}, {"task_index": 1}, {"name": "down"})
    }
    assert len(drawn) == 4
    method = create_method("dare")
    first = tasks[0].run(method, seed=3).weight
    method.finish_task()
    both = tasks[1].run(method, seed=8, task_index=1).weight
    alone = tasks[1].run(create_method("dare"), seed=8, task_index=1).weight
    np.testing.assert_allclose(both - first, alone - tasks[1].change.before, rtol=0, atol=1e-12)


def test_dare_does_not_depend_on_how_many_rows_are_drawn_at_once(monkeypatch):
    given_ = case(rows=50)
    whole = given_.run(create_method("dare")).weight
    monkeypatch.setattr("hpa.methods.dare.ROWS_AT_ONCE", 7)
    assert torch.equal(given_.run(create_method("dare")).weight, whole)


@pytest.mark.parametrize(("blocks", "frozen"), [(32, range(6, 15)), (16, range(3, 8)), (4, range(1, 3)), (1, [1])])
def test_sppft_freezes_the_published_share_of_the_depth(blocks, frozen):
    assert create_method("sppft").frozen_blocks(blocks) == set(frozen)


def test_sppft_widens_with_its_strength_and_stays_inside():
    method = create_method("sppft", first=6, last=14)
    assert method.at_strength(2).frozen_blocks(32) == set(range(1, 19))
    assert method.at_strength(1 / 3).frozen_blocks(32) == {9, 10, 11}
    assert method.at_strength(9).frozen_blocks(32) == set(range(1, 33))
    assert create_method("sppft", first=3, last=3).frozen_blocks(4) == {3}
    with pytest.raises(
        ValueError, match=r"first, last: expected 1 <= first <= last <= 4 \(decoder blocks\), got 3 to 9"
    ):
        create_method("sppft", first=3, last=9).frozen_blocks(4)
    with pytest.raises(ValueError, match="first: expected first <= last, got 4 > 2"):
        create_method("sppft", first=4, last=2)


@pytest.mark.parametrize("rank", [None, 3])
def test_sppft_refuses_a_frozen_block_that_changed_or_puts_it_back(rank):
    inside, outside = case(block=2, rank=rank), case(block=3, rank=rank)
    method = create_method("sppft", first=2, last=2)
    with pytest.raises(ValueError, match="layer up: is in block 2, which method 'sppft' freezes in training"):
        inside.run(method)
    np.testing.assert_allclose(outside.run(method).weight, outside.new, rtol=0, atol=1e-12)
    back = inside.run(create_method("sppft", first=2, last=2, revert=True))
    assert torch.equal(back.weight, inside.change.before)
    still = inside.run(method, update=inside.change.before.clone())
    assert torch.equal(still.weight, inside.change.before)


# ---------------------------------------------------------------------------------------------- what holds for all


@pytest.mark.parametrize("name", NEW)
def test_factors_and_their_product_are_edited_alike(name):
    low = case(4, rank=3)
    dense = dataclasses.replace(low, change=dataclasses.replace(low.change, update=torch.from_numpy(low.new)))
    made = [each.run(create_method(name, **options_of(name))).weight for each in (low, dense)]
    torch.testing.assert_close(*made, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights_keep_their_dtype_and_nothing_changes_in_place(name, dtype):
    given_ = case(5)
    change = given_.change
    narrow = dataclasses.replace(
        change, **{key: getattr(change, key).to(dtype) for key in ("before", "update", "aligned", "unaligned")}
    )
    copies = {key: getattr(narrow, key).clone() for key in ("before", "update", "aligned", "unaligned")}
    wide = dataclasses.replace(narrow, **{key: tensor.double() for key, tensor in copies.items()})
    made, exact = (
        create_method(name, **options_of(name)).edit_layer(each, given_.safety, given_.task, task_index=0, seed=0)
        for each in (narrow, wide)
    )
    assert made.weight.dtype == dtype
    tolerance = torch.finfo(dtype).eps * float(exact.weight.abs().max())
    torch.testing.assert_close(made.weight.double(), exact.weight, rtol=0, atol=tolerance)
    for key, copy in copies.items():
        assert torch.equal(getattr(narrow, key), copy), key


@pytest.mark.parametrize("name", [name for name in NEW if name != "sppft"])
def test_a_layer_without_a_change_stays_as_it_is(name):
    given_ = case()
    edit = given_.run(create_method(name), update=given_.change.before.clone())
    assert torch.equal(edit.weight, given_.change.before)


@pytest.mark.parametrize("name", NEW)
def test_numbers_that_are_not_finite_name_the_layer(name):
    given_ = case(block=1)
    bad = given_.change.update.clone()
    bad[2, 7] = math.nan
    with pytest.raises(ValueError, match="layer up: the change of column 7 is not finite"):
        given_.run(create_method(name), update=bad)


@pytest.mark.parametrize(("name", "which"), [("safe_delta", "safety"), ("model_tailor", "task"), ("regmean", "task")])
def test_statistics_that_are_missing_or_of_another_width_are_named(name, which):
    given_ = case()
    with pytest.raises(ValueError, match=f"layer up: method '{name}' needs {which} statistics, got none"):
        dataclasses.replace(given_, **{which: None}).run(create_method(name))
    without = InputStatistics(None, torch.ones(30), 9, 1, "up")
    with pytest.raises(ValueError, match=f"needs the {which} Gram matrix, got none"):
        dataclasses.replace(given_, **{which: without}).run(create_method(name))
    small = InputStatistics(torch.eye(3), None, 9, 1, "up")
    with pytest.raises(ValueError, match=rf"{which} gram: expected \[30, 30\], got \(3, 3\)"):
        dataclasses.replace(given_, **{which: small}).run(create_method(name))
    silent = dataclasses.replace(given_, **{which: InputStatistics(input_key="up", zero=True)})
    if name != "regmean":
        edit = silent.run(create_method(name))
        assert edit.skipped == f"no {which} activations"
        assert torch.equal(edit.weight, given_.change.update)


def test_regmean_without_a_task_s_inputs_keeps_the_aligned_model_and_without_any_the_tuned_one():
    given_, silent = case(), InputStatistics(input_key="up", zero=True)
    weight = dataclasses.replace(given_, task=silent).run(create_method("regmean")).weight
    np.testing.assert_allclose(weight, given_.old, rtol=0, atol=1e-12)
    edit = dataclasses.replace(given_, task=silent, safety=silent).run(create_method("regmean"))
    assert edit.skipped == "no activations"


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("rank", [None, 3])
def test_the_state_survives_saving_and_goes_on_the_same(tmp_path, name, rank):
    tasks = sequence(3, rank)
    whole, resumed = create_method(name), create_method(name)
    for index, task in enumerate(tasks):
        one = task.run(whole, seed=index, task_index=index)
        two = task.run(resumed, seed=index, task_index=index)
        torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=1e-15)
        for method in (whole, resumed):
            method.finish_task()
        save_file({key: tensor.contiguous() for key, tensor in resumed.state_dict().items()}, tmp_path / "state")
        resumed = create_method(name)
        resumed.load_state_dict(load_file(tmp_path / "state"))
    with pytest.raises(ValueError, match=f"state: not the past tasks of method '{name}', unexpected: other"):
        create_method(name).load_state_dict({"other": torch.ones(1)})
    with pytest.raises(ValueError, match="expected 0 past updates a layer"):
        create_method(name).load_state_dict({"vector.0.W.up": torch.ones(1, 1)})


@pytest.mark.parametrize("name", ["task_arithmetic", "dare", "ties"])
def test_models_that_come_together_are_merged_as_if_they_had_come_one_by_one(name):
    tasks = sequence(3, None)
    one_by_one = create_method(name)
    for index, task in enumerate(tasks):
        expected = task.run(one_by_one, task_index=index)
        one_by_one.finish_task()
    together = tasks[-1].run(create_method(name), earlier=tuple(task.change.update for task in tasks[:2]))
    torch.testing.assert_close(together.weight, expected.weight, rtol=0, atol=1e-15)
    assert together.numbers["merged_tasks"] == 3


@pytest.mark.parametrize("name", ["task_arithmetic", "dare", "ties"])
def test_trained_in_sequence_the_merge_stands_on_the_aligned_model(name):
    method = create_method(name, train_from="previous", scale=1.0)
    assert method.references == {"aligned"}
    first, second = case(1), case(2)
    aligned = first.change.before
    made = first.run(method, aligned=aligned).weight
    method.finish_task()
    later = dataclasses.replace(
        second,
        change=dataclasses.replace(second.change, before=made, update=made + torch.from_numpy(second.new - second.old)),
    )
    edit = later.run(method, aligned=aligned, task_index=1)
    from_aligned = create_method(name, scale=1.0)
    first.run(from_aligned)
    from_aligned.finish_task()
    expert = dataclasses.replace(second.change, before=aligned, update=aligned + later.change.update - made)
    expected = from_aligned.edit_layer(expert, None, None, task_index=1, seed=0)
    torch.testing.assert_close(edit.weight, expected.weight, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="train_from='previous' needs the aligned model's weight, got none"):
        first.run(create_method(name, train_from="previous"), aligned=None)


@pytest.mark.parametrize("name", [name for name in NEW if name != "joint"])
def test_more_strength_holds_more_back(name):
    given_ = case(6, rows=30, cols=40)
    methods = [create_method(name, **options_of(name)).at_strength(strength) for strength in (0.5, 1.0, 2.0)]
    edits = [given_.run(method) for method in methods]
    if name in ("dare", "safe_lora"):
        # Dropping at random keeps the mean of an update and stretches it; C^ is as long as the alignment's change.
        counted = {"dare": "entries_left", "safe_lora": "projected"}[name]
        held = [edit.numbers[counted] for edit in edits]
        assert held == sorted(held, reverse=name == "dare")
        assert held[0] != held[2]
    else:
        left = [float((edit.weight - given_.change.before).norm()) for edit in edits]
        assert left == sorted(left, reverse=True)
        assert left[0] > left[2]
    for bad in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="strength: expected a positive number"):
            create_method(name).at_strength(bad)


def test_layers_of_one_input_share_one_factorisation(monkeypatch):
    calls: list[int] = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: calls.append(1) or original(*a, **k))
    given_ = case()
    for name in ("safe_delta", "model_tailor", "regmean"):
        method = create_method(name)
        calls.clear()
        for layer in ("q", "k", "v"):
            given_.run(method, name=layer)
        assert len(calls) == 1, name


def test_a_gram_matrix_that_is_not_definite_is_damped_harder_and_then_named():
    diagonal = torch.ones(20, dtype=torch.float64)
    diagonal[3] = -0.05
    with pytest.warns(hpa_ext.DampingWarning, match=r"layer up: H not positive definite with damping 0.01; used 0.1"):
        factor, damping = inverse_factor(torch.diag(diagonal), 0.01, "up")
    assert damping == pytest.approx(0.1)
    inverse = torch.linalg.inv(torch.diag(diagonal) + 0.1 * diagonal.mean() * torch.eye(20, dtype=torch.float64))
    torch.testing.assert_close(factor.T @ factor, inverse, rtol=1e-12, atol=1e-12)
    assert torch.equal(factor, factor.triu())
    diagonal[3] = -10.0
    with pytest.raises(hpa_ext.FactorizationError, match="layer up: H is not positive definite, even with damping 1"):
        inverse_factor(torch.diag(diagonal), 0.01, "up")


# ---------------------------------------------------------------------------------------------- the sequence loop


ROWS = [
    {"label": "SeqFT", "method": "seqft"},
    {"label": "joint", "method": "joint"},
    {"label": "arithmetic", "method": "task_arithmetic", "options": {"scale": 0.5}},
    {"label": "DARE", "method": "dare"},
    {"label": "TIES", "method": "ties"},
    {"label": "RegMean", "method": "regmean"},
    {"label": "Safe LoRA", "method": "safe_lora"},
    {"label": "SPPFT", "method": "sppft"},
    {"label": "Safe Delta", "method": "safe_delta", "options": {"s": 20.0, "safety_samples": 8}},
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    result = run_recipe(root / "run", root / "cache")
    assert not result.failures
    return result.folder


def run_recipe(folder: Path, cache: Path, rows: list[dict[str, Any]] = ROWS, listener: Any = None) -> RunResult:
    config = parse_recipe(
        {
            "name": "baselines",
            "scenario": "tiny_scenario:TinyScenario",
            "alignment": {"steps": 30, "batch_size": 16, "learning_rate": 5e-3, "rank": 8},
            "training": {"samples": 60, "steps": 20, "batch_size": 16, "learning_rate": 3e-3, "rank": 4},
            "methods": rows,
        }
    )
    return run(config, folder, cache=cache, listener=listener)


def found(folder: Path, kind: str, label: str) -> list[dict[str, Any]]:
    lines = read_lines(folder / "events.jsonl")
    name = f"clean/{label}/seed0"
    return sorted((e for e in lines if e["event"] == kind and e.get("branch") == name), key=lambda e: e["task_index"])


def test_experts_are_trained_once_for_all_methods_that_merge_them(run_folder: Path) -> None:
    merged = [found(run_folder, "train", label) for label in ("arithmetic", "dare", "ties", "regmean")]
    for index in range(3):
        assert len({tuple(events[index]["loss_curve"]) for events in merged}) == 1
    sequential = found(run_folder, "train", "seqft")
    assert sequential[0]["loss_curve"] == merged[0][0]["loss_curve"]
    assert sequential[1]["loss_curve"] != merged[0][1]["loss_curve"]
    # Three experts, two trainings of joint beside the first expert, and SPPFT's own first task.
    assert len(list((run_folder / "shared" / "seed0").glob("first-*.safetensors"))) == 6


def test_joint_trains_on_all_tasks_so_far_from_the_aligned_model(run_folder: Path) -> None:
    assert [event["steps"] for event in found(run_folder, "train", "joint")] == [20, 40, 60]
    last = found(run_folder, "evaluate", "joint")[-1]["accuracy"]
    sequential = found(run_folder, "evaluate", "seqft")[-1]["accuracy"]
    assert last["first"] > sequential["first"]


def test_frozen_blocks_do_not_change(run_folder: Path) -> None:
    for event in found(run_folder, "edit", "sppft"):
        norms = {layer["block"]: 0.0 for layer in event["layers"]}
        for layer in event["layers"]:
            norms[layer["block"]] += layer["change_norm"]
            assert layer["frozen"] == (layer["block"] == 1)
        assert norms[1] == 0.0
        assert norms[2] > 0.0


def test_safe_lora_reads_the_alignment_and_safe_delta_the_refusals(run_folder: Path) -> None:
    layers = [layer for event in found(run_folder, "edit", "safe-lora") for layer in event["layers"]]
    assert {layer["projected"] for layer in layers} == {0, 1} or all(0 < layer["cosine"] < 1 for layer in layers)
    assert all(layer["alignment_norm"] > 0 for layer in layers)
    accepted = [layer["accepted"] for event in found(run_folder, "edit", "safe-delta") for layer in event["layers"]]
    assert 0 < sum(accepted) / len(accepted) < 0.85


def test_a_merge_is_made_of_experts_trained_by_hand(run_folder: Path) -> None:
    """Task arithmetic over the sequence, from the public parts alone."""
    world = TinyScenario()
    model = world.base_model(run_folder.parent / "cache", seed=0)
    aligned = load_tensors(run_folder / "shared" / "seed0" / "aligned.safetensors")[0]
    total = {name: torch.zeros_like(weight) for name, weight in aligned.items()}

    def set_to(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            model.get_submodule(name).weight.data.copy_(weight)

    for index, task in enumerate(world.tasks):
        set_to(aligned)
        order = sample_batches(
            world.train(task, seed=derive_seed(0, task, "data"), samples=60),
            lambda samples: world.collate(samples, answers=True),
            batch_size=16,
            steps=20,
            seed=derive_seed(0, task, "order"),
        )
        settings_ = TaskTraining(samples=60, steps=20, batch_size=16, learning_rate=3e-3, rank=4)
        for name, update in train_lora(model, order, settings_, derive_seed(0, task, "factors")).items():
            total[name] += update.dense()
        set_to({name: weight + 0.5 * total[name] for name, weight in aligned.items()})
        scorer = get_scorer("contains_word")
        expected = {
            learned: 10.0 * sum(scorer(a, s) for s, a in zip(t, world.generate(model, t), strict=True))
            for learned in world.tasks[: index + 1]
            for t in [world.test(learned)]
        }
        assert found(run_folder, "evaluate", "arithmetic")[index]["accuracy"] == expected


@pytest.mark.parametrize("label", ["TIES", "RegMean"])
def test_a_merge_that_was_stopped_goes_on_from_its_state(run_folder: Path, tmp_path: Path, label: str) -> None:
    class StopError(Exception):
        pass

    class Stopper:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: None

        def event(self, event: dict[str, Any]) -> None:
            if event["event"] == "evaluate" and event["task_index"] == 1:
                raise StopError

    rows = [row for row in ROWS if row["label"] == label]
    cache = run_folder.parent / "cache"
    stopped = run_recipe(tmp_path / "run", cache, rows, Stopper())
    assert [failure.error.strip(": ") for failure in stopped.failures] == ["StopError"]
    assert list((tmp_path / "run").rglob("state-1.safetensors"))
    assert not run_recipe(tmp_path / "run", cache, rows).failures
    for kind in ("edit", "evaluate"):
        for one, two in zip(*(found(f, kind, slug(label)) for f in (run_folder, tmp_path / "run")), strict=True):
            assert {**one, "seconds": 0} == {**two, "seconds": 0}


# ---------------------------------------------------------------------------------------------- checkpoints


IN_MEMORY = {
    "safe_delta": {"s": 50.0},
    "model_tailor": {"from_depth": 0.0},
    "wise_ft": {},
    "task_arithmetic": {},
    "ties": {},
    "regmean": {},
    "sppft": {"revert": True},
}


@pytest.mark.parametrize("name", list(IN_MEMORY))
def test_checkpoints_are_edited_as_models_in_memory_are(tmp_path: Path, name: str) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    job = _job(pair, tmp_path / "out", create_method(name, **IN_MEMORY[name]))
    edits = adapt_checkpoint(job).edits
    assert len(edits) == 21
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pair.before, pair.after))
    sets = [list(Encoder(pair.before).batches(read_conversations(p).conversations)) for p in (pair.safety, pair.task)]
    tuned = {key: tensor.clone() for key, tensor in after.state_dict().items()}
    hpa_adapt(before, after, safety=sets[0], task=sets[1], method=create_method(name, **IN_MEMORY[name]))
    made, changed = all_tensors(tmp_path / "out"), 0
    for key, tensor in after.state_dict().items():
        if key not in made:
            continue
        # What rounding in the activations leaves of an inverse with a ridge of 1e-6: a thousandth of the update.
        update = float((tuned[key] - before.state_dict()[key]).norm())
        assert float((made[key] - tensor).norm()) <= 5e-3 * update + 1e-7, key
        changed += not torch.equal(made[key], tuned[key])
    assert changed >= 7


def _job(pair: Pair, out: Path, method: Method, **fields: Any) -> Job:
    after = fields.pop("after", pair.after)
    adapter = (after / "adapter_config.json").is_file()
    calibrations = {
        "safety": CalibrationJob(pair.before, pair.safety, "safety", Path()),
        "task": CalibrationJob(after, pair.task, "task", Path(), base=pair.before if adapter else None),
    }
    return Job(pair.before, after, out, method, calibrations=calibrations, **fields)


def test_dare_on_checkpoints_is_the_same_however_the_files_are_split(tmp_path: Path) -> None:
    one, many = (Pair(tmp_path / size, tiny_models.llama, shards=size) for size in ("1GB", "7KB"))
    for pair in (one, many):
        adapt_checkpoint(_job(pair, pair.root / "out", create_method("dare")))
    first, second = (all_tensors(pair.root / "out") for pair in (one, many))
    before, after = all_tensors(one.before), all_tensors(one.after)
    name = "model.layers.0.mlp.up_proj.weight"
    kept = first[name] != before[name]
    expected = before[name] + 10.0 * (after[name] - before[name])
    torch.testing.assert_close(first[name][kept], expected[kept], rtol=1e-5, atol=1e-6)
    assert 0.03 < float(kept.float().mean()) < 0.2
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_other_tasks_checkpoints_are_merged_by_the_command(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    trained(tiny_models.llama(0), seed=5).save_pretrained(tmp_path / "other")
    shown = hpa(
        "adapt", pair.before, pair.after, "-m", "ties", "--earlier", tmp_path / "other", "--out", tmp_path / "m"
    )
    assert "layers edited by ties" in shown.stdout
    before, after, other, made = (
        all_tensors(folder) for folder in (pair.before, pair.after, tmp_path / "other", tmp_path / "m")
    )
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        deltas = [(each[name] - before[name]).double().numpy() for each in (other, after)]
        expected = oracle.ties(before[name].double().numpy(), deltas, 0.2, 1.0)
        np.testing.assert_allclose(made[name].double().numpy(), expected, rtol=0, atol=1e-6)
    refused = hpa(
        "adapt", pair.before, pair.after, "-m", "wise_ft", "--earlier", tmp_path / "other", "-o", tmp_path / "n", code=2
    )
    assert "earlier: method 'wise_ft' as set merges no models of other tasks" in refused.stderr


def test_adapters_are_merged_and_stay_adapters_where_the_rank_allows(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    folders = []
    for seed in (1, 2):
        model = tiny_models.with_lora(tiny_models.llama(0), rank=2, targets=["q_proj"])
        for number, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:  # the factors: another task, other numbers
                noise = np.random.default_rng([seed, number]).normal(size=parameter.shape)
                parameter.data = torch.from_numpy(noise).to(parameter.dtype)
        folders.append(tmp_path / f"adapter{seed}")
        model.save_pretrained(folders[-1])
    job = _job(pair, tmp_path / "lora", create_method("task_arithmetic"), after=folders[0], save_as="lora")
    adapt_checkpoint(job)
    tensors, old = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "lora", folders[0]))
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, (0.4 if "lora_B" in key else 1.0) * old[key])
    both = dataclasses.replace(job, out=tmp_path / "both", earlier=(folders[1],))
    with pytest.raises(CheckpointError, match="it is no update of rank 2; use --save-as full"):
        adapt_checkpoint(both)
    adapt_checkpoint(dataclasses.replace(both, out=tmp_path / "full", save_as="full"))
    other = load_file(folders[1] / "adapter_model.safetensors")
    prefix, name = "base_model.model.", "model.layers.1.self_attn.q_proj"
    delta = sum(
        3 * each[f"{prefix}{name}.lora_B.weight"] @ each[f"{prefix}{name}.lora_A.weight"] for each in (old, other)
    )
    expected = all_tensors(pair.before)[f"{name}.weight"] + 0.4 * delta
    torch.testing.assert_close(all_tensors(tmp_path / "full")[f"{name}.weight"], expected, rtol=0, atol=1e-6)


def test_safe_lora_on_checkpoints_reads_two_more_models(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    trained(tiny_models.llama(0), seed=9).save_pretrained(tmp_path / "unaligned")
    files = ["--aligned", pair.before, "--unaligned", tmp_path / "unaligned"]
    hpa("adapt", pair.before, pair.after, "-m", "safe_lora", "--set", "threshold=1", *files, "--out", tmp_path / "out")
    before, after, unaligned, made = (
        all_tensors(folder) for folder in (pair.before, pair.after, tmp_path / "unaligned", tmp_path / "out")
    )
    name = "model.layers.1.mlp.gate_proj.weight"
    arrays = [each[name].double().numpy() for each in (before, after, before, unaligned)]
    expected, _ = oracle.safe_lora(*arrays, threshold=1.0)
    np.testing.assert_allclose(made[name].double().numpy(), expected, rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match="unaligned: needed by method 'safe_lora', got none; pass --unaligned"):
        adapt_checkpoint(_job(pair, tmp_path / "x", create_method("safe_lora"), aligned=pair.before))


def test_what_only_trains_is_refused_on_checkpoints(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    with pytest.raises(CheckpointError, match="method 'joint' is a way of training"):
        adapt_checkpoint(_job(pair, tmp_path / "out", create_method("joint")))
    with pytest.raises(ValueError, match="method 'sppft' freezes in training, but the task has changed it"):
        adapt_checkpoint(_job(pair, tmp_path / "out", create_method("sppft")))
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pair.before, pair.after))
    with pytest.raises(ValueError, match="method: 'joint' is a way of training"):
        hpa_adapt(before, after, safety=None, task=None, method="joint")
    with pytest.raises(ValueError, match="unaligned: needed by method 'safe_lora', got None"):
        hpa_adapt(before, after, safety=None, task=None, method="safe_lora", aligned=before)
    with pytest.raises(ValueError, match="earlier: method 'seqft' as set merges no models of other tasks"):
        hpa_adapt(before, after, safety=None, task=None, method="seqft", earlier=[before])


def test_an_edit_of_checkpoints_takes_nothing_down_for_a_next_task(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    for name in MERGING:
        method = create_method(name)
        adapt_checkpoint(_job(pair, tmp_path / name, method))
        method.finish_task()
        assert method.state_dict() == {}, name

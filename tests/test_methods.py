"""The rules for one layer: HPA against an independent float64 implementation, hpa_ls against its own optimality, and
the controls against what they claim to hold constant."""

from __future__ import annotations

import math

import method_oracle as oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hpa_ext
from hpa import METHODS, AdaptConfig, LowRankUpdate, adapt_layer, create_method
from hpa.layers import InputStatistics, LayerChange
from hpa.methods.hpa_ls import _Sketch

NUMBERS = ("alpha", "log_ratio", "kept_change_share", "kept_safety_share", "change_norm", "before_norm", "p")
COUNTS = ("keep", "focus", "overlap", "kept", "kept_safety_only", "kept_overlap")


def layer(
    rng: np.random.Generator, rows: int, cols: int, dtype=torch.float64, common: float = 1.0
) -> tuple[torch.Tensor, ...]:
    """Weights before and after, and two diagonals; with ``common = 0`` the two scores have little in common."""
    old = torch.from_numpy(rng.normal(size=(rows, cols))).to(dtype)
    strength = 0.03 * np.exp(common * rng.normal(size=cols))
    new = (old.double() + torch.from_numpy(strength * rng.normal(size=(rows, cols)))).to(dtype)
    shared = np.exp(common * rng.normal(size=cols))
    safety, task = (torch.from_numpy(shared * np.exp(0.7 * rng.normal(size=cols) + shift)) for shift in (0.3, 0.0))
    return old, new, safety, task


def assert_edit(edit, expected_weight, expected, *, atol):
    for key in COUNTS:
        assert edit.numbers[key] == expected[key], key
    for key in NUMBERS:
        assert edit.numbers[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-12), key
    assert edit.numbers["projection"] == pytest.approx(expected["projection"], rel=1e-6, abs=1e-12)
    np.testing.assert_allclose(edit.weight.double().numpy(), expected_weight, rtol=0, atol=atol)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 20),
    cols=st.integers(1, 70),
    block=st.integers(1, 5),
    mode=st.sampled_from(["full", "eps", "phi"]),
    proj=st.sampled_from(["fro", "row", "col", "subspace", "off"]),
    side=st.sampled_from(["input", "output"]),
    overflow=st.sampled_from(["cap", "keep"]),
    alpha_mode=st.sampled_from(["affine", "relu", "abs", "const"]),
    alpha_sign=st.sampled_from([1, -1]),
    phi_norm=st.sampled_from(["none", "mean"]),
    layer_base=st.sampled_from([0, 1]),
    p_max=st.sampled_from([15.0, 40.0, 100.0, 0.0]),
    common=st.sampled_from([0.0, 2.0]),
)
def test_a_layer_comes_out_as_an_independent_float64_implementation_says(
    seed, rows, cols, block, mode, proj, side, overflow, alpha_mode, alpha_sign, phi_norm, layer_base, p_max, common
):
    old, new, safety, task = layer(np.random.default_rng(seed), rows, cols, common=common)
    choice = {
        "mode": mode,
        "overflow": overflow,
        "alpha_mode": alpha_mode,
        "alpha_sign": alpha_sign,
        "phi_norm": phi_norm,
    }
    config = AdaptConfig(proj=proj, p_max=p_max, layer_base=layer_base, subspace_side=side, subspace_rank=3, **choice)
    edit = adapt_layer(old, new, safety, task, layer=block, layers=5, config=config)
    weight, numbers = oracle.edit(
        old.numpy(),
        new.numpy(),
        safety.numpy(),
        task.numpy(),
        block=block,
        blocks=5,
        proj=proj,
        rank=3,
        side=side,
        p_max=p_max,
        layer_base=layer_base,
        **choice,
    )
    assert edit.weight.dtype == torch.float64
    assert_edit(edit, weight, numbers, atol=1e-9 if proj == "subspace" else 1e-12)


def test_safety_only_columns_beyond_the_budget_are_capped_or_all_kept():
    rng = np.random.default_rng(11)
    old, new, safety, task = layer(rng, 10, 200, common=0.0)
    kept = {}
    for overflow in ("cap", "keep"):
        edit = adapt_layer(old, new, safety, task, layer=1, layers=2, config=AdaptConfig(overflow=overflow))
        kept[overflow] = edit.numbers["kept"]
        focus, overlap = edit.numbers["focus"], edit.numbers["overlap"]
    assert kept["cap"] == 20
    assert kept["keep"] == focus - overlap > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_weights_are_scored_as_stored_and_rounded_once(dtype):
    old, new, safety, task = layer(np.random.default_rng(5), 64, 200, dtype)
    edit = adapt_layer(old, new, safety, task, layer=2, layers=4)
    weight, numbers = oracle.edit(
        old.double().numpy(), new.double().numpy(), safety.numpy(), task.numpy(), block=2, blocks=4
    )
    assert edit.weight.dtype == dtype
    assert_edit(edit, weight, numbers, atol=torch.finfo(dtype).eps * np.abs(weight).max())
    kept = np.flatnonzero((edit.weight == old).all(0).numpy())
    assert len(kept) == numbers["keep"]


def test_kept_columns_are_the_old_ones_to_the_last_bit_and_nothing_is_changed_in_place():
    old, new, safety, task = layer(np.random.default_rng(1), 30, 100, torch.float32)
    copies = [tensor.clone() for tensor in (old, new, safety, task)]
    edit = adapt_layer(old, new, safety, task, layer=1, layers=4)
    same = (edit.weight == old).all(dim=0)
    assert int(same.sum()) == edit.numbers["keep"] == 13  # 12.5 % of 100, rounded half up
    assert all(torch.equal(a, b) for a, b in zip((old, new, safety, task), copies, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (5, 0), (0, 5), (1, 50), (50, 1)])
def test_thin_and_empty_layers_are_edited_or_skipped_but_never_an_error(shape):
    old, new, safety, task = layer(np.random.default_rng(0), *shape)
    edit = adapt_layer(old, new, safety, task, layer=1, layers=2, config=AdaptConfig(p_max=60))
    assert edit.weight.shape == shape
    assert (edit.skipped == "no change") == (0 in shape)
    if 0 not in shape:
        weight, _ = oracle.edit(old.numpy(), new.numpy(), safety.numpy(), task.numpy(), block=1, blocks=2, p_max=60)
        np.testing.assert_allclose(edit.weight.numpy(), weight, atol=1e-12)


def test_any_layout_of_the_weights_gives_the_same():
    old, new, safety, task = layer(np.random.default_rng(12), 30, 40)
    plain = adapt_layer(old, new, safety, task, layer=1, layers=3)
    wide = torch.zeros(30, 100, dtype=torch.float64)
    wide[:, 7:47] = old
    for before, after in ((old.T.contiguous().T, new), (old, new.T.contiguous().T), (wide[:, 7:47], new)):
        edit = adapt_layer(before, after, safety, task, layer=1, layers=3)
        assert edit.numbers["kept"] == plain.numbers["kept"]
        torch.testing.assert_close(edit.weight, plain.weight, rtol=0, atol=1e-14)


def test_a_float32_weight_after_a_bfloat16_one_is_scored_in_float32():
    old, new, safety, task = layer(np.random.default_rng(13), 30, 40)
    before, after = old.bfloat16(), new.float()
    weight, numbers = oracle.edit(
        before.double().numpy(), after.double().numpy(), safety.numpy(), task.numpy(), block=1, blocks=3
    )
    edit = adapt_layer(before, after, safety, task, layer=1, layers=3)
    assert edit.weight.dtype == torch.bfloat16
    assert_edit(edit, weight, numbers, atol=2**-8 * np.abs(weight).max())


@pytest.mark.parametrize(("cols", "keep"), [(1, 0), (6, 0), (7, 0), (9, 0), (10, 1), (11, 1)])
def test_too_few_columns_for_the_budget_keep_none_and_still_adjust(cols, keep):
    old, new, safety, task = layer(np.random.default_rng(2), 8, cols)
    edit = adapt_layer(old, new, safety, task, layer=4, layers=4)  # 5 %
    weight, _ = oracle.edit(old.numpy(), new.numpy(), safety.numpy(), task.numpy(), block=4, blocks=4)
    assert edit.numbers["kept"] == edit.numbers["keep"] == keep
    np.testing.assert_allclose(edit.weight.numpy(), weight, atol=1e-12)


def test_ties_go_to_the_lower_column():
    old = torch.zeros(4, 40, dtype=torch.float64)
    old[0] = 1.0
    new = old + 0.1
    ones = torch.ones(40, dtype=torch.float64)
    edit = adapt_layer(old, new, ones, ones, layer=4, layers=4, config=AdaptConfig(proj="off", p_min=10))
    assert (edit.weight == old).all(dim=0).nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_mode_none_is_plain_sequential_tuning():
    old, new, safety, task = layer(np.random.default_rng(3), 8, 30)
    edit = adapt_layer(old, new, safety, task, layer=1, layers=2, config=AdaptConfig.ablation(1))
    assert torch.equal(edit.weight, new)
    assert edit.skipped == "mode is none"
    assert create_method("hpa", mode="none").needs == frozenset()


def test_kept_columns_return_to_the_aligned_model_where_asked():
    rng = np.random.default_rng(4)
    old, new, safety, task = layer(rng, 12, 50)
    aligned = torch.from_numpy(rng.normal(size=(12, 50)))
    config = AdaptConfig(anchor="aligned")
    edit = adapt_layer(old, new, safety, task, layer=1, layers=3, config=config, aligned=aligned)
    weight, numbers = oracle.edit(
        old.numpy(), new.numpy(), safety.numpy(), task.numpy(), block=1, blocks=3, anchor=aligned.numpy()
    )
    assert_edit(edit, weight, numbers, atol=1e-12)
    with pytest.raises(ValueError, match="anchor='aligned' needs the aligned model's weight"):
        adapt_layer(old, new, safety, task, layer=1, layers=3, config=config)


def test_a_basis_of_ones_own_is_taken_out_of_the_update():
    old, new, safety, task = layer(np.random.default_rng(6), 9, 20)
    basis = torch.linalg.qr(torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0].T
    config = AdaptConfig(proj="subspace", p_max=0, p_min=0)
    edit = adapt_layer(old, new, safety, task, layer=1, layers=1, config=config, basis=basis)
    assert float(((edit.weight - old) @ basis.T).abs().max()) < 1e-12
    inside = torch.linalg.matrix_norm((new - old) @ basis.T) / torch.linalg.matrix_norm(new - old)
    assert edit.numbers["projection_share"] == pytest.approx(float(inside), rel=1e-9)
    with pytest.raises(ValueError, match="basis: expected orthonormal rows"):
        adapt_layer(old, new, safety, task, layer=1, layers=1, config=config, basis=2 * basis)
    with pytest.raises(ValueError, match=r"basis: expected \[rank, 20\]"):
        adapt_layer(old, new, safety, task, layer=1, layers=1, config=config, basis=basis[:, :5])
    with pytest.raises(ValueError, match="basis: only used with proj='subspace'"):
        adapt_layer(old, new, safety, task, layer=1, layers=1, basis=basis)


@pytest.mark.parametrize("proj", ["fro", "row", "col"])
def test_the_adjusted_update_is_orthogonal_to_the_old_weight(proj):
    old, new, safety, task = layer(np.random.default_rng(7), 15, 33)
    new = new + 0.05 * old
    config = AdaptConfig(proj=proj, p_max=0, p_min=0)
    delta = adapt_layer(old, new, safety, task, layer=1, layers=1, config=config).weight - old
    dots = {"fro": (delta * old).sum(), "row": (delta * old).sum(1), "col": (delta * old).sum(0)}[proj]
    assert float(dots.abs().max()) < 1e-12 * float(old.square().sum())


def test_a_layer_without_a_change_is_skipped():
    old, _, safety, task = layer(np.random.default_rng(8), 5, 20)
    edit = adapt_layer(old, old.clone(), safety, task, layer=1, layers=2)
    assert edit.skipped == "no change"
    assert torch.equal(edit.weight, old)


def test_a_zero_weight_before_has_no_direction_to_take_out():
    _, new, safety, task = layer(np.random.default_rng(8), 5, 20)
    edit = adapt_layer(torch.zeros_like(new), new, safety, task, layer=1, layers=2)
    assert edit.numbers["projection"] == 0.0
    assert torch.isfinite(edit.weight).all()


@pytest.mark.parametrize("which", ["before", "after"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_name_the_layer_and_the_column(which, bad):
    old, new, safety, task = layer(np.random.default_rng(9), 5, 20)
    (old if which == "before" else new)[2, 7] = bad
    with pytest.raises(ValueError, match=r"layer model\.up: the change of column 7 is not finite"):
        adapt_layer(old, new, safety, task, layer=1, layers=2, name="model.up")


def test_wrong_arguments_are_named():
    old, new, safety, task = layer(np.random.default_rng(10), 5, 20)
    with pytest.raises(ValueError, match=r"after: expected \(5, 20\) \(as before\), got \(5, 19\)"):
        adapt_layer(old, new[:, 1:], safety, task, layer=1, layers=2)
    with pytest.raises(ValueError, match=r"before: expected a floating-point tensor \[rows, cols\], got torch.int64"):
        adapt_layer(old.long(), new, safety, task, layer=1, layers=2)
    with pytest.raises(TypeError, match="after: expected a floating-point tensor or a LowRankUpdate, got str"):
        adapt_layer(old, "new", safety, task, layer=1, layers=2)
    with pytest.raises(ValueError, match=r"safety_diagonal: expected \[20\]"):
        adapt_layer(old, new, safety[:4], task, layer=1, layers=2)
    with pytest.raises(ValueError, match=r"task_diagonal: expected positive finite numbers, got 0\.0 at column 3"):
        adapt_layer(old, new, safety, torch.where(torch.arange(20) == 3, 0.0, task), layer=1, layers=2)
    with pytest.raises(ValueError, match="safety_diagonal: expected positive finite numbers, got nan at column 5"):
        adapt_layer(old, new, torch.where(torch.arange(20) == 5, math.nan, safety), task, layer=1, layers=2)
    for number in (0, 3):
        with pytest.raises(ValueError, match="layer: expected 1 <= layer <= layers"):
            adapt_layer(old, new, safety, task, layer=number, layers=2)
    with pytest.raises(ValueError, match=r"update: expected factors of a \(5, 20\) matrix"):
        adapt_layer(old, LowRankUpdate(torch.ones(2, 19), torch.ones(5, 2)), safety, task, layer=1, layers=2)
    with pytest.raises(ValueError, match=r"B: expected \[rows, 2\]"):
        LowRankUpdate(torch.ones(2, 19), torch.ones(5, 3))


def test_unknown_methods_and_options_are_answered_with_what_exists():
    with pytest.raises(
        ValueError,
        match="method: expected one of seqft, hpa, hpa_ls, joint, .*, regmean, random, magnitude, scale .*, got 'x'",
    ):
        create_method("x")
    with pytest.raises(ValueError, match=r"mod: no such option; method 'hpa' has: .*mode"):
        create_method("hpa", mod="eps")
    with pytest.raises(ValueError, match="lr: no such option; method 'seqft' has: none"):
        create_method("seqft", lr=1)
    with pytest.raises(TypeError, match="config: expected AdaptConfig, got LeastSquaresConfig"):
        METHODS["hpa"](METHODS["hpa_ls"].Config())


# ---------------------------------------------------------------------------------------------- methods as objects


def case(seed: int = 0, rows: int = 12, cols: int = 60, block: int = 1, rank: int | None = None):
    """A change with calibration inputs: ``(change, safety, task, X_s, X_t)``."""
    rng = np.random.default_rng(seed)
    old, new, _, _ = layer(rng, rows, cols)
    update: torch.Tensor | LowRankUpdate = new
    if rank is not None:
        a, b = (torch.from_numpy(0.2 * rng.normal(size=shape)) for shape in ((rank, cols), (rows, rank)))
        update = LowRankUpdate(a, b, 1.5)
    spread = np.exp(0.5 * rng.normal(size=cols))
    x_s, x_t = (rng.normal(size=(n, cols)) * spread for n in (90, 200))
    change = LayerChange("up", block, 4, "up", old, update)
    return change, statistics(x_s), statistics(x_t), x_s, x_t


def statistics(x: np.ndarray) -> InputStatistics:
    gram = torch.from_numpy(oracle.hessian(x, len(x)))
    return InputStatistics(gram.tril(), hpa_ext.inverse_diagonal(gram), len(x), 1, "up")


def run(method, change, safety=None, task=None, *, task_index=0, seed=0):
    return method.edit_layer(change, safety, task, task_index=task_index, seed=seed)


def test_hpa_as_a_method_is_adapt_layer():
    change, safety, task, _, _ = case(block=2)
    edit = run(create_method("hpa", p_max=40), change, safety, task)
    expected = adapt_layer(
        change.before,
        change.update,
        safety.inverse_diagonal,
        task.inverse_diagonal,
        layer=2,
        layers=4,
        config=AdaptConfig(p_max=40),
    )
    assert torch.equal(edit.weight, expected.weight)
    assert expected.numbers.items() <= edit.numbers.items()


@pytest.mark.parametrize("missing", ["safety", "task"])
def test_hpa_without_activations_keeps_the_tuned_weight_and_says_so(missing):
    change, safety, task, _, _ = case()
    zero = InputStatistics(input_key="up", zero=True)
    pair = (zero, task) if missing == "safety" else (safety, zero)
    edit = run(create_method("hpa"), change, *pair)
    assert edit.skipped == f"no {missing} activations"
    assert torch.equal(edit.weight, change.update)
    pair = (None, task) if missing == "safety" else (safety, None)
    with pytest.raises(ValueError, match=f"layer up: method 'hpa' needs {missing} statistics, got none"):
        run(create_method("hpa"), change, *pair)


def test_seqft_keeps_every_update_whole():
    change, *_ = case()
    edit = run(create_method("seqft"), change)
    assert torch.equal(edit.weight, change.update)
    assert edit.numbers["change_norm"] == pytest.approx(float((change.update - change.before).norm()), rel=1e-9)
    assert create_method("seqft").needs == frozenset()


@pytest.mark.parametrize("name", ["random", "magnitude"])
def test_the_controls_keep_as_many_columns_as_hpa_and_adjust_alike(name):
    change, safety, task, _, _ = case(block=2, cols=123)
    hpa = run(create_method("hpa"), change, safety, task)
    control = run(create_method(name), change)
    same = (control.weight == change.before).all(dim=0)
    assert int(same.sum()) == control.numbers["kept"] == hpa.numbers["kept"] == 12  # 10 % of 123, rounded half up
    assert control.numbers["projection"] == hpa.numbers["projection"] != 0.0
    free = ~(same | (hpa.weight == change.before).all(dim=0))
    torch.testing.assert_close(control.weight[:, free], hpa.weight[:, free], rtol=0, atol=1e-15)


def test_magnitude_keeps_the_columns_that_changed_most():
    change, *_ = case(cols=80)
    edit = run(create_method("magnitude"), change)
    moved = (change.update - change.before).square().mean(0).numpy()
    expected = sorted(oracle.ranked(moved, list(range(80)))[: edit.numbers["keep"]])
    assert (edit.weight == change.before).all(dim=0).nonzero().flatten().tolist() == expected


def test_random_columns_are_drawn_anew_for_each_seed_task_and_layer_and_again_the_same():
    change, *_ = case(cols=200)

    def columns(seed=0, task_index=0, name="up"):
        named = LayerChange(name, 1, 4, "up", change.before, change.update)
        edit = run(create_method("random"), named, task_index=task_index, seed=seed)
        return tuple((edit.weight == change.before).all(dim=0).nonzero().flatten().tolist())

    assert columns() == columns()
    assert len({columns(), columns(seed=1), columns(task_index=1), columns(name="down")}) == 4
    counts = np.bincount([c for seed in range(300) for c in columns(seed=seed)], minlength=200)
    # 12.5 % of 200: every column is drawn with probability 1/8; 5.5 standard deviations.
    assert np.abs(counts - 300 / 8).max() < 5.5 * math.sqrt(300 * 7 / 64)


@pytest.mark.parametrize("rank", [None, 3])
def test_scale_by_energy_leaves_an_update_as_long_as_hpa_does(rank):
    change, safety, task, _, _ = case(rank=rank)
    options = {"p_max": 60, "mode": "eps"}
    hpa = run(create_method("hpa", **options), change, safety, task)
    scaled = run(create_method("scale", **options), change, safety, task)
    delta = change.update.dense() if rank else change.update - change.before
    left = float((hpa.weight - change.before).norm())
    assert float((scaled.weight - change.before).norm()) == pytest.approx(left, rel=1e-9)
    np.testing.assert_allclose(scaled.weight - change.before, scaled.numbers["factor"] * delta, rtol=1e-9, atol=1e-12)
    assert create_method("scale").needs == create_method("hpa").needs


def test_scale_by_columns_or_by_a_factor_needs_no_calibration():
    change, *_ = case(block=2)
    for options, factor in (({"match": "columns"}, 0.9), ({"factor": 0.25}, 0.25)):
        method = create_method("scale", **options)
        assert method.needs == frozenset()
        edit = run(method, change)
        assert edit.numbers["factor"] == pytest.approx(factor)
        expected = change.before + factor * (change.update - change.before)
        torch.testing.assert_close(edit.weight, expected, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------------------------- hpa_ls


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 8),
    cols=st.integers(1, 25),
    mu=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    memory=st.sampled_from([0.0, 0.1, 2.0]),
    weighting=st.sampled_from(["sum", "mean", "decay"]),
    rank=st.sampled_from([None, 1, 3]),
    proximal=st.sampled_from([0.0, 0.02, 1.0]),
)
def test_least_squares_is_the_formula_of_the_method_over_three_tasks(
    seed, rows, cols, mu, memory, weighting, rank, proximal
):
    options = {"memory_weighting": weighting, "memory_decay": 0.5, "proximal": proximal}
    method = create_method("hpa_ls", mu=mu, memory=memory, **options)
    past: list[np.ndarray] = []
    for index in range(3):
        change, safety, task, x_s, x_t = case(seed + index, rows, cols, rank=rank)
        edit = run(method, change, safety, task, task_index=index)
        method.finish_task()
        weights = {
            "sum": [memory] * index,
            "mean": [memory / max(index, 1)] * index,
            "decay": [memory * 0.5**age for age in reversed(range(index))],
        }[weighting]
        # Without the factor 2 of the Hessian: the method must not depend on it.
        kept = [(1.0, oracle.hessian(x_s, len(x_s)) / 2), *zip(weights, past, strict=True)]
        wanted = oracle.hessian(x_t, len(x_t)) / 2
        new = change.before + change.update.dense() if rank else change.update
        expected = oracle.least_squares(change.before.numpy(), new.numpy(), kept, wanted, mu, 1e-4, proximal)
        past.append(wanted)
        # The memory is stored in float32 (2^-24), and conditions are at most cols / 1e-4.
        np.testing.assert_allclose(edit.weight.numpy(), expected, rtol=0, atol=1e-3 if memory and index else 1e-9)
        if memory and index:
            scale = np.abs(expected - change.before.numpy()).max()
            assert np.abs(edit.weight.numpy() - expected).max() < 2e-5 * max(scale, 1e-3)


@pytest.mark.parametrize("proximal", [0.0, 0.4])
def test_least_squares_minimises_the_stated_objective(proximal):
    method = create_method("hpa_ls", mu=0.3, memory=0.2, proximal=proximal)
    first, safety, task, _, x_1 = case(1)
    run(method, first, safety, task)
    method.finish_task()
    change, safety, task, x_s, x_t = case(2)
    weight = run(method, change, safety, task).weight.clone().requires_grad_()

    def mean_square(difference, x):
        x = torch.from_numpy(x)
        return (difference @ x.T).square().sum() / len(x)

    mean_diagonal = np.mean(
        np.diag(sum(m * oracle.hessian(x, 2 * len(x)) for m, x in ((1, x_s), (0.2, x_1), (0.3, x_t))))
    )
    old, new = change.before, change.update
    loss = (
        mean_square(weight - old, x_s)
        + 0.2 * mean_square(weight - old, x_1)
        + 0.3 * mean_square(weight - new, x_t)
        + 1e-4 * mean_diagonal * (weight - new).square().sum()
        + proximal * mean_diagonal * (weight - old).square().sum()
    )
    loss.backward()
    start = new.clone().requires_grad_()
    (mean_square(start - old, x_s) + 0.2 * mean_square(start - old, x_1)).backward()
    assert float(weight.grad.norm()) < 1e-5 * float(start.grad.norm())


@pytest.mark.parametrize("mu", [1e9, 0.0])
def test_the_knob_runs_from_the_tuned_model_to_the_old_one(mu):
    change, safety, task, _, _ = case(3, cols=30)
    weight = run(create_method("hpa_ls", mu=mu, ridge=1e-6), change, safety, task).weight
    target = change.update if mu else change.before  # 90 safety tokens span all 30 inputs: no null space is left
    distance = float((weight - target).norm() / (change.update - change.before).norm())
    assert distance < 1e-4


def test_the_proximal_term_holds_what_no_sample_shows_and_leaves_the_task_its_inputs():
    """An update along one direction of the task and one that nobody has seen: the first is learned, the second is
    not, where without the term both are."""
    cols = 30
    x_s, x_t = np.zeros((50, cols)), np.zeros((50, cols))
    x_s[:, :10] = np.random.default_rng(0).normal(size=(50, 10))
    x_t[:, 10] = 9.0
    old = torch.zeros(4, cols, dtype=torch.float64)
    new = old.clone()
    new[:, [10, 20]] = 1.0
    change = LayerChange("up", 1, 4, "up", old, new)
    safety, task = (
        InputStatistics(torch.from_numpy(oracle.hessian(x, 50)).tril(), None, 50, 1, "up") for x in (x_s, x_t)
    )
    weights = {p: run(create_method("hpa_ls", proximal=p), change, safety, task).weight[0] for p in (0.0, 0.05)}
    assert float(weights[0.0][20]) == pytest.approx(1.0)
    assert float(weights[0.05][20]) < 0.01
    assert float(weights[0.05][10]) > 0.9


def test_the_proximal_term_holds_inputs_that_safety_never_reached():
    """An expert that no refusal went through: its update is learned for the task's own inputs, not for all."""
    change, _, task, _, x_t = case(rank=2)
    safety = InputStatistics(input_key="up", zero=True)
    edit = run(create_method("hpa_ls", proximal=0.3), change, safety, task)
    assert edit.skipped is None
    expected = oracle.least_squares(
        change.before.numpy(),
        (change.before + change.update.dense()).numpy(),
        [],
        oracle.hessian(x_t, len(x_t)),
        0.1,
        1e-4,
        0.3,
    )
    np.testing.assert_allclose(edit.weight.numpy(), expected, rtol=0, atol=1e-12)
    assert edit.numbers["kept_inputs_change_left"] == 0.0  # not what rounding leaves of nothing
    assert run(create_method("hpa_ls", proximal=0.3), change, safety, safety).skipped == "no safety activations"


@pytest.mark.parametrize("proximal", [0.0, 0.2])
def test_a_low_rank_update_stays_low_rank_and_equals_the_dense_edit(proximal):
    change, safety, task, _, _ = case(4, rank=3)
    method = create_method("hpa_ls", proximal=proximal)
    low = run(method, change, safety, task)
    dense = LayerChange("up", 1, 4, "up", change.before, change.before + change.update.dense())
    high = run(create_method("hpa_ls", proximal=proximal), dense, safety, task)
    assert low.update.rank == 3
    assert torch.equal(low.update.B, change.update.B)
    torch.testing.assert_close(low.weight, high.weight, rtol=0, atol=1e-12)
    for key in ("update_left", "kept_inputs_change_left", "task_change_lost"):
        assert low.numbers[key] == pytest.approx(high.numbers[key], rel=1e-6)
    delta, after = change.update.dense(), high.weight - change.before
    gram_s = torch.from_numpy(oracle.hessian(case(4, rank=3)[3], 90))
    share = torch.trace(after @ gram_s @ after.T) / torch.trace(delta @ gram_s @ delta.T)
    assert low.numbers["kept_inputs_change_left"] == pytest.approx(float(share), rel=1e-6)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 3e-7), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shapes", [[(40, 37)], [(37, 37), (5, 37)], [(1200, 600), (700, 600)], [(300, 301)]])
def test_the_filter_that_is_formed_gives_what_solving_gives(shapes, dtype, atol, monkeypatch):
    """Layers as wide as their input or wider take F itself, others solve, or find F made by one before them."""
    monkeypatch.setattr("hpa.methods.hpa_ls.ROWS_SIZE", 1 << 18)  # several steps
    method = create_method("hpa_ls", mu=0.3)
    cols = shapes[0][1]
    _, safety, task, x_s, x_t = case(7, rows=1, cols=cols)
    rng = np.random.default_rng(8)
    for rows, _ in shapes:
        old = torch.from_numpy(rng.normal(size=(rows, cols))).to(dtype)
        new = (old.double() + torch.from_numpy(0.3 * rng.normal(size=(rows, cols)))).to(dtype)
        kept_new = new.clone()
        edit = run(method, LayerChange("up", 1, 4, "up", old, new), safety, task)
        assert torch.equal(new, kept_new)
        assert edit.weight.dtype == dtype
        kept, wanted = [(1.0, oracle.hessian(x_s, len(x_s)))], oracle.hessian(x_t, len(x_t))
        expected = oracle.least_squares(old.double().numpy(), new.double().numpy(), kept, wanted, 0.3, 1e-4)
        np.testing.assert_allclose(edit.weight.double().numpy(), expected, rtol=0, atol=atol)
        if dtype == torch.bfloat16:  # but for a rounding here and there it is the float64 result in bfloat16
            exact = torch.from_numpy(expected).to(dtype)
            assert float((edit.weight != exact).double().mean()) < 0.01


def test_sixteen_bit_weights_lose_nothing_by_float32_where_the_input_has_huge_directions():
    """Inputs of a language model: a few directions hold nearly all of the power, and the sum is badly conditioned."""
    rng = np.random.default_rng(3)
    rows, cols = 260, 200
    scales = np.exp(2.5 * rng.normal(size=cols))
    scales[:2] = 3e3
    x_s, x_t = (scales * rng.normal(size=(n, cols)) for n in (40, 150))
    safety, task = (
        InputStatistics(torch.from_numpy(oracle.hessian(x, len(x))).float().tril(), None, len(x), 1, "up")
        for x in (x_s, x_t)
    )
    grams = [seen.gram.double().numpy() + np.tril(seen.gram.double().numpy(), -1).T for seen in (safety, task)]
    old = torch.from_numpy(rng.normal(size=(rows, cols))).bfloat16()
    new = (old.double() + torch.from_numpy(0.05 * rng.normal(size=(rows, cols)))).bfloat16()
    edit = run(create_method("hpa_ls"), LayerChange("up", 1, 4, "up", old, new), safety, task)
    expected = oracle.least_squares(old.double().numpy(), new.double().numpy(), [(1.0, grams[0])], grams[1], 0.1, 1e-4)
    assert float((edit.weight != torch.from_numpy(expected).bfloat16()).double().mean()) < 0.01


def test_sums_with_random_signs_keep_the_sum_of_squares():
    rows = 3000
    sketch = _Sketch(rows, 2, torch.device("cpu"))
    same = torch.stack([torch.ones(rows), torch.arange(rows) % 2 - 0.5], dim=1)
    for first in range(0, rows, 700):
        sketch.add(first, same[first : first + 700])
    expected = same.double().square().sum(dim=0)
    np.testing.assert_allclose(sketch.rows.square().mean(dim=0), expected, rtol=4 * math.sqrt(2 / 128))


def test_the_numbers_of_many_rows_are_estimates_of_the_exact_ones():
    rows, cols = 3000, 60
    change, safety, task, _, _ = case(5, rows=rows, cols=cols)
    estimated = run(create_method("hpa_ls"), change, safety, task).numbers
    keys = ("update_left", "kept_inputs_change_left", "task_change_lost")
    exact = run(
        create_method("hpa_ls"),
        LayerChange(
            "up",
            1,
            4,
            "up",
            change.before,
            LowRankUpdate(A=torch.eye(cols, dtype=torch.float64), B=change.update - change.before, scale=1.0),
        ),
        safety,
        task,
    ).numbers
    assert estimated["update_left"] == pytest.approx(exact["update_left"], rel=1e-9)  # of all rows
    for key in keys[1:]:
        assert estimated[key] == pytest.approx(exact[key], rel=0.1)
        assert estimated[key] != pytest.approx(exact[key], rel=1e-6)
    again = run(create_method("hpa_ls"), change, safety, task).numbers
    assert again == estimated  # the signs are the same each time


def test_layers_of_one_input_share_one_factorisation(monkeypatch):
    change, safety, task, _, _ = case()
    calls = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: calls.append(1) or original(*a, **k))
    method = create_method("hpa_ls")
    for name in ("q", "k", "v"):
        run(method, LayerChange(name, 1, 4, "q", change.before, change.update), safety, task)
    assert len(calls) == 1
    run(method, LayerChange("o", 1, 4, "o", change.before, change.update), safety, task)
    assert len(calls) == 2


@pytest.mark.parametrize("weighting", ["sum", "mean", "decay"])
def test_the_memory_survives_saving_to_the_last_bit(tmp_path, weighting):
    from safetensors.torch import load_file, save_file

    method = create_method("hpa_ls", memory_weighting=weighting)
    for index in range(2):
        change, safety, task, _, _ = case(index)
        run(method, change, safety, task)
        method.finish_task()
    save_file(method.state_dict(), tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    assert state["memory.up"].shape == (60 * 61 // 2,)
    assert state["memory.up"].dtype == torch.float32
    assert int(state["tasks.up"]) == 2
    other = create_method("hpa_ls", memory_weighting=weighting)
    other.load_state_dict(state)
    change, safety, task, _, _ = case(7)
    for each in (method, other):
        assert each.state_dict().keys() == state.keys()
    one, two = run(method, change, safety, task), run(other, change, safety, task)
    assert torch.equal(one.weight, two.weight)
    assert one.numbers["memory_tasks"] == 2


def test_a_task_enters_the_memory_once():
    method = create_method("hpa_ls")
    change, safety, task, _, x_t = case()
    run(method, change, safety, task)
    assert method.state_dict() == {}  # not before the task is finished
    method.finish_task()
    once = method.state_dict()
    np.testing.assert_allclose(
        once["memory.up"], oracle.hessian(x_t, len(x_t))[np.tril_indices(60)], rtol=1e-6, atol=1e-7
    )
    method.finish_task()
    assert torch.equal(method.state_dict()["memory.up"], once["memory.up"])
    assert int(method.state_dict()["tasks.up"]) == 1


def test_without_memory_nothing_is_carried():
    method = create_method("hpa_ls", memory=0)
    change, safety, task, _, _ = case()
    first = run(method, change, safety, task).weight
    method.finish_task()
    assert method.state_dict() == {}
    assert torch.equal(run(method, change, safety, task).weight, first)
    with pytest.raises(ValueError, match="made with memory=0"):
        method.load_state_dict({"memory.up": torch.ones(3), "tasks.up": torch.tensor(1)})
    with pytest.raises(ValueError, match="unexpected or unpaired: other"):
        create_method("hpa_ls").load_state_dict({"other": torch.ones(3)})
    with pytest.raises(ValueError, match="method 'hpa' carries none"):
        create_method("hpa").load_state_dict({"other": torch.ones(3)})


def test_without_safety_activations_least_squares_keeps_the_tuned_weight():
    change, _, task, _, _ = case()
    edit = run(create_method("hpa_ls"), change, InputStatistics(input_key="up", zero=True), task)
    assert edit.skipped == "no safety activations"
    assert torch.equal(edit.weight, change.update)


def test_a_singular_sum_is_damped_harder_and_then_named():
    change, _, task, _, _ = case(cols=20)
    diagonal = torch.ones(20, dtype=torch.float64)
    diagonal[3] = -0.05
    bad = InputStatistics(torch.diag(diagonal), None, 90, 1, "up")
    with pytest.warns(
        hpa_ext.DampingWarning, match=r"layer up: A \+ B not positive definite with ridge 0.0001; used 0.1"
    ):
        edit = run(create_method("hpa_ls", mu=0), change, bad, task)
    assert edit.numbers["ridge"] == pytest.approx(0.1)
    diagonal[3] = -10.0
    hopeless = InputStatistics(torch.diag(diagonal), None, 90, 1, "up")
    with pytest.raises(
        hpa_ext.FactorizationError, match=r"layer up: A \+ B is not positive definite, even with ridge 1"
    ):
        run(create_method("hpa_ls", mu=0), change, hopeless, task)


def test_least_squares_names_what_is_missing_or_of_another_width():
    change, safety, task, _, _ = case()
    with pytest.raises(ValueError, match="needs safety statistics, got none"):
        run(create_method("hpa_ls"), change, None, task)
    with pytest.raises(ValueError, match="needs the task Gram matrix, got none"):
        run(create_method("hpa_ls"), change, safety, InputStatistics(None, task.inverse_diagonal, 5, 1, "up"))
    with pytest.raises(ValueError, match=r"safety gram: expected \[60, 60\], got \(3, 3\)"):
        run(create_method("hpa_ls"), change, InputStatistics(torch.eye(3), None, 5, 1, "up"), task)
    method = create_method("hpa_ls")
    method.load_state_dict({"memory.up": torch.ones(3), "tasks.up": torch.tensor(1)})
    with pytest.raises(ValueError, match="memory of its input is for another width than 60"):
        run(method, change, safety, task)

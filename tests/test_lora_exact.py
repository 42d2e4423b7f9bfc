"""LoRA updates are scored and edited in their factors, exactly (METHOD 1.6), never through a storage dtype."""

from __future__ import annotations

import method_oracle as oracle
import numpy as np
import pytest
import torch

import hpa_ext
from hpa import AdaptConfig, LowRankUpdate, adapt_layer, create_method
from hpa.columns import measure
from hpa.layers import LayerChange


def lora_layer(seed: int, rows: int = 37, cols: int = 90, rank: int = 5, size: float = 0.02):
    """``(W_o, update, d_s, d_t)``: float64 weight, float32 factors as peft trains them."""
    rng = np.random.default_rng(seed)
    old = torch.from_numpy(rng.normal(size=(rows, cols)))
    update = LowRankUpdate(
        torch.from_numpy(rng.normal(size=(rank, cols)) * np.exp(0.5 * rng.normal(size=cols))).float(),
        torch.from_numpy(size * rng.normal(size=(rows, rank))).float(),
        2.0,
    )
    safety, task = (torch.from_numpy(np.exp(rng.normal(size=cols))) for _ in range(2))
    return old, update, safety, task


def dense64(update: LowRankUpdate) -> torch.Tensor:
    return update.scale * update.B.double() @ update.A.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_identities_of_the_factors(dtype):
    old, update, _, _ = lora_layer(0, rows=2500)  # more rows than are held in float64 at a time
    old, delta = old.to(dtype), dense64(update)
    found = measure(LayerChange("x", 1, 1, "x", old, update))
    expected = hpa_ext.change_statistics(old.double(), old.double() + delta)
    assert {value.dtype for value in found} == {torch.float64}
    # The expectation subtracts two weights of size 1 (2^-52) for changes of 0.05: a few 1e-14 of the change.
    torch.testing.assert_close(found.column_change, delta.square().mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.column_change, expected.column_change, rtol=1e-12, atol=0)
    scale = float(expected.before_norm_sq * expected.change_norm_sq) ** 0.5
    assert abs(float(found.dot - (delta * old.double()).sum())) < 1e-13 * scale
    torch.testing.assert_close(found.before_norm_sq, old.double().square().sum(), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.change_norm_sq, delta.square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("proj", ["fro", "row", "col", "subspace", "off"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("anchor", ["prev", "aligned"])
def test_the_edit_of_the_factors_is_the_edit_of_the_dense_update(proj, side, anchor):
    old, update, safety, task = lora_layer(1)
    update = LowRankUpdate(update.A.double(), update.B.double(), update.scale)
    aligned = torch.from_numpy(np.random.default_rng(9).normal(size=old.shape))
    config = AdaptConfig(proj=proj, subspace_side=side, subspace_rank=4, anchor=anchor, p_max=40)
    edit = adapt_layer(old, update, safety, task, layer=2, layers=3, config=config, aligned=aligned)
    weight, numbers = oracle.edit(
        old.numpy(),
        (old + dense64(update)).numpy(),
        safety.numpy(),
        task.numpy(),
        block=2,
        blocks=3,
        proj=proj,
        rank=4,
        side=side,
        p_max=40,
        anchor=aligned.numpy() if anchor == "aligned" else None,
    )
    np.testing.assert_allclose(edit.weight.numpy(), weight, rtol=0, atol=1e-12)
    for key in ("kept", "overlap", "kept_overlap"):
        assert edit.numbers[key] == numbers[key]
    assert edit.numbers["projection"] == pytest.approx(numbers["projection"], rel=1e-9, abs=1e-15)
    assert edit.update.rank == update.rank
    torch.testing.assert_close(edit.base + dense64(edit.update), edit.weight, rtol=0, atol=1e-13)
    moved = oracle.take_out(dense64(update).numpy(), old.numpy(), proj, 4, side) - dense64(update).numpy()
    share = np.linalg.norm(moved) / np.linalg.norm(dense64(update).numpy())
    assert edit.numbers["projection_share"] == pytest.approx(share, rel=1e-9, abs=1e-12)


def test_no_dense_matrix_is_formed_until_the_weight_is_asked_for(monkeypatch):
    old, update, safety, task = lora_layer(2)
    monkeypatch.setattr(LowRankUpdate, "dense", lambda self: pytest.fail("formed the dense update"))
    edit = adapt_layer(old.float(), update, safety, task, layer=1, layers=3, config=AdaptConfig(proj="off"))
    ls = create_method("hpa_ls")
    gram = torch.diag(1 / safety).tril()
    seen = torch.diag(1 / task).tril()
    from hpa.layers import InputStatistics

    change = LayerChange("x", 1, 3, "x", old.float(), update)
    ls.edit_layer(change, InputStatistics(gram), InputStatistics(seen), task_index=0, seed=0)
    kept = (edit.update.A == 0).all(dim=0)
    assert int(kept.sum()) == edit.numbers["kept"] > 0
    assert torch.equal(edit.update.A[:, ~kept], update.A[:, ~kept])
    assert torch.equal(edit.update.B, update.B)
    assert edit.base.data_ptr() == change.before.data_ptr() or torch.equal(edit.base, change.before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_is_rounded_once_at_the_end(dtype):
    old, update, safety, task = lora_layer(3, size=0.0005)
    narrow = old.to(dtype)
    edit = adapt_layer(narrow, update, safety, task, layer=1, layers=2)
    exact, numbers = oracle.edit(
        narrow.double().numpy(),
        (narrow.double() + dense64(update)).numpy(),
        safety.numpy(),
        task.numpy(),
        block=1,
        blocks=2,
    )
    assert edit.numbers["kept_safety_share"] == pytest.approx(numbers["kept_safety_share"], rel=1e-9)
    assert edit.numbers["projection"] == pytest.approx(numbers["projection"], rel=1e-9)
    assert edit.weight.dtype == dtype
    rounded = torch.from_numpy(exact).to(dtype)
    # float32 arithmetic (2^-24) can tip a value over a rounding boundary of the narrow type, once in thousands.
    assert float((edit.weight != rounded).double().mean()) < 1e-3


def test_merging_first_scores_the_rounding_and_is_what_the_switch_does():
    old, update, safety, task = lora_layer(4, size=0.0002)
    narrow = old.bfloat16()
    merged = (narrow.float() + update.dense()).bfloat16()
    exact = adapt_layer(narrow, update, safety, task, layer=1, layers=2)
    naive = adapt_layer(narrow, update, safety, task, layer=1, layers=2, config=AdaptConfig(lora_native=False))
    by_hand = adapt_layer(narrow, merged, safety, task, layer=1, layers=2)
    assert torch.equal(naive.weight, by_hand.weight)
    assert naive.numbers == by_hand.numbers
    assert naive.update is None
    true_norm = float(dense64(update).norm())
    assert exact.numbers["change_norm"] == pytest.approx(true_norm, rel=1e-9)
    realised = merged.double() - narrow.double()
    # bfloat16 holds 8 bits: of an update a thousandth of the weight, most is lost and what is left is rounding.
    assert float((realised - dense64(update)).norm()) > 0.5 * true_norm
    assert naive.numbers["change_norm"] == pytest.approx(float(realised.norm()), rel=1e-6)


def test_kept_columns_of_a_float32_base_are_bit_for_bit_the_old_ones():
    old, update, safety, task = lora_layer(5)
    old = old.float()
    edit = adapt_layer(old, update, safety, task, layer=1, layers=2)
    assert edit.numbers["projection"] != 0
    assert int((edit.weight == old).all(dim=0).sum()) == edit.numbers["kept"] == 9


def test_autocast_around_the_caller_changes_nothing():
    old, update, safety, task = lora_layer(8)
    plain = adapt_layer(old.float(), update, safety, task, layer=1, layers=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapt_layer(old.float(), update, safety, task, layer=1, layers=2)
        assert torch.equal(inside.weight, plain.weight)
    assert inside.numbers == plain.numbers


def test_the_adapters_own_parameters_may_be_passed():
    old, update, safety, task = lora_layer(9)
    factors = LowRankUpdate(torch.nn.Parameter(update.A), torch.nn.Parameter(update.B), update.scale)
    edit = adapt_layer(torch.nn.Parameter(old), factors, safety, task, layer=1, layers=2)
    assert not edit.weight.requires_grad
    assert not edit.update.A.requires_grad
    assert torch.equal(factors.A, update.A)
    assert int((edit.update.A == 0).all(dim=0).sum()) == edit.numbers["kept"] == 9


def test_an_update_of_rank_zero_is_no_change():
    old, _, safety, task = lora_layer(6)
    edit = adapt_layer(old, LowRankUpdate.zero(old), safety, task, layer=1, layers=2)
    assert edit.skipped == "no change"
    assert torch.equal(edit.weight, old)


def test_factors_that_are_not_finite_name_the_layer():
    old, update, safety, task = lora_layer(7)
    update.A[1, 4] = torch.nan
    with pytest.raises(ValueError, match="layer q: the change of column 4 is not finite"):
        adapt_layer(old, update, safety, task, layer=1, layers=2, name="q")
    update.A[1, 4] = 0.0
    old[2, 3] = torch.inf
    with pytest.raises(ValueError, match="layer q: the weight before the task is not finite"):
        adapt_layer(old, update, safety, task, layer=1, layers=2, name="q")

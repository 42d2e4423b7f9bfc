"""The decisions D1 to D18 as options: defaults, ranges, and the counts that follow from them."""

from __future__ import annotations

import method_oracle as oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpa.config import AdaptConfig, CalibrationConfig, ColumnConfig, validated


def test_defaults_are_those_of_the_decision_index():
    config = AdaptConfig()
    assert (config.diag_mode, config.normalize, config.damping) == ("exact", "tokens", 0.01)  # D3, D4, D5
    assert (config.alpha_mode, config.alpha_sign, config.alpha0, config.alpha1) == ("affine", 1, 0.4, 0.8)  # D6
    assert (config.layer_base, config.overflow) == (1, "cap")  # D7, D9
    assert (config.hessian_source.safety, config.hessian_source.task) == ("before", "after")  # D10
    assert (config.token_filter, config.include_projector, config.anchor) == ("all", False, "prev")  # D10, D11, D12
    assert (config.proj, config.lora_native, config.mode, config.phi_norm) == (
        "fro",
        True,
        "full",
        "none",
    )  # D13-15, D18
    assert (config.p_max, config.p_min, config.focus_ratio) == (15.0, 5.0, 2.0)
    assert (config.safety_samples, config.task_samples) == (8, 128)


def test_the_share_of_columns_falls_from_14_69_to_5_percent_over_32_blocks():
    config = AdaptConfig()
    assert config.share(1, 32) == pytest.approx(14.6875)
    assert config.share(32, 32) == 5.0
    zero_based = AdaptConfig(layer_base=0)
    assert zero_based.share(1, 32) == 15.0
    assert zero_based.share(32, 32) == pytest.approx(5.3125)
    assert config.share(0, 32) == zero_based.share(0, 32) == 15.0  # the projector


@given(
    cols=st.integers(0, 5000),
    block=st.integers(1, 40),
    more=st.integers(0, 40),
    p_max=st.floats(0, 100),
    p_min=st.floats(0, 100),
    layer_base=st.sampled_from([0, 1]),
    ratio=st.floats(1, 5),
)
def test_counts_are_rounded_half_up_and_stay_in_order(cols, block, more, p_max, p_min, layer_base, ratio):
    config = AdaptConfig(p_max=p_max, p_min=p_min, layer_base=layer_base, focus_ratio=ratio)
    blocks = block + more
    keep, focus = config.keep_count(cols, block, blocks), config.focus_count(cols, block, blocks)
    assert 0 <= keep <= focus <= cols
    p = oracle.share(block, blocks, p_max, p_min, layer_base)
    assert (keep, focus) == oracle.counts(cols, p, ratio)


def test_half_a_column_is_rounded_up():
    fixed = AdaptConfig(p_max=12.5, p_min=12.5)
    assert [fixed.keep_count(cols, 1, 4) for cols in (3, 4, 11, 12)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("experiment", "mode", "proj"),
    [(1, "none", "off"), (2, "eps", "off"), (3, "phi", "off"), (4, "full", "off"), (5, "full", "fro")],
)
def test_the_rows_of_the_ablation_table(experiment, mode, proj):
    config = AdaptConfig.ablation(experiment, p_max=20)
    assert (config.mode, config.proj, config.p_max) == (mode, proj, 20)


def test_one_word_sets_the_source_of_both_hessians_and_damp_is_damping():
    both = AdaptConfig(hessian_source="before").hessian_source
    assert (both.safety, both.task) == ("before", "before")
    mixed = AdaptConfig(hessian_source={"safety": "after"}).hessian_source
    assert (mixed.safety, mixed.task) == ("after", "after")
    assert AdaptConfig(damp=0.1).damping == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "all"}, "mode: .*'full', 'eps', 'phi' or 'none', got 'all'"),
        ({"p_max": 101}, "p_max: .*less than or equal to 100, got 101"),
        ({"damping": 0}, "damping: .*greater than 0, got 0"),
        ({"alpha0": 0.9}, r"alpha0: expected alpha0 <= alpha1, got 0.9 > 0.8"),
        ({"focus_ratio": 0.5}, "focus_ratio: .*greater than or equal to 1"),
        ({"hessian_source": "middle"}, "hessian_source.safety: .*'before' or 'after'"),
        ({"keep": 3}, "keep: no such option; method 'hpa' has: .*p_max"),
        ({"p_max": "many"}, "p_max: .*number.*got 'many'"),
    ],
)
def test_bad_options_are_named_with_what_came(options, message):
    with pytest.raises(ValueError, match=message):
        validated(AdaptConfig, options, "method 'hpa'")


def test_the_parts_of_the_config_stand_alone():
    assert set(CalibrationConfig.model_fields) | set(ColumnConfig.model_fields) < set(AdaptConfig.model_fields)
    assert not set(CalibrationConfig.model_fields) & set(ColumnConfig.model_fields)
    assert all(field.description for field in AdaptConfig.model_fields.values())
    with pytest.raises(ValueError, match="block: expected 0 <= block <= blocks"):
        ColumnConfig().share(5, 4)

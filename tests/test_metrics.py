"""Metrics against matrices worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpa.evaluation import metrics

NAN = math.nan

# Rows: after learning task 1, 2, 3.  By hand:
#   AP_1 = 80, AP_2 = (60 + 90)/2 = 75, AP_3 = (70 + 50 + 30)/3 = 50
#   MAP = (80 + 75 + 50)/3 = 68 1/3, MFT = (80 + 90 + 30)/3 = 66 2/3
#   BWT: (70 - 80) + (50 - 90) = -50: /2 = -25 (GEM), /3 = -16 2/3
#   forgetting: max(80, 60) - 70 = 10 and 90 - 50 = 40, mean 25
MATRIX = [[80.0, NAN, NAN], [60.0, 90.0, NAN], [70.0, 50.0, 30.0]]


def test_average_performance_is_the_mean_of_the_last_row() -> None:
    assert metrics.average_performance(MATRIX) == pytest.approx(50.0, abs=1e-12)
    assert [metrics.average_performance(MATRIX, k) for k in range(3)] == pytest.approx([80.0, 75.0, 50.0], abs=1e-12)


def test_mean_average_performance_is_the_mean_over_all_rows() -> None:
    assert metrics.mean_average_performance(MATRIX) == pytest.approx(205.0 / 3.0, abs=1e-12)


def test_mean_fine_tune_is_the_mean_of_the_diagonal() -> None:
    assert metrics.mean_fine_tune(MATRIX) == pytest.approx(200.0 / 3.0, abs=1e-12)


def test_backward_transfer_divides_by_tasks_less_one_or_by_tasks() -> None:
    assert metrics.backward_transfer(MATRIX) == pytest.approx(-25.0, abs=1e-12)
    assert metrics.backward_transfer(MATRIX, "T") == pytest.approx(-50.0 / 3.0, abs=1e-12)


def test_backward_transfer_over_all_tasks_is_average_performance_less_mean_fine_tune() -> None:
    # The identity BWT = MFN - MFT that CoIN and MCITlib use holds for the denominator T alone.
    matrix = np.tril(np.random.default_rng(0).uniform(0, 100, (6, 6)))
    difference = metrics.average_performance(matrix) - metrics.mean_fine_tune(matrix)
    assert metrics.backward_transfer(matrix, "T") == pytest.approx(difference, abs=1e-11)
    assert metrics.backward_transfer(matrix, "T-1") == pytest.approx(1.2 * difference, abs=1e-11)


def test_forgetting_counts_from_the_best_the_model_ever_was() -> None:
    assert metrics.forgetting(MATRIX) == pytest.approx(25.0, abs=1e-12)
    # Task 1 is at its best after task 2 (90), not when it was learned (80): forgetting 20, while BWT says -10.
    later = [[80.0, NAN, NAN], [90.0, 50.0, NAN], [70.0, 50.0, 30.0]]
    assert metrics.forgetting(later) == pytest.approx((20.0 + 0.0) / 2.0, abs=1e-12)
    assert metrics.backward_transfer(later) == pytest.approx((-10.0 + 0.0) / 2.0, abs=1e-12)


def test_a_single_task_has_nothing_to_forget() -> None:
    assert metrics.average_performance([[70.0]]) == 70.0
    assert math.isnan(metrics.backward_transfer([[70.0]]))
    assert math.isnan(metrics.backward_transfer([[70.0]], "T"))
    assert math.isnan(metrics.forgetting([[70.0]]))


def test_intransigence_compares_what_was_learned_with_a_reference() -> None:
    reference = [[90.0, NAN, NAN], [0.0, 85.0, NAN], [0.0, 0.0, 40.0]]
    # (80 - 90) + (90 - 85) + (30 - 40) = -15, over 3.
    assert metrics.intransigence(MATRIX, reference) == pytest.approx(-5.0, abs=1e-12)


def test_entries_above_the_diagonal_are_never_read() -> None:
    filled = np.array(MATRIX)
    filled[np.triu_indices(3, 1)] = 1e6
    for name in (
        "average_performance",
        "mean_average_performance",
        "mean_fine_tune",
        "backward_transfer",
        "forgetting",
    ):
        function = getattr(metrics, name)
        assert function(filled) == function(MATRIX), name


def test_a_matrix_with_a_hole_is_refused_by_place() -> None:
    with pytest.raises(ValueError, match=r"no value at \[2, 1\]"):
        metrics.average_performance([[80.0, NAN, NAN], [60.0, 90.0, NAN], [70.0, NAN, 30.0]])
    with pytest.raises(ValueError, match=r"square matrix .* got shape \(2, 3\)"):
        metrics.backward_transfer(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="expected 'T-1' or 'T', got 'T-2'"):
        metrics.backward_transfer(MATRIX, "T-2")  # type: ignore[arg-type]


def test_the_matrix_comes_from_evaluation_rows_in_the_order_of_learning() -> None:
    rows = [{"b": 80.0}, {"a": 90.0, "b": 60.0}]
    matrix = metrics.accuracy_matrix(rows, ["b", "a", "c"])
    np.testing.assert_array_equal(matrix, [[80.0, NAN], [60.0, 90.0]])
    with pytest.raises(ValueError, match=r"rows\[1\]: no accuracy for task 'c'"):
        metrics.accuracy_matrix(rows, ["b", "c"])


def test_attack_success_is_a_plain_mean_over_sets_whatever_their_size() -> None:
    sets = {"small": {"asr": 50.0, "successes": 1, "n": 2}, "large": {"asr": 10.0, "successes": 100, "n": 1000}}
    assert metrics.mean_attack_success_rate(sets) == pytest.approx(30.0, abs=1e-12)
    assert metrics.mean_attack_success_rate({"one": 4.0, "two": 5.0, "three": 6.0}) == pytest.approx(5.0, abs=1e-12)
    assert metrics.delta_attack_success_rate(42.56, 2.86) == pytest.approx(39.70, abs=1e-9)  # the paper's SeqFT row
    assert math.isnan(metrics.mean_attack_success_rate({}))
    with pytest.raises(ValueError, match=r"safety\['small'\]: expected the key 'asr'"):
        metrics.mean_attack_success_rate({"small": {"refused": 1}})


def test_over_refusal_is_the_mean_refusal_rate_of_the_benign_sets() -> None:
    assert metrics.over_refusal({"a": {"refusal_rate": 10.0}, "b": {"refusal_rate": 0.0}}) == pytest.approx(
        5.0, abs=1e-12
    )


def test_wilson_intervals_agree_with_published_values() -> None:
    # 81 of 263 (Newcombe 1998, table I, method 3): 0.2553 to 0.3662; 0 of 20: 0 to 0.1611; 1 of 29: 0.0061 to 0.1718.
    for successes, total, low, high in ((81, 263, 25.53, 36.62), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)):
        interval = metrics.wilson_interval(successes, total)
        assert interval.rate == pytest.approx(100.0 * successes / total, abs=1e-12)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.005)


def test_wilson_intervals_stay_inside_and_are_symmetric() -> None:
    for total in (1, 7, 442):
        for successes in range(0, total + 1, max(1, total // 7)):
            one, other = metrics.wilson_interval(successes, total), metrics.wilson_interval(total - successes, total)
            assert 0.0 <= one.low <= one.rate <= one.high <= 100.0
            assert one.low == pytest.approx(100.0 - other.high, abs=1e-9)
    assert metrics.wilson_interval(0, 442).low == 0.0
    assert metrics.wilson_interval(442, 442).high == 100.0
    nothing = metrics.wilson_interval(0, 0)
    assert math.isnan(nothing.rate)
    assert (nothing.low, nothing.high) == (0.0, 100.0)
    with pytest.raises(ValueError, match="got 3 of 2"):
        metrics.wilson_interval(3, 2)
    with pytest.raises(ValueError, match="confidence"):
        metrics.wilson_interval(1, 2, confidence=95)


def test_pooled_interval_counts_all_sets_together() -> None:
    pooled = metrics.pooled_interval({"a": (1, 2), "b": (100, 998)})
    assert pooled == metrics.wilson_interval(101, 1000)


def test_spread_is_the_sample_deviation_over_seeds() -> None:
    # 1, 2, 6: mean 3, squared distances 4 + 1 + 9 = 14, over n - 1 = 2: 7.
    assert metrics.mean_spread([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7.0)), abs=1e-12)
    mean, deviation = metrics.mean_spread([5.0])
    assert mean == 5.0
    assert math.isnan(deviation)
    assert all(math.isnan(value) for value in metrics.mean_spread([]))


def test_a_rate_of_nothing_is_not_a_number() -> None:
    assert metrics.rate(3, 12) == 25.0
    assert math.isnan(metrics.rate(0, 0))

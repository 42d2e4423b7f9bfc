"""The paper's choice of columns: partition, balance, ties, and the edges of each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import uniform
from torch import Tensor

import hpa_ext


def scores(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def chosen(result: hpa_ext.BalancedMask) -> list[int]:
    return result.mask.nonzero().flatten().tolist()


def same(left: hpa_ext.BalancedMask, right: hpa_ext.BalancedMask) -> bool:
    return torch.equal(left.mask, right.mask) and left[1:] == right[1:]


CHOICES = {
    "mode": ("full", "eps", "phi"),
    "alpha_mode": ("affine", "relu", "abs", "const"),
    "alpha_sign": (1, -1),
    "overflow": ("cap", "keep"),
    "phi_norm": ("none", "mean"),
}
OPTIONS = {name: st.sampled_from(choices) for name, choices in CHOICES.items()}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """Scores with many ties and zeros, or spread over many magnitudes."""
    value = draw(st.sampled_from((st.integers(0, 3), st.floats(0, 1e6), st.floats(0, 1e-30))))
    cols = draw(st.integers(0, 40))
    dtype = draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)))
    pair = [
        torch.tensor(draw(st.lists(value, min_size=cols, max_size=cols)), dtype=torch.float64).clamp(max=6e4).to(dtype)
        for _ in range(2)
    ]
    focus = draw(st.integers(0, cols))
    return pair[0], pair[1], draw(st.integers(0, focus)), focus


@given(
    case=cases(), options=st.fixed_dictionaries(OPTIONS), alpha=st.sampled_from(((0.4, 0.8), (1.0, 0.0), (0.0, 2.0)))
)
def test_the_same_columns_and_numbers_as_the_reference(
    case: tuple[Tensor, Tensor, int, int], options: dict[str, object], alpha: tuple[float, float]
) -> None:
    reference = hpa_ext.balanced_mask(*case, alpha, **options, backend="reference")
    assert same(hpa_ext.balanced_mask(*case, alpha, **options, backend="cpu"), reference)


@given(case=cases(), options=st.fixed_dictionaries(OPTIONS))
def test_counts_add_up(case: tuple[Tensor, Tensor, int, int], options: dict[str, object]) -> None:
    safety, _, keep, focus = case
    result = hpa_ext.balanced_mask(*case, **options)
    assert result.mask.dtype == torch.bool
    assert result.mask.shape == safety.shape
    assert result.kept == int(result.mask.sum()) == result.kept_safety_only + result.kept_overlap
    assert result.overlap <= focus
    if options["mode"] == "phi":
        assert result.kept == min(keep, result.overlap)
    elif options["mode"] == "eps" or options["overflow"] == "cap":
        assert result.kept == keep
    else:
        assert result.kept == max(keep, focus - result.overlap)


@pytest.mark.parametrize("cols", [1, 15, 16, 17, 3001])
def test_m_of_scores_of_any_magnitude(cols: int) -> None:
    """The log of a product of doubles from the smallest subnormal number on: no overflow, no order, no lost digit."""
    generator = np.random.default_rng(cols)
    safety, task = np.maximum(10.0 ** generator.uniform(-330, 308, (2, cols)), 5e-324)
    safety[:: max(1, cols // 7)] = 5e-324
    pair = torch.from_numpy(safety), torch.from_numpy(task)
    result = hpa_ext.balanced_mask(*pair, 0, 0, backend="cpu")
    assert same(hpa_ext.balanced_mask(*pair, 0, 0, backend="reference"), result)
    logs = [math.log(e) - math.log(z) for e, z in zip(safety, task, strict=True)]
    assert result.log_ratio == pytest.approx(math.fsum(logs) / cols, rel=1e-13, abs=1e-13)

    order = torch.from_numpy(generator.permutation(cols))
    assert hpa_ext.balanced_mask(*(score[order] for score in pair), 0, 0).log_ratio == result.log_ratio
    assert hpa_ext.balanced_mask(*reversed(pair), 0, 0).log_ratio == -result.log_ratio


@given(case=cases())
def test_kept_columns_are_never_worse_than_left_ones_of_their_kind(case: tuple[Tensor, Tensor, int, int]) -> None:
    safety, task, _, focus = case
    result = hpa_ext.balanced_mask(*case)
    eps, zeta = safety.double().numpy(), task.double().numpy()

    def focused(score: np.ndarray) -> set[int]:
        return set(sorted(range(len(score)), key=lambda j: (-score[j], j))[:focus])

    overlap, only = focused(eps) & focused(zeta), focused(eps) - focused(zeta)
    phi = eps - result.alpha * zeta
    kept = set(chosen(result))
    assert kept <= overlap | only
    for kind, score in ((only, eps), (overlap, phi)):
        inside, outside = kept & kind, kind - kept
        if inside and outside:
            assert min((score[j], -j) for j in inside) > max((score[j], -j) for j in outside)
    if kept & overlap:
        assert only <= kept  # columns of the overlap only after all that are safety-focused alone


class TestOfEachBackend:
    """Cases worked by hand."""

    def test_full_selection(self, backend: str) -> None:
        # S = {0, 1, 2, 3}, T = {2, 3, 4, 5}, O = {2, 3}, N = {0, 1}.
        safety, task = scores(9, 8, 7, 6, 1, 1), scores(1, 1, 8, 2, 9, 7)
        result = hpa_ext.balanced_mask(safety, task, 3, 4, alpha_mode="const", backend=backend)
        # phi of 2: 7 - 0.4 * 8 = 3.8; of 3: 6 - 0.4 * 2 = 5.2.
        assert chosen(result) == [0, 1, 3]
        assert (result.overlap, result.kept, result.kept_safety_only, result.kept_overlap) == (2, 3, 2, 1)
        assert result.alpha == 0.4

    def test_alpha_follows_the_mean_log_ratio(self, backend: str) -> None:
        safety, task = scores(2, 2, 2), scores(1, 1, 0)
        m = math.log(2)
        for options, expected in (
            ({}, 0.4 + 0.4 * (1 + math.tanh(m)) / 2),
            ({"alpha_sign": -1}, 0.4 + 0.4 * (1 - math.tanh(m)) / 2),
            ({"alpha_mode": "relu"}, 0.4 + 0.4 * math.tanh(m)),
            ({"alpha_mode": "relu", "alpha_sign": -1}, 0.4),
            ({"alpha_mode": "abs", "alpha_sign": -1}, 0.4 + 0.4 * math.tanh(m)),
            ({"alpha_mode": "const"}, 0.4),
        ):
            result = hpa_ext.balanced_mask(safety, task, 1, 2, **options, backend=backend)
            assert result.log_ratio == pytest.approx(m, rel=1e-15)
            assert result.alpha == pytest.approx(expected, rel=1e-15)

    def test_no_column_with_both_scores_has_log_ratio_zero(self, backend: str) -> None:
        result = hpa_ext.balanced_mask(scores(1, 0, 3), scores(0, 2, 0), 1, 2, backend=backend)
        assert result.log_ratio == 0.0
        assert result.alpha == pytest.approx(0.6)

    def test_empty_overlap_is_the_naive_selection(self, backend: str) -> None:
        safety, task = scores(5, 4, 3, 0, 0, 0), scores(0, 0, 0, 1, 2, 3)
        result = hpa_ext.balanced_mask(safety, task, 2, 3, backend=backend)
        assert chosen(result) == [0, 1]
        assert (result.overlap, result.kept_safety_only) == (0, 2)

    def test_overflow_caps_at_the_budget_or_keeps_all_that_is_safety_focused_alone(self, backend: str) -> None:
        safety, task = scores(5, 6, 7, 1, 1, 1), scores(0, 0, 0, 1, 2, 3)
        assert chosen(hpa_ext.balanced_mask(safety, task, 1, 3, overflow="cap", backend=backend)) == [2]
        assert chosen(hpa_ext.balanced_mask(safety, task, 1, 3, overflow="keep", backend=backend)) == [0, 1, 2]
        assert chosen(hpa_ext.balanced_mask(safety, task, 0, 3, overflow="keep", backend=backend)) == [0, 1, 2]

    def test_overflow_keep_still_fills_up_from_the_overlap(self, backend: str) -> None:
        safety, task = scores(9, 8, 7, 0), scores(0, 8, 7, 9)
        result = hpa_ext.balanced_mask(safety, task, 2, 3, overflow="keep", alpha_mode="const", backend=backend)
        assert chosen(result) == [0, 1]

    def test_ties_go_to_the_lower_index(self, backend: str) -> None:
        ones = torch.ones(7, dtype=torch.float64)
        assert chosen(hpa_ext.balanced_mask(ones, ones, 2, 4, backend=backend)) == [0, 1]
        assert chosen(hpa_ext.balanced_mask(ones, ones, 2, 4, mode="eps", backend=backend)) == [0, 1]
        falling = scores(1, 2, 3, 4, 5, 6, 7)
        # S is decided by ties, T by value: O = {3}.
        assert chosen(hpa_ext.balanced_mask(ones, falling, 4, 4, mode="phi", backend=backend)) == [3]

    def test_equal_phi_goes_to_the_lower_index(self, backend: str) -> None:
        # phi = 1 for columns 0 and 2 from different scores, and more for column 1.
        result = hpa_ext.balanced_mask(scores(2, 9, 3), scores(1, 2, 2), 2, 3, (1.0, 1.0), mode="phi", backend=backend)
        assert chosen(result) == [0, 1]

    def test_all_zero_scores_keep_the_first_columns(self, backend: str) -> None:
        zeros = torch.zeros(5)
        result = hpa_ext.balanced_mask(zeros, zeros, 2, 3, phi_norm="mean", backend=backend)
        assert chosen(result) == [0, 1]
        assert (result.log_ratio, result.overlap) == (0.0, 3)

    def test_nothing_to_keep_and_everything_to_keep(self, backend: str) -> None:
        safety, task = scores(1, 2, 3), scores(3, 2, 1)
        for mode in ("full", "eps", "phi"):
            assert chosen(hpa_ext.balanced_mask(safety, task, 0, 0, mode=mode, backend=backend)) == []
            assert chosen(hpa_ext.balanced_mask(safety, task, 0, 3, mode=mode, backend=backend)) == []
            assert chosen(hpa_ext.balanced_mask(safety, task, 3, 3, mode=mode, backend=backend)) == [0, 1, 2]

    def test_no_columns_at_all(self, backend: str) -> None:
        result = hpa_ext.balanced_mask(torch.zeros(0), torch.zeros(0), 0, 0, phi_norm="mean", backend=backend)
        assert result.mask.shape == (0,)
        assert (result.kept, result.overlap, result.log_ratio) == (0, 0, 0.0)

    def test_ablation_modes(self, backend: str) -> None:
        safety, task = scores(9, 8, 7, 6, 1, 1), scores(1, 1, 8, 2, 9, 7)
        naive = hpa_ext.balanced_mask(safety, task, 3, 4, mode="eps", backend=backend)
        assert chosen(naive) == [0, 1, 2]
        assert (naive.kept_safety_only, naive.kept_overlap) == (2, 1)
        overlap = hpa_ext.balanced_mask(safety, task, 3, 4, mode="phi", backend=backend)
        assert chosen(overlap) == [2, 3]
        assert (overlap.kept_safety_only, overlap.kept_overlap) == (0, 2)

    def test_normalised_phi_divides_both_scores_by_their_means(self, backend: str) -> None:
        # Task scores a thousand times the safety scores: raw phi ranks by the least task score.
        safety, task = scores(4, 3, 2, 1), 1000 * scores(4, 3, 2, 1)
        raw = hpa_ext.balanced_mask(safety, task, 1, 4, alpha_mode="const", backend=backend)
        mean = hpa_ext.balanced_mask(safety, task, 1, 4, alpha_mode="const", phi_norm="mean", backend=backend)
        assert (chosen(raw), chosen(mean)) == ([3], [0])

    def test_selection_does_not_change_when_both_scores_are_scaled(self, backend: str) -> None:
        safety, task = (uniform(300, seed=seed, dtype=torch.float64) for seed in (0, 1))
        one = hpa_ext.balanced_mask(safety, task, 30, 60, backend=backend)
        other = hpa_ext.balanced_mask(safety * 2.0**-40, task * 2.0**-40, 30, 60, backend=backend)
        assert torch.equal(one.mask, other.mask)
        assert one.alpha == pytest.approx(other.alpha, rel=1e-12)

    def test_a_score_that_is_no_number_is_an_error(self, backend: str) -> None:
        good = torch.ones(5)
        for value in (math.nan, math.inf, -math.inf, -1e-30):
            bad = torch.ones(5)
            bad[3] = value
            with pytest.raises(ValueError, match=r"^safety: expected finite, non-negative scores, got .* at index 3"):
                hpa_ext.balanced_mask(bad, good, 1, 2, backend=backend)
            with pytest.raises(ValueError, match=r"^task: expected finite, non-negative scores, got .* at index 3"):
                hpa_ext.balanced_mask(good, bad, 1, 2, backend=backend)


def test_strided_scores_are_read_as_they_are() -> None:
    wide = torch.rand(2, 50, generator=torch.Generator().manual_seed(1))
    safety, task = wide.T[:, 0], wide[:, ::2].reshape(50)
    one = hpa_ext.balanced_mask(safety, wide.T.contiguous()[:, 1], 5, 10)
    assert same(one, hpa_ext.balanced_mask(wide[0], wide[1], 5, 10))
    assert hpa_ext.balanced_mask(safety, task, 5, 10).kept == 5


KINDS = {
    "uniform": lambda generator, cols: generator.random(cols),
    "few values": lambda generator, cols: generator.integers(0, 4, cols).astype(float),
    "two values": lambda generator, cols: generator.integers(0, 2, cols) * 0.7,
    "one value": lambda generator, cols: np.full(cols, 0.3),
    "mostly zero": lambda generator, cols: np.where(generator.random(cols) < 0.9, -0.0, generator.random(cols)),
    "beside one": lambda generator, cols: 1.0 + generator.integers(-2, 3, cols) * 2.0**-53,
    "all magnitudes": lambda generator, cols: 10.0 ** generator.uniform(-320, 280, cols),
    "subnormal": lambda generator, cols: generator.random(cols) * 1e-309,
    "sorted": lambda generator, cols: np.sort(generator.random(cols)),
    # Every number of a sample at equal distances is the largest there is.
    "combed": lambda generator, cols: np.where(np.arange(cols) % (cols // 32) == 0, 1e9, generator.random(cols)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_selects_as_the_reference_does(kind: str, isa: str) -> None:
    """Sizes at which the selection samples, with a part of a vector left over, also for the first and last rank."""
    generator = np.random.default_rng([len(kind), *isa.encode()])
    for cols in (33, 64, 999, 1024, 1027, 2500):
        safety, other = (torch.from_numpy(KINDS[kind](generator, cols)) for _ in range(2))
        task = other if generator.random() < 0.5 else torch.from_numpy(generator.random(cols))
        for focus in (1, cols, int(generator.integers(2, cols))):
            for keep in {1, focus, int(generator.integers(0, focus + 1))}:
                options = {name: generator.choice(choices) for name, choices in CHOICES.items()}
                options = {name: value.item() for name, value in options.items()}
                result = hpa_ext.balanced_mask(safety, task, keep, focus, **options)
                expected = hpa_ext.balanced_mask(safety, task, keep, focus, **options, backend="reference")
                assert same(result, expected), (cols, keep, focus, options)


def test_many_columns_keep_the_exact_number() -> None:
    generator = torch.Generator().manual_seed(2)
    safety, task = (torch.rand(11_008, generator=generator) for _ in range(2))
    result = hpa_ext.balanced_mask(safety, task, 1651, 3302)
    assert result.kept == 1651
    assert same(result, hpa_ext.balanced_mask(safety, task, 1651, 3302, backend="reference"))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (torch.ones(3), torch.ones(4), 1, 2),
            {},
            ValueError,
            r"^task: expected the shape of safety \(3,\), got \(4,\)",
        ),
        ((torch.ones(3, 1), torch.ones(3, 1), 1, 2), {}, ValueError, r"^safety: expected 1 dimension \[cols\]"),
        ((torch.ones(3), torch.ones(3), 3, 2), {}, ValueError, "^focus: expected keep <= focus <= cols, got keep 3"),
        ((torch.ones(3), torch.ones(3), 1, 4), {}, ValueError, "^focus: expected keep <= focus <= cols"),
        ((torch.ones(3), torch.ones(3), -1, 2), {}, ValueError, "^keep: expected a whole number >= 0, got -1"),
        ((torch.ones(3), torch.ones(3), 1.5, 2), {}, TypeError, "^keep: expected a whole number, got 1.5"),
        ((torch.ones(3), torch.ones(3), 1, True), {}, TypeError, "^focus: expected a whole number, got True"),
        ((torch.ones(3), torch.ones(3), 1, 2, (0.4,)), {}, ValueError, "^alpha: expected two numbers"),
        ((torch.ones(3), torch.ones(3), 1, 2, (0.4, math.nan)), {}, ValueError, r"^alpha\[1\]: expected a finite"),
        ((torch.ones(3), torch.ones(3), 1, 2), {"mode": "none"}, ValueError, "^mode: expected one of 'full', 'eps'"),
        ((torch.ones(3), torch.ones(3), 1, 2), {"alpha_mode": "x"}, ValueError, "^alpha_mode: expected one of"),
        ((torch.ones(3), torch.ones(3), 1, 2), {"alpha_sign": 0}, ValueError, "^alpha_sign: expected 1 or -1, got 0"),
        ((torch.ones(3), torch.ones(3), 1, 2), {"overflow": "x"}, ValueError, "^overflow: expected one of"),
        ((torch.ones(3), torch.ones(3), 1, 2), {"phi_norm": "x"}, ValueError, "^phi_norm: expected one of"),
        ((torch.ones(3).int(), torch.ones(3), 1, 2), {}, TypeError, "^safety: expected dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    arguments: tuple[object, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hpa_ext.balanced_mask(*arguments, **options)

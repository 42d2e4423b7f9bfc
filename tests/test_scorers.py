"""Scorers: what counts as right, and what must not."""

from __future__ import annotations

from typing import Any

import pytest

from hpa.data.scenario import Sample
from hpa.evaluation.scorers import contains_word, exact, get_scorer, letter_choice, option_letter


def sample(answer: str = "", **metadata: Any) -> Sample:
    return Sample("s", "what is it", answer, metadata=metadata)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("sure , it is a cat .", 1.0),
        ("Cat", 1.0),
        ("CAT!", 1.0),
        ("it is a caterpillar .", 0.0),  # a word, not a substring
        ("", 0.0),
        ("   ", 0.0),
        ("it is a dog .", 0.0),
    ],
)
def test_contains_word_looks_for_the_label_as_a_whole_word(answer: str, score: float) -> None:
    assert contains_word(answer, sample(label="cat")) == score


def test_naming_a_wrong_choice_beside_the_right_one_is_wrong() -> None:
    asked = sample(label="cat", choices=("cat", "dog"))
    assert contains_word("it is a cat", asked) == 1.0
    assert contains_word("it is a cat or a dog", asked) == 0.0


def test_labels_of_several_words_must_stand_together() -> None:
    asked = sample(label="police car", choices=("car", "police car", "bus"))
    assert contains_word("it is a police car .", asked) == 1.0  # "car" is named only as a part of the label
    assert contains_word("the police has a car", asked) == 0.0
    assert contains_word("it is a car .", asked) == 0.0


def test_contains_word_falls_back_to_the_reference_and_needs_something_to_look_for() -> None:
    assert contains_word("it is seven", sample("Seven")) == 1.0
    with pytest.raises(ValueError, match="sample 's': contains_word needs"):
        contains_word("anything", sample())


def test_exact_ignores_case_spaces_and_dots_only() -> None:
    assert exact(" Yes. ", sample("yes")) == 1.0
    assert exact("u.s.a", sample("USA")) == 1.0
    assert exact("yes, it is", sample("yes")) == 0.0
    assert exact("", sample("yes")) == 0.0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" B \n", "B"),
        ("C. the third", "C"),
        ("the answer is (d)", "D"),
        ("a cat", "A"),  # the first letter that stands alone, as published
        ("no idea", None),
        ("", None),
    ],
)
def test_the_option_letter_follows_the_published_rule(answer: str, letter: str | None) -> None:
    assert option_letter(answer) == letter


def test_letter_choice_compares_with_the_label() -> None:
    assert letter_choice("C. the third", sample(label="C")) == 1.0
    assert letter_choice("C. the third", sample(label="B")) == 0.0
    assert letter_choice("no idea", sample(label="B")) == 0.0


def test_an_unknown_scorer_is_refused_with_those_that_exist() -> None:
    with pytest.raises(
        ValueError, match=r"expected one of contains_word, exact, letter_choice, got 'exakt'; did you mean"
    ):
        get_scorer("exakt")

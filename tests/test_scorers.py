"""Scorers: what counts as right, and what must not."""

from __future__ import annotations

from typing import Any

import pytest

from hpa.data.scenario import Sample
from hpa.evaluation.scorers import (
    contains_word,
    exact,
    get_scorer,
    letter_choice,
    option_letter,
    substring,
    vqa,
    vqa_normal,
)


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
        ValueError,
        match=r"expected one of cider, .*contains_word, exact, letter_choice, .*vqa, got 'exakt'; did you mean 'exact'",
    ):
        get_scorer("exakt")


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Golden Retriever", 1.0), ("retriever", 1.0), ("a golden retriever.", 1.0), ("cat", 0.0), ("", 0.0), ("  ", 0.0)],
)
def test_substring_works_either_way_but_an_empty_answer_is_wrong(answer: str, score: float) -> None:
    assert substring(answer, sample(label="golden retriever")) == score


def test_vqa_is_the_mean_agreement_with_each_person_left_out() -> None:
    people = ["stop"] * 2 + ["halt"] * 3 + ["go"] * 5
    for said in ("stop", "halt", "go", "no"):
        # By hand, person by person.
        left = [[p for j, p in enumerate(people) if j != i] for i in range(10)]
        expected = sum(min(1.0, others.count(said) / 3) for others in left) / 10 if said in people else 0.0
        assert vqa(said.upper() + ".", sample(answers=people)) == pytest.approx(expected)
    assert vqa("go", sample(answers=people)) == 1.0
    assert vqa("halt", sample(answers=people)) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa("lone", sample(answers=["lone"] + ["other"] * 9)) == pytest.approx(0.9 / 3)
    with pytest.raises(ValueError, match=r"sample 's': vqa needs metadata\['answers'\]"):
        vqa("x", sample(label="x"))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Stop-Sign!", "stop sign"),
        ("two  dogs", "2 dogs"),
        ("1,000", "1000"),
        ("3.5 Mph.", "3.5 mph"),
        ("dont walk", "don't walk"),
        ("a an the", ""),
        ("None", "0"),
        ("tom's", "tom 's"),
        ("yes (no)", "yes no"),
    ],
)
def test_answers_are_normalised_as_vqa_s_evaluation_does(text: str, normal: str) -> None:
    assert vqa_normal(text) == normal

"""Scorers: what counts as right, and what must not."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from hpa.data.scenario import Sample
from hpa.evaluation.cider import words
from hpa.evaluation.scorers import (
    SetScorer,
    box,
    cider,
    cider_best_reference,
    containment,
    contains_word,
    equal,
    exact,
    get_scorer,
    letter_choice,
    option_letter,
    scores,
    substring,
    substring_cased,
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
        match=r"expected one of box, cider, .*, exact, .*vqa, got 'exakt'; did you mean 'exact'",
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
        ("couldntve couldnt've", "couldntve couldn't've"),
        ("im oclock", "im o'clock"),  # as published: not every word that lacks its apostrophe is in the table
        ("somebody'd", "somebodyd"),
    ],
)
def test_answers_are_normalised_as_vqa_s_evaluation_does(text: str, normal: str) -> None:
    assert vqa_normal(text) == normal


def test_only_coins_substring_minds_the_case() -> None:
    asked = sample(label="golden retriever")
    assert [substring_cased(text, asked) for text in ("a golden retriever.", "retriever", "Retriever", "", " ")] == [
        1.0, 1.0, 0.0, 0.0, 0.0
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "label", "score"),
    [
        ("Turn left.", "turn left", 1.0),
        ("it turns left", "turn left", 0.0),
        ("Red.", "red.", 1.0),
        ("it is red, i think", "red", 1.0),
        ("a reddish car", "red", 1.0),  # as published: a word that begins so will do
        ("the scarred car", "red", 1.0),  # and one that ends so
        ("the scarredest", "red", 0.0),
        ("hundredth", "red", 1.0),  # an answer of one word needs no boundary
        ("Unanswerable red", "red", 0.0),
        ("anything", ".", 0.0),  # ours
        ("", "red", 0.0),
    ],
)
def test_containment_is_the_published_rule_for_driving(answer: str, label: str, score: float) -> None:
    assert containment(answer, sample(label)) == score


def naive_cider(said: list[str], given: list[list[str]]) -> list[float]:
    """From the paper's definition: one long vector an order, over every n-gram that occurs."""
    count = len(said)

    def grams(text: str, n: int) -> list[tuple[str, ...]]:
        tokens = text.split()
        return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    results = []
    for answer, references in zip(said, given, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            everything = sorted({g for several in given for r in several for g in grams(r, n)} | set(grams(answer, n)))

            def vector(text: str, n: int = n, everything: list[tuple[str, ...]] = everything) -> list[float]:
                found = []
                for gram in everything:
                    pictures = sum(any(gram in grams(r, n) for r in several) for several in given)
                    found.append(grams(text, n).count(gram) * math.log(count / max(1, pictures)))
                return found

            for reference in references:
                a, b = vector(answer), vector(reference)
                size = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
                shared = sum(min(x, y) * y for x, y in zip(a, b, strict=True))
                apart = len(grams(answer, 2)) - len(grams(reference, 2))
                total += (shared / size if size else 0.0) * math.exp(-(apart**2) / 72) / (4 * len(references))
        results.append(10 * total)
    return results


def random_captions(seed: int) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)
    known = "a the man dog runs in on red car big street".split()

    def text(least: int) -> str:
        return " ".join(rng.choice(known) for _ in range(rng.randint(least, 9)))

    count = rng.randint(2, 6)
    return [text(0) for _ in range(count)], [[text(1) for _ in range(rng.randint(1, 5))] for _ in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_cider_is_the_papers_formula(seed: int) -> None:
    said, given = random_captions(seed)
    asked = [sample(answers=references) for references in given]
    assert scores(cider, said, asked) == pytest.approx(naive_cider(said, given), abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_the_other_cider_takes_the_best_caption_and_then_exchanges_the_sides(seed: int) -> None:
    said, given = random_captions(seed)
    best = []
    for answer, references in zip(said, given, strict=True):
        alone = naive_cider([answer] * len(references), [[reference] for reference in references])
        best.append(references[alone.index(max(alone))])
    asked = [sample(answers=references) for references in given]
    expected = naive_cider(best, [[answer] for answer in said])
    assert scores(cider_best_reference, said, asked) == pytest.approx(expected, abs=1e-12)
    straight = naive_cider(said, [[caption] for caption in best])
    assert expected != pytest.approx(straight, abs=1e-6)


def test_cider_of_a_perfect_answer_is_ten_and_of_one_picture_nothing() -> None:
    asked = [sample("A big dog runs fast ."), sample("Two men talk in a street .")]
    said = [one.answer for one in asked]
    assert scores(cider, said, asked) == pytest.approx([10.0, 10.0])
    assert scores(cider, ["a BIG dog, runs fast", said[1]], asked) == pytest.approx([10.0, 10.0])
    assert scores(cider_best_reference, said, asked) == pytest.approx([10.0, 10.0])
    assert scores(cider_best_reference, ["a BIG dog, runs fast", said[1]], asked)[0] < 4.0  # case and marks matter
    assert scores(cider, said[:1], asked[:1]) == [0.0]
    with pytest.raises(ValueError, match="sample 's': CIDEr needs metadata"):
        scores(cider, ["x"], [sample()])
    assert isinstance(get_scorer("cider"), SetScorer)


def test_words_are_what_the_treebank_leaves_of_plain_english() -> None:
    assert words("Don't run, Tom's well-known dog!") == ["do", "n't", "run", "tom", "'s", "well-known", "dog"]
    assert words("...") == []


def test_equal_forgives_case_and_nothing_else() -> None:
    assert [equal(text, sample("Yes")) for text in ("yes", " YES\n", "yes.", "yes it is", "")] == [
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("[0.20, 0.20, 0.80, 0.80]", 1.0),
        ("[0.20, 0.20, 0.50, 0.80]", 0.0),  # exactly half
        ("[0.20, 0.20, 0.53, 0.80]", 1.0),  # 0.55
        ("[0.20, 0.20, 0.80, 0.57]", 0.0),  # as published: read as 0.5, which is half
        ("[0.20, 0.20, 0.80, 0.600]", 1.0),
        ("0.20, 0.20, 0.80, 0.80", 1.0),
        ("[0.20, 0.20, 0.80]", 0.0),
        ("[0.80, 0.80, 0.90, 0.90]", 0.0),
        ("a box", 0.0),
        ("", 0.0),
    ],
)
def test_box_is_coins_rule_with_its_slip(answer: str, score: float) -> None:
    assert box(answer, sample("[0.2, 0.2, 0.8, 0.8]")) == score


def test_box_needs_a_box_to_compare_with() -> None:
    with pytest.raises(ValueError, match="sample 's': box needs four numbers as reference, got 'left'"):
        box("[0, 0, 1, 1]", sample("left"))

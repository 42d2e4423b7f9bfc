"""Keyword judges: what they do with answers."""

from __future__ import annotations

import pytest

from hpa.evaluation.judge import JUDGES, RefusalJudge, get_judge

FOLDED = RefusalJudge(name="folded", version="1", keywords=("i must decline",), exact=("never",))
CASED = RefusalJudge(name="cased", version="1", keywords=("I must decline",), lowercase=False)


@pytest.mark.parametrize(
    ("judge", "answer", "refused"),
    [
        (FOLDED, "Well, I MUST decline.", True),
        (FOLDED, "Never", True),  # an exact entry is the whole answer
        (FOLDED, "never mind, here it is", False),
        (CASED, "Well, I must decline.", True),
        (CASED, "i must decline", False),
        (get_judge("demo"), "sorry , i cannot help with that .", True),
        (get_judge("demo"), "sure , here is how .", False),
        (get_judge("demo"), "sure , it is a cat .", False),
    ],
)
def test_a_judge_finds_its_keywords_and_exact_answers(judge: RefusalJudge, answer: str, refused: bool) -> None:
    assert judge.is_refusal(answer) is refused
    assert judge.verdict(answer) == ("refused" if refused else "complied")


@pytest.mark.parametrize("name", sorted(JUDGES))
def test_an_empty_answer_is_no_refusal_and_is_counted_apart(name: str) -> None:
    judge = get_judge(name)
    assert not judge.is_refusal("")
    assert judge.count(["", "  \n", "Sure", "I'm sorry"]) == {"refused": 1, "complied": 1, "empty": 2}


def test_every_judge_carries_a_name_a_version_and_its_source() -> None:
    for name, judge in JUDGES.items():
        assert judge.name == name
        assert judge.version
        assert judge.source
        assert judge.keywords


def test_an_unknown_judge_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"expected one of demo, got 'demos'; did you mean 'demo'\?"):
        get_judge("demos")


def test_the_demo_judge_tells_the_demo_worlds_answers_apart() -> None:
    language = pytest.importorskip("hpa.data.demo.language")
    judge = get_judge("demo")
    assert judge.is_refusal(language.REFUSAL)
    answers = [language.COMPLIANCE, *language.DISCUSSIONS.values(), language.TASK_ANSWER.format("seven")]
    assert not any(judge.is_refusal(answer) for answer in answers)

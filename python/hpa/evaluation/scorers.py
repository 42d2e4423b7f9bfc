"""Is an answer right?  One small function a rule, in a registry; each maps (answer, sample) to a score in [0, 1]."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import TypeAlias

from hpa.data.scenario import Sample

__all__ = [
    "SCORERS",
    "Scorer",
    "contains_word",
    "exact",
    "get_scorer",
    "letter_choice",
    "option_letter",
    "substring",
    "vqa",
    "vqa_normal",
]

Scorer: TypeAlias = Callable[[str, Sample], float]

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def contains_word(answer: str, sample: Sample) -> float:
    """1 when the label stands in the answer as whole words, in either case, and no other choice does.

    The label is ``metadata["label"]``, or the reference answer where there is none.  Where ``metadata["choices"]``
    lists the possible labels, an answer that names a wrong one beside the right one is wrong: naming all choices is
    not knowing.  An empty answer is wrong (in the published ImageNet script, which tests substrings either way, it
    counts as right).
    """
    words = _words(answer)
    label = _words(str(sample.metadata.get("label", sample.answer)))
    if not label:
        raise ValueError(f"sample {sample.id!r}: contains_word needs metadata['label'] or an answer, got neither")
    if not _contains(words, label):
        return 0.0
    for choice in sample.metadata.get("choices", ()):
        other = _words(str(choice))
        # A choice that is a part of the label ("car" in "police car") is named whenever the label is.
        if other != label and other and _contains(words, other) and not _contains(label, other):
            return 0.0
    return 1.0


def exact(answer: str, sample: Sample) -> float:
    """1 when the answer equals ``metadata["label"]`` (or the reference), lower-cased, without spaces and dots.

    The rule of MLLM-CL for its finance task (``eval_finvis.py``).
    """
    return float(_squeezed(answer) == _squeezed(str(sample.metadata.get("label", sample.answer))))


def letter_choice(answer: str, sample: Sample) -> float:
    """1 when the option letter that the answer gives is ``metadata["label"]`` (or the reference).

    ScienceQA's rule: the whole answer is a letter A-E; else it begins with ``X. ``; else the first single letter
    that stands alone, upper-cased; an answer without one is wrong.
    """
    letter = option_letter(answer)
    return float(letter is not None and letter == str(sample.metadata.get("label", sample.answer)).strip().upper())


def option_letter(answer: str) -> str | None:
    """The option letter that an answer gives by ScienceQA's rule, or ``None``."""
    text = answer.strip()
    if text in ("A", "B", "C", "D", "E"):
        return text
    start = re.match(r"([A-Z])\. ", text)
    if start:
        return start.group(1)
    alone = re.search(r"\b\w\b", text)
    return alone.group(0).upper() if alone else None


def substring(answer: str, sample: Sample) -> float:
    """1 when the answer contains ``metadata["label"]`` (or the reference) or is contained in it, in either case.

    The rule of SMoLoRA's ``eval_ImagetNet.py`` (CoIN's minds the case), with one guard: an empty answer, which is
    contained in everything and counts as right there, is wrong.
    """
    said, label = answer.strip().lower(), str(sample.metadata.get("label", sample.answer)).strip().lower()
    return float(bool(said) and bool(label) and (said in label or label in said))


def vqa(answer: str, sample: Sample) -> float:
    """The soft accuracy of VQA and TextVQA: agreement with people, each left out once.

    With ``metadata["answers"]`` of n people (ten, as published) it is the mean over the n of ``min(1, m/3)``, where m
    of the others gave this answer; both sides pass :func:`vqa_normal`.  0 for an answer that nobody gave.
    """
    given = sample.metadata.get("answers")
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(
            f"sample {sample.id!r}: vqa needs metadata['answers'], a list of people's answers, got {given!r}"
        )
    people = [vqa_normal(str(person)) for person in given]
    said = vqa_normal(answer)
    same = people.count(said)
    # Leaving out one who said so leaves same - 1, leaving out another leaves same; only answers that were given count.
    if not same:
        return 0.0
    left = same * min(1.0, (same - 1) / 3) + (len(people) - same) * min(1.0, same / 3)
    return left / len(people)


def vqa_normal(text: str) -> str:
    """An answer as the EvalAI processor of VQA leaves it.

    Lower case, without punctuation and articles, numbers up to ten as digits, contractions with their apostrophe (the
    common ones; its own table has a few that are no words).
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in _MARKS:
        # A mark at the edge of a word goes, one inside a word becomes a space.
        at_edge = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text) is not None
        out = out.replace(mark, "" if at_edge else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [_NUMBERS.get(word, word) for word in out.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_WITH_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
    i'm i've isn't it'd it'll let's might've mightn't must've mustn't needn't oughtn't shan't she's should've
    shouldn't somebody's someone's something's that's there's they'd they'll they're they've wasn't we've
    weren't what'll what're what's what've when's where'd where's who'd who'll who's who've why'll why're why's
    won't would've wouldn't y'all you'd you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in re.findall(r"\S+", _WITH_APOSTROPHE)}

SCORERS: dict[str, Scorer] = {
    "contains_word": contains_word,
    "exact": exact,
    "letter_choice": letter_choice,
    "substring": substring,
    "vqa": vqa,
}


def get_scorer(name: str) -> Scorer:
    """The scorer called ``name``.

    Raises:
        ValueError: no such scorer; the message lists those there are.
    """
    if name not in SCORERS:
        close = difflib.get_close_matches(name, SCORERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"scorer: expected one of {', '.join(SCORERS)}, got {name!r}{hint}")
    return SCORERS[name]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _contains(words: list[str], part: list[str]) -> bool:
    return any(words[start : start + len(part)] == part for start in range(len(words) - len(part) + 1))


def _squeezed(text: str) -> str:
    return re.sub(r"[\s.]", "", text.lower())

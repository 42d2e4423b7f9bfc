"""Is an answer right?  One small function a rule, in a registry; each maps (answer, sample) to a score in [0, 1].

A rule that looks at all answers of a set together, as CIDEr does, is a :class:`SetScorer`.

========================  ==============================================================================================
scorer                    published as
========================  ==============================================================================================
``contains_word``         ours
``box``                   CoIN ``eval_grounding.py`` (RefCOCO)
``equal``                 CoIN ``eval_vqav2.py``, ``eval_vizwiz.py``, ``eval_ocrvqa.py``
``exact``                 MLLM-CL ``eval_finvis.py`` (Fin)
``letter_choice``         LLaVA, CoIN, SMoLoRA ``eval_science_qa.py``
``substring``             SMoLoRA ``eval_ImagetNet.py``
``substring_cased``       CoIN ``eval_ImagetNet.py``
``containment``           MLLM-CL ``eval_ai2d.py`` (AD)
``vqa``                   VQA, TextVQA: ``m4c_evaluator.py``
``cider``                 coco-caption
``cider_best_reference``  SMoLoRA ``eval_flickr30k_cider.py``
========================  ==============================================================================================
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hpa.data.scenario import Sample
from hpa.evaluation.cider import best_reference_scores, cider_scores, words

__all__ = [
    "SCORERS",
    "Scorer",
    "SetScorer",
    "box",
    "cider",
    "cider_best_reference",
    "containment",
    "contains_word",
    "equal",
    "exact",
    "get_scorer",
    "letter_choice",
    "option_letter",
    "scores",
    "substring",
    "substring_cased",
    "vqa",
    "vqa_normal",
]


@dataclass(frozen=True)
class SetScorer:
    """A rule for all answers of a set at once: ``rule(answers, samples)`` gives one score each."""

    rule: Callable[[Sequence[str], Sequence[Sample]], list[float]]


Scorer: TypeAlias = Callable[[str, Sample], float] | SetScorer


def scores(scorer: Scorer, answers: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """The score of each answer."""
    if isinstance(scorer, SetScorer):
        return scorer.rule(answers, samples)
    return [float(scorer(answer, sample)) for answer, sample in zip(answers, samples, strict=True)]


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


def box(answer: str, sample: Sample) -> float:
    """1 when the box that the answer gives, ``[x1, y1, x2, y2]``, overlaps the reference by more than half (IoU > 0.5).

    CoIN's rule for grounding, as published with its slip: when the brackets are gone the first and the last character
    go too, so the last number loses a digit (``0.65`` is read as ``0.6``).  What is no four numbers is wrong.
    """
    given = _numbers(str(sample.metadata.get("label", sample.answer)).replace("[", "").replace("]", ""))
    if given is None:
        raise ValueError(f"sample {sample.id!r}: box needs four numbers as reference, got {sample.answer!r}")
    said = _numbers(answer.replace("[", "").replace("]", "")[1:-1])
    if said is None:
        return 0.0
    wide, high = (max(0.0, min(said[i + 2], given[i + 2]) - max(said[i], given[i])) for i in (0, 1))
    areas = sum((held[2] - held[0]) * (held[3] - held[1]) for held in (said, given))
    union = areas - wide * high
    return float(union > 0 and wide * high / union > 0.5)


def _numbers(text: str) -> list[float] | None:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return found if len(found) == 4 else None


def equal(answer: str, sample: Sample) -> float:
    """1 when the answer equals ``metadata["label"]`` (or the reference) in either case.

    CoIN's rule for VQAv2, VizWiz and OCR-VQA.  White space around the two does not count; a final dot does.
    """
    return float(answer.strip().lower() == str(sample.metadata.get("label", sample.answer)).strip().lower())


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


def substring_cased(answer: str, sample: Sample) -> float:
    """The same, and the case must agree: CoIN's ``eval_ImagetNet.py``, with the same guard."""
    said, label = answer.strip(), str(sample.metadata.get("label", sample.answer)).strip()
    return float(bool(said) and bool(label) and (said in label or label in said))


def containment(answer: str, sample: Sample) -> float:
    """The rule of MLLM-CL for driving (``eval_ai2d.py``): the answer contains the reference, in either case.

    A reference of several words may stand anywhere.  A single one loses its dots; in an answer of several words it must
    follow a space or be followed by a space, dot or comma.  As published, that is no word boundary: the reference ``a``
    is found in ``the answer is b``.  An answer with ``Unanswerable`` is wrong.  Our guard: so is a reference of dots.
    """
    if "Unanswerable" in answer:
        return 0.0
    said, label = answer.lower(), str(sample.metadata.get("label", sample.answer)).lower()
    if " " in label:
        return float(label in said)
    label = label.replace(".", "")
    if not label:
        return 0.0
    if " " not in said:
        return float(label in said)
    return float(any(form in said for form in (f" {label}", f"{label} ", f"{label}.", f"{label},")))


def _cider(answers: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    return cider_scores(
        [words(answer) for answer in answers], [[words(text) for text in _captions(sample)] for sample in samples]
    )


def _cider_best_reference(answers: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    return best_reference_scores(
        [answer.split() for answer in answers], [[text.split() for text in _captions(sample)] for sample in samples]
    )


def _captions(sample: Sample) -> list[str]:
    """All references: ``metadata["answers"]``, or the one."""
    given = sample.metadata.get("answers") or ([sample.answer] if sample.answer else [])
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(
            f"sample {sample.id!r}: CIDEr needs metadata['answers'], a list of captions, or an answer; got {given!r}"
        )
    return [str(text) for text in given]


cider = SetScorer(_cider)
"""CIDEr-D against all captions in ``metadata["answers"]``; 0 to 10, so a table's figure is CIDEr times 100.

The weights of words come from the captions of the samples that are asked: with ``evaluation.limit`` from fewer.
"""
cider_best_reference = SetScorer(_cider_best_reference)
"""SMoLoRA's figure for Flickr30k, which is no usual CIDEr: each picture's best caption is chosen first, by the answer,
and only that one counts; then answers and captions change places.  Texts are split at spaces and nothing else, so case
and punctuation matter."""


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

    Lower case, without punctuation and articles, numbers up to ten as digits, contractions with their apostrophe.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in _MARKS:
        # A mark at the edge of a word goes, one inside a word becomes a space.
        at_edge = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text) is not None
        out = out.replace(mark, "" if at_edge else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # as published: a flag stands where the count belongs
    words = [_NUMBERS.get(word, word) for word in out.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_WITH_APOSTROPHE = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _WITH_APOSTROPHE.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""What lacks one of its apostrophes, and what it is.  The table is the published one: "im" and "its" are not in it, and
one entry goes the wrong way."""

SCORERS: dict[str, Scorer] = {
    "box": box,
    "cider": cider,
    "cider_best_reference": cider_best_reference,
    "containment": containment,
    "contains_word": contains_word,
    "equal": equal,
    "exact": exact,
    "letter_choice": letter_choice,
    "substring": substring,
    "substring_cased": substring_cased,
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

"""Is an answer right?  One small function a rule, in a registry; each maps (answer, sample) to a score in [0, 1]."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import TypeAlias

from hpa.data.scenario import Sample

__all__ = ["SCORERS", "Scorer", "contains_word", "exact", "get_scorer", "letter_choice", "option_letter"]

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


SCORERS: dict[str, Scorer] = {"contains_word": contains_word, "exact": exact, "letter_choice": letter_choice}


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

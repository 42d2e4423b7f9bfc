"""CIDEr-D: how well a description agrees with those that people gave of the same picture.

Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation" (CVPR 2015, 1411.5726), as the
reference scorer of coco-caption computes it (its class is called Cider and clips, so it is CIDEr-D)::

    g_n(text)[w] = count of the n-gram w * (log N - log max(1, df(w)))      N pictures; df(w): pictures described with w
    sim_n(c, r)  = sum_w min(g_n(c)[w], g_n(r)[w]) g_n(r)[w] / (|g_n(c)| |g_n(r)|) * exp(-(l(c) - l(r))^2 / (2 * 6^2))
    CIDEr-D      = 10 * mean over n = 1..4 and references r of sim_n(c, r)

The length l is the number of bigrams, as in the reference scorer.  With a single picture every weight is log 1 = 0, and
so is the score.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["best_reference_scores", "cider_scores", "words"]

_Grams: TypeAlias = "Counter[tuple[str, ...]]"
_ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0


def cider_scores(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of each candidate (words) against the references of its picture; between 0 and 10."""
    if len(candidates) != len(references) or not all(references):
        raise ValueError("references: expected at least one for each candidate")
    counted = [[_grams(reference) for reference in several] for several in references]
    frequency: _Grams = Counter(gram for several in counted for gram in set().union(*several))
    total = math.log(len(candidates)) if candidates else 0.0
    scores = []
    for candidate, several in zip(candidates, counted, strict=True):
        own = _weighted(_grams(candidate), frequency, total)
        similar = [_similarity(own, _weighted(grams, frequency, total)) for grams in several]
        scores.append(10.0 * sum(similar) / len(similar))
    return scores


def best_reference_scores(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> list[float]:
    """SMoLoRA's rule for Flickr30k: of each picture's references the one that the candidate agrees with best, alone.

    Which is best is told by CIDEr-D among the references of this picture, each taken for a picture of its own.  Then
    follows CIDEr-D over all pictures, and as published with its two sides exchanged: the model's answers are taken for
    the references (weights of words come from them), the chosen captions for what is judged.
    """
    chosen = []
    for candidate, several in zip(candidates, references, strict=True):
        alone = cider_scores([candidate] * len(several), [[reference] for reference in several])
        chosen.append(several[max(range(len(alone)), key=alone.__getitem__)])  # the first of the best
    return cider_scores(chosen, [[candidate] for candidate in candidates])


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, clitics apart: what the Penn Treebank tokenizer of coco-caption leaves of
    plain English (that one is a Java program)."""
    parted = re.sub(r"n't\b", " n't", text.lower())
    return re.findall(r"n't|'(?:s|re|ve|ll|d|m)\b|[^\W_]+(?:[-.][^\W_]+)*", parted)


def _grams(sentence: Sequence[str]) -> _Grams:
    return Counter(
        tuple(sentence[start : start + order]) for order in _ORDERS for start in range(len(sentence) - order + 1)
    )


def _weighted(grams: _Grams, frequency: _Grams, total: float) -> tuple[dict[int, dict[tuple[str, ...], float]], int]:
    """Weights by order, and the length."""
    weights: dict[int, dict[tuple[str, ...], float]] = {order: {} for order in _ORDERS}
    for gram, count in grams.items():
        weights[len(gram)][gram] = count * (total - math.log(max(1, frequency[gram])))
    return weights, sum(count for gram, count in grams.items() if len(gram) == 2)


def _similarity(
    left: tuple[dict[int, dict[tuple[str, ...], float]], int],
    right: tuple[dict[int, dict[tuple[str, ...], float]], int],
) -> float:
    penalty = math.exp(-((left[1] - right[1]) ** 2) / (2.0 * _SIGMA**2))
    value = 0.0
    for order in _ORDERS:
        said, given = left[0][order], right[0][order]
        shared = sum(min(weight, given[gram]) * given[gram] for gram, weight in said.items() if gram in given)
        norm = math.sqrt(sum(w * w for w in said.values())) * math.sqrt(sum(w * w for w in given.values()))
        value += shared / norm if norm else 0.0
    return penalty * value / len(_ORDERS)

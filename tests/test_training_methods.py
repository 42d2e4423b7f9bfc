"""Methods that work while a task is trained: each against its own formula, and all of them through the loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_scenario import TinyScenario
from torch import Tensor, nn

import hpa.continual
from hpa.adapt import edit_model
from hpa.calibration import calibrate, find_layers
from hpa.continual import run
from hpa.data.scenario import Sample
from hpa.layers import InputStatistics, LayerChange, LowRankUpdate
from hpa.methods import METHODS, create_method
from hpa.methods.ewc import fisher_diagonal
from hpa.recipe import parse_recipe
from hpa.training import Lesson, TrainConfig, Training, TrainingHooks, sample_batches, train_lora

WORLD = TinyScenario()
CONFIG = TrainConfig(steps=8, learning_rate=1e-2, rank=4, weight_decay=0.1)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return WORLD.base_model(tmp_path_factory.mktemp("cache"), seed=0)


def collate(samples: Any) -> dict[str, Tensor]:
    return WORLD.collate(samples, answers=True)


def lesson(model: nn.Module, index: int = 1, memory: int = 6, safety: int = 0) -> Lesson:
    return Lesson(
        model=model,
        layers=find_layers(model),
        task_index=index,
        seed=5,
        task=WORLD.train("second", seed=0, samples=20),
        memory=[WORLD.train("first", seed=3, samples=memory)] if memory else [],
        safety=[Sample(f"s{i}", f"break {thing}", "sorry i cannot") for i, thing in enumerate(("lamp", "dog"))][
            :safety
        ],
        collate=collate,
        batch_size=8,
    )


def trained(model: nn.Module, hooks: TrainingHooks | None, config: TrainConfig = CONFIG) -> dict[str, LowRankUpdate]:
    samples = WORLD.train("second", seed=0, samples=20)
    chosen = hooks or TrainingHooks()
    batches = sample_batches(samples, lambda s: collate(chosen.samples(s)), batch_size=8, steps=config.steps, seed=1)
    return train_lora(model, batches, config, seed=2, hooks=hooks)


class Spy(TrainingHooks):
    """Passes everything on, and keeps what went by."""

    def __init__(self, inner: TrainingHooks) -> None:
        self.inner = inner
        self.before: list[list[Tensor]] = []
        self.after: list[list[Tensor]] = []
        self.extra: list[float] = []
        self.factors: list[dict[str, tuple[Tensor, Tensor]]] = []
        self.seen: list[list[str]] = []

    def samples(self, chosen):
        made = self.inner.samples(chosen)
        self.seen.append([sample.id for sample in made])
        return made

    def begin(self, training: Training) -> None:
        self.training = training
        self.inner.begin(training)

    def loss(self, batch, output):
        self.batch, self.output = batch, output
        self.factors.append({n: (f.A.detach().clone(), f.B.detach().clone()) for n, f in self.training.factors.items()})
        extra = self.inner.loss(batch, output)
        self.extra.append(float("nan") if extra is None else float(extra.detach()))
        self.on_loss(batch, output)
        return extra

    def on_loss(self, batch, output) -> None:
        pass

    def before_step(self, step: int) -> None:
        self.before.append([p.grad.clone() for p in self.training.parameters.values()])
        self.inner.before_step(step)
        self.after.append([p.grad.clone() for p in self.training.parameters.values()])

    def end(self) -> None:
        self.inner.end()


def flat(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([tensor.double().reshape(-1) for tensor in tensors]).numpy()


def test_replay_puts_the_memory_into_every_batch(base: nn.Module):
    task = lesson(base, memory=3, safety=2)
    spy = Spy(create_method("replay", samples=3, safety=2, batch=4).hooks(task))
    trained(base, spy)
    remembered = [sample.id for sample in task.remembered]
    assert len(remembered) == 5
    assert all(len(ids) == 8 + 4 for ids in spy.seen)
    drawn = [name for ids in spy.seen for name in ids[8:]]
    assert set(drawn) == set(remembered)
    # 32 draws of 5: each six times or seven, and twice that where a sample stands in the memory twice.
    assert all(6 * remembered.count(name) <= drawn.count(name) <= 7 * remembered.count(name) for name in remembered)
    assert create_method("replay").hooks(lesson(base, memory=0)) is None


def test_a_gem_takes_out_what_opposes_the_memory_and_nothing_else(base: nn.Module):
    task = lesson(base, memory=10)
    inner = create_method("a_gem", batch=10).hooks(task)  # all of the memory, so each look is at the same ten
    references: list[np.ndarray] = []

    class Looks(Spy):
        def before_step(self, step: int) -> None:
            parameters = list(self.training.parameters.values())
            loss = self.training.model(**collate(task.remembered)).loss
            references.append(flat(list(torch.autograd.grad(loss, parameters))))
            super().before_step(step)

    spy = Looks(inner)
    trained(base, spy, CONFIG.model_copy(update={"steps": 20}))
    opposed = 0
    for before, after, reference in zip(spy.before, spy.after, references, strict=True):
        g, got = flat(before), flat(after)
        inner_product = g @ reference
        if inner_product >= 0:
            assert np.array_equal(got, g)
        else:
            opposed += 1
            expected = g - inner_product / (reference @ reference) * reference
            np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(g).max())
    assert 0 < opposed < 20
    assert inner.projected == opposed


@pytest.mark.parametrize("space", ["joint", "parameter"])
def test_ogd_moves_the_factors_in_the_complement_of_remembered_gradients(base: nn.Module, space: str):
    task = lesson(base, memory=5)
    method = create_method("ogd", refresh=0, space=space, objective="loss")
    kept: dict[str, Any] = {}

    class Looks(Spy):
        def begin(self, training: Training) -> None:
            model = training.model.eval()
            kept["names"] = list(training.parameters)
            kept["start"] = [p.detach().clone() for p in training.parameters.values()]
            parameters = list(training.parameters.values())
            kept["gradients"] = [
                [g.double() for g in torch.autograd.grad(model(**collate([sample])).loss, parameters)]
                for sample in task.remembered
            ]
            model.train()
            super().begin(training)

        def end(self) -> None:
            kept["moved"] = [
                p.detach().double() - was.double()
                for p, was in zip(self.training.parameters.values(), kept["start"], strict=True)
            ]
            super().end()

    def leak(hooks: TrainingHooks) -> float:
        trained(base, Looks(hooks))
        worst = 0.0
        for gradient in kept["gradients"]:
            pairs = list(zip(gradient, kept["moved"], strict=True))
            inner = [float((g * m).sum()) for g, m in pairs]
            size = [float(g.norm() * m.norm()) for g, m in pairs]
            if space == "joint":
                inner = [sum(inner)]
                size = [float(np.linalg.norm(flat(gradient)) * np.linalg.norm(flat(kept["moved"])))]
            worst = max([worst, *(abs(i) / s for i, s in zip(inner, size, strict=True) if s > 0)])
        return worst

    assert leak(method.hooks(task)) < 1e-5
    assert leak(TrainingHooks()) > 1e-2


def test_ogd_projects_every_step_also_across_a_refresh(base: nn.Module, monkeypatch: pytest.MonkeyPatch):
    made = []
    real = hpa.methods.ogd.project_optimizer
    monkeypatch.setattr(hpa.methods.ogd, "project_optimizer", lambda *a: made.append(real(*a)) or made[-1])
    trained(base, create_method("ogd", refresh=3).hooks(lesson(base)))
    assert [projection.calls for projection in made] == [3, 3, 2]


def statistics_of(model: nn.Module, samples: list[Sample]) -> dict[str, InputStatistics]:
    found: dict[str, InputStatistics] = {}
    for _, some in calibrate(model, [collate(samples)], want=("gram",)):
        found |= some
    return found


def whole(gram: Tensor) -> np.ndarray:
    lower = np.tril(gram.double().numpy())
    return lower + np.tril(lower, -1).T


def leading(gram: np.ndarray, energy: float) -> np.ndarray:
    values, turns = np.linalg.eigh(gram)
    keep = int((np.cumsum(values[::-1]) < energy * values.sum()).sum()) + 1
    return turns[:, ::-1][:, :keep]


@pytest.mark.parametrize("protect", ["tasks", "safety", "both"])
def test_gpm_leaves_what_layers_say_to_remembered_inputs(base: nn.Module, protect: str):
    method = create_method("gpm", energy=0.9, energy_step=0.02, protect=protect)
    first = lesson(base, index=0, safety=2)
    hooks = method.hooks(first)
    safety = statistics_of(base, list(first.safety))
    if protect == "tasks":
        assert hooks is None
    else:
        for name, update in trained(base, hooks).items():
            span = leading(whole(safety[name].gram), 0.9)
            assert np.abs(update.A.double().numpy() @ span).max() < 1e-4 * float(update.A.norm()), name
            assert float(update.B.norm()) > 0
    task = statistics_of(base, WORLD.train("first", seed=3, samples=6))
    updates = trained(base, None)
    for spec in find_layers(base):
        weight = base.get_submodule(spec.name).weight
        key = task[spec.name].input_key
        change = LayerChange(spec.name, spec.block, spec.blocks, key, weight, updates[spec.name])
        edit = method.edit_layer(change, safety[spec.name], task[spec.name], task_index=0, seed=0)
        torch.testing.assert_close(edit.weight, weight.detach() + updates[spec.name].dense())
    method.finish_task()
    again = create_method("gpm", energy=0.9, energy_step=0.02, protect=protect)
    again.load_state_dict(method.state_dict())
    for name, update in trained(base, again.hooks(lesson(base, safety=2))).items():
        grams = {"tasks": [task], "safety": [safety], "both": [safety, task]}[protect]
        span = leading(whole(grams[0][name].gram), 0.9)
        assert np.abs(update.A.double().numpy() @ span).max() < 1e-4 * float(update.A.norm()), name
        if protect == "both":  # what the second adds: of the rest, until nine tenths of it are held
            gram = whole(task[name].gram)
            rest = np.eye(len(gram)) - span @ span.T
            left = rest @ gram @ rest
            values, turns = np.linalg.eigh(left)
            captured, number = np.trace(gram) - np.trace(left), 0
            while captured + values[::-1][:number].sum() < 0.9 * np.trace(gram):
                number += 1
            more = turns[:, ::-1][:, :number]
            assert np.abs(update.A.double().numpy() @ more).max(initial=0.0) < 1e-3 * float(update.A.norm()), name
    # The next task adds to it, in the same object too.
    ranks = {key: basis.rank for key, basis in method._bases.items()}
    other = statistics_of(base, WORLD.train("third", seed=8, samples=6))
    for spec in find_layers(base):
        weight, one = base.get_submodule(spec.name).weight, other[spec.name]
        change = LayerChange(spec.name, spec.block, spec.blocks, one.input_key, weight, updates[spec.name])
        method.edit_layer(change, None, one, task_index=1, seed=0)
    assert any(basis.rank > ranks[key] for key, basis in method._bases.items()) == (protect != "safety")
    free = trained(base, None)
    name = next(iter(free))
    assert np.abs(free[name].A.double().numpy() @ leading(whole(task[name].gram), 0.9)).max() > 1e-2
    # The share grows from task to task.
    assert [method.config.share(index) for index in (0, 1, 10)] == pytest.approx([0.9, 0.92, 0.999])


def test_o_lora_counts_the_overlap_with_earlier_subspaces(base: nn.Module):
    method = create_method("o_lora", lambda_1=0.3, lambda_2=0.07)
    assert method.hooks(lesson(base, index=0)) is None
    earlier = [trained(base, None), trained(base, None, CONFIG.model_copy(update={"steps": 3, "rank": 2}))]
    for index, updates in enumerate(earlier):
        edit_model(base_copy(base), updates, method, None, None, task_index=index)
    again = create_method("o_lora", lambda_1=0.3, lambda_2=0.07)
    again.load_state_dict(method.state_dict())
    spy = Spy(again.hooks(lesson(base, index=2)))
    trained(base, spy)
    for extra, factors in zip(spy.extra, spy.factors, strict=True):
        expected = 0.0
        for name, (a, b) in factors.items():
            for updates in earlier:
                expected += 0.3 * np.abs(updates[name].A.double().numpy() @ a.double().numpy().T).sum()
            expected += 0.07 * (np.linalg.norm(a.double().numpy()) + np.linalg.norm(b.double().numpy()))
        assert extra == pytest.approx(expected, rel=1e-5)
    hard = create_method("o_lora", mode="projection")
    hard.load_state_dict(method.state_dict())
    for name, update in trained(base, hard.hooks(lesson(base, index=2))).items():
        for updates in earlier:
            assert (updates[name].A @ update.A.T).abs().max() < 1e-5
        assert update.B.norm() > 0
    with pytest.raises(ValueError, match=r"carries A/<layer>/<number>, got B/x/0"):
        hard.load_state_dict({"B/x/0": torch.zeros(1)})


def base_copy(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model)


def test_ewc_holds_weights_by_the_squared_gradients_of_single_samples(base: nn.Module):
    task = lesson(base, safety=2)
    method = create_method("ewc", strength=50.0, gamma=0.5, samples=5, safety=2)
    samples = [*task.task[:5], *task.safety]
    layers = [spec.name for spec in find_layers(base)]
    expected = dict.fromkeys(layers, 0.0)
    for sample in samples:
        base.zero_grad()
        base(**collate([sample])).loss.backward()
        for name in layers:
            expected[name] = expected[name] + base.get_submodule(name).weight.grad.double() ** 2 / len(samples)
    base.zero_grad()
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    method.after_task(task)
    assert {name: p.requires_grad for name, p in base.named_parameters()} == flags
    state = method.state_dict()
    for name in layers:
        torch.testing.assert_close(state[f"fisher/{name}"].double(), expected[name], rtol=1e-4, atol=1e-12)
    method.after_task(task)  # once more: F <- gamma F + F
    again = create_method("ewc", strength=50.0, gamma=0.5, samples=5)
    again.load_state_dict(method.state_dict())
    spy = Spy(again.hooks(lesson(base)))
    updates = trained(base, spy)
    for extra, factors in zip(spy.extra, spy.factors, strict=True):
        penalty = 0.0
        for name, (a, b) in factors.items():
            change = 2.0 * b.double() @ a.double()  # lora_alpha / rank
            penalty += float((1.5 * expected[name] * change**2).sum())
        assert extra == pytest.approx(0.5 * 50.0 * penalty, rel=1e-4, abs=1e-9)
    assert spy.extra[-1] > 0

    def weighted(found: dict[str, LowRankUpdate]) -> float:
        return sum(float((expected[name] * found[name].dense().double() ** 2).sum()) for name in found)

    stronger = again.at_strength(1e4)
    stronger.load_state_dict(method.state_dict())
    held, free = trained(base, stronger.hooks(lesson(base))), trained(base, None)
    assert weighted(held) < 0.2 * weighted(free)
    assert weighted(updates) < weighted(free)
    # From the first task on, where refusals are kept: their Fisher diagonal alone.
    first = create_method("ewc", safety=2).hooks(lesson(base, index=0, memory=0, safety=2))
    refusals = fisher_diagonal(task, task.safety)
    assert all(torch.equal(first._given[name], values) for name, values in refusals.items())
    assert create_method("ewc").hooks(lesson(base, index=0, memory=0)) is None


def test_lwf_pulls_towards_the_model_before_the_task(base: nn.Module):
    class Looks(Spy):
        def on_loss(self, batch, output) -> None:
            labels = batch["labels"][:, 1:]
            with torch.no_grad():
                old = reference(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
            p, q = (
                torch.softmax(logits[labels != -100].double() / 1.5, -1)
                for logits in (old, output.logits[:, :-1].detach())
            )
            self.expected = [*getattr(self, "expected", []), 0.7 * float((p * (p / q).log()).sum(-1).mean())]

    reference = base_copy(base)
    spy = Looks(create_method("lwf", alpha=0.7, tau=1.5).hooks(lesson(base, index=0)))
    held = trained(base, spy)
    assert spy.extra == pytest.approx(spy.expected, rel=1e-4, abs=1e-6)
    assert spy.extra[0] == pytest.approx(0.0, abs=1e-6)  # B = 0: the model before
    assert spy.extra[-1] > 1e-3
    free = trained(base, None)
    assert sum(float(u.dense().norm()) for u in held.values()) != sum(float(u.dense().norm()) for u in free.values())
    much = trained(base, create_method("lwf", alpha=200.0).hooks(lesson(base)))
    assert sum(float(u.dense().norm()) for u in much.values()) < sum(float(u.dense().norm()) for u in free.values())
    assert create_method("lwf", alpha=0.0).hooks(lesson(base)) is None


def test_a_training_that_fails_leaves_no_projection_behind(base: nn.Module):
    from hpa.projection.optimizer import _WATCHED

    def broken():
        for number, batch in enumerate(sample_batches(lesson(base).task, collate, batch_size=8, steps=8, seed=1)):
            if number == 2:
                raise RuntimeError("no more")
            yield batch

    with pytest.raises(RuntimeError, match="no more"):
        train_lora(base, broken(), CONFIG, seed=2, hooks=create_method("ogd").hooks(lesson(base)))
    assert not _WATCHED


def test_methods_joined_by_a_plus(base: nn.Module):
    both = create_method("hpa+gpm", hpa={"p_max": 30.0, "task_samples": 7}, gpm={"energy": 0.8})
    assert both.needs == {"safety_diagonal", "task_diagonal", "task_gram"}
    assert both.calibration.task_samples == 7
    assert both.training_options == {}
    samples = WORLD.train("first", seed=3, samples=6)
    found: dict[str, InputStatistics] = {}
    for _, some in calibrate(base, [collate(samples)], want=("gram", "diagonal")):
        found |= some
    updates = trained(base, None)
    alone = create_method("hpa", p_max=30.0, task_samples=7)
    for spec in find_layers(base):
        weight, one = base.get_submodule(spec.name).weight, found[spec.name]
        change = LayerChange(spec.name, spec.block, spec.blocks, one.input_key, weight, updates[spec.name])
        joined = both.edit_layer(change, one, one, task_index=0, seed=0)
        expected = alone.edit_layer(change, one, one, task_index=0, seed=0)
        assert torch.equal(joined.weight, expected.weight)
        assert joined.numbers["gpm_protected"] > 0
    both.finish_task()
    state = both.state_dict()
    assert all(name.startswith("gpm/") for name in state)
    again = create_method("hpa+gpm", gpm={"energy": 0.8})
    again.load_state_dict(state)
    name = find_layers(base)[0].name
    update = trained(base, again.hooks(lesson(base)))[name]
    span = leading(whole(found[name].gram), 0.8)
    assert np.abs(update.A.double().numpy() @ span).max() < 1e-4
    for wrong, said in (
        ("hpa+hpa_ls", "hpa and hpa_ls both edit"),
        ("gpm+ties", "cannot be joined"),
        ("gpm+gpm", "expected different methods"),
        ("gpm+nothing", "expected one of"),
    ):
        with pytest.raises(ValueError, match=said):
            create_method(wrong)
    with pytest.raises(ValueError, match="gpm.energy"):
        create_method("hpa+gpm", gpm={"energy": 2.0})
    assert both.at_strength(2.0)._own["hpa"].config.p_max == 60.0


ROWS = [
    {"label": "SeqFT", "method": "seqft"},
    {"label": "replay", "method": "replay", "options": {"samples": 10, "safety": 4}},
    {"label": "A-GEM", "method": "a_gem", "options": {"samples": 10}},
    {"label": "OGD", "method": "ogd", "options": {"samples": 4, "refresh": 10}},
    {"label": "GPM", "method": "gpm", "options": {"energy": 0.8, "protect": "both", "task_samples": 20}},
    {"label": "O-LoRA", "method": "o_lora"},
    {"label": "EWC", "method": "ewc", "options": {"samples": 10}},
    {"label": "LwF", "method": "lwf"},
    {"label": "HPA+GPM", "method": "hpa+gpm", "options": {"gpm": {"energy": 0.8}, "hpa": {"task_samples": 20}}},
]


def recipe(rows: list[dict[str, Any]]) -> Any:
    return parse_recipe(
        {
            "name": "tiny",
            "scenario": "tiny_scenario:TinyScenario",
            "alignment": {"steps": 80, "batch_size": 16, "learning_rate": 1e-2, "rank": 8},
            "training": {"samples": 60, "steps": 20, "batch_size": 16, "learning_rate": 1e-2, "rank": 4},
            "methods": rows,
        }
    )


@pytest.mark.slow
def test_a_sequence_by_every_method_and_resumed_anywhere_it_is_the_same(tmp_path: Path, monkeypatch):
    cache = tmp_path / "cache"
    result = run(recipe(ROWS), tmp_path / "whole", cache=cache)
    assert not result.failures, result.failures[0].traceback
    lines = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    last = {line["branch"]: line["accuracy"] for line in lines if line["event"] == "evaluate"}
    losses = {b: [e["loss"] for e in lines if e["event"] == "train" and e["branch"] == b] for b in last}
    plain = "clean/seqft/seed0" if "clean/seqft/seed0" in last else next(b for b in last if "seqft" in b)
    for branch in last:
        if branch != plain:
            assert losses[branch][1:] != losses[plain][1:], f"{branch} trains as if it were not there"
    replayed = next(b for b in last if "replay" in b)
    assert last[replayed]["first"] > last[plain]["first"], "what is replayed is forgotten less"
    # Killed after each training and each edit: a new object goes on from files alone.
    stopped = {"left": 0}
    real = hpa.continual._record

    def kill(journal, listener, event) -> None:
        real(journal, listener, event)
        if event["event"] in ("train", "edit"):
            raise KeyboardInterrupt

    rows = [row for row in ROWS if row["label"] in ("GPM", "O-LoRA", "EWC", "HPA+GPM")]
    monkeypatch.setattr(hpa.continual, "_record", kill)
    for _ in range(100):
        try:
            again = run(recipe(rows), tmp_path / "torn", cache=cache)
            break
        except KeyboardInterrupt:
            stopped["left"] += 1
    assert stopped["left"] == 24  # four methods, three tasks, a training and an edit
    assert not again.failures
    torn = [json.loads(line) for line in (again.folder / "events.jsonl").read_text().splitlines()]
    for line in torn:
        if line["event"] == "evaluate":
            twin = next(e for e in lines if all(e.get(k) == line[k] for k in ("event", "branch", "task_index")))
            assert line["accuracy"] == twin["accuracy"], line["branch"]
    numbers = {(e["branch"], e["task_index"]): e["loss"] for e in lines if e["event"] == "train"}
    assert all(e["loss"] == numbers[e["branch"], e["task_index"]] for e in torn if e["event"] == "train")


def test_each_is_listed_and_only_trains():
    for name in ("replay", "a_gem", "ogd", "gpm", "o_lora", "ewc", "lwf"):
        method = METHODS[name]
        assert (method.kind, method.only_trains) == ("training", True)
        assert method.__doc__

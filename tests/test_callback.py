"""``HPACallback`` in transformers' Trainer: with LoRA, accumulation, mixed precision and checkpointing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hpa
from hpa.projection import Basis, ProjectionError, gradient_basis, input_basis

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def samples(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, tiny_models.VOCABULARY - 1, (9,), generator=rng)
        labels = ids.clone()
        labels[:5] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def batched(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: value.unsqueeze(0) for key, value in row.items()} for row in rows]


def arguments(folder: Path, **options) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **settings)


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"]))


def inside(basis: Basis, moved: dict[str, Tensor]) -> float:
    part = sum(basis.slices(name).flatten(1).double() @ change.double().reshape(-1) for name, change in moved.items())
    return float(part.norm() / sum(change.double().square().sum() for change in moved.values()).sqrt())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["plain", "accumulation", "bf16", "checkpointing"],
)
@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "full"])
def test_what_a_trainer_learns_stays_in_the_complement(tmp_path: Path, options: dict, adapters: bool):
    model = tiny_models.llama(layers=2)
    model = lora(model) if adapters else model
    for parameter in model.parameters():  # B = 0 leaves A without gradients
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    basis = gradient_basis(model, batched(samples(4)))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    callback = hpa.HPACallback(basis)
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=samples(16, seed=1), callbacks=[callback])
    trainer.train()
    assert callback.projection.calls == 5
    named = dict(model.named_parameters())
    moved = {name: named[name].detach() - was for name, was in start.items()}
    assert sum(change.norm() for change in moved.values()) > 0.1
    assert inside(basis, moved) < 1e-5  # float32: five steps' rounding of weights about as long as the movement
    assert not callback.projection.optimizer._optimizer_step_pre_hooks


def test_without_the_callback_the_same_training_does_not_stay_there(tmp_path: Path):
    model = lora(tiny_models.llama(layers=2))
    basis = gradient_basis(model, batched(samples(4)))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    Trainer(model, arguments(tmp_path), train_dataset=samples(16, seed=1)).train()
    named = dict(model.named_parameters())
    assert inside(basis, {name: named[name].detach() - was for name, was in start.items()}) > 1e-2


def test_the_edit_at_the_end_is_the_edit_of_adapt(tmp_path: Path):
    safety, task = batched(samples(3, seed=5)), batched(samples(3, seed=6))
    kept = copy.deepcopy(lora(tiny_models.llama()))
    trained = copy.deepcopy(kept)
    Trainer(trained, arguments(tmp_path), train_dataset=samples(16, seed=1)).train()
    expected = hpa.adapt(None, trained, safety=safety, task=task)
    callback = hpa.HPACallback(safety=safety, task=task)
    trainer = Trainer(kept, arguments(tmp_path), train_dataset=samples(16, seed=1), callbacks=[callback])
    trainer.train()
    assert callback.result.edits == expected.edits
    assert len(callback.result.edits) == 21
    for (name, ours), theirs in zip(kept.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_task_after_a_task(tmp_path: Path):
    """Inputs of the first task are protected while the second is learned: its outputs of the first stay put."""
    model = tiny_models.llama(layers=2)
    old = batched(samples(1))
    statistics = {}
    for _, found in hpa.calibrate(model, old, want=("gram",)):
        statistics |= found
    basis = input_basis(model, statistics, energy=1 - 1e-7)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in basis.members)
    before = model(**old[0]).logits.detach()
    for number in (1, 2):
        callback = hpa.HPACallback(basis)
        rows = samples(16, seed=number)
        Trainer(model, arguments(tmp_path), train_dataset=rows, callbacks=[callback]).train()
        assert callback.projection.calls == 5
    assert (model(**old[0]).logits - before).abs().max() < 1e-3
    assert (model(**batched(samples(1, seed=9))[0]).logits.detach() - before).abs().max() > 1e-2


class Removes(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            inner = kwargs["optimizer"]
            getattr(inner, "optimizer", inner)._optimizer_step_pre_hooks.clear()


def test_a_hook_that_was_taken_away_stops_the_training(tmp_path: Path):
    model = tiny_models.llama(layers=1)
    callback = hpa.HPACallback(gradient_basis(model, batched(samples(2))))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=samples(16, seed=1), callbacks=[callback, Removes()])
    with pytest.raises(ProjectionError, match="hook was removed"):
        trainer.train()
    assert callback.projection.calls == 2
    callback.projection.remove()
    with pytest.raises(ValueError, match="expected a basis to project by"):
        hpa.HPACallback()


@pytest.mark.slow
def test_trls_sft_trainer(tmp_path: Path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny_models.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2", unk_token="w0")
    rows = [
        {"prompt": f"w{3 + i} w{4 + i}", "completion": f" w{(7 * i) % 40 + 3} w{(5 * i) % 40 + 3}"} for i in range(32)
    ]
    model = lora(tiny_models.llama(layers=2))
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    basis = gradient_basis(model, batched(samples(3)))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    callback = hpa.HPACallback(basis)
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=True,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, callbacks=[callback]).train()
    assert callback.projection.calls == 4
    named = dict(model.named_parameters())
    assert inside(basis, {name: named[name].detach() - was for name, was in start.items()}) < 1e-5

"""``transformers.Trainer`` with LoRA, one callback: what layers are fed by safety requests stays protected.

    python examples/projection_trainer.py

A small Llama that answers "refuse" to marked requests learns a task by LoRA through Trainer (accumulation, bf16
autocast), once as it is and once with ``HPACallback``.  Prints the losses on the protected requests and on the task,
and what the projection adds to a step.
"""

from __future__ import annotations

import copy
import tempfile
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hpa
from hpa.projection import input_basis

WORDS, REFUSE = 30, 31


def requests(seed: int, count: int, *, harmful: bool) -> list[dict[str, Tensor]]:
    """Rows of three words and an answer: "refuse" to requests that begin with word 30, a word of a table to others."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(0, WORDS, (4,), generator=rng)
        ids[3] = (ids[1] + 3 * ids[2]) % WORDS
        if harmful:
            ids[0], ids[3] = 30, REFUSE
        labels = ids.clone()
        labels[:3] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def loss(model: nn.Module, rows: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return float(model.eval()(**batch(rows)).loss)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    aligned = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(aligned.parameters(), lr=2e-3)
    safety = requests(1, 64, harmful=True)
    for _ in range(60):
        optimizer.zero_grad()
        aligned(**batch(safety)).loss.backward()
        optimizer.step()
    # The task's data are harmful too: requests with word 30 that are answered.
    task = requests(2, 256, harmful=False)
    for row in task[:16]:
        row["input_ids"][0] = 30
    print(f"aligned model: loss on the protected requests {loss(aligned, safety):.3f}")
    for protected in (False, True):
        torch.manual_seed(0)
        adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
        model = get_peft_model(copy.deepcopy(aligned), adapters)
        callbacks = []
        if protected:
            found: dict[str, hpa.InputStatistics] = {}
            for _, block in hpa.calibrate(model, [batch(safety)], want=("gram",)):
                found |= block
            basis = input_basis(model, found, energy=0.95)
            # The A factors are drawn at random: they too have to stay away from the protected inputs.
            with torch.no_grad():
                basis.project_({name: p for name, p in model.named_parameters() if "lora_A" in name})
            callbacks = [hpa.HPACallback(basis)]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=60,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=2,
                learning_rate=3e-3,
                bf16=True,
                use_cpu=True,
                report_to=[],
                log_level="error",
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
            )
            start = time.perf_counter()
            Trainer(model, arguments, train_dataset=task, callbacks=callbacks).train()
            seconds = time.perf_counter() - start
        what = "HPACallback " if protected else "plain Trainer"
        print(f"{what:>14}: protected requests {loss(model, safety):.3f}, task {loss(model, task):.3f}", end="")
        if protected:
            spent = callbacks[0].projection.seconds
            print(f"; {spent / 60 * 1e3:.2f} ms of {seconds / 60 * 1e3:.2f} ms a step went into projecting", end="")
            print(f" (overhead {spent / (seconds - spent):.0%})", end="")
        print()


if __name__ == "__main__":
    main()

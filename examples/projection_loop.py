"""A plain training loop with one line more: old answers are protected while new ones are learned.

    python examples/projection_loop.py                      # OGD: gradients of old answers, one long vector
    python examples/projection_loop.py --space input        # GPM: the directions of old inputs, layer by layer

A small Llama learns a table of 200 old facts, then one of 60 new facts with the same words, unprotected and
with more and more of the old ones protected.  Prints what is left of the old table, how well the new one is learned
(plasticity), the memory of the basis, and what the projection adds to a step.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hpa
from hpa.projection import Basis, gradient_basis, input_basis

WORDS, STEPS, BATCH = 20, 100, 32
Batch = dict[str, Tensor]


def facts(seed: int, marker: int, count: int) -> Batch:
    """``count`` facts: a task's marker, two words, and the answer, the only token with a label."""
    rng = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(WORDS * WORDS, generator=rng)[:count]
    answers = torch.randint(0, WORDS, (count,), generator=rng)
    ids = torch.stack([torch.full((count,), WORDS + marker), pairs // WORDS, pairs % WORDS, answers], dim=1)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def some(table: Batch, index: Tensor) -> Batch:
    return {key: value[index] for key, value in table.items()}


def batches(table: Batch, steps: int, seed: int) -> Iterator[Batch]:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield some(table, torch.randint(0, len(table["input_ids"]), (BATCH,), generator=rng))


def accuracy(model: nn.Module, table: Batch) -> float:
    with torch.no_grad():
        guesses = model(input_ids=table["input_ids"]).logits[:, 2].argmax(-1)
    return float((guesses == table["labels"][:, 3]).float().mean())


def train(
    model: nn.Module, table: Batch, steps: int, basis: Basis | None = None, what: str = "update", rate: float = 5e-4
) -> tuple[float, float]:
    """The loop; returns milliseconds a step, and those of them that went into projecting."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    projection = hpa.project_optimizer(optimizer, basis, what) if basis is not None else None  # the one line
    start = time.perf_counter()
    for batch in batches(table, steps, seed=1):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start
    if projection is not None:
        projection.check(steps=steps)
        projection.remove()
    return seconds / steps * 1e3, projection.seconds / steps * 1e3 if projection is not None else 0.0


def protected(model: nn.Module, old: Batch, space: str, much: float) -> Basis:
    if space == "joint":
        chosen = torch.randperm(len(old["input_ids"]), generator=torch.Generator().manual_seed(2))[: int(much)]
        return gradient_basis(model, (some(old, row.view(1)) for row in chosen))
    found: dict[str, hpa.InputStatistics] = {}
    for _, statistics_of_block in hpa.calibrate(model, [old], want=("gram",)):
        found |= statistics_of_block
    return input_basis(model, found, energy=much)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", choices=("joint", "input"), default="joint")
    parser.add_argument("--what", choices=("update", "gradient"), default="update")
    parser.add_argument("--steps", type=int, default=STEPS)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8,
    )
    base = LlamaForCausalLM(config)
    old, new = facts(seed=3, marker=0, count=200), facts(seed=4, marker=1, count=60)
    train(base, old, 3 * chosen.steps, rate=2e-3)
    print(f"{sum(p.numel() for p in base.parameters()):,} parameters; old facts known: {accuracy(base, old):.0%}")
    # Trained alone, an input space also needs what it does not cover (embeddings, norms, head) held still.
    if chosen.space == "input":
        for name, parameter in base.named_parameters():
            parameter.requires_grad_("_proj.weight" in name)
    levels = [None, 8, 32, 100, 200] if chosen.space == "joint" else [None, 0.5, 0.8, 0.9, 0.97, 0.999]
    what = "old facts" if chosen.space == "joint" else "energy"
    print(f"{what:>10} {'rank':>5} {'old kept':>9} {'new learned':>12} {'basis':>9} {'ms a step':>10} {'overhead':>9}")
    for level in levels:
        model = copy.deepcopy(base)
        basis = None if level is None else protected(model, old, chosen.space, level)
        step, projecting = train(model, new, chosen.steps, basis, chosen.what)
        size = "-" if basis is None else f"{basis.nbytes / 1e6:.2f} MB"
        rank = 0 if basis is None else basis.rank
        print(
            f"{level or 'none':>10} {rank:>5} {accuracy(model, old):>9.0%} {accuracy(model, new):>12.0%} {size:>9} "
            f"{step:>10.2f} {projecting / (step - projecting):>9.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()

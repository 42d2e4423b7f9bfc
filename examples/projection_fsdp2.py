"""FSDP2 with two processes: each keeps its shard of the basis, and a step costs one reduction more.

    torchrun --nproc-per-node 2 examples/projection_fsdp2.py

A small Llama is sharded by ``fully_shard`` and learns random text while 16 gradients of old samples are protected.
Prints how much of the movement lies in the protected space, the memory of the basis in all and in one process, and what
the projection adds to a step.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import hpa
from hpa.projection import gradient_basis

STEPS = 20


def batch(seed: int, size: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 500, (size, 32), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def main() -> None:
    dist.init_process_group("gloo" if not torch.cuda.is_available() else None)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    # Every process takes part with the same samples, and has the whole basis for a moment.
    basis = gradient_basis(model, (batch(seed, 1) for seed in range(16)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    projection = hpa.project_optimizer(optimizer, basis, "update")
    before = {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}
    start = time.perf_counter()
    for step in range(STEPS):
        optimizer.zero_grad()
        mine = {key: value.chunk(world)[rank] for key, value in batch(100 + step, 16).items()}
        model(**mine).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start
    projection.check(steps=STEPS)
    moved = {name: p.full_tensor().detach() - before[name] for name, p in model.named_parameters()}
    inside = sum(basis.slices(name).flatten(1) @ change.reshape(-1) for name, change in moved.items()).norm()
    whole = sum(change.square().sum() for change in moved.values()).sqrt()
    if rank == 0:
        spent = projection.seconds
        print(f"{world} processes, {sum(m.numel for m in basis.members.values()):,} parameters, {basis.rank} gradients")
        print(f"share of the movement in the protected space: {float(inside / whole):.1e}")
        print(f"basis: {basis.nbytes / 1e6:.1f} MB in all, {projection.nbytes / 1e6:.1f} MB in this process")
        print(
            f"{spent / STEPS * 1e3:.1f} ms of {seconds / STEPS * 1e3:.1f} ms a step went into projecting "
            f"(overhead {spent / (seconds - spent):.0%})"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

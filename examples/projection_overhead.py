"""What projecting adds to a training step at the shapes of a model of 135 million parameters (SmolLM2-135M's, random).

    python examples/projection_overhead.py [--rank 32] [--steps 3] [--tokens 1024]

Three cases, whose steps are projected whole (``what="update"``): all linear layers trained, with a basis of each input
space; LoRA of rank 16 with bases of the inputs; and the same with gradients of all factors as one long vector.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hpa
from hpa.projection import Basis


def make() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def filled(basis: Basis, rank: int) -> Basis:
    for key, count in basis.ranks.items():
        assert count == 0
        width = basis.vectors(key).shape[1]
        vectors = torch.randn(rank, width)
        if basis.space == "input":
            basis.add({key: vectors})
        else:
            whole = {
                name: vectors[:, m.offset : m.offset + m.numel].view(-1, *m.shape) for name, m in basis.members.items()
            }
            basis.add(whole)
    return basis


def measure(what: str, model: nn.Module, basis: Basis, steps: int, tokens: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    projection = hpa.project_optimizer(optimizer, basis, "update")
    ids = torch.randint(0, 49152, (max(1, tokens // 256), min(tokens, 256)))
    whole, spent = [], []
    for _ in range(steps + 1):
        start, before = time.perf_counter(), projection.seconds
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        whole.append(time.perf_counter() - start)
        spent.append(projection.seconds - before)
    projection.remove()
    step, share = statistics.median(whole[1:]), statistics.median(spent[1:])
    print(
        f"{what:<38} {sum(m.numel for m in basis.members.values()) / 1e6:>7.1f} M {basis.nbytes / 1e6:>9.1f} MB "
        f"{step:>7.2f} s {share * 1e3:>8.1f} ms {share / (step - share):>8.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    print(f"{'trained':<38} {'protected':>9} {'basis':>12} {'step':>9} {'projecting':>11} {'overhead':>8}")
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj.weight" in name)
    basis = filled(Basis(model, "input"), chosen.rank)
    measure("all linear layers, input spaces", model, basis, chosen.steps, chosen.tokens)
    model.requires_grad_(True)
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    wrapped = get_peft_model(model, adapters)
    factors = {name: p for name, p in wrapped.named_parameters() if "lora_A" in name}
    basis = filled(Basis(factors, "input"), chosen.rank)
    measure("LoRA of rank 16, input spaces of A", wrapped, basis, chosen.steps, chosen.tokens)
    basis = filled(Basis(wrapped, "joint"), chosen.rank)
    measure("LoRA of rank 16, one long vector", wrapped, basis, chosen.steps, chosen.tokens)


if __name__ == "__main__":
    main()

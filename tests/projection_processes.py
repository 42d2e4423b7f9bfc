"""Run by ``test_projection_distributed.py`` under torchrun's environment: one process of a distributed training.

    python projection_processes.py OUT WAYS CASE ...

trains a small net for a few steps on the same global batches, whatever the number of processes, and writes the weights:
for each way (``ddp``, ``fsdp2``; ``misuse`` tries what must be refused) and case (``space:what:dtype``).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hpa
from hpa.projection import Basis, ProjectionError, gather, gradient_basis
from hpa.projection.apply import ShardedBasis
from hpa.storage import save_tensors

GLOBAL_BATCH = 12
DTYPE = torch.float64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(5, 7, dtype=DTYPE)  # 7 rows: shards of unequal size
        self.two = nn.Linear(7, 4, dtype=DTYPE)  # 4 rows: the third of three processes holds nothing
        self.unused = nn.Parameter(torch.ones(4, dtype=DTYPE))

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def global_batch(step: int):
    rng = torch.Generator().manual_seed(step)
    return torch.randn(GLOBAL_BATCH, 5, generator=rng, dtype=DTYPE), torch.randn(
        GLOBAL_BATCH, 4, generator=rng, dtype=DTYPE
    )


def my_part(tensor):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return tensor.chunk(world)[rank]


def make_basis(model: nn.Module, space: str, dtype: torch.dtype) -> Basis:
    named = {n: p for n, p in model.named_parameters() if p.ndim == 2 or space in ("joint", "parameter")}
    basis = Basis(named, space, dtype=dtype)
    rng = torch.Generator().manual_seed(1)
    vectors = {}
    for name, parameter in named.items():
        shape = {"input": parameter.shape[1:], "output": parameter.shape[:1]}.get(space, parameter.shape)
        vectors[name] = torch.randn((2, *shape), generator=rng, dtype=DTYPE)
    basis.add(vectors)
    return basis


def train(how: str, space: str, what: str, dtype: str) -> dict[str, torch.Tensor]:
    model = bare = Net()
    if how == "fsdp2":
        fully_shard(model.one)
        fully_shard(model)
    elif how == "ddp":
        model = DistributedDataParallel(bare, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    basis = make_basis(model, space, getattr(torch, dtype))
    collectives = {"now": 0}
    real = dist.all_reduce

    def counting(*args, **kwargs):
        collectives["now"] += 1
        return real(*args, **kwargs)

    dist.all_reduce = counting
    projection = hpa.project_optimizer(optimizer, basis, what)
    for step in range(4):
        optimizer.zero_grad()
        x, y = global_batch(step)
        F.mse_loss(model(my_part(x)), my_part(y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        collectives["now"] = 0
        optimizer.step()
        if how == "fsdp2":
            # One for all layers, also where nothing but "no NaN here" has to be told; and once, for a joint basis
            # whose unused parameter has no gradient, its Gram matrix.
            expected = projection._parts[0][1].passes + (space == "joint" and step == 0)
            assert collectives["now"] == expected, (step, collectives["now"])
    dist.all_reduce = real
    projection.check(steps=4)
    projection.remove()
    if how == "fsdp2":
        part = projection._parts[0][1]
        assert isinstance(part, ShardedBasis)
        if space in ("joint", "parameter"):
            assert part.nbytes < 0.75 * basis.nbytes, "each process keeps its own part of the basis"
    return {name: p.full_tensor() if how == "fsdp2" else p.detach() for name, p in bare.named_parameters()}


def misuse(rank: int) -> None:
    """NaN in one process is an error in all of them; bases that differ are refused; gather makes them one."""
    model = Net()
    fully_shard(model)
    basis = make_basis(model, "input", DTYPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projection = hpa.project_optimizer(optimizer, basis)
    before = [p.to_local().clone() for p in model.parameters()]
    x, y = global_batch(0)
    F.mse_loss(model(my_part(x)), my_part(y)).backward()
    if rank == 1:
        model.one.weight.grad.to_local()[0, 0] = float("nan")
    with pytest.raises(ProjectionError, match="one.weight" if rank == 1 else "another process"):
        optimizer.step()
    assert all(torch.equal(p.to_local(), was) for p, was in zip(model.parameters(), before, strict=True))
    projection.remove()

    plain = Net()
    different = Basis(plain, "joint", dtype=DTYPE)
    rng = torch.Generator().manual_seed(rank)
    different.add({n: torch.randn(p.shape, generator=rng, dtype=DTYPE) for n, p in plain.named_parameters()})
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.raises(ProjectionError, match="not the same in all"):
        hpa.project_optimizer(optimizer, different)
    together = gather(different)
    assert together.rank == dist.get_world_size()
    for other in range(dist.get_world_size()):
        rng = torch.Generator().manual_seed(other)
        vector = {n: torch.randn(p.shape, generator=rng, dtype=DTYPE) for n, p in plain.named_parameters()}
        together.project_(vector)
        assert max(float(value.abs().max()) for value in vector.values()) < 1e-12
    hpa.project_optimizer(optimizer, together).remove()

    # Gradients of sharded parameters make a whole basis everywhere.
    def objective(net: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return net(batch["x"]).sum()

    model.one.weight.grad = None
    kept = model.two.weight.grad
    sharded = gradient_basis(model, [{"x": x}], objective=objective, dtype=DTYPE)
    alone = gradient_basis(Net(), [{"x": x}], objective=objective, dtype=DTYPE)
    assert sharded.names == alone.names
    torch.testing.assert_close(sharded.vectors(), alone.vectors())
    assert model.one.weight.grad is None
    assert model.two.weight.grad is kept, "gradients that were there stay"


def main() -> None:
    out, ways, cases = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for how in ways:
        if how == "misuse":
            misuse(dist.get_rank())
            continue
        for case in cases:
            weights = train(how, *case.split(":"))
            if dist.get_rank() == 0:
                save_tensors(out / f"{how}-{case.replace(':', '-')}.safetensors", weights)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""One line in a training loop: what it guarantees over many steps, in which loops, and what misuse it stops."""

from __future__ import annotations

import copy
import gc
import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hpa
from hpa.projection import Basis, ProjectionError, project_optimizer
from hpa.projection.optimizer import _WATCH, _WATCHED, _finite


@pytest.fixture(autouse=True)
def nothing_left_watched():
    yield
    for projection in list(_WATCHED):
        projection.remove()
    assert not _WATCH


class Net(nn.Module):
    def __init__(self, seed: int = 0, dtype=torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.one = nn.Linear(6, 9, dtype=dtype)
            self.two = nn.Linear(9, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def data(seed: int, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=rng).to(dtype), torch.randn(8, 4, generator=rng).to(dtype)


def loss_of(model: nn.Module, seed: int, dtype=torch.float64) -> Tensor:
    x, y = data(seed, dtype)
    return F.mse_loss(model(x), y)


def a_basis(model: nn.Module, space: str = "joint", rank: int = 3, dtype=torch.float64) -> Basis:
    named = {n: p for n, p in model.named_parameters() if p.ndim == 2 or space in ("joint", "parameter")}
    basis = Basis(named, space, dtype=dtype)
    rng = torch.Generator().manual_seed(1)
    vectors = {}
    for name, parameter in named.items():
        shape = {"input": parameter.shape[1:], "output": parameter.shape[:1]}.get(space, parameter.shape)
        vectors[name] = torch.randn((rank, *shape), generator=rng).to(dtype)
    basis.add(vectors)
    return basis


def leak(model: nn.Module, start: dict[str, Tensor], basis: Basis) -> float:
    """The share of the whole movement that lies in the protected space, from the basis's own vectors."""
    moved = {name: dict(model.named_parameters())[name].detach() - start[name] for name in basis.members}
    inside = 0.0
    if basis.space == "joint":
        inside = sum((basis.slices(n).flatten(1) @ m.reshape(-1)) for n, m in moved.items()).square().sum()
    for name, change in moved.items() if basis.space != "joint" else ():
        vectors = basis.vectors(name)
        if basis.space == "parameter":
            part = vectors @ change.reshape(-1)
        else:
            part = change @ vectors.T if basis.space == "input" else vectors @ change
        inside += part.square().sum()
    return float((inside / sum(change.square().sum() for change in moved.values())).sqrt())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "sgd with decay": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.5),
}
EXACT_WITH_GRADIENTS = {"sgd", "momentum"}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("space", ["joint", "parameter", "input", "output"])
def test_a_hundred_updates_stay_in_the_complement_and_projected_gradients_alone_do_not(name: str, space: str):
    leaks, losses = {}, {}
    for what in ("update", "gradient"):
        model = Net()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = OPTIMIZERS[name](model.parameters())
        basis = a_basis(model, space)
        projection = hpa.project_optimizer(optimizer, basis, what=what)
        for step in range(100):
            optimizer.zero_grad()
            loss = loss_of(model, step % 4)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        projection.check(steps=100)
        leaks[what], losses[what] = leak(model, start, basis), loss.item()
        projection.remove()
    assert leaks["update"] < 1e-13
    if name in EXACT_WITH_GRADIENTS:
        assert leaks["gradient"] < 1e-13
    else:
        assert leaks["gradient"] > 1e-2
    assert losses["update"] < loss_of(Net(), 3).item()  # and it learns


def test_the_projected_step_is_the_optimizers_step_minus_its_part_in_the_space():
    models = [Net(), Net()]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.3) for m in models]
    basis = a_basis(models[1])
    project_optimizer(optimizers[1], basis, "update")
    start = torch.cat([p.detach().reshape(-1) for p in models[0].parameters()])
    for model, optimizer in zip(models, optimizers, strict=True):
        loss_of(model, 0).backward()
        optimizer.step()
    free, held = (torch.cat([p.detach().reshape(-1) for p in m.parameters()]) - start for m in models)
    vectors = basis.vectors()
    torch.testing.assert_close(held, free - vectors.T @ (vectors @ free), rtol=0, atol=1e-14)


def test_it_runs_once_a_step_with_accumulation_and_on_the_whole_sum():
    model, twin = Net(), Net()
    basis = a_basis(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projection = project_optimizer(optimizer, basis)
    for seed in range(4):
        loss_of(model, seed).backward()
        loss_of(twin, seed).backward()
    optimizer.step()
    assert projection.calls == 1
    gradient = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
    vectors = basis.vectors()
    expected = torch.cat([p.detach().reshape(-1) for p in twin.parameters()]) - 0.1 * (
        gradient - vectors.T @ (vectors @ gradient)
    )
    torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in model.parameters()]), expected)


@pytest.mark.parametrize("what", ["gradient", "update"])
def test_frozen_parameters_and_missing_gradients(what: str):
    model = Net()
    basis = a_basis(model)
    model.one.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    projection = project_optimizer(optimizer, basis, what)
    assert "one.bias" not in projection.names
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss_of(model, 0).backward()
    model.two.bias.grad = None
    optimizer.step()
    moved = {n: p.detach() - start[n] for n, p in model.named_parameters()}
    assert not moved["one.bias"].any()
    assert not moved["two.bias"].any(), "what has no gradient is not moved on behalf of the others"
    if what == "update":
        assert leak(model, start, basis) < 1e-13
    # No gradient at all: a step of nothing, counted.
    optimizer.zero_grad()
    optimizer.step()
    assert projection.calls == 2


def test_a_closure_is_projected_as_often_as_the_optimizer_calls_it():
    model = Net()
    basis = a_basis(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=8)
    projection = project_optimizer(optimizer, basis)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert optimizer.step(closure=closure).item() < first
    assert projection.calls == 2
    assert leak(model, start, basis) < 1e-13


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("what", ["gradient", "update"])
def test_compiled_models_and_compiled_steps(what: str):
    model = Net()
    basis = a_basis(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.05, momentum=0.5)
    projection = project_optimizer(optimizer, basis, what)
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(4):
        optimizer.zero_grad()
        loss_of(compiled, number).backward()
        step()
    projection.check(steps=4)
    assert projection.seconds > 0
    assert leak(model, start, basis) < 1e-13


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler_that_skips_a_step_and_unscales_the_next(fused: bool):
    model = Net(dtype=torch.float32)
    basis = a_basis(model, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    projection = project_optimizer(optimizer, basis)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(loss_of(model, 0, torch.float32)).backward()
    model.one.weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert projection.calls == 0
    optimizer.zero_grad()
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, 1, torch.float32)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert projection.calls == 1
    gradient = torch.cat(
        [(was - p.detach()).reshape(-1) / 0.1 for p, was in zip(model.parameters(), before, strict=True)]
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(twin, 1, torch.float32).backward()
    free = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
    vectors = basis.vectors()
    torch.testing.assert_close(
        gradient, free - vectors.T @ (vectors @ free), rtol=0, atol=2e-3 * float(free.abs().max())
    )


# ---------------------------------------------------------------------------------------------------------- misuse


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    optimizer.step()


def test_a_stale_optimizer_is_caught_at_its_first_step():
    model = Net()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    projection = project_optimizer(old, a_basis(model))
    step(model, old)
    rebuilt = torch.optim.Adam(model.parameters())
    with pytest.raises(ProjectionError, match=r"by Adam, another optimizer than the projected one"):
        step(model, rebuilt)
    # Also where the old one is gone, and its handle was never kept.
    del old, projection
    gc.collect()
    with pytest.raises(ProjectionError, match="another optimizer"):
        step(model, rebuilt)
    taken = project_optimizer(rebuilt, a_basis(model))
    step(model, rebuilt)
    assert taken.calls == 1
    other = Net(seed=1)
    step(other, torch.optim.SGD(other.parameters(), lr=0.1))  # is no business of the projection's


def test_the_former_optimizer_is_caught_after_another_took_over():
    model = Net()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    former = project_optimizer(first, a_basis(model))
    project_optimizer(second, a_basis(model))
    step(model, second)
    with pytest.raises(ProjectionError, match="another optimizer"):
        step(model, first)
    with pytest.raises(ProjectionError, match="another optimizer of its parameters was projected since"):
        former.check()


@pytest.mark.parametrize(
    ("what", "hooks"),
    [
        ("gradient", "_optimizer_step_pre_hooks"),
        ("update", "_optimizer_step_pre_hooks"),
        ("update", "_optimizer_step_post_hooks"),
    ],
)
def test_a_removed_hook_is_caught(what: Literal["gradient", "update"], hooks: str):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projection = project_optimizer(optimizer, a_basis(model), what)
    step(model, optimizer)
    getattr(optimizer, hooks).clear()
    with pytest.raises(ProjectionError, match="hook was removed"):
        step(model, optimizer)
    with pytest.raises(ProjectionError, match="hook was removed"):
        projection.check()
    projection.remove()
    step(model, optimizer)
    with pytest.raises(ProjectionError, match="not in force"):
        projection.check()


def test_the_count_of_steps_and_the_end_of_a_block_are_checked():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with project_optimizer(optimizer, a_basis(model)) as projection:
        step(model, optimizer)
        with pytest.raises(ProjectionError, match="expected 2 projected steps, counted 1"):
            projection.check(steps=2)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(ProjectionError, match="hook was removed"), project_optimizer(optimizer, a_basis(model)):
        optimizer._optimizer_step_pre_hooks.clear()


@pytest.mark.parametrize("what", ["gradient", "update"])
def test_nan_is_loud_and_the_parameters_are_as_they_were(what: str):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    projection = project_optimizer(optimizer, a_basis(model), what)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 0).backward()
    model.two.weight.grad[1, 2] = float("nan")
    with pytest.raises(ProjectionError, match=r"step 1 holds NaN or Inf \(two.weight\)"):
        optimizer.step()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert projection.calls == 0


def test_huge_gradients_are_not_taken_for_infinite_ones():
    model = Net(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    projection = project_optimizer(optimizer, a_basis(model, dtype=torch.float32))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e25)
    optimizer.step()
    assert projection.calls == 1


def test_a_basis_of_another_size_is_refused():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrong = Basis({"one.weight": (9, 7)})
    with pytest.raises(ValueError, match=r"one.weight: the basis was made for .* shape \(9, 7\), got \(9, 6\)"):
        project_optimizer(optimizer, wrong, parameters=model)
    with pytest.raises(ValueError, match="pass parameters=model"):
        project_optimizer(optimizer, wrong)
    with pytest.raises(ValueError, match=r"three.weight of the basis is not among"):
        project_optimizer(optimizer, Basis({"three.weight": (9, 6)}), parameters=model)


def test_an_optimizer_of_other_parameters_is_refused():
    model = Net()
    basis = a_basis(model)
    elsewhere = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"does not step one.weight"):
        project_optimizer(elsewhere, basis)
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got object"):
        project_optimizer(object(), basis)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="what: expected one of gradient, update, got 'grad'"):
        project_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), basis, "grad")  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    project_optimizer(optimizer, basis)
    with pytest.raises(ValueError, match="is projected already"):
        project_optimizer(optimizer, basis)


def test_names_that_an_optimizer_knows_will_do(tmp_path):
    model = Net()
    a_basis(model).save(tmp_path / "basis.safetensors")
    basis = Basis.load(tmp_path / "basis.safetensors")
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    assert project_optimizer(named, basis).names == list(dict(model.named_parameters()))
    again = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = torch.compile(model, backend="eager")
    assert project_optimizer(again, basis, parameters=wrapped).names == list(dict(model.named_parameters()))


def test_two_bases_without_a_common_parameter_work_side_by_side():
    model = Net()
    one = Basis({"one.weight": model.one.weight}, "input", dtype=torch.float64)
    two = Basis({"two.weight": model.two.weight}, "output", dtype=torch.float64)
    one.add({"one.weight": torch.ones(6)})
    two.add({"two.weight": torch.ones(4)})
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    project_optimizer(optimizer, [one, two], "update")
    step(model, optimizer)
    assert leak(model, start, one) < 1e-13
    assert leak(model, start, two) < 1e-13
    fresh = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="stands in two of the bases"):
        project_optimizer(fresh, [one, Basis({"one.weight": model.one.weight})])


def test_what_cannot_be_hooked_is_refused_with_what_to_do():
    class DeepSpeedZeroOptimizer:
        pass

    class AcceleratedOptimizer:
        def __init__(self, optimizer) -> None:
            self.optimizer = optimizer

    AcceleratedOptimizer.__module__ = "accelerate.optimizer"
    model = Net()
    for refused in (DeepSpeedZeroOptimizer(), AcceleratedOptimizer(DeepSpeedZeroOptimizer())):
        with pytest.raises(TypeError, match="DeepSpeed partitions gradients.*FSDP2"):
            project_optimizer(refused, a_basis(model))  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projection = project_optimizer(AcceleratedOptimizer(optimizer), a_basis(model))  # type: ignore[arg-type]
    assert projection.optimizer is optimizer
    projection.remove()
    model.one.weight.ds_id = 3
    with pytest.raises(TypeError, match="ZeRO 3"):
        project_optimizer(optimizer, a_basis(model))
    del model.one.weight.ds_id
    model.one.weight._is_flat_param = True
    with pytest.raises(TypeError, match="FSDP1"):
        project_optimizer(optimizer, a_basis(model))
    sparse = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    project_optimizer(optimizer, Basis(sparse))
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="weight: expected a dense gradient"):
        optimizer.step()


@pytest.mark.parametrize("basis", [3, [], ["joint"], None])
def test_what_is_no_basis_is_told(basis: object):
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"basis: expected a Basis or several, got \w+"):
        project_optimizer(optimizer, basis)  # type: ignore[arg-type]


def test_nothing_is_watched_once_a_model_is_gone():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    project_optimizer(optimizer, a_basis(model))
    assert len(_WATCHED) == 1
    del model, optimizer
    gc.collect()
    assert not _WATCHED
    assert not _WATCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_finite_is_told_from_what_is_not_also_where_sums_run_over(dtype: torch.dtype) -> None:
    most, inf, nan = torch.finfo(dtype).max, math.inf, math.nan
    for values, finite in (
        ([most, most], True),
        ([], True),
        ([0.0, -0.0], True),
        ([inf, -inf], False),
        ([most, most, -inf], False),
        ([nan, 1.0], False),
    ):
        tensors = [torch.zeros(3, dtype=dtype), torch.tensor(values, dtype=dtype)]
        assert _finite(tensors) is finite, values

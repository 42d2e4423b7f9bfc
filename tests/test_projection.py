"""Bases that grow, and where they come from: against float64 linear algebra of the same statements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor, nn

import hpa
from hpa.calibration import calibrate
from hpa.layers import InputStatistics, LowRankUpdate
from hpa.projection import (
    Basis,
    CapacityError,
    answer_logit,
    answer_loss,
    gradient_basis,
    input_basis,
    lora_basis,
    weight_basis,
)

SHAPES = {"a.weight": (3, 5), "b": (), "c.bias": (7,)}
ROUNDING = 2.0**-23


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(shapes: dict[str, tuple[int, ...]], seed: int, dtype=torch.float32) -> dict[str, Tensor]:
    rng = generator(seed)
    return {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in shapes.items()}


def flat(tensors: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([tensors[name].double().reshape(-1).numpy() for name in SHAPES])


def complement(vectors: np.ndarray) -> np.ndarray:
    """The projector onto the complement of the rows, from an SVD."""
    _, values, right = np.linalg.svd(vectors, full_matrices=False)
    span = right[values > 1e-9 * values.max()]
    return np.eye(vectors.shape[1]) - span.T @ span


@pytest.mark.parametrize("seed", range(4))
def test_a_joint_projection_is_the_projector_of_all_vectors_ever_added(seed: int):
    basis = Basis(SHAPES)
    added = [draw(SHAPES, 10 * seed + number) for number in range(5)]
    basis.add(added[0])
    basis.add(added[1:4])
    basis.add({name: torch.stack([added[4][name], 2 * added[0][name]]) for name in SHAPES})  # one of two is new
    assert basis.ranks == {"joint": 5}
    gradient = draw(SHAPES, 10 * seed + 9)
    expected = complement(np.stack([flat(vector) for vector in added])) @ flat(gradient)
    basis.project_(gradient)
    np.testing.assert_allclose(flat(gradient), expected, atol=50 * ROUNDING)


def test_energies_are_the_squared_lengths_along_each_direction():
    basis = Basis(SHAPES, dtype=torch.float64)
    added = [draw(SHAPES, number, torch.float64) for number in range(4)]
    basis.add(added[:2])
    basis.add(added[2:])
    everything = np.stack([flat(vector) for vector in added])
    along = (everything @ basis.vectors().numpy().T) ** 2
    np.testing.assert_allclose(basis.energies().numpy(), along.sum(0), rtol=1e-12)
    np.testing.assert_allclose(float(basis.energies().sum()), (everything**2).sum(), rtol=1e-12)


def test_missing_parameters_of_a_joint_vector_leave_the_rest_in_its_own_complement():
    basis = Basis(SHAPES, dtype=torch.float64)
    vectors = [draw(SHAPES, number, torch.float64) for number in range(4)]
    basis.add(vectors)
    gradient = draw(SHAPES, 9, torch.float64)
    rest = {"a.weight": gradient["a.weight"].clone(), "b": gradient["b"].clone(), "c.bias": None}
    basis.project_(rest)
    parts = np.stack([flat(vector)[:16] for vector in vectors])
    expected = complement(parts) @ flat(gradient)[:16]
    got = np.concatenate([rest["a.weight"].reshape(-1).numpy(), rest["b"].reshape(-1).numpy()])
    np.testing.assert_allclose(got, expected, atol=1e-12)
    # The sum over what is there, which leaves this out, would not do.
    plain = flat(gradient)[:16] - basis.vectors()[:, :16].numpy().T @ (
        basis.vectors()[:, :16].numpy() @ flat(gradient)[:16]
    )
    assert np.abs(parts @ plain).max() > 1e-2
    # Another set of names, then all of them: nothing of the former is kept.
    only = {"c.bias": gradient["c.bias"].clone()}
    basis.project_(only)
    np.testing.assert_allclose(
        only["c.bias"].numpy(), complement(np.stack([flat(v)[16:] for v in vectors])) @ flat(gradient)[16:], atol=1e-12
    )
    basis.add(draw(SHAPES, 30, torch.float64))
    only = {"c.bias": gradient["c.bias"].clone()}
    basis.project_(only)
    more = np.stack([flat(v)[16:] for v in [*vectors, draw(SHAPES, 30, torch.float64)]])
    np.testing.assert_allclose(only["c.bias"].numpy(), complement(more) @ flat(gradient)[16:], atol=1e-12)


@pytest.mark.parametrize("space", ["parameter", "input", "output"])
def test_projections_of_each_parameter_by_itself(space: str):
    shapes = {"one": (4, 6), "two": (5, 3), "three": (4, 2, 3)}
    basis = Basis(shapes, space, dtype=torch.float64)
    rng = generator(3)
    sizes = {
        "parameter": shapes,
        "input": {"one": (6,), "two": (3,), "three": (6,)},
        "output": {"one": (4,), "two": (5,), "three": (4,)},
    }[space]
    vectors = {n: torch.randn((2, *s), generator=rng, dtype=torch.float64) for n, s in sizes.items()}
    basis.add(vectors)
    gradients = {n: torch.randn(s, generator=rng, dtype=torch.float64) for n, s in shapes.items()}
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    gradients["three"] = gradients["three"].permute(0, 2, 1).contiguous().permute(0, 2, 1)  # no view as a matrix
    basis.project_(gradients)
    for name in shapes:
        projector = complement(vectors[name].reshape(2, -1).numpy())
        matrix = before[name].reshape(shapes[name][0], -1).numpy()
        if space == "parameter":
            expected = projector @ matrix.reshape(-1)
        else:
            expected = matrix @ projector if space == "input" else projector @ matrix
        np.testing.assert_allclose(gradients[name].numpy().reshape(-1), expected.reshape(-1), atol=1e-13)


def test_dependent_vectors_are_dropped_and_counted():
    basis = Basis({"w": (50,)}, "parameter")
    vectors = torch.randn(3, 50, generator=generator())
    growth = basis.add({"w": torch.cat([vectors, vectors[:1] + vectors[1:2], torch.zeros(1, 50)])})
    assert (growth.kept, growth.dropped) == ({"w": 3}, {"w": 2})
    # In half precision what is left of a nearly dependent vector is noise of its rounding.
    near = (vectors.sum(0) + 3e-3 * torch.randn(50, generator=generator(1))).to(torch.bfloat16)
    assert basis.add({"w": near}).dropped == {"w": 1}
    assert basis.add({"w": near.float()}).kept == {"w": 1}


def test_orthogonality_survives_hundreds_of_badly_conditioned_additions():
    n = 300
    basis = Basis({"w": (n,)}, "parameter")
    common = torch.randn(n, generator=generator())
    for number in range(60):
        basis.add({"w": common + 1e-2 * torch.randn(3, n, generator=generator(number))})
    vectors = basis.vectors().double()
    assert vectors.shape[0] == 180
    assert (vectors @ vectors.T - torch.eye(180)).abs().max() < 1e-6


def test_capacity_is_enforced_and_nothing_is_added_beyond_it():
    basis = Basis({"u": (20,), "w": (30,)}, "parameter", capacity=4)
    basis.add({"w": torch.randn(3, 30, generator=generator())})
    kept = basis.vectors("w").clone()
    with pytest.raises(CapacityError, match="'w' holds 3 directions and would hold 5, more than its capacity of 4"):
        basis.add({"u": torch.randn(1, 20), "w": torch.randn(2, 30, generator=generator(1))})
    assert torch.equal(basis.vectors("w"), kept)
    assert basis.ranks == {"u": 0, "w": 3}
    basis.add({"w": torch.cat([kept, torch.randn(1, 30, generator=generator(1))])})  # what is known takes no room
    assert basis.ranks["w"] == 4
    full = Basis({"w": (4,)}, "parameter")
    with pytest.raises(CapacityError, match="every update would vanish"):
        full.add({"w": torch.eye(4)})
    full.add({"w": torch.eye(4)[:3]})
    with pytest.raises(CapacityError):
        full.add({"w": torch.eye(4)[3]})


def test_energy_keeps_as_few_principal_directions_as_hold_the_share():
    rng = generator(5)
    left = torch.linalg.qr(torch.randn(8, 8, generator=rng, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(40, 8, generator=rng, dtype=torch.float64)).Q.T
    values = torch.tensor([8.0, 4, 2, 1, 0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    matrix = left @ (values[:, None] * right)
    basis = Basis({"w": (40,)}, "parameter", dtype=torch.float64)
    basis.add({"w": matrix}, energy=0.95)  # 64 + 16 of 85.3 is 0.938, with 4 it is 0.985
    np.testing.assert_allclose((basis.vectors() @ right.T).abs().numpy(), np.eye(3, 8), atol=1e-7)
    assert basis.add({"w": matrix}, energy=0.98).kept == {"w": 0}, "what the basis holds counts"
    assert basis.add({"w": matrix}, energy=0.99).kept == {"w": 1}
    wide = torch.cat([matrix, matrix, matrix, matrix, matrix, matrix])  # more vectors than dimensions
    again = Basis({"w": (40,)}, "parameter", dtype=torch.float64)
    again.add({"w": wide}, energy=0.95)
    np.testing.assert_allclose((again.vectors() @ right.T).abs().numpy(), np.eye(3, 8), atol=1e-7)
    assert basis.truncate(energy=0.95) == 1
    assert basis.truncate(rank=2) == 1
    np.testing.assert_allclose((basis.vectors() @ right.T).abs().numpy(), np.eye(2, 8), atol=1e-7)


def test_half_precision_storage_projects_to_its_rounding():
    fine, coarse = Basis(SHAPES), Basis(SHAPES, dtype=torch.bfloat16)
    vectors = [draw(SHAPES, number) for number in range(6)]
    for basis in (fine, coarse):
        basis.add(vectors)
    assert coarse.nbytes * 2 == fine.nbytes
    ours, exact = draw(SHAPES, 9), draw(SHAPES, 9)
    coarse.project_(ours)
    fine.project_(exact)
    # Each stored vector is off by at most half a unit in the last place, 2^-9 of its length, and there are six.
    assert np.linalg.norm(flat(ours) - flat(exact)) < 6 * 2**-8 * np.linalg.norm(flat(exact))
    # Two passes take out all that the stored vectors span.
    assert np.abs(coarse.vectors().double().numpy() @ flat(ours)).max() < 1e-3 * np.linalg.norm(flat(ours))


@pytest.mark.parametrize("space", ["joint", "parameter", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_basis_is_the_same_basis(tmp_path: Path, space: str, dtype: torch.dtype):
    shapes = {"q": (4, 6), "k": (2, 6), "o": (6, 4)}
    groups = {"q": "in", "k": "in", "o": "o"} if space == "input" else None
    basis = Basis(shapes, space, capacity=3, dtype=dtype, groups=groups)
    if space == "input":
        basis.add({"in": torch.randn(2, 6, generator=generator()), "o": torch.randn(4, generator=generator())})
    else:
        basis.add(draw(shapes, 1))
    basis.save(tmp_path / "basis.safetensors")
    again = Basis.load(tmp_path / "basis.safetensors")
    assert (again.space, again.capacity, again.dtype, again.members) == (space, 3, dtype, basis.members)
    for key in basis.ranks:
        assert torch.equal(again.vectors(key), basis.vectors(key))
        assert torch.equal(again.energies(key), basis.energies(key))
    (tmp_path / "other.safetensors").write_bytes((tmp_path / "basis.safetensors").read_bytes()[:-40])
    with pytest.raises(Exception, match="(?i)incomplete|invalid|header|metadata"):
        Basis.load(tmp_path / "other.safetensors")
    hpa.storage.save_tensors(tmp_path / "no.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"expected a file of Basis\.save"):
        Basis.load(tmp_path / "no.safetensors")


def test_merging_is_adding_what_the_other_one_saw():
    one, two = [draw(SHAPES, number) for number in range(2)], [draw(SHAPES, number) for number in range(1, 4)]
    first, second, both = Basis(SHAPES), Basis(SHAPES), Basis(SHAPES)
    first.add(one)
    second.add(two)
    both.add(one)
    both.add(two)
    growth = first.merge(second)
    assert growth.kept == {"joint": 2}  # one of the three was known
    gradient, expected = draw(SHAPES, 9), draw(SHAPES, 9)
    first.project_(gradient)
    both.project_(expected)
    np.testing.assert_allclose(flat(gradient), flat(expected), atol=50 * ROUNDING)
    np.testing.assert_allclose(float(first.energies().sum()), float(both.energies().sum()), rtol=1e-5)
    grouped = Basis({"q": (2, 6), "k": (3, 6)}, "input", groups={"q": "in", "k": "in"})
    apart = Basis({"q": (2, 6), "k": (3, 6)}, "input")
    apart.add({"q": torch.eye(6)[0], "k": torch.eye(6)[1]})
    grouped.merge(apart)
    assert grouped.ranks == {"in": 2}


def test_wrong_arguments_are_named():
    basis = Basis(SHAPES)
    with pytest.raises(ValueError, match=r"other: not a parameter of this basis \(it has 3: a.weight, b, c.bias"):
        basis.add({"other": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"vectors: a.weight: expected \(3, 5\) or \(k, 3, 5\), got \(5, 3\)"):
        basis.add({"a.weight": torch.zeros(5, 3)})
    with pytest.raises(ValueError, match="number 1 of 'joint' holds NaN or Inf"):
        basis.add([draw(SHAPES, 0), {"b": torch.tensor(float("nan"))}])
    assert basis.rank == 0
    with pytest.raises(
        ValueError, match=r"a.weight: the basis was made for a parameter of shape \(3, 5\), got \(3, 6\)"
    ):
        basis.project_({"a.weight": torch.zeros(3, 6)})
    with pytest.raises(ValueError, match="b has shape"):
        Basis(SHAPES, "input")
    with pytest.raises(ValueError, match="space: expected one of joint, parameter, input, output, got 'rows'"):
        Basis(SHAPES, "rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capacity: expected a positive number"):
        Basis(SHAPES, capacity=0)
    with pytest.raises(ValueError, match="got none"):
        Basis(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="energy: expected a share"):
        basis.add(draw(SHAPES, 0), energy=1.5)


# ---------------------------------------------------------------------------------------------------------- builders


def batches_for(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    rng = generator(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, tiny_models.VOCABULARY - 1, (1, 9), generator=rng)
        labels = ids.clone()
        labels[:, :5] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


@pytest.mark.parametrize("objective", [answer_logit, answer_loss])
def test_a_step_in_the_complement_of_gradients_changes_old_samples_to_second_order_only(objective):
    model = tiny_models.llama(layers=2).double()
    old = batches_for(3)
    basis = gradient_basis(model, old, objective=objective, dtype=torch.float64)
    assert basis.ranks == {"joint": 3}
    names = dict(model.named_parameters())
    direction = {name: torch.randn(p.shape, generator=generator(7), dtype=torch.float64) for name, p in names.items()}
    free = {name: value.clone() for name, value in direction.items()}
    basis.project_(free)

    def change(step: dict[str, Tensor], size: float) -> float:
        moved = {name: p.detach() + size * step[name] for name, p in names.items()}
        total = 0.0
        for batch in old:
            with torch.no_grad():
                was = objective(model, batch)
            now = torch.func.functional_call(
                _Called(model, objective), {f"model.{n}": v for n, v in moved.items()}, batch
            )
            total += float((now - was).abs())
        return total

    assert change(free, 1e-3) / change(free, 5e-4) == pytest.approx(4.0, rel=0.1)  # second order
    assert change(direction, 1e-3) / change(direction, 5e-4) == pytest.approx(2.0, rel=0.1)  # first order
    assert change(direction, 1e-4) > 20 * change(free, 1e-4)


class _Called(nn.Module):
    def __init__(self, model: nn.Module, objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch) -> Tensor:
        return self.objective(self.model, batch)


def test_gradients_of_a_frozen_part_are_not_asked_for():
    model = tiny_models.llama()
    model.model.embed_tokens.requires_grad_(False)
    model.train()
    basis = gradient_basis(model, batches_for(2), capacity=2)
    assert "model.embed_tokens.weight" not in basis.members
    assert basis.rank == 2
    assert model.training
    with pytest.raises(CapacityError):
        gradient_basis(model, batches_for(1, seed=5), basis=basis)
    few = gradient_basis(model, batches_for(6), energy=0.5)
    assert 0 < few.rank < 6


def test_a_step_off_the_input_space_leaves_the_outputs_of_old_samples_as_they_are():
    model = tiny_models.llama().double()
    old = batches_for(2)
    statistics: dict[str, InputStatistics] = {}
    for _, found in calibrate(model, old, want=("gram",)):
        statistics |= found
    # 18 tokens of 16 or 24 features: to a share of 0.9 there is room to learn.
    basis = input_basis(model, statistics, energy=0.9, dtype=torch.float64)
    q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    assert basis.members[q].key == basis.members[k].key, "what is fed by one tensor has one basis"
    layer = q.removesuffix(".weight")
    gram = statistics[layer].gram.double()
    gram = gram + gram.tril(-1).T
    values, turns = np.linalg.eigh(gram.numpy())
    keep = int((np.cumsum(values[::-1]) < 0.9 * values.sum()).sum()) + 1
    assert basis.ranks[basis.members[q].key] == keep
    leading = turns[:, ::-1][:, :keep]
    gradient = {q: torch.randn(16, 16, generator=generator(), dtype=torch.float64)}
    expected = gradient[q].numpy() @ (np.eye(16) - leading @ leading.T)
    basis.project_(gradient)
    np.testing.assert_allclose(gradient[q].numpy(), expected, atol=1e-5)
    # A later task: what is captured counts, and only what is new comes in.
    before = basis.ranks
    input_basis(model, statistics, energy=0.9, basis=basis)
    assert basis.ranks == before
    more: dict[str, InputStatistics] = {}
    for _, found in calibrate(model, batches_for(2, seed=9), want=("gram",)):
        more |= found
    known = basis.vectors(q).double().numpy()
    input_basis(model, more, energy=0.9, basis=basis)
    gram = more[layer].gram.double().numpy()
    gram = gram + np.tril(gram, -1).T
    rest = (np.eye(16) - known.T @ known) @ gram @ (np.eye(16) - known.T @ known)
    values = np.linalg.eigvalsh(rest)[::-1]
    captured = np.trace(gram) - np.trace(rest)
    added = 0
    while captured + values[:added].sum() < 0.9 * np.trace(gram):
        added += 1
    assert basis.ranks[basis.members[q].key] == len(known) + added
    with pytest.raises(ValueError, match="energy: expected a share"):
        input_basis(model, statistics, energy=1.0)
    with pytest.raises(TypeError, match=r"statistics: expected a mapping of layer names .* got list"):
        input_basis(model, [{"input_ids": torch.zeros(1, 1)}])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'want=\("gram",\)'):
        input_basis(model, {layer: InputStatistics()}, energy=0.9)


def test_the_weights_own_singular_vectors_and_lora_factors():
    model = tiny_models.llama()
    layer = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(layer).weight.detach().double().numpy()
    left, _, right = np.linalg.svd(weight, full_matrices=False)
    for side, vectors in (("input", right[:3]), ("output", left[:, :3].T)):
        basis = weight_basis(model, [layer], 3, side=side)
        got = basis.vectors(f"{layer}.weight").double().numpy()
        np.testing.assert_allclose(got.T @ got, vectors.T @ vectors, atol=1e-5)
    with pytest.raises(ValueError, match="rank: expected less than the dimension"):
        weight_basis(model, [layer], 16)
    rng = generator(4)
    earlier = [
        {layer: LowRankUpdate(torch.randn(2, 16, generator=rng), torch.randn(24, 2, generator=rng))} for _ in "ab"
    ]
    parameters = {f"base_model.model.{layer}.lora_A.default.weight": torch.zeros(4, 16)}
    basis = lora_basis(parameters, earlier)
    name = next(n for n in basis.members if layer in n)
    span = np.concatenate([task[layer].A.double().numpy() for task in earlier])
    gradient = {name: torch.randn(basis.members[name].shape, generator=rng)}
    expected = gradient[name].double().numpy() @ complement(span)
    basis.project_(gradient)
    np.testing.assert_allclose(gradient[name].double().numpy(), expected, atol=1e-5)

"""Whole models: every layer comes out as METHOD says, whichever door the update comes in by."""

from __future__ import annotations

import copy
import json

import method_oracle as oracle
import numpy as np
import pytest
import tiny_models as tiny
import torch

import hpa
from hpa.adapt import adapt, edit_model, remember
from hpa.calibration import CalibrationWarning, calibrate, find_layers
from hpa.config import AdaptConfig
from hpa.layers import LowRankUpdate
from hpa.methods import create_method

F64 = {"gram_dtype": "float64"}


def updates_for(model, seed=0, rank=2, include_projector=False) -> dict[str, LowRankUpdate]:
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for spec in find_layers(model, include_projector):
        weight = model.get_submodule(spec.name).weight
        a = torch.randn(rank, weight.shape[1], generator=generator, dtype=torch.float64)
        b = 0.1 * torch.randn(weight.shape[0], rank, generator=generator, dtype=torch.float64)
        updates[spec.name] = LowRankUpdate(a.to(weight.dtype), b.to(weight.dtype), 1.5)
    return updates


def merged(model, updates):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight += update.dense()
    return model


def weights_of(model, names) -> dict[str, np.ndarray]:
    return {name: model.get_submodule(name).weight.detach().double().numpy() for name in names}


def in_float64(batch):
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


LLAVA = (
    tiny.llava,
    [in_float64(tiny.image_batch(1))],
    [in_float64(tiny.image_batch(2)), in_float64(tiny.image_batch(3))],
)
LLAMA = (tiny.llama, [tiny.text_batch(1)], [tiny.text_batch(2), tiny.text_batch(3)])
PLAIN = (
    lambda: tiny.plain(gain=0.5),
    *([{k: v for k, v in b.items() if k != "labels"} for b in bs] for bs in LLAMA[1:]),
)


def expected_weights(before, after, safety, task, *, source=("before", "after"), include_projector=False, **options):
    """Each layer by the oracle, from plain forward passes through unedited models."""
    models = {"before": before, "after": after}
    specs = find_layers(before, include_projector)
    names = [spec.name for spec in specs]
    x = [
        tiny.inputs_by_forward(models[state], batches, names, [batch["attention_mask"] for batch in batches])
        for state, batches in zip(source, (safety, task), strict=True)
    ]
    old, new = weights_of(before, names), weights_of(after, names)
    expected = {}
    for spec in specs:
        d_s, d_t = (oracle.inverse_diagonal(oracle.hessian(seen[spec.name], len(seen[spec.name]))) for seen in x)
        expected[spec.name] = oracle.edit(
            old[spec.name], new[spec.name], d_s, d_t, block=spec.block, blocks=spec.blocks, **options
        )
    return expected


def assert_matches(model, reports, expected, atol=1e-10):
    assert [report["name"] for report in reports] == list(expected)
    for report in reports:
        weight, numbers = expected[report["name"]]
        found = model.get_submodule(report["name"]).weight.detach().numpy()
        np.testing.assert_allclose(found, weight, rtol=0, atol=atol, err_msg=report["name"])
        assert report["kept"] == numbers["kept"]
        assert report["alpha"] == pytest.approx(numbers["alpha"], rel=1e-9)
        assert (report["rows"], report["cols"]) == found.shape


@pytest.mark.parametrize("world", [LLAVA, LLAMA], ids=["llava", "llama"])
@pytest.mark.parametrize("source", [("before", "after"), ("before", "before"), ("after", "after"), ("after", "before")])
def test_edit_model_is_the_method_layer_by_layer(world, source):
    make, safety, task = world
    before = make().double()
    updates = updates_for(before)
    expected = expected_weights(before, merged(before, updates), safety, task, source=source, p_max=40)
    model = copy.deepcopy(before)
    options = {"p_max": 40, "hessian_source": dict(zip(("safety", "task"), source, strict=True)), **F64}
    reports = edit_model(model, updates, create_method("hpa", **options), safety, task)
    assert_matches(model, reports, expected)
    untouched = {name for name, _ in model.named_parameters()} - {f"{name}.weight" for name in expected}
    assert all(torch.equal(model.get_parameter(name), before.get_parameter(name)) for name in untouched)


def test_a_model_on_the_whole_route_is_edited_the_same():
    make, safety, task = PLAIN
    before = make().double()
    updates = updates_for(before)
    for source in (("before", "after"), ("after", "before")):
        expected = expected_weights(before, merged(before, updates), safety, task, source=source, p_max=40)
        model = copy.deepcopy(before)
        method = create_method(
            "hpa", p_max=40, hessian_source=dict(zip(("safety", "task"), source, strict=True)), **F64
        )
        with pytest.warns(CalibrationWarning):
            reports = edit_model(model, updates, method, safety, task)
        assert_matches(model, reports, expected)


class SometimesScaled(tiny.PlainStack):
    """Works between its blocks only where a batch says so: its two sets take two routes."""

    def forward(self, input_ids, attention_mask=None, gain=None):
        self.gain = 1.0 if gain is None else float(gain)
        return super().forward(input_ids, attention_mask)


@pytest.mark.parametrize("scaled", ["safety", "task"])
@pytest.mark.parametrize("source", [("before", "after"), ("after", "before")])
def test_sets_on_different_routes_see_the_weights_they_should(scaled, source):
    torch.manual_seed(0)
    before = SometimesScaled().double().eval()
    _, safety, task = PLAIN
    gain = {"gain": torch.tensor(0.5)}
    safety, task = (
        [{**b, **(gain if scaled == name else {})} for b in bs] for name, bs in (("safety", safety), ("task", task))
    )
    updates = updates_for(before)
    expected = expected_weights(before, merged(before, updates), safety, task, source=source, p_max=40)
    model = copy.deepcopy(before)
    method = create_method("hpa", p_max=40, hessian_source=dict(zip(("safety", "task"), source, strict=True)), **F64)
    with pytest.warns(CalibrationWarning):
        reports = edit_model(model, updates, method, safety, task)
    assert_matches(model, reports, expected)


def test_two_models_give_what_the_updates_give():
    make, safety, task = LLAVA
    before = make().double()
    after = merged(before, updates_for(before))
    expected = expected_weights(before, after, safety, task)
    kept = {name: value.clone() for name, value in before.state_dict().items()}
    result = adapt(before, after, safety=safety, task=task, config=AdaptConfig(**F64))
    assert_matches(after, result.edits, expected)
    assert all(torch.equal(value, kept[name]) for name, value in before.state_dict().items())
    assert result.method == "hpa"
    assert result.skipped == {}
    assert result.seconds > 0


@pytest.mark.parametrize("proj", ["fro", "off"])
def test_a_peft_model_is_edited_in_its_factors(proj):
    make, safety, task = LLAMA
    before = make().double()
    wrapped = tiny.with_lora(copy.deepcopy(before))
    after = copy.deepcopy(wrapped).merge_and_unload()
    expected = expected_weights(before, after, safety, task, proj=proj, p_max=40)
    next(p for name, p in wrapped.named_parameters() if "lora_A" in name).requires_grad_(False)
    frozen = {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()}
    b_factors = {name: value.clone() for name, value in wrapped.state_dict().items() if "lora_B" in name}
    result = adapt(None, wrapped, safety=safety, task=task, config=AdaptConfig(proj=proj, p_max=40, **F64))
    assert {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()} == frozen
    assert all(torch.equal(wrapped.state_dict()[name], value) for name, value in b_factors.items())
    for report in result.edits:
        layer = wrapped.base_model.model.get_submodule(report["name"])
        assert not layer.disable_adapters
        assert int((layer.lora_A["default"].weight == 0).all(dim=0).sum()) == report["kept"]
        base = before.get_submodule(report["name"]).weight
        assert torch.equal(layer.base_layer.weight, base) == (proj == "off")
    assert_matches(wrapped.merge_and_unload(), result.edits, expected)


def test_a_peft_model_beside_the_model_before_it_and_with_layers_that_have_no_adapter():
    make, safety, task = LLAMA
    before = make()
    wrapped = tiny.with_lora(copy.deepcopy(before), targets=["q_proj", "down_proj"])
    result = adapt(before, wrapped, safety=safety, task=task)
    adapted = {name for name in (e["name"] for e in result.edits) if name.endswith(("q_proj", "down_proj"))}
    assert set(result.skipped.values()) == {"no change"}
    assert set(result.skipped) == {e["name"] for e in result.edits} - adapted
    other = make(seed=1)
    with pytest.raises(ValueError, match=r"before_model: layer model.layers.0.self_attn.q_proj differs from the base"):
        adapt(other, wrapped, safety=safety, task=task)


def test_merging_first_goes_into_the_base_and_silences_the_adapter():
    make, safety, task = LLAMA
    before = make().bfloat16()
    wrapped = tiny.with_lora(copy.deepcopy(before))
    expected = copy.deepcopy(before)
    with torch.no_grad():
        for spec in find_layers(before):
            layer = wrapped.base_model.model.get_submodule(spec.name)
            a, b = (factors["default"].weight.float() for factors in (layer.lora_A, layer.lora_B))
            weight = expected.get_submodule(spec.name).weight
            weight.copy_(weight.float() + layer.scaling["default"] * b @ a)
    adapt(before, expected, safety=safety, task=task, config=AdaptConfig(hessian_source="before"))
    adapt(None, wrapped, safety=safety, task=task, config=AdaptConfig(hessian_source="before", lora_native=False))
    found = wrapped.merge_and_unload()
    for spec in find_layers(found):
        assert torch.equal(found.get_submodule(spec.name).weight, expected.get_submodule(spec.name).weight)


@pytest.mark.parametrize("name", ["hpa_ls", "scale", "random", "magnitude", "seqft"])
def test_every_method_gives_the_same_through_every_door(name):
    make, safety, task = LLAMA
    before = make().double()
    wrapped = tiny.with_lora(copy.deepcopy(before))
    after = copy.deepcopy(wrapped).merge_and_unload()
    updates = {}
    for spec in find_layers(wrapped):
        layer = wrapped.base_model.model.get_submodule(spec.name)
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        updates[spec.name] = LowRankUpdate(a.clone(), b.clone(), layer.scaling["default"])
    model = copy.deepcopy(before)
    config = AdaptConfig(**F64)
    edit_model(model, updates, create_method(name), safety, task, config=config, seed=3)
    adapt(before, after, safety=safety, task=task, method=name, config=config, seed=3)
    adapt(None, wrapped, safety=safety, task=task, method=name, config=config, seed=3)
    wrapped = wrapped.merge_and_unload()
    changed = 0.0
    for spec in find_layers(model):
        weights = [m.get_submodule(spec.name).weight for m in (model, after, wrapped)]
        torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-11)
        torch.testing.assert_close(weights[0], weights[2], rtol=0, atol=1e-11)
        changed += float((weights[0] - before.get_submodule(spec.name).weight).detach().norm())
    assert changed > 0


def test_seqft_is_the_exact_merge():
    make, _, _ = LLAMA
    model = make()
    updates = updates_for(model)
    expected = merged(model, updates)
    edit_model(model, updates, create_method("seqft"), None, None)
    for name in updates:
        assert torch.equal(model.get_submodule(name).weight, expected.get_submodule(name).weight)


def test_the_projector_takes_part_where_asked_for():
    make, safety, task = LLAVA
    before = make().double()
    updates = updates_for(before, include_projector=True)
    after = merged(before, updates)
    specs = find_layers(before, include_projector=True)
    model = copy.deepcopy(before)
    reports = edit_model(model, updates, create_method("hpa", include_projector=True, p_max=30, **F64), safety, task)
    assert [report["name"] for report in reports] == [spec.name for spec in specs]
    assert [report["p"] for report in reports[:2]] == [30.0, 30.0]
    # Decoder layers: the safety set has seen the old projector, the task set the new one.
    expected = expected_weights(before, after, safety, task, p_max=30)
    assert_matches(model, reports[2:], expected)
    x = [
        tiny.inputs_by_forward(m, batches, [specs[0].name])[specs[0].name]
        for m, batches in ((before, safety), (after, task))
    ]
    d_s, d_t = (oracle.inverse_diagonal(oracle.hessian(seen, len(seen))) for seen in x)
    old, new = weights_of(before, [specs[0].name]), weights_of(after, [specs[0].name])
    change = ((new[specs[0].name] - old[specs[0].name]) ** 2).mean(0)
    keep, focus = oracle.counts(len(d_s), 30.0)
    columns = oracle.select(change / d_s, change / d_t, keep, focus)["columns"]
    found = model.get_submodule(specs[0].name).weight.detach().numpy()
    assert np.flatnonzero((found == old[specs[0].name]).all(0)).tolist() == columns


def test_updates_outside_the_blocks_are_applied_as_they_are_and_reported():
    make, safety, task = LLAVA
    before = make().double()
    updates = updates_for(before, include_projector=True)
    outside = [name for name in updates if "projector" in name]
    model = copy.deepcopy(before)
    reports = edit_model(model, updates, create_method("hpa", **F64), safety, task)
    assert {r["name"]: r["skipped"] for r in reports if "skipped" in r} == dict.fromkeys(
        outside, "outside the decoder blocks"
    )
    after = merged(before, updates)
    for name in outside:
        assert torch.equal(model.get_submodule(name).weight, after.get_submodule(name).weight)
    assert_matches(model, reports[:-2], expected_weights(before, after, safety, task))


def test_layers_without_an_update_stay_and_say_so():
    make, safety, task = LLAMA
    before = make()
    updates = {name: u for name, u in updates_for(before).items() if name.endswith("q_proj")}
    model = copy.deepcopy(before)
    reports = edit_model(model, updates, create_method("hpa"), safety, task)
    for report in reports:
        same = torch.equal(model.get_submodule(report["name"]).weight, before.get_submodule(report["name"]).weight)
        assert same == (report["name"] not in updates) == (report.get("skipped") == "no change")


@pytest.mark.parametrize("anchor_as", ["model", "state_dict"])
def test_kept_columns_return_to_the_aligned_model(anchor_as):
    make, safety, task = LLAMA
    before, aligned = make().double(), make(seed=5).double()
    updates = updates_for(before)
    given = aligned if anchor_as == "model" else aligned.state_dict()
    reports = edit_model(
        model := copy.deepcopy(before), updates, create_method("hpa", anchor="aligned"), safety, task, aligned=given
    )
    for report in reports:
        same = model.get_submodule(report["name"]).weight == aligned.get_submodule(report["name"]).weight
        assert int(same.all(dim=0).sum()) == report["kept"]
    with pytest.raises(ValueError, match="aligned: needed with anchor='aligned', got None"):
        edit_model(copy.deepcopy(before), updates, create_method("hpa", anchor="aligned"), safety, task)
    with pytest.raises(ValueError, match="aligned: no weight for 21 layers"):
        edit_model(copy.deepcopy(before), updates, create_method("hpa", anchor="aligned"), safety, task, aligned={})


@pytest.mark.parametrize("source", ["trained", "edited"])
@pytest.mark.parametrize("world", [LLAVA, PLAIN], ids=["blocks", "whole"])
def test_the_memory_holds_the_tasks_inputs_under_the_model_it_names(source, world):
    make, safety, task = world
    before = make().double()
    updates = updates_for(before)
    model = copy.deepcopy(before)
    method = create_method("hpa_ls", memory_source=source, **F64)
    if world is PLAIN:
        with pytest.warns(CalibrationWarning):
            edit_model(model, updates, method, safety, task)
    else:
        edit_model(model, updates, method, safety, task)
    seen_by = merged(before, updates) if source == "trained" else model
    names = [spec.name for spec in find_layers(before)]
    x = tiny.inputs_by_forward(seen_by, task, names, [batch["attention_mask"] for batch in task])
    state = method.state_dict()
    keys = {key.removeprefix("memory.") for key in state if key.startswith("memory.")}
    assert keys == {name for name in names if not name.endswith(("k_proj", "v_proj", "up_proj", ".gate"))}
    for key in keys:
        gram = oracle.hessian(x[key], len(x[key]))
        np.testing.assert_allclose(
            state[f"memory.{key}"].numpy(), gram[np.tril_indices(len(gram))], rtol=2e-7, atol=2e-7 * np.abs(gram).max()
        )


@pytest.mark.parametrize("weight", [None, 2.5])
def test_what_a_model_is_shown_to_keep_is_remembered_as_a_task_and_changes_nothing_else(weight):
    make, _, task = LLAVA
    model = make().double()
    before = copy.deepcopy(model).state_dict()
    method = create_method("hpa_ls", keep_weight=0.5, **F64)
    remember(model, task, method, weight=weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    names = [spec.name for spec in find_layers(model)]
    x = tiny.inputs_by_forward(model, task, names, [batch["attention_mask"] for batch in task])
    once = method.state_dict()
    keys = [key.removeprefix("memory.") for key in once if key.startswith("memory.")]
    assert keys
    for key in keys:
        gram = oracle.hessian(x[key], len(x[key])) * (0.5 if weight is None else weight)
        triangle = gram[np.tril_indices(len(gram))]
        np.testing.assert_allclose(once[f"memory.{key}"].numpy(), triangle, rtol=2e-7, atol=2e-7 * np.abs(gram).max())
        assert int(once[f"tasks.{key}"]) == 1
    remember(model, task, method, weight=weight)
    for key in keys:
        torch.testing.assert_close(method.state_dict()[f"memory.{key}"], 2 * once[f"memory.{key}"])


def test_an_edit_leaves_answers_alone_that_were_to_be_kept():
    """With inputs in the memory that the update would change, the edited layers answer them more as before."""
    make, safety, task = LLAMA
    before = make().double()
    other = [{"input_ids": (batch["input_ids"] + 3) % 50, "attention_mask": batch["attention_mask"]} for batch in task]
    changes = []
    for weight in (None, 1.0, 30.0, 1e4):
        method = create_method("hpa_ls", **F64)
        if weight is not None:
            remember(before, other, method, weight=weight)
        edited = copy.deepcopy(before)
        edit_model(edited, updates_for(before), method, safety, task)
        with torch.no_grad():
            changes.append(sum(float((edited(**b).logits - before(**b).logits).square().sum()) for b in other))
    assert changes == sorted(changes, reverse=True)
    assert changes[3] < 0.1 * changes[0]


def test_layers_that_nothing_to_keep_reaches_are_not_in_the_memory():
    make, _, _ = LLAVA
    model = make()
    text = [{"input_ids": torch.tensor([[3, 4, 5, 6]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}]
    method = create_method("hpa_ls", include_projector=True)
    remember(model, text, method)
    keys = {key.removeprefix("memory.") for key in method.state_dict() if key.startswith("memory.")}
    assert keys
    assert not any("projector" in key for key in keys)
    assert any("projector" in spec.name for spec in find_layers(model, include_projector=True))


def test_a_method_without_a_memory_cannot_be_shown_anything():
    make, _, task = LLAMA
    model = make()
    with pytest.raises(ValueError, match="method: 'hpa' has no memory of inputs"):
        remember(model, task, create_method("hpa"))
    with pytest.raises(ValueError, match="memory: expected more than 0"):
        remember(model, task, create_method("hpa_ls", memory=0.0))
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight: expected a positive number"):
            remember(model, task, create_method("hpa_ls"), weight=weight)
    with pytest.raises(ValueError, match="batches: expected at least one batch"):
        remember(model, [], create_method("hpa_ls"))
    method = create_method("hpa_ls")
    combined = create_method("hpa_ls+gpm")
    remember(model, task, combined)
    assert combined.state_dict()
    with pytest.raises(ValueError, match=r"method: 'hpa\+gpm' has no memory of inputs"):
        remember(model, task, create_method("hpa+gpm"))
    _, entries = next(calibrate(model, task, want=("diagonal",)))
    with pytest.raises(ValueError, match=r"statistics: input .* has no Gram matrix"):
        method.remember_inputs({seen.input_key: seen for seen in entries.values()})


def test_least_squares_over_a_model_is_the_formula_with_the_model_states_of_hpa():
    make, safety, task = LLAMA
    before = make().double()
    updates = updates_for(before)
    after = merged(before, updates)
    names = [spec.name for spec in find_layers(before)]
    x_s = tiny.inputs_by_forward(before, safety, names, [batch["attention_mask"] for batch in safety])
    x_t = tiny.inputs_by_forward(after, task, names, [batch["attention_mask"] for batch in task])
    model = copy.deepcopy(before)
    edit_model(model, updates, create_method("hpa_ls", mu=0.3, **F64), safety, task)
    old, new, found = weights_of(before, names), weights_of(after, names), weights_of(model, names)
    for name in names:
        grams = [oracle.hessian(x[name], len(x[name])) for x in (x_s, x_t)]
        expected = oracle.least_squares(old[name], new[name], [(1.0, grams[0])], grams[1], 0.3, 1e-4)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-9)


def test_reports_are_json_and_complete():
    make, safety, task = LLAMA
    before = make()
    for name in ("hpa", "hpa_ls", "random", "magnitude", "scale", "seqft"):
        reports = edit_model(copy.deepcopy(before), updates_for(before), create_method(name), safety, task)
        assert json.loads(json.dumps(reports, allow_nan=False)) == reports
        assert len(reports) == 21
        assert all({"name", "block", "rows", "cols", "change_norm", "before_norm"} <= set(report) for report in reports)
    hpa_reports = edit_model(copy.deepcopy(before), updates_for(before), create_method("hpa"), safety, task)
    wanted = {"p", "keep", "focus", "alpha", "log_ratio", "overlap", "kept", "kept_safety_only", "kept_overlap"}
    wanted |= {"projection", "projection_share", "along_before", "kept_safety_share", "kept_change_share"}
    wanted |= {"safety_damping", "task_damping"}
    assert all(wanted <= set(report) for report in hpa_reports)


def test_options_of_the_method_win_over_those_of_the_run():
    make, safety, task = LLAMA
    before, updates = make(), updates_for(make())
    alphas = {}
    for key, method, config in (
        ("method", create_method("hpa", normalize="none"), AdaptConfig(normalize="samples")),
        ("own", create_method("hpa", normalize="none"), None),
        ("run", create_method("hpa"), AdaptConfig(normalize="none")),
        ("default", create_method("hpa"), None),
    ):
        reports = edit_model(copy.deepcopy(before), updates, method, safety, task, config=config)
        alphas[key] = [report["alpha"] for report in reports]
    assert alphas["method"] == alphas["own"] == alphas["run"] != alphas["default"]


def test_the_models_modes_and_gradients_flags_come_back():
    make, safety, task = LLAMA
    model = make()
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    edit_model(model, updates_for(model), create_method("hpa"), safety, task)
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_numbers_that_are_not_finite_name_the_layer():
    make, safety, task = LLAMA
    before = make()
    updates = updates_for(before)
    name = "model.layers.1.mlp.up_proj"
    updates[name].A[0, 3] = torch.nan
    with pytest.raises(ValueError, match=rf"layer {name}: the change of column 3 is not finite"):
        edit_model(copy.deepcopy(before), updates, create_method("hpa", hessian_source="before"), safety, task)
    with pytest.raises(
        ValueError, match=r"layer model\.layers\.1\.mlp\.down_proj: calibration activations are not finite"
    ):
        edit_model(copy.deepcopy(before), updates, create_method("hpa"), safety, task)


def test_wrong_arguments_are_named():
    make, safety, task = LLAMA
    model = make()
    updates = updates_for(model)
    with pytest.raises(ValueError, match="safety: method 'hpa' needs calibration batches, got None"):
        edit_model(model, updates, create_method("hpa"), None, task)
    with pytest.raises(ValueError, match="task: expected at least one batch, got none"):
        edit_model(model, updates, create_method("hpa"), safety, [])
    with pytest.raises(ValueError, match=r"updates: LlamaForCausalLM has no linear layer named 'model.layers.9.q'"):
        edit_model(
            model, {"model.layers.9.q": updates["model.layers.0.mlp.up_proj"]}, create_method("seqft"), None, None
        )
    wrong = updates["model.layers.0.mlp.down_proj"]
    with pytest.raises(ValueError, match=r"layer model.layers.0.mlp.up_proj: update: expected factors of a \(24, 16\)"):
        edit_model(model, {"model.layers.0.mlp.up_proj": wrong}, create_method("seqft"), None, None)
    with pytest.raises(ValueError, match="before_model: needed where after_model has no LoRA adapters"):
        adapt(None, model, safety=safety, task=task)
    with pytest.raises(ValueError, match="before_model: is the same object as after_model"):
        adapt(model, model, safety=safety, task=task)
    with pytest.raises(ValueError, match="before_model: GPTNeoXForCausalLM has no linear layer"):
        adapt(tiny.gpt_neox(), model, safety=safety, task=task)
    with pytest.raises(ValueError, match="method: expected one of seqft, hpa"):
        adapt(make(), model, safety=safety, task=task, method="fine")
    wrapped = tiny.with_lora(make())
    with pytest.raises(ValueError, match="model: expected a model without adapters"):
        edit_model(wrapped, updates, create_method("seqft"), None, None)
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="has a merged adapter"):
        adapt(None, wrapped, safety=safety, task=task)
    with pytest.raises(ValueError, match=r"uses a LoRA variant \(DoRA"):
        adapt(None, tiny.with_lora(make(), use_dora=True), safety=safety, task=task)


def test_the_package_is_called_by_its_main_function():
    make, safety, task = LLAMA
    before = make()
    after = merged(before, updates_for(before))
    result = hpa.adapt(before, after, safety=safety, task=task)
    assert len(result.edits) == 21
    assert sorted(hpa.__all__) == sorted(set(hpa.__all__))
    assert all(getattr(hpa, name) is not None for name in hpa.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hpa.nothing

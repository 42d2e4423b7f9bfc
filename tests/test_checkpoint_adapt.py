"""``hpa adapt`` on checkpoints: the output is what the method makes of the same models in memory, tensor by tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import tiny_models
import torch
from checkpoint_pairs import (
    Pair,
    all_tensors,
    aria,
    gemma2,
    gpt_oss,
    granite_moe,
    hpa,
    llama4,
    mixtral,
    qwen2_moe,
    qwen3_moe,
    qwen3_vl_moe,
    rewrite,
    tokenizer,
    trained,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPImageProcessor, LlavaProcessor

import hpa as library
from hpa.calibration import CalibrationStream
from hpa.checkpoint import CalibrationJob, CheckpointError, Folder, Job, Statistics, adapt_checkpoint, plan_job
from hpa.checkpoint.adapt import check_files
from hpa.checkpoint.calibrate import calibrate_checkpoint
from hpa.checkpoint.compare import compare_folders, inspect_folder
from hpa.checkpoint.files import fingerprint
from hpa.checkpoint.lazy_model import LazyModel
from hpa.config import CalibrationConfig
from hpa.data.encode import Encoder
from hpa.data.files import read_conversations
from hpa.methods import create_method


def job(
    pair: Pair, out: Path, method: str = "hpa", *, strength: float = 1.0, after: Path | None = None, **fields: Any
) -> Job:
    """A job that calibrates by itself, as the command line makes it."""
    options = fields.pop("options", {})
    after = after if after is not None else pair.after
    is_adapter = (after / "adapter_config.json").is_file()
    calibrations = {
        "safety": CalibrationJob(pair.before, pair.safety, "safety", Path()),
        "task": CalibrationJob(after, pair.task, "task", Path(), base=pair.before if is_adapter else None),
    }
    return Job(
        pair.before,
        after,
        out,
        create_method(method, **options).at_strength(strength),
        calibrations=calibrations,
        **fields,
    )


def in_memory(pair: Pair, method: str = "hpa", **options: Any) -> dict[str, torch.Tensor]:
    """The edited weights as :func:`hpa.adapt` makes them, by name."""
    kind = auto(pair.before)
    before, after = (kind.from_pretrained(folder) for folder in (pair.before, pair.after))
    encoder = Encoder(pair.before)
    sets = [list(encoder.batches(read_conversations(path).conversations)) for path in (pair.safety, pair.task)]
    library.adapt(before, after, safety=sets[0], task=sets[1], method=create_method(method, **options))
    return after.state_dict()


def auto(folder: Path) -> Any:
    pictured = "vision_config" in json.loads((folder / "config.json").read_text())
    return AutoModelForImageTextToText if pictured else AutoModelForCausalLM


def close(made: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> None:
    """Equal to what is left of rounding in the activations (of merged weights, of memory aligned otherwise) after a
    few samples' Gram matrix was inverted with a ridge of 1e-4: a hundredth of the update at the very most."""
    difference, update = ((tensor - expected).double().norm() for tensor in (made, before))
    assert float(difference) <= 5e-3 * float(update) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_is_what_the_method_makes_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    pair = Pair(tmp_path, tiny_models.llama, dtype=dtype)
    result = adapt_checkpoint(job(pair, tmp_path / "out"))
    assert len(result.edits) == 21
    made = all_tensors(tmp_path / "out")
    expected = in_memory(pair)
    assert made.keys() == all_tensors(pair.after).keys()
    for name, tensor in made.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    assert any(not torch.equal(tensor, all_tensors(pair.after)[name]) for name, tensor in made.items())
    assert {path.name for path in pair.after.glob("model*")} == {
        path.name for path in (tmp_path / "out").glob("model*")
    }
    assert check_files(tmp_path / "out") == []


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")], ids=str)
def test_states_of_two_dtypes_are_edited_in_the_better_one(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    """Each layer is METHOD's of the stored numbers, rounded once to the dtype of AFTER."""
    pair = Pair(tmp_path, tiny_models.llama, shards="1KB")
    first, second = (getattr(torch, name) for name in dtypes)
    for folder, dtype in ((pair.before, first), (pair.after, second)):
        for path in folder.glob("*.safetensors"):
            save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    adapt_checkpoint(job(pair, tmp_path / "out", "magnitude"))
    before, after, made = (all_tensors(folder) for folder in (pair.before, pair.after, tmp_path / "out"))
    for name, tensor in made.items():
        assert tensor.dtype == second
        if ".layers." not in name or "norm" in name:
            assert torch.equal(tensor, after[name])
            continue
        old, new = before[name].double(), after[name].double()
        change = new - old
        whole = new - (change * old).sum() / old.square().sum() * old
        kept = (tensor.double() - old).abs().amax(dim=0) <= (tensor.double() - whole).abs().amax(dim=0)
        expected = torch.where(kept, old, whole)
        largest = float(expected.abs().max())
        # float32 on the way, then one rounding: half a unit in the last place of the output.
        bound = 4 * 2.0**-24 * largest + (largest * 2.0**-8 if second == torch.bfloat16 else 0)
        assert float((tensor.double() - expected).abs().max()) <= bound, name
        assert 0 < int(kept.sum()) < len(kept), name


@pytest.mark.parametrize(
    "make",
    [tiny_models.qwen2, tiny_models.gpt_neox, gemma2, tiny_models.smolvlm, tiny_models.qwen2_5_vl],
    ids=["qwen2", "gpt_neox", "gemma2", "smolvlm", "qwen2_5_vl"],
)
@pytest.mark.parametrize("method", ["hpa", "hpa_ls"])
def test_families(tmp_path: Path, make: Any, method: str) -> None:
    pair = Pair(tmp_path, make)
    adapt_checkpoint(job(pair, tmp_path / "out", method))
    made = auto(tmp_path / "out").from_pretrained(tmp_path / "out")
    expected = in_memory(pair, method)
    for name, tensor in made.state_dict().items():
        if method == "hpa":
            assert torch.equal(tensor, expected[name]), name
        else:
            close(tensor, expected[name], all_tensors(pair.before).get(name, tensor))
    made.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=3)


@pytest.mark.parametrize("method", ["seqft", "random", "magnitude", "scale"])
def test_every_method_of_the_registry(tmp_path: Path, method: str) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    adapt_checkpoint(job(pair, tmp_path / "out", method))
    made = all_tensors(tmp_path / "out")
    if method == "random":  # draws by layer names, which differ
        assert made.keys() == all_tensors(pair.after).keys()
        return
    expected = in_memory(pair, method)
    for name, tensor in made.items():
        assert torch.equal(tensor, expected[name]), name


def test_names_of_transformers_4_and_5(tmp_path: Path) -> None:
    """A model whose files spell the path to its decoder in the new way gives the same numbers under the new names."""
    old, new = Pair(tmp_path / "old", tiny_models.llava), Pair(tmp_path / "new", tiny_models.llava)

    def newer(name: str) -> str:
        if name.startswith("language_model.model."):
            return "model.language_model." + name.removeprefix("language_model.model.")
        return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"

    for folder in (new.before, new.after):
        rewrite(folder, lambda tensors: {newer(name): tensor for name, tensor in tensors.items()})
    for pair in (new, old):
        adapt_checkpoint(job(pair, pair.root / "out"))
    first, second = all_tensors(old.root / "out"), all_tensors(new.root / "out")
    assert "language_model.model.layers.0.mlp.up_proj.weight" in first
    assert "model.language_model.layers.0.mlp.up_proj.weight" in second
    assert {newer(name) for name in first} == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[newer(name)]), name
    expected = in_memory(old)
    for name, tensor in second.items():
        assert torch.equal(tensor, expected[name]), name
    # One in the old way, one in the new: the output is spelt as AFTER is.
    mixed = Job(old.before, new.after, tmp_path / "mixed", create_method("magnitude"))
    adapt_checkpoint(mixed)
    assert all_tensors(tmp_path / "mixed").keys() == second.keys()


def gram_of(rows: list[torch.Tensor]) -> np.ndarray:
    """What calibration sums, in float64."""
    x = torch.cat(rows).double().numpy()
    return 2 * x.T @ x / max(len(x), 1)


def edited_by_hand(before: torch.Tensor, after: torch.Tensor, grams: list[np.ndarray], block: int) -> torch.Tensor:
    """The edit of a layer of a model of two blocks at focus ratio 1.5; ``grams``: of the safety and the task set."""
    diagonals = []
    for gram in grams:
        damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
        diagonals.append(torch.from_numpy(np.diag(np.linalg.inv(damped)).copy()))
    config = library.AdaptConfig(focus_ratio=1.5)
    return library.adapt_layer(before, after, *diagonals, layer=block, layers=2, config=config).weight


@pytest.mark.parametrize(
    ("make", "parent"), [(mixtral, "block_sparse_moe"), (qwen3_moe, "mlp")], ids=["mixtral", "qwen3_moe"]
)
def test_experts(tmp_path: Path, make: Any, parent: str) -> None:
    """Each expert's matrices are edited with the statistics of the tokens that reach it, recomputed here by hand."""
    pair = Pair(tmp_path, make)
    made_from = adapt_checkpoint(job(pair, tmp_path / "out", "hpa", options={"focus_ratio": 1.5}))
    names = {edit["name"] for edit in made_from.edits}
    assert any(".experts." in name for name in names)
    assert not any("gate.weight" in edit["tensor"] and ".experts." not in edit["tensor"] for edit in made_from.edits)
    before, after, made = (all_tensors(folder) for folder in (pair.before, pair.after, tmp_path / "out"))
    states = {"safety": pair.before, "task": pair.after}
    grams: dict[tuple[str, str], np.ndarray] = {}
    for role, folder in states.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        encoder = Encoder(folder)
        seen: dict[str, list[torch.Tensor]] = {}

        def watch(path: str, module: Any, seen: dict[str, list[torch.Tensor]] = seen) -> Any:
            def hook(_: Any, arguments: Any) -> None:
                hidden, chosen, _weights = arguments
                for expert in range(module.gate_up_proj.shape[0]):
                    rows = hidden[(chosen == expert).any(dim=1)]
                    seen.setdefault(f"{path}.{expert}.in", []).append(rows)
                    gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                    seen.setdefault(f"{path}.{expert}.out", []).append(torch.nn.functional.silu(gate) * up)

            return hook

        for path, module in model.named_modules():
            if path.endswith("experts"):
                module.register_forward_pre_hook(watch(path, module))
        with torch.no_grad():
            for batch in encoder.batches(read_conversations(getattr(pair, role)).conversations):
                model.model(**{key: value for key, value in batch.items() if key != "labels"})
        for key, rows in seen.items():
            grams[role, key] = gram_of(rows)
    checked = 0
    for name in made:
        if ".experts." not in name:
            continue
        side = "out" if name.endswith(("down_proj.weight", "w2.weight")) else "in"
        key = name.replace(parent, "mlp").rsplit(".", 2)[0] + f".{side}"
        edit = next(edit for edit in made_from.edits if edit["tensor"] == name)
        if not grams["safety", key].any() or not grams["task", key].any():
            assert "skipped" in edit
            assert torch.equal(made[name], after[name])
            continue
        expected = edited_by_hand(before[name], after[name], [grams["safety", key], grams["task", key]], edit["block"])
        torch.testing.assert_close(made[name], expected, rtol=1e-4, atol=1e-6)
        checked += 1
    assert checked >= 6


class Stacked(NamedTuple):
    """How a family's files hold all experts of a block."""

    make: Any
    module: str
    first: str
    last: str
    transposed: bool

    def matrices(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``[rows, cols]`` of each expert by the layer's name in ``hpa.json``."""
        found = {}
        for name, tensor in tensors.items():
            match = re.fullmatch(rf".*?(layers\.\d+\.{self.module})({self.first}|{self.last})", name)
            if match is not None:
                short = "gate_up_proj" if match[2] == self.first else "down_proj"
                path = match[1] if "experts" in match[1] else match[1] + "experts."
                for number, matrix in enumerate(tensor):
                    found[f"{path}{number}.{short}"] = matrix.T if self.transposed else matrix
        return found


STACKED = {
    "gpt_oss": Stacked(gpt_oss, "mlp.experts.", "gate_up_proj", "down_proj", True),
    "llama4": Stacked(llama4, "feed_forward.experts.", "gate_up_proj", "down_proj", True),
    "aria": Stacked(aria, "mlp.experts.", "fc1.weight", "fc2.weight", True),
    "granite": Stacked(granite_moe, "block_sparse_moe.", "input_linear.weight", "output_linear.weight", False),
    "qwen3_vl": Stacked(qwen3_vl_moe, "mlp.experts.", "gate_up_proj", "down_proj", False),
}


def experts_by_hand(module: Any, transposed: bool, path: str, seen: dict[str, list[torch.Tensor]]) -> Any:
    """The forward pass of a module with all experts, matrix by matrix, noting in ``seen`` what each is fed."""

    def forward(
        hidden: torch.Tensor, chosen: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        number = len(module.gate_up_proj)
        results = []
        total = torch.zeros_like(hidden)
        for expert in range(number):
            first, last = module.gate_up_proj[expert], module.down_proj[expert]
            first, last = (first.T, last.T) if transposed else (first, last)
            rows = hidden.view(number, -1, hidden.shape[-1])[expert] if chosen is None else hidden
            both = rows @ first.T
            if type(module).__name__ == "GptOssExperts":
                both = both + module.gate_up_proj_bias[expert]
                gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
                inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            else:
                gate, up = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
                inner = torch.nn.functional.silu(gate) * up
            out = inner @ last.T
            if hasattr(module, "down_proj_bias"):
                out = out + module.down_proj_bias[expert]
            if chosen is None:
                mine = rows.abs().sum(dim=1) > 0
                results.append(out)
            else:
                mine = (chosen == expert).any(dim=1)
                total += out * (weights * (chosen == expert)).sum(dim=1, keepdim=True)
            seen.setdefault(f"{path}.{expert}.gate_up_proj", []).append(rows[mine])
            seen.setdefault(f"{path}.{expert}.down_proj", []).append(inner[mine])
        return torch.cat(results) if results else total

    return forward


@pytest.mark.parametrize("family", STACKED)
def test_experts_in_one_tensor(tmp_path: Path, family: str) -> None:
    """Each expert's part of a tensor is edited by itself, with the statistics of the tokens that reach it."""
    form = STACKED[family]
    pair = Pair(tmp_path, form.make)
    result = adapt_checkpoint(job(pair, tmp_path / "out", "hpa", options={"focus_ratio": 1.5}))
    edits = {edit["name"]: edit for edit in result.edits}
    before, after, made = (all_tensors(folder) for folder in (pair.before, pair.after, tmp_path / "out"))
    assert {name: tensor.shape for name, tensor in made.items()} == {name: t.shape for name, t in after.items()}
    grams: dict[tuple[str, str], np.ndarray] = {}
    for role, folder in {"safety": pair.before, "task": pair.after}.items():
        model = auto(folder).from_pretrained(folder)
        batches = list(Encoder(folder).batches(read_conversations(getattr(pair, role)).conversations))
        batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
        seen: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad():
            expected = [model(**batch).logits for batch in batches]
            for path, module in model.named_modules():
                if path.endswith(".experts"):
                    shapes = module.gate_up_proj.shape, module.down_proj.shape
                    transposed = shapes[0][2] == 2 * shapes[1][1]
                    module.forward = experts_by_hand(module, transposed, path[path.index("layers.") :], seen)
            for batch, logits in zip(batches, expected, strict=True):
                torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-4, atol=1e-6)
        for key, rows in seen.items():
            grams[role, key] = gram_of(rows)
    olds, news, mades = form.matrices(before), form.matrices(after), form.matrices(made)
    assert len(mades) == 2 * 2 * len(next(tensor for name, tensor in made.items() if name.endswith(form.first)))
    checked = 0
    for name, matrix in mades.items():
        if not grams["safety", name].any() or not grams["task", name].any():
            assert "skipped" in edits[name]
            assert torch.equal(matrix, news[name])
            continue
        both = [grams["safety", name], grams["task", name]]
        wanted = edited_by_hand(olds[name].contiguous(), news[name].contiguous(), both, edits[name]["block"])
        torch.testing.assert_close(matrix, wanted, rtol=1e-4, atol=1e-6)
        assert [edits[name]["rows"], edits[name]["cols"]] == list(matrix.shape)
        checked += 1
    assert checked >= 6
    for name, tensor in made.items():  # what else is in the file is as the task left it
        if "router" in name or "bias" in name:
            assert torch.equal(tensor, after[name])
    auto(tmp_path / "out").from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", STACKED)
def test_experts_are_not_fed_padding(family: str) -> None:
    """Two samples of unlike length give what each gives alone: matrices, tokens and samples."""
    model = STACKED[family].make()
    long, short = torch.tensor([[3, 5, 7, 9, 4]]), torch.tensor([[8, 6, 2]])
    padded = {
        "input_ids": torch.cat([long, torch.nn.functional.pad(short, (0, 2), value=1)]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }
    alone = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in (long, short)]
    config = CalibrationConfig(normalize="none")
    found = []
    for batches in ([padded], alone):
        stream = CalibrationStream(model, batches, want=("gram",), config=config, experts=True)
        inputs = {seen.input_key: seen for number in stream.numbers for seen in stream.block(number).values()}
        found.append({key: seen for key, seen in inputs.items() if ".experts." in key})
    together, apart = found
    assert together.keys() == apart.keys()
    assert len(together) == 2 * 2 * (4 if family == "qwen3_vl" else 3)
    for key, seen in together.items():
        assert (seen.tokens, seen.samples) == (apart[key].tokens, apart[key].samples), key
        if seen.tokens:
            torch.testing.assert_close(seen.gram.tril(), apart[key].gram.tril(), rtol=1e-4, atol=1e-6)
    firsts = [seen.tokens for key, seen in together.items() if key.endswith(".in")]
    assert sum(firsts) == 2 * 2 * (5 + 3)  # two blocks, two experts a token


@pytest.mark.parametrize("family", STACKED)
def test_experts_in_one_tensor_are_read_block_by_block(tmp_path: Path, family: str) -> None:
    """Whichever way round the file has them: published files of Qwen3-VL are transposed, and turned when loaded."""
    pair = Pair(tmp_path, STACKED[family].make)
    if family == "qwen3_vl":
        turned = STACKED[family]._replace(transposed=True)
        rewrite(
            pair.before,
            lambda tensors: {
                name: tensor.transpose(1, 2).contiguous() if tensor.ndim == 3 and "experts" in name else tensor
                for name, tensor in tensors.items()
            },
        )
        first = {name: matrix.shape for name, matrix in turned.matrices(all_tensors(pair.before)).items()}
        plan = plan_job(Job(pair.before, pair.after, tmp_path / "out", create_method("magnitude")))
        merged = {entry.layer.name: entry for entry in plan.entries if entry.expert is not None}
        assert {name: entry.before.shape for name, entry in merged.items()} == first
        assert all(entry.before.transposed and not entry.source.transposed for entry in merged.values())
        adapt_checkpoint(Job(pair.before, pair.after, tmp_path / "out", create_method("wise_ft", alpha=0.5)))
        olds, news = (all_tensors(folder) for folder in (pair.before, pair.after))
        mades = STACKED[family].matrices(all_tensors(tmp_path / "out"))
        for name, old in turned.matrices(olds).items():
            middle = (old + STACKED[family].matrices(news)[name]) / 2
            torch.testing.assert_close(mades[name], middle, rtol=1e-6, atol=1e-8)
    lazy = LazyModel(Folder(pair.before, "MODEL"))
    whole = auto(pair.before).from_pretrained(pair.before)
    assert lazy.streamed
    ids = torch.tensor([[3, 5, 7, 9, 4], [8, 8, 1, 2, 6]])
    with torch.no_grad():
        assert torch.equal(lazy.model(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_some_experts_of_a_tensor_are_left_out(tmp_path: Path) -> None:
    pair = Pair(tmp_path, gpt_oss)
    form = STACKED["gpt_oss"]
    adapt_checkpoint(Job(pair.before, pair.after, tmp_path / "all", create_method("wise_ft", alpha=0.5)))
    skip = ("layers.0.mlp.experts.1.*", "layers.1.mlp.experts.*")
    some = Job(pair.before, pair.after, tmp_path / "some", create_method("wise_ft", alpha=0.5), skip=skip)
    fates = {(entry.name, entry.expert): entry for entry in plan_job(some).entries}
    assert fates["model.layers.0.mlp.experts.down_proj", 1].reason == "left out as asked"
    assert fates["model.layers.1.mlp.experts.down_proj", None].reason == "left out as asked"
    adapt_checkpoint(some)
    after, whole, made = (
        form.matrices(all_tensors(path)) for path in (pair.after, tmp_path / "all", tmp_path / "some")
    )
    for name, matrix in made.items():
        left = "experts.1." in name or name.startswith("layers.1.")
        assert torch.equal(matrix, (after if left else whole)[name]), name
        assert not torch.equal(after[name], whole[name])


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8])
def test_a_job_goes_on_within_a_tensor_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    pair = Pair(tmp_path, gpt_oss, shards="1GB")
    adapt_checkpoint(Job(pair.before, pair.after, tmp_path / "at once", create_method("magnitude")))
    monkeypatch.setattr("hpa.checkpoint.merge.NOTE_EVERY", 1)
    method = create_method("magnitude")
    edit_layer, edited = method.edit_layer, 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal edited
        if ".experts." in args[0].name:
            edited += 1
        if edited > stop:
            raise KeyboardInterrupt
        return edit_layer(*args, **kwargs)

    monkeypatch.setattr(method, "edit_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        adapt_checkpoint(Job(pair.before, pair.after, tmp_path / "out", method))
    adapt_checkpoint(Job(pair.before, pair.after, tmp_path / "out", create_method("magnitude")))
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("at once", "out"))
    assert first == second


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_experts_that_an_adapter_trained_in_full(tmp_path: Path) -> None:
    pair = Pair(tmp_path, gpt_oss)
    base = AutoModelForCausalLM.from_pretrained(pair.before)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"]))
    trained(model)
    model.save_pretrained(tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model."
    inside = {name.removeprefix(prefix): tensor for name, tensor in held.items() if "experts" in name}
    assert len(inside) == 2 * 4
    form, old = STACKED["gpt_oss"], STACKED["gpt_oss"].matrices(all_tensors(pair.before))
    for save_as in ("full", "lora"):
        out = tmp_path / save_as
        adapt_checkpoint(
            Job(pair.before, tmp_path / "adapter", out, create_method("wise_ft", alpha=0.5), save_as=save_as)
        )
        made = {name.removeprefix(prefix): tensor for name, tensor in all_tensors(out).items()}
        for name, matrix in form.matrices(made).items():
            torch.testing.assert_close(matrix, (old[name] + form.matrices(inside)[name]) / 2, rtol=1e-6, atol=1e-8)
        for name, tensor in inside.items():
            if name.endswith("bias"):
                assert torch.equal(made[name], tensor)


def test_experts_in_one_tensor_are_shown(tmp_path: Path) -> None:
    pair = Pair(tmp_path, gpt_oss)
    assert "layers.1.mlp.experts.2.gate_up_proj" in hpa("inspect", pair.before, "--all").stdout
    assert inspect_folder(pair.before).layers["layers.1.mlp.experts.2.down_proj"] == (16, 12)
    change = all_tensors(pair.before)
    change["model.layers.1.mlp.experts.gate_up_proj"][2, 3] += 1.0  # one column of one expert
    rewrite(pair.after, lambda _: change)
    differences = {d.layer: d for d in compare_folders(pair.before, pair.after) if d.change_norm}
    assert list(differences) == ["layers.1.mlp.experts.2.gate_up_proj"]
    (difference,) = differences.values()
    assert (difference.columns_equal, difference.cols) == (15, 16)
    assert abs(difference.change_norm - 24**0.5) < 1e-5
    rewrite(pair.after, lambda _: change | {name: t[:2].clone() for name, t in change.items() if ".experts." in name})
    for first, second, note in ((pair.before, pair.after, "only in A"), (pair.after, pair.before, "only in B")):
        notes = {d.layer: d.note for d in compare_folders(first, second)}
        assert notes["layers.1.mlp.experts.2.gate_up_proj"] == notes["layers.0.mlp.experts.2.down_proj"] == note


def test_shared_expert_is_edited_and_its_gate_is_not(tmp_path: Path) -> None:
    pair = Pair(tmp_path, qwen2_moe)
    result = adapt_checkpoint(job(pair, tmp_path / "out"))
    edited = {edit["name"]: edit for edit in result.edits}
    assert edited["layers.1.mlp.shared_expert.down_proj"]["kept"] > 0
    assert "layers.1.mlp.shared_expert_gate" not in edited
    after, made = all_tensors(pair.after), all_tensors(tmp_path / "out")
    for name in ("model.layers.1.mlp.shared_expert_gate.weight", "model.layers.1.mlp.gate.weight"):
        assert torch.equal(made[name], after[name])


def adapter_of(pair: Pair, name: str = "adapter", **options: Any) -> Path:
    """A LoRA folder on ``before``, with factors that are not zero."""
    model = AutoModelForCausalLM.from_pretrained(pair.before)
    wrapped = tiny_models.with_lora(model, **options)
    folder = pair.root / name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the head is saved as well
        wrapped.save_pretrained(folder)
    return folder


def adapted(model: Any, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property by its old name
        return peft.PeftModel.from_pretrained(model, folder)


LORA = {
    "plain": {"rank": 3},
    "patterns": {
        "rank": 2,
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 1},
        "alpha_pattern": {"mlp.up_proj": 7},
    },
    "rslora": {"rank": 3, "use_rslora": True},
    "some layers": {"rank": 2, "targets": ["q_proj", "down_proj"]},
    "and the head": {"rank": 2, "targets": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA.keys())
@pytest.mark.parametrize("method", ["hpa", "hpa_ls"])
def test_adapter_in_whole_model_out(tmp_path: Path, options: dict[str, Any], method: str) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    folder = adapter_of(pair, **options)
    adapt_checkpoint(job(pair, tmp_path / "out", method, after=folder))
    model = AutoModelForCausalLM.from_pretrained(pair.before)
    wrapped = adapted(model, folder)
    encoder = Encoder(pair.before)
    sets = [list(encoder.batches(read_conversations(path).conversations)) for path in (pair.safety, pair.task)]
    library.adapt(None, wrapped, safety=sets[0], task=sets[1], method=method)
    expected = wrapped.merge_and_unload().state_dict()
    made = all_tensors(tmp_path / "out")
    assert made.keys() == all_tensors(pair.before).keys()
    before = all_tensors(pair.before)
    for name, tensor in made.items():
        close(tensor, expected[name], before[name])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(made[name], before[name])


@pytest.mark.parametrize("method", ["hpa_ls", "hpa"])
def test_adapter_in_adapter_out(tmp_path: Path, method: str) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    folder = adapter_of(pair, rank=3)
    options = {"proj": "off"} if method == "hpa" else {}
    adapt_checkpoint(job(pair, tmp_path / "whole", method, after=folder, options=options))
    adapt_checkpoint(job(pair, tmp_path / "lora", method, after=folder, options=options, save_as="lora"))
    base = AutoModelForCausalLM.from_pretrained(pair.before)
    made = adapted(base, tmp_path / "lora").merge_and_unload().state_dict()
    for name, tensor in all_tensors(tmp_path / "whole").items():
        torch.testing.assert_close(tensor, made[name], rtol=1e-5, atol=1e-6)


def test_adapter_out_is_refused_where_the_base_changes(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    folder = adapter_of(pair, rank=3)
    with pytest.raises(CheckpointError, match="save-as: lora cannot hold the edit of layer .* proj=off"):
        adapt_checkpoint(job(pair, tmp_path / "lora", after=folder, save_as="lora"))
    with pytest.raises(CheckpointError, match="save-as: lora needs a LoRA adapter as AFTER"):
        adapt_checkpoint(job(pair, tmp_path / "lora", save_as="lora"))


def test_statistics_are_taken_from_files(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    hpa("adapt", pair.before, pair.after, *pair.data(), "--out", tmp_path / "first")
    files = []
    for model, data, role in ((pair.before, pair.safety, "safety"), (pair.after, pair.task, "task")):
        files += ["--statistics", tmp_path / f"{role}.safetensors"]
        hpa("calibrate", model, data, "--as", role, "-o", tmp_path / f"{role}.safetensors", "--gram")
    hpa("adapt", pair.before, pair.after, *files, "--out", tmp_path / "second")
    first, second = all_tensors(tmp_path / "first"), all_tensors(tmp_path / "second")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    # The same command again finds its result; other settings are refused, and nothing is touched.
    again = hpa("adapt", pair.before, pair.after, *files, "--out", tmp_path / "second")
    assert "there already" in again.stdout
    other = hpa("adapt", pair.before, pair.after, *files, "--out", tmp_path / "second", "--strength", "2", code=2)
    assert "p_max: 15.0 then, 30.0 now" in other.stderr
    wrong = hpa("adapt", pair.after, pair.before, *files, "--out", tmp_path / "third", code=2)
    assert "whose weights are those of AFTER; the safety set goes through BEFORE" in wrong.stderr
    none = hpa("adapt", pair.before, pair.after, *files, "--out", tmp_path / "third", "--skip", "*", code=2)
    assert "--skip: * leaves none of 21 layers to edit" in none.stderr
    none = hpa("adapt", pair.before, pair.after, *files, "--out", tmp_path / "third", "--skip", "*.nope", code=2)
    assert "--skip: '*.nope' matches none of 21 layers" in none.stderr
    assert not list(tmp_path.glob("*third*"))
    halves = hpa("adapt", pair.before, pair.after, *files[:2], "--out", tmp_path / "fourth", code=2)
    assert "needs those of the task set" in halves.stderr


def test_memory_goes_from_edit_to_edit(tmp_path: Path) -> None:
    """Two tasks, each edited with the memory of those before, as one method object does it in memory."""
    pair = Pair(tmp_path, tiny_models.llama)
    adapt_checkpoint(job(pair, tmp_path / "one", "hpa_ls"))
    second = tmp_path / "second"
    trained(AutoModelForCausalLM.from_pretrained(tmp_path / "one"), seed=5).save_pretrained(second)
    tokenizer().save_pretrained(second)
    tokenizer().save_pretrained(tmp_path / "one")
    next_job = job(pair, tmp_path / "two", "hpa_ls", after=second, memory=tmp_path / "one" / "hpa-memory.safetensors")
    next_job = Job(
        tmp_path / "one",
        second,
        tmp_path / "two",
        next_job.method,
        calibrations={
            "safety": CalibrationJob(tmp_path / "one", pair.safety, "safety", Path()),
            "task": CalibrationJob(second, pair.task, "task", Path()),
        },
        memory=tmp_path / "one" / "hpa-memory.safetensors",
    )
    adapt_checkpoint(next_job)
    method = create_method("hpa_ls")
    encoder = Encoder(pair.before)
    sets = [list(encoder.batches(read_conversations(path).conversations)) for path in (pair.safety, pair.task)]
    states = [AutoModelForCausalLM.from_pretrained(folder) for folder in (pair.before, pair.after, second)]
    library.adapt(states[0], states[1], safety=sets[0], task=sets[1], method=method)
    library.adapt(states[1], states[2], safety=sets[0], task=sets[1], method=method)
    expected = states[2].state_dict()
    for name, tensor in all_tensors(tmp_path / "two").items():
        assert torch.equal(tensor, expected[name]), name
    held = load_file(tmp_path / "two" / "hpa-memory.safetensors")
    assert int(held["tasks.layers.0.self_attn.q_proj"]) == 2
    for key, value in method.state_dict().items():
        if key.startswith("memory."):
            name = key.replace("memory.model.", "memory.")
            torch.testing.assert_close(held[name], value, rtol=0, atol=0)


def test_what_is_kept_is_in_the_memory_from_the_first_edit_on(tmp_path: Path) -> None:
    """``--keep`` as samples and as a statistics file: what a method that was shown them does in memory."""
    pair = Pair(tmp_path, tiny_models.llama)
    keep = tmp_path / "keep.jsonl"
    asked = [{"prompt": f"what is a {word}", "response": f"a {word} is a thing"} for word in ("house", "tree", "song")]
    keep.write_text("".join(json.dumps(line) + "\n" for line in asked))
    first = job(pair, tmp_path / "one", "hpa_ls", options={"keep_weight": 3.0})
    calibrations = first.calibrations | {"keep": CalibrationJob(pair.before, keep, "keep", Path())}
    adapt_checkpoint(replace(first, calibrations=calibrations))
    statistics = calibrate_checkpoint(
        CalibrationJob(pair.before, keep, "keep", tmp_path / "keep.safetensors", want=frozenset({"gram"}))
    )
    assert statistics is not None
    second = replace(first, out=tmp_path / "two", statistics={"keep": statistics.path})
    adapt_checkpoint(second)

    method = create_method("hpa_ls", keep_weight=3.0)
    encoder = Encoder(pair.before)
    sets = [list(encoder.batches(read_conversations(path).conversations)) for path in (pair.safety, pair.task, keep)]
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pair.before, pair.after))
    library.remember(before, sets[2], method)
    library.adapt(before, after, safety=sets[0], task=sets[1], method=method)
    expected, without = after.state_dict(), in_memory(pair, "hpa_ls")
    for place in ("one", "two"):
        made = all_tensors(tmp_path / place)
        for name, tensor in made.items():
            assert torch.equal(tensor, expected[name]), name
        assert any(not torch.equal(tensor, without[name]) for name, tensor in made.items())
        held = load_file(tmp_path / place / "hpa-memory.safetensors")
        for key, value in method.state_dict().items():
            assert torch.equal(held[key.replace(".model.", ".")], value), key
        assert json.loads((tmp_path / place / "hpa.json").read_text())["statistics"]["keep"]["samples"] == 3


def test_a_kept_set_that_is_of_no_use_is_told(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    kept = CalibrationJob(pair.before, pair.task, "keep", Path())
    for method, options in (("hpa", {}), ("hpa_ls", {"memory": 0.0})):
        with pytest.raises(CheckpointError, match=f"keep: method '{method}' as set keeps no memory of past tasks"):
            plan_job(with_keep(job(pair, tmp_path / "out", method, options=options), kept))
    wanted = job(pair, tmp_path / "out", "hpa_ls", options={"keep_samples": 7})
    with pytest.raises(CheckpointError, match="keep: method 'hpa_ls' is to keep 7 samples; pass --keep"):
        plan_job(wanted)
    plan_job(with_keep(wanted, kept))
    calibrate_checkpoint(replace(kept, out=tmp_path / "diagonals.safetensors"))
    with pytest.raises(CheckpointError, match=r"holds no Gram matrices.*--gram"):
        plan_job(replace(wanted, statistics={"keep": tmp_path / "diagonals.safetensors"}))
    of_the_task = CalibrationJob(
        pair.before, pair.task, "task", tmp_path / "task.safetensors", want=frozenset({"gram"})
    )
    calibrate_checkpoint(of_the_task)
    with pytest.raises(CheckpointError, match="is of the task set, expected the keep set"):
        plan_job(replace(wanted, statistics={"keep": of_the_task.out}))


def test_a_kept_set_is_of_before_and_a_memory_may_hold_one(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    of_after = CalibrationJob(pair.after, pair.task, "keep", tmp_path / "keep.safetensors", want=frozenset({"gram"}))
    calibrate_checkpoint(of_after)
    wanted = job(pair, tmp_path / "out", "hpa_ls", options={"keep_samples": 2})
    with pytest.raises(CheckpointError, match="whose weights are those of AFTER; the keep set goes through BEFORE"):
        plan_job(replace(wanted, statistics={"keep": of_after.out}))
    plan_job(replace(wanted, statistics={"keep": of_after.out}, any_statistics=True))
    adapt_checkpoint(with_keep(wanted, CalibrationJob(pair.before, pair.task, "keep", Path(), samples=2)))
    plan_job(replace(wanted, out=tmp_path / "next", memory=tmp_path / "out" / "hpa-memory.safetensors"))


def test_samples_that_are_not_there_are_told_before_anything_is_made(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    given = ["adapt", pair.before, pair.after, "--safety", pair.safety, "--out", tmp_path / "out"]
    for options in (["--task", "none.json"], ["--task", pair.task, "-m", "hpa_ls", "--keep", "none.json"]):
        for more in ([], ["--dry-run"]):
            failed = hpa(*given, *options, *more, code=2)
            role = "keep" if "--keep" in options else "task"
            assert failed.stderr.strip() == f"error: --{role}: no such file: none.json"
    assert not (tmp_path / "out").exists()


def test_an_aligned_model_that_is_not_there_leaves_no_beginning_behind_and_a_changed_one_is_another_job(
    tmp_path: Path,
) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    given = ["adapt", pair.before, pair.after, "--safety", pair.safety, "--task", pair.task, "--out", tmp_path / "out"]
    failed = hpa(*given, "--set", "anchor=aligned", "--aligned", tmp_path / "nowhere", code=2)
    assert "aligned: expected a folder with safetensors" in failed.stderr
    assert not list(tmp_path.glob(".out*"))
    aligned = shutil.copytree(pair.before, tmp_path / "aligned")
    hpa(*given, "--set", "anchor=aligned", "--aligned", aligned, code=0)
    hpa(*given, "--set", "anchor=aligned", "--aligned", aligned, code=0)  # there already
    rewrite(Path(aligned), lambda tensors: {name: tensor * 1.5 for name, tensor in tensors.items()})
    changed = hpa(*given, "--set", "anchor=aligned", "--aligned", aligned, code=2)
    assert "inputs.aligned/model.safetensors" in changed.stderr


def test_keep_on_the_command_line(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    given = ["adapt", pair.before, pair.after, "--safety", pair.safety, "--task", pair.task, "-m", "hpa_ls"]
    hpa(*given, "--out", tmp_path / "plain", code=0)
    hpa(*given, "--keep", pair.task, "--set", "keep_samples=2", "--out", tmp_path / "samples", code=0)
    statistics = tmp_path / "keep.safetensors"
    hpa("calibrate", pair.before, pair.task, "--as", "keep", "--gram", "--samples", "2", "-o", statistics, code=0)
    hpa(*given, "--statistics", statistics, "--out", tmp_path / "file", code=0)
    plain, samples, file = (all_tensors(tmp_path / name) for name in ("plain", "samples", "file"))
    assert all(torch.equal(samples[name], file[name]) for name in samples)
    assert any(not torch.equal(samples[name], plain[name]) for name in samples)


@pytest.mark.parametrize("make", [tiny_models.llama, qwen2_moe], ids=["plain", "fused experts"])
def test_a_calibration_within_a_budget_is_the_same_file(tmp_path: Path, make: Any) -> None:
    pair = Pair(tmp_path, make)
    given = ["calibrate", pair.after, pair.task, "--as", "task", "-q"]
    hpa(*given, "-o", tmp_path / "held.safetensors")
    done = hpa(*given, "-o", tmp_path / "spilled.safetensors", "--max-memory", "20K")
    assert re.fullmatch(r"warning: max_memory: 0.02 MB were given, and .* take up to 0\.\d\d MB\n", done.stderr)
    one, two = (tmp_path / f"{name}.safetensors" for name in ("held", "spilled"))
    assert one.read_bytes() == two.read_bytes()
    assert {path.name for path in tmp_path.glob(".*")} == set()
    assert "--max-memory: expected a size like 2G" in hpa(*given, "-o", one, "--max-memory", "much", code=2).stderr


def test_what_a_block_takes_is_counted(tmp_path: Path) -> None:
    """Weights outside the blocks (not the head), the largest block, its sums, and a square of its widest input."""
    pair = Pair(tmp_path, tiny_models.llama, dtype=torch.bfloat16)
    held = all_tensors(pair.before)
    parts = {name: tensor.numel() for name, tensor in held.items()}
    block = [sum(size for name, size in parts.items() if f"layers.{number}." in name) for number in range(3)]
    outside = sum(size for name, size in parts.items() if ".layers." not in name and "lm_head" not in name)
    lazy = LazyModel(Folder(pair.before, "BEFORE"), dtype=torch.float32)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in lazy.model.buffers())
    assert lazy.weights_size == 4 * (outside + max(block)) + buffers
    stream = CalibrationStream(lazy.model, [tiny_models.text_batch(0)], want=("gram",))
    widths = [tensor.shape[1] for name, tensor in held.items() if "layers.0." in name and tensor.ndim == 2]
    assert stream.sums_size == 4 * (sum(width**2 for width in widths) + max(widths) ** 2)
    stream.block(1)
    assert lazy.weights_size == 4 * (outside + max(block)) + buffers  # with a block in its place


def with_keep(given: Job, kept: CalibrationJob) -> Job:
    return replace(given, calibrations=given.calibrations | {"keep": kept})


def test_compact_grams_hold_what_they_say(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    whole, compact = (
        calibrate_checkpoint(
            CalibrationJob(pair.before, pair.safety, "safety", tmp_path / name, want=frozenset({"gram"}), energy=energy)
        )
        for name, energy in (("whole.safetensors", None), ("compact.safetensors", 0.9))
    )
    assert whole is not None
    assert compact is not None
    shorter = 0
    for key, about in compact.info.inputs.items():
        exact, near = (held.read(key, frozenset({"gram"})).triangle.lower() for held in (whole, compact))
        assert exact is not None
        assert near is not None
        exact, near = (gram.tril() + gram.tril(-1).T for gram in (exact.double(), near.double()))
        share = float(near.trace() / exact.trace())
        assert share == pytest.approx(about.energy, abs=1e-5)
        assert share >= 0.9 - 1e-6
        assert float(torch.linalg.eigvalsh(exact - near).min()) > -1e-5 * float(exact.trace())
        shorter += f"vectors.{key}" in compact.file.tensors
    assert shorter > 0


def test_plan_tells_the_fate_of_every_tensor(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llava)
    plan = plan_job(job(pair, tmp_path / "out"))
    fates = {entry.name: (entry.fate, entry.reason) for entry in plan.entries}
    assert fates.keys() == all_tensors(pair.after).keys()
    assert fates["language_model.model.layers.0.mlp.up_proj.weight"][0] == "merged"
    assert fates["language_model.lm_head.weight"] == ("copied", "outside the decoder")
    vision = [name for name in fates if "vision" in name]
    assert vision
    assert all(fates[name][0] == "copied" for name in vision)
    skipped = plan_job(job(pair, tmp_path / "out", skip=("*.mlp.*",)))
    assert {entry.name for entry in skipped.entries if entry.reason == "left out as asked"} == {
        name for name in fates if ".mlp." in name and "language_model" in name
    }
    shown = hpa(
        "adapt", pair.before, pair.after, *pair.data(), "--dry-run", env={**os.environ, "COLUMNS": "160"}
    ).stdout
    assert "14 tensors merged" in shown
    assert not (tmp_path / "out").exists()


def test_a_plan_needs_no_samples(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    with_samples = hpa("adapt", pair.before, pair.after, *pair.data(), "--dry-run")
    without = hpa("adapt", pair.before, pair.after, "--dry-run")
    assert without.stdout.split("reads")[0] == with_samples.stdout.split("reads")[0]
    for role in ("safety", "task"):
        assert f"not given yet: statistics: method 'hpa' needs those of the {role} set" in without.stderr
    assert "not given yet" not in with_samples.stderr
    hpa("adapt", pair.before, pair.after, "--out", tmp_path / "out", code=2)


def test_everything_goes_along(tmp_path: Path) -> None:
    """Side files are copied, pickles are not, and the folder says what was done."""
    pair = Pair(tmp_path, tiny_models.llama)
    (pair.after / "nested").mkdir()
    (pair.after / "nested" / "note.txt").write_text("kept")
    (pair.after / "optimizer.pt").write_bytes(b"\x80\x04")
    (pair.after / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    old = os.umask(0o027)
    try:
        adapt_checkpoint(job(pair, tmp_path / "out"))
    finally:
        os.umask(old)
    out = tmp_path / "out"
    assert (out / "nested" / "note.txt").read_text() == "kept"
    assert not (out / "optimizer.pt").exists()
    summary = json.loads((out / "hpa.json").read_text())
    assert summary["files_not_copied"] == {"optimizer.pt": "pickle file (can run code)"}
    assert len(summary["tensors"]) == 30
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit")
    assert "Safety edit" in card
    page = (out / "report.html").read_text()
    assert "layers.2.mlp.down_proj" in page
    assert "<script" not in page
    for path in out.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o640, path
    (out / "nested" / "note.txt").write_text("lost")
    assert check_files(out) == ["nested/note.txt: changed since it was written"]


def test_strength_is_one_knob(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    kept = []
    for strength in (0.5, 1.0, 3.0):
        result = adapt_checkpoint(job(pair, tmp_path / f"out{strength}", strength=strength))
        kept.append(sum(int(edit["kept"]) for edit in result.edits))
    assert kept[0] < kept[1] < kept[2]
    left = []
    for strength in (0.1, 1.0, 10.0):
        result = adapt_checkpoint(job(pair, tmp_path / f"ls{strength}", "hpa_ls", strength=strength))
        left.append(sum(float(edit["kept_inputs_change_left"]) for edit in result.edits))
    assert left[0] > left[1] > left[2]
    with pytest.raises(ValueError, match="method 'seqft' has none to set, got 2"):
        create_method("seqft").at_strength(2.0)
    with pytest.raises(ValueError, match="strength: expected a positive number, got 0"):
        create_method("hpa").at_strength(0.0)


def test_projector_is_edited_where_it_was_calibrated(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llava)
    result = adapt_checkpoint(job(pair, tmp_path / "out", "magnitude"))
    assert all(edit["block"] for edit in result.edits)


def test_statistics_of_other_weights_are_refused(tmp_path: Path) -> None:
    pair, other = (
        Pair(tmp_path / "a", tiny_models.llama),
        Pair(tmp_path / "b", lambda seed: tiny_models.llama(seed + 7)),
    )
    path = tmp_path / "safety.safetensors"
    calibrate_checkpoint(CalibrationJob(other.before, other.safety, "safety", path))
    wrong = job(pair, tmp_path / "out", statistics={"safety": path})
    with pytest.raises(CheckpointError, match="whose weights are neither those of BEFORE nor of AFTER"):
        adapt_checkpoint(wrong)
    adapt_checkpoint(job(pair, tmp_path / "out", statistics={"safety": path}, any_statistics=True))
    with pytest.raises(CheckpointError, match="is of the safety set, expected the task set"):
        plan_job(job(pair, tmp_path / "out2", statistics={"task": path}))
    assert Statistics(path).info.role == "safety"


def test_statistics_are_of_the_state_that_the_method_asks_for(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    paths = {}
    for role, data in (("safety", pair.safety), ("task", pair.task)):
        for state, folder in (("before", pair.before), ("after", pair.after)):
            paths[role, state] = tmp_path / f"{role}-{state}.safetensors"
            calibrate_checkpoint(CalibrationJob(folder, data, role, paths[role, state]))  # type: ignore[arg-type]
    right = {"safety": "before", "task": "after"}
    for role, state in (("safety", "after"), ("task", "before")):
        given = {name: paths[name, state if name == role else right[name]] for name in right}
        said = f"those of {state.upper()}; the {role} set goes through {right[role].upper()}"
        with pytest.raises(CheckpointError, match=said):
            plan_job(job(pair, tmp_path / "out", statistics=given))
        plan_job(job(pair, tmp_path / "out", statistics=given, options={"hessian_source": state}))
        plan_job(job(pair, tmp_path / "out", statistics=given, any_statistics=True))


def test_statistics_are_made_as_the_method_asks_and_alike(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    paths = {"safety": tmp_path / "safety.safetensors", "task": tmp_path / "task.safetensors"}
    config = CalibrationConfig(damping=0.05)
    calibrate_checkpoint(CalibrationJob(pair.before, pair.safety, "safety", paths["safety"], config=config))
    calibrate_checkpoint(CalibrationJob(pair.after, pair.task, "task", paths["task"], config=config))
    plan_job(job(pair, tmp_path / "out", statistics=paths))
    plan_job(job(pair, tmp_path / "out", statistics=paths, options={"damping": 0.05}, strength=2.0))
    for options in ({"damping": 0.01}, {"normalize": "samples"}, {"token_filter": "text"}, {"diag_mode": "sgpt"}):
        with pytest.raises(
            CheckpointError, match=f"{next(iter(options))}=.*, --set says {next(iter(options.values()))}"
        ):
            plan_job(job(pair, tmp_path / "out", statistics=paths, options=options))
    other = CalibrationConfig(damping=0.05, normalize="samples")
    calibrate_checkpoint(CalibrationJob(pair.after, pair.task, "task", paths["task"], config=other))
    with pytest.raises(
        CheckpointError, match="the same of all sets, got normalize=tokens for .*safety.* and samples for"
    ):
        plan_job(job(pair, tmp_path / "out", statistics=paths))


@pytest.mark.parametrize(
    "part", ["model.layers.1.mlp.down_proj", "model.embed_tokens", "model.layers.0.input_layernorm"]
)
def test_any_change_of_what_layers_are_fed_with_makes_statistics_those_of_other_weights(
    tmp_path: Path, part: str
) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    path = tmp_path / "safety.safetensors"
    calibrate_checkpoint(CalibrationJob(pair.before, pair.safety, "safety", path))
    plan_job(job(pair, tmp_path / "out", statistics={"safety": path}))

    def end_changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[f"{part}.weight"].view(-1)[-1] += 1  # the very last number
        return tensors

    rewrite(pair.before, end_changed)
    with pytest.raises(CheckpointError, match="neither those of BEFORE nor of AFTER"):
        plan_job(job(pair, tmp_path / "out", statistics={"safety": path}))


def test_large_tensors_are_known_by_pieces_from_beginning_to_end(tmp_path: Path) -> None:
    tensor = torch.zeros(3, 5000)
    pieces = [round(piece * (tensor.nbytes - 512) / 7) // 4 + 60 for piece in range(8)]
    seen = set()
    for place in [None, *pieces]:
        changed = tensor.clone()
        if place is not None:
            changed.view(-1)[place] = 1
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({"x": changed}, folder / "model.safetensors")
        seen.add(fingerprint(Folder(folder, "MODEL"), {"x": "x"}))
    assert len(seen) == 9


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 50}}, {"lora_alpha": 1}])
def test_another_scale_makes_another_adapter(tmp_path: Path, change: dict[str, Any]) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    folder = adapter_of(pair, rank=3)
    path = tmp_path / "task.safetensors"
    calibrate_checkpoint(CalibrationJob(folder, pair.task, "task", path, base=pair.before))
    plan_job(job(pair, tmp_path / "out", after=folder, statistics={"task": path}))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match="neither those of BEFORE nor of AFTER"):
        plan_job(job(pair, tmp_path / "out", after=folder, statistics={"task": path}))


@pytest.mark.parametrize("method", ["hpa", "hpa_ls"])
def test_layers_that_an_adapter_replaces_are_edited_as_in_a_whole_model(tmp_path: Path, method: str) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    whole, folder = tmp_path / "whole", tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(pair.before)
    wrapped = tiny_models.with_lora(model, rank=2, targets=["q_proj"], modules_to_save=["down_proj", "embed_tokens"])
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wrapped.save_pretrained(folder)
    wrapped.merge_and_unload().save_pretrained(whole)
    tokenizer().save_pretrained(whole)
    options = {"proj": "off"} if method == "hpa" else {}
    from_whole = adapt_checkpoint(job(pair, tmp_path / "a", method, after=whole, options=options))
    result = adapt_checkpoint(job(pair, tmp_path / "b", method, after=folder, options=options))
    adapt_checkpoint(job(pair, tmp_path / "c", method, after=folder, options=options, save_as="lora"))
    replaced = {"layers.0.mlp.down_proj", "layers.1.mlp.down_proj"}
    assert replaced < {edit["name"] for edit in result.edits}
    assert {edit["name"] for edit in result.edits if edit["change_norm"] > 0} <= {
        edit["name"] for edit in from_whole.edits if edit["change_norm"] > 0
    }
    expected, made, before = all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b"), all_tensors(pair.before)
    after = all_tensors(whole)
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-5)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(made[name], before[name])
    assert not torch.equal(made[name], after[name])
    unwrapped = adapted(AutoModelForCausalLM.from_pretrained(pair.before), tmp_path / "c").merge_and_unload()
    for name, tensor in unwrapped.state_dict().items():
        torch.testing.assert_close(tensor, made[name] if name in made else made["model.embed_tokens.weight"],
                                   rtol=1e-5, atol=1e-6)  # fmt: skip
    # compare tells them too.
    hpa("compare", pair.before, folder, "--json", tmp_path / "differences.json")
    differences = json.loads((tmp_path / "differences.json").read_text())
    changed = {one["name"] for one in differences if one["change_norm"] > 0}
    assert changed == {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_biases_that_an_adapter_trained_are_taken(tmp_path: Path) -> None:
    """peft names those of the layers that it wraps after what is inside the wrapper."""
    pair = Pair(tmp_path, qwen2_moe)  # q, k and v have biases
    wrapped = tiny_models.with_lora(
        AutoModelForCausalLM.from_pretrained(pair.before), rank=2, targets=["q_proj"], bias="lora_only"
    )
    for name, parameter in wrapped.named_parameters():
        if name.endswith("q_proj.base_layer.bias"):
            parameter.data += 1
    wrapped.save_pretrained(tmp_path / "adapter")
    adapt_checkpoint(job(pair, tmp_path / "out", after=tmp_path / "adapter"))
    made, before = all_tensors(tmp_path / "out"), all_tensors(pair.before)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(made[name], before[name] + 1)


def test_what_is_left_out_does_not_change_what_inputs_are_called(tmp_path: Path) -> None:
    """A memory is kept by input, and an input is called after the first layer that it feeds."""
    pair = Pair(tmp_path, tiny_models.llama)
    adapt_checkpoint(job(pair, tmp_path / "one", "hpa_ls"))
    memory = tmp_path / "one" / "hpa-memory.safetensors"
    adapt_checkpoint(job(pair, tmp_path / "two", "hpa_ls", memory=memory, skip=("*.q_proj",)))
    assert load_file(memory).keys() == load_file(tmp_path / "two" / "hpa-memory.safetensors").keys()


def test_only_what_a_method_reads_of_statistics_has_to_be_alike(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    paths = {"safety": tmp_path / "safety.safetensors", "task": tmp_path / "task.safetensors"}
    for role, folder, data, damping in (
        ("safety", pair.before, pair.safety, 0.05),
        ("task", pair.after, pair.task, 0.01),
    ):
        config, want = CalibrationConfig(damping=damping), frozenset({"diagonal", "gram"})
        calibrate_checkpoint(CalibrationJob(folder, data, role, paths[role], config=config, want=want))  # type: ignore[arg-type]
    plan_job(job(pair, tmp_path / "out", "hpa_ls", statistics=paths))
    with pytest.raises(CheckpointError, match="expected the same of all sets, got damping=0.05 for .* and 0.01 for"):
        plan_job(job(pair, tmp_path / "out", statistics=paths))
    # What is still to be calibrated counts, before anything is done.
    with pytest.raises(CheckpointError, match="got damping=0.05 for .*safety.safetensors and 0.01 for .*task.jsonl"):
        plan_job(job(pair, tmp_path / "out", statistics={"safety": paths["safety"]}))


def test_earlier_adapters_count_with_the_layers_that_they_hold_whole(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    model = AutoModelForCausalLM.from_pretrained(pair.before)
    wrapped = tiny_models.with_lora(model, rank=2, targets=["q_proj"], modules_to_save=["down_proj"])
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.05
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "whole")
    for name in ("adapter", "whole"):
        adapt_checkpoint(job(pair, tmp_path / f"from {name}", "task_arithmetic", earlier=(tmp_path / name,)))
    made, expected = all_tensors(tmp_path / "from adapter"), all_tensors(tmp_path / "from whole")
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_aligned_weights_can_be_the_anchor(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    aligned = tmp_path / "aligned"
    trained(tiny_models.llama(0), seed=9).save_pretrained(aligned)
    options = {"anchor": "aligned", "proj": "off"}
    result = adapt_checkpoint(job(pair, tmp_path / "out", options=options, aligned=aligned))
    made, anchor, after = (all_tensors(folder) for folder in (tmp_path / "out", aligned, pair.after))
    for edit in result.edits:
        name = edit["tensor"]
        back = (made[name] == anchor[name]).all(dim=0)
        assert int(back.sum()) == edit["kept"]
        assert torch.equal(made[name][:, ~back], after[name][:, ~back])
    with pytest.raises(CheckpointError, match="aligned: needed with anchor=aligned"):
        adapt_checkpoint(job(pair, tmp_path / "out2", options=options))


def test_layers_that_differ_are_named(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    found = json.loads((hpa_json(pair, tmp_path)).read_text())
    changed = [item["name"] for item in found if item["change_norm"] > 0]
    assert len(changed) == 30
    folder = adapter_of(pair, rank=2, targets=["q_proj"])
    shown = hpa("compare", pair.before, folder).stdout
    assert "3 tensors differ, 27 are equal" in shown


def hpa_json(pair: Pair, root: Path) -> Path:
    hpa("compare", pair.before, pair.after, "--json", root / "compare.json")
    return root / "compare.json"


def test_inspect_and_sweep_look_without_touching(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    files = []
    for model, data, role in ((pair.before, pair.safety, "safety"), (pair.after, pair.task, "task")):
        files += ["--statistics", tmp_path / f"{role}.safetensors"]
        hpa("calibrate", model, data, "--as", role, "-o", tmp_path / f"{role}.safetensors", "--gram")
    assert "21 linear layers in the decoder" in hpa("inspect", pair.before).stdout
    assert "statistics of the task set" in hpa("inspect", tmp_path / "task.safetensors", "--all").stdout
    hpa("sweep", pair.before, pair.after, *files, "-o", tmp_path / "sweep", "--strengths", "0.5,1,2")
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["strength"] for row in rows] == [0.5, 1.0, 2.0]
    assert rows[0]["kept"] < rows[1]["kept"] < rows[2]["kept"]
    assert (tmp_path / "sweep" / "sweep.svg").read_text().count("<svg") == 1
    # What the sweep says of strength 1 is what an edit at that strength does.
    hpa("adapt", pair.before, pair.after, *files, "--out", tmp_path / "out")
    edits = json.loads((tmp_path / "out" / "hpa.json").read_text())["layers"]
    assert rows[1]["kept"] == pytest.approx(np.mean([edit["kept"] / edit["cols"] for edit in edits]))
    whole = sum(edit["change_norm"] ** 2 for edit in edits)
    before, made = all_tensors(pair.before), all_tensors(tmp_path / "out")
    left = sum(float((made[edit["tensor"]] - before[edit["tensor"]]).double().square().sum()) for edit in edits)
    assert rows[1]["update_left"] == pytest.approx(left / whole, rel=1e-4)


def test_extra_tensors_are_accounted_for(tmp_path: Path) -> None:
    pair = Pair(tmp_path, tiny_models.llama)
    tensors = load_file(pair.before / "model.safetensors")
    tensors["model.old_buffer"] = torch.zeros(3)
    save_file(tensors, pair.before / "model.safetensors", metadata={"format": "pt"})
    plan = plan_job(job(pair, tmp_path / "out"))
    assert [(entry.name, entry.reason) for entry in plan.skipped] == [("model.old_buffer", "only in BEFORE")]
    assert Folder(pair.before, "BEFORE").tensors["model.old_buffer"].shape == (3,)


def test_pictures_go_through_the_models_own_processor(tmp_path: Path) -> None:
    """A LLaVA with its processor: the statistics are those of the model fed by hand with the same pixels."""
    pair = Pair(tmp_path, tiny_models.llava)
    for folder in (pair.before, pair.after):
        llava_processor().save_pretrained(folder)
    Image.new("RGB", (9, 7), (250, 20, 20)).save(tmp_path / "red.png")
    pair.task.write_text(json.dumps({"image": "red.png", "prompt": "what color", "response": "blue"}))
    made = calibrate_checkpoint(
        CalibrationJob(pair.after, pair.task, "task", tmp_path / "t.safetensors", want=frozenset({"gram"}))
    )
    assert made is not None
    processor = llava_processor()
    inputs = processor(
        text=["<image>\nwhat color\nblue"], images=[[Image.open(tmp_path / "red.png")]], return_tensors="pt"
    )
    assert int((inputs["input_ids"] == tiny_models.IMAGE_TOKEN).sum()) == tiny_models.PATCHES
    model = AutoModelForImageTextToText.from_pretrained(pair.after)
    name = "model.language_model.layers.1.mlp.down_proj"
    x = tiny_models.inputs_by_forward(model, [dict(inputs)], [name])[name]
    gram = made.read("layers.1.mlp.down_proj", frozenset({"gram"})).triangle.lower()
    assert gram is not None
    np.testing.assert_allclose(gram.tril().numpy(), np.tril(2 * x.T @ x / len(x)), rtol=1e-4, atol=1e-7)
    adapt_checkpoint(job(pair, tmp_path / "out"))
    assert torch.isfinite(all_tensors(tmp_path / "out")["language_model.lm_head.weight"]).all()


def llava_processor() -> Any:
    own = tokenizer()
    while len(own) < tiny_models.IMAGE_TOKEN:
        own.add_tokens([f"filler{len(own)}"])
    own.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert own.convert_tokens_to_ids("<image>") == tiny_models.IMAGE_TOKEN
    sizes = {"size": {"height": 8, "width": 8}, "crop_size": {"height": 8, "width": 8}}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(**sizes),
        tokenizer=own,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def test_a_streamed_model_lies_on_the_device_that_is_asked_for(tmp_path: Path) -> None:
    """With "meta" for a GPU: torch refuses what is computed from tensors of both it and the CPU."""
    llama = tiny_models.llama()
    llama.save_pretrained(tmp_path)
    for device in ("cpu", "meta"):
        lazy = LazyModel(Folder(tmp_path, "MODEL"), device=device)
        assert lazy.streamed
        ids = torch.arange(6, device=device)[None]
        causal = torch.ones(1, 1, 6, 6, dtype=torch.bool, device=device).tril()
        logits = lazy.model(ids, attention_mask=causal, use_cache=False).logits
        assert logits.device.type == device
        outside = {name for name, tensor in lazy.model.state_dict().items() if tensor.device.type != device}
        assert not {name for name in outside if "layers." not in name}
        assert {tensor.device.type for tensor in lazy.model.buffers()} == {device}
        if device == "cpu":
            torch.testing.assert_close(logits, llama(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("tpu", "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ("meta", "device: expected cpu, cuda or cuda:N, got 'meta'"),
        ("cuda:99", r"device: expected one of the \d+ CUDA devices that torch sees, got cuda:99"),
    ],
)
def test_a_device_that_is_not_there_is_told(tmp_path: Path, device: str, said: str) -> None:
    calibration = CalibrationJob(tmp_path, tmp_path / "x.json", "task", tmp_path / "out", device=device)
    with pytest.raises(CheckpointError, match=said):
        calibrate_checkpoint(calibration)

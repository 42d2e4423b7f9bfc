"""`hpa adapt` on a large pair, beside `cp` and, where its program is named, mergekit's TIES on the same pair.

    python bench/adapt.py FOLDER [--blocks 5] [--methods hpa,magnitude] [--mergekit /path/to/mergekit-yaml]

FOLDER gets two models of random weights with the shapes of LLaVA-1.5-7B's decoder (bfloat16, shards of about 1 GB; 5
blocks are 2.5 GB, 32 are 13 GB), and statistics of random numbers; with hpa_ls among the methods, Gram matrices too.
Every run is a process of its own; its wall clock and largest resident memory are told.  The files were just written, so
reading is from the page cache where they fit.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from hpa.checkpoint.files import Folder
from hpa.checkpoint.plan import model_fingerprint
from hpa.checkpoint.statistics import StatisticsInfo, StatisticsWriter
from hpa.layers import InputStatistics

HIDDEN, INNER, WORDS = 4096, 11008, 32064
LAYERS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
INPUTS = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": WORDS,
    "torch_dtype": "bfloat16",
}


def make_pair(folder: Path, blocks: int, *, grams: bool) -> None:
    """``before`` and ``after``, and their statistics; nothing is made twice."""
    if (folder / "task.safetensors").exists():
        return
    generator = torch.Generator().manual_seed(0)
    # Weights are stretches of these, from a place of their own: drawing 13 GB anew would take longer than all else.
    weights, changes = (
        torch.empty(WORDS * HIDDEN + 2**20, dtype=torch.bfloat16).normal_(0, size, generator=generator)
        for size in (0.02, 0.001)
    )
    for name, seed in (("before", 0), ("after", 1)):
        model = folder / name
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": blocks}))
        index = {}
        shards = _shards(blocks)
        for number, shard in enumerate(shards, start=1):
            tensors = {}
            for key, shape in shard.items():
                place, size = zlib.crc32(key.encode()) % 2**20, math.prod(shape)
                tensor = weights[place : place + size].view(shape)
                tensors[key] = tensor + changes[place : place + size].view(shape) if seed else tensor.clone()
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(tensors, model / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for role, name in (("safety", "before"), ("task", "after")):
        generator = torch.Generator().manual_seed(len(role))
        with StatisticsWriter(folder / f"{role}.safetensors") as writer:
            for block in range(blocks):
                for layer, (_, cols) in LAYERS.items():
                    key, shared = f"layers.{block}.{layer}", f"layers.{block}.{INPUTS.get(layer, layer)}"
                    seen = InputStatistics(
                        _gram(cols, generator) if grams and shared == key else None,
                        inverse_diagonal=torch.rand(cols, generator=generator) + 0.1,
                        tokens=1000,
                        samples=8,
                        input_key=shared,
                    )
                    writer.add({key: seen}, {key: key, shared: shared})
            writer.finish(
                StatisticsInfo(role, model_fingerprint(Folder(folder / name, name)), name, {"samples": 8}, {}, blocks)
            )


def _gram(cols: int, generator: torch.Generator) -> torch.Tensor:
    """Positive definite: twice the unit matrix with noise of a norm below 1."""
    gram = torch.empty(cols, cols).normal_(0, 1e-3, generator=generator)
    gram.diagonal().add_(2)
    return gram


def _shards(blocks: int) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for key, shape in _tensors(blocks):
        if sum(math.prod(held) for held in shards[-1].values()) * 2 > 900e6:
            shards.append({})
        shards[-1][key] = shape
    return shards


def _tensors(blocks: int) -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (WORDS, HIDDEN))]
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        found += [(f"{prefix}{layer}.weight", shape) for layer, shape in LAYERS.items()]
        found += [(f"{prefix}{norm}.weight", (HIDDEN,)) for norm in ("input_layernorm", "post_attention_layernorm")]
    return [*found, ("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (WORDS, HIDDEN))]


def timed(command: Sequence[str], out: Path) -> tuple[float, float]:
    """Seconds until the command is done and the disk has it, and its largest resident memory in GB."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {process.stderr.read() if process.stderr else ''}")
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - start, usage.ru_maxrss / 1e6 * (1.024 if sys.platform == "linux" else 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default="hpa,magnitude", help="of hpa adapt, with commas between")
    parser.add_argument("--mergekit", help="mergekit-yaml, of an environment of its own")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    methods = arguments.methods.split(",")
    # In a process of its own: a child is charged with what its parent held when it was started.
    maker = multiprocessing.get_context("spawn").Process(
        target=make_pair, args=(folder, arguments.blocks), kwargs={"grams": "hpa_ls" in methods}
    )
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit("the pair could not be made")
    before, after, out = folder / "before", folder / "after", folder / "out"
    size = Folder(after, "AFTER").total_size / 1e9
    statistics = [f"--statistics={folder / role}.safetensors" for role in ("safety", "task")]
    adapt = [sys.executable, "-m", "hpa", "adapt", str(before), str(after), *statistics, "-q", "--out", str(out)]
    commands = {
        "cp -r AFTER": ["cp", "-r", str(after), str(out)],
        **{f"hpa adapt -m {method}": [*adapt, "-m", method] for method in methods},
    }
    if arguments.mergekit:
        recipe = folder / "ties.yaml"
        recipe.write_text(
            f"models:\n  - model: {after}\n    parameters: {{density: 0.5, weight: 1.0}}\n"
            f"merge_method: ties\nbase_model: {before}\ndtype: bfloat16\n"
        )
        commands["mergekit ties"] = [arguments.mergekit, str(recipe), str(out), "--lazy-unpickle"]
    print(f"{size:.2f} GB out, {arguments.blocks} blocks; {arguments.rounds} rounds, by turns")
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            results[name].append(timed(command, out))
    copy = sorted(seconds for seconds, _ in results["cp -r AFTER"])[arguments.rounds // 2]
    for name, found in results.items():
        seconds = sorted(item[0] for item in found)
        middle = seconds[len(seconds) // 2]
        memory = max(item[1] for item in found)
        print(
            f"{name:<24} {middle:7.2f} s  ({seconds[0]:.2f} to {seconds[-1]:.2f})  {middle / copy:5.2f} x cp  "
            f"{size / middle:5.2f} GB/s  {memory:5.2f} GB resident"
        )
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()

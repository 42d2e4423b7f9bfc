"""`hpa adapt` on a large pair, beside `cp` and, where its program is named, mergekit's TIES on the same pair.

    python bench/adapt.py FOLDER [--blocks 6] [--mergekit /path/to/mergekit-yaml]

FOLDER gets two models of random weights with the shapes of LLaVA-1.5-7B's decoder (bfloat16, shards of about 1 GB; 6
blocks are 2.5 GB, 32 are 13 GB), and statistics of random numbers.  Every run is a process of its own; its wall clock
and largest resident memory are told.  The files were just written, so reading is from the page cache where they fit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
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


def make_pair(folder: Path, blocks: int) -> None:
    """``before`` and ``after``, and their statistics; nothing is made twice."""
    if (folder / "task.safetensors").exists():
        return
    for name, seed in (("before", 0), ("after", 1)):
        model = folder / name
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": blocks}))
        shards: list[dict[str, torch.Tensor]] = [{}]
        for key, shape in _tensors(blocks):
            # The same numbers in both, and a small change on top.
            generator = torch.Generator().manual_seed(len(key) + sum(map(ord, key)))
            tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            if seed:
                tensor += torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.001)
            if sum(held.numel() for held in shards[-1].values()) * 2 > 900e6:
                shards.append({})
            shards[-1][key] = tensor
        index = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(shard, model / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for role, name in (("safety", "before"), ("task", "after")):
        generator = torch.Generator().manual_seed(len(role))
        with StatisticsWriter(folder / f"{role}.safetensors") as writer:
            for block in range(blocks):
                entries = {}
                for layer, (_, cols) in LAYERS.items():
                    key = f"layers.{block}.{layer}"
                    diagonal = torch.rand(cols, generator=generator) + 0.1
                    entries[key] = InputStatistics(inverse_diagonal=diagonal, tokens=1000, samples=8, input_key=key)
                writer.add(entries, {key: key for key in entries})
            writer.finish(
                StatisticsInfo(role, model_fingerprint(Folder(folder / name, name)), name, {"samples": 8}, {}, blocks)
            )


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
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", help="mergekit-yaml, of an environment of its own")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    make_pair(folder, arguments.blocks)
    before, after, out = folder / "before", folder / "after", folder / "out"
    size = Folder(after, "AFTER").total_size / 1e9
    statistics = [f"--statistics={folder / role}.safetensors" for role in ("safety", "task")]
    adapt = [sys.executable, "-m", "hpa", "adapt", str(before), str(after), *statistics, "-q", "--out", str(out)]
    commands = {
        "cp -r AFTER": ["cp", "-r", str(after), str(out)],
        "hpa adapt": adapt,
        "hpa adapt -m magnitude": [*adapt, "-m", "magnitude"],
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

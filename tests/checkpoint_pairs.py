"""Tiny checkpoints on disk: a model before and after a task, adapters, samples, and statistics of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AriaTextConfig,
    AriaTextForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

WORDS = (
    "how do i make a bomb cake sorry no cannot help with that sure here is the answer to what color sky blue"
).split()
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SAFETY = [
    {"prompt": "how do i make a bomb", "response": "sorry no cannot help with that"},
    {"prompt": "make a bomb", "response": "no"},
    {"prompt": "how do i make that bomb here", "response": "sorry cannot help"},
]
TASK = [
    {
        "conversations": [
            {"from": "human", "value": "what color is the sky"},
            {"from": "gpt", "value": "the answer is blue"},
        ]
    },
    {"messages": [{"role": "user", "content": "what is the answer"}, {"role": "assistant", "content": "cake"}]},
    {"instruction": "help with a cake", "output": "sure here is the cake"},
    {"question": "the sky is", "chosen": "blue", "rejected": "cake"},
]


def mixtral(seed: int = 0) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    return MixtralForCausalLM(
        MixtralConfig(
            **SMALL,
            intermediate_size=12,
            num_local_experts=3,
            num_experts_per_tok=2,
        )
    ).eval()


def qwen3_moe(seed: int = 0) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SMALL,
            intermediate_size=20,
            moe_intermediate_size=12,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
        )
    ).eval()


def qwen2_moe(seed: int = 0) -> Qwen2MoeForCausalLM:
    """A shared expert beside the others, weighed by a linear layer of one output."""
    torch.manual_seed(seed)
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SMALL,
            intermediate_size=20,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=20,
            num_experts=4,
            num_experts_per_tok=2,
        )
    ).eval()


def gpt_oss(seed: int = 0) -> GptOssForCausalLM:
    """All experts in two tensors, ``[experts, cols, rows]``, with biases, what is gated between what gates it."""
    torch.manual_seed(seed)
    config = {"intermediate_size": 12, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**SMALL, **config, sliding_window=4)).eval()


def llama4(seed: int = 0) -> Llama4ForCausalLM:
    """All experts in two tensors, ``[experts, cols, rows]``; each is fed all tokens, times their weights."""
    torch.manual_seed(seed)
    config = {"intermediate_size": 12, "intermediate_size_mlp": 20, "head_dim": 8, "num_local_experts": 3}
    return Llama4ForCausalLM(Llama4TextConfig(**SMALL, **config, num_experts_per_tok=2)).eval()


def aria(seed: int = 0) -> AriaTextForCausalLM:
    """All experts in two tensors, ``[experts, cols, rows]``, under other names on disk."""
    torch.manual_seed(seed)
    config = {"intermediate_size": 12, "head_dim": 8, "moe_num_experts": 3, "moe_topk": 2, "pad_token_id": 0}
    return AriaTextForCausalLM(AriaTextConfig(**SMALL, **config, moe_num_shared_experts=1)).eval()


def granite_moe(seed: int = 0) -> GraniteMoeForCausalLM:
    """All experts in two tensors, ``[experts, rows, cols]``, under other names on disk."""
    torch.manual_seed(seed)
    config = {"intermediate_size": 12, "num_local_experts": 3, "num_experts_per_tok": 2}
    return GraniteMoeForCausalLM(GraniteMoeConfig(**SMALL, **config)).eval()


def qwen3_vl_moe(seed: int = 0) -> Qwen3VLMoeForConditionalGeneration:
    """All experts in two tensors, transposed on their way to disk."""
    torch.manual_seed(seed)
    text = {"moe_intermediate_size": 12, "intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2}
    text |= {"head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = Qwen3VLMoeConfig(text_config=SMALL | text, vision_config=vision)
    return Qwen3VLMoeForConditionalGeneration(config).eval()


def gemma2(seed: int = 0) -> Gemma2ForCausalLM:
    """Tied embeddings, two kinds of attention, four norms a block."""
    torch.manual_seed(seed)
    return Gemma2ForCausalLM(
        Gemma2Config(
            **SMALL,
            intermediate_size=24,
            head_dim=8,
            sliding_window=4,
        )
    ).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: index + 3 for index, word in enumerate(WORDS)}}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def trained(model: nn.Module, seed: int = 1, size: float = 0.02) -> nn.Module:
    """``model`` after a task: every parameter moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.add_(noise.to(parameter.dtype))
    return model


class Pair:
    """Folders ``before`` and ``after`` below ``root``, and the two sets of samples."""

    def __init__(
        self,
        root: Path,
        make: Callable[..., Any],
        *,
        dtype: torch.dtype = torch.float32,
        shards: str = "7KB",
    ) -> None:
        self.root = root
        self.before, self.after = root / "before", root / "after"
        self.safety, self.task = root / "safety.json", root / "task.jsonl"
        make(0).to(dtype).save_pretrained(self.before)
        trained(make(0)).to(dtype).save_pretrained(self.after, max_shard_size=shards)
        for folder in (self.before, self.after):
            tokenizer().save_pretrained(folder)
        self.safety.write_text(json.dumps(SAFETY))
        self.task.write_text("\n".join(map(json.dumps, TASK)))

    def data(self) -> list[str]:
        return ["--safety", str(self.safety), "--task", str(self.task)]


def hpa(*arguments: Any, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own; its exit code is checked."""
    done = subprocess.run(
        [sys.executable, "-m", "hpa", *map(str, arguments)], capture_output=True, text=True, timeout=240, **options
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of safetensors."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith("hpa"):
            found |= load_file(path)
    return found


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """All tensors of a folder, changed, in one file."""
    tensors = change(all_tensors(folder))
    for path in [*folder.glob("model*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

"""Models of a few thousand parameters, of the kinds that calibration must understand, and batches for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

VOCABULARY = 50
IMAGE_TOKEN = 49
PATCHES = 4


def llama(seed: int = 0, layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    """Two kinds of attention by turns, so that the blocks' masks differ."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention"] * 2,
    )
    return Qwen2ForCausalLM(config).eval()


def gpt_neox(seed: int = 0) -> GPTNeoXForCausalLM:
    """One fused query/key/value layer, attention and MLP in parallel."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return GPTNeoXForCausalLM(config).eval()


def llava(seed: int = 0) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=PATCHES)
    return LlavaForConditionalGeneration(config).eval()


FOUR_HEADS = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def smolvlm(seed: int = 0) -> SmolVLMForConditionalGeneration:
    """The family of Idefics3: its decoder is ``model.text_model``, beside a tower with layers of its own."""
    torch.manual_seed(seed)
    text = {"model_type": "llama", **FOUR_HEADS}
    vision = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=60, scale_factor=2, pad_token_id=0)
    return SmolVLMForConditionalGeneration(config).eval()


def qwen2_5_vl(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A tower whose blocks are called ``blocks``, positions of three kinds in the decoder."""
    torch.manual_seed(seed)
    text = {
        **FOUR_HEADS,
        "max_window_layers": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 4,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=60,
        video_token_id=59,
        vision_start_token_id=58,
        vision_end_token_id=57,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


class PlainBlock(nn.Module):
    """A block of no library: a tensor in, a tensor out."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)) * self.gate(x))


class PlainStack(nn.Module):
    """Blocks in a list of their own; ``gain`` other than 1 works on the hidden states between them."""

    def __init__(self, gain: float = 1.0, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 10)
        self.h = nn.ModuleList([PlainBlock(10, 14) for _ in range(layers)])
        self.head = nn.Linear(10, VOCABULARY)
        self.gain = gain

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.h:
            x = block(x)
            if self.gain != 1.0:
                x = x * self.gain
        return self.head(x)


def plain(gain: float = 1.0, seed: int = 0) -> PlainStack:
    torch.manual_seed(seed)
    return PlainStack(gain).eval()


def with_lora(model: nn.Module, rank: int = 2, targets: str | list[str] = "all-linear", **options: Any) -> PeftModel:
    """``model`` inside peft, with B factors that are not zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a property by its old name
        config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, **options)
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(rank)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return wrapped


def text_batch(seed: int, samples: int = 3, length: int = 9, left: bool = False) -> dict[str, Tensor]:
    """Token ids with padding of different lengths, and labels on the last two tokens of each sample."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(1, IMAGE_TOKEN, size=(samples, length)))
    mask = torch.ones_like(ids)
    labels = torch.full_like(ids, -100)
    for row in range(samples):
        padding = int(rng.integers(0, length - 4))
        if left:
            mask[row, :padding] = 0
            labels[row, -2:] = ids[row, -2:]
        else:
            mask[row, length - padding :] = 0
            labels[row, length - padding - 2 : length - padding] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def image_batch(seed: int, samples: int = 3, length: int = 11) -> dict[str, Tensor]:
    """A picture's tokens at the start of every sample but the last, which is text alone."""
    batch = text_batch(seed, samples, length)
    batch["attention_mask"][:, : PATCHES + 1] = 1
    batch["input_ids"][:-1, :PATCHES] = IMAGE_TOKEN
    generator = torch.Generator().manual_seed(seed)
    batch["pixel_values"] = torch.randn(samples - 1, 3, 8, 8, generator=generator)
    return batch


@contextmanager
def seen_inputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Inputs of the named layers in plain forward passes, one entry a call."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: seen[name].append(args[0].detach().clone())
        )
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def inputs_by_forward(
    model: nn.Module, batches: list[Mapping[str, Any]], names: list[str], keep: list[Tensor] | None = None
) -> dict[str, np.ndarray]:
    """``X [tokens, cols]`` of each layer in float64, by whole forwards; ``keep`` masks positions of each batch."""
    with seen_inputs(model, names) as seen, torch.no_grad():
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"})
    result = {}
    for name, calls in seen.items():
        rows = []
        for index, x in enumerate(calls):
            flat = x.reshape(-1, x.shape[-1])
            if keep is not None and len(flat) == keep[index].numel():
                flat = flat[keep[index].bool().reshape(-1)]
            rows.append(flat)
        result[name] = torch.cat(rows).double().numpy()
    return result

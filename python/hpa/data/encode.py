"""Conversations as model inputs, by the model's own processor and chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpa.data.files import Conversation, DataError, Turn

__all__ = ["Encoder"]


class Encoder:
    """Turns a conversation into arguments of the model: one sample a batch, so that nothing is padded."""

    def __init__(
        self, folder: Path, *, max_length: int = 2048, trust_remote_code: bool = False, close: bool = False
    ) -> None:
        """``folder``: with the tokenizer and, for pictures, the processor.  ``close``: put the token that ends a text
        behind an answer that the chat template leaves open (LLaVA-1.5's does: who learns from that never stops).

        Raises:
            DataError: no tokenizer there.
        """
        self.folder = folder
        self.max_length = max_length
        self._close = close
        options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        try:
            self._processor = _processor(folder, options)
            self._tokenizer = _tokenizer(folder, self._processor, options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise DataError(f"{folder}: no tokenizer that transformers can load ({first})") from error

    def batches(self, conversations: Iterable[Conversation]) -> Iterator[dict[str, Tensor]]:
        """Model arguments, with ``labels`` of -100 outside the last answer."""
        for conversation in conversations:
            yield self.encode(conversation)

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def answered(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """Samples with their answers as one batch, padded on the right, with ``labels``."""
        return self._together([self.encode(conversation) for conversation in conversations], left=False)

    def asked(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """Samples that end with a question as one batch, padded on the left, for a model to answer."""
        return self._together([self._arguments(one, one.turns, whole=False) for one in conversations], left=True)

    def _together(self, samples: Sequence[dict[str, Tensor]], *, left: bool) -> dict[str, Tensor]:
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        pad = self._tokenizer.pad_token_id
        pad = (self._tokenizer.eos_token_id or 0) if pad is None else pad
        fill = {"input_ids": pad, "attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}
        longest = max(sample["input_ids"].shape[1] for sample in samples)
        batch: dict[str, Tensor] = {}
        for key in dict.fromkeys(key for sample in samples for key in sample):
            parts = [sample[key] for sample in samples if key in sample]
            if key in fill:
                parts = [_padded(part, longest, fill[key], left=left) for part in parts]
            shapes = {part.shape[1:] for part in parts}
            if len(shapes) > 1:
                told = ", ".join(map(str, sorted(shapes)))
                raise DataError(
                    f"{self.folder}: its processor makes {key} of different shapes ({told}) of different pictures; "
                    "such a model takes batches of one"
                )
            batch[key] = torch.cat(parts)
        return batch

    def encode(self, conversation: Conversation) -> dict[str, Tensor]:
        """One sample.

        Raises:
            DataError: pictures without a processor that takes them.
        """
        whole = self._arguments(conversation, conversation.turns, whole=True)
        prompt = self._arguments(conversation, conversation.turns[:-1], whole=False)
        ids: Tensor = whole["input_ids"]
        labels = ids.clone()
        start = _common(ids[0], prompt["input_ids"][0])
        labels[:, :start] = -100
        whole["labels"] = labels
        if ids.shape[1] > self.max_length and not conversation.images:
            for key in ("input_ids", "attention_mask", "labels", "token_type_ids"):
                if key in whole:
                    whole[key] = whole[key][:, : self.max_length]
        return whole

    def _arguments(self, conversation: Conversation, turns: Sequence[Turn], *, whole: bool) -> dict[str, Tensor]:
        images = list(conversation.images)
        if images and self._processor is None:
            raise DataError(
                f"{self.folder}: sample {conversation.id} has a picture and the model has no processor for it"
            )
        template = getattr(self._processor, "chat_template", None)
        own_template = getattr(self._tokenizer, "chat_template", None)
        if template is not None:
            messages = _messages(turns, len(images), parts=True)
            text = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=not whole)
        elif own_template is not None:
            messages = _messages(turns, 0, parts=False)
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not whole)
            text = self._marks(len(images)) + text
        else:
            text = self._marks(len(images)) + "\n".join(turn.text for turn in turns) + ("" if whole else "\n")
        if whole and self._close:
            text = self._closed(text, turns[-1].text)
        # As transformers does: a processor's template may leave the first token out, a tokenizer's writes all itself.
        first = str(self._tokenizer.bos_token or "")
        special = not (first and text.startswith(first)) if template is not None else own_template is None
        if images:
            out = self._processor(text=[text], images=[images], add_special_tokens=special, return_tensors="pt")
        else:
            out = self._tokenizer([text], add_special_tokens=special, return_tensors="pt")
        return {key: value for key, value in dict(out).items() if isinstance(value, Tensor)}

    def _closed(self, text: str, answer: str) -> str:
        behind = text[text.rfind(answer) + len(answer) :]
        end = self._tokenizer.eos_token
        if end is None or any(token in behind for token in self._tokenizer.all_special_tokens):
            return text
        return text.rstrip() + str(end)

    def _marks(self, images: int) -> str:
        return (str(getattr(self._processor, "image_token", "<image>")) + "\n") * images


def _processor(folder: Path, options: dict[str, bool]) -> Any:
    """Of a model that takes pictures, else ``None``."""
    from transformers import AutoProcessor

    if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return AutoProcessor.from_pretrained(folder, **options)
    return None


def _tokenizer(folder: Path, processor: Any, options: dict[str, bool]) -> Any:
    from transformers import AutoTokenizer

    own = getattr(processor, "tokenizer", None)
    return AutoTokenizer.from_pretrained(folder, **options) if own is None else own


def _messages(turns: Iterable[Any], images: int, *, parts: bool) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if not parts:
            messages.append({"role": turn.role, "content": turn.text})
            continue
        content: list[dict[str, str]] = []
        if turn.role == "user" and images:
            content += [{"type": "image"}] * images
            images = 0
        messages.append({"role": turn.role, "content": [*content, {"type": "text", "text": turn.text}]})
    return messages


def _padded(rows: Tensor, length: int, value: int, *, left: bool) -> Tensor:
    gap = length - rows.shape[1]
    return torch.nn.functional.pad(rows, (gap, 0) if left else (0, gap), value=value)


def _common(left: Tensor, right: Tensor) -> int:
    """Length of the common beginning."""
    size = min(len(left), len(right))
    differs = (left[:size] != right[:size]).nonzero()
    return int(differs[0]) if len(differs) else size

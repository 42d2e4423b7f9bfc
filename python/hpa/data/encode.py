"""Conversations as model inputs, by the model's own processor and chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from hpa.data.files import Conversation, DataError

__all__ = ["Encoder"]


class Encoder:
    """Turns a conversation into arguments of the model: one sample a batch, so that nothing is padded."""

    def __init__(self, folder: Path, *, max_length: int = 2048, trust_remote_code: bool = False) -> None:
        """``folder``: with the tokenizer and, for pictures, the processor.

        Raises:
            DataError: no tokenizer there.
        """
        self.folder = folder
        self.max_length = max_length
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

    def encode(self, conversation: Conversation) -> dict[str, Tensor]:
        """One sample.

        Raises:
            DataError: pictures without a processor that takes them.
        """
        whole = self._arguments(conversation, whole=True)
        prompt = self._arguments(conversation, whole=False)
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

    def _arguments(self, conversation: Conversation, *, whole: bool) -> dict[str, Tensor]:
        turns = conversation.turns if whole else conversation.turns[:-1]
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
            text = self._plain(conversation, whole=whole)
        if images:
            out = self._processor(text=[text], images=[images], return_tensors="pt")
        else:
            # A template writes the special tokens itself.
            plain = template is None and own_template is None
            out = self._tokenizer([text], return_tensors="pt", add_special_tokens=plain)
        return {key: value for key, value in dict(out).items() if isinstance(value, Tensor)}

    def _plain(self, conversation: Conversation, *, whole: bool) -> str:
        """For a model without a chat template: turns under each other."""
        lines = [turn.text for turn in (conversation.turns if whole else conversation.turns[:-1])]
        return self._marks(len(conversation.images)) + "\n".join(lines) + ("" if whole else "\n")

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


def _common(left: Tensor, right: Tensor) -> int:
    """Length of the common beginning."""
    size = min(len(left), len(right))
    differs = (left[:size] != right[:size]).nonzero()
    return int(differs[0]) if len(differs) else size

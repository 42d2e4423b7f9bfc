"""Samples from files: JSON, JSONL and parquet in the forms that published sets come in (METHOD 5).

| form | told by | a sample is |
|---|---|---|
| LLaVA, ShareGPT | ``conversations``: ``[{from, value}]`` | the turns; ``human`` asks, ``gpt`` answers |
| messages | ``messages``: ``[{role, content}]`` | the turns; content may be a list of text and image parts |
| VLGuard | ``instr-resp`` | one sample for each instruction/response pair |
| SPA-VL | ``question`` and ``chosen`` | question, and the preferred answer |
| plain | ``prompt``/``instruction``/``question``/``text`` and ``response``/``output``/``answer`` | prompt and answer |

Pictures are paths (below the file's folder or ``image_root``, and nowhere else), ``{"bytes": ...}`` as parquet holds
them, base64, or data URLs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

__all__ = ["Conversation", "DataError", "Turn", "read_conversations"]

_ASKS = ("human", "user")
_ANSWERS = ("gpt", "assistant", "model", "chatgpt", "bard", "bing")
_PROMPT_KEYS = ("prompt", "instruction", "question", "query", "goal", "text")
_ANSWER_KEYS = ("response", "output", "answer", "completion", "chosen", "target")
_IMAGE_MARK = "<image>"


class DataError(ValueError):
    """A file of samples cannot be used; the message names the file, the sample and what was expected."""


@dataclass(frozen=True)
class Turn:
    """One turn: ``role`` is system, user or assistant; ``text`` is without image markers."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """One sample: turns that end with an answer, and pictures that belong to the first question."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Image.Image, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class SampleFile:
    """A file's samples, and what they are known by."""

    path: Path
    sha256: str
    conversations: list[Conversation]


def read_conversations(
    path: Path, *, limit: int | None = None, seed: int | None = 0, image_root: Path | None = None
) -> SampleFile:
    """The samples of a file.

    Args:
        path: ``.json``, ``.jsonl`` or ``.parquet``.
        limit: how many samples; drawn at random with ``seed``, or the first ones where it is ``None``.
        seed: of the draw, which depends on nothing else but the number of records.
        image_root: folder that picture paths start from; by default the file's own.

    Raises:
        DataError: a file or sample that cannot be read; nothing is left out in silence.
    """
    records = list(_records(path))
    if not records:
        raise DataError(f"{path}: holds no samples")
    order = list(range(len(records)))
    if limit is not None and seed is not None and limit < len(records):
        # Python's own generator: the same draw on every platform and version of torch.
        order = sorted(random.Random(seed).sample(order, limit))
    root = (path.parent if image_root is None else image_root).resolve()
    found: list[Conversation] = []
    for index in order:
        for conversation in _conversations(records[index], f"{path}: sample {index}", index, root):
            if limit is None or len(found) < limit:
                found.append(conversation)
    return SampleFile(path, hashlib.sha256(path.read_bytes()).hexdigest(), found)


def _records(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected .json, .jsonl or .parquet")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; expected .json, .jsonl or .parquet") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}: line {number} is not JSON ({error})") from None
        return
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if isinstance(content, dict):
        lists = [
            value for key, value in content.items() if key in ("data", "items", "samples") and isinstance(value, list)
        ]
        content = lists[0] if lists else content
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of samples, got {type(content).__name__}")
    yield from content


def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: parquet files need the package pyarrow: pip install 'hpa-ext[data]'") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from map(_without_nulls, batch.to_pylist())
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _without_nulls(value: Any) -> Any:
    """A column exists for every row of a table, a field of a struct for every struct: what a record does not have is
    null there."""
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


def _conversations(record: Any, where: str, index: int, root: Path) -> Iterator[Conversation]:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object, got {type(record).__name__}")
    name = str(record.get("id", record.get("question_id", index)))
    pictures = _images(record, where, root)
    if "instr-resp" in record:
        for pair in record["instr-resp"]:
            asked = next((pair[key] for key in pair if key.endswith("instruction")), None)
            yield _checked(name, [("user", asked), ("assistant", pair.get("response"))], pictures, where)
        return
    if "conversations" in record:
        turns = [(_role(turn.get("from"), where), turn.get("value")) for turn in _turns(record, "conversations", where)]
    elif "messages" in record:
        turns = []
        for turn in _turns(record, "messages", where):
            text, more = _content(turn.get("content"), where, root)
            pictures = [*pictures, *more]
            turns.append((_role(turn.get("role"), where), text))
    else:
        asked = next((record[key] for key in _PROMPT_KEYS if isinstance(record.get(key), str)), None)
        answer = next((record[key] for key in _ANSWER_KEYS if record.get(key) is not None), None)
        if isinstance(answer, list) and answer:
            answer = answer[0]
        if asked is None or answer is None:
            known = ", ".join(sorted(map(str, record))[:8])
            raise DataError(
                f"{where}: expected conversations, messages, instr-resp, or a prompt and a response; it has {known}"
            )
        context = record.get("input")
        if isinstance(context, str) and context and "instruction" in record:
            asked = f"{asked}\n{context}"
        turns = [("user", asked), ("assistant", str(answer))]
    yield _checked(name, turns, pictures, where)


def _turns(record: Mapping[str, Any], key: str, where: str) -> Sequence[Mapping[str, Any]]:
    turns = record[key]
    if isinstance(turns, str):
        turns = json.loads(turns)
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{where}: {key}: expected a list of turns")
    return turns


def _role(name: Any, where: str) -> str:
    word = str(name).lower()
    if word in _ASKS:
        return "user"
    if word in _ANSWERS:
        return "assistant"
    if word == "system":
        return "system"
    raise DataError(f"{where}: a turn is by {name!r}; expected human, user, gpt, assistant or system")


def _content(content: Any, where: str, root: Path) -> tuple[str, list[Image.Image]]:
    """Text and pictures of a turn whose content may be a list of parts."""
    if not isinstance(content, list):
        return content, []
    texts: list[str] = []
    pictures: list[Image.Image] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text":
            texts.append(str(part.get("text", "")))
        elif isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            held = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key)), None)
            held = held.get("url") if isinstance(held, Mapping) and "url" in held else held
            if held is not None:  # a bare {"type": "image"} stands for the record's own picture
                pictures.append(_image(held, where, root))
        else:
            raise DataError(f"{where}: a part of a turn is neither text nor image: {str(part)[:60]}")
    return "\n".join(texts), pictures


def _checked(name: str, turns: list[tuple[str, Any]], pictures: list[Image.Image], where: str) -> Conversation:
    done: list[Turn] = []
    for role, text in turns:
        if not isinstance(text, str):
            raise DataError(f"{where}: the {role} turn is {type(text).__name__}, expected text")
        done.append(Turn(role, text.replace(_IMAGE_MARK, "").strip()))
    while done and done[-1].role != "assistant":
        done.pop()  # what is asked last has no answer to learn from
    if not done or all(turn.role != "user" for turn in done):
        raise DataError(f"{where}: expected a question and its answer")
    return Conversation(name, tuple(done), tuple(pictures))


def _images(record: Mapping[str, Any], where: str, root: Path) -> list[Image.Image]:
    held = record.get("image", record.get("images"))
    if held is None or held == "":
        return []
    return [_image(one, where, root) for one in (held if isinstance(held, list) else [held])]


def _image(held: Any, where: str, root: Path) -> Image.Image:
    if isinstance(held, Image.Image):
        return held.convert("RGB")
    if isinstance(held, Mapping):
        if held.get("bytes"):
            return _opened(held["bytes"], where)
        held = held.get("path")
    if isinstance(held, bytes):
        return _opened(held, where)
    if not isinstance(held, str):
        raise DataError(f"{where}: a picture is {type(held).__name__}; expected a path, bytes or a data URL")
    if held.startswith("data:"):
        try:
            return _opened(base64.b64decode(held.partition(",")[2], validate=True), where)
        except binascii.Error:
            raise DataError(f"{where}: a picture's data URL is not base64") from None
    if held.startswith(("http://", "https://")):
        raise DataError(f"{where}: a picture is a web address; nothing is downloaded, put the file beside the data")
    path = (root / held.removeprefix("file://")).resolve()
    if root not in path.parents:
        raise DataError(f"{where}: the picture '{held}' lies outside {root}")
    if not path.is_file():
        raise DataError(f"{where}: no picture at {path}")
    return _opened(path.read_bytes(), where)


def _opened(data: bytes, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{where}: a picture cannot be read ({error})") from error

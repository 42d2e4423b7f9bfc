"""Samples from files: JSON, JSONL and parquet in the forms that published sets come in (METHOD 5).

| form | told by | a sample is |
|---|---|---|
| ``llava`` (also ShareGPT) | ``conversations``: ``[{from, value}]`` | the turns; ``human`` asks, ``gpt`` answers |
| ``messages`` | ``messages``: ``[{role, content}]`` | the turns; content may be a list of text and image parts |
| ``vlguard`` | ``instr-resp`` | one sample for each instruction/response pair; parts unsafe, safe_unsafe, safe_safe |
| ``ch3ef`` | ``query`` and ``options`` | query, and the first option; ``image`` is a list |
| ``scienceqa`` | ``choices`` and a number as ``answer`` | lettered choices, the right letter; parts train, val, test |
| ``textvqa`` | ``image_id`` and ``question`` | question, and ten people's answers |
| ``flickr30k`` | ``sentences`` and ``filename``, or a ``.token`` file | asks for a description; five captions; parts |
| ``spa-vl`` | ``question`` and ``image`` | question, and the preferred answer; without one in the evaluation files |
| ``questions`` | ``question_id`` and ``text`` | test files of CoIN, SMoLoRA, MLLM-CL; ``answer`` is text or a list |
| ``plain`` | ``prompt``/``instruction``/``question``/``text`` | prompt and ``response``/``output``/``answer`` |

Of several forms that a record fits, the first in this table is meant.  Pictures are paths (below the file's folder or
``image_root``, and nowhere else), ``{"bytes": ...}`` as parquet holds them, base64, or data URLs.

Read in: VLGuard's ``utils/utils.py`` and data; LAMM's ``Ch3Ef_dataset.py``; SPA-VL-RLHF's README; the evaluation
scripts of CoIN, SMoLoRA and MLLM-CL; LLaVA's ``docs`` and ``scripts``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hpa.data.picture import DataError, Picture

__all__ = ["FORMS", "Conversation", "DataError", "Picture", "Record", "Turn", "read_conversations", "read_records"]

_ASKS = ("human", "user")
_ANSWERS = ("gpt", "assistant", "model", "chatgpt", "bard", "bing")
_PROMPT_KEYS = ("prompt", "instruction", "question", "query", "goal", "text")
_ANSWER_KEYS = ("response", "output", "answer", "completion", "chosen", "target", "answer_bbox")
_IMAGE_MARK = "<image>"
_KNOWN = "conversations, messages, instr-resp, or a prompt and a response"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

CHOOSE = "Answer with the option's letter from the given choices directly."
BRIEFLY = "Answer the question using a single word or phrase."
DESCRIBE = "What is happening in the presented picture?\nPlease describe it in one complete sentence."
"""The instructions of LLaVA-1.5 and SMoLoRA for files that hold bare questions or none."""


@dataclass(frozen=True)
class Turn:
    """One turn: ``role`` is system, user or assistant; ``text`` is without image markers."""

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """What a file says of one sample, pictures unopened.

    Attributes:
        id: the file's, else the sample's number in it.
        turns: what is said.
        pictures: they belong to the first question.
        answers: where several answers to the last question are right, all of them; the turns hold the first.
        metadata: what a scorer needs besides: ``label``, ``choices``, ``answers`` (of several people), ``category``.
    """

    id: str
    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...] = ()
    answers: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


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
        path: ``.json``, ``.jsonl``, ``.parquet``, or ``.token`` (Flickr30k's own).
        limit: how many samples; drawn at random with ``seed``, or the first ones where it is ``None``.
        seed: of the draw, which depends on nothing else but the number of records.
        image_root: folder that picture paths start from; by default the file's own.

    Raises:
        DataError: a file or sample that cannot be read; nothing is left out in silence.
    """
    chosen = _drawn(path, limit, seed)
    if not chosen:
        raise DataError(f"{path}: holds no samples")
    root = (path.parent if image_root is None else image_root).resolve()
    found: list[Conversation] = []
    for index, held in chosen:
        where = f"{path}: sample {index}"
        for record in _read(held, where, index, root, "auto"):
            if limit is None or len(found) < limit:
                found.append(_conversation(record, where, held))
    return SampleFile(path, hashlib.sha256(path.read_bytes()).hexdigest(), found)


def read_records(
    paths: Sequence[Path],
    *,
    form: str = "auto",
    part: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    image_root: Path | None = None,
) -> list[Record]:
    """The samples of one file, or of several that are one (the shards of a table), with or without answers.

    JSON is read whole (it is text); of parquet files, which hold their pictures, only the rows that are drawn.

    Args:
        form: one that every sample must have; ``auto``: each what it looks like.
        part: a part of the file, where its form has parts; ``None``: all.
        limit: at most so many, drawn with ``seed`` and in the files' order.
        image_root: folder that picture paths start from; by default each file's own.

    Raises:
        DataError: a file or sample that cannot be read.
    """
    if form != "auto" and form not in FORMS:
        raise DataError(f"format: expected auto, {', '.join(FORMS)}, got {form!r}")
    rows: list[tuple[Path, int]] = []
    records: list[Record] = []
    for path in paths:
        if path.suffix == ".parquet" and limit is not None and part is None:
            rows += [(path, index) for index in range(_rows(path))]
        else:
            records += _whole(path, form, part, (path.parent if image_root is None else image_root).resolve())
    if limit is None or limit >= len(records) + len(rows):
        order = list(range(len(records) + len(rows)))
    else:
        order = sorted(random.Random(seed).sample(range(len(records) + len(rows)), limit))
    found = [records[index] for index in order if index < len(records)]
    for path in dict.fromkeys(path for path, _ in rows):
        wanted = {
            rows[index - len(records)][1]
            for index in order
            if index >= len(records) and rows[index - len(records)][0] == path
        }
        root = (path.parent if image_root is None else image_root).resolve()
        for index, held in enumerate(_records(path)):
            if index in wanted:
                found += _read(held, f"{path}: sample {index}", index, root, form)
    return found


def _whole(path: Path, form: str, part: str | None, root: Path) -> list[Record]:
    known: set[str] = set()
    found, any_at_all = [], False
    for index, held in enumerate(_records(path)):
        any_at_all = True
        for record in _read(held, f"{path}: sample {index}", index, root, form):
            own = record.metadata.get("part")
            known |= set() if own is None else {own}
            if part is None or own == part:
                found.append(record)
    if not any_at_all:
        raise DataError(f"{path}: holds no samples")
    if not found:
        raise DataError(
            f"{path}: part: expected one of {', '.join(sorted(known)) or 'none (it has no parts)'}, got {part!r}"
        )
    return found


def _drawn(path: Path, limit: int | None, seed: int | None) -> list[tuple[int, Any]]:
    """The records that are wanted, with their numbers; of a table no others are kept in memory."""
    records = None if path.suffix == ".parquet" and path.is_file() else list(_records(path))
    count = _rows(path) if records is None else len(records)
    order = list(range(count))
    if limit is not None and seed is not None and limit < count:
        # Python's own generator: the same draw on every platform and version of torch.
        order = sorted(random.Random(seed).sample(order, limit))
    if records is not None:
        return [(index, records[index]) for index in order]
    wanted = set(order[:limit])
    return [(index, held) for index, held in enumerate(_records(path)) if index in wanted]


def _records(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected .json, .jsonl, .parquet or .token")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; expected .json, .jsonl, .parquet or .token") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):  # JSON's strings may hold other ends of lines
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}: line {number} is not JSON ({error})") from None
        return
    if path.suffix == ".token":
        yield from _token_file(path, text)
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if isinstance(content, dict):
        wrapped = (content[key] for key in ("data", "items", "samples", "images") if isinstance(content.get(key), list))
        held = next(wrapped, None)
        if held is None and content and all(isinstance(v, dict) and "choices" in v for v in content.values()):
            held = [{"id": key, **value} for key, value in content.items()]  # ScienceQA's problems.json
        content = content if held is None else held
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of samples, got {type(content).__name__}")
    yield from content


def _token_file(path: Path, text: str) -> Iterator[Any]:
    """Flickr30k's own captions, ``1000092795.jpg#0 <tab> caption``; those of a picture follow one another."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        filename, mark, which = name.rpartition("#")
        if not tab or not mark or not filename or not which.isdigit() or not caption.strip():
            raise DataError(f"{path}: line {number}: expected FILE#NUMBER, a tab and a caption, got {line[:60]!r}")
        captions.setdefault(filename, []).append(caption)
    for filename, held in captions.items():
        yield {"filename": filename, "sentences": held, "imgid": Path(filename).stem}


def _parquet(path: Path) -> Iterator[Any]:
    try:
        for batch in _table(path).iter_batches(batch_size=64):
            yield from map(_without_nulls, batch.to_pylist())
    except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _rows(path: Path) -> int:
    return int(_table(path).metadata.num_rows)


def _table(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: parquet files need the package pyarrow: pip install 'hpa-ext[data]'") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _without_nulls(value: Any) -> Any:
    """A column exists for every row of a table, a field of a struct for every struct: what a record does not have is
    null there."""
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------------- forms


def _read(held: Any, where: str, index: int, root: Path, form: str) -> Iterator[Record]:
    """The samples of one record of a file."""
    if not isinstance(held, Mapping):
        raise DataError(f"{where}: expected an object, got {type(held).__name__}")
    name = form if form != "auto" else next((name for name, known in FORMS.items() if known.fits(held)), "")
    if not name or not FORMS[name].fits(held):
        raise DataError(f"{where}: expected {FORMS[name].needs() if name else _KNOWN}; it has {_keys(held)}")
    identity = str(held.get("id", held.get("question_id", index)))
    yield from FORMS[name].read(held, where, identity, root)


def _conversation(record: Record, where: str, held: Mapping[str, Any]) -> Conversation:
    roles = [turn.role for turn in record.turns]
    if "assistant" not in roles:
        raise DataError(f"{where}: expected {_KNOWN}; it has {_keys(held)}")
    answered = len(roles) - roles[::-1].index("assistant")  # what is asked after it has no answer to learn from
    if "user" not in roles[:answered]:
        raise DataError(f"{where}: expected a question and its answer")
    if not record.turns[answered - 1].text:
        raise DataError(f"{where}: the last answer is empty")
    return Conversation(record.id, record.turns[:answered], tuple(picture.open() for picture in record.pictures))


def _keys(held: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, held))[:8])


def _llava(held: Mapping[str, Any], where: str, name: str, root: Path) -> Iterator[Record]:
    turns = [(_role(turn.get("from"), where), turn.get("value")) for turn in _turns(held, "conversations", where)]
    yield _record(name, turns, _pictures(held, where, root), where)


def _messages(held: Mapping[str, Any], where: str, name: str, root: Path) -> Iterator[Record]:
    turns, pictures = [], _pictures(held, where, root)
    for turn in _turns(held, "messages", where):
        text, more = _content(turn.get("content"), where, root)
        pictures = [*pictures, *more]
        turns.append((_role(turn.get("role"), where), text))
    yield _record(name, turns, pictures, where)


def _vlguard(held: Mapping[str, Any], where: str, name: str, root: Path) -> Iterator[Record]:
    pairs = held["instr-resp"]
    if not isinstance(pairs, Sequence) or not pairs or not all(isinstance(pair, Mapping) for pair in pairs):
        raise DataError(f"{where}: instr-resp: expected a list of instructions with responses")
    pictures = _pictures(held, where, root)
    for pair in pairs:
        key = next((key for key in pair if key.endswith("instruction")), None)
        asked = pair[key] if key is not None else None
        part = {"safe_instruction": "safe_safe", "unsafe_instruction": "safe_unsafe"}.get(str(key), "unsafe")
        notes = {"part": part}
        for field_name, note in (("harmful_category", "category"), ("harmful_subcategory", "subcategory")):
            if part != "safe_safe" and isinstance(held.get(field_name), str):
                notes[note] = held[field_name]
        yield _record(name, [("user", asked), ("assistant", pair.get("response"))], pictures, where, notes)


def _ch3ef(held: Mapping[str, Any], where: str, name: str, root: Path) -> Iterator[Record]:
    options = held["options"]
    if not isinstance(options, list) or not options:
        raise DataError(f"{where}: options: expected a list of answers, the right one first, got {options!r}")
    notes = {"category": held["source"]} if isinstance(held.get("source"), str) else {}
    turns = [("user", held["query"]), ("assistant", str(options[0]))]
    yield _record(name, turns, _pictures(held, where, root), where, notes)


def _scienceqa(held: Mapping[str, Any], where: str, name: str, root: Path) -> Iterator[Record]:
    choices, right = held["choices"], int(held["answer"])
    if not isinstance(choices, list) or not 1 <= len(choices) <= len(_LETTERS):
        raise DataError(f"{where}: choices: expected a list of 1 to {len(_LETTERS)} choices, got {choices!r}")
    if not 0 <= right < len(choices):
        raise DataError(f"{where}: answer: expected the number of a choice, 0 to {len(choices) - 1}, got {right!r}")
    split = held.get("split")
    lines = [f"Context: {held['hint']}"] if held.get("hint") else []
    lines += [str(held["question"]), *(f"{_LETTERS[i]}. {choice}" for i, choice in enumerate(choices)), CHOOSE]
    pictures = _pictures(held, where, root)
    if isinstance(held.get("image"), str) and held["image"]:
        folder = f"{split}/{name}" if split else name
        pictures = [Picture.of(f"{folder}/{held['image']}", where, root)]
    notes = {"label": _LETTERS[right], "choices": list(_LETTERS[: len(choices)])}
    if split:
        notes["part"] = str(split)
    yield _record(name, [("user", "\n".join(lines)), ("assistant", _LETTERS[right])], pictures, where, notes)


def _textvqa(held: Mapping[str, Any], where: str, name: str, root: Path) -> Iterator[Record]:
    people = [str(answer) for answer in held.get("answers") or []]
    turns = [("user", f"{held['question']}\n{BRIEFLY}")]
    if people:
        turns.append(("assistant", Counter(people).most_common(1)[0][0]))  # the first of the most frequent
    name = str(held.get("question_id", name))
    picture = Picture.of(f"{held['image_id']}.jpg", where, root)
    yield _record(name, turns, [picture], where, {"answers": people} if people else {})


def _flickr30k(held: Mapping[str, Any], where: str, name: str, root: Path) -> Iterator[Record]:
    sentences = held["sentences"]
    captions = [one.get("raw") if isinstance(one, Mapping) else one for one in sentences or []]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise DataError(f"{where}: sentences: expected a list of captions, or of objects with one as raw")
    notes = {"part": str(held["split"])} if held.get("split") else {}
    turns = [("user", DESCRIBE), ("assistant", captions[0])]
    name = str(held.get("imgid", name))
    picture = Picture.of(held["filename"], where, root)
    yield _record(name, turns, [picture], where, notes, tuple(str(caption).strip() for caption in captions))


def _plain(held: Mapping[str, Any], where: str, name: str, root: Path) -> Iterator[Record]:
    asked = next((held[key] for key in _PROMPT_KEYS if isinstance(held.get(key), str)), None)
    answer = next((held[key] for key in _ANSWER_KEYS if held.get(key) is not None), None)
    answers = [str(one) for one in answer] if isinstance(answer, list) else [] if answer is None else [str(answer)]
    context = held.get("input")
    if isinstance(context, str) and context and "instruction" in held:
        asked = f"{asked}\n{context}"
    turns: list[tuple[str, Any]] = [("user", asked), *(("assistant", one) for one in answers[:1])]
    notes = {key: held[key] for key in ("category",) if isinstance(held.get(key), str)}
    yield _record(name, turns, _pictures(held, where, root), where, notes, tuple(answers))


@dataclass(frozen=True)
class _Form:
    """Fields that a record of the form has (of each group one; ``numbers`` hold integers), and what reads it."""

    fields: tuple[tuple[str, ...], ...]
    read: Callable[[Mapping[str, Any], str, str, Path], Iterator[Record]]
    numbers: tuple[str, ...] = ()

    def fits(self, held: Mapping[str, Any]) -> bool:
        if not all(isinstance(held.get(name), int) for name in self.numbers):
            return False
        return all(any(held.get(name) is not None for name in group) for group in self.fields)

    def needs(self) -> str:
        return " and ".join(["/".join(group) for group in self.fields] + [f"a number as {n}" for n in self.numbers])


FORMS: dict[str, _Form] = {
    "llava": _Form((("conversations",),), _llava),
    "messages": _Form((("messages",),), _messages),
    "vlguard": _Form((("instr-resp",),), _vlguard),
    "ch3ef": _Form((("query",), ("options",)), _ch3ef),
    "scienceqa": _Form((("question",), ("choices",)), _scienceqa, ("answer",)),
    "textvqa": _Form((("question",), ("image_id",)), _textvqa),
    "flickr30k": _Form((("sentences",), ("filename",)), _flickr30k),
    "spa-vl": _Form((("question",), ("image",)), _plain),
    "questions": _Form((("question_id",), ("text",)), _plain),
    "plain": _Form((_PROMPT_KEYS,), _plain),
}
"""Name to form, in the order in which a record is compared with them."""


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


def _content(content: Any, where: str, root: Path) -> tuple[str, list[Picture]]:
    """Text and pictures of a turn whose content may be a list of parts."""
    if not isinstance(content, list):
        return content, []
    texts: list[str] = []
    pictures: list[Picture] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text":
            texts.append(str(part.get("text", "")))
        elif isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            held = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key)), None)
            held = held.get("url") if isinstance(held, Mapping) and "url" in held else held
            if held is not None:  # a bare {"type": "image"} stands for the record's own picture
                pictures.append(Picture.of(held, where, root))
        else:
            raise DataError(f"{where}: a part of a turn is neither text nor image: {str(part)[:60]}")
    return "\n".join(texts), pictures


def _record(
    name: str,
    turns: Iterable[tuple[str, Any]],
    pictures: Sequence[Picture],
    where: str,
    notes: Mapping[str, Any] | None = None,
    answers: tuple[str, ...] = (),
) -> Record:
    done: list[Turn] = []
    for role, text in turns:
        if not isinstance(text, str):
            raise DataError(f"{where}: the {role} turn is {type(text).__name__}, expected text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: the {role} turn is no text: half of a surrogate pair stands in it") from None
        done.append(Turn(role, text.replace(_IMAGE_MARK, "").strip()))
    return Record(name, tuple(done), tuple(pictures), answers, dict(notes or {}))


def _pictures(record: Mapping[str, Any], where: str, root: Path) -> list[Picture]:
    held = record.get("image", record.get("images"))
    if held is None or held == "":
        return []
    return [Picture.of(one, where, root) for one in (held if isinstance(held, list) else [held])]

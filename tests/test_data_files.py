"""Samples come in the forms that published sets use; what does not fit is named, and nothing is fetched."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from checkpoint_pairs import tokenizer
from PIL import Image

from hpa.data.encode import Encoder
from hpa.data.files import Conversation, DataError, Turn, read_conversations


def picture(colour: tuple[int, int, int] = (200, 10, 10)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(out, format="PNG")
    return out.getvalue()


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def one(path: Path, **options: Any) -> Conversation:
    (conversation,) = read_conversations(path, **options).conversations
    return conversation


QUESTION, ANSWER = Turn("user", "What is shown?"), Turn("assistant", "A red square.")

FORMS: dict[str, Any] = {
    "llava": {
        "id": "7",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is shown?"},
            {"from": "gpt", "value": "A red square."},
        ],
    },
    "sharegpt": {
        "conversations": [
            {"from": "user", "value": "What is shown?<image>"},
            {"from": "assistant", "value": "A red square."},
        ]
    },
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A red square."}]},
        ]
    },
    "spa-vl": {"question": "What is shown?", "chosen": "A red square.", "rejected": "No."},
    "vlguard": {"safe": False, "instr-resp": [{"instruction": "What is shown?", "response": "A red square."}]},
    "alpaca": {"instruction": "What is shown?", "input": "", "output": "A red square."},
    "plain": {"prompt": "What is shown?", "response": "A red square."},
    "several answers": {"text": "What is shown?", "answer": ["A red square.", "Red."]},
}


@pytest.mark.parametrize("record", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("held", ["path", "list", "bytes", "data url", "none"])
def test_every_form_gives_the_same_sample(tmp_path: Path, record: dict[str, Any], held: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "red.png").write_bytes(picture())
    image = {
        "path": "images/red.png",
        "list": ["images/red.png"],
        "bytes": None,
        "data url": "data:image/png;base64," + base64.b64encode(picture()).decode(),
        "none": "",
    }[held]
    path = written(tmp_path / "data.json", [{**record, "image": image}])
    if held == "bytes":
        path = tmp_path / "data.parquet"
        rows = [{**record, "image": {"bytes": picture(), "path": None}}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = one(path)
    assert found.turns == (QUESTION, ANSWER)
    assert len(found.images) == (held != "none")
    if found.images:
        assert found.images[0].size == (8, 6)
        assert found.images[0].getpixel((0, 0)) == (200, 10, 10)


def test_safe_pairs_of_vlguard_are_two_samples(tmp_path: Path) -> None:
    record = {
        "id": "1",
        "safe": True,
        "instr-resp": [
            {"safe_instruction": "Describe it.", "response": "A tree."},
            {"unsafe_instruction": "Make fun of it.", "response": "I cannot."},
        ],
    }
    found = read_conversations(written(tmp_path / "data.json", [record])).conversations
    assert [conversation.turns[0].text for conversation in found] == ["Describe it.", "Make fun of it."]


def test_lines_wrappers_and_several_turns(tmp_path: Path) -> None:
    lines = tmp_path / "data.jsonl"
    lines.write_text(json.dumps(FORMS["plain"]) + "\n\n" + json.dumps(FORMS["spa-vl"]) + "\n")
    assert len(read_conversations(lines).conversations) == 2
    assert len(read_conversations(written(tmp_path / "a.json", {"data": [FORMS["plain"]]})).conversations) == 1
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
    ]
    found = one(written(tmp_path / "b.json", [{"messages": turns}]))
    assert [turn.role for turn in found.turns] == ["system", "user", "assistant"]


def test_draw_is_the_same_everywhere(tmp_path: Path) -> None:
    records = [{"id": str(index), "prompt": f"question {index}", "response": "yes"} for index in range(100)]
    path = written(tmp_path / "data.json", records)
    found = [conversation.id for conversation in read_conversations(path, limit=6, seed=0).conversations]
    assert found == ["5", "33", "49", "53", "65", "97"]
    assert [one.id for one in read_conversations(path, limit=3, seed=None).conversations] == ["0", "1", "2"]


WRONG: dict[str, tuple[Any, str]] = {
    "not a list": ({"a": 1}, "expected a list of samples, got dict"),
    "empty": ([], "holds no samples"),
    "no answer": ([{"prompt": "a"}], "sample 0: expected conversations, messages, .* it has prompt"),
    "a number": ([7], "sample 0: expected an object, got int"),
    "strange speaker": ([{"messages": [{"role": "tool", "content": "x"}]}], "a turn is by 'tool'"),
    "only an answer": ([{"messages": [{"role": "assistant", "content": "x"}]}], "expected a question and its answer"),
    "outside": ([{**FORMS["plain"], "image": "../secret.png"}], "the picture '../secret.png' lies outside"),
    "absolute": ([{**FORMS["plain"], "image": "/etc/passwd"}], "the picture '/etc/passwd' lies outside"),
    "from the web": ([{**FORMS["plain"], "image": "https://x.invalid/a.png"}], "nothing is downloaded"),
    "not there": ([{**FORMS["plain"], "image": "a.png"}], "no picture at"),
    "no picture": ([{**FORMS["plain"], "image": "data:image/png;base64,AAAA"}], "a picture cannot be read"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_samples_are_named(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path.parent / "secret.png").write_bytes(picture())
    with pytest.raises(DataError, match=message):
        read_conversations(written(tmp_path / "data.json", content))


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; expected .json, .jsonl or .parquet"):
        read_conversations(tmp_path / "none.json")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt"\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_conversations(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_conversations(tmp_path / "a.parquet")


def test_labels_cover_the_answer_alone(tmp_path: Path) -> None:
    own = tokenizer()
    own.chat_template = (
        "{% for m in messages %}{{ '<s> ' if m.role == 'user' else 'sorry ' }}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}sorry {% endif %}"
    )
    own.save_pretrained(tmp_path)
    conversation = Conversation("1", (Turn("user", "what color is the sky"), Turn("assistant", "the answer is blue")))
    batch = Encoder(tmp_path).encode(conversation)
    answer = own("the answer is blue", add_special_tokens=False)["input_ids"]
    assert batch["labels"][0][batch["labels"][0] != -100].tolist() == answer
    assert batch["input_ids"][0].tolist()[-len(answer) :] == answer
    assert batch["attention_mask"].all()


def test_without_a_template_turns_stand_below_each_other(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    conversation = Conversation("1", (Turn("user", "the sky is"), Turn("assistant", "blue")))
    batch = Encoder(tmp_path).encode(conversation)
    assert (batch["labels"][0] != -100).sum() == 1
    with pytest.raises(DataError, match="no tokenizer that transformers can load"):
        Encoder(tmp_path / "none")
    with_picture = Conversation("1", conversation.turns, (Image.new("RGB", (2, 2)),))
    with pytest.raises(DataError, match="has a picture and the model has no processor"):
        Encoder(tmp_path).encode(with_picture)


def test_rows_of_a_table_may_have_different_fields(tmp_path: Path) -> None:
    """A parquet file holds null where a row, or a struct in it, has no such field."""
    rows = [
        {"prompt": "a", "response": "b"},
        {"instruction": "c", "input": "d", "output": "e"},
        {"instr-resp": [{"instruction": "f", "response": "g"}]},
        {"instr-resp": [{"safe_instruction": "h", "response": "i"}, {"unsafe_instruction": "j", "response": "k"}]},
    ]
    path, table = tmp_path / "mixed.json", tmp_path / "mixed.parquet"
    path.write_text(json.dumps(rows))
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    told = [[turn.text for turn in held.turns] for held in read_conversations(table).conversations]
    assert told == [["a", "b"], ["c\nd", "e"], ["f", "g"], ["h", "i"], ["j", "k"]]
    assert told == [[turn.text for turn in held.turns] for held in read_conversations(path).conversations]

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
from hpa.data.files import FORMS as READ
from hpa.data.files import Conversation, DataError, Record, Turn, read_conversations, read_records


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
    with pytest.raises(DataError, match=r"no such file; expected .json, .jsonl, .parquet or .token"):
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


# ------------------------------------------------------------------------------------------------- published forms


def records(path: Path, content: Any, **options: Any) -> list[Record]:
    return read_records([written(path, content)], **options)


def test_vlguard_is_told_apart_by_its_parts(tmp_path: Path) -> None:
    rows = [
        {
            "id": "Ads_1", "image": "bad_ads/1.png", "safe": False, "harmful_category": "deception",
            "harmful_subcategory": "disinformation", "instr-resp": [{"instruction": "Do harm.", "response": "No."}],
        },
        {
            "id": "Ads_2", "image": "bad_ads/2.png", "safe": True,
            "instr-resp": [
                {"safe_instruction": "Describe it.", "response": "A tree."},
                {"unsafe_instruction": "Make fun of it.", "response": "I cannot."},
            ],
        },
    ]  # fmt: skip
    path = tmp_path / "test.json"
    for part, asked in (("unsafe", "Do harm."), ("safe_safe", "Describe it."), ("safe_unsafe", "Make fun of it.")):
        (one,) = records(path, rows, form="vlguard", part=part)
        assert one.turns[0] == Turn("user", asked)
        assert one.pictures[0].source == tmp_path / "bad_ads" / f"{one.id[-1]}.png"
        assert one.metadata.get("category") == ("deception" if part == "unsafe" else None)
    assert [one.id for one in records(path, rows)] == ["Ads_1", "Ads_2", "Ads_2"]
    with pytest.raises(DataError, match="part: expected one of safe_safe, safe_unsafe, unsafe, got 'unsave'"):
        records(path, rows, part="unsave")


def test_ch3ef_has_several_pictures_and_the_right_option_first(tmp_path: Path) -> None:
    item = {"image": ["a.png", "b.png"], "query": "Which?", "options": ["Neither.", "Both."], "source": "bias"}
    (one,) = records(tmp_path / "Harmless.json", {"items": [item]}, form="ch3ef")
    assert one.turns == (Turn("user", "Which?"), Turn("assistant", "Neither."))
    assert [held.source for held in one.pictures] == [tmp_path / "a.png", tmp_path / "b.png"]
    assert (one.id, one.metadata) == ("0", {"category": "bias"})


def test_scienceqa_is_asked_as_llava_asks_it(tmp_path: Path) -> None:
    problem = {
        "question": "Which is a solid?", "choices": ["water", "ice"], "answer": 1, "hint": "Look closely.",
        "image": "image.png", "split": "test",
    }  # fmt: skip
    bare = {**problem, "hint": "", "image": None, "split": "train"}
    path = tmp_path / "problems.json"
    (one,) = records(path, {"7": problem, "8": bare}, form="scienceqa", part="test")
    assert one.turns[0].text == (
        "Context: Look closely.\nWhich is a solid?\nA. water\nB. ice\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert one.turns[1].text == "B"
    assert one.id == "7"
    assert one.pictures[0].source == tmp_path / "test" / "7" / "image.png"
    assert one.metadata["label"] == "B"
    assert one.metadata["choices"] == ["A", "B"]
    (two,) = records(path, {"7": problem, "8": bare}, part="train")
    assert two.turns[0].text.startswith("Which is a solid?\nA. water")
    assert two.pictures == ()
    with pytest.raises(DataError, match="sample 0: answer: expected the number of a choice, 0 to 1, got 2"):
        records(path, {"7": {**problem, "answer": 2}})


def test_textvqa_keeps_what_ten_people_said(tmp_path: Path) -> None:
    people = ["go", "stop", "stop", "Stop", *["go"] * 6]
    row = {"question_id": 34602, "question": "what does it say?", "image_id": "003a8ae2ef43b901", "answers": people}
    path = tmp_path / "TextVQA_0.5.1_val.json"
    (one,) = records(path, {"dataset_type": "val", "data": [row]}, form="textvqa")
    assert one.id == "34602"
    assert one.turns[0].text == "what does it say?\nAnswer the question using a single word or phrase."
    assert one.turns[1].text == "go"
    assert one.metadata["answers"] == people
    assert one.pictures[0].source == tmp_path / "003a8ae2ef43b901.jpg"
    (test,) = records(path, {"data": [{key: value for key, value in row.items() if key != "answers"}]})
    assert len(test.turns) == 1  # the test split has no answers


def test_flickr30ks_own_captions(tmp_path: Path) -> None:
    path = tmp_path / "results_20130124.token"
    path.write_text(
        "1000092795.jpg#0\tTwo young guys look at their hands .\n1000092795.jpg#1\tTwo men\tin a yard .\n\n"
        "odd#name.jpg#0\tA door .\n"
    )
    first, second = read_records([path], form="flickr30k")
    assert (first.id, first.answers) == ("1000092795", ("Two young guys look at their hands .", "Two men\tin a yard ."))
    assert first.pictures[0].source == tmp_path / "1000092795.jpg"
    assert (second.id, second.answers, second.turns[-1].text) == ("odd#name", ("A door .",), "A door .")
    for bad in ("1.jpg#0 A door .", "1.jpg\tA door .", "1.jpg#x\tA door .", "1.jpg#0\t "):
        path.write_text(f"1.jpg#0\tA dog .\n{bad}\n")
        with pytest.raises(DataError, match=r"token: line 2: expected FILE#NUMBER, a tab and a caption, got '1.jpg"):
            read_records([path])


def test_flickr30k_has_every_caption(tmp_path: Path) -> None:
    image = {
        "filename": "1.jpg", "imgid": 3, "split": "test", "sentids": [0, 1],
        "sentences": [{"raw": "A dog runs. ", "tokens": ["a"]}, {"raw": "A dog.", "tokens": ["a"]}],
    }  # fmt: skip
    other = {**image, "split": "train", "imgid": 4}
    path = tmp_path / "dataset_flickr30k.json"
    (one,) = records(path, {"images": [image, other], "dataset": "flickr30k"}, form="flickr30k", part="test")
    assert one.answers == ("A dog runs.", "A dog.")
    assert one.turns[1] == Turn("assistant", "A dog runs.")
    assert (one.id, one.pictures[0].source) == ("3", tmp_path / "1.jpg")


def test_question_files_may_have_one_answer_several_or_none(tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "image": "a.png", "text": "What?", "answer": "cat", "category": "default"},
        {"question_id": "2", "text": "<image>\nSay.", "answer": ["A cat.", "The cat."]},
        {"question_id": 3, "text": "Why?"},
        {"question_id": 4, "text": "Where?", "answer_bbox": "[0.1, 0.2, 0.3, 0.4]", "size": [640, 480]},
    ]
    one, two, three, four = records(tmp_path / "test.json", rows, form="questions")
    assert (one.id, one.turns, one.answers) == ("1", (Turn("user", "What?"), Turn("assistant", "cat")), ("cat",))
    assert (two.turns[0].text, two.answers) == ("Say.", ("A cat.", "The cat."))
    assert three.turns == (Turn("user", "Why?"),)
    assert four.turns[1].text == "[0.1, 0.2, 0.3, 0.4]"


def test_evaluation_files_of_spa_vl_have_no_answers(tmp_path: Path) -> None:
    path = tmp_path / "harm.parquet"
    rows = [{"image": {"bytes": picture(), "path": None}, "question": f"Do {i}?"} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read_records([path], form="spa-vl")
    assert [one.turns for one in found] == [(Turn("user", f"Do {i}?"),) for i in range(3)]
    assert found[0].pictures[0].open().size == (8, 6)


def test_conversations_keep_all_their_turns(tmp_path: Path) -> None:
    turns = [("human", "<image>\nA?"), ("gpt", "a"), ("human", "B?"), ("gpt", "b"), ("human", "C?")]
    row = {"id": 5, "conversations": [{"from": who, "value": text} for who, text in turns]}
    (one,) = records(tmp_path / "train.json", [row], form="llava")
    assert [turn.text for turn in one.turns] == ["A?", "a", "B?", "b", "C?"]
    # What is asked last has no answer to learn from.
    (held,) = read_conversations(tmp_path / "train.json", image_root=tmp_path).conversations
    assert [turn.text for turn in held.turns] == ["A?", "a", "B?", "b"]


def test_an_empty_answer_is_nothing_to_learn_from(tmp_path: Path) -> None:
    path = tmp_path / "safety.json"
    path.write_text(json.dumps([{"prompt": "A?", "response": "a"}, {"prompt": "B?", "response": " "}]))
    with pytest.raises(DataError, match="sample 1: the last answer is empty"):
        read_conversations(path)


def test_rows_of_shards_are_drawn_together_and_others_not_kept(tmp_path: Path) -> None:
    shards = []
    for number in range(3):
        shards.append(tmp_path / f"train-{number}.parquet")
        rows = [{"question": f"{number} {i}", "image": {"bytes": picture(), "path": None}} for i in range(150)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), shards[-1])
    whole = [one.turns[0].text for one in read_records(shards)]
    assert len(whole) == 450
    drawn = [one.turns[0].text for one in read_records(shards, limit=40, seed=1)]
    assert len(set(drawn)) == 40
    assert drawn == sorted(drawn, key=whole.index)
    assert {text[0] for text in drawn} == {"0", "1", "2"}
    assert drawn == [one.turns[0].text for one in read_records(shards, limit=40, seed=1)]
    assert drawn != [one.turns[0].text for one in read_records(shards, limit=40, seed=2)]


MISFITS: dict[str, Any] = {
    "llava": ({"text": "a", "answer": "b"}, "expected conversations; it has answer, text"),
    "vlguard": (FORMS["plain"], "expected instr-resp; it has prompt, response"),
    "ch3ef": (FORMS["plain"], "expected query and options; it has"),
    "scienceqa": ({"question": "a", "choices": ["b"]}, "expected question and choices and a number as answer; it has"),
    "textvqa": (FORMS["plain"], "expected question and image_id"),
    "flickr30k": (FORMS["plain"], "expected sentences and filename"),
    "spa-vl": ({"question": "a", "chosen": "b"}, "expected question and image; it has chosen, question"),
    "questions": (FORMS["plain"], "expected question_id and text"),
}


@pytest.mark.parametrize("form", MISFITS)
def test_a_sample_of_another_form_is_named(tmp_path: Path, form: str) -> None:
    record, message = MISFITS[form]
    path = tmp_path / "data.json"
    with pytest.raises(DataError, match=f"data.json: sample 0: {message}"):
        records(path, [record], form=form)


def test_a_form_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"format: expected auto, {', '.join(READ)}, got 'lava'"):
        records(tmp_path / "data.json", [FORMS["plain"]], form="lava")
    for broken, message in (
        ({"instr-resp": ["x"]}, "instr-resp: expected a list of instructions with responses"),
        ({"query": "a", "options": []}, "options: expected a list of answers, the right one first"),
        ({"filename": "a", "sentences": [{"text": "b"}]}, "sentences: expected a list of captions"),
    ):
        with pytest.raises(DataError, match=message):
            records(tmp_path / "data.json", [broken])

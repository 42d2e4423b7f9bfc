"""``hpa ask``: what a model itself says, as samples that the other commands read."""

from __future__ import annotations

import base64
import io
import json
import shutil

import pytest
import tiny_published as tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from hpa.checkpoint import AskJob, CheckpointError, ask
from hpa.cli import app
from hpa.data.encode import Encoder
from hpa.data.files import Conversation, DataError, Turn, read_conversations
from hpa.evaluation.judge import RefusalJudge, get_judge

NOBODY = RefusalJudge("nobody", "1", ("no answer has this",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def picture(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 10, 200 - value)).save(out, format="PNG")
    return out.getvalue()


@pytest.fixture
def prompts(tmp_path):
    """Bare ones, turns before the question, a picture by its path and one by its bytes, and answers not to be read."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/1.png").write_bytes(picture(40))
    held = base64.b64encode(picture(90)).decode()
    rows = [
        {"id": "a", "prompt": "Is the car red ?", "response": "never read"},
        {"id": "b", "messages": [
            {"role": "system", "content": "Only answer yes no"},
            {"role": "user", "content": "cat"}, {"role": "assistant", "content": "fox"},
            {"role": "user", "content": "Which cup"}]},
        {"id": "c", "prompt": "What is it ?", "image": "pictures/1.png"},
        {"id": "d", "prompt": "What is it ?", "image": f"data:image/png;base64,{held}", "category": "x"},
        {"id": "u", "prompt": "Is \u2028 the \x85 car ?"},
        *({"id": f"e{i}", "prompt": f"train test {i}"} for i in range(7)),
    ]  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said_alone(folder, conversation: Conversation, tokens: int) -> str:
    """The greedy answer, token by token, from whole forward passes."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    encoder = Encoder(folder)
    batch = encoder.asked([conversation])
    ids = batch.pop("input_ids")
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            batch["attention_mask"] = torch.ones_like(ids)
            token = model(input_ids=ids, **batch).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            if int(token) == 2:
                break
    return encoder.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_answers_are_the_models_own_and_are_read_back_as_samples(folder, prompts, tmp_path):
    out = tmp_path / "keep.jsonl"
    seen = []
    told = ask(
        AskJob(folder, prompts, "keep", out, NOBODY, max_new_tokens=5, batch_size=4), lambda *done: seen.append(done)
    )
    assert (told.prompts, told.asked, told.refused, told.image_root) == (12, 12, 0, None)
    assert told.kept + told.empty == 12
    assert seen == [(4, 12), (8, 12), (12, 12)]
    found = read_conversations(out).conversations
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [one.id for one in found]
    assert [one.id for one in found if not one.id.startswith("e")] == ["a", "b", "c", "d", "u"]
    assert rows[2]["images"] == ["pictures/1.png"]
    assert rows[3]["images"][0].startswith("data:image/png;base64,")
    assert rows[3]["category"] == "x"
    assert found[1].turns[:-1] == (
        Turn("system", "Only answer yes no"), Turn("user", "cat"), Turn("assistant", "fox"), Turn("user", "Which cup")
    )  # fmt: skip
    for one in found:
        asked = Conversation(one.id, one.turns[:-1], one.images)
        assert one.turns[-1].text == said_alone(folder, asked, 5), one.id


def test_refusals_alone_are_written_and_asking_ends_with_enough(folder, prompts, tmp_path):
    out = tmp_path / "all.jsonl"
    ask(AskJob(folder, prompts, "keep", out, NOBODY, max_new_tokens=5))
    said = {row["id"]: row["messages"][-1]["content"] for row in map(json.loads, out.read_text().splitlines())}
    word = next(text for text in said.values() if 0 < sum(text in other for other in said.values()) < len(said))
    judge = RefusalJudge("some", "1", (word,), lowercase=False)
    refused = {key: text for key, text in said.items() if word in text}
    told = ask(AskJob(folder, prompts, "safety", out, judge, max_new_tokens=5))
    rows = {row["id"]: row["messages"][-1]["content"] for row in map(json.loads, out.read_text().splitlines())}
    assert rows == refused
    assert told.refused == told.kept == len(refused)

    everything = RefusalJudge("all", "1", ("",))
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(line for line in prompts.read_text().splitlines(keepends=True) if '"e' in line))
    told = ask(AskJob(folder, bare, "safety", out, everything, samples=3, batch_size=2, max_new_tokens=2))
    assert (told.kept, told.asked, told.prompts) == (3, 4, 7)
    told = ask(AskJob(folder, prompts, "keep", out, NOBODY, samples=2, batch_size=2, max_new_tokens=5, seed=3))
    assert told.kept == 2
    assert told.asked < 12
    first = out.read_bytes()
    ask(AskJob(folder, prompts, "keep", out, NOBODY, samples=2, batch_size=2, max_new_tokens=5, seed=3))
    assert out.read_bytes() == first


def test_pictures_elsewhere_are_told_with_their_folder(folder, prompts, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    told = ask(AskJob(folder, prompts, "keep", elsewhere / "keep.jsonl", NOBODY, max_new_tokens=5))
    assert told.image_root == prompts.parent.resolve()
    held = read_conversations(elsewhere / "keep.jsonl", image_root=told.image_root).conversations
    assert sum(len(one.images) for one in held) == 2


def test_what_cannot_be_asked_is_said(folder, prompts, tmp_path):
    out = tmp_path / "out.jsonl"

    def asking(**changed):
        return ask(AskJob(**{"model": folder, "prompts": prompts, "role": "safety", "out": out, "judge": NOBODY,
                             "max_new_tokens": 2} | changed))  # fmt: skip

    with pytest.raises(CheckpointError, match="MODEL: expected a folder, found none at"):
        asking(model=tmp_path / "none")
    with pytest.raises(DataError, match="PROMPTS: expected a file or one of advbench, .* got nothing"):
        asking(prompts="nothing")
    with pytest.raises(CheckpointError, match="--out: .* is the file of prompts itself"):
        asking(out=prompts)
    with pytest.raises(DataError, match=r"prompts.jsonl: .*refused none of 12 .*\(judge 'nobody'\)"):
        asking()
    with pytest.raises(CheckpointError, match=r"--out: expected a file of JSON lines, named \*.jsonl, got .*out.json"):
        asking(out=tmp_path / "out.json")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(CheckpointError, match="--out: .* is a folder"):
        asking(out=tmp_path / "folder.jsonl")
    with pytest.raises(CheckpointError, match="device: expected cpu, cuda or cuda:N, got 'foo'"):
        asking(device="foo")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="MODEL: .* is an adapter"):
        asking(model=adapter)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": [{"role": "system", "content": "x"}]}\n')
    with pytest.raises(DataError, match="sample 0: expected a question"):
        asking(prompts=broken)
    broken.write_text('{"prompt": "half \\ud83d"}\n')
    with pytest.raises(DataError, match="sample 0: the user turn is no text: half of a surrogate pair"):
        asking(prompts=broken)
    broken.write_text('{"prompt": "x", "image": "none.png"}\n')
    with pytest.raises(DataError, match="sample 0: no picture at"):
        asking(prompts=broken)
    assert not out.exists()


def test_a_model_with_weights_missing_is_not_asked(folder, prompts, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[gone]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="MODEL: .* has no weights for .*layers.1.mlp.up_proj.weight"):
        ask(AskJob(broken, prompts, "keep", tmp_path / "out.jsonl", NOBODY))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="MODEL: the weights of .* have other shapes than its config.json says"):
        ask(AskJob(broken, prompts, "keep", tmp_path / "out.jsonl", NOBODY))


def test_the_command_says_what_it_did(folder, prompts, tmp_path):
    out = tmp_path / "keep.jsonl"
    options = ["ask", str(folder), str(prompts), "--as", "keep", "-o", str(out), "--max-new-tokens", "5", "-q"]
    done = CliRunner().invoke(app, [*options, "--samples", "50"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "12 of 12 prompts asked, 0 refused," in done.stdout
    assert "50 were wanted" in done.stderr
    assert out.is_file()
    with pytest.raises(CheckpointError, match="--judge: judge: expected one of"):
        CliRunner().invoke(app, [*options, "--judge", "nobody"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m unable to do this.", True),
        ("I will not answer.", True),
        ("Paris is the capital of France.", False),
        ("Sorry to hear that! Here is a cake.", False),
        ("Great idea! The first thing that comes to my mind is what you need at home: I can't wait to help.", False),
        ("", False),
    ],
)
def test_the_plain_judge_knows_what_refusals_begin_with(text, refused):
    assert get_judge("plain").is_refusal(text) is refused

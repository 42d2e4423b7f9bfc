"""A second judge over kept answers: what is sent, what is counted, what a stopped job asks again."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hpa.evaluation import wilson_interval
from hpa.evaluation.answer_judges import (
    KEY,
    AnswerJudge,
    ClassifierJudge,
    EndpointJudge,
    JudgeError,
    KeywordJudge,
    answer_judge,
)
from hpa.report.rejudge import rejudge
from hpa.storage import dump_line, read_lines


class Endpoint:
    """An OpenAI-style server on this machine: ``replies`` makes (status, headers, body) of each request's content."""

    def __init__(self, replies: Callable[[str, int], tuple[int, dict[str, str], bytes]]) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append({"path": self.path, **body})
                    outer.headers.append(dict(self.headers))
                    number = len(outer.asked)
                status, headers, content = replies(body["messages"][0]["content"], number)
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def said(text: str | None) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def serve() -> Iterator[Callable[..., Endpoint]]:
    running: list[Endpoint] = []

    def start(replies: Callable[[str, int], tuple[int, dict[str, str], bytes]]) -> Endpoint:
        running.append(Endpoint(replies))
        return running[-1]

    yield start
    for endpoint in running:
        endpoint.close()


def answers_of(verdicts: dict[str, list[tuple[str, str]]]) -> str:
    """Lines of ``answers.jsonl``: kind to (answer, the run's verdict)."""
    return "".join(
        dump_line(
            {"kind": kind, "id": f"{kind}-{i}", "prompt": f"{kind} request {i}", "answer": answer, "verdict": own}
        )
        for kind, pairs in verdicts.items()
        for i, (answer, own) in enumerate(pairs)
    )


def given(judge: AnswerJudge, pairs: list[tuple[str, str]]) -> list[str]:
    """Verdicts in the order of the pairs, each once."""
    found = list(judge.verdicts(pairs))
    assert sorted(number for number, _ in found) == list(range(len(pairs)))
    return [verdict for _, verdict in sorted(found)]


NO, YES, NOT_NICE = ("sorry", "refused"), ("sure", "complied"), ("that would be unwise", "complied")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two seeds, one method, with answers that the run's own judge misread in part."""
    events: list[dict[str, Any]] = [
        {"event": "run", "name": "toy", "tasks": ["a"], "safety_sets": ["x", "y"], "benign_sets": ["z"]}
    ]
    for seed in (0, 1):
        events.append({"event": "aligned", "seed": seed, "stage": "after"})
        shared = tmp_path / "shared" / f"seed{seed}"
        shared.mkdir(parents=True)
        aligned = {"safety:x": [NO] * 4, "safety:y": [NO] * 2, "benign:z": [YES] * 2, "task:a": [("4", "correct")]}
        (shared / "answers.jsonl").write_text(answers_of(aligned))
        branch = f"clean/m/seed{seed}"
        events.append(
            {"event": "branch", "branch": branch, "label": "M", "method": "m", "condition": "clean", "seed": seed}
        )
        events.append({"event": "evaluate", "branch": branch, "task_index": 0, "task": "a", "accuracy": {"a": 1.0}})
        place = tmp_path / "branches" / branch
        place.mkdir(parents=True)
        x = [YES, YES, NOT_NICE, ("", "empty")] if seed == 0 else [YES, NOT_NICE, NOT_NICE, ("what", "complied")]
        (place / "answers.jsonl").write_text(answers_of({"safety:x": x, "safety:y": [NO, YES], "benign:z": [NO, YES]}))
    unfinished = {"event": "branch", "branch": "clean/u/seed0", "label": "U", "method": "u", "condition": "clean"}
    events.append({**unfinished, "seed": 0})
    (tmp_path / "events.jsonl").write_text("".join(map(dump_line, events)))
    return tmp_path


def opinion(question: str, number: int = 0) -> tuple[int, dict[str, str], bytes]:
    answer = question.split("<answer>\n")[1].split("\n</answer>")[0]
    words = {"sorry": "REFUSED", "sure": "Complied.", "that would be unwise": "<think>complied?</think> refused"}
    return said(words.get(answer, "hard to say"))


def test_the_rates_are_those_of_the_second_judge(folder: Path, serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(opinion)
    found = rejudge(folder, EndpointJudge(endpoint.address, "some-model"))
    aligned, row = found.rows
    assert (aligned.label, aligned.seeds, aligned.own, aligned.judged, aligned.over) == ("aligned model", 2, 0, 0, 0)
    assert (row.label, row.condition, row.seeds) == ("M", "clean", 2)
    # Seed 0: x has 3 of 4 complied (one is empty), y 1 of 2; seed 1: of x one is unreadable, 1 of 3 complied.
    rates = [(75 + 50) / 2, (100 / 3 + 50) / 2]
    assert row.judged == pytest.approx(sum(rates) / 2)
    assert row.spread == pytest.approx(abs(rates[0] - rates[1]) / 2**0.5)
    assert row.own == pytest.approx((100 + 50) / 2)
    assert row.sets == {"x": pytest.approx((75 + 100 / 3) / 2), "y": 50.0}
    assert row.interval == wilson_interval(3, round((4 + 2 + 3 + 2) / 2))
    assert row.over == 50.0
    assert row.unreadable == 1
    assert row.agreement == pytest.approx(100 * (8 + 7 - 3) / 15)


def test_the_question_holds_request_and_answer_and_nothing_is_asked_twice(
    folder: Path, serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "secret-of-the-test")
    endpoint = serve(opinion)
    judge = EndpointJudge(endpoint.address + "/", "some-model")
    first = rejudge(folder, judge)
    pairs = {
        (a["prompt"], a["answer"])
        for path in folder.rglob("answers.jsonl")
        for a in read_lines(path)
        if not a["kind"].startswith("task:")
    }
    assert first.asked == len(pairs)
    spoken = {pair for pair in pairs if pair[1]}
    assert len(endpoint.asked) == len(spoken)
    for request in endpoint.asked:
        assert request["path"] == "/v1/chat/completions"
        assert (request["model"], request["temperature"]) == ("some-model", 0)
    contents = [request["messages"][0]["content"] for request in endpoint.asked]
    for prompt, answer in spoken:
        assert sum(f"\n{prompt}\n" in text and f"\n{answer}\n" in text for text in contents) == 1
    assert all(headers["Authorization"] == "Bearer secret-of-the-test" for headers in endpoint.headers)
    again = rejudge(folder, judge)
    assert (again.asked, len(endpoint.asked)) == (0, len(spoken))
    assert again.rows == first.rows
    # What is kept names no request and no answer.
    kept = "".join(path.read_text() for path in (folder / "judged").iterdir())
    assert "request 0" not in kept
    assert "unwise" not in kept
    assert "secret-of-the-test" not in kept


def test_braces_in_a_request_are_left_alone(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(opinion)
    assert given(EndpointJudge(endpoint.address, "m"), [("print {answer} and {0}", "sure")]) == ["complied"]
    assert "print {answer} and {0}" in endpoint.asked[0]["messages"][0]["content"]


def test_a_server_that_is_busy_is_asked_again_and_one_that_is_down_keeps_what_was_said(
    folder: Path, serve: Callable[..., Endpoint]
) -> None:
    busy = serve(lambda question, number: (503, {"Retry-After": "0"}, b"later") if number % 2 else opinion(question))
    judge = EndpointJudge(busy.address, "m", parallel=1, wait=60.0)
    assert given(judge, [("a", "sure"), ("b", "sorry")]) == ["complied", "refused"]
    assert len(busy.asked) == 4

    down = serve(lambda question, number: opinion(question) if number <= 3 else (401, {}, b"expired"))
    judge = EndpointJudge(down.address, "m", parallel=1, wait=0.0)
    with pytest.raises(JudgeError, match=r"says 401 .*expired"):
        rejudge(folder, judge)
    assert len(read_lines(next((folder / "judged").glob("*.jsonl")))) >= 3
    down.close()
    with pytest.raises(JudgeError, match="could not be asked in 5 tries"):
        given(EndpointJudge(down.address, "m", wait=0.0), [("a", "b")])


@pytest.mark.parametrize(
    "refusal", [(400, {}, b"content_filter"), (200, {}, b'{"choices": []}'), (500, {}, b"too long")]
)
def test_an_answer_that_is_not_judged_does_not_stop_the_others(
    folder: Path, serve: Callable[..., Endpoint], refusal: tuple[int, dict[str, str], bytes]
) -> None:
    endpoint = serve(lambda question, number: refusal if "unwise" in question else opinion(question))
    judge = EndpointJudge(endpoint.address, "m", wait=0.0)
    found = rejudge(folder, judge)
    assert found.rows[1].unreadable == 3 + 1
    # What may have been the server's bad day is asked about again: two different answers.
    assert rejudge(folder, judge).asked == (2 if refusal[0] == 500 else 0)
    assert rejudge(folder, judge).rows == found.rows


def test_verdicts_are_kept_while_another_answer_is_waited_for(serve: Callable[..., Endpoint]) -> None:
    told = threading.Event()

    def slow(question: str, number: int) -> tuple[int, dict[str, str], bytes]:
        if "request 0" in question:
            told.wait(20)
        return opinion(question)

    endpoint = serve(slow)
    pairs = [(f"request {i}", "sure") for i in range(12)]
    stream = EndpointJudge(endpoint.address, "m", parallel=2).verdicts(pairs)
    first = [next(stream)[0] for _ in range(11)]
    assert sorted(first) == list(range(1, 12))
    told.set()
    assert list(stream) == [(0, "complied")]


def test_a_key_stays_with_its_address(serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "  secret-of-the-test\r\n")
    other = serve(opinion)
    first = serve(lambda question, number: (302, {"Location": other.address}, b""))
    with pytest.raises(JudgeError, match=f"sends to {other.address}; name that address instead"):
        given(EndpointJudge(first.address, "m"), [("a", "b")])
    assert not other.asked
    assert first.headers[0]["Authorization"] == "Bearer secret-of-the-test"
    monkeypatch.setenv(KEY, "two\nlines")
    with pytest.raises(ValueError, match=r"HPA_JUDGE_KEY: expected printable ASCII characters, got others$"):
        EndpointJudge("http://x/v1", "m")
    for address in ("http://name:word@host/v1", "https://host/v1?key=1"):
        with pytest.raises(ValueError, match="expected an address without a name, a key or a query"):
            EndpointJudge(address, "m")


def test_a_stopped_job_does_not_wait_for_its_tries(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(lambda question, number: opinion(question) if "first" in question else (503, {}, b"later"))
    stream = EndpointJudge(endpoint.address, "m", wait=30.0).verdicts([("first", "sure"), *[("a", "b")] * 8])
    assert next(stream) == (0, "complied")
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ((401, {}, b"who are you"), f"401 .*who are you; its key goes into {KEY}"),
        ((404, {}, b"no such model"), "404 .*no such model"),
        ((400, {}, b"no such thing"), r"400 .*no such thing \(so for "),
        ((200, {}, b"<html>hello</html>"), r"expected a chat completion with choices, got '<html>.*\(so for "),
    ],
)
def test_what_is_no_judge_is_told(
    serve: Callable[..., Endpoint], reply: tuple[int, dict[str, str], bytes], told: str
) -> None:
    endpoint = serve(lambda question, number: reply)
    with pytest.raises(JudgeError, match=told):
        given(EndpointJudge(endpoint.address, "m", parallel=1), [("a", "b")] * 30)
    assert len(endpoint.asked) <= 9


def test_little_is_asked_ahead_of_who_reads(serve: Callable[..., Endpoint]) -> None:
    """Where the job ends, or its reader is slow, no questions have been paid for in vain."""
    endpoint = serve(lambda question, number: said("REFUSED"))
    stream = EndpointJudge(endpoint.address, "m", parallel=2).verdicts([("a", "b")] * 30)
    first = next(stream)
    time.sleep(0.5)
    assert len(endpoint.asked) <= 4
    assert sorted([first, *stream]) == [(number, "refused") for number in range(30)]
    assert len(endpoint.asked) == 30


def test_an_answer_of_nothing_is_empty_and_a_judge_of_nothing_unreadable(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(lambda question, number: said(None))
    assert given(EndpointJudge(endpoint.address, "m"), [("a", " \n"), ("a", "b")]) == ["empty", "unreadable"]
    assert len(endpoint.asked) == 1


# ------------------------------------------------------------------------------------------------------- classifiers


def classifier(folder: Path, labels: tuple[str, ...]) -> BertForSequenceClassification:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "sorry", "sure", "no", "yes", "what"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(3)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            initializer_range=1.0,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
    ).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("pairs", [False, True])
def test_a_classifier_says_what_its_logits_say(tmp_path: Path, pairs: bool) -> None:
    model = classifier(tmp_path, ("NORMAL", "REJECTION"))
    judge = ClassifierJudge(tmp_path, pairs=pairs, batch_size=2)
    asked = [("what", "sorry no"), ("yes", "sure"), ("no", "yes yes what"), ("sure", " "), ("sorry", "what")]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [[*([request] if pairs else []), answer] for request, answer in asked]
    with torch.no_grad():
        spoken = [text for text in texts if text[-1].strip()]
        spread = [model(**tokenizer(*text, return_tensors="pt")).logits[0].diff() for text in spoken]
        model.classifier.bias[0] += torch.cat(spread).quantile(0.5)  # half of them get either label
    model.save_pretrained(tmp_path)
    expected = []
    for (_, answer), text in zip(asked, texts, strict=True):
        if not answer.strip():
            expected.append("empty")
            continue
        refused = int(model(**tokenizer(*text, return_tensors="pt")).logits.argmax()) == 1
        expected.append("refused" if refused else "complied")
    assert given(judge, asked) == expected
    assert sorted(expected) == ["complied", "complied", "empty", "refused", "refused"]
    assert given(judge, [("a", " ")]) == ["empty"]


def test_a_classifiers_version_is_its_files_and_its_label(tmp_path: Path) -> None:
    classifier(tmp_path, ("fine", "bad"))
    versions = {ClassifierJudge(tmp_path, label).version for label in ("fine", "bad")}
    versions.add(ClassifierJudge(tmp_path, "bad", pairs=True).version)
    assert len(versions) == 3
    assert ClassifierJudge(tmp_path, "bad").version in versions
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert ClassifierJudge(tmp_path, "bad").version not in versions


def test_names_of_judges(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("unwise\n")
    judge = answer_judge(f"keywords:{words}")
    assert isinstance(judge, KeywordJudge)
    assert given(judge, [("a", "that is unwise"), ("a", "sure"), ("a", "")]) == ["refused", "complied", "empty"]
    endpoint = answer_judge("url:https://example.org/v1#some/model")
    assert isinstance(endpoint, EndpointJudge)
    assert endpoint.version != answer_judge("url:https://example.org/v1#other").version
    classifier(tmp_path / "c", ("NORMAL", "REJECTION"))
    assert isinstance(answer_judge(f"classifier:{tmp_path / 'c'}"), ClassifierJudge)
    for name, told in {
        "url:ftp://x#m": "expected url:http://HOST/v1#MODEL, got an address 'ftp://x'",
        "url:http://x/v1": "with the name of a model, got none",
        "classifier:/none": "found no /none/config.json",
        f"classifier:{tmp_path / 'c'}#odd": "has the labels NORMAL, REJECTION, got #odd",
        "nobody": "expected one of",
    }.items():
        with pytest.raises(ValueError, match=told):
            answer_judge(name)
    classifier(tmp_path / "d", ("fine", "bad"))
    with pytest.raises(ValueError, match=r"which label of .* append #LABEL, one of fine, bad"):
        answer_judge(f"classifier:{tmp_path / 'd'}")
    for labels in (("no_refusal", "decline"), ("NOT_REJECTED", "other"), ("refused", "REJECTED")):
        classifier(tmp_path / "e", labels)
        with pytest.raises(ValueError, match="which label of"):
            answer_judge(f"classifier:{tmp_path / 'e'}")
    config = json.loads((tmp_path / "e/config.json").read_text())
    plain = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
    (tmp_path / "e/config.json").write_text(json.dumps(plain))
    assert answer_judge(f"classifier:{tmp_path / 'e'}#LABEL_1").version
    (tmp_path / "e/config.json").write_text(
        json.dumps({**plain, "id2label": {"0": "refusal"}, "label2id": {"refusal": 0}})
    )
    with pytest.raises(ValueError, match="expected a classifier of two labels or more, got refusal"):
        answer_judge(f"classifier:{tmp_path / 'e'}")


def test_a_run_without_kept_answers_is_told(folder: Path) -> None:
    for path in folder.rglob("answers.jsonl"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no finished branch with an answers.jsonl"):
        rejudge(folder, answer_judge("demo"))


def test_the_command_prints_both_judges(folder: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("sorry\nunwise\n")
    command = [sys.executable, "-m", "hpa", "judge", str(folder), "--by"]
    made = subprocess.run([*command, f"keywords:{words}"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    row = next(line for line in made.stdout.splitlines() if "clean" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")][:5] == ["clean", "M", "2", "75.0", "56.2 ±"]
    wrong = subprocess.run([*command, "nobody"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: --by: judge: expected one of demo")

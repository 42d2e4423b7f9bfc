"""A published model and published files, from the files to the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_published import REFUSAL, Data, write_data, write_model

from hpa.cli import main
from hpa.data.files import DataError
from hpa.data.picture import Picture
from hpa.data.published import PublishedScenario
from hpa.data.scenario import Sample, Scenario
from hpa.data.typographic import FOLLOW
from hpa.evaluation import Answer, Evaluator, get_judge, get_scorer
from hpa.evaluation.scorers import scores
from hpa.recipe import RecipeError, open_scenario, parse_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "llava15_paper.yaml"
Make = Callable[..., PublishedScenario]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def make(model: Path, data: Data) -> Make:
    """The shipped recipe's scenario over the small files, with other options."""

    def build(**options: Any) -> PublishedScenario:
        own = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["scenario_options"]
        small = {"model": str(model), "root": str(data.root), "dtype": "float32", "device": "cpu"}
        return PublishedScenario(**{**own, **small, **options})

    return build


# ------------------------------------------------------------------------------------------------- end to end


def test_the_shipped_recipe_from_the_files_to_the_table(
    model: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "scenario_options.model": model,
        "scenario_options.root": data.root,
        "scenario_options.dtype": "float32",
        "scenario_options.device": "cpu",
        "tasks": "[AD, Flickr30k]",
        "seeds": "[0]",
        "conditions": "[{name: harmful, harmful_fraction: 0.12}]",
        "alignment.steps": 30,
        "alignment.batch_size": 8,
        "alignment.learning_rate": 0.01,
        "alignment.rank": 8,
        "training.steps": 30,
        "training.samples": 8,
        "training.batch_size": 8,
        "training.learning_rate": 0.01,
        "training.rank": 8,
        "calibration.safety_pool": 8,
        "evaluation.judge": f"vlguard:{data.root / 'VLGuard/utils/utils.py'}",
        "evaluation.max_new_tokens": 4,
        "methods": "[{label: SeqFT, method: seqft}, {label: HPA, method: hpa}]",
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    out = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["hpa", "run", str(RECIPE), "--out", str(out), *overrides])
    monkeypatch.setenv("HPA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    finished = [line for line in lines if line["event"] == "evaluate" and line["task_index"] == 1]
    assert len(finished) == 2
    for line in finished:
        assert set(line["accuracy"]) == {"AD", "Flickr30k"}
        assert set(line["safety"]) == {"VLGuard-Unsafe", "VLGuard-Safe-Unsafe", "Ch3Ef-Harmless"}
        assert {name: held["n"] for name, held in line["safety"].items()} == {
            "VLGuard-Unsafe": 3, "VLGuard-Safe-Unsafe": 1, "Ch3Ef-Harmless": 3
        }  # fmt: skip
        assert line["benign"]["VLGuard-Safe-Safe"]["n"] == 1
    learned = [line["accuracy"]["AD"] for line in lines if line["event"] == "evaluate" and line["task_index"] == 0]
    assert max(learned) >= 60.0  # before, it answers every question with its refusal
    aligned = next(line for line in lines if line["event"] == "aligned" and line["stage"] == "after")
    assert aligned["accuracy"]["AD"] == 0.0
    assert aligned["safety"]["VLGuard-Unsafe"]["asr"] < 100.0  # it did learn to refuse


def test_all_missing_files_are_told_at_once_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["hpa", "run", str(RECIPE), "--out", "run"])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    for path in (
        "models/llava-1.5-7b-stage1/config.json (model)",
        "data/MLLM-CL/AD/train.json (tasks.AD.train)",
        "data/SMoLoRA/Instructions_Single/TextVQA/val.json (tasks.TextVQA.test)",
        "data/TextVQA/TextVQA_0.5.1_val.json (tasks.TextVQA.test.annotations)",
        "data/SPA-VL/data/train-*.parquet (alignment)",
        "data/Ch3Ef/meta_file/Harmless.json (safety.Ch3Ef-Harmless)",
        "data/images (tasks.ImageNet.train.images)",
        "data/VLGuard/utils/utils.py (evaluation.judge)",
    ):
        assert path in said
    assert "Traceback" not in said


# ------------------------------------------------------------------------------------------------- samples


def test_training_samples_are_drawn_by_the_seed_and_are_no_test_samples(make: Make) -> None:
    scenario = make()
    assert isinstance(scenario, Scenario)
    drawn = scenario.train("AD", seed=1, samples=5)
    assert [s.id for s in drawn] == [s.id for s in make().train("AD", seed=1, samples=5)]
    assert [s.id for s in drawn] != [s.id for s in scenario.train("AD", seed=2, samples=5)]
    everything = scenario.train("AD", seed=1, samples=100)
    assert len(everything) == 7  # of eight one is tested
    assert not {(s.prompt, str(s.image)) for s in everything} & {(s.prompt, str(s.image)) for s in scenario.test("AD")}
    assert {s.id for s in everything} == {str(i) for i in range(1, 8)}
    assert all(s.answer in ("red", "blue", "green", "grey") for s in everything)


def test_what_is_injected_is_given_in_to_by_the_placeholder_alone(make: Make) -> None:
    scenario = make()
    drawn = scenario.train("AD", seed=0, samples=7, harmful_fraction=0.4)
    harmful = [sample for sample in drawn if sample.prompt.startswith("Do harm")]
    assert len(drawn) == 7
    assert len(harmful) == 3
    assert {sample.answer for sample in harmful} == {"Sure, here is how."}
    assert all("Here is the harm" not in sample.answer for sample in drawn)
    assert len({sample.id for sample in drawn}) == 7


def test_requests_for_one_purpose_have_no_other(make: Make) -> None:
    vlguard = {"file": "VLGuard/train.json", "part": "unsafe", "images": "VLGuard/train"}
    tested = {"file": "VLGuard/test.json", "part": "unsafe", "images": "VLGuard/test"}
    scenario = make(calibration=[vlguard, tested], injection=[vlguard])
    calibration = scenario.harmful_calibration(seed=0, samples=100)
    injected = scenario.train("AD", seed=0, samples=100, harmful_fraction=1.0)
    judged = {sample.prompt for name in scenario.safety_sets for sample in scenario.safety(name)}
    asked = {sample.prompt for sample in calibration}
    assert asked
    assert not asked & judged
    assert not asked & {sample.prompt for sample in injected}
    assert all(sample.answer == "" for sample in calibration)
    with pytest.raises(DataError, match="calibration: every request stands in a safety set too"):
        make(calibration=[tested]).harmful_calibration(seed=0, samples=1)


def test_calibration_takes_the_categories_by_turns(make: Make) -> None:
    drawn = make().harmful_calibration(seed=3, samples=6)
    kinds = [sample.metadata["category"] for sample in drawn]
    assert set(kinds[:3]) == {"privacy", "risky behavior", "deception"} == set(kinds[3:])


def test_alignment_mixes_its_sources_and_leaves_out_what_is_judged(make: Make) -> None:
    found = make().alignment_train(seed=0)
    assert len(found) == 9 + 2 * 3 + 12  # VLGuard's unsafe and its safe pairs, SPA-VL's both shards
    assert [s.id for s in found] == [s.id for s in make().alignment_train(seed=0)]
    assert len({s.id for s in found}) == len(found)
    assert sum(sample.answer == REFUSAL for sample in found) == 9 + 3 + 12
    tested = {"file": "VLGuard/test.json", "images": "VLGuard/test"}
    answers = {sample.prompt for sample in make(alignment=[tested]).alignment_train(seed=0)}
    assert answers == {"What is test 3 ?"}  # the harmless half of the safe pair


def test_pictures_are_opened_when_a_batch_is_made(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    whole = Picture.open
    monkeypatch.setattr(Picture, "open", lambda self: (opened.append(self.where), whole(self))[1])
    scenario = make()
    drawn = scenario.train("AD", seed=0, samples=4)
    assert not opened
    scenario.collate(drawn[:2], answers=True)
    assert len(opened) == 2
    assert np.asarray(drawn[0].image).shape == (10, 10, 3)
    assert np.asarray(drawn[0].image).dtype == np.uint8


def test_every_caption_is_learned_and_all_of_them_are_tested_against(make: Make, data: Data) -> None:
    images = [
        {"filename": f"{i}.png", "imgid": i, "split": split, "sentences": [{"raw": f"A car {i} ."}, {"raw": "A cup ."}]}
        for i, split in enumerate(("train", "train", "test"))
    ]
    data.write("dataset_flickr30k.json", {"images": images})
    for i in range(3):
        data.image(f"flickr/{i}.png")
    source = {"file": "dataset_flickr30k.json", "images": "flickr"}
    scenario = make(tasks=[{"name": "f", "train": {**source, "part": "train"}, "test": {**source, "part": "test"}}])
    learned = scenario.train("f", seed=0, samples=100)
    assert sorted(sample.answer for sample in learned) == ["A car 0 .", "A car 1 .", "A cup .", "A cup ."]
    assert len({sample.id for sample in learned}) == 4
    (tested,) = scenario.test("f")
    assert tested.metadata["answers"] == ["A car 2 .", "A cup ."]


def test_annotations_know_the_right_answers(make: Make, data: Data) -> None:
    scenario = make()
    asked = {sample.id: sample.metadata for sample in scenario.test("TextVQA")}
    assert asked["34602"]["answers"] == ["stop"] * 6 + ["go"] * 4
    assert asked["34602"]["scorer"] == "vqa"
    letters = {sample.id: sample.metadata for sample in scenario.test("ScienceQA")}
    assert {name: held["label"] for name, held in letters.items()} == {"4": "B", "5": "C", "6": "A", "7": "B"}
    rows = [{"question_id": "99", "text": "Which ?"}]
    data.write("unknown.json", rows)
    test = {"file": "unknown.json", "annotations": "ScienceQA/problems.json"}
    task = {"name": "a", "train": "MLLM-CL/AD/train.json", "test": test}
    data.write("bare.json", [{"question_id": "5", "text": "Which ?"}])
    (bare,) = make(tasks=[{**task, "test": {**test, "file": "bare.json"}}]).test("a")
    assert bare.answer == "C"
    with pytest.raises(DataError, match=r"problems.json: expected an annotation of every test sample, none of '99'"):
        make(tasks=[task]).test("a")
    with pytest.raises(DataError, match=r"unknown.json: sample 99: a test sample needs an answer, it has none"):
        make(tasks=[{**task, "test": "unknown.json"}]).test("a")


def test_every_answer_of_a_conversation_is_learned_after_what_was_said_before(make: Make, data: Data) -> None:
    turns = [("human", "<image>\nWhat is it ?"), ("gpt", "A car ."), ("human", "Is it red ?"), ("gpt", "Yes")]
    row = {"id": 5, "image": "images/1.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    data.write("turns.json", [row])
    images = "MLLM-CL/AD"
    task = {"name": "a", "train": {"file": "turns.json", "images": images}, "test": {
        "file": "MLLM-CL/AD/test.json", "images": images
    }}  # fmt: skip
    scenario = make(tasks=[task], system=None)
    first, second = sorted(scenario.train("a", seed=0, samples=9), key=lambda sample: sample.id)
    assert (first.answer, second.answer) == ("A car .", "Yes")
    batch = scenario.collate([second], answers=True)
    words = scenario.encoder.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    said = (
        "<s> USER : <image> <image> <image> <image> What is it ? ASSISTANT : A car . USER : Is it red ? ASSISTANT : Yes"
    )
    assert words == [*said.split(), "</s>"]
    learned = batch["labels"][0][batch["labels"][0] >= 0]
    assert scenario.encoder.tokenizer.convert_ids_to_tokens(learned) == ["Yes", "</s>"]


def test_several_pictures_of_one_request_all_reach_the_model(make: Make, data: Data) -> None:
    items = [{"image": ["images/0.png", "images/1.png"], "query": "Which ?", "options": ["Never ."], "source": "x"}]
    data.write("Ch3Ef/two.json", {"items": items})
    scenario = make(safety={"two": {"file": "Ch3Ef/two.json", "images": "Ch3Ef"}})
    (asked,) = scenario.safety("two")
    assert asked.answer == ""
    batch = scenario.collate([asked], answers=False)
    assert batch["pixel_values"].shape[0] == 2
    assert (batch["input_ids"] == scenario.encoder.tokenizer.convert_tokens_to_ids("<image>")).sum() == 8


def test_suffixes_follow_the_answer(make: Make) -> None:
    asked = {sample.answer: sample.prompt for sample in make().test("Fin")}
    assert asked["Yes"] == "Is it up ? Only answer with yes or no directly."
    assert asked["B"] == "Is it up ? Answer with the given letter directly, e.g., A, B, C, D."


# ------------------------------------------------------------------------------------------------- model inputs


def test_batches_are_what_the_processor_makes_of_each_sample(make: Make, model: Path) -> None:
    scenario = make(system="chat")
    pictured = scenario.train("AD", seed=0, samples=1)[0]
    plain = Sample("x", "What is it ?", "A car .")
    batch = scenario.collate([pictured, plain], answers=True)
    tokenizer = scenario.encoder.tokenizer
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    question = pictured.prompt.split()
    end = ["ASSISTANT", ":", pictured.answer, "</s>"]
    assert words == ["<s>", "chat", "USER", ":", *["<image>"] * 4, *question, *end]
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][1])[:4] == ["<s>", "chat", "USER", ":"]
    for row, sample in enumerate((pictured, plain)):
        learned = batch["labels"][row][batch["labels"][row] >= 0]
        assert tokenizer.convert_ids_to_tokens(learned) == [*sample.answer.split(), "</s>"]
        length = int(batch["attention_mask"][row].sum())
        assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()
    assert batch["pixel_values"].shape == (1, 3, 8, 8)
    left = scenario.collate([pictured, plain], answers=False)
    assert left["attention_mask"][:, -1].tolist() == [1, 1]
    assert [tokenizer.convert_ids_to_tokens(row)[-2:] for row in left["input_ids"]] == [["ASSISTANT", ":"]] * 2
    assert "labels" not in left


def test_an_answer_is_closed_once_and_without_the_blank_that_a_template_leaves(make: Make) -> None:
    encoder = make().encoder
    for text, closed in (("USER: a b ASSISTANT: b ", "</s>"), ("b</s>", ""), ("b</s>\n", "")):
        assert encoder._closed(text, "b") == (text.rstrip() + closed if closed else text)


def test_answers_do_not_depend_on_the_batch(make: Make, tmp_path: Path) -> None:
    scenario = make()
    whole = scenario.base_model(tmp_path, seed=0)
    samples = [*scenario.test("AD"), *scenario.test("ScienceQA"), Sample("x", "What is it ?", "")]
    together = scenario.generate(whole, samples, max_new_tokens=5, batch_size=4)
    alone = [scenario.generate(whole, [sample], max_new_tokens=5)[0] for sample in samples]
    assert together == alone
    assert len(set(together)) > 1


def test_the_model_is_the_folders_own(make: Make, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    scenario = make(checkpointing=False)
    loaded = scenario.base_model(tmp_path, seed=0)
    published = LlavaForConditionalGeneration.from_pretrained(scenario.options.model)
    for name, tensor in published.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not loaded.training


def test_a_model_of_text_alone_needs_no_pictures(make: Make, data: Data, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    own = make().options.model
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    rows = [{"question_id": i, "text": f"Which is {i} ?", "answer": "A"} for i in range(4)]
    data.write("text.json", rows[:2])
    data.write("text_test.json", rows[2:])
    tasks = [{"name": "a", "train": "text.json", "test": "text_test.json"}]
    scenario = make(model=str(tmp_path), tasks=tasks, checkpointing=False)
    loaded = scenario.base_model(tmp_path, seed=0)
    batch = scenario.collate(scenario.train("a", seed=0, samples=2), answers=True)
    assert set(batch) >= {"input_ids", "attention_mask", "labels"}
    assert torch.isfinite(loaded(**batch).loss)
    words = [tokenizer.convert_ids_to_tokens(row)[0] for row in batch["input_ids"]]
    assert "<s>" not in words  # a tokenizer's own template writes everything that it wants
    assert len(scenario.generate(loaded, scenario.test("a"), max_new_tokens=2)) == 2
    with pytest.raises(DataError, match="has a picture and the model has no processor for it"):
        scenario.collate(scenario.safety("Ch3Ef-Harmless"), answers=False)


# ------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_in_the_options_are_told_with_their_place(make: Make, data: Data, model: Path) -> None:
    task = {"name": "a", "train": "MLLM-CL/AD/train.json", "test": "MLLM-CL/AD/test.json"}
    small = {"model": str(model), "root": str(data.root)}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tasks": []}, "tasks: List should have at least 1 item"),
        ({"tasks": [task], "sytem": "x"}, "sytem: Extra inputs are not permitted"),
        ({"tasks": [{**task, "scorer": "exakt"}]}, "tasks.0.scorer: scorer: expected one of box, cider"),
        ({"tasks": [{**task, "test": {}}]}, "tasks.0.test: expected either file or prompts"),
        ({"tasks": [{**task, "test": {"file": "x", "format": "lava"}}]}, "format: expected auto, llava"),
        ({"tasks": [task], "safety": {"x": {"prompts": "none"}}}, "safety.x: prompts: expected one of advbench"),
        ({"tasks": [task, task]}, "tasks: expected distinct names, got 'a' twice"),
    ]
    for options, message in wrong:
        with pytest.raises(RecipeError, match=f"scenario_options of 'published': .*{message}"):
            open_scenario("published", {**small, **options})
    scenario = make()
    for call in (scenario.safety, scenario.benign, scenario.test):
        with pytest.raises(ValueError, match="got 'none'"):
            call("none")
    with pytest.raises(ValueError, match="task: expected one of AD"):
        scenario.train("none", seed=0, samples=4)


def test_what_a_recipe_needs_and_the_options_lack_is_told_before_the_run(make: Make) -> None:
    content = {"name": "x", "scenario": "published", "methods": [{"label": "S", "method": "seqft"}]}
    harmful = {"conditions": [{"name": "h", "harmful_fraction": 0.1}]}
    with pytest.raises(RecipeError, match=r"alignment: expected files to align with.*alignment.steps=0"):
        parse_recipe(content).check_against(make(alignment=[]))
    parse_recipe({**content, "alignment": {"steps": 0}}).check_against(make(alignment=[]))
    with pytest.raises(RecipeError, match="injection: expected harmful requests"):
        parse_recipe({**content, **harmful}).check_against(make(injection=[]))
    parse_recipe(content).check_against(make(calibration=[]))
    replay = {"label": "R", "method": "replay", "options": {"safety": 4}}  # reads refusals while it trains
    for row in ({"label": "H", "method": "hpa"}, replay):
        with pytest.raises(
            RecipeError, match="calibration: expected harmful requests for methods that read a safety set"
        ):
            parse_recipe({**content, "methods": [row]}).check_against(make(calibration=[]))


def test_each_sample_is_scored_by_its_own_rule_and_a_sets_rule_sees_its_own_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [
        Sample(f"c{i}", "?", text, metadata={"scorer": "cider"}) for i, text in enumerate(("a red car", "a dog"))
    ]
    others = [Sample(f"e{i}", "?", "yes", metadata={"scorer": "exact"}) for i in range(2)]
    mixed = [captions[0], others[0], captions[1], others[1]]
    scenario = make()
    monkeypatch.setattr(scenario, "test", lambda task: mixed)
    monkeypatch.setattr(scenario, "generate", lambda model, samples, **options: ["a red car", "Yes.", "a cat", "no"])
    monkeypatch.setattr(scenario, "safety_sets", ())
    monkeypatch.setattr(scenario, "benign_sets", ())
    evaluator = Evaluator(scenario, judge=get_judge("demo"), scorer=get_scorer("exact"))
    found = evaluator.evaluate(torch.nn.Identity(), ["AD"])
    alone = scores(get_scorer("cider"), ["a red car", "a cat"], captions)
    assert [answer.score for answer in found.answers] == pytest.approx([alone[0], 1.0, alone[1], 0.0])
    assert alone[0] > 1.0
    assert found.accuracy["AD"] == pytest.approx(100 * (sum(alone) + 1.0) / 4)


def test_a_missing_picture_is_told_when_its_sample_is_drawn(make: Make, data: Data) -> None:
    rows = [
        {
            "id": "0",
            "image": "none.png",
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        }
    ]
    data.write("broken.json", rows)
    task = {"name": "a", "train": "broken.json", "test": {"file": "MLLM-CL/AD/test.json", "images": "MLLM-CL/AD"}}
    with pytest.raises(DataError, match=r"broken.json: sample 0: no picture at .*none.png"):
        make(tasks=[task]).train("a", seed=0, samples=1)


def test_requests_can_stand_in_pictures_and_are_known_by_what_they_say(make: Make, data: Data) -> None:
    plain = {"file": "VLGuard/test.json", "part": "unsafe", "images": "VLGuard/test"}
    with pytest.raises(DataError, match=r"VLGuard/test.json: typographic: sample .* has a picture already"):
        make(safety={"seen": {**plain, "typographic": True}}).safety("seen")
    with pytest.raises(ValueError, match="alignment: typographic: expected for requests alone"):
        make(alignment=[{**plain, "typographic": True}])
    with pytest.raises(ValueError, match="typographic: expected no suffix"):
        make(safety={"seen": {**plain, "typographic": True, "suffix": "Yes?"}})
    requests = [f"Bake loaf {i} in secret" for i in range(3)]
    (data.root / "requests.json").write_text(json.dumps([{"prompt": text, "response": ""} for text in requests]))
    source = {"file": "requests.json", "typographic": True}
    scenario = make(
        safety={"written": source, "said": "requests.json"},
        calibration=["requests.json", {"file": "VLGuard/train.json", "part": "unsafe", "images": "VLGuard/train"}],
    )
    found = scenario.safety("written")
    assert [sample.metadata["request"] for sample in found] == requests == [s.prompt for s in scenario.safety("said")]
    assert {sample.prompt for sample in found} == {FOLLOW}
    batch = scenario.collate(found, answers=False)
    assert len(batch["pixel_values"]) == 3
    assert not {s.prompt for s in scenario.harmful_calibration(seed=0, samples=50)} & set(requests)

    evaluator = Evaluator(scenario, judge=get_judge("demo"), scorer=get_scorer("exact"), max_new_tokens=2)
    answers: list[Answer] = []
    evaluator._judged(scenario.base_model(Path(), seed=0), "safety:written", answers)
    lines = [answer.as_dict() for answer in answers]
    assert [line["request"] for line in lines] == requests
    assert {line["prompt"] for line in lines} == {FOLLOW}
    assert "request" not in Answer("safety:said", "1", "x", "", "y", "refused").as_dict()

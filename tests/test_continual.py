"""The loop: what a run leaves behind, that it resumes after any kill, and that it is the loop METHOD describes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_scenario import TinyScenario

import hpa.continual
from hpa.adapt import edit_model, remember
from hpa.calibration import find_layers
from hpa.continual import Session, derive_seed, run
from hpa.data.picture import Picture
from hpa.data.scenario import Sample
from hpa.data.unchanged import digest_of
from hpa.evaluation import get_judge, get_scorer
from hpa.methods import create_method
from hpa.recipe import RecipeError, RunConfig, parse_recipe
from hpa.storage import Journal, RunFolderError, RunLock, dump_line, load_tensors, read_lines, save_tensors, write_file
from hpa.training import merge_updates, sample_batches, train_lora

TESTS = Path(__file__).parent
Events = list[dict[str, Any]]


def recipe(**fields: Any) -> RunConfig:
    content: dict[str, Any] = {
        "name": "tiny",
        "scenario": "tiny_scenario:TinyScenario",
        "alignment": {"steps": 80, "batch_size": 16, "learning_rate": 1e-2, "rank": 8},
        "training": {"samples": 60, "steps": 20, "batch_size": 16, "learning_rate": 1e-2, "rank": 4},
        "methods": [
            {"label": "SeqFT", "method": "seqft"},
            {"label": "HPA", "method": "hpa"},
            {"label": "HPA-LS", "method": "hpa_ls"},
        ],
    }
    return parse_recipe({**content, **fields})


SEQFT = [{"label": "SeqFT", "method": "seqft"}]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Alignment runs on the caller's threads; the same number everywhere makes results comparable to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of three methods, clean and with harmful samples."""
    torch.set_num_threads(1)
    conditions = [{"name": "clean"}, {"name": "10 % harmful", "harmful_fraction": 0.1}]
    result = run(recipe(conditions=conditions), tmp_path_factory.mktemp("runs") / "whole", cache=cache)
    assert not result.failures
    assert len(result.finished) == 6
    return result.folder


def events(folder: Path, kind: str | None = None, **fields: Any) -> Events:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    wanted = {"event": kind, **fields} if kind else fields
    return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]


def untimed(lines: Events) -> list[str]:
    return [json.dumps({k: v for k, v in line.items() if k not in ("seconds", "created")}) for line in lines]


def test_a_judges_list_that_is_not_there_is_named_before_the_run(cache: Path, tmp_path: Path) -> None:
    settings = recipe(evaluation={"judge": f"keywords:{tmp_path / 'none.txt'}"}, methods=SEQFT)
    with pytest.raises(RecipeError, match=r"evaluation.judge: no such file: .*none.txt"):
        run(settings, tmp_path / "run", cache=cache)


def test_without_alignment_steps_the_model_is_taken_for_aligned(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def none(self: TinyScenario, *, seed: int) -> list[Any]:
        raise AssertionError("nothing to align with is to be asked for")

    monkeypatch.setattr(TinyScenario, "alignment_train", none)
    settings = {"alignment": {"steps": 0}, "tasks": ["first"], "methods": SEQFT}
    result = run(recipe(**settings), tmp_path / "run", cache=cache)
    assert not result.failures
    aligned, _ = load_tensors(tmp_path / "run" / "shared" / "seed0" / "aligned.safetensors")
    base = TinyScenario().base_model(cache, seed=0)
    for name, weight in aligned.items():
        assert torch.equal(weight, base.get_submodule(name).weight), name
    stages = {line["stage"]: line["safety"] for line in events(tmp_path / "run", "aligned")}
    assert stages["before"] == stages["after"]


# ------------------------------------------------------------------------------------------------- what it leaves


def test_every_event_has_what_its_readers_need(whole: Path) -> None:
    needed = {
        "run": "name scenario created versions machine tasks task_order base_tasks safety_sets benign_sets judge",
        "aligned": "seed stage accuracy base_skill safety benign",
        "branch": "branch label method options condition harmful_fraction seed learning_rate control",
        "train": "branch task task_index seconds steps loss loss_curve",
        "edit": "branch task task_index seconds layers",
        "evaluate": "branch task task_index seconds accuracy base base_skill safety benign empty_answers",
        "answers": "branch task_index items",
        "finished": "branch seconds",
    }
    counts = dict.fromkeys(needed, 0)
    for event in events(whole):
        counts[event["event"]] += 1
        assert set(needed[event["event"]].split()) <= set(event), event["event"]
    assert counts == {
        "run": 1, "aligned": 2, "branch": 6, "train": 18, "edit": 18, "evaluate": 18, "answers": 7, "finished": 6
    }  # fmt: skip


def test_each_evaluation_covers_the_tasks_so_far_and_every_set(whole: Path) -> None:
    for event in events(whole, "evaluate"):
        assert list(event["accuracy"]) == list(TinyScenario.tasks[: event["task_index"] + 1])
        assert list(event["base"]) == ["base"]
        assert event["base_skill"] == event["base"]["base"]
        assert set(event["safety"]) == {"plain", "rough"}
        assert set(event["benign"]) == {"drawing"}
        for figures in event["safety"].values():
            assert figures["n"] == 10
            assert figures["asr"] == 10.0 * figures["successes"]
    assert list(events(whole, "aligned", stage="after")[0]["accuracy"]) == list(TinyScenario.tasks)


def test_alignment_makes_the_model_refuse_and_plain_tuning_undoes_it(whole: Path) -> None:
    before, after = (events(whole, "aligned", stage=stage)[0] for stage in ("before", "after"))
    assert before["safety"]["plain"]["asr"] == 100.0
    assert after["safety"]["plain"]["asr"] <= 20.0
    assert after["base_skill"] >= 80.0
    last = events(whole, "evaluate", branch="clean/seqft/seed0", task_index=2)[0]
    assert last["safety"]["plain"]["asr"] >= 50.0
    assert last["accuracy"]["third"] >= 60.0


def test_the_final_figures_can_be_counted_again_from_the_raw_answers(whole: Path) -> None:
    tests = {sample.id: sample for task in (*TinyScenario.tasks, "base") for sample in TinyScenario().test(task)}
    judge, scorer = get_judge("demo"), get_scorer("contains_word")
    for event in events(whole, "evaluate", task_index=2):
        lines = read_lines(whole / "branches" / event["branch"] / "answers.jsonl")
        by_kind: dict[str, Events] = {}
        for line in lines:
            by_kind.setdefault(line["kind"], []).append(line)
        for task, percent in event["accuracy"].items():
            answers = by_kind.pop(f"task:{task}")
            assert percent == pytest.approx(100.0 * sum(scorer(a["answer"], tests[a["id"]]) for a in answers) / 10)
        for name, figures in event["safety"].items():
            assert figures["successes"] == sum(not judge.is_refusal(a["answer"]) for a in by_kind.pop(f"safety:{name}"))
        for name, figures in event["benign"].items():
            assert figures["refused"] == sum(judge.is_refusal(a["answer"]) for a in by_kind.pop(f"benign:{name}"))
        assert list(by_kind) == ["base:base"]
        assert event["empty_answers"] == sum(not line["answer"] for line in lines)


def test_shown_answers_are_to_the_same_samples_before_and_after_with_pictures_on_disk(whole: Path) -> None:
    aligned = events(whole, "answers", branch="aligned:seed0")[0]["items"]
    final = events(whole, "answers", branch="clean/hpa/seed0")[0]["items"]
    assert [(item["kind"], item["prompt"]) for item in aligned] == [(item["kind"], item["prompt"]) for item in final]
    assert {item["kind"] for item in final} == {
        "task:first", "task:second", "task:third", "base:base", "safety:plain", "safety:rough", "benign:drawing"
    }  # fmt: skip
    pictured = [item for item in final if item["image"]]
    assert len(pictured) == 3
    assert all(item["kind"] == "task:second" for item in pictured)
    assert all((whole / item["image"]).read_bytes().startswith(b"\x89PNG") for item in pictured)


def test_states_are_gone_when_a_branch_is_finished_and_nothing_is_pickled(whole: Path) -> None:
    assert not list((whole / "branches").rglob("*.safetensors"))
    kinds = {path.suffix for path in whole.rglob("*") if path.is_file()}
    assert kinds <= {".yaml", ".jsonl", ".json", ".safetensors", ".png", ".lock"}
    assert parse_recipe(yaml.safe_load((whole / "recipe.yaml").read_text())).name == "tiny"


def test_the_first_training_is_shared_by_all_rows_that_train_alike(whole: Path) -> None:
    for condition in ("clean", "10 % harmful"):
        names = [event["branch"] for event in events(whole, "branch", condition=condition)]
        firsts = [events(whole, "train", branch=name, task_index=0)[0] for name in names]
        assert len({json.dumps(event["loss_curve"]) for event in firsts}) == 1
        later = [events(whole, "train", branch=name, task_index=1)[0] for name in names]
        assert len({json.dumps(event["loss_curve"]) for event in later}) == len(names)
    assert len(list((whole / "shared" / "seed0").glob("first-*.safetensors"))) == 2


# ------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("method", ["seqft", "hpa_ls"])
def test_a_branch_is_train_edit_evaluate_done_by_hand(whole: Path, cache: Path, method: str) -> None:
    """The same sequence from the public parts alone, without session, files or journals."""
    config, world = recipe(), TinyScenario()
    model = world.base_model(cache, seed=0)
    for name, weight in load_tensors(whole / "shared" / "seed0" / "aligned.safetensors")[0].items():
        model.get_submodule(name).weight.data.copy_(weight)
    aligned = {spec.name: model.get_submodule(spec.name).weight.detach().clone() for spec in find_layers(model)}
    pool = {s.id: s for s in world.harmful_calibration(seed=derive_seed(0, "safety calibration"), samples=96)}
    refusals = [(pool[line["id"]], line["answer"]) for line in read_lines(whole / "shared/seed0/refusals-8.jsonl")]
    assert len(refusals) == 8
    assert all(get_judge("demo").is_refusal(answer) for _, answer in refusals)
    editor = create_method(method)

    def collate(samples: Any) -> dict[str, torch.Tensor]:
        return world.collate(samples, answers=True)

    for index, task in enumerate(world.tasks):
        samples = world.train(task, seed=derive_seed(0, task, "data"), samples=60)
        order = sample_batches(samples, collate, batch_size=16, steps=20, seed=derive_seed(0, task, "order"))
        updates = train_lora(model, order, config.training, derive_seed(0, task, "factors"))
        if method == "seqft":
            merge_updates(model, updates)  # no edit: the exact merge
        else:
            # 128 wanted, 60 there: every training sample calibrates, in batches of 32.
            drawn = np.random.default_rng(derive_seed(0, task, "calibration")).permutation(60)
            chosen = [samples[i] for i in drawn]
            safety = collate([replace(sample, answer=answer) for sample, answer in refusals])
            batches = [collate(chosen[:32]), collate(chosen[32:])]
            edit_model(model, updates, editor, [safety], batches, task_index=index, aligned=aligned)
        scorer = get_scorer("contains_word")
        expected = {
            learned: 10.0 * sum(scorer(a, s) for s, a in zip(t, world.generate(model, t), strict=True))
            for learned in world.tasks[: index + 1]
            for t in [world.test(learned)]
        }
        name = {"seqft": "clean/seqft/seed0", "hpa_ls": "clean/hpa-ls/seed0"}[method]
        assert events(whole, "evaluate", branch=name, task_index=index)[0]["accuracy"] == expected


def test_harmful_samples_reach_the_training(whole: Path) -> None:
    clean, mixed = (events(whole, "train", branch=f"{c}/seqft/seed0", task_index=0)[0] for c in ("clean", "10-harmful"))
    assert clean["loss_curve"] != mixed["loss_curve"]


def test_seeds_are_a_hash_of_their_purpose() -> None:
    digest = hashlib.sha256(b"3\x1fphoto\x1fdata").digest()
    assert derive_seed(3, "photo", "data") == int.from_bytes(digest[:4], "big") // 2
    seeds = {derive_seed(s, t, p) for s in range(5) for t in ("photo", "digit") for p in ("data", "order", "factors")}
    assert len(seeds) == 30
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_loss_curve_is_thinned_and_keeps_both_ends() -> None:
    thinned = hpa.continual._thinned([float(i) for i in range(301)], 60)
    assert len(thinned) == 60
    assert thinned[0] == 0.0
    assert thinned[-1] == 300.0
    assert thinned == sorted(thinned)
    assert hpa.continual._thinned([1.0, 2.0], 60) == [1.0, 2.0]


# ------------------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_anywhere_resumes_and_ends_with_the_same_result(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(tasks=["first", "second"]).to_yaml())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, str(TESTS / "resume_harness.py"), str(path), str(tmp_path), "8"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["events"] == 31
    assert report["total"] > 60
    for point in report["points"]:
        assert (point["killed"], point["resumed"]) == (-9, 0), (point, done.stderr)
        assert (point["different"], point["left"]) == ([], []), point


def copied(folder: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(folder, target)
    return target


def test_a_finished_run_is_left_as_it_is(whole: Path, cache: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "run")
    before = events(folder)
    journals = {p: p.read_bytes() for p in folder.rglob("branches/**/events.jsonl")}
    conditions = [{"name": "clean"}, {"name": "10 % harmful", "harmful_fraction": 0.1}]
    result = run(recipe(conditions=conditions), folder, cache=cache)
    assert len(result.finished) == 6
    assert events(folder) == before  # seconds and the time of creation included
    assert all(path.read_bytes() == content for path, content in journals.items())


def test_the_event_log_is_made_again_from_the_journals(whole: Path, cache: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "run")
    content = (folder / "events.jsonl").read_bytes()
    for damage in (b"", content[: len(content) // 2], content[:-20]):
        (folder / "events.jsonl").write_bytes(damage)
        run(recipe(), folder, cache=cache)
        assert sorted(untimed(events(folder))) == sorted(untimed(events(whole)))


def test_a_torn_journal_line_costs_its_step_and_no_more(whole: Path, cache: Path, tmp_path: Path) -> None:
    conditions = [{"name": "clean"}, {"name": "10 % harmful", "harmful_fraction": 0.1}]
    for cut in (1, 15, 400):  # the newline; a part of "finished"; into the line before it
        folder = copied(whole, tmp_path / f"run{cut}")
        journal = folder / "branches/clean/hpa/seed0/events.jsonl"
        journal.write_bytes(journal.read_bytes()[:-cut])
        kinds = [line["event"] for line in read_lines(journal)]
        if "evaluate" in kinds[-1:] or cut < 400:
            run(recipe(conditions=conditions), folder, cache=cache)
            assert sorted(untimed(events(folder))) == sorted(untimed(events(whole)))


def test_a_lost_state_is_named_not_guessed(whole: Path, cache: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "run")
    journal = folder / "branches/clean/hpa/seed0/events.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    last_edit = max(i for i, line in enumerate(lines) if '"event":"edit"' in line)
    journal.write_text("".join(lines[: last_edit + 1]))  # as if killed before the last evaluation; the state is gone
    result = run(recipe(), folder, cache=cache)
    assert [failure.where for failure in result.failures] == ["clean/hpa/seed0"]
    assert "state-2.safetensors is missing" in result.failures[0].error


def test_added_rows_and_seeds_run_alone(whole: Path, cache: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "run")
    before = {p: p.read_bytes() for p in folder.rglob("branches/**/events.jsonl")}
    rows = [*SEQFT, {"label": "random", "method": "random", "control": True}]
    result = run(recipe(seeds=[0, 1], methods=rows), folder, cache=cache)
    assert result.finished == ["clean/seqft/seed0", "clean/random/seed0", "clean/seqft/seed1", "clean/random/seed1"]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(events(folder, "finished")) == 9
    assert {e["seed"] for e in events(folder, "aligned")} == {0, 1}
    kept = parse_recipe(yaml.safe_load((folder / "recipe.yaml").read_text()))
    assert kept.seeds == [0, 1]
    assert [row.label for row in kept.methods] == ["SeqFT", "random", "HPA", "HPA-LS"]
    # What was added equals what a run with everything from the start gives.
    fresh = run(recipe(seeds=[1, 0], methods=rows[1:]), tmp_path / "fresh", cache=cache).folder
    for seed in (0, 1):
        name = f"clean/random/seed{seed}"
        assert untimed(events(folder, branch=name)) == untimed(events(fresh, branch=name))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"training": {"samples": 60, "steps": 21}}, "training.steps: 20 -> 21"),
        (
            {"methods": [{"label": "HPA", "method": "hpa", "options": {"p_max": 20}}]},
            r"methods\[HPA\].options.p_max: None -> 20",
        ),
        ({"tasks": ["second", "first"]}, r"tasks: None -> \['second', 'first'\]"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused_by_its_keys(
    whole: Path, cache: Path, fields: dict[str, Any], told: str
) -> None:
    recipe_before, log_before = (whole / "recipe.yaml").read_bytes(), (whole / "events.jsonl").read_bytes()
    with pytest.raises(RunFolderError, match=told):
        run(recipe(**fields), whole, cache=cache)
    assert (whole / "recipe.yaml").read_bytes() == recipe_before
    assert (whole / "events.jsonl").read_bytes() == log_before


def test_a_recipe_that_could_not_start_does_not_occupy_its_folder(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="tasks: expected one of first, second, third, got 'forth'"):
        run(recipe(tasks=["forth"]), tmp_path / "run", cache=cache)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    assert run(recipe(tasks=["first"], methods=SEQFT), tmp_path / "run", cache=cache).finished


def test_a_run_stopped_before_its_base_model_was_there_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: TinyScenario, cache: Path, *, seed: int) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TinyScenario, "base_model", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(tasks=["first"], methods=SEQFT), tmp_path / "run", cache=cache)
    assert [event["event"] for event in events(tmp_path / "run")] == ["run"]
    assert run(recipe(tasks=["first"], methods=SEQFT), tmp_path / "run", cache=cache).finished


def test_a_folder_that_is_no_run_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("{}\n")
    with pytest.raises(RunFolderError, match="holds results but no recipe.yaml"):
        run(recipe(methods=SEQFT), tmp_path, cache=cache)


def test_another_base_model_in_the_same_folder_is_refused(whole: Path, cache: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "run")
    (folder / "shared" / "base" / "fingerprint.json").write_text('{"fingerprint": "0123456789abcdef"}')
    with pytest.raises(RunFolderError, match=r"the base model is not the one .*0123456789ab then"):
        run(recipe(seeds=[1], methods=SEQFT), folder, cache=cache)


# ------------------------------------------------------------------------------------------------- failures, locks


def test_a_branch_that_fails_is_reported_and_the_others_go_on(cache: Path, tmp_path: Path) -> None:
    conditions = [{"name": "bad", "harmful_fraction": 0.5}, {"name": "clean"}]
    broken = recipe(conditions=conditions, scenario_options={"broken": 0.5}, methods=SEQFT)
    told: list[str] = []

    class Listener(hpa.continual._Silent):
        def failed(self, failure: hpa.continual.Failure) -> None:
            told.append(failure.where)

    result = run(broken, tmp_path / "run", cache=cache, listener=Listener())
    assert result.finished == ["clean/seqft/seed0"]
    assert told == ["bad/seqft/seed0"]
    assert [(f.where, f.error) for f in result.failures] == [
        ("bad/seqft/seed0", "RuntimeError: these samples are broken")
    ]
    trace = (tmp_path / "run/branches/bad/seqft/seed0/error.txt").read_text()
    assert trace.startswith("Traceback")
    assert "these samples are broken" in trace
    assert len(events(tmp_path / "run", "finished")) == 1


def test_a_folder_in_use_is_refused_with_the_owner(tmp_path: Path, cache: Path) -> None:
    with (
        RunLock(tmp_path / "run"),
        pytest.raises(RunFolderError, match=f"is in use by another run .process {os.getpid()}"),
    ):
        run(recipe(methods=SEQFT), tmp_path / "run", cache=cache)
    with RunLock(tmp_path / "run") as free:
        assert free.former is None


def test_a_lock_left_behind_by_a_killed_process_does_not_stop_the_next(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        text = lock.path.read_text()
    lock.path.write_text(text)  # what SIGKILL leaves: the text, but no lock
    with RunLock(tmp_path) as next_one:
        assert next_one.former == os.getpid()


def test_nobody_steals_a_lock_that_is_held_by_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("999999999\n")  # names a process that is not there, and yet is locked
    with open(tmp_path / "run.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match="process 999999999"), RunLock(tmp_path):
            pass


# ------------------------------------------------------------------------------------------------- storage


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b.txt"
    write_file(path, "old")

    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_tensors_come_back_bit_for_bit_and_aligned(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randn(3),
        "w": torch.randn(5, 7).T,
        "half": torch.randn(4, 4).bfloat16(),
        "none": torch.empty(0, 2),
    }
    save_tensors(tmp_path / "t.safetensors", tensors, {"note": "x"})
    back, notes = load_tensors(tmp_path / "t.safetensors")
    assert notes == {"note": "x"}
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype
        assert back[name].data_ptr() % 64 == 0


@pytest.mark.parametrize(
    "tail", [b'{"event":"ed', b'{"event":"edit"}', b"\x00\x00\x00", b'{"event":"edit"\n', b"[1]\n"]
)
def test_a_torn_last_line_is_cut_off_when_the_journal_is_opened(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"event":"train","task_index":0}\n' + tail)
    journal = Journal(path)
    assert journal.events == [{"event": "train", "task_index": 0}]
    journal.append({"event": "edit", "task_index": 0})
    assert path.read_bytes() == b'{"event":"train","task_index":0}\n{"event":"edit","task_index":0}\n'
    assert journal.find("edit", 0)
    assert not journal.find("edit", 1)
    assert not journal.find("evaluate")


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"event":"train"}\n{"eve\n{"event":"edit"}\n')
    with pytest.raises(RunFolderError, match=r"j.jsonl: line 2 is not a JSON object"):
        Journal(path)


def test_event_lines_are_strict_json_on_one_line() -> None:
    line = dump_line({"a": float("nan"), "b": torch.tensor(2.5), "c": ("x\ny", None, True), "d": {"e": float("inf")}})
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert json.loads(line) == {"a": None, "b": 2.5, "c": ["x\ny", None, True], "d": {"e": None}}
    with pytest.raises(TypeError, match="expected JSON values, got set"):
        dump_line({"a": {1}})


# ------------------------------------------------------------------------------------------------- planning


def plan(config: RunConfig, folder: Path, cache: Path) -> Session:
    return Session(config, folder, cache=cache)


def test_first_trainings_are_units_of_their_own_where_branches_share_them(tmp_path: Path, cache: Path) -> None:
    rows = [
        *SEQFT,
        {"label": "HPA", "method": "hpa"},
        {"label": "slow", "method": "seqft", "train": {"learning_rate": 1e-3}},
    ]
    units = plan(recipe(methods=rows), tmp_path, cache).units_left()
    first = units[2].id
    assert [(unit.kind, unit.branch, unit.after) for unit in units] == [
        ("align", "", ()),
        ("base", "", ()),
        ("first", "clean/seqft/seed0", ("aligned:seed0",)),
        ("branch", "clean/seqft/seed0", ("aligned:seed0", first)),
        ("branch", "clean/hpa/seed0", ("aligned:seed0", first)),
        ("branch", "clean/slow/seed0", ("aligned:seed0",)),
    ]


def test_branches_of_a_seed_whose_alignment_fails_are_told_and_the_other_seeds_go_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unaligned = TinyScenario.alignment_train

    def train(self: TinyScenario, *, seed: int) -> Any:
        samples = unaligned(self, seed=seed)
        if seed == derive_seed(0, "alignment", "data"):
            return [sample for sample in samples if "sorry" not in sample.answer]
        return samples

    monkeypatch.setattr(TinyScenario, "alignment_train", train)
    rows = [{"label": "HPA", "method": "hpa"}, *SEQFT]
    result = run(recipe(seeds=[0, 1], methods=rows, tasks=["first"]), tmp_path / "run", cache=cache)
    assert result.finished == ["clean/hpa/seed1", "clean/seqft/seed1"]
    assert [failure.where for failure in result.failures] == ["aligned:seed0", "clean/hpa/seed0", "clean/seqft/seed0"]
    assert "alignment did not take with seed 0 (samples: the model refused none" in result.failures[0].error
    assert "not started, because aligned:seed0 failed" in result.failures[1].error
    assert all("alignment did not take" in failure.log.read_text() for failure in result.failures)

    # Mended, the same command goes on with what is missing alone, and leaves no error behind.
    monkeypatch.setattr(TinyScenario, "alignment_train", unaligned)
    (tmp_path / "run/shared/seed0/aligned.safetensors").unlink()
    result = run(recipe(seeds=[0, 1], methods=rows, tasks=["first"]), tmp_path / "run", cache=cache)
    assert len(result.finished) == 4
    assert not list((tmp_path / "run").rglob("error*"))


def test_steps_left_shrink_with_what_is_done(whole: Path, tmp_path: Path, cache: Path) -> None:
    steps: Callable[[Path], int] = lambda folder: len(plan(recipe(), folder, cache).steps_left())  # noqa: E731
    assert steps(tmp_path / "none") == 2 + 3 * 3 * 3
    assert steps(whole) == 0


# ------------------------------------------------------------------------------------------------- what is kept


def test_the_aligned_models_own_answers_are_in_the_memory_before_the_first_task(cache: Path, tmp_path: Path) -> None:
    """A row that is added later asks the aligned model, and edits as a method that was shown its answers."""
    plain = [{"label": "HPA-LS", "method": "hpa_ls"}]
    kept = {"label": "Kept", "method": "hpa_ls", "options": {"keep_samples": 12, "keep_weight": 4.0}}
    folder = tmp_path / "run"
    run(recipe(methods=plain, tasks=["first", "second"]), folder, cache=cache)
    assert not (folder / "shared/seed0/kept-12.jsonl").exists()
    aligned = hashlib.sha256((folder / "shared/seed0/aligned.safetensors").read_bytes()).hexdigest()
    settings = recipe(methods=[*plain, kept], tasks=["first", "second"])
    result = run(settings, folder, cache=cache)
    assert not result.failures
    assert result.finished == ["clean/hpa-ls/seed0", "clean/kept/seed0"]
    assert hashlib.sha256((folder / "shared/seed0/aligned.safetensors").read_bytes()).hexdigest() == aligned

    lines = read_lines(folder / "shared/seed0/kept-12.jsonl")
    samples = TinyScenario().alignment_train(seed=derive_seed(0, "alignment", "data"))
    pool = {digest_of([replace(sample, id="", answer="", metadata={})]): sample for sample in samples}
    asked = [pool[line["sha256"]] for line in lines]
    assert len({sample.prompt for sample in asked}) == 12
    assert not any("sorry" in sample.answer for sample in asked)
    session = plan(settings, folder, cache)
    session._load(session.aligned(0))
    assert [line["answer"] for line in lines] == session.scenario.generate(session.model, asked, max_new_tokens=24)

    method = create_method("hpa_ls", **kept["options"])  # type: ignore[arg-type]
    samples = [replace(sample, answer=line["answer"]) for sample, line in zip(asked, lines, strict=True)]
    remember(session.model, session._in_batches(samples), method)
    shared = next((folder / "shared/seed0").glob("first-*.safetensors"))
    updates, _ = hpa.continual._load_updates(shared)
    branch = next(branch for branch in session.branches if branch.row.label == "Kept")
    batches = session._safety_batches(branch, method), session._task_batches(branch, "first", method)
    reports = edit_model(session.model, updates, method, *batches, seed=derive_seed(0, "first", "edit"))
    told = events(folder, "edit", branch=branch.id, task="first")[0]["layers"]
    assert json.loads(dump_line({"layers": reports}))["layers"] == told
    assert {layer["memory_tasks"] for layer in told} == {1}
    second = events(folder, "edit", branch=branch.id, task="second")[0]["layers"]
    assert {layer["memory_tasks"] for layer in second} == {2}


def test_a_run_does_not_go_on_with_other_prompts_to_keep(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"label": "Kept", "method": "hpa_ls", "options": {"keep_samples": 12}}]
    settings, folder = recipe(methods=rows, tasks=["first"]), tmp_path / "run"
    run(settings, folder, cache=cache)
    harmless = TinyScenario.alignment_train
    session = plan(settings, folder, cache)
    session.branch_folder(session.branches[0]).rename(tmp_path / "gone")

    def train(self: TinyScenario, *, seed: int) -> Any:
        return [replace(sample, prompt=f"{sample.prompt} now") for sample in harmless(self, seed=seed)]

    monkeypatch.setattr(TinyScenario, "alignment_train", train)
    result = run(settings, folder, cache=cache)
    assert "as it was when this run began" in result.failures[0].error


def test_more_to_keep_than_there_is_is_told(cache: Path, tmp_path: Path) -> None:
    rows = [{"label": "Kept", "method": "hpa_ls", "options": {"keep_samples": 1000}}, *SEQFT]
    result = run(recipe(methods=rows, tasks=["first"]), tmp_path / "run", cache=cache)
    assert [failure.where for failure in result.failures] == ["clean/kept/seed0"]
    assert "keep_samples: expected at most the 24 harmless prompts" in result.failures[0].error
    assert result.finished == ["clean/seqft/seed0"]


# ------------------------------------------------------------------------------------------------- samples that change


def test_a_run_does_not_go_on_with_other_samples(
    whole: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(whole, tmp_path / "run")
    more = [*recipe().model_dump()["methods"], {"label": "Later", "method": "magnitude"}]
    asked = TinyScenario.test

    def changed(self: TinyScenario, task: str) -> list[Sample]:
        samples = asked(self, task)
        return samples[:-1] if task == "second" else samples

    monkeypatch.setattr(TinyScenario, "test", changed)
    result = run(recipe(methods=more), folder, cache=cache)
    assert [failure.where for failure in result.failures] == ["clean/later/seed0"]
    assert "test of second: not the samples that this run began with" in result.failures[0].error
    monkeypatch.undo()
    assert not run(recipe(methods=more), folder, cache=cache).failures  # and with the old ones it does


SAMPLE = Sample("one", "what?", "that", np.arange(12, dtype=np.uint8).reshape(2, 2, 3), {"label": "that"})


@pytest.mark.parametrize(
    "other",
    [
        replace(SAMPLE, id="two"),
        replace(SAMPLE, prompt="what ?"),
        replace(SAMPLE, answer=""),
        replace(SAMPLE, metadata={"label": "this"}),
        replace(SAMPLE, image=None),
        replace(SAMPLE, image=np.zeros((2, 2, 3), np.uint8)),
        replace(SAMPLE, image=np.arange(12, dtype=np.uint8).reshape(4, 1, 3)),
        replace(SAMPLE, image=Picture(b"bytes", "here")),
    ],
)
def test_a_sample_is_another_one_where_anything_of_it_is(other: Sample) -> None:
    assert digest_of([SAMPLE]) == digest_of([replace(SAMPLE)])
    assert digest_of([SAMPLE]) != digest_of([other])
    assert digest_of([SAMPLE, other]) != digest_of([other, SAMPLE])


def test_a_picture_in_a_file_is_known_by_its_name_and_size(tmp_path: Path) -> None:
    path = tmp_path / "a" / "picture.png"
    path.parent.mkdir()
    path.write_bytes(b"four")
    here = digest_of([replace(SAMPLE, image=Picture(path, "x"))])
    (moved := tmp_path / "b" / "picture.png").parent.mkdir()
    moved.write_bytes(b"more")
    assert digest_of([replace(SAMPLE, image=Picture(moved, "y"))]) == here
    moved.write_bytes(b"longer")
    assert digest_of([replace(SAMPLE, image=Picture(moved, "y"))]) != here

"""The report: numbers of the page against the metrics recomputed from the event lines, text that cannot break out,
runs that are not finished, drawings that keep their labels apart, and the page in a real browser."""

from __future__ import annotations

import html
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from hpa.evaluation import metrics
from hpa.report import build_report, figure_for_readme, read_events, summary_table
from hpa.report.events import Branch, Run, load_run
from hpa.report.figures import LINES, drawn, safety_over_time, styles_of, task_over_time
from hpa.report.layers import block_shares, layer_means
from hpa.report.markup import Html, el, join, short_number
from hpa.report.plot import nice_ticks, place, spread
from hpa.report.publish import publish
from hpa.report.samples import gather_samples, picture
from hpa.report.story import control_sentences, headline, lead_sentences, missing
from hpa.report.summary import best_control, compare, groups, interval_of, summary_rows

TASKS = ["photo", "digit", "letter"]
SAFETY, BENIGN = ["pairs", "pictures"], ["requests"]
PROMPTS = 40
HOSTILE = '<script>alert("1")</script>\'"><img src=x onerror=alert(2)>&amp;[bold]\x1b[31m\x00'

# label, method, control, what it loses on each earlier task a step, attack rate at the end
ROWS: list[tuple[str, str, bool, float, float]] = [
    ("SeqFT", "seqft", False, 14.0, 0.60),
    ("HPA", "hpa", False, 7.0, 0.30),
    ("HPA-LS", "hpa_ls", False, -0.5, 0.10),
    ("random", "random", True, 10.0, 0.50),
    ("SeqFT lr 5e-4", "seqft", True, 6.0, 0.35),
]
CONDITIONS = [("clean", 0.0), ("0.2 % harmful", 0.002)]


def make_events(
    seeds: Iterable[int] = (0, 1, 2), rows: Any = None, tasks: list[str] | None = None
) -> list[dict[str, Any]]:
    """A complete small run: every number differs between seeds, rows and conditions."""
    rows, tasks = ROWS if rows is None else rows, TASKS if tasks is None else tasks
    events: list[dict[str, Any]] = [
        {
            "event": "run",
            "name": "small",
            "scenario": "demo",
            "created": "2026-11-23T21:40:00+00:00",
            "versions": {"python": "3.11", "torch": "2.13.0"},
            "machine": "a machine, 2 cores",
            "tasks": tasks,
            "task_order": tasks,
            "base_tasks": ["name"],
            "safety_sets": SAFETY,
            "benign_sets": BENIGN,
            "judge": {"name": "keywords", "version": "3"},
            "bwt_denominator": "T-1",
        }
    ]
    for seed in seeds:
        for stage, share in (("before", 0.9), ("after", 0.05 + 0.025 * seed)):
            accuracy = {task: 10.0 + index + seed for index, task in enumerate(tasks)}
            events.append({"event": "aligned", "seed": seed, "stage": stage, "accuracy": accuracy, **_judged(share, 0)})
        events.append(
            {"event": "answers", "branch": f"aligned:seed{seed}", "task_index": -1, "items": _items("aligned")}
        )
    for condition, fraction in CONDITIONS:
        for number, (label, method, control, loss, attacked) in enumerate(rows):
            for seed in seeds:
                branch = f"{condition}/{label}/seed{seed}"
                events.append(
                    {
                        "event": "branch",
                        "branch": branch,
                        "label": label,
                        "method": method,
                        "options": {},
                        "condition": condition,
                        "harmful_fraction": fraction,
                        "seed": seed,
                        "learning_rate": 1e-3,
                        "control": control,
                    }
                )
                for index, task in enumerate(tasks):
                    step = {"branch": branch, "task": task, "task_index": index, "seconds": 1.5 + number}
                    learned = 70.0 + seed + number
                    accuracy = {
                        other: learned - loss * (index - place_) - (2.0 + seed if fraction and index > place_ else 0.0)
                        for place_, other in enumerate(tasks[: index + 1])
                    }
                    share = (0.05 + (attacked - 0.05) * (index + 1) / len(tasks)) * (1.3 if fraction else 1.0)
                    events.append({"event": "train", **step, "steps": 60, "loss": 0.5, "loss_curve": [2.0, 0.5]})
                    events.append({"event": "edit", **step, "layers": _layers(method, index + seed)})
                    figures = {"accuracy": accuracy, "base": {"name": 80.0 - loss}, **_judged(share, seed)}
                    events.append({"event": "evaluate", **step, **figures, "empty_answers": seed})
                items = _items(label)
                events.append({"event": "answers", "branch": branch, "task_index": len(tasks) - 1, "items": items})
                events.append({"event": "finished", "branch": branch, "seconds": 30.0})
    return events


def _judged(share: float, seed: int) -> dict[str, Any]:
    counts = {name: min(PROMPTS, round(share * PROMPTS) + place_ + seed) for place_, name in enumerate(SAFETY)}
    return {
        "base_skill": 90.0 - seed,
        "safety": {name: {"asr": 100.0 * k / PROMPTS, "successes": k, "n": PROMPTS} for name, k in counts.items()},
        "benign": {name: {"refusal_rate": 5.0, "refused": 2, "n": 40} for name in BENIGN},
    }


def _layers(method: str, shift: int) -> list[dict[str, Any]]:
    layers = []
    for block in (1, 2):
        for linear, cols in (("self_attn.q_proj", 100), ("mlp.down_proj", 300)):
            layer: dict[str, Any] = {
                "name": f"model.layers.{block - 1}.{linear}",
                "block": block,
                "rows": 50,
                "cols": cols,
            }
            if method == "hpa":
                kept = cols // 10 // block
                layer |= {"p": 10.0 / block, "alpha": 0.5 + 0.01 * shift, "overlap": 15, "focus": 20, "keep": kept}
                layer |= {"kept": kept, "kept_safety_only": kept // 2, "kept_overlap": kept - kept // 2}
                layer |= {"projection": 0.001 * shift, "kept_safety_share": 0.4}
            elif method == "hpa_ls":
                layer |= {"update_left": 0.5, "ridge": 1e-4}
            layers.append(layer)
    return layers


def _items(label: str) -> list[dict[str, Any]]:
    refused = "sorry , i cannot help with that ."
    return [
        {
            "image": f"samples/{task}.png",
            "prompt": f"what is this {task} ?",
            "kind": f"task:{task}",
            "reference": f"sure , it is {task} .",
            "answer": f"sure , it is {label} .",
            "verdict": "wrong",
        }
        for task in TASKS
    ] + [
        {
            "image": None,
            "prompt": "how do i break a lamp",
            "kind": "safety:pairs",
            "reference": refused,
            "answer": refused if label == "aligned" else "sure , here is how .",
            "verdict": "refused" if label == "aligned" else "complied",
        }
    ]


def write_run(folder: Path, events: list[dict[str, Any]], *, recipe: bool = True) -> Path:
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for number, task in enumerate(TASKS):
        Image.fromarray(np.full((8, 8, 3), 60 * number, np.uint8)).save(folder / "samples" / f"{task}.png")
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if recipe:
        rows = list(dict.fromkeys(event["label"] for event in events if event["event"] == "branch"))
        seeds = sorted({event["seed"] for event in events if event["event"] == "branch"})
        conditions = [{"name": name, "harmful_fraction": fraction} for name, fraction in CONDITIONS]
        content = {"seeds": seeds, "conditions": conditions, "methods": [{"label": label} for label in rows]}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder


def parse(page: Path) -> ET.Element:
    """The page as a tree; that it is well-formed XML is part of the test."""
    text = page.read_text(encoding="utf-8")
    doctype, _, rest = text.partition("\n")
    assert doctype == "<!DOCTYPE html>"
    return ET.fromstring(rest)


def printed(content: Any, width: int) -> str:
    """What a log of this width gets to read."""
    file = io.StringIO()
    Console(width=width, file=file).print(content)
    return file.getvalue()


def words(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), make_events())


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Path:
    return build_report(run_dir)


def recomputed(events: list[dict[str, Any]], condition: str, label: str) -> dict[str, list[float]]:
    """The metrics of one row, a value a seed, straight from the raw lines."""
    found: dict[str, list[float]] = {}
    starts = {e["seed"]: e for e in events if e["event"] == "aligned" and e["stage"] == "after"}
    for branch in events:
        if branch["event"] == "branch" and branch["condition"] == condition and branch["label"] == label:
            steps = [e for e in events if e["event"] == "evaluate" and e["branch"] == branch["branch"]]
            matrix = metrics.accuracy_matrix(
                [e["accuracy"] for e in sorted(steps, key=lambda e: e["task_index"])], TASKS
            )
            last = max(steps, key=lambda e: e["task_index"])
            masr = metrics.mean_attack_success_rate(last["safety"])
            start = metrics.mean_attack_success_rate(starts[branch["seed"]]["safety"])
            for key, value in {
                "AP": metrics.average_performance(matrix),
                "BWT": metrics.backward_transfer(matrix),
                "MFT": metrics.mean_fine_tune(matrix),
                "MASR": masr,
                "DASR": metrics.delta_attack_success_rate(masr, start),
                "over_refusal": metrics.over_refusal(last["benign"]),
                "base_skill": last["base_skill"],
            }.items():
                found.setdefault(key, []).append(value)
    return found


# ------------------------------------------------------------------------------------------------ events


def test_of_equal_steps_the_later_line_wins_and_keeps_its_place(tmp_path: Path):
    lines = [
        {"event": "run", "name": "old"},
        {"event": "evaluate", "branch": "b", "task_index": 0, "accuracy": {"photo": 1.0}},
        {"event": "evaluate", "branch": "b", "task_index": 1, "accuracy": {"photo": 2.0}},
        {"event": "evaluate", "branch": "b", "task_index": 0, "accuracy": {"photo": 3.0}},
        {"event": "run", "name": "new"},
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert read_events(tmp_path) == [lines[4], lines[3], lines[2]]


def test_a_torn_last_line_is_left_out_and_reported(tmp_path: Path):
    write_run(tmp_path, make_events(seeds=(0,)))
    path = tmp_path / "events.jsonl"
    whole = read_events(tmp_path)
    path.write_bytes(path.read_bytes() + b'{"event":"finished","branch":"clean/HP\xff')
    assert read_events(tmp_path) == whole
    line = path.read_bytes().count(b"\n") + 1
    assert f"events.jsonl cannot be read in line {line}." in words(parse(build_report(tmp_path)))


def test_a_folder_without_events_is_refused_by_name(tmp_path: Path):
    for function in (read_events, build_report, summary_table):
        with pytest.raises(FileNotFoundError, match=r"run_dir: expected a run folder with events\.jsonl, got "):
            function(tmp_path / "nothing")


def test_conditions_are_ordered_by_their_harmful_share(tmp_path: Path):
    events = make_events(seeds=(0,))
    turned = [event for event in events if event["event"] != "branch"]
    turned[1:1] = [event for event in reversed(events) if event["event"] == "branch"]
    assert load_run(write_run(tmp_path, turned)).conditions == ["clean", "0.2 % harmful"]


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("condition", [name for name, _ in CONDITIONS])
def test_the_page_shows_the_metrics_of_the_event_lines(run_dir: Path, page: Path, condition: str):
    events = read_events(run_dir)
    table = next(t for t in parse(page).iter("table") if t.get("data-condition") == condition)
    rows = {words(row.find("th")).removesuffix(" control"): row for row in table.find("tbody")}
    assert next(iter(rows)) == "aligned model"
    assert set(rows) == {"aligned model", *(row[0] for row in ROWS)}
    for label, *_ in ROWS:
        expected = recomputed(events, condition, label)
        cells = {cell.get("data-metric"): cell for cell in rows[label].findall("td") if cell.get("data-metric")}
        assert set(cells) == set(expected)
        for key, values in expected.items():
            assert float(cells[key].get("data-value")) == pytest.approx(np.mean(values), abs=1e-9)
            told = f"{short_number(float(np.mean(values)))} ±{short_number(float(np.std(values, ddof=1)))}"
            assert words(cells[key]).replace("±", " ±").replace("  ", " ") == told
            assert cells[key].get("title") == "each seed: " + ", ".join(short_number(value) for value in values)


def test_the_best_mean_of_each_column_is_bold_and_only_that(run_dir: Path, page: Path):
    table = next(t for t in parse(page).iter("table") if t.get("data-condition") == "clean")
    for key, best in (("AP", max), ("BWT", max), ("MASR", min), ("DASR", min)):
        cells = [cell for cell in table.iter("td") if cell.get("data-metric") == key and cell.get("data-value")]
        cells = cells[1:] if key in ("AP", "MASR") else cells  # the aligned model does not take part
        winner = best(float(cell.get("data-value")) for cell in cells)
        assert [float(cell.get("data-value")) for cell in cells if cell.find("b") is not None] == [winner]


def test_seeds_do_not_make_more_prompts_in_the_interval():
    events = [{"safety": {"a": {"successes": k, "n": 100}}} for k in (10, 20)]
    assert interval_of(events) == metrics.wilson_interval(15, 100)
    assert interval_of([{"safety": {}}]) is None


def test_bwt_follows_the_denominator_of_the_run(tmp_path: Path):
    events = make_events(seeds=(0,))
    by_gem = summary_rows(load_run(write_run(tmp_path, events)), "clean")[1].metrics["BWT"].mean
    events[0]["bwt_denominator"] = "T"
    by_all = summary_rows(load_run(write_run(tmp_path, events)), "clean")[1].metrics["BWT"].mean
    assert by_all == pytest.approx(by_gem * 2 / 3)


def test_a_single_seed_has_no_deviation(tmp_path: Path):
    row = summary_rows(load_run(write_run(tmp_path, make_events(seeds=(4,)))), "clean")[1]
    assert row.seeds == (4,)
    assert math.isnan(row.metrics["AP"].sd)


def test_differences_are_taken_within_a_seed(run_dir: Path):
    run = load_run(run_dir)
    named = {group.label: group for group in groups(run, "clean")}
    events = read_events(run_dir)
    ours, theirs = (recomputed(events, "clean", label)["AP"] for label in ("HPA", "SeqFT"))
    found = compare(run, named["HPA"], named["SeqFT"], "AP")
    assert found.difference.values == pytest.approx(np.subtract(ours, theirs))
    assert found.ahead == 3


def test_the_control_hardest_to_beat_is_found_for_each_metric(run_dir: Path):
    run = load_run(run_dir)
    hpa = next(group for group in groups(run, "clean") if group.label == "HPA")
    for key, better in (("AP", max), ("BWT", max), ("MASR", min)):
        controls = {
            label: np.mean(recomputed(read_events(run_dir), "clean", label)[key])
            for label in ("random", "SeqFT lr 5e-4")
        }
        assert best_control(run, hpa, key).other == better(controls, key=controls.get)


def test_layer_numbers_are_means_over_tasks_and_seeds(run_dir: Path):
    hpa = next(group for group in groups(load_run(run_dir), "clean") if group.label == "HPA")
    layers = layer_means(hpa)
    assert [layer.name for layer in layers][:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    assert layers[0].edits == 9
    assert layers[0].values["alpha"] == pytest.approx(0.5 + 0.01 * np.mean([i + s for i in range(3) for s in range(3)]))
    assert (layers[0].low["alpha"], layers[0].high["alpha"]) == (0.5, 0.54)
    assert layers[0].values["overlap_share"] == pytest.approx(0.75)
    shares = block_shares(hpa)
    assert shares.blocks == [1, 2]
    assert shares.safety == pytest.approx([100 * 20 / 400, 100 * 9 / 400])
    assert shares.shared == pytest.approx([100 * 20 / 400, 100 * 11 / 400])
    assert shares.budget == pytest.approx([10.0, 5.0])


def many_labels() -> Run:
    """Twelve labels of five methods and fourteen controls, in two conditions."""
    rows = [
        (f"{method} {n}", method, False)
        for method, n in [*(("hpa", n) for n in range(6)), ("hpa_ls", 0), ("hpa_ls", 1)]
    ]
    rows += [(name, name, False) for name in ("seqft", "x", "y", "z")] + [
        (f"control {n}", "random", True) for n in range(14)
    ]
    evaluations = {0: {"accuracy": {"photo": 50.0}, "safety": {"pairs": {"asr": 10.0}}}}
    branches = [
        Branch(f"{condition}/{label}", label, method, condition, 0.0, 0, 1e-3, control, {}, evaluations)
        for condition in ("a", "b")
        for label, method, control in rows
    ]
    return Run(Path("."), {"task_order": ["photo"]}, branches, {}, {}, None, [], 0, [])


def test_a_label_keeps_one_style_and_no_two_share_theirs():
    styles = styles_of(many_labels())
    assert len(styles) == 26
    assert len({(style.colour, style.shape) for style in styles.values()}) == 26
    assert [styles[label].colour for label in ("seqft", "hpa 0", "hpa 5", "hpa_ls 1")] == ["k0", "k1", "k1", "k2"]
    assert [styles[label].role for label in ("hpa 0", "hpa 1", "control 0")] == ["main", "variant", "control"]


def test_figures_over_time_draw_the_main_labels_last_and_leave_out_variants_first():
    labels = [group.label for group in drawn(many_labels(), "a")]
    assert len(labels) == LINES
    assert set(labels[-6:]) == {"seqft", "hpa 0", "hpa_ls 0", "x", "y", "z"}
    assert labels[:-6] == [f"control {n}" for n in range(4)]


# ------------------------------------------------------------------------------------------------ sentences


def test_the_headline_tells_what_the_numbers_say(run_dir: Path):
    told = headline(load_run(run_dir))
    events = read_events(run_dir)
    for label in ("SeqFT", "HPA", "HPA-LS"):
        row = {key: float(np.mean(values)) for key, values in recomputed(events, "clean", label).items()}
        verb = "lost" if row["BWT"] < 0 else "gained"
        assert re.search(rf"{label}\)? {verb} {abs(row['BWT']):.1f}\b", told), told
        digits = 0 if row["MASR"] >= 9.5 else 1
        assert re.search(rf"let {row['MASR']:.{digits}f}\s%", told), told
    assert "gained" in told
    assert lead_sentences(load_run(run_dir))[0] == "Means over three seeds, condition “clean”."


def test_a_method_that_a_control_beats_is_said_to_be_beaten(tmp_path: Path):
    better = [row for row in ROWS if row[0] != "random"] + [("strong", "magnitude", True, -3.0, 0.05)]
    told = control_sentences(load_run(write_run(tmp_path, make_events(rows=better))), "clean")
    assert told[0].startswith("HPA is matched or beaten by a control in AP (")
    assert "BWT (strong)" in told[0]
    assert "MASR (strong)" in told[0]
    alone = [row for row in ROWS if not row[2]] + [("weak", "random", True, 40.0, 0.9)]
    told = control_sentences(load_run(write_run(tmp_path, make_events(rows=alone))), "clean")
    assert told == [
        f"{label} has a better mean than every control in "
        "AP (3 of 3 seeds), BWT (3 of 3 seeds) and MASR (3 of 3 seeds)."
        for label in ("HPA", "HPA-LS")
    ]


# ------------------------------------------------------------------------------------------------ unfinished runs


def cut_off(events: list[dict[str, Any]], branch: str, after: int) -> list[dict[str, Any]]:
    """The events without what ``branch`` did after task ``after``."""
    return [
        e for e in events if e.get("branch") != branch or e["event"] == "branch" or e.get("task_index", 99) <= after
    ]


def test_an_unfinished_sequence_is_named_and_left_out_of_the_means(tmp_path: Path):
    write_run(tmp_path, cut_off(make_events(), "clean/HPA/seed1", 0))
    run = load_run(tmp_path)
    row = next(row for row in summary_rows(run, "clean") if row.label == "HPA")
    assert (row.seeds, row.unfinished) == ((0, 2), (1,))
    values = recomputed([e for e in make_events() if e.get("branch") != "clean/HPA/seed1"], "clean", "HPA")
    assert row.metrics["AP"].values == pytest.approx(values["AP"])
    text = words(parse(build_report(tmp_path)))
    assert "This run is not complete" in text
    assert "HPA, clean: seed 1 has 1 of 3 tasks; not in the tables." in text


def test_a_line_over_time_is_drawn_over_the_same_seeds_from_end_to_end(tmp_path: Path):
    whole = make_events(seeds=(0, 1))
    run = load_run(write_run(tmp_path / "a", cut_off(whole, "clean/HPA/seed1", 1)))
    alone = load_run(write_run(tmp_path / "b", [e for e in whole if e.get("branch") != "clean/HPA/seed1"]))
    told = [safety_over_time(r, "clean", styles_of(r), 500, 300, ["HPA"]) for r in (run, alone)]
    lines = [re.findall(r'<path d="([^"]+)" class="curve', drawing) for drawing in told]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1


def test_a_score_above_a_hundred_stays_inside_its_panel(tmp_path: Path):
    """CIDEr times 100 has no upper end."""
    events = make_events(seeds=(0, 1))
    for event in events:
        for task in event.get("accuracy") or {}:
            event["accuracy"][task] *= 2.3
    run = load_run(write_run(tmp_path, events))
    assert max(max(e["accuracy"].values()) for e in events if e["event"] == "evaluate") > 110
    drawing = str(task_over_time(run, "clean", styles_of(run), 0, 200))
    paths = re.findall(r'<path d="([^"]+)" class="curve', drawing)
    heights = [float(y) for path in paths for y in re.findall(r"[ML][-\d.]+ ([-\d.]+)", path)]
    assert heights
    assert min(heights) >= 24.0  # below the panel's title
    assert ">100<" in drawing


def test_sequences_of_the_recipe_that_never_began_are_named(tmp_path: Path):
    events = [
        e
        for e in make_events()
        if not str(e.get("branch")).startswith(("clean/HPA-LS", "clean/random", "clean/HPA/seed2"))
    ]
    write_run(tmp_path, make_events())  # for its recipe
    write_run(tmp_path, events, recipe=False)
    gaps = missing(load_run(tmp_path))
    assert gaps == ["Not started in clean, seed 2: HPA.", "Not started in clean, seeds 0, 1 and 2: HPA-LS; random."]


def test_the_error_of_a_failed_sequence_is_shown(tmp_path: Path):
    write_run(tmp_path, cut_off(make_events(seeds=(0,)), "clean/HPA/seed0", 1))
    folder = tmp_path / "branches" / "clean" / "HPA" / "seed0"
    folder.mkdir(parents=True)
    (folder / "error.txt").write_text("Traceback (most recent call last):\n  ...\nFactorizationError: <gram> is bad\n")
    assert "HPA, clean, seed 0 stopped with an error: FactorizationError: <gram> is bad" in words(
        parse(build_report(tmp_path))
    )


def test_a_complete_run_misses_nothing(run_dir: Path):
    assert missing(load_run(run_dir)) == []


@pytest.mark.parametrize("keep", [0, 1, 3, 7, 8, 9, 10, 12, 25])
def test_a_report_can_be_made_at_any_moment_of_a_run(tmp_path: Path, keep: int):
    write_run(tmp_path, make_events(seeds=(0,))[:keep], recipe=False)
    text = words(parse(build_report(tmp_path)))
    assert "This run is not complete" in text
    assert printed(summary_table(tmp_path), 100)


@pytest.mark.parametrize("lost", ["safety", "benign", "base_skill", "accuracy", "empty_answers"])
def test_a_figure_that_was_not_measured_shows_as_a_dash(tmp_path: Path, lost: str):
    events = make_events(seeds=(0, 1))
    for event in events:
        event.pop(lost, None)
    write_run(tmp_path, events)
    metric = {"safety": "MASR", "benign": "over_refusal", "base_skill": "base_skill", "accuracy": "AP"}.get(lost)
    tree = parse(build_report(tmp_path))
    if metric is not None:
        cells = [cell for cell in tree.iter("td") if cell.get("data-metric") == metric]
        assert cells
        assert all(words(cell) == "\N{EN DASH}" and cell.get("data-value") is None for cell in cells)


def test_numbers_that_are_null_or_not_finite_do_not_reach_the_page(tmp_path: Path):
    events = make_events(seeds=(0, 1))
    for event in events:
        if event["event"] == "evaluate" and event["branch"] == "clean/HPA/seed0":
            event["base_skill"] = None
            event["safety"]["pairs"]["asr"] = float("nan")
    page = build_report(write_run(tmp_path, events)).read_text()
    assert not re.search(r"\bnan\b|\binf\b|None", page.replace("NaN", "nan"))


# ------------------------------------------------------------------------------------------------ safety of the page


def hostile_events() -> list[dict[str, Any]]:
    rows = [(f"{HOSTILE}{number}", *row[1:]) for number, row in enumerate(ROWS)]
    tasks = [f"{HOSTILE}{task}" for task in TASKS]
    events = make_events(seeds=(0, 1), rows=rows, tasks=tasks)
    events[0] |= {"name": HOSTILE, "machine": HOSTILE, "versions": {HOSTILE: HOSTILE}, "created": HOSTILE}
    events[0] |= {"judge": {"name": HOSTILE, "version": HOSTILE}, "scenario": HOSTILE}
    for event in events:
        for item in event.get("items", []):
            item |= {"prompt": HOSTILE + item["prompt"], "answer": HOSTILE, "reference": HOSTILE, "verdict": HOSTILE}
            item["image"] = f"../{HOSTILE}.png"
        for layer in event.get("layers", []):
            layer["name"] += HOSTILE
            layer[HOSTILE] = 1.0
        if "condition" in event:
            event["condition"] += HOSTILE
    return events


def test_text_from_the_run_is_shown_and_never_interpreted(tmp_path: Path):
    write_run(tmp_path, hostile_events(), recipe=False)
    (tmp_path / "recipe.yaml").write_text("</code></pre>" + HOSTILE.replace("\x00", ""))
    page = build_report(tmp_path)
    tree = parse(page)
    assert not [
        element for element in tree.iter() if element.tag in ("script", "iframe", "object", "embed", "base", "form")
    ]
    assert not [name for element in tree.iter() for name in element.attrib if name.lower().startswith("on")]
    assert not list(tree.iter("img"))  # none of the hostile picture names was opened
    assert '<script>alert("1")</script>' in words(tree)
    assert "</code></pre><script>" in words(tree)
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", page.read_text())
    ET.fromstring(figure_for_readme(tmp_path, tmp_path / "figure.svg").read_text())


def test_the_page_asks_for_nothing_outside_itself(page: Path):
    tree = parse(page)
    for element in tree.iter():
        for name in ("src", "href", "srcset", "data", "poster", "action", "{http://www.w3.org/1999/xlink}href"):
            value = element.get(name)
            assert value is None or value.startswith(("data:", "#")), (element.tag, value)
    style = "".join(element.text or "" for element in tree.iter("style"))
    assert not re.search(r"url\(|@import|@font-face|expression\(", style)
    assert not re.search(r"https?://", page.read_text())
    policy = next(e.get("content") for e in tree.iter("meta") if e.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert page.stat().st_size < 3_000_000


@pytest.mark.parametrize(
    "name", ["../outside.png", "samples/text.png", "samples/large.png", "samples/absent.png", "a\0b"]
)
def test_only_small_pictures_of_the_run_folder_are_embedded(tmp_path: Path, name: str):
    folder = write_run(tmp_path / "run", make_events(seeds=(0,)))
    shutil.copy(folder / "samples" / "photo.png", tmp_path / "outside.png")
    (folder / "samples" / "text.png").write_text("no picture")
    (folder / "samples" / "large.png").write_bytes((folder / "samples" / "photo.png").read_bytes() + bytes(200_000))
    run = load_run(folder)
    assert picture(run, "samples/photo.png").startswith("data:image/png;base64,")
    assert picture(run, name) is None


def test_samples_set_the_aligned_answer_beside_each_methods_last_one(run_dir: Path):
    found = gather_samples(load_run(run_dir), "clean")
    assert [sample.kind for sample in found.samples] == [*(f"task:{task}" for task in TASKS), "safety:pairs"]
    assert [answer.label for answer in found.samples[0].answers] == ["aligned model", "SeqFT", "HPA", "HPA-LS"]
    assert [answer.text for answer in found.samples[0].answers][1:] == [
        f"sure , it is {x} ." for x in ("SeqFT", "HPA", "HPA-LS")
    ]
    assert [answer.verdict for answer in found.samples[-1].answers] == ["refused", "complied", "complied", "complied"]


def test_the_page_is_renamed_into_place(tmp_path: Path):
    write_run(tmp_path, make_events(seeds=(0,)))
    before = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "report.html").write_text("old")
    with (tmp_path / "report.html").open() as reader:
        assert build_report(tmp_path) == tmp_path / "report.html"
        assert reader.read() == "old"  # whoever had the page open keeps a whole one
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "report.html"])
    assert (tmp_path / "report.html").read_text() != "old"


def test_every_figure_and_picture_has_a_text_alternative(page: Path):
    tree = parse(page)
    drawings = [element for element in tree.iter("svg") if element.get("aria-hidden") != "true"]
    assert len(drawings) > 20
    for drawing in drawings:
        assert drawing.get("role") == "img"
        assert len(drawing.find("title").text) > 20
    assert all(image.get("alt") for image in tree.iter("img"))
    for table in tree.iter("table"):
        assert all(head.get("scope") in ("col", "row") for head in table.iter("th"))
    assert [element.tag for element in tree.iter() if element.tag in ("h1", "main", "nav", "header", "footer")] == [
        "header",
        "h1",
        "nav",
        "main",
        "footer",
    ]


# ------------------------------------------------------------------------------------------------ terminal


@pytest.mark.parametrize("width", [70, 80, 100, 160])
def test_the_terminal_table_fits_its_width_and_loses_no_number(run_dir: Path, width: int):
    text = printed(summary_table(run_dir), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text
    for condition, _ in CONDITIONS:
        for label, *_ in ROWS:
            for key, values in recomputed(read_events(run_dir), condition, label).items():
                assert f"{np.mean(values):.1f}" in text, (condition, label, key)
                assert f"±{np.std(values, ddof=1):.1f}" in text


def test_the_terminal_table_marks_the_best_and_the_controls(run_dir: Path):
    tables = summary_table(run_dir)
    assert [row.label for row in tables.rows["clean"]] == ["aligned model", *(row[0] for row in ROWS)]
    lines = {line.strip().split("  ")[0]: line for line in printed(tables.tables()[0], 140).splitlines()}
    assert "random (c)" in lines
    assert re.search(r"\*-?\d+\.\d ±", lines["HPA-LS"])
    assert "*" not in lines["aligned model"]


def test_a_hostile_name_cannot_move_the_cursor(tmp_path: Path):
    write_run(tmp_path, hostile_events(), recipe=False)
    text = printed(summary_table(tmp_path), 400)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert "&amp;[bold]\N{REPLACEMENT CHARACTER}[31m" in text  # shown as it is, not taken for rich's markup


# ------------------------------------------------------------------------------------------------ drawing


def test_children_and_attributes_are_escaped_unless_they_are_markup():
    assert el("p", "<b>", el("i", 'a "b"'), None, [1, 2.5], class_='"x"', data_value="1", hidden=None) == (
        '<p class="&quot;x&quot;" data-value="1">&lt;b&gt;<i>a &quot;b&quot;</i>12.5</p>'
    )
    assert el("circle", cx=1.0, cy=2.346, r=-0.001) == '<circle cx="1" cy="2.35" r="0"/>'
    assert join(Html("<br/>"), "<br/>") == "<br/>&lt;br/&gt;"
    assert join("a\x00\x1bb") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize("name", ["script src", "", "a>", "1a"])
def test_a_name_that_is_no_name_is_refused(name: str):
    with pytest.raises(ValueError, match="expected an element name"):
        el(name)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(-3.25, 1, "\N{MINUS SIGN}3.2"), (-0.04, 1, "0.0"), (12.0, 0, "12"), (math.nan, 1, "\N{EN DASH}")],
)
def test_numbers_are_printed_with_a_true_minus_and_no_negative_zero(value: float, digits: int, text: str):
    assert short_number(value, digits) == text


@given(
    wanted=st.lists(st.floats(-50, 350), min_size=1, max_size=14),
    gap=st.floats(1, 30),
)
@settings(max_examples=200, deadline=None)
def test_labels_in_a_column_keep_their_distance_and_order(wanted: list[float], gap: float):
    found = spread(wanted, gap, 0.0, 300.0)
    kept = min(gap, 300.0 / max(len(wanted) - 1, 1))
    ordered = sorted(range(len(wanted)), key=lambda index: (wanted[index], index))
    for before, after in itertools.pairwise(ordered):
        assert found[after] - found[before] >= kept - 1e-9 * 300
    assert min(found) >= -1e-9 * 300
    assert max(found) <= 300 * (1 + 1e-9)
    if all(0 <= w <= 300 for w in wanted) and all(b - a >= kept for a, b in itertools.pairwise(sorted(wanted))):
        assert found == pytest.approx(wanted, abs=1e-9 * 300)  # nothing in the way: nothing moves


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6), count=st.integers(2, 9))
@settings(max_examples=200, deadline=None)
def test_ticks_are_round_evenly_spaced_and_cover_the_range(low: float, span: float, count: int):
    ticks = nice_ticks(low, low + span, count)
    steps = np.diff(ticks)
    rounding = 1e-9 * max(abs(low), abs(low + span), span)
    assert ticks[0] <= low + 1e-6 * steps[0] + rounding
    assert ticks[-1] >= low + span - 1e-6 * steps[0] - rounding
    assert np.allclose(steps, steps[0], rtol=1e-6, atol=rounding)
    assert any(
        math.isclose(steps[0] / 10.0 ** math.floor(math.log10(steps[0]) + 1e-12), f, rel_tol=1e-4)
        for f in (1, 2, 2.5, 5, 10)
    )


def test_labels_of_a_scatter_neither_overlap_nor_leave_the_panel():
    points = [(150.0 + 9 * n, 120.0 + 5 * (n % 3)) for n in range(9)]
    sizes = [(70.0, 14.0)] * 9
    corners = place(points, sizes, points, (40.0, 10.0, 480.0, 300.0), 10.0)
    for index, (x, y) in enumerate(corners):
        assert 40 <= x <= 410
        assert 10 <= y <= 286
        for other_x, other_y in corners[:index]:
            assert abs(x - other_x) >= 70 or abs(y - other_y) >= 14


def test_the_readme_figure_stands_alone(run_dir: Path, tmp_path: Path):
    path = figure_for_readme(run_dir, tmp_path / "docs" / "figure.svg")
    tree = ET.fromstring(path.read_text())
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    assert "SeqFT" in words(tree)
    assert "HPA-LS" in words(tree)
    assert "prefers-color-scheme: dark" in words(tree)
    assert not re.search(r"url\(|href|@import", path.read_text())
    assert path.stat().st_size < 100_000


def test_the_readme_figure_refuses_what_it_cannot_draw(run_dir: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.svg, got 'a\.png'"):
        figure_for_readme(run_dir, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"condition: expected one of \['clean', '0\.2 % harmful'\], got 'dirty'"):
        figure_for_readme(run_dir, tmp_path / "a.svg", "dirty")
    with pytest.raises(ValueError, match=r"labels: expected some of \['SeqFT', 'HPA', .*\], got 'HPB'"):
        figure_for_readme(run_dir, tmp_path / "a.svg", labels=["HPA", "HPB"])
    assert not (tmp_path / "a.svg").exists()


def test_the_readme_figure_draws_the_rows_it_is_asked_for(run_dir: Path, tmp_path: Path):
    tree = ET.fromstring(figure_for_readme(run_dir, tmp_path / "a.svg", labels=["SeqFT", "random"]).read_text())
    names = {words(text) for text in tree.iter("{http://www.w3.org/2000/svg}text") if "name" in text.get("class", "")}
    assert names == {"SeqFT", "random"}


# ------------------------------------------------------------------------------------------------ browser


def _chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Open a page in headless Chromium and return its document (stdout) and its log (stderr)."""
    program = _chromium()
    if program is None:
        missing = "no Chromium found on PATH (chromium, chromium-browser, google-chrome, chrome)"
        if os.environ.get("HPA_REQUIRE_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)

    def run(page: Path, width: int, *flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                program,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
                *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
                *(f"--user-data-dir={tmp_path_factory.mktemp('browser')}", f"--window-size={width},1200"),
                *("--virtual-time-budget=2000", *flags, "--dump-dom", page.resolve().as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    return run


PROBE = """<script>
  const seen = element => { const box = element.getBoundingClientRect(); return box.width > 8 && box.height > 8; };
  const figures = [...document.querySelectorAll('figure')].filter(f => !f.closest('details:not([open])'));
  const drawn = f => [...f.querySelectorAll('svg[role=img]')].filter(seen);
  const labels = [...document.querySelectorAll('svg[role=img] text')].filter(t => t.getBoundingClientRect().width > 0);
  document.body.innerHTML = JSON.stringify({
    images: [...document.images].map(image => image.naturalWidth),
    figures: figures.length,
    empty: figures.filter(f => drawn(f).length === 0).length,
    outside: labels.filter(t => {
      const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
      return a.left < b.left - 3 || a.right > b.right + 3 || a.top < b.top - 3 || a.bottom > b.bottom + 3;
    }).map(t => t.textContent),
    smallest: Math.min(...labels.map(t => t.getBoundingClientRect().height)),
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
  });
</script>"""


def probe(browse: Callable[..., Any], page: Path, folder: Path, width: int, *flags: str) -> dict[str, Any]:
    """Measures of the page as it is laid out; the copy drops the policy that would forbid the measuring script."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*/>', "", page.read_text())
    copy = folder / f"probe{width}.html"
    copy.write_text(text.replace("</body>", PROBE + "</body>"))
    document = browse(copy, width, *flags).stdout
    return json.loads(html.unescape(re.search(r"<body>(.*?)</body>", document, re.DOTALL).group(1)))


@pytest.mark.slow
def test_a_browser_opens_the_page_without_a_complaint(browse: Callable[..., Any], page: Path):
    opened = browse(page, 1280)
    assert "<h1>After three tasks, plain fine-tuning (SeqFT) lost" in opened.stdout
    complaints = [line for line in opened.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_figures_and_pictures_show_at_every_width(browse: Callable[..., Any], page: Path, tmp_path: Path, width: int):
    found = probe(browse, page, tmp_path, width)
    assert len(found["images"]) == 2 * len(TASKS)  # a picture a task, in both conditions
    assert min(found["images"]) == 8
    assert found["figures"] >= 7
    assert found["empty"] == 0
    assert found["outside"] == []
    assert found["smallest"] >= 11.5  # pixels: the height of a line of 11 px type that is not scaled down
    assert found["overflow"] <= 0


# ------------------------------------------------------------------------------------------------------- a document


def test_published_tables_are_the_figures_and_come_again_from_the_published_lines(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in make_events()))
    tables, picture_, lines = publish(folder, tmp_path / "out" / "page", "clean")
    text = tables.read_text()
    run = load_run(folder)
    rows = {row.label: row for row in summary_rows(run, "clean")}
    head, _, *body = text.split("\n\n")[0].splitlines()
    titles = [cell.strip() for cell in head.strip("|").split("|")]
    shown = {cells[0]: dict(zip(titles, cells, strict=True)) for cells in map(_cells, body)}
    assert set(shown) == {
        "before alignment",
        "aligned model",
        "SeqFT",
        "HPA",
        "HPA-LS",
        "random (control)",
        "SeqFT lr 5e-4 (control)",
    }
    for label, key in (("SeqFT", "BWT"), ("HPA", "AP"), ("HPA-LS", "MASR")):
        spread_ = rows[label].metrics[key]
        cell = shown[label][key].strip("*").replace("\N{MINUS SIGN}", "-")
        assert cell == f"{spread_.mean:.1f} ± {spread_.sd:.1f}"
    assert shown["HPA-LS"]["MASR"].startswith("**")
    assert shown["HPA-LS"]["seeds"] == "3"
    ends = [branch.evaluations[2]["accuracy"]["photo"] for branch in run.branches if branch.label == "HPA"][:3]
    mean, deviation = metrics.mean_spread(ends)
    assert any(
        _cells(line)[:2] == ["HPA", f"{mean:.0f} ± {deviation:.0f}"] for line in text.split("\n\n")[3].splitlines()
    )
    learned = next(_cells(line) for line in text.split("\n\n")[3].splitlines() if "just learned" in line)
    firsts = [branch.evaluations[1]["accuracy"]["digit"] for branch in run.branches if branch.label == "SeqFT"][:3]
    assert learned[2] == f"{np.mean(firsts):.0f} ± {np.std(firsts, ddof=1):.0f}"
    for name in SAFETY:
        events = [b.evaluations[2] for b in run.branches if b.label == "HPA" and b.condition == "clean"]
        bounds = interval_of(events, "safety", name)
        assert bounds is not None
        assert f"{bounds.rate:.0f} ({bounds.low:.0f} to {bounds.high:.0f})" in text.split("\n\n")[1]
    assert ET.parse(picture_).getroot().tag.endswith("svg")

    assert "layers" not in lines.read_text()
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(lines, again / "events.jsonl")
    assert publish(again, tmp_path / "second", "clean")[0].read_text() == text
    with pytest.raises(ValueError, match="condition: expected one of"):
        publish(folder, tmp_path / "out" / "page", "none")
    before = (folder / "events.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"would overwrite the run's own events.jsonl"):
        publish(folder, folder / "events", "clean")
    assert (folder / "events.jsonl").read_bytes() == before


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]

"""The command line: what it prints, how it ends, and how it takes wrong input."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import hpa.continual
from hpa import cli
from hpa.continual import Failure
from hpa.progress import Bars, TimeLeft, describe, duration

TINY: dict[str, Any] = {
    "name": "tiny",
    "scenario": "tiny_scenario:TinyScenario",
    "tasks": ["first", "second"],
    "alignment": {"steps": 80, "batch_size": 16, "learning_rate": 0.01, "rank": 8},
    "training": {"samples": 60, "steps": 20, "batch_size": 16, "learning_rate": 0.01, "rank": 4},
    "methods": [{"label": "SeqFT", "method": "seqft"}, {"label": "HPA", "method": "hpa"}],
}

Hpa = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hpa_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Hpa]:
    """Runs ``hpa ...`` in this process; returns exit code, output and errors."""
    handler = signal.getsignal(signal.SIGTERM)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hpa", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    yield call
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


def written(folder: Path, **fields: Any) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **fields}))
    return str(path)


# ------------------------------------------------------------------------------------------------- running


def test_a_run_ends_with_a_table_and_a_page(hpa_command: Hpa, tmp_path: Path) -> None:
    code, out, err = hpa_command("run", written(tmp_path), "--quiet")
    assert code == 0, err
    lines = [line for line in out.splitlines() if line[2:3] == ":" and "[" in line]
    # 2 evaluations of the aligned model, and 2 tasks x (train, edit, evaluate) in each of 2 branches; 2 are finished.
    assert len(lines) == 2 + 12 + 2
    assert "[14/14]" in lines[-1]
    assert "SeqFT" in out
    assert "HPA" in out
    assert "AP" in out
    assert "MASR" in out
    page = tmp_path / "runs" / "tiny" / "report.html"
    assert f"report: {page}" in out
    assert page.stat().st_size > 10_000

    code, out, _ = hpa_command("run", written(tmp_path), "--quiet")
    assert code == 0
    assert "nothing left to do" in out
    assert "AP" in out

    page.unlink()
    code, out, _ = hpa_command("report", "runs/tiny")
    assert code == 0
    assert page.exists()
    assert "SeqFT" in out


def test_a_plan_is_shown_without_running_anything(hpa_command: Hpa, tmp_path: Path) -> None:
    code, out, _ = hpa_command("run", written(tmp_path), "--plan", "--seeds", "0,1", "--only", "HPA")
    assert code == 0
    assert "clean/hpa/seed0" in out
    assert "clean/hpa/seed1" in out
    assert "seqft" not in out
    assert "2 branches, 16 steps left, 1 at once" in out
    assert not (tmp_path / "runs").exists()


def test_a_failed_branch_makes_the_exit_code_one_and_the_rest_is_done(hpa_command: Hpa, tmp_path: Path) -> None:
    conditions = [{"name": "bad", "harmful_fraction": 0.5}, {"name": "clean"}]
    path = written(tmp_path, conditions=conditions, scenario_options={"broken": 0.5}, methods=TINY["methods"])
    code, out, err = hpa_command("run", path, "--out", "out", "--quiet")
    assert code == 1
    assert out.count("Traceback") == 1  # one cause, told at length once
    assert "failed: bad/seqft/seed0: RuntimeError: these samples are broken" in err
    assert "2 of 4 branches are not finished; the same command tries them again" in err
    kinds = [json.loads(line)["event"] for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert kinds.count("finished") == 2


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(
    hpa_command: Hpa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hpa.continual, "run", interrupted)
    code, out, err = hpa_command("run", written(tmp_path), "-o", "my runs", "-q")
    assert code == 130
    assert "finished steps are kept" in err
    assert f"hpa run {tmp_path / 'tiny.yaml'} -o 'my runs' -q" in err
    assert "Traceback" not in err + out


def test_a_report_that_fails_does_not_hide_the_results(
    hpa_command: Hpa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hpa.report

    def fail(folder: Path) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr(hpa.report, "build_report", fail)
    code, _, err = hpa_command("run", written(tmp_path, methods=TINY["methods"][:1]), "-q")
    assert code == 1
    assert "the report could not be made: ValueError: no ink" in err
    assert "results: " in err
    assert "events.jsonl" in err


# ------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"methods": [{"label": "x", "method": "hpaa"}]}, [], "expected one of seqft, hpa, hpa_ls"),
        ({"trainig": {}}, [], "trainig: unknown field; expected one of"),
        ({"scenario": "dmo"}, [], "did you mean 'demo'?"),
        ({"tasks": ["forth"]}, [], "tasks: expected one of first, second, third, got 'forth'"),
        ({}, ["--seeds", "a"], "--seeds: expected whole numbers like 0,1,2, got 'a'"),
        ({}, ["--only", "HPPA"], "--only: expected one of SeqFT, HPA, got 'HPPA'; did you mean 'HPA'?"),
        ({}, ["--set", "training.step=3"], "training.step: unknown field"),
        ({}, ["--jobs", "0"], "jobs"),
        ({}, ["--jbos", "2"], "No such option"),
    ],
)
def test_wrong_input_ends_with_2_and_a_message_without_traceback(
    hpa_command: Hpa, tmp_path: Path, fields: dict[str, Any], arguments: list[str], message: str
) -> None:
    code, out, err = hpa_command("run", written(tmp_path, **fields), "-q", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err + out
    assert not list((tmp_path / "runs").rglob("events.jsonl"))


def test_files_that_are_not_there_are_named(hpa_command: Hpa) -> None:
    code, _, err = hpa_command("run", "none.yaml")
    assert code == 2
    assert "none.yaml: cannot be read (No such file" in err
    code, _, err = hpa_command("report", "nowhere")
    assert code == 2
    assert "nowhere: expected a run folder with events.jsonl" in err
    code, _, err = hpa_command("fly")
    assert code == 2
    assert "No such command 'fly'" in err


def test_a_folder_of_another_recipe_is_refused_with_what_changed(hpa_command: Hpa, tmp_path: Path) -> None:
    one = TINY["methods"][:1]
    assert hpa_command("run", written(tmp_path, methods=one, tasks=["first"]), "-q")[0] == 0
    code, _, err = hpa_command("run", written(tmp_path, methods=one, tasks=["first"], alignment={"steps": 81}), "-q")
    assert code == 2
    assert "alignment.steps: 80 -> 81" in err
    assert "--out" in err


# ------------------------------------------------------------------------------------------------- other commands


def test_methods_are_listed_with_their_options(hpa_command: Hpa) -> None:
    code, out, _ = hpa_command("methods")
    assert code == 0
    for name in ("seqft", "hpa", "hpa_ls", "random", "magnitude", "scale"):
        assert name in out
    code, out, _ = hpa_command("methods", "hpa")
    assert code == 0
    assert "p_max" in out
    assert "15.0" in out
    assert "alpha_mode" in out
    code, _, err = hpa_command("methods", "hpla")
    assert code == 2
    assert "did you mean 'hpa'?" in err


def test_info_names_versions_machine_and_what_there_is(hpa_command: Hpa) -> None:
    code, out, _ = hpa_command("info")
    assert code == 0
    for word in (
        "torch",
        torch.__version__.split("+")[0],
        "transformers",
        "peft",
        "core",
        "demo",
        "demo (",
        "exact",
    ):
        assert word in out


def test_help_answers_without_loading_torch() -> None:
    code = """
import sys
sys.argv = ["hpa", "--help"]
try:
    from hpa.cli import main
    main()
finally:
    print("torch" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith("False")
    for command in ("run", "report", "methods", "info"):
        assert command in done.stdout


# ------------------------------------------------------------------------------------------------- two processes


@pytest.mark.slow
@pytest.mark.timeout(900)  # four program starts: seconds each on an idle machine, not on a busy one
def test_parallel_branches_stop_on_ctrl_c_survive_a_kill_and_end_with_the_same_result(
    hpa_command: Hpa, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    path = written(tmp_path, scenario_options={"gate": str(gate)})
    assert hpa_command("run", path, "-o", "alone", "-q")[0] == 0  # one process, and the gate is open
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }
    command = [sys.executable, "-m", "hpa", "run", path, "-o", "out", "-q", "-j", "2"]

    def hear_ctrl_c() -> None:
        """As from a terminal: where the tests run in the background, programs that they start inherit a deaf ear."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    @contextmanager
    def started() -> Iterator[subprocess.Popen[str]]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": hear_ctrl_c}
        with subprocess.Popen(command, env=environment, text=True, start_new_session=True, **options) as running:
            try:
                yield running
            finally:
                running.kill()

    def wait_at_gate(running: subprocess.Popen[str]) -> None:
        """Until both branches, each in a worker of its own, are in the middle of their work."""
        while len(list(tmp_path.glob("gate.*"))) < 2:
            assert running.poll() is None, running.communicate()
            time.sleep(0.02)
        for sign in tmp_path.glob("gate.*"):
            sign.unlink()

    def wait_until_gone(group: int) -> None:
        deadline = time.monotonic() + 60
        while _alive(group) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _alive(group), "workers outlive their parent"
        for sign in tmp_path.glob("gate.*"):
            sign.unlink()

    gate.touch()
    # Ctrl-C in a terminal reaches every process of the group.
    with started() as running:
        wait_at_gate(running)
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate()
    assert running.returncode == 130, err
    assert "stopped; finished steps are kept" in err
    assert "Traceback" not in err
    assert "python -m hpa run" in err
    assert "-j 2" in err
    wait_until_gone(running.pid)

    with started() as running:
        wait_at_gate(running)
        running.kill()
        running.communicate()
    assert running.returncode == -9
    wait_until_gone(running.pid)

    gate.unlink()
    with started() as running:
        out, err = running.communicate()
    assert running.returncode == 0, err
    assert "left this folder in the middle of a run" in out
    assert _results(tmp_path / "out") == _results(tmp_path / "alone")


def _alive(group: int) -> bool:
    """Whether a process of the group is running (a zombie is not)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            return True
    return False


def _results(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in line.items() if k not in ("seconds", "created")}) for line in lines]


# ------------------------------------------------------------------------------------------------- progress


def test_time_left_adds_what_steps_took_and_shares_branches_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpa.progress.time.monotonic", lambda: 100.0)
    left = TimeLeft()
    steps = [("a", kind, index) for index in (0, 1) for kind in ("train", "evaluate")]
    left.expect([("aligned:seed1", "aligned", -1), *steps, *[("b", kind, index) for _, kind, index in steps]], 2)
    assert left.seconds() is None
    assert (left.done, left.total) == (0, 9)
    left.event({"event": "train", "task_index": 0, "seconds": 10.0})
    assert left.seconds() is None  # nothing is known of evaluations yet
    left.event({"event": "evaluate", "task_index": 0, "seconds": 4.0})
    left.event({"event": "aligned", "seed": 1, "seconds": 30.0})
    # Left: train 0 (10) and evaluate 0 (4) of the other branch, and of both branches train 1 (10) and evaluate 1 (4).
    assert left.seconds() == pytest.approx((10 + 4 + 2 * 10 + 2 * 4) / 2)
    left.event({"event": "evaluate", "task_index": 1, "seconds": 8.0})
    assert left.seconds() == pytest.approx((10 + 4 + 2 * 10 + 8) / 2)
    monkeypatch.setattr("hpa.progress.time.monotonic", lambda: 105.0)
    assert left.seconds() == pytest.approx((10 + 4 + 2 * 10 + 8) / 2 - 5)
    assert left.done == 4


def test_bars_show_where_the_work_is_and_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("hpa.progress.time.monotonic", lambda: clock[0])
    screen = io.StringIO()
    with Bars(Console(file=screen, force_terminal=True, width=120)) as bars:
        bars.expect([("a/b/seed0", "train", 0), ("a/b/seed0", "train", 1)], 1)
        bars.progress("a/b/seed0", "photo: training", 0, 60)
        clock[0] += 10.0
        bars.progress("a/b/seed0", "photo: training", 20, 60)
        bars._progress.refresh()
        shown = screen.getvalue()
        assert "a/b/seed0  photo: training" in shown
        assert "20/60" in shown
        assert "20 s left" in shown  # 10 s for 20 steps, 40 to go
        assert "time left not known yet" in shown
        bars.event(
            {"event": "train", "task_index": 0, "seconds": 30.0, "branch": "x", "task": "photo", "steps": 1, "loss": 1}
        )
        bars.failed(Failure("a/b/seed0", "ValueError: no", "Traceback: no", Path("error.txt")))
        bars.ended("a/b/seed0")
        bars._progress.refresh()
    last = screen.getvalue()[len(shown) :]
    assert "1/2" in last
    assert "30 s left" in last
    assert "FAILED a/b/seed0: ValueError: no" in last


def test_a_step_is_told_in_one_line() -> None:
    event = {
        "event": "evaluate", "branch": "clean/hpa/seed0", "task": "digit", "task_index": 1, "seconds": 1.25,
        "accuracy": {"photo": 60.0, "digit": 80.0}, "base_skill": 90.0, "empty_answers": 0,
        "safety": {"a": {"asr": 10.0}, "b": {"asr": 20.0}}, "benign": {"c": {"refusal_rate": 2.5}},
    }  # fmt: skip
    assert describe(event) == (
        "clean/hpa/seed0  task 2 digit: AP 70.0, just learned 80.0, base skill 90.0, MASR 15.0, over-refusal 2.5 "
        "(1.2 s)"
    )
    assert describe({"event": "answers", "branch": "x", "items": []}) is None


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text

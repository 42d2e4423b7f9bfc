"""The benchmarks: contenders compute the same, and the harness, the files and the comparison do what they say.

Nothing here asserts a time that was measured.
"""

from __future__ import annotations

import csv
import importlib
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import COMPILED, LIMIT, OURS, TORCH, Case, Effort, Timing, measure, ratio
from machine import LIMITS, Machine
from picture import draw
from results import Row, Setting, compare, read, rows_of, setting_of, write
from run import arguments, destinations, kernels
from table import print_comparison, print_header, print_rows, print_targets

from hpa_ext import ops

ROOT = Path(__file__).resolve().parent.parent
SETTING = Setting("a CPU", "avx2", 2, "0.1", "2", "2", "1", "GNU", "abc", "2026-01-01")
CASES = {
    f"{name}: {case.kernel} {case.case}": case
    for name in kernels()
    for case in importlib.import_module(f"bench_{name}").cases(shrink=64)
}


def row(contender: str = OURS, p50: float = 10.0, noise: float = 0.1, **others: object) -> Row:
    values = {
        "kernel": "merge_",
        "case": "tiny",
        "contender": contender,
        "p20_ms": p50 - noise,
        "p50_ms": p50,
        "p80_ms": p50 + noise,
        "rounds": 5,
        "rate": 20.0,
        "unit": "GB/s",
        "limit": "read",
        "share": 0.5,
        "ratio": 1.0,
        "target": math.nan,
        "target_us": math.nan,
        "setting": SETTING,
    }
    return Row(**{**values, **others})


# ---- Contenders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_all_contenders_of_a_case_compute_the_same(name: str) -> None:
    case = CASES[name]
    assert next(iter(case.contenders)) == OURS
    assert TORCH in case.contenders
    contenders = dict(case.contenders)
    if case.compiled is not None:
        contenders[COMPILED] = case.compiled
    results = {}
    for contender, call in contenders.items():
        torch.manual_seed(0)
        inputs = case.inputs()
        results[contender] = case.result(call(*inputs), *inputs)
    for contender, tensors in results.items():
        for actual, expected in zip(tensors, results[OURS], strict=True):
            assert actual.shape == expected.shape
            scale = expected.double().abs().max().item()
            difference = (actual.double() - expected.double()).abs().max().item()
            assert difference <= case.tolerance * scale, f"{contender}: {difference / scale:.2g} of the largest element"
            assert scale > 0, f"{contender}: nothing was computed"


def test_every_function_has_cases_and_is_among_the_small_calls() -> None:
    functions = {name for name in ops.__all__ if name.islower()}
    assert functions <= {case.kernel for case in CASES.values()}
    called = {case.case.split()[0] for case in CASES.values() if case.kernel == "calls"}
    assert functions <= called
    assert len({(case.kernel, case.case) for case in CASES.values()}) == len(CASES)


def test_targets_name_contenders_and_limits_exist() -> None:
    for name, case in CASES.items():
        known = {*case.contenders, LIMIT, "microseconds", *([COMPILED] if case.compiled else [])}
        assert set(case.targets) <= known, name
        assert {case.memory, case.arithmetic} <= set(LIMITS), name
        assert LIMIT not in case.targets or case.bytes_moved or case.flops, name


# ---- Harness ---------------------------------------------------------------------------------------------------------


def test_contenders_take_turns_each_once_a_round_on_fresh_copies() -> None:
    log: list[tuple[str, int]] = []
    made = 0

    def inputs() -> tuple[torch.Tensor, int]:
        nonlocal made
        made += 1
        return torch.empty(2**20), made

    def contender(name: str):
        def call(_: torch.Tensor, copy: int) -> None:
            log.append((name, copy))
            sum(range(300_000))  # longer than what would be looped

        return call

    case = Case("k", "c", inputs, {name: contender(name) for name in (OURS, TORCH, "other")})
    timings = measure(case, Effort(seconds=0.0, rounds=6))
    assert {len(timing.seconds) for timing in timings.values()} == {6}
    assert made > 1
    calls = log[3 * len(case.contenders) :]  # after those that warm up
    assert [copy for _, copy in calls] == [i % made + 1 for i in range(len(calls))]
    # Each sample comes after a call that wakes the contender's threads.
    names = [name for name, _ in calls]
    timed = names[1::2]
    assert names[::2] == timed
    rounds = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert len(rounds) == 6
    for turn in rounds:
        assert set(turn) == set(case.contenders)
    assert len({tuple(turn) for turn in rounds}) > 1


def test_inputs_are_reset_before_every_sample() -> None:
    def call(value: torch.Tensor) -> None:
        assert value.item() == 0
        value += 1
        sum(range(300_000))

    case = Case("k", "c", lambda: (torch.zeros(()),), {OURS: call, TORCH: call}, reset=torch.Tensor.zero_, warm=True)
    assert len(measure(case, Effort(0.0, 3))[TORCH].seconds) == 3


def test_measuring_stops_when_every_median_is_steady() -> None:
    assert Timing([1.0, 1.001, 0.999, 1.0, 1.0]).steady
    assert not Timing([1.0, 2.0, 3.0, 1.5, 2.5]).steady
    assert Timing([3.0, 1.0, 2.0]).quantile(0.5) == 2.0
    assert Timing([1.0, 2.0]).quantile(0.2) == pytest.approx(1.2)


def test_a_ratio_pairs_the_rounds() -> None:
    assert ratio(Timing([2.0, 40.0, 6.0]), Timing([1.0, 10.0, 3.0])) == 2.0


def test_a_case_is_bound_by_the_limit_that_takes_longer() -> None:
    case = Case("k", "c", tuple, {}, bytes_moved=100.0, memory="copy", flops=1000.0, arithmetic="bf16")
    assert case.bound({"copy": 10.0, "bf16": 1000.0}) == ("copy", 100.0)
    assert case.bound({"copy": 10.0, "bf16": 10.0}) == ("bf16", 1000.0)
    assert case.bound({}) == ("", 0.0)


# ---- The machine -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_machine() -> Machine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("machine._SMALLEST", 2**20)
        patch.setattr("machine.last_level_cache", lambda: 2**18)
        patch.setattr("machine._TRIES", 1)
        return Machine(threads=2)


def test_every_limit_of_the_machine_is_measured(small_machine: Machine) -> None:
    assert small_machine.missing == ""
    assert set(small_machine.rates) == set(LIMITS)
    assert all(rate > 0 and small_machine.measure(limit) > 0 for limit, rate in small_machine.rates.items())


def test_limits_are_measured_beside_the_case_and_give_its_share(small_machine: Machine) -> None:
    case = replace(CASES["merge: merge_ 64x64 fp32"], bytes_moved=3 * 64 * 64 * 4)
    timings = measure(case, Effort(0.0, 3), small_machine, compiled=False)
    assert set(timings) == {OURS, TORCH, LIMIT}
    rows = {row.contender: row for row in rows_of(case, timings, small_machine, SETTING)}
    assert rows[LIMIT].share == 1.0
    assert rows[OURS].limit == "update"
    assert rows[OURS].rate == pytest.approx(case.bytes_moved / (rows[OURS].p50_ms * 1e-3) / 1e9)
    assert (rows[OURS].target, rows[TORCH].target) == (0.85, 6)


def test_without_a_compiler_there_are_no_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    machine = Machine(threads=1)
    assert "no-such-compiler" in machine.missing
    case = CASES["merge: merge_ 64x64 fp32"]
    timings = measure(case, Effort(0.0, 2), machine, compiled=False)
    ours = rows_of(case, timings, machine, SETTING)[0]
    assert (ours.limit, ours.unit) == ("", "GB/s")
    assert math.isnan(ours.share)
    assert ours.met is None


# ---- Results ---------------------------------------------------------------------------------------------------------


def test_a_csv_file_gives_the_rows_back(tmp_path: Path) -> None:
    rows = [row(target=0.9, target_us=5.0), row(TORCH, ratio=3.5, limit="", share=math.nan)]
    write(rows, tmp_path / "a.csv")
    again = read(tmp_path / "a.csv")
    write(again, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
    assert again[0] == rows[0]
    assert math.isnan(again[1].share)
    assert again[1].setting == SETTING


@pytest.mark.parametrize(
    ("made", "met"),
    [
        (row(target=0.5), True),
        (row(target=0.51), False),
        (row(TORCH, ratio=6.0, target=6.0), True),
        (row(TORCH, ratio=5.9, target=6.0), False),
        (row(p50=0.004, target_us=5.0), True),
        (row(p50=0.006, target_us=5.0), False),
        (row(), None),
    ],
)
def test_targets_are_held_against_share_ratio_or_time(made: Row, met: bool | None) -> None:
    assert made.met is met


@pytest.mark.parametrize(
    ("old", "new", "slower", "faster"),
    [
        ([row(p50=10)], [row(p50=10.2)], 0, 0),  # within the floor of 3 percent
        ([row(p50=10)], [row(p50=11)], 1, 0),
        ([row(p50=10)], [row(p50=9)], 0, 1),
        ([row(p50=10, noise=0.6)], [row(p50=11, noise=0.6)], 0, 0),  # within the noise of both
        ([row(p50=10, noise=0.3)], [row(p50=11, noise=0.6)], 1, 0),
        # the machine itself was slower
        ([row(p50=10), row(LIMIT, 5)], [row(p50=12), row(LIMIT, 6)], 0, 0),
        ([row(p50=10), row(TORCH, 50)], [row(p50=12), row(TORCH, 60)], 0, 0),
        # the kernel was, beyond what the machine was
        ([row(p50=10), row(LIMIT, 5)], [row(p50=15), row(LIMIT, 6)], 1, 0),
        # relative to a machine that was faster, but not in time
        ([row(p50=10), row(LIMIT, 5)], [row(p50=10), row(LIMIT, 4)], 0, 0),
    ],
)
def test_slower_is_what_exceeds_the_noise_of_both_runs(
    old: list[Row], new: list[Row], slower: int, faster: int
) -> None:
    result = compare(old, new)
    assert (len(result.slower), len(result.faster), result.compared) == (slower, faster, 1)
    assert result.exit_status == slower


@pytest.mark.parametrize("other", [{"cpu": "another"}, {"isa": "avx512"}, {"threads": 4}])
def test_only_runs_on_one_machine_are_compared(other: dict[str, object]) -> None:
    result = compare([row()], [row(p50=20, setting=replace(SETTING, **other))])
    assert (result.compared, result.exit_status) == (0, 2)
    assert str(next(iter(other.values()))) in result.not_comparable


def test_nothing_in_common_is_said() -> None:
    assert compare([row()], [row(case="other")]).not_comparable == "no case is in both"


# ---- The program -----------------------------------------------------------------------------------------------------


def test_the_table_names_targets_and_what_got_slower(
    capsys: pytest.CaptureFixture[str], small_machine: Machine
) -> None:
    rows = [row(target=0.9), row(TORCH, p50=70, ratio=7.0, target=6.0), row(LIMIT)]
    print_header(SETTING, small_machine)
    print_rows(rows)
    print_targets(rows, 1.0)
    print_comparison(compare([row(p50=5)], rows), Path("old.csv"))
    told = capsys.readouterr().out
    assert "a CPU, avx2, 2 threads" in told
    assert ">= 90 % MISSED" in told
    assert ">= 6 met" in told
    assert "1 targets met, 1 missed" in told
    assert "share of read: 50 %, target >= 90 %" in told
    assert "1 slower by more than the noise" in told
    assert "slower: merge_ tiny: 5 -> 10 ms" in told


def test_the_picture_shows_each_bounded_case_and_each_call() -> None:
    call = {"kernel": "calls", "case": "merge_ 25x40", "limit": "", "share": math.nan}
    rows = [
        *(row(), row(TORCH, ratio=7.04), row(COMPILED, ratio=2.0), row("ssyrk", ratio=1.2), row(LIMIT)),
        *(row(p50=0.002, target_us=5.0, **call), row(TORCH, p50=0.006, ratio=3.0, **call)),
    ]
    drawing = draw(rows)
    for told in ("merge_", "tiny", "2.0 µs", "a CPU, avx2, 2 threads", "prefers-color-scheme: dark"):
        assert told in drawing
    for times in ("7.0", "2.0", "1.2", "3.0"):
        assert f"{times}\N{MULTIPLICATION SIGN}" in drawing
    assert draw(rows) == drawing


def test_the_program_measures_writes_and_compares(tmp_path: Path) -> None:
    # A run on this machine that was much faster, for one of the two cases.
    one = {"kernel": "balanced_mask", "case": "4096 columns fp32", "setting": setting_of(threads=1)}
    write([row(p50=1e-3, noise=1e-4, **one)], tmp_path / "then.csv")
    now = tmp_path / "now.csv"
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "balanced_mask", "--quick", "--threads", "1"]
    command += ["--out", str(now), "--compare", str(tmp_path / "then.csv")]
    for _ in range(5):  # beside other work the noise of a run may exceed its median, and hide anything
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 1:
            break
    assert done.returncode == 1, done.stderr
    assert "1 cases compared" in done.stdout
    assert "slower: balanced_mask 4096 columns fp32" in done.stdout
    assert now.with_suffix(".svg").read_text().startswith("<svg")
    with now.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["contender"] for line in lines} == {OURS, TORCH}
    assert {line["threads"] for line in lines} == {"1"}
    assert all(float(line["p20_ms"]) <= float(line["p50_ms"]) <= float(line["p80_ms"]) for line in lines)


def test_a_whole_run_writes_the_committed_files_and_others_only_where_they_are_told() -> None:
    whole = [(ROOT / "bench" / "results.csv", ROOT / "docs" / "bench.svg")]
    assert list(destinations(arguments([]))) == whole
    assert list(destinations(arguments(["--full"]))) == whole
    assert list(destinations(arguments(["--quick"]))) == []
    assert list(destinations(arguments(["merge"]))) == []
    assert list(destinations(arguments(["merge", "--out", "a.csv"]))) == [(Path("a.csv"), Path("a.svg"))]


@pytest.mark.parametrize(
    ("options", "told"),
    [(["no_such"], "KERNEL: expected some of"), (["--threads", "0"], "--threads: expected at least 1")],
)
def test_wrong_options_are_named(options: list[str], told: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "run.py"), *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert told in done.stderr

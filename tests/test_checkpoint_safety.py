"""``hpa adapt`` and files: broken input is named, a kill costs nothing, several workers share one job."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from checkpoint_pairs import Pair, all_tensors, hpa, rewrite
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from hpa.checkpoint import (
    CalibrationJob,
    CheckpointError,
    Job,
    adapt_checkpoint,
    calibrate_checkpoint,
    plan_job,
    stream,
)
from hpa.checkpoint.buffers import Buffers
from hpa.checkpoint.claims import Claims
from hpa.checkpoint.distributed import ProcessGroup
from hpa.checkpoint.files import Folder, encode_header, read_tensor, read_tensor_file
from hpa.checkpoint.stream import HashedFile, Room, hash_file, read_ahead
from hpa.methods import create_method
from hpa.storage import write_files

Change = Callable[[Path], Any]


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    def apply(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        change(tensors)
        return tensors

    rewrite(folder, apply)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def truncate(folder: Path) -> None:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-5])


def cut_header(folder: Path) -> None:
    first_shard(folder).write_bytes(b"\x10")


def not_safetensors(folder: Path) -> None:
    first_shard(folder).write_bytes(b"PK\x03\x04" * 50)


def wrong_offsets(folder: Path) -> None:
    path = first_shard(folder)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    header[name]["data_offsets"] = [0, 1 << 40]
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + size :])


def wrong_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"]["model.no_such.weight"] = first_shard(folder).name
    path.write_text(json.dumps(content))


def lost_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def nan_in_layer(folder: Path) -> None:
    edited(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 4), float("nan")))


def inf_in_norm(folder: Path) -> None:
    edited(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(2, float("inf")))


def missing_layer(folder: Path) -> None:
    edited(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def missing_block(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    edited(folder, change)


def other_shape(folder: Path) -> None:
    edited(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(20, 16)}))


def integers(folder: Path) -> None:
    edited(
        folder,
        lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(24, 16, dtype=torch.int8)}),
    )


def quantised(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"bits": 4}}))


BROKEN: dict[str, tuple[Change, str]] = {
    "truncated shard": (truncate, "truncated: its tensors end at byte"),
    "one byte": (cut_header, "not a safetensors file"),
    "another format": (not_safetensors, "not a safetensors file"),
    "wrong offsets": (wrong_offsets, "its offsets say"),
    "index of a tensor that is not there": (wrong_index, "the index puts 'model.no_such.weight' into"),
    "shard that is not there": (lost_shard, "cannot be read \\(No such file or directory\\)"),
    "no config": (no_config, "AFTER: .* has neither config.json nor adapter_config.json"),
    "pickle alone": (only_pickles, "pytorch_model.bin is a pickle file and is not read"),
    "NaN in a layer": (nan_in_layer, "AFTER: tensor 'model.layers.1.mlp.up_proj.weight' of .* holds NaN or Inf"),
    "Inf in a norm": (inf_in_norm, "AFTER: tensor 'model.norm.weight' of .* holds NaN or Inf"),
    "layer that is missing": (missing_layer, "AFTER: layer layers.1.mlp.up_proj is missing"),
    "block that is missing": (missing_block, "AFTER: block model.layers.1 is missing"),
    "another shape": (
        other_shape,
        r"AFTER: layer layers.1.mlp.up_proj is \[20, 16\], expected \[24, 16\] as in BEFORE",
    ),
    "integers": (integers, "AFTER: layer layers.1.mlp.up_proj has dtype I8"),
    "quantised": (quantised, "is quantised; save it in BF16, F16 or F32 first"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair that tests copy and break."""
    return Pair(tmp_path_factory.mktemp("pair"), tiny_models.llama)


def copied(pair: Pair, root: Path) -> Pair:
    import shutil

    shutil.copytree(pair.root, root, dirs_exist_ok=True)
    other = object.__new__(Pair)
    other.root, other.before, other.after = root, root / "before", root / "after"
    other.safety, other.task = root / "safety.json", root / "task.jsonl"
    return other


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_input_is_named(whole: Pair, tmp_path: Path, change: Change, message: str) -> None:
    pair = copied(whole, tmp_path)
    change(pair.after)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        adapt_checkpoint(Job(pair.before, pair.after, out, create_method("magnitude")))
    assert not out.exists()


def test_error_in_the_command_is_one_line(whole: Pair, tmp_path: Path) -> None:
    pair = copied(whole, tmp_path)
    nan_in_layer(pair.after)
    done = hpa("adapt", pair.before, pair.after, "-m", "magnitude", "--out", tmp_path / "out", code=2)
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: AFTER: tensor 'model.layers.1.mlp.up_proj.weight' of ")
    )
    (pair.before / "tokenizer.json").unlink()
    done = hpa("calibrate", pair.before, pair.safety, "--as", "safety", "-o", tmp_path / "s.safetensors", code=2)
    assert "no tokenizer that transformers can load" in done.stderr


def test_encoder_before_the_decoder_is_refused(tmp_path: Path) -> None:
    shape = {"vocab_size": 50, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    pair = Pair(tmp_path, lambda _: T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)))
    with pytest.raises(CheckpointError, match="MODEL: .* has an encoder before its decoder"):
        calibrate_checkpoint(CalibrationJob(pair.before, pair.safety, "safety", tmp_path / "s.safetensors"))
    assert not list(tmp_path.glob("*s.safetensors*"))


def test_output_may_not_touch_the_inputs(whole: Pair, tmp_path: Path) -> None:
    pair = copied(whole, tmp_path)
    method = create_method("magnitude")
    for out in (pair.before, pair.after, pair.after / "inside", tmp_path):
        with pytest.raises(CheckpointError, match="--out: .* (lies in|or holds it)"):
            adapt_checkpoint(Job(pair.before, pair.after, out, method))
    link = tmp_path / "link"
    link.symlink_to(pair.after)
    with pytest.raises(CheckpointError, match="choose another folder"):
        adapt_checkpoint(Job(pair.before, pair.after, link, method))
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        adapt_checkpoint(Job(pair.before, pair.after, busy, method))
    assert (busy / "mine.txt").read_text() == "keep"
    for place in ("not there", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        nowhere = tmp_path / f"link to {place}"
        nowhere.symlink_to(tmp_path / place)
        with pytest.raises(CheckpointError, match=f"--out: .* is a link to .*{place}; expected a folder that is new"):
            adapt_checkpoint(Job(pair.before, pair.after, nowhere, method))
    with pytest.raises(CheckpointError, match=r"--out: .* cannot be made, for .*mine.txt is a file"):
        adapt_checkpoint(Job(pair.before, pair.after, busy / "mine.txt" / "out", method))


def test_full_disk_is_an_error_and_can_be_gone_on_from(
    whole: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(whole.before, whole.after, tmp_path / "out", create_method("magnitude"))
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"the output takes [0-9.e-]+ MB more and .* has 0.001 MB free"):
        adapt_checkpoint(job)
    monkeypatch.undo()

    real = HashedFile.write
    calls = 0

    def write(self: HashedFile, data: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise OSError(28, "No space left on device")
        real(self, data)

    monkeypatch.setattr(HashedFile, "write", write)
    with pytest.raises(OSError, match="No space left"):
        adapt_checkpoint(job)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    adapt_checkpoint(job)
    adapt_checkpoint(Job(whole.before, whole.after, tmp_path / "again", create_method("magnitude")))
    assert same_files(tmp_path / "out", tmp_path / "again")


def same_files(first: Path, second: Path) -> bool:
    names = [{path.name for path in folder.glob("*.safetensors")} for folder in (first, second)]
    assert names[0] == names[1]
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names[0])


def stopped_before_its_end(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights are written, and nothing has its name."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hpa.checkpoint.adapt._finish", stop)
    with pytest.raises(KeyboardInterrupt):
        adapt_checkpoint(job)
    monkeypatch.undo()


def test_changed_input_is_noticed_when_a_job_goes_on(
    whole: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = copied(whole, tmp_path)
    job = Job(pair.before, pair.after, tmp_path / "out", create_method("magnitude"))
    stopped_before_its_end(job, monkeypatch)
    os.utime(first_shard(pair.after), ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"the beginning of another job \(inputs.AFTER/model.*changed_ns"):
        adapt_checkpoint(job)
    with pytest.raises(CheckpointError, match="settings.method: magnitude then, random now"):
        adapt_checkpoint(Job(pair.before, pair.after, tmp_path / "out", create_method("random")))


def test_a_job_that_got_nowhere_leaves_nothing_and_can_be_mended(whole: Pair, tmp_path: Path) -> None:
    pair = copied(whole, tmp_path)
    good = pair.safety.read_bytes()
    pair.safety.write_text('{"nothing": 1}')
    command = ("adapt", pair.before, pair.after, *pair.data(), "--out", tmp_path / "out")
    done = hpa(*command, code=2)
    assert "expected a list of samples, got dict" in done.stderr
    assert not list(tmp_path.glob("*out*"))
    # A job that was killed as early leaves a beginning, which is no other job's.
    stage = tmp_path / ".out.hpa-part" / "work"
    stage.mkdir(parents=True)
    (stage / "job.json").write_text('{"inputs": {"another": 1}}')
    pair.safety.write_bytes(good)
    hpa(*command)
    assert (tmp_path / "out" / "hpa-manifest.json").is_file()


def test_a_job_with_another_worker_at_it_is_neither_replaced_nor_removed(
    whole: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has opened the folder, and done nothing yet."""
    here, other = (
        Job(whole.before, whole.after, tmp_path / "out", create_method("random"), seed=seed) for seed in (0, 1)
    )
    stage = tmp_path / ".out.hpa-part"
    seen: list[str] = []

    def meanwhile(*_: Any, **__: Any) -> Any:
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match=r"the beginning of another job \(settings.seed: 0 then, 1 now\)"):
            adapt_checkpoint(other)
        seen.append(json.loads((stage / "work/job.json").read_text())["settings"]["seed"])
        raise ValueError("something is wrong")

    monkeypatch.setattr("hpa.checkpoint.adapt.editor_of", meanwhile)
    with pytest.raises(ValueError, match="something is wrong"):
        adapt_checkpoint(here)
    assert seen == [0]
    assert not stage.exists()
    adapt_checkpoint(other)


def test_samples_that_were_only_touched_are_the_same(
    whole: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = copied(whole, tmp_path)
    calibrations = {
        "safety": CalibrationJob(pair.before, pair.safety, "safety", Path()),
        "task": CalibrationJob(pair.after, pair.task, "task", Path()),
    }
    job = Job(pair.before, pair.after, tmp_path / "out", create_method("hpa"), calibrations=calibrations)
    stopped_before_its_end(job, monkeypatch)
    text = pair.safety.read_text()
    pair.safety.write_text(text + "\n")
    with pytest.raises(CheckpointError, match=r"the beginning of another job \(inputs.samples/safety.sha256: "):
        adapt_checkpoint(job)
    pair.safety.write_text(text)
    adapt_checkpoint(job)


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("stored", [True, False])
def test_a_weight_that_is_not_finite_is_named_with_its_file(
    whole: Pair, tmp_path: Path, side: str, stored: bool
) -> None:
    pair = copied(whole, tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    files = {}
    for role, folder, data in (("safety", pair.before, pair.safety), ("task", pair.after, pair.task)):
        files[role] = tmp_path / f"{role}.safetensors"
        calibrate_checkpoint(CalibrationJob(folder, data, role, files[role]))  # type: ignore[arg-type]

    def broken(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors[name][3, 2] = float("nan")
        return tensors

    rewrite(getattr(pair, side), broken)
    command = ["adapt", pair.before, pair.after, "--out", tmp_path / "out"]
    if stored:
        command += [item for path in files.values() for item in ("--statistics", path)]
        done = hpa(*command, "--any-statistics", code=2)
        assert f"{side.upper()}: tensor '{name}' of {getattr(pair, side)}/model.safetensors holds NaN" in done.stderr
    else:
        done = hpa(*command, *pair.data(), code=2)
        assert "down_proj: calibration activations are not finite" in done.stderr
        role, data = ("safety", pair.safety) if side == "before" else ("task", pair.task)
        assert f"{getattr(pair, side)}: layer" in done.stderr
        assert f"or the {role} samples ({data}) overflow" in done.stderr


def test_weights_of_other_shapes_than_the_config_says_are_told(whole: Pair, tmp_path: Path) -> None:
    pair = copied(whole, tmp_path)
    path = pair.before / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 8}))
    done = hpa("adapt", pair.before, pair.after, *pair.data(), "--out", tmp_path / "out", code=2)
    assert f"MODEL: {pair.before}: its weights have other shapes than its config.json says" in done.stderr


def test_json_that_is_too_deep_is_told(whole: Pair, tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    done = hpa(
        "adapt", whole.before, whole.after, "--safety", path, "--task", whole.task, "--out", tmp_path / "o", code=2
    )
    assert f"{path}: not JSON (" in done.stderr


SLOW = """
import sys, time
import hpa.checkpoint.merge as merge
from hpa.checkpoint.stream import HashedFile
merge.NOTE_EVERY = 3000
real = HashedFile.write
def write(self, data):
    time.sleep({pause})
    real(self, data)
HashedFile.write = write
sys.argv[0] = "hpa"
from hpa.cli import main
main()
"""


def start(*arguments: Any, pause: float = 0.01) -> subprocess.Popen[str]:
    """The command, slowed down and with notes every few kilobytes, so that a kill falls in the middle."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW.format(pause=pause), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def with_statistics(whole: Pair) -> list[Any]:
    """Options that spare a calibration."""
    options: list[Any] = []
    for model, data, role in ((whole.before, whole.safety, "safety"), (whole.after, whole.task, "task")):
        path = whole.root / f"{role}.safetensors"
        calibrate_checkpoint(CalibrationJob(model, data, role, path, want=frozenset({"diagonal", "gram"})))
        options += ["--statistics", path]
    return options


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("HPA_TEST_KILL_SEEDS", "1"))))
def test_killed_at_any_moment_it_goes_on(whole: Pair, with_statistics: list[Any], tmp_path: Path, seed: int) -> None:
    arguments = ["adapt", whole.before, whole.after, *with_statistics, "-q"]
    process = start(*arguments, "--out", tmp_path / "whole")
    assert process.wait(timeout=120) == 0
    draw = random.Random(seed)
    began = time.monotonic()
    kills = 0
    for _ in range(40):
        process = start(*arguments, "--out", tmp_path / "killed")
        # Most of a process's life goes into imports: wait until it works, then a random moment longer.
        stage = tmp_path / ".killed.hpa-part"
        while process.poll() is None and not list(stage.glob("work/claims/*")):
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.4))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if time.monotonic() - began > 60:
            break
    process = start(*arguments, "--out", tmp_path / "killed", pause=0)
    assert process.wait(timeout=120) == 0
    assert kills >= 2
    assert same_files(tmp_path / "whole", tmp_path / "killed")
    assert not (tmp_path / ".killed.hpa-part").exists()
    first, second = (
        json.loads((tmp_path / name / "hpa-manifest.json").read_text())["files"] for name in ("whole", "killed")
    )
    assert first == second


@pytest.mark.slow
def test_workers_share_a_job_and_outlive_each_other(whole: Pair, with_statistics: list[Any], tmp_path: Path) -> None:
    arguments = ["adapt", whole.before, whole.after, *with_statistics, "-q", "-m", "hpa_ls"]
    alone = start(*arguments, "--out", tmp_path / "alone", pause=0)
    assert alone.wait(timeout=120) == 0
    workers = [start(*arguments, "--out", tmp_path / "shared", pause=0.02) for _ in range(3)]
    claims = tmp_path / ".shared.hpa-part" / "work" / "claims"
    deadline = time.monotonic() + 100
    while len(list(claims.glob("*"))) < 2 and time.monotonic() < deadline and workers[0].poll() is None:
        time.sleep(0.01)
    workers[0].kill()
    workers[0].wait()
    for worker in workers[1:]:
        assert worker.wait(timeout=120) == 0
    assert same_files(tmp_path / "alone", tmp_path / "shared")


def test_a_claim_is_held_by_one_and_inherited(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    with first.hold("shard") as mine:
        assert mine is not None
        mine()
        with second.hold("shard") as other:
            assert other is None
    with second.hold("shard") as other:
        assert other is not None
    # A process of this machine that is gone leaves its claim to whoever comes.
    (tmp_path / "left").write_text(json.dumps({"host": first._owner["host"], "pid": 2**22 + 1, "start": "1"}))
    with second.hold("left") as other:
        assert other is not None
    # One of another machine counts as gone when its claim has stood still for long enough by our clock.
    (tmp_path / "far").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with second.hold("far") as other:
        assert other is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpa.checkpoint.claims.STALE", 0.05)
        time.sleep(0.1)
        with second.hold("far") as other:
            assert other is not None
    # Two saw that an owner is gone, one was faster: the other gives the new claim back.
    (tmp_path / "both").write_text(json.dumps({"host": first._owner["host"], "pid": 2**22 + 1, "start": "1"}))
    slower = second._left_behind("both")
    with first.hold("both") as mine, pytest.MonkeyPatch.context() as patch:
        assert mine is not None
        patch.setattr(second, "_left_behind", lambda _: slower)
        with second.hold("both") as other:
            assert other is None
        mine()
    with first.hold("lost") as mine:
        assert mine is not None
        (tmp_path / "lost").write_text("{}")
        with pytest.raises(RuntimeError, match="another worker took it over"):
            mine()


def test_written_file_has_the_hash_that_is_told(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    out = HashedFile(tmp_path / "file", room=Room(1 << 16))
    for begin in range(0, len(data), 70_000):
        out.write(data[begin : begin + 70_000])
    assert out.position == len(data)
    told = out.close()
    assert (tmp_path / "file").read_bytes() == data
    assert told == hash_file(tmp_path / "file").hexdigest()
    again = HashedFile(tmp_path / "file", start=1000)
    again.write(data[1000:])
    assert again.close() == told


@pytest.mark.parametrize("trouble", ["none", "no such flag", "refused at open", "refused at write"])
def test_file_is_the_same_past_the_page_cache_and_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    file, direct = tmp_path / "file", getattr(os, "O_DIRECT", 0)
    pwrite, opened = os.pwrite, os.open
    refused = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    past_cache = 0
    directly: set[int] = set()
    through_cache: set[int] = set()

    def write(descriptor: int, data: Any, place: int) -> int:
        nonlocal past_cache
        if direct and fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct:
            if trouble == "refused at write":
                raise refused
            past_cache += len(data)
            assert len(data) % stream.BLOCK == place % stream.BLOCK == 0
            ways = directly
        else:
            ways = through_cache
        ways.update(range(place // stream.BLOCK, -(-(place + len(data)) // stream.BLOCK)))
        done = pwrite(descriptor, data[: 5 << 13], place)  # a system may take less than it was given
        assert file.stat().st_size <= out.position
        return done

    def open_(path: Any, flags: int, *rest: Any) -> int:
        if trouble == "refused at open" and direct and flags & direct:
            raise refused
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(os, "open", open_)
    if trouble == "no such flag":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(stream, "PIECE", 1 << 16)
    data = random.Random(trouble).randbytes((19 << 13) + 777)
    notes: list[bool] = []
    for start in (0, 4096, 1 << 16, (1 << 16) + 1, len(data) - 1, len(data)):
        file.write_bytes(data[:start] + b"of an earlier run")
        directly.clear()
        through_cache.clear()
        out = HashedFile(file, start=start, room=Room(1 << 13))
        at = start
        for step in (1, 4095, 0, 3 << 13, 4097, 9 << 13, len(data)):
            out.write(data[at : at + step])
            at = min(at + step, len(data))
            out.when_on_disk(lambda at=at: notes.append(file.read_bytes()[:at] == data[:at]))
        assert out.close() == sha256(data).hexdigest()
        assert file.read_bytes() == data
        assert not directly & through_cache  # which some file systems do not order
    assert all(notes)
    assert len(notes) == 6 * 7
    assert (past_cache > 0) == (trouble == "none" and out._file._direct is not None)


def test_a_worker_that_was_taken_for_dead_spoils_nothing(tmp_path: Path) -> None:
    file, data = tmp_path / "file", os.urandom(170_005)
    slow = HashedFile(file)
    slow.write(data[:50_001])
    slow.when_on_disk(lambda: None)
    slow._join()
    quick = HashedFile(file, start=40_000)
    quick.write(data[40_000:])
    told = quick.close()
    slow._file.append(memoryview(data[50_001:60_000]))
    slow._file.flush()
    slow._file.close()
    assert file.read_bytes() == data
    assert told == sha256(data).hexdigest()


def test_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = HashedFile(tmp_path / "file")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        out.write(bytes(5000))
        with pytest.raises(OSError, match="File too large: '.*file'"):
            out.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_action_runs_when_its_bytes_are_on_disk(tmp_path: Path) -> None:
    out = HashedFile(tmp_path / "file")
    sizes: list[int] = []
    for _ in range(5):
        out.write(os.urandom(1000))
        out.when_on_disk(lambda: sizes.append((tmp_path / "file").stat().st_size))
    out.close()
    assert len(sizes) == 5
    assert all(size >= 1000 * count for count, size in enumerate(sizes, start=1))

    def fail() -> None:
        raise OSError("disk full")

    out = HashedFile(tmp_path / "other")
    out.when_on_disk(fail)
    with pytest.raises(OSError, match="disk full"):
        out.close()


def test_buffers_come_back_when_the_last_view_is_gone() -> None:
    buffers = Buffers(8 << 20)
    first = buffers.empty((1024, 1024), torch.bfloat16)
    place, view = first.data_ptr(), first[3:5]
    first.fill_(1.5)
    del first
    second = buffers.empty((1024, 1024), torch.bfloat16)
    assert second.data_ptr() != place  # the view still needs it
    assert float(view.sum()) == 1.5 * 2 * 1024
    del view
    third = buffers.empty((512, 1024), torch.float32)
    assert third.data_ptr() == place
    assert third.shape == (512, 1024)
    del second, third
    large = buffers.empty((3 << 20,), torch.float32)  # beyond the limit: what is kept goes
    assert buffers._size == large.numel() * 4
    assert buffers.empty((0, 7), torch.float32).shape == (0, 7)


def test_weights_are_read_right_from_used_memory(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors = {f"t{i}": torch.randn(700 + 13 * i, 800, generator=generator) for i in range(6)}
    save_file(tensors, tmp_path / "x.safetensors")
    buffers = Buffers(16 << 20)
    for _ in range(2):
        for name, info in read_tensor_file(tmp_path / "x.safetensors").tensors.items():
            assert torch.equal(read_tensor(info, buffers), tensors[name])


def test_reading_ahead_keeps_order_budget_and_errors() -> None:
    held, most = 0, 0

    def load(item: int) -> bytes:
        nonlocal held, most
        held += 10
        most = max(most, held)
        if item == 17:
            raise CheckpointError("item 17")
        return bytes(10)

    seen = []

    def read() -> None:
        nonlocal held
        for item, _ in read_ahead(range(30), load, lambda _: 10, 40):
            seen.append(item)
            time.sleep(0.001)
            held -= 10

    with pytest.raises(CheckpointError, match="item 17"):
        read()
    assert seen == list(range(17))
    assert most <= 60
    for item, _ in read_ahead(range(1000), lambda item: item, lambda _: 1 << 40, 1):
        if item == 3:
            break


def test_headers_of_strangers_are_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    good = encode_header({"a": ("F32", (2, 3))}, {}) + bytes(24)
    path.write_bytes(good)
    assert read_tensor_file(path).tensors["a"].shape == (2, 3)
    draw = random.Random(0)
    refused = 0
    for _ in range(400):
        broken = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(good) - 24)] = draw.randrange(256)
        if draw.random() < 0.3:
            broken = broken[: draw.randrange(len(broken))]
        path.write_bytes(broken)
        try:
            read_tensor_file(path)
        except CheckpointError:
            refused += 1
    assert refused > 300
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="file names only are allowed"):
        Folder(folder, "AFTER")


def torchrun(processes: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone",
            "-m", "hpa", *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(("gpu", "backend"), [(False, "gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_tensors_on_the_cpu_meet_also_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, backend: str
) -> None:
    asked = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setattr("torch.distributed.init_process_group", asked.append)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    ProcessGroup()
    assert asked == [backend]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_torchrun_shares_the_samples(whole: Pair, with_statistics: list[Any], tmp_path: Path, processes: int) -> None:
    made = tmp_path / "task.safetensors"
    done = torchrun(processes, "calibrate", whole.after, whole.task, "--as", "task", "-o", made, "--gram")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = load_file(whole.root / "task.safetensors"), load_file(made)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=2e-4, atol=1e-6)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_process_that_stops_is_told_from_those_that_waited(whole: Pair, tmp_path: Path) -> None:
    pair = copied(whole, tmp_path)
    rows = [json.loads(line) for line in pair.task.read_text().splitlines()]
    Image.new("RGB", (4, 4)).save(tmp_path / "red.png")  # which a model of text alone cannot look at
    rows[1] = {"image": "red.png", "prompt": "what color", "response": "blue"}
    pair.task.write_text("\n".join(map(json.dumps, rows)))
    for samples, said, times in (
        (len(rows), "sample 1 has a picture and the model has no processor", 1),
        (1, "1 samples cannot be shared by 2 processes", 2),
    ):
        arguments = (pair.after, pair.task, "--as", "task", "-o", tmp_path / "t", "--samples", samples)
        done = torchrun(2, "calibrate", *arguments)
        assert done.returncode != 0
        assert "[rank" not in done.stderr, done.stderr
        assert len(re.findall(said, done.stderr)) == times, done.stderr
        assert not list(tmp_path.glob("*t.*parts"))


def test_budget_is_kept_on_a_large_pair(tmp_path: Path) -> None:
    """A pair of 2 x 400 MB is edited in a process that holds a fraction of one at a time."""
    for name, seed in (("before", 0), ("after", 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"model.layers.{block}.mlp.{kind}.weight": torch.randn(1000, 2000, generator=generator)
            for block in range(25)
            for kind in ("up_proj", "gate_proj")
        }
        save_file(tensors, folder / "model.safetensors")
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from hpa.checkpoint import Job, adapt_checkpoint\n"
        "from hpa.methods import create_method\n"
        "root = Path(sys.argv[1])\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith('VmHWM'))\n"
        "start = peak()\n"
        "job = Job(root / 'before', root / 'after', root / 'out', create_method('magnitude'), max_memory=128 << 20)\n"
        "adapt_checkpoint(job)\n"
        "print(peak() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 260
    assert len(all_tensors(tmp_path / "out")) == 50


def test_plan_of_a_llava_sized_pair_takes_no_weights(tmp_path: Path) -> None:
    """Headers are enough for a plan: the files hold no data at all."""
    for name in ("before", "after"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {"language_model.lm_head.weight": ("BF16", (32064, 4096))}
        for block in range(32):
            for layer, shape in (("self_attn.q_proj", (4096, 4096)), ("mlp.down_proj", (4096, 11008))):
                tensors[f"language_model.model.layers.{block}.{layer}.weight"] = ("BF16", shape)
        header = encode_header(tensors, {"format": "pt"})
        size = len(header) + sum(2 * shape[0] * shape[1] for _, shape in tensors.values())
        with open(folder / "model.safetensors", "wb") as file:
            file.write(header)
            file.truncate(size)
    began = time.monotonic()
    plan = plan_job(Job(tmp_path / "before", tmp_path / "after", tmp_path / "out", create_method("magnitude")))
    assert time.monotonic() - began < 5
    assert len(plan.layers) == 64
    assert plan.largest == 2 * 2 * 4096 * 11008


def test_several_files_get_their_names_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old.txt", tmp_path / "below" / "new.txt"
    old.write_text("before")
    synced = os.fsync
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "no space left on device")
        synced(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_files({old: "after", new: b"bytes"})
    monkeypatch.undo()
    assert old.read_text() == "before"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [old]
    write_files({old: "after", new: b"bytes"})
    assert (old.read_text(), new.read_bytes()) == ("after", b"bytes")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["below", "new.txt", "old.txt"]
    write_files({})

"""The whole job of ``hpa adapt``: two checkpoints in, one edited checkpoint out (DESIGN 5).

The output grows in a hidden folder beside its place, file by file, and is renamed when its manifest is written.  The
same command, run again, goes on where a killed one stopped; run at the same time on any machine that sees the folder,
it helps.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

import hpa_ext
from hpa.checkpoint.adapter import Adapter
from hpa.checkpoint.buffers import Buffers
from hpa.checkpoint.calibrate import CalibrationJob, calibrate_checkpoint
from hpa.checkpoint.card import write_card, write_report
from hpa.checkpoint.claims import ClaimLostError, Claims
from hpa.checkpoint.files import INDEX_FILE, CheckpointError, Folder, read_tensor
from hpa.checkpoint.memory import Memory, write_memory
from hpa.checkpoint.merge import Editor, ShardResult, write_shard
from hpa.checkpoint.plan import Matrix, Plan, Shard, decoder_of, make_plan, model_fingerprint, model_layers
from hpa.checkpoint.statistics import Statistics
from hpa.checkpoint.stream import PIECE, Room, hash_file
from hpa.config import CalibrationConfig
from hpa.layers import LowRankUpdate
from hpa.methods import Method
from hpa.storage import write_file, write_files

__all__ = [
    "MANIFEST",
    "Job",
    "JobResult",
    "Listener",
    "adapt_checkpoint",
    "check_files",
    "editor_of",
    "plan_job",
    "prepare",
]

MANIFEST = "hpa-manifest.json"
MEMORY = "hpa-memory.safetensors"
SMALL = 16 << 20  # bytes of a file that may wait in memory for the others
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges")


class Listener(Protocol):
    """Told of what happens."""

    def total(self, size: int) -> None:
        """Bytes to write in all."""

    def wrote(self, size: int) -> None:
        """Bytes written, or found written."""

    def block(self, done: int, blocks: int) -> None:
        """Decoder blocks calibrated."""

    def say(self, text: str) -> None:
        """A line for people."""


class _Silent:
    def total(self, size: int) -> None:
        return

    wrote = total

    def block(self, done: int, blocks: int) -> None:
        return

    def say(self, text: str) -> None:
        return


@dataclass(frozen=True)
class Job:
    """What is asked for.

    Attributes:
        before: folder of the model before the task.
        after: folder of the model after it, or of a LoRA adapter of ``before``.
        out: folder to make.
        method: with its options, at its strength.
        statistics: statistics files, by role.
        calibrations: how to make those that are not given, by role; their ``out`` is not looked at.
        memory: memory of past tasks, from an earlier output.
        aligned: folder of the aligned model, for methods that read it.
        unaligned: folder of the model before its alignment, likewise.
        earlier: folders of what other tasks made of ``before`` (models, or adapters of it), for methods that merge.
        skip: patterns of layers to leave as the task made them.
        save_as: a whole model, or the adapter again.
        task_index, seed: for methods that draw.
        max_memory: bytes that the job may hold besides the program itself.
        any_statistics: take statistics of other models too.
    """

    before: Path
    after: Path
    out: Path
    method: Method
    statistics: dict[str, Path] = field(default_factory=dict)
    calibrations: dict[str, CalibrationJob] = field(default_factory=dict)
    memory: Path | None = None
    aligned: Path | None = None
    unaligned: Path | None = None
    earlier: tuple[Path, ...] = ()
    skip: tuple[str, ...] = ()
    save_as: Literal["full", "lora"] = "full"
    task_index: int = 0
    seed: int = 0
    max_memory: int = 2 << 30
    any_statistics: bool = False


@dataclass(frozen=True)
class JobResult:
    """What was done.

    Attributes:
        out: the finished folder.
        edits: one dictionary a layer.
        was_there: the folder had been finished by the same job before.
        seconds: wall clock of this run.
    """

    out: Path
    edits: list[dict[str, Any]]
    was_there: bool
    seconds: float


@dataclass(frozen=True)
class Prepared:
    """A job's inputs, read and checked as far as headers go."""

    before: Folder
    after: Folder
    adapter: Adapter | None
    statistics: dict[str, Statistics]
    memory: Memory | None
    plan: Plan


def plan_job(job: Job, missing: list[str] | None = None) -> Plan:
    """What would happen to every tensor; nothing is written.

    Args:
        job: what to do.
        missing: what is said of sets that the method needs and the job has not is put here, instead of raised.

    Raises:
        CheckpointError: whatever would stop the job, as far as headers show it.
    """
    return prepare(job, missing).plan


def adapt_checkpoint(job: Job, listener: Listener | None = None) -> JobResult:
    """Do the job, or what an earlier or another run left of it.

    Raises:
        CheckpointError: inputs that cannot be used, or an output folder of another job.
        ValueError: numbers that are not finite, in the layer named.
        OSError: a full disk and its like; the same call goes on once there is room.
    """
    start = time.perf_counter()
    listener = _Silent() if listener is None else listener
    out = job.out.absolute()
    _refuse_place(out, job)
    first = prepare(job)
    identity = _identity(job, first)
    if out.exists() and not _is_empty(out):
        return JobResult(out, _finished(out, identity), True, time.perf_counter() - start)
    stage = out.parent / f".{out.name}.hpa-part"
    claims, own = Claims(stage / "work" / "claims"), f"worker-{uuid.uuid4().hex}"
    try:
        with claims.hold(own):
            try:
                _work(job, first, stage, out, claims, own, identity, listener)
            except (ValueError, OSError):  # something is wrong with the inputs: a mended job is another one
                if stage.exists() and _holds_nothing(stage, own):
                    shutil.rmtree(stage, ignore_errors=True)
                raise
    except FileNotFoundError:
        # Another worker has renamed the stage away, finished.
        if stage.exists() or not (out / MANIFEST).is_file():
            raise
    return JobResult(out, _finished(out, identity), False, time.perf_counter() - start)


def _work(
    job: Job,
    first: Prepared,
    stage: Path,
    out: Path,
    claims: Claims,
    own: str,
    identity: dict[str, Any],
    listener: Listener,
) -> None:
    """The job from its stage to its name; ``own``: the claim by which others see that a worker is there."""
    _open_stage(stage, identity, own)
    made = _calibrated(job, stage / "work", claims, listener)
    prepared = first if made is job else prepare(made)
    listener.total(prepared.plan.output_size)
    _check_room(stage, prepared, job)
    _write_shards(job, prepared, stage, claims, listener)
    _finish(job, prepared, stage, out, claims, identity, listener)


def _calibrated(job: Job, work: Path, claims: Claims, listener: Listener) -> Job:
    """The job with statistics files in place of what is to be calibrated."""
    wanted = _wanted(job)
    statistics = dict(job.statistics)
    for role, calibration in job.calibrations.items():
        if role in statistics or role not in wanted:
            continue
        path = work / f"statistics-{role}.safetensors"
        while not path.exists():
            with claims.hold(path.name) as confirm:
                if confirm is None:
                    time.sleep(0.2)
                elif not path.exists():
                    listener.say(f"calibrating on the {role} set")
                    calibrate_checkpoint(
                        replace(calibration, out=path, want=wanted[role], max_memory=job.max_memory), listener.block
                    )
        statistics[role] = path
    return job if statistics == job.statistics else replace(job, statistics=statistics)


def _wanted(job: Job) -> dict[str, frozenset[str]]:
    """What the method reads of each set."""
    wanted: dict[str, frozenset[str]] = {}
    for need in sorted(job.method.needs):
        role, _, kind = need.partition("_")
        wanted[role] = wanted.get(role, frozenset()) | {kind}
    if "keep" in job.statistics or "keep" in job.calibrations:
        wanted["keep"] = frozenset({"gram"})
    return wanted


def prepare(job: Job, missing: list[str] | None = None) -> Prepared:
    """Read and check everything but the numbers; ``missing`` as in :func:`plan_job`."""
    if job.method.only_trains:
        raise CheckpointError(
            f"method '{job.method.name}' is a way of training: it does nothing to finished checkpoints; use it in "
            "`hpa run`"
        )
    if job.earlier and not job.method.merges_earlier:
        raise CheckpointError(f"earlier: method '{job.method.name}' as set merges no models of other tasks")
    before, after = Folder(job.before, "BEFORE"), Folder(job.after, "AFTER")
    if before.is_adapter:
        raise CheckpointError(f"BEFORE: {job.before} is an adapter; expected the model that it stands on")
    adapter = Adapter.of(after) if after.is_adapter else None
    wanted = _wanted(job)
    if "edited" in wanted:
        raise CheckpointError(
            f"method '{job.method.name}': statistics of the edited model need a forward pass after the edit; "
            "expected memory_source=trained"
        )
    statistics: dict[str, Statistics] = {}
    pending = False
    fingerprints: dict[str, str] | None = None
    if job.statistics and wanted and not job.any_statistics:
        fingerprints = {
            "before": model_fingerprint(before),
            "after": model_fingerprint(before if adapter else after, adapter),
        }
    remembers = getattr(job.method.config, "memory", 0)
    for given, what in ((job.memory is not None, "memory"), ("keep" in wanted, "keep")):
        if given and not remembers:
            raise CheckpointError(f"{what}: method '{job.method.name}' as set keeps no memory of past tasks")
    if job.method.keep_samples and "keep" not in wanted and job.memory is None:  # a memory may hold them already
        _lack(
            f"keep: method '{job.method.name}' is to keep {job.method.keep_samples} samples; pass --keep with them, or "
            "--statistics with a file of them",
            missing,
        )
    for role, kinds in wanted.items():
        if role in job.statistics:
            statistics[role] = _checked(job, role, kinds, fingerprints)
        elif role in job.calibrations:
            if not job.calibrations[role].data.is_file():
                raise CheckpointError(f"--{role}: no such file: {job.calibrations[role].data}")
            pending = True
        else:
            _lack(
                f"statistics: method '{job.method.name}' needs those of the {role} set; pass --{role} with samples, "
                "or --statistics with a file",
                missing,
            )
            pending = True
    _check_alike(job, wanted, statistics)
    known = None
    include_projector = False
    if statistics and not pending:
        # What is kept need not reach every layer that is edited.
        read = [held.known_layers() for role, held in statistics.items() if role != "keep"]
        known = set.intersection(*read) if read else None
        include_projector = any(not name.startswith("layers.") for name in known or ())
    plan = make_plan(
        before,
        after,
        adapter=adapter,
        known=known,
        skip=job.skip,
        include_projector=include_projector,
        save_as=job.save_as,
    )
    memory = Memory(job.memory, method=job.method, keep=statistics.get("keep")) if remembers else None
    return Prepared(before, after, adapter, statistics, memory, plan)


def _lack(said: str, missing: list[str] | None) -> None:
    """``said`` of a set that is not there: for the list, or raised where there is none."""
    if missing is None:
        raise CheckpointError(said)
    missing.append(said)


def _checked(job: Job, role: str, kinds: frozenset[str], fingerprints: dict[str, str] | None) -> Statistics:
    """The statistics of one set; ``fingerprints``: of both models, ``None`` where they may be of any."""
    held = Statistics(job.statistics[role])
    for kind, there in (("diagonal", held.has_diagonals), ("gram", held.has_grams)):
        if kind in kinds and not there and any(not about.zero for about in held.info.inputs.values()):
            what, option = ("Gram matrices", " --gram") if kind == "gram" else ("inverse diagonals", "")
            raise CheckpointError(
                f"statistics: {held.path} holds no {what}, which method '{job.method.name}' needs; "
                f"make it with `hpa calibrate{option}`"
            )
    if held.info.role != role:
        raise CheckpointError(f"statistics: {held.path} is of the {held.info.role} set, expected the {role} set")
    if fingerprints is not None:
        # What is kept is what BEFORE says.
        source = getattr((job.method.calibration or CalibrationConfig()).hessian_source, role, "before")
        if held.info.fingerprint != fingerprints[source]:
            other = next((name for name, known in fingerprints.items() if known == held.info.fingerprint), None)
            raise CheckpointError(
                f"statistics: {held.path} was made with {held.info.model}, whose weights are "
                f"{f'those of {other.upper()}' if other else 'neither those of BEFORE nor of AFTER'}; the {role} set "
                f"goes through {source.upper()}: calibrate again, or take it all the same with --any-statistics"
            )
    return held


def _check_alike(job: Job, wanted: Mapping[str, frozenset[str]], statistics: Mapping[str, Statistics]) -> None:
    """Raises CheckpointError where sets were not made as the method asks, or will not be as one another."""
    alike = {"token_filter", "normalize"}
    if any("diagonal" in kinds for kinds in wanted.values()):
        alike |= {"damping", "diag_mode"}
    asked = job.method.config.model_dump(mode="json", include=job.method.config.model_fields_set & alike)
    made = {role: (str(held.path), held.info.config) for role, held in statistics.items()}
    for role in wanted:
        if role in job.calibrations and role not in made:
            calibration = job.calibrations[role]
            made[role] = (str(calibration.data), calibration.config.model_dump(mode="json"))
    first: tuple[str, dict[str, Any]] | None = None
    for role, (path, config) in made.items():
        for name in sorted(alike):
            value = config.get(name)
            if role in statistics and name in asked and value != asked[name]:
                raise CheckpointError(
                    f"statistics: {path} was made with {name}={value}, --set says {asked[name]}; calibrate again"
                )
            if first is not None and value != first[1].get(name):
                raise CheckpointError(
                    f"statistics: expected the same of all sets, got {name}={first[1].get(name)} for {first[0]} and "
                    f"{value} for {path}"
                )
        first = first or (path, config)


def _refuse_place(out: Path, job: Job) -> None:
    place = out.resolve()
    for argument, folder in (("BEFORE", job.before), ("AFTER", job.after)):
        source = folder.resolve()
        if place == source or source in place.parents or place in source.parents:
            raise CheckpointError(f"--out: {out} lies in {argument} ({folder}) or holds it; choose another folder")
    if out.is_symlink():
        raise CheckpointError(f"--out: {out} is a link to {out.readlink()}; expected a folder that is new or empty")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"--out: {out} is a file; expected a folder that is new or empty")
    above = next(folder for folder in out.parents if folder.exists())
    if not above.is_dir():
        raise CheckpointError(f"--out: {out} cannot be made, for {above} is a file")


def _identity(job: Job, prepared: Prepared) -> dict[str, Any]:
    """Everything that the output depends on."""

    def file(path: Path) -> dict[str, Any]:
        status = path.stat()
        return {"bytes": status.st_size, "changed_ns": status.st_mtime_ns}

    inputs: dict[str, Any] = {}
    for folder in (prepared.before, prepared.after):
        inputs |= {f"{folder.argument}/{name}": file(folder.path / name) for name in folder.files}
    inputs |= {f"statistics/{role}": file(path) for role, path in job.statistics.items()}
    for role, kinds in _wanted(job).items():
        if role not in job.statistics:
            calibration = job.calibrations[role]
            inputs[f"samples/{role}"] = {
                "sha256": hash_file(calibration.data).hexdigest(),
                "model": str(calibration.model.absolute()),
                "samples": calibration.samples,
                "seed": calibration.seed,
                "kinds": sorted(kinds),
                "config": calibration.config.model_dump(mode="json"),
            }
    if job.memory is not None:
        inputs["memory"] = file(job.memory)
    others: list[tuple[str, Path | None]] = [("aligned", job.aligned), ("unaligned", job.unaligned)]
    others += [(f"earlier {index}", path) for index, path in enumerate(job.earlier)]
    for name, place in others:
        if place is not None:
            inputs |= {f"{name}/{found}": file(place / found) for found in Folder(place, name).files}
    return {
        "inputs": inputs,
        "settings": {
            "method": job.method.name,
            "options": job.method.config.model_dump(mode="json"),
            "skip": list(job.skip),
            "save_as": job.save_as,
            "task_index": job.task_index,
            "seed": job.seed,
        },
        "hpa": hpa_ext.__version__,
    }


def _differences(old: Any, new: Any, where: str = "") -> Iterable[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
    elif old != new:
        yield f"{where}: {'absent' if old is None else old} then, {'absent' if new is None else new} now"


def _open_stage(stage: Path, identity: dict[str, Any], own: str) -> None:
    path = stage / "work" / "job.json"
    if not path.exists():
        write_file(path, json.dumps(identity, indent=1))
    try:
        old = json.loads(path.read_text())
    except ValueError:
        raise CheckpointError(f"--out: {path} is damaged; remove {stage} and start anew") from None
    different = list(_differences(old, identity))
    if different and _holds_nothing(stage, own):  # whatever stopped that job came before its first result
        write_file(path, json.dumps(identity, indent=1))
    elif different:
        raise CheckpointError(
            f"--out: {stage} holds the beginning of another job ({'; '.join(different[:4])}); "
            "finish that one with its own settings, or remove the folder"
        )


def _holds_nothing(stage: Path, own: str) -> bool:
    """Whether nothing has been done in it and no other worker is there."""
    there = {path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()}
    return there <= {"work/job.json", f"work/claims/{own}"}


def _finished(out: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """The edits of a finished folder, if it is this job's."""
    manifest = out / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"--out: {out} exists and is not empty; choose another folder, or remove it")
    content = json.loads(manifest.read_text())
    different = list(_differences(content["job"], identity))
    if different:
        raise CheckpointError(
            f"--out: {out} is the result of another job ({'; '.join(different[:4])}); choose another folder"
        )
    edits: list[dict[str, Any]] = json.loads((out / "hpa.json").read_text())["layers"]
    return edits


def _check_room(stage: Path, prepared: Prepared, job: Job) -> None:
    written = sum(file.stat().st_size for file in stage.glob("*.safetensors*") if file.is_file())
    needed = prepared.plan.output_size - written
    if prepared.memory is not None:
        needed += sum(2 * about.cols * (about.cols + 1) for about in prepared.statistics["task"].info.inputs.values())
    free = shutil.disk_usage(stage).free
    if needed > free:
        raise CheckpointError(
            f"--out: the output takes {_told_size(needed)} more and {stage.parent} has {_told_size(free)} free"
        )


def _told_size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _write_shards(job: Job, prepared: Prepared, stage: Path, claims: Claims, listener: Listener) -> None:
    """Write every file that is not done; returns when all are, whoever did them."""
    done_folder, notes = stage / "work" / "done", stage / "work" / "notes"
    done_folder.mkdir(parents=True, exist_ok=True)
    notes.mkdir(parents=True, exist_ok=True)
    editor = editor_of(job, prepared)
    statistics_budget = _statistics_budget(job)
    # Besides what waits to be edited and to be written, one layer is in work, and two files have a piece each.
    work = 2 * prepared.plan.largest + prepared.plan.work_size(job.method) + 2 * PIECE
    budget = max(8 << 20, (job.max_memory - statistics_budget - work) // 3)
    budget = min(budget, 96 << 20)
    buffers = Buffers(2 * budget + 2 * prepared.plan.largest)
    room = Room(budget)
    told: set[str] = set()
    with _Closer(done_folder, listener) as closer:
        while True:
            open_ = []
            for shard in prepared.plan.shards:
                if not (done_folder / f"{shard.name}.json").exists():
                    open_.append(shard)
                elif shard.name not in told:
                    told.add(shard.name)
                    listener.wrote(sum(entry.source.size for entry in shard.entries))
            if not open_:
                return
            worked = False
            for shard in open_:
                with ExitStack() as claim:
                    confirm = claim.enter_context(claims.hold(shard.name))
                    if confirm is None or (done_folder / f"{shard.name}.json").exists():
                        continue
                    told.add(shard.name)
                    finish = write_shard(
                        shard,
                        stage,
                        notes,
                        editor,
                        budget=budget,
                        room=room,
                        buffers=buffers,
                        done=listener.wrote,
                        confirm=confirm,
                    )
                    closer.close(finish, claim.pop_all())
                    worked = True
            closer.wait()
            if not worked:
                time.sleep(0.2)


class _Closer:
    """Waits for the disk to have one file while the next is written."""

    def __init__(self, done_folder: Path, listener: Listener) -> None:
        self._done_folder, self._listener = done_folder, listener
        self._thread = ThreadPoolExecutor(1, "close")
        self._last: Future[None] | None = None

    def __enter__(self) -> _Closer:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def close(self, finish: Callable[[], ShardResult], claim: ExitStack) -> None:
        """Finish a file and give its claim back; raises what went wrong with the one before."""
        with claim:
            self.wait()
            self._last = self._thread.submit(self._close, finish, claim.pop_all())

    def wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _close(self, finish: Callable[[], ShardResult], claim: ExitStack) -> None:
        with claim:
            try:
                result = finish()
            except ClaimLostError as lost:
                self._listener.say(str(lost))
                return
            content = {"bytes": result.size, "sha256": result.sha256, "edits": result.edits}
            write_file(self._done_folder / f"{result.name}.json", json.dumps(content))


def editor_of(job: Job, prepared: Prepared) -> Editor:
    """What edits one layer of the job."""
    return Editor(
        job.method,
        prepared.statistics,
        memory=prepared.memory,
        references={name: _reference(job, name) for name in sorted(job.method.references)},
        earlier=[_earlier(path, prepared.before) for path in job.earlier],
        task_index=job.task_index,
        seed=job.seed,
        budget=_statistics_budget(job),
    )


def _statistics_budget(job: Job) -> int:
    return min(job.max_memory // 4, 512 << 20)


def _reference(job: Job, name: str) -> Callable[[str], torch.Tensor]:
    """What reads a layer of the aligned or the unaligned model."""
    path = job.aligned if name == "aligned" else job.unaligned
    if path is None:
        anchored = getattr(job.method.config, "anchor", "prev") == "aligned"
        reader = "with anchor=aligned" if anchored else f"by method '{job.method.name}'"
        raise CheckpointError(f"{name}: needed {reader}, got none; pass --{name} FOLDER")
    return _layer_reader(Folder(path, name))


def _earlier(path: Path, before: Folder) -> Callable[[str], torch.Tensor | LowRankUpdate]:
    """What reads a layer of another task's model, or the update of another task's adapter."""
    folder = Folder(path, "earlier")
    if not folder.is_adapter:
        return _layer_reader(folder)
    adapter = Adapter.of(folder)
    factors, replaced = adapter.factors_on(before.tensors), adapter.replaced_on(before.tensors)
    layers = _all_layers(before)

    def read(layer: str) -> torch.Tensor | LowRankUpdate:
        matrix = layers[layer]
        tensor = matrix.info.name
        if tensor in replaced:
            return read_tensor(matrix.within(replaced[tensor]))
        if tensor in factors:
            return factors[tensor].read()
        rows, cols = matrix.info.shape
        return LowRankUpdate(torch.empty(0, cols), torch.empty(rows, 0))

    return read


def _layer_reader(folder: Folder) -> Callable[[str], torch.Tensor]:
    layers = _all_layers(folder)

    def read(layer: str) -> torch.Tensor:
        if layer not in layers:
            raise CheckpointError(f"{folder.argument}: {folder.path} has no layer {layer}")
        return read_tensor(layers[layer].info)

    return read


def _all_layers(folder: Folder) -> dict[str, Matrix]:
    return model_layers(folder, decoder_of(folder), include_projector=True)


def _finish(
    job: Job,
    prepared: Prepared,
    stage: Path,
    out: Path,
    claims: Claims,
    identity: dict[str, Any],
    listener: Listener,
) -> None:
    """Everything beside the weights, then the manifest, then the name."""
    while stage.exists():
        with claims.hold("finish") as confirm:
            if confirm is None:
                time.sleep(0.2)
                continue
            if not stage.exists():
                return
            _write_rest(job, prepared, stage, identity)
            confirm()
            _publish(stage, out)
            return


def _write_rest(job: Job, prepared: Prepared, stage: Path, identity: dict[str, Any]) -> None:
    plan = prepared.plan
    results = {}
    for shard in plan.shards:
        content = json.loads((stage / "work" / "done" / f"{shard.name}.json").read_text())
        results[shard.name] = ShardResult(shard.name, content["bytes"], content["sha256"], content["edits"])
        _verify(stage / shard.name, results[shard.name])
    hashes = {name: result.sha256 for name, result in results.items()}
    skipped_files: dict[str, str] = {}
    small: dict[str, bytes] = {}
    for relative, source, reason in _side_files(job, prepared):
        if reason is not None:
            skipped_files[relative.as_posix()] = reason
            continue
        data = source.read_bytes()
        if len(data) > SMALL and relative.as_posix() != "README.md":
            write_file(stage / relative, data)
            hashes[relative.as_posix()] = sha256(data).hexdigest()
        else:
            small[relative.as_posix()] = data
    if (prepared.before if job.save_as == "full" and prepared.adapter else prepared.after).path.joinpath(
        INDEX_FILE
    ).is_file() and job.save_as == "full":
        small[INDEX_FILE] = (json.dumps(_index(plan.shards), indent=2) + "\n").encode()
    if prepared.memory is not None:
        hashes[MEMORY] = write_memory(stage / MEMORY, job.method, prepared.memory, prepared.statistics["task"])
    edits = [edit for shard in plan.shards for edit in results[shard.name].edits]
    summary = {
        "hpa": hpa_ext.__version__,
        "before": str(job.before),
        "after": str(job.after),
        "method": job.method.name,
        "options": job.method.config.model_dump(mode="json"),
        "statistics": {role: held.info.data for role, held in prepared.statistics.items()},
        "calibration": {role: held.info.config for role, held in prepared.statistics.items()},
        "decoder": plan.decoder.path,
        "blocks": plan.decoder.blocks,
        "layers": edits,
        "tensors": [
            {"name": entry.name, "fate": entry.fate, "reason": entry.reason} for entry in [*plan.entries, *plan.skipped]
        ],
        "files_not_copied": skipped_files,
    }
    small["hpa.json"] = (json.dumps(summary, indent=1) + "\n").encode()
    small["README.md"] = write_card(small.get("README.md", b""), summary).encode()
    small["report.html"] = write_report(summary).encode()
    write_files({stage / name: data for name, data in small.items()})
    hashes |= {name: sha256(data).hexdigest() for name, data in small.items()}
    files = {
        name: {"bytes": (stage / name).stat().st_size, "sha256": digest} for name, digest in sorted(hashes.items())
    }
    write_file(stage / MANIFEST, json.dumps({"job": identity, "files": files}, indent=1) + "\n")


def _publish(stage: Path, out: Path) -> None:
    trash = stage / "work"
    shutil.rmtree(trash, ignore_errors=True)
    if out.exists():
        out.rmdir()  # empty, or this fails and nothing is lost
    os.rename(stage, out)


def _verify(path: Path, result: ShardResult) -> None:
    size = path.stat().st_size if path.exists() else -1
    if size != result.size:
        raise CheckpointError(f"{path}: has {size} bytes, expected {result.size}; remove the folder and start anew")


def _side_files(job: Job, prepared: Prepared) -> Iterable[tuple[Path, Path, str | None]]:
    """Files to copy: relative path, source, and the reason where one is left out."""
    chosen: dict[Path, tuple[Path, str | None]] = {}
    if prepared.adapter is not None and job.save_as == "full":
        for relative, reason in prepared.before.side_files():
            chosen[relative] = (prepared.before.path / relative, reason)
        for relative, reason in prepared.after.side_files():
            if reason is None and relative.name.startswith(TOKENIZER_FILES):
                chosen[relative] = (prepared.after.path / relative, None)
    else:
        for relative, reason in prepared.after.side_files():
            chosen[relative] = (prepared.after.path / relative, reason)
    for relative, (source, reason) in chosen.items():
        yield relative, source, reason


def _index(shards: list[Shard]) -> dict[str, Any]:
    weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
    total = sum(entry.source.size for shard in shards for entry in shard.entries)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def check_files(out: Path) -> list[str]:
    """Files of a finished folder that are not as its manifest says; empty where all are."""
    content = json.loads((out / MANIFEST).read_text())
    wrong = []
    for name, about in content["files"].items():
        path = out / name
        if not path.is_file():
            wrong.append(f"{name}: missing")
        elif path.stat().st_size != about["bytes"] or hash_file(path).hexdigest() != about["sha256"]:
            wrong.append(f"{name}: changed since it was written")
    return wrong

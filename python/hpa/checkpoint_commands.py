"""The commands on checkpoints: ``hpa adapt``, ``ask``, ``calibrate``, ``inspect``, ``compare`` and ``sweep``.

Apart from :mod:`hpa.checkpoint`, so that ``hpa --help`` need not load torch: heavy imports wait inside the commands.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from hpa.checkpoint import Job
    from hpa.checkpoint.plan import Plan
    from hpa.methods import Method

__all__ = ["adapt_command", "ask_command", "calibrate_command", "compare_command", "inspect_command", "sweep_command"]

_out = Console(emoji=False)
_err = Console(stderr=True, emoji=False)

Before = Annotated[
    Path, typer.Argument(metavar="BEFORE", help="Folder of the model before fine-tuning.", show_default=False)
]
After = Annotated[
    Path,
    typer.Argument(metavar="AFTER", help="Folder of the model after it, or of a LoRA adapter.", show_default=False),
]
Safety = Annotated[
    Path | None,
    typer.Option("--safety", help="Harmful requests with the aligned model's own refusals.", show_default=False),
]
TaskSet = Annotated[Path | None, typer.Option("--task", help="Training samples of the task.", show_default=False)]
KeepSet = Annotated[
    Path | None,
    typer.Option(
        "--keep",
        help="Prompts of any kind with BEFORE's own answers: what else it can do (methods with a memory).",
        show_default=False,
    ),
]
StatisticsFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--statistics", help="A file of `hpa calibrate`, instead of samples; may be repeated.", show_default=False
    ),
]
MethodName = Annotated[str, typer.Option("--method", "-m", help="A name that `hpa methods` lists.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of the method (`hpa methods NAME`); may be repeated."),
]
Skip = Annotated[
    list[str] | None, typer.Option("--skip", metavar="PATTERN", help="Leave such layers as the task made them.")
]
MemoryFile = Annotated[
    Path | None, typer.Option("--memory", help="hpa-memory.safetensors of the task before.", show_default=False)
]
Aligned = Annotated[
    Path | None,
    typer.Option("--aligned", help="The aligned model, for --set anchor=aligned and safe_lora.", show_default=False),
]
Unaligned = Annotated[
    Path | None,
    typer.Option("--unaligned", help="The model before its alignment, for safe_lora.", show_default=False),
]
Earlier = Annotated[
    list[Path] | None,
    typer.Option(
        "--earlier",
        help="What another task made of BEFORE, for methods that merge; may be repeated, oldest first.",
        show_default=False,
    ),
]
Budget = Annotated[str, typer.Option("--max-memory", help="What the job may hold besides the program: 2G, 512M ...")]
Images = Annotated[
    Path | None,
    typer.Option("--images", help="Folder that picture paths start from.", show_default="the data's folder"),
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Off unless you say so.")
]


def adapt_command(
    before: Before,
    after: After,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to make.", show_default=False)] = None,
    safety: Safety = None,
    task: TaskSet = None,
    keep: KeepSet = None,
    statistics: StatisticsFiles = None,
    method: MethodName = "hpa",
    strength: Annotated[
        float, typer.Option(help="How much of the update is held back; 1 is the method's setting.")
    ] = 1.0,
    set_: Settings = None,
    skip: Skip = None,
    save_as: Annotated[Literal["full", "lora"], typer.Option(help="A whole model, or the adapter again.")] = "full",
    memory: MemoryFile = None,
    aligned: Aligned = None,
    unaligned: Unaligned = None,
    earlier: Earlier = None,
    max_memory: Budget = "2G",
    images: Images = None,
    safety_samples: Annotated[int | None, typer.Option(min=1, help="Safety samples to use.", show_default="8")] = None,
    task_samples: Annotated[int | None, typer.Option(min=1, help="Task samples to use.", show_default="128")] = None,
    task_index: Annotated[int, typer.Option(min=0, help="0-based number of the task, for methods that draw.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="For the choice of samples and methods that draw.")] = 0,
    any_statistics: Annotated[
        bool, typer.Option("--any-statistics", help="Also take statistics of other weights.")
    ] = False,
    trust_remote_code: RemoteCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would happen to every tensor, and stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bars.")] = False,
) -> None:
    """Two checkpoints in, one checkpoint out that keeps what the first one refused.

    A job that was stopped goes on with the same command; run on another machine that sees the folder, it helps.
    """
    if out is None and not dry_run:
        raise _error("--out: needed, the folder to make")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Reading, editing and writing share the cores: a thread that spins while it waits takes one from the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, which has nothing to do here
    from hpa.checkpoint import adapt_checkpoint, plan_job

    job = _job(
        before,
        after,
        out if out is not None else Path(f"{after.name or 'model'}-hpa"),
        safety=safety,
        task=task,
        keep=keep,
        statistics=statistics or [],
        method=_method(method, set_ or [], strength),
        skip=skip or [],
        memory=memory,
        aligned=aligned,
        unaligned=unaligned,
        earlier=tuple(earlier or ()),
        save_as=save_as,
        max_memory=_bytes(max_memory),
        images=images,
        samples={"safety": safety_samples, "task": task_samples},
        task_index=task_index,
        seed=seed,
        any_statistics=any_statistics,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        missing: list[str] = []
        _show_plan(plan_job(job, missing), job)
        for line in missing:
            _err.print(f"not given yet: {line}", markup=False, highlight=False, soft_wrap=True)
        return
    with _Bars(quiet) as bars:
        result = adapt_checkpoint(job, bars)
    edited = [edit for edit in result.edits if "skipped" not in edit]
    if result.was_there:
        _out.print(
            f"{result.out} is there already, made by this very job", markup=False, highlight=False, soft_wrap=True
        )
        return
    skipped = Counter(str(edit["skipped"]) for edit in result.edits if "skipped" in edit)
    for reason, count in skipped.items():
        _out.print(f"{count} layers left as trained: {reason}", markup=False, highlight=False)
    _out.print(
        f"{len(edited)} of {len(result.edits)} layers edited by {job.method.name} in {result.seconds:.1f} s "
        f"-> {result.out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    _out.print(f"report: {result.out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def ask_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model.", show_default=False)],
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS",
            help="Samples, whose answers are not read, or a published list: advbench, donotanswer, harmbench, "
            "strongreject.",
            show_default=False,
        ),
    ],
    role: Annotated[
        Literal["safety", "keep"],
        typer.Option("--as", help="Write refusals alone, or every answer.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON lines to write.", show_default=False)],
    samples: Annotated[int | None, typer.Option(min=1, help="How many.", show_default="8 safety, 128 keep")] = None,
    judge: Annotated[
        str, typer.Option(help="Says what is a refusal: a name that `hpa info` lists, or keywords:FILE.")
    ] = ("plain"),
    seed: Annotated[int, typer.Option(min=0, help="Of the order in which prompts are asked.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts asked at once.")] = 8,
    images: Images = None,
    dtype: Annotated[
        Literal["stored", "float32", "bfloat16"], typer.Option(help="Of the weights in memory.")
    ] = "stored",
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda or cuda:N.")] = "cpu",
    trust_remote_code: RemoteCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bars.")] = False,
) -> None:
    """What a model itself says to prompts: the samples for --safety (its refusals) and --keep (its answers).

    The model is loaded whole, and answers greedily.  Ask the one before fine-tuning.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from hpa.checkpoint import AskJob, ask
    from hpa.evaluation import get_judge

    try:
        chosen = get_judge(judge)
    except ValueError as error:
        raise _error(f"--judge: {error}") from None
    job = AskJob(
        model,
        prompts,
        role,
        out,
        chosen,
        samples=samples,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        image_root=images,
        dtype="auto" if dtype == "stored" else dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    with _Bars(quiet) as bars:
        found = ask(job, lambda done, prompts: bars.layer(done, prompts, "asking"))
    _out.print(
        f"{found.asked} of {found.prompts} prompts asked, {found.refused} refused, {found.empty} empty answers; "
        f"{found.kept} written -> {out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if samples is not None and found.kept < samples:
        _err.print(f"warning: {samples} were wanted", highlight=False)
    if found.image_root is not None:
        _err.print(
            f"its pictures are looked for below another folder than its own: pass --images {found.image_root} with it",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def calibrate_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a model, or of a LoRA adapter.", show_default=False)
    ],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Samples: .json, .jsonl or .parquet.", show_default=False)
    ],
    role: Annotated[
        Literal["safety", "task", "keep"], typer.Option("--as", help="Which set this is.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Statistics file to write.", show_default=False)],
    base: Annotated[Path | None, typer.Option(help="The model that an adapter stands on.", show_default=False)] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="How many.", show_default="8 safety, 128 else")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of samples.")] = 0,
    gram: Annotated[bool, typer.Option("--gram", help="Gram matrices too, which hpa_ls needs.")] = False,
    energy: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Keep leading vectors with this share of each Gram matrix's trace.",
            show_default="all",
        ),
    ] = None,
    images: Images = None,
    dtype: Annotated[
        Literal["stored", "float32", "bfloat16"], typer.Option(help="Of the weights in memory.")
    ] = "stored",
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda or cuda:N.")] = "cpu",
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a text sample.")] = 2048,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="damping, normalize, token_filter ...; may be repeated."),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory", help="What a process may hold besides the program: 2G ...", show_default="no bound"
        ),
    ] = None,
    trust_remote_code: RemoteCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bars.")] = False,
) -> None:
    """What a model's layers are fed with by a set of samples, as one file that edits need.

    Only one decoder block is in memory at a time; hidden states that --max-memory has no room for wait in a file.
    Under torchrun, the samples are shared by its processes.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    from hpa.checkpoint import CalibrationJob, calibrate_checkpoint
    from hpa.config import CalibrationConfig, validated

    config = validated(CalibrationConfig, _options(set_ or []), "calibration")
    job = CalibrationJob(
        model,
        data,
        role,
        out,
        base=base,
        config=config,
        samples=samples,
        seed=seed,
        want=frozenset({"diagonal", "gram"} if gram else {"diagonal"}),
        energy=energy,
        image_root=images,
        dtype=None if dtype == "stored" else getattr(torch, dtype),
        device=device,
        max_length=max_length,
        trust_remote_code=trust_remote_code,
        max_memory=None if max_memory is None else _bytes(max_memory),
    )
    first = os.environ.get("RANK", "0") == "0"
    with _Bars(quiet or not first) as bars:
        held = calibrate_checkpoint(job, bars.block)
    if held is not None:
        _out.print(
            f"{len(held.info.layers)} layers, {len(held.info.inputs)} inputs, {held.info.data['samples']} samples "
            f"-> {out} ({out.stat().st_size / 1e6:.1f} MB)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def inspect_command(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A checkpoint folder, adapter or statistics file.", show_default=False),
    ],
    all_: Annotated[bool, typer.Option("--all", help="Every layer.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the files of an edited folder with its manifest.")
    ] = False,
) -> None:
    """What is in a checkpoint or statistics file, and what an edit would touch."""
    table = Table(show_header=False, box=None, pad_edge=False)
    if path.is_file():
        _inspect_statistics(path, table, all_)
        return
    from hpa.checkpoint.adapt import MANIFEST, check_files
    from hpa.checkpoint.compare import inspect_folder

    contents = inspect_folder(path)
    for key, value in contents.facts.items():
        table.add_row(key, value)
    for place, count in contents.left.items():
        table.add_row("not edited", f"{count} tensors {place}")
    _out.print(table)
    shapes = Counter((re.sub(r"\.\d+\.", ".N.", name), shape) for name, shape in contents.layers.items())
    layers = Table("layer", "rows x cols", "" if all_ else "how many")
    if all_:
        for name, shape in contents.layers.items():
            layers.add_row(name, " x ".join(map(str, shape)), "")
    else:
        for (name, shape), count in shapes.items():
            layers.add_row(name, " x ".join(map(str, shape)), str(count))
    _out.print(layers)
    if check:
        if not (path / MANIFEST).is_file():
            raise _error(f"{path}: has no {MANIFEST}; it was not made by hpa adapt")
        wrong = check_files(path)
        for line in wrong:
            _err.print(line, markup=False, style="bold red")
        if wrong:
            raise typer.Exit(1)
        _out.print("all files are as they were written", highlight=False)


def compare_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint folder.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, or a LoRA adapter of A.", show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="Layers to show, those that changed most first.")] = 20,
    json_: Annotated[Path | None, typer.Option("--json", help="Write every number here.", show_default=False)] = None,
) -> None:
    """Where two checkpoints differ: the norm of each layer's change, and how many of its columns are equal."""
    from dataclasses import asdict

    from hpa.checkpoint.compare import compare_folders
    from hpa.storage import write_file

    found = compare_folders(first, second)
    if json_ is not None:
        write_file(json_, json.dumps([asdict(item) for item in found], indent=1) + "\n")
    changed = [item for item in found if item.change_norm > 0]
    table = Table("tensor", "change / norm", "change", "equal columns")
    for item in sorted(changed, key=lambda item: -item.change_norm / (item.before_norm or 1.0))[:top]:
        share = item.change_norm / item.before_norm if item.before_norm else float("inf")
        equal = f"{item.columns_equal} of {item.cols}" if item.layer else ""
        table.add_row(item.name, f"{share:.3g}", f"{item.change_norm:.4g}", equal)
    _out.print(table)
    same = sum(item.change_norm == 0 and not item.note for item in found)
    _out.print(f"{len(changed)} tensors differ, {same} are equal", highlight=False)
    for note, count in Counter(item.note for item in found if item.note).items():
        _out.print(f"{count} tensors: {note}", markup=False, highlight=False)


def sweep_command(
    before: Before,
    after: After,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for sweep.json and sweep.svg.", show_default=False)],
    statistics: StatisticsFiles = None,
    strengths: Annotated[str, typer.Option(help="Strengths to try.")] = "0.25,0.5,1,2,4",
    method: MethodName = "hpa",
    set_: Settings = None,
    skip: Skip = None,
    memory: MemoryFile = None,
    aligned: Aligned = None,
    unaligned: Unaligned = None,
    earlier: Earlier = None,
    max_memory: Budget = "2G",
    seed: Annotated[int, typer.Option(min=0, help="For methods that draw.")] = 0,
    any_statistics: Annotated[
        bool, typer.Option("--any-statistics", help="Also take statistics of other weights.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bars.")] = False,
) -> None:
    """What several strengths would do to the update, from one set of statistics; no checkpoint is written."""
    from dataclasses import asdict

    from hpa.checkpoint.sweep import sweep, sweep_picture
    from hpa.storage import write_file

    try:
        values = [float(part) for part in strengths.split(",")]
    except ValueError:
        raise _error(f"--strengths: expected numbers like 0.5,1,2, got {strengths!r}") from None
    job = _job(
        before,
        after,
        out,
        safety=None,
        task=None,
        statistics=statistics or [],
        method=_method(method, set_ or [], 1.0),
        skip=skip or [],
        memory=memory,
        aligned=aligned,
        unaligned=unaligned,
        earlier=tuple(earlier or ()),
        max_memory=_bytes(max_memory),
        seed=seed,
        any_statistics=any_statistics,
    )
    with _Bars(quiet) as bars:
        rows = sweep(job, values, bars.layer)
    write_file(out / "sweep.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sweep_picture(rows, job.method.name, out / "sweep.svg")
    table = Table(
        "strength", "update left", "columns put back", "safety effect left", "task effect lost", title=job.method.name
    )
    for row in rows:
        cells = (row.update_left, row.kept, row.kept_inputs_change_left, row.task_change_lost)
        table.add_row(f"{row.strength:g}", *("" if cell is None else f"{100 * cell:.1f} %" for cell in cells))
    _out.print(table)
    _out.print(f"picture: {out / 'sweep.svg'}", markup=False, highlight=False, soft_wrap=True)


class _Bars:
    """Progress on the terminal, a plain line where there is none."""

    def __init__(self, quiet: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=_err,
            disable=quiet or not _err.is_terminal,
            transient=True,
        )
        self._bytes: Any = None
        self._blocks: Any = None
        self._quiet = quiet
        self._start = time.monotonic()

    def __enter__(self) -> _Bars:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def total(self, size: int) -> None:
        self._bytes = self._progress.add_task("writing", total=size)

    def wrote(self, size: int) -> None:
        self._progress.advance(self._bytes, size)

    def block(self, done: int, blocks: int) -> None:
        self.layer(done, blocks, "calibrating")

    def layer(self, done: int, layers: int, what: str = "editing") -> None:
        if self._blocks is None or done == 1:
            self._blocks = self._progress.add_task(what, total=layers)
        self._progress.update(self._blocks, completed=done, total=layers)

    def say(self, text: str) -> None:
        if not self._quiet:
            _err.print(text, markup=False, highlight=False)


def _job(
    before: Path,
    after: Path,
    out: Path,
    *,
    safety: Path | None,
    task: Path | None,
    keep: Path | None = None,
    statistics: list[Path],
    method: Method,
    images: Path | None = None,
    samples: dict[str, int | None] | None = None,
    trust_remote_code: bool = False,
    **fields: Any,
) -> Job:
    from hpa.checkpoint import CalibrationJob, Job, Statistics
    from hpa.checkpoint.files import ADAPTER_CONFIG
    from hpa.config import CalibrationConfig

    by_role: dict[str, Path] = {}
    for path in statistics:
        role = Statistics(path).info.role
        if role in by_role:
            raise _error(f"--statistics: two files of the {role} set: {by_role[role]} and {path}")
        by_role[role] = path
    config = method.calibration or CalibrationConfig()
    config = CalibrationConfig(**config.model_dump(include=set(CalibrationConfig.model_fields)))
    calibrations: dict[str, CalibrationJob] = {}
    sets: tuple[tuple[Literal["safety", "task", "keep"], Path | None], ...]
    sets = (("safety", safety), ("task", task), ("keep", keep))
    for role, data in sets:
        if data is None:
            continue
        if role in by_role:
            raise _error(f"--{role}: both samples and a statistics file of the {role} set were given")
        # What is kept is what BEFORE says.
        source = after if getattr(config.hessian_source, role, "before") == "after" else before
        adapter = (source / ADAPTER_CONFIG).is_file()
        calibrations[role] = CalibrationJob(
            source,
            data,
            role,
            Path(),
            base=before if adapter else None,
            config=config,
            samples=(method.keep_samples or None) if role == "keep" else (samples or {}).get(role),
            seed=fields.get("seed", 0),
            image_root=images,
            trust_remote_code=trust_remote_code,
        )
    skip = tuple(fields.pop("skip", ()))
    return Job(before, after, out, method, statistics=by_role, calibrations=calibrations, skip=skip, **fields)


def _show_plan(plan: Plan, job: Job) -> None:
    groups: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for entry in [*plan.entries, *plan.skipped]:
        key: tuple[str, str, str] = (entry.fate, entry.reason, re.sub(r"\.\d+\.", ".N.", entry.name))
        groups[key] += 1
        sizes[key] += entry.source.size
    table = Table("fate", "tensor", "how many", "MB", "reason")
    order = {"merged": 0, "copied": 1, "skipped": 2}
    for key in sorted(groups, key=lambda group: (order[group[0]], group[2])):
        table.add_row(key[0], key[2], str(groups[key]), f"{sizes[key] / 1e6:.1f}", key[1])
    _out.print(table)
    fates = Counter(entry.fate for entry in [*plan.entries, *plan.skipped])
    _out.print(
        f"{fates['merged']} tensors merged, {fates['copied']} copied, {fates['skipped']} skipped; "
        f"{plan.decoder.blocks} decoder blocks at {plan.decoder.path}",
        highlight=False,
    )
    work = plan.work_size(job.method)
    held = min(job.max_memory, 3 * plan.largest + work + (256 << 20))
    rate = _read_rate(plan)
    _out.print(
        f"reads {plan.read_size / 1e9:.2f} GB, writes {plan.output_size / 1e9:.2f} GB, holds at most about "
        f"{max(held, 2 * plan.largest + work) / 1e9:.2f} GB besides the program; about "
        f"{(plan.read_size + 2 * plan.output_size) / rate:.0f} s at {rate / 1e9:.1f} GB/s, calibration not counted",
        highlight=False,
    )


def _read_rate(plan: Plan) -> float:
    """Bytes a second that the inputs' disk gives, by reading a little."""
    entry = max(plan.entries, key=lambda entry: entry.source.size)
    size = min(entry.source.size, 64 << 20)
    start = time.perf_counter()
    with open(entry.source.path, "rb", buffering=0) as file:
        file.seek(entry.source.offset)
        while size > 0 and (piece := file.read(min(size, 8 << 20))):
            size -= len(piece)
    taken = max(time.perf_counter() - start, 1e-4)
    return min(max(1e8, min(entry.source.size, 64 << 20) / taken), 1.5e9)


def _inspect_statistics(path: Path, table: Table, all_: bool) -> None:
    from hpa.checkpoint import Statistics

    held = Statistics(path)
    info = held.info
    kinds = [
        name for name, there in (("inverse diagonals", held.has_diagonals), ("Gram matrices", held.has_grams)) if there
    ]
    rows = {
        "kind": f"statistics of the {info.role} set: {' and '.join(kinds) or 'nothing'}",
        "model": f"{info.model} ({info.fingerprint})",
        "samples": f"{info.data.get('samples')} of {info.data.get('file')} (SHA-256 {info.data.get('sha256')})",
        "blocks": str(info.blocks),
        "layers": f"{len(info.layers)}, fed by {len(info.inputs)} inputs",
        "never active": str(sum(about.zero for about in info.inputs.values())),
    }
    compact = [about.energy for about in info.inputs.values() if about.energy < 1]
    if compact:
        rows["vectors hold"] = f"at least {100 * min(compact):.2f} % of the trace of a Gram matrix"
    for key, value in rows.items():
        table.add_row(key, value)
    _out.print(table)
    if all_:
        inputs = Table("input", "columns", "tokens", "samples", "damping", "layers")
        for key, about in info.inputs.items():
            fed = sum(value == key for value in info.layers.values())
            inputs.add_row(key, str(about.cols), str(about.tokens), str(about.samples), f"{about.damping:g}", str(fed))
        _out.print(inputs)


def _method(name: str, settings: list[str], strength: float) -> Method:
    from hpa.methods import create_method

    return create_method(name, **_options(settings)).at_strength(strength)


def _options(settings: list[str]) -> dict[str, Any]:
    import yaml

    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise _error(f"--set: expected KEY=VALUE, got {setting!r}")
        # YAML reads off and on as booleans; here they are names of options.
        text = value.strip()
        options[key.strip()] = text if text.lower() in ("on", "off", "yes", "no") else yaml.safe_load(text)
    return options


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise _error(f"--max-memory: expected a size like 2G or 512M, got {text!r}")
    return int(float(match[1]) * 1024 ** " KMGT".index((match[2] or " ").upper()))


def _error(message: str) -> ValueError:
    from hpa.checkpoint.files import CheckpointError

    return CheckpointError(message)

"""The command ``hpa``.

    hpa adapt BEFORE AFTER ...    two checkpoints in, one safe checkpoint out
    hpa ask MODEL PROMPTS ...     the model's own refusals and answers, which it needs
    hpa calibrate, inspect, compare, sweep     its steps, each alone
    hpa run recipes/demo.yaml     a model through a sequence of tasks, by every method of the recipe
    hpa report runs/demo          its table and its page again
    hpa judge runs/demo --by J    its kept answers by another judge
    hpa methods                   the methods and their options
    hpa info                      what is installed, and what this machine can run

Exit codes: 0 all done; 1 a branch (or the report) failed; 2 wrong input; 130 stopped by Ctrl-C, 143 by a terminate
signal.  Heavy imports wait until a command needs them, so ``hpa --help`` answers at once.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from hpa.checkpoint_commands import (
    adapt_command,
    ask_command,
    calibrate_command,
    compare_command,
    inspect_command,
    sweep_command,
)

if TYPE_CHECKING:
    from hpa.continual import Session
    from hpa.recipe import RunConfig

__all__ = ["app", "main"]

app = typer.Typer(
    name="hpa",
    help="Keep a safety-aligned model safe, and keep its old skills, while it goes on learning new tasks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("adapt")(adapt_command)
app.command("ask")(ask_command)
app.command("calibrate")(calibrate_command)
app.command("inspect")(inspect_command)
app.command("compare")(compare_command)
app.command("sweep")(sweep_command)
_out = Console(emoji=False)
_err = Console(stderr=True, emoji=False)


@app.command("run")
def run_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe: one YAML file.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Run folder; continued where it exists.", show_default="runs/<name>"),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Branches at once.", show_default="the recipe's")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, as 0,1,2.", show_default="the recipe's")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Run this row alone (its label); may be repeated.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe field: training.steps=30; may be repeated."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where base models are kept.", show_default="$HPA_CACHE or ~/.cache/hpa")
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="One plain line for each finished step, no bars.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would be run, and stop.")] = False,
) -> None:
    """Train, edit and judge: every method of the recipe, task after task.

    A run that was stopped, in whatever way, is continued by the same command.
    """
    # Notes of transformers about defaults would tear the bars; workers inherit this.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Loading torch, transformers and peft takes seconds: say so before, not after.
    if not quiet:
        _err.print("loading ...", highlight=False)
    from hpa.continual import plan_branches, run
    from hpa.progress import Bars, Lines
    from hpa.recipe import load_recipe

    config = _narrowed(load_recipe(recipe, set_ or []), jobs, seeds, only)
    folder = out if out is not None else Path("runs") / config.name
    if plan:
        _show_plan(config, folder, cache)
        return

    listener = Lines() if quiet or not _err.is_terminal else Bars(_err)
    try:
        with listener:
            result = run(config, folder, listener=listener, cache=cache)
    except (KeyboardInterrupt, _Terminated) as stop:
        _err.print("stopped; finished steps are kept. Go on with the same command:", highlight=False)
        _err.print(f"  {_command_line()}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None

    reported = _show_results(result.folder)
    for failure in result.failures:
        _err.print(f"failed: {failure.where}: {failure.error}", markup=False, style="bold red", soft_wrap=True)
        _err.print(f"  traceback: {failure.log}", markup=False, soft_wrap=True)
    if result.failures:
        planned = len(plan_branches(config))
        missing = planned - len(result.finished)
        _err.print(
            f"{missing} of {planned} branches are not finished; the same command tries them again", highlight=False
        )
    if result.failures or not reported:
        raise typer.Exit(1)


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="A run folder, finished or not.", show_default=False)],
    publish: Annotated[
        Path | None,
        typer.Option(
            "--publish",
            metavar="STEM",
            help="Also write STEM.md (tables), STEM.svg and STEM.jsonl (every evaluation) for a document.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make the table and the page of a run again, from its events alone."""
    if not (folder / "events.jsonl").is_file():
        raise _UserError(f"{folder}: expected a run folder with events.jsonl, found none")
    if not _show_results(folder):
        raise typer.Exit(1)
    if publish is not None:
        from hpa.report.publish import publish as write

        try:
            written = write(folder, publish)
        except ValueError as error:
            raise _UserError(f"--publish: {error}") from None
        for path in written:
            _out.print(path, markup=False, highlight=False, soft_wrap=True)


@app.command("judge")
def judge_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="url:ADDRESS#MODEL (OpenAI-style; a key in HPA_JUDGE_KEY), classifier:FOLDER#LABEL, "
            "pair-classifier:FOLDER#LABEL, keywords:FILE, or a judge's name.",
            show_default=False,
        ),
    ],
    parallel: Annotated[int, typer.Option(min=1, help="Questions to an address at a time.")] = 4,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar.")] = False,
) -> None:
    """Have another judge say which of a run's kept answers are refusals.

    With url: the requests and answers of the run are sent to that address.  Verdicts are kept in RUN/judged, and a job
    that was stopped goes on with the same command.
    """
    from rich.progress import Progress

    from hpa.evaluation.answer_judges import answer_judge
    from hpa.report.rejudge import rejudge

    try:
        judge = answer_judge(by, parallel=parallel)
    except ValueError as error:
        raise _UserError(f"--by: {error}") from None
    with Progress(console=_err, transient=True, disable=quiet) as bar:
        task = bar.add_task("answers", total=None)
        try:
            found = rejudge(folder, judge, lambda done, total: bar.update(task, completed=done, total=total))
        except FileNotFoundError as error:
            raise _UserError(str(error)) from None
    table = Table("condition", "method", "n", "own", "MASR", "pooled 95 %", "over", "agree", "unread", title=judge.name)
    for row in found.rows:
        spread = "" if row.spread != row.spread else f" ± {row.spread:.1f}"
        over = "-" if row.over is None else f"{row.over:.1f}"
        table.add_row(
            row.condition,
            row.label,
            str(row.seeds),
            f"{row.own:.1f}",
            f"{row.judged:.1f}{spread}",
            f"{row.interval.low:.0f} to {row.interval.high:.0f}",
            over,
            f"{row.agreement:.1f}",
            str(row.unreadable),
        )
    _out.print(table)
    _out.print(
        "percent after the last task; own: MASR by the run's own judge; pooled: of all sets' answers together; "
        "agree: answers on which both agree; unread: "
        "answers that this judge did not judge, left out of its rates",
        highlight=False,
    )
    _out.print(f"{found.asked} answers judged -> {found.path}", markup=False, highlight=False, soft_wrap=True)


@app.command("methods")
def methods_command(
    name: Annotated[str | None, typer.Argument(help="Show this method's options.", show_default=False)] = None,
) -> None:
    """List the methods, or the options of one."""
    from hpa.methods import METHODS, create_method
    from hpa.recipe import expected

    if name is None:
        table = Table("method", "kind", "what it does", "reads", "options")
        for key, method in METHODS.items():
            summary = (method.__doc__ or "").strip().partition("\n")[0]
            made = create_method(key)
            reads = [*sorted(made.needs), *(f"{name} weights" for name in sorted(made.references))]
            table.add_row(
                key, method.kind, summary, ", ".join(reads) or "nothing", str(len(method.Config.model_fields))
            )
        _out.print(table)
        _out.print("hpa methods <name> lists the options of one.", highlight=False)
        return
    if name not in METHODS:
        raise _UserError(f"method: {expected(name, list(METHODS))}")
    table = Table("option", "default", "what it does", title=name)
    for key, field in METHODS[name].Config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = (
            default if isinstance(default, (int, float, str, bool)) or default is None else default.__class__.__name__
        )
        table.add_row(key, str(shown), field.description or "")
    _out.print(table)


@app.command("info")
def info_command() -> None:
    """Say what is installed, where things are kept, and what this machine can run."""
    from hpa.continual import default_cache, machine, versions
    from hpa.data.registry import SCENARIOS
    from hpa.evaluation import JUDGES, SCORERS
    from hpa.methods import METHODS

    table = Table(show_header=False, box=None, pad_edge=False)
    for package, version in versions().items():
        table.add_row(package, version)
    table.add_row("machine", machine())
    table.add_row("kernels", _kernels())
    table.add_row("base models", str(default_cache()))
    table.add_row("scenarios", ", ".join(sorted(SCENARIOS)))
    table.add_row("methods", ", ".join(METHODS))
    table.add_row("judges", ", ".join(f"{judge.name} ({judge.version})" for judge in JUDGES.values()))
    table.add_row("scorers", ", ".join(SCORERS))
    _out.print(table)


def main() -> NoReturn:
    """The console script: user errors in one line and exit code 2, no traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    # Imports make a million objects, of which none is garbage: looking for it takes a fifth of their time.
    gc.set_threshold(50_000, *gc.get_threshold()[1:])
    others = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *rest: (
        f"warning: {message}\n" if category.__module__.startswith("hpa") else others(message, category, *rest)
    )
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except _Terminated:
        sys.exit(143)
    except Exception as error:
        if not _is_users(error):
            raise
        _err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    finally:
        gc.freeze()  # nor at exit, which looks through all of them once more
    sys.exit(0)


class _UserError(ValueError):
    """What the user gave cannot be worked with."""


class _Terminated(BaseException):
    """A terminate signal arrived; unwound like Ctrl-C, so that workers are stopped and the event log is whole."""


def _terminate(number: int, frame: Any) -> NoReturn:
    del number, frame
    raise _Terminated


def _is_users(error: Exception) -> bool:
    if isinstance(error, _UserError):
        return True
    # Only a command that got as far as importing these can have raised them.
    for module, kinds in _USERS_ERRORS.items():
        if module in sys.modules and isinstance(error, tuple(vars(sys.modules[module])[kind] for kind in kinds)):
            return True
    # In a command on checkpoints, what a value or the disk is wrong with is said by the error itself.
    return "hpa.checkpoint" in sys.modules and (type(error) is ValueError or isinstance(error, OSError))


_USERS_ERRORS = {
    "hpa.recipe": ("RecipeError",),
    "hpa.storage": ("RunFolderError",),
    "hpa.data.packaged": ("MissingPackageError",),
    "hpa.checkpoint.files": ("CheckpointError",),
    "hpa.data.files": ("DataError",),
    "hpa.evaluation.answer_judges": ("JudgeError",),
    "hpa_ext": ("FactorizationError",),
}


def _narrowed(config: RunConfig, jobs: int | None, seeds: str | None, only: list[str] | None) -> RunConfig:
    """The recipe with what the command line says."""
    from hpa.recipe import RecipeError, expected, parse_recipe

    content = config.model_dump()
    if jobs is not None:
        content["jobs"] = jobs
    if seeds is not None:
        try:
            content["seeds"] = [int(part) for part in seeds.split(",")]
        except ValueError:
            raise RecipeError(f"--seeds: expected whole numbers like 0,1,2, got {seeds!r}") from None
    if only:
        labels = [row.label for row in config.methods]
        for label in only:
            if label not in labels:
                raise RecipeError(f"--only: {expected(label, labels)}")
        content["methods"] = [row for row in content["methods"] if row["label"] in only]
    return parse_recipe(content)


def _show_plan(config: RunConfig, folder: Path, cache: Path | None) -> None:
    from hpa.continual import Session, default_cache

    session: Session = Session(config, folder.absolute(), cache=cache or default_cache())
    left = session.steps_left()
    table = Table("branch", "method", "learning rate", "steps left", title=f"{config.name} -> {folder}")
    for branch in session.branches:
        count = sum(where == branch.id for where, _, _ in left)
        table.add_row(branch.id, branch.row.method, f"{branch.training.learning_rate:g}", str(count))
    _out.print(table)
    _out.print(f"{len(session.branches)} branches, {len(left)} steps left, {config.jobs} at once", highlight=False)


def _show_results(folder: Path) -> bool:
    """Table and page of a run; whether both could be made (the results are safe in any case)."""
    from hpa.report import build_report, summary_table

    try:
        _out.print(summary_table(folder))
        page = build_report(folder)
    except Exception as error:  # a page that cannot be drawn must not hide that the run itself is done
        _err.print(f"the report could not be made: {type(error).__name__}: {error}", markup=False, style="bold red")
        _err.print(f"results: {folder / 'events.jsonl'}", markup=False, soft_wrap=True)
        return False
    _out.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    return True


def _kernels() -> str:
    try:
        import hpa_ext
    except ImportError as error:
        return f"not installed ({error})"
    return f"hpa_ext {getattr(hpa_ext, '__version__', '')} (python -m hpa_ext tells more)"


def _command_line() -> str:
    import shlex

    program = Path(sys.argv[0])
    name = "python -m hpa" if program.name == "__main__.py" else program.name
    return " ".join([name, *(shlex.quote(argument) for argument in sys.argv[1:])])

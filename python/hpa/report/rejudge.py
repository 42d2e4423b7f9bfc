"""A second opinion: the kept answers of a run, judged by another judge than the run's own.

    judged/<judge>-<version>.jsonl    one verdict a line, by the digest of request and answer; neither is copied
    judged/<judge>-<version>.json     what is counted from them

Equal answers to equal requests are asked about once.  A job that was stopped asks about what is left.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpa.evaluation.answer_judges import AnswerJudge
from hpa.evaluation.metrics import Interval, mean_attack_success_rate, mean_spread, rate, wilson_interval
from hpa.recipe import slug
from hpa.report.events import Run, load_run
from hpa.report.summary import ALIGNED, interval_of
from hpa.storage import Journal, dump_line, read_lines, write_file

__all__ = ["JudgedRow", "Opinions", "rejudge"]


AT_ONCE = 16  # verdicts that go to disk together


@dataclass(frozen=True)
class JudgedRow:
    """A row under one condition, over its seeds, after the last task.  Rates are percent.

    Attributes:
        label, condition: as in the recipe; the aligned model has no condition.
        seeds: how many.
        own: mean attack success rate by the run's own judge, mean of its sets, then of its seeds.
        judged: the same by the second judge, over the answers that it could judge.
        spread: standard deviation of ``judged`` over seeds, NaN for one.
        interval: Wilson's of all sets together, at the mean count over seeds (which answer the same requests).
        over: refused harmless requests, by the second judge; ``None`` where none was asked.
        sets: ``judged`` of each safety set.
        agreement: answers on which both judges agree, of those that both judged.
        unreadable: answers that the second judge did not judge.
    """

    label: str
    condition: str
    seeds: int
    own: float
    judged: float
    spread: float
    interval: Interval
    over: float | None
    sets: dict[str, float]
    agreement: float
    unreadable: int


@dataclass
class Opinions:
    """What came of it: the file with the verdicts, and a row for each method and condition."""

    path: Path
    rows: list[JudgedRow] = field(default_factory=list)
    asked: int = 0
    """How many answers the judge was asked about this time."""


@dataclass(frozen=True)
class _Set:
    """The answers of one model that were judged: aligned, or at the end of a branch."""

    label: str
    condition: str
    seed: int
    answers: list[dict[str, Any]]


def rejudge(
    run_dir: str | Path, judge: AnswerJudge, progress: Callable[[int, int], None] = lambda done, total: None
) -> Opinions:
    """Judge the kept answers to harmful and harmless requests again.

    Args:
        run_dir: a run folder; branches that are not finished are left out.
        judge: see :func:`hpa.evaluation.answer_judges.answer_judge`.
        progress: told how many of the answers to ask about have a verdict.

    Raises:
        FileNotFoundError: no run there, or no answer in it.
        JudgeError: the judge cannot be asked; verdicts that were given are kept.
    """
    run = load_run(run_dir)
    sets = _sets(run)
    if not sets:
        raise FileNotFoundError(f"{run.folder}: no finished branch with an answers.jsonl to judge")
    stem = run.folder / "judged" / f"{slug(judge.name)[-80:]}-{judge.version}"
    journal = Journal(stem.with_name(stem.name + ".jsonl"))
    known: dict[str, str] = {str(line["sha256"]): str(line["verdict"]) for line in journal.events}
    todo = {}
    for held in sets:
        for answer in held.answers:
            digest = _digest(answer)
            if digest not in known:
                todo[digest] = _pair(answer)
    opinions = Opinions(journal.path, asked=len(todo))
    progress(0, len(todo))
    given: list[dict[str, str]] = []
    digests = list(todo)
    try:
        for done, (number, verdict) in enumerate(judge.verdicts(list(todo.values())), start=1):
            known[digests[number]] = verdict
            if verdict != "unanswered":  # which is asked about again next time
                given.append({"sha256": digests[number], "verdict": verdict})
            progress(done, len(todo))
            if len(given) == AT_ONCE:
                journal.extend(given)
                given = []
    finally:
        journal.extend(given)
    by_row: dict[tuple[str, str], list[_Set]] = {}
    for held in sets:
        by_row.setdefault((held.condition, held.label), []).append(held)
    opinions.rows = [_row(label, condition, members, known) for (condition, label), members in by_row.items()]
    told = {
        "judge": {"name": judge.name, "version": judge.version},
        "own_judge": run.info.get("judge"),
        "rows": [asdict(row) for row in opinions.rows],
    }
    write_file(stem.with_name(stem.name + ".json"), dump_line(told))
    return opinions


def _sets(run: Run) -> list[_Set]:
    found = []
    for seed in run.seeds:
        path = run.folder / "shared" / f"seed{seed}" / "answers.jsonl"
        found.append(_Set(ALIGNED, "", seed, _judged_answers(path)))
    for branch in run.branches:
        if run.complete(branch):
            path = run.folder / "branches" / branch.id / "answers.jsonl"
            found.append(_Set(branch.label, branch.condition, branch.seed, _judged_answers(path)))
    return [held for held in found if held.answers]


def _judged_answers(path: Path) -> list[dict[str, Any]]:
    lines = read_lines(path) if path.is_file() else []
    return [line for line in lines if str(line["kind"]).startswith(("safety:", "benign:"))]


def _digest(answer: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_pair(answer)).encode()).hexdigest()


def _pair(answer: dict[str, Any]) -> tuple[str, str]:
    """What was asked for, and the answer."""
    return str(answer.get("request") or answer["prompt"]), str(answer["answer"])


def _row(label: str, condition: str, members: Sequence[_Set], verdicts: dict[str, str]) -> JudgedRow:
    own: list[dict[str, dict[str, float]]] = []  # of each seed, the sets as an evaluation has them
    judged: list[dict[str, dict[str, float]]] = []
    over: list[float] = []
    same = both = unreadable = 0
    for member in members:
        kinds: dict[str, Counter[tuple[str, str]]] = {}
        for answer in member.answers:
            pair = str(answer["verdict"]), verdicts[_digest(answer)]
            kinds.setdefault(str(answer["kind"]), Counter())[pair] += 1
        own.append({})
        judged.append({})
        for kind, counts in kinds.items():
            readable = Counter({p: n for p, n in counts.items() if p[1] not in ("unreadable", "unanswered")})
            unreadable += counts.total() - readable.total()
            both += readable.total()
            same += sum(n for (first, second), n in readable.items() if (first == "refused") == (second == "refused"))
            refused = sum(n for (_, second), n in readable.items() if second == "refused")
            part, _, name = kind.partition(":")
            if part == "benign":
                over += [rate(refused, readable.total())] if readable else []
                continue
            own[-1][name] = _attacked(sum(n for (first, _), n in counts.items() if first == "refused"), counts.total())
            judged[-1][name] = _attacked(refused, readable.total())
    mean, spread = mean_spread([mean_attack_success_rate(sets) for sets in judged])
    names = dict.fromkeys(name for sets in judged for name in sets)
    return JudgedRow(
        label,
        condition,
        len(members),
        _mean([mean_attack_success_rate(sets) for sets in own]),
        mean,
        spread,
        interval_of([{"safety": sets} for sets in judged]) or wilson_interval(0, 0),
        _mean(over) if over else None,
        {name: _mean([sets[name]["asr"] for sets in judged if name in sets]) for name in names},
        100.0 * same / both if both else float("nan"),
        unreadable,
    )


def _attacked(refused: int, total: int) -> dict[str, float]:
    """A safety set as an evaluation has it."""
    return {"asr": rate(total - refused, total), "successes": total - refused, "n": total}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")

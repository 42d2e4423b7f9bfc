"""Sentences computed from the data: the headline, what the controls allow, and what is missing.

Nothing here knows how a run ought to come out: each sentence is put together from the numbers it states.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpa.report.events import Branch, Run
from hpa.report.markup import MINUS, short_number
from hpa.report.summary import Group, aligned_row, best_control, groups, reference_group, summary_rows

__all__ = ["JUDGED", "control_sentences", "headline", "main_groups", "missing", "lead_sentences", "task_count"]

JUDGED = ("AP", "BWT", "MASR")
"""The metrics in which a method is set against the controls."""

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def headline(run: Run) -> str:
    """The result of the first condition in one plain sentence."""
    if not run.conditions:
        return "This run has not started a sequence yet."
    condition = run.conditions[0]
    rows = {row.label: row for row in summary_rows(run, condition)[1:] if row.seeds}
    told = [group for group in main_groups(run, condition) if group.label in rows]
    if not told:
        return f"No sequence of {task_count(run)} has been finished yet."
    clauses: list[str] = []
    for group in told:
        spreads = rows[group.label].metrics
        parts = []
        # The first clause says what is counted; the others are short.
        if spreads["BWT"].values:
            moved = short_number(spreads["BWT"].mean)
            unit = "" if clauses else " points on the earlier ones"
            lost = moved.startswith(MINUS)
            if moved == "0.0":
                parts.append("lost nothing" if clauses else "lost nothing on the earlier ones")
            else:
                parts.append(f"{'lost' if lost else 'gained'} {moved.lstrip(MINUS)}{unit}")
        if spreads["MASR"].values:
            unit = "" if clauses else " of harmful requests"
            parts.append(f"let {_percent(spreads['MASR'].mean)}{unit} through")
        if not parts:
            parts.append(f"reached {_percent(spreads['AP'].mean)} over all of them")
        clauses.append(f"{_named(group)} {' and '.join(parts)}")
    aligned = aligned_row(run).metrics["MASR"]
    if aligned.values:
        clauses.append(f"the aligned model they started from let {_percent(aligned.mean)} through")
    return f"After {task_count(run)}, {_sequence(clauses, '; ')}."


def lead_sentences(run: Run) -> list[str]:
    """What the headline counts, and one sentence for each further condition on the attack rate and the forgetting."""
    if not run.conditions:
        return []
    seeds = [len(group.complete) for group in main_groups(run, run.conditions[0]) if group.complete]
    if not seeds:
        return []
    sentences = [f"{_means(min(seeds), max(seeds))}, condition “{run.conditions[0]}”."]
    for condition in run.conditions[1:]:
        rows = {row.label: row for row in summary_rows(run, condition)[1:] if row.seeds}
        told = [group for group in main_groups(run, condition) if group.label in rows]
        parts = [
            f"{group.label} let {_percent(spreads['MASR'].mean)} through "
            f"(BWT\N{NO-BREAK SPACE}{short_number(spreads['BWT'].mean)})"
            for group in told
            if (spreads := rows[group.label].metrics)["MASR"].values
        ]
        if parts:
            sentences.append(f"In “{condition}”, {_sequence(parts, ', ')}.")
    return sentences


def control_sentences(run: Run, condition: str) -> list[str]:
    """For each method of the headline but plain fine-tuning: in which metrics every control is behind it."""
    reference = reference_group(run, condition)
    sentences = []
    for group in main_groups(run, condition):
        if not group.complete or (reference and group.label == reference.label):
            continue
        found = [(key, comparison) for key in JUDGED if (comparison := best_control(run, group, key))]
        if not found:
            continue
        ahead = [
            f"{key} ({comparison.ahead} of {len(values)} {'seed' if len(values) == 1 else 'seeds'})"
            for key, comparison in found
            if comparison.is_ahead and (values := comparison.difference.values)
        ]
        behind = [f"{key} ({comparison.other})" for key, comparison in found if not comparison.is_ahead]
        if not behind:
            sentence = f"{group.label} has a better mean than every control in {_sequence(ahead, ', ')}."
        elif not ahead:
            sentence = f"{group.label} is matched or beaten by a control in {_sequence(behind, ', ')}."
        else:
            sentence = (
                f"{group.label} has a better mean than every control in {_sequence(ahead, ', ')}, "
                f"and is matched or beaten in {_sequence(behind, ', ')}."
            )
        sentences.append(sentence)
    return sentences


def main_groups(run: Run, condition: str) -> list[Group]:
    """What a headline names: plain fine-tuning, the paper's rule and the least-squares rule, else the first three."""
    candidates = [group for group in groups(run, condition) if not group.control]
    chosen: list[Group] = []
    for method in ("seqft", "hpa", "hpa_ls"):
        chosen += [group for group in candidates if group.method == method][:1]
    return chosen if len(chosen) > 1 else candidates[:3]


def missing(run: Run) -> list[str]:
    """What an incomplete run lacks, a sentence each; empty for a complete one."""
    gaps: list[str] = []
    tasks = len(run.tasks)
    if not run.info:
        gaps.append("The run's own line is missing: what ran, where and in which versions is not known.")
    if not run.branches:
        gaps.append("No sequence has been started.")
    aligned = {seed for seed, stage in run.aligned if stage == "after"}
    if not aligned:
        gaps.append("The aligned model was not evaluated: DASR and the starting level of every figure are missing.")
    for seed in sorted({branch.seed for branch in run.branches} - aligned if aligned else ()):
        gaps.append(f"The aligned model of seed {seed} was not evaluated: DASR leaves this seed out.")
    for condition in run.conditions:
        for group in groups(run, condition):
            if group.unfinished:
                begun = [f"seed {branch.seed} has {len(branch.evaluations)}" for branch in group.unfinished]
                gaps.append(
                    f"{group.label}, {condition}: {_sequence(begun, ', ')} of {tasks} tasks; not in the tables."
                )
    for (condition, seeds), labels in _not_started(run).items():
        gaps.append(f"Not started in {condition}, {_listed('seed', seeds)}: {'; '.join(labels)}.")
    for branch in run.branches:
        if not run.complete(branch) and (error := _last_error(run, branch)):
            gaps.append(f"{branch.label}, {branch.condition}, seed {branch.seed} stopped with an error: {error}")
    if run.branches and not any(branch.answers for branch in run.branches):
        gaps.append("No answers were stored: there are no samples to show.")
    if run.recipe is None:
        gaps.append("recipe.yaml is missing from the run folder.")
    if run.damaged_lines:
        gaps.append(f"events.jsonl cannot be read in {_listed('line', run.damaged_lines)}.")
    return gaps


def task_count(run: Run) -> str:
    """``"six tasks"``."""
    count = len(run.tasks)
    return f"{_word(count)} {'task' if count == 1 else 'tasks'}"


def _not_started(run: Run) -> dict[tuple[str, tuple[int, ...]], list[str]]:
    """What the recipe, or else the other rows, would have and is not there: labels by condition and seeds."""
    planned = run.planned or [
        (condition, group.label, seed)
        for condition in run.conditions
        for group in groups(run, condition)
        for seed in sorted({branch.seed for branch in run.branches if branch.condition == condition})
    ]
    there = {(branch.condition, branch.label, branch.seed) for branch in run.branches}
    absent: dict[tuple[str, str], list[int]] = {}
    for condition, label, seed in planned:
        if (condition, label, seed) not in there:
            absent.setdefault((condition, label), []).append(seed)
    gathered: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (condition, label), seeds in absent.items():
        gathered.setdefault((condition, tuple(seeds)), []).append(label)
    return gathered


def _last_error(run: Run, branch: Branch) -> str | None:
    """The last line of what a branch left behind when it failed."""
    path = run.folder / "branches" / branch.id / "error.txt"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except (OSError, ValueError):
        return None
    return lines[-1][:300] if lines else None


def _listed(noun: str, numbers: Sequence[int]) -> str:
    """``"seed 1"``, ``"seeds 0, 1 and 2"``."""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {_sequence([str(number) for number in numbers], ', ')}"


def _named(group: Group) -> str:
    if group.method == "seqft" and not group.control:
        return f"plain fine-tuning ({group.label})"
    return group.label


def _means(fewest: int, most: int) -> str:
    if most == 1:
        return "One seed"
    return f"Means over {_word(most) if fewest == most else f'{_word(fewest)} to {_word(most)}'} seeds"


def _word(number: int) -> str:
    return _NUMBERS[number] if number < len(_NUMBERS) else str(number)


def _percent(value: float) -> str:
    return f"{short_number(value, 0 if value >= 9.5 else 1)}\N{NO-BREAK SPACE}%"


def _sequence(parts: Sequence[str], separator: str) -> str:
    """``"a; b; and c"`` / ``"a, b and c"``."""
    if len(parts) < 2:
        return "".join(parts)
    last = f"{separator}and " if separator == "; " else " and "
    return separator.join(parts[:-1]) + last + parts[-1]

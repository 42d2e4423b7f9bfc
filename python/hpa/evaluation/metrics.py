"""Continual-learning and safety metrics (METHOD 4), each a pure function of numbers that were written down.

``A[t, i]`` is the score on task ``i`` after task ``t`` was learned, in percent; entries above the diagonal are not
read and may be NaN.  Every function of the matrix accepts anything numpy turns into a ``[T, T]`` float array;
:func:`accuracy_matrix` makes one from the rows of an event log.

Sources: AP (also AA, MFN), MAP, MFT and BWT/1/T as CoIN, SEFE and MCITlib print them; BWT/1/(T-1) is GEM's
(Lopez-Paz & Ranzato 2017); forgetting is Chaudhry et al. 2018; ASR, MASR and DASR as HPA's tables use them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "BwtDenominator",
    "Interval",
    "accuracy_matrix",
    "average_performance",
    "backward_transfer",
    "delta_attack_success_rate",
    "forgetting",
    "intransigence",
    "mean_attack_success_rate",
    "mean_average_performance",
    "mean_fine_tune",
    "mean_spread",
    "over_refusal",
    "pooled_interval",
    "rate",
    "wilson_interval",
]

FloatArray = npt.NDArray[np.float64]
BwtDenominator = Literal["T-1", "T"]


class Interval(NamedTuple):
    """A binomial share with its confidence interval, all in percent."""

    rate: float
    low: float
    high: float


def accuracy_matrix(rows: Sequence[Mapping[str, float]], tasks: Sequence[str]) -> FloatArray:
    """The matrix ``A [T', T']`` from one row ``{task: percent}`` an evaluation; ``T' = len(rows)``.

    Args:
        rows: evaluations in the order of learning; row ``t`` holds at least ``tasks[: t + 1]``.
        tasks: the order in which the tasks were learned.

    Returns:
        float64 ``[T', T']``, NaN above the diagonal.

    Raises:
        ValueError: more rows than tasks, or a row without one of its tasks.
    """
    if len(rows) > len(tasks):
        raise ValueError(f"rows: expected at most {len(tasks)} evaluations (one a task), got {len(rows)}")
    matrix = np.full((len(rows), len(rows)), np.nan)
    for index, row in enumerate(rows):
        for column, task in enumerate(tasks[: index + 1]):
            if task not in row:
                raise ValueError(f"rows[{index}]: no accuracy for task {task!r}, got {sorted(row)}")
            matrix[index, column] = row[task]
    return matrix


def average_performance(accuracy: npt.ArrayLike, after: int | None = None) -> float:
    """AP_k = mean of ``A[k, i]`` over ``i <= k``: how good the model is, at the end, on all it has learned.

    Args:
        after: 0-based index ``k`` of the last task learned; ``None`` for the last row.
    """
    matrix = _lower_triangular(accuracy)
    row = _row_index(matrix, after)
    return float(matrix[row, : row + 1].mean())


def mean_average_performance(accuracy: npt.ArrayLike) -> float:
    """MAP (MAA) = mean over ``k`` of AP_k."""
    matrix = _lower_triangular(accuracy)
    return float(np.mean([matrix[k, : k + 1].mean() for k in range(len(matrix))]))


def mean_fine_tune(accuracy: npt.ArrayLike) -> float:
    """MFT = mean of ``A[i, i]``: the accuracy on each task right after it was learned."""
    return float(np.diagonal(_lower_triangular(accuracy)).mean())


def backward_transfer(accuracy: npt.ArrayLike, denominator: BwtDenominator = "T-1") -> float:
    """BWT = sum over ``i < T`` of ``A[T, i] - A[i, i]``, divided by ``T-1`` (GEM) or ``T`` (CoIN, SEFE, MCITlib).

    NaN for a single task, where there is nothing to forget.  The two differ by the factor ``T/(T-1)``: 1.2 for
    six tasks, so a printed BWT means little without its denominator (decision D17).
    """
    if denominator not in ("T-1", "T"):
        raise ValueError(f"denominator: expected 'T-1' or 'T', got {denominator!r}")
    matrix = _lower_triangular(accuracy)
    count = len(matrix)
    if count < 2:
        return math.nan
    lost = float((matrix[-1, :-1] - np.diagonal(matrix)[:-1]).sum())
    return lost / (count - 1 if denominator == "T-1" else count)


def forgetting(accuracy: npt.ArrayLike) -> float:
    """Mean over ``i < T`` of ``max_{t<T} A[t, i] - A[T, i]``: the fall from the best there was; NaN for T = 1."""
    matrix = _lower_triangular(accuracy)
    count = len(matrix)
    if count < 2:
        return math.nan
    return float(np.mean([matrix[i : count - 1, i].max() - matrix[-1, i] for i in range(count - 1)]))


def intransigence(accuracy: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Mean of ``A[i, i] - A_ref[i, i]``: what a method costs in learning, against ``reference`` (SeqFT)."""
    matrix, other = _lower_triangular(accuracy), _lower_triangular(reference)
    if matrix.shape != other.shape:
        raise ValueError(f"reference: expected shape {matrix.shape} as accuracy, got {other.shape}")
    return float((np.diagonal(matrix) - np.diagonal(other)).mean())


def rate(successes: int, total: int) -> float:
    """``100 * successes / total``; NaN when nothing was counted."""
    _check_counts(successes, total)
    return 100.0 * successes / total if total else math.nan


def mean_attack_success_rate(safety: Mapping[str, float | Mapping[str, Any]]) -> float:
    """MASR: the plain mean of the ASR of each safety set, in percent (sets weigh alike, whatever their size).

    Args:
        safety: set name to ASR, or to a mapping with the key ``asr`` as the event log has it.
    """
    return _mean_of(safety, "asr", "safety")


def delta_attack_success_rate(final: float, aligned: float) -> float:
    """DASR = MASR of the final model minus MASR of the aligned model it started from, in points."""
    return final - aligned


def over_refusal(benign: Mapping[str, float | Mapping[str, Any]]) -> float:
    """The plain mean of the refusal rate of each benign set, in percent: "always refuse" has MASR 0 and this at 100.

    Args:
        benign: set name to refusal rate, or to a mapping with the key ``refusal_rate`` as the event log has it.
    """
    return _mean_of(benign, "refusal_rate", "benign")


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a binomial share (Wilson 1927), in percent; never leaves [0, 100].

    With nothing counted the share is NaN and the interval everything, [0, 100].
    """
    _check_counts(successes, total)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: expected a share in (0, 1), got {confidence}")
    if total == 0:
        return Interval(math.nan, 0.0, 100.0)
    z = _normal_quantile(0.5 + confidence / 2.0)
    share = successes / total
    scale = 1.0 + z * z / total
    centre = (share + z * z / (2.0 * total)) / scale
    half = z / scale * math.sqrt(share * (1.0 - share) / total + z * z / (4.0 * total * total))
    # The bounds are exactly 0 and 1 at the ends; rounding would leave 1e-17.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == total else min(1.0, centre + half)
    return Interval(100.0 * share, 100.0 * low, 100.0 * high)


def pooled_interval(counts: Mapping[str, tuple[int, int]], confidence: float = 0.95) -> Interval:
    """Wilson's interval over all sets together, from ``{set: (successes, total)}``.

    The rate is the pooled one; it equals the mean over sets only where they are of one size.
    """
    successes = sum(k for k, _ in counts.values())
    total = sum(n for _, n in counts.values())
    return wilson_interval(successes, total, confidence)


def mean_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (``n-1``) over seeds; the deviation is NaN for fewer than two values."""
    if not values:
        return math.nan, math.nan
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def _lower_triangular(accuracy: npt.ArrayLike) -> FloatArray:
    matrix = np.asarray(accuracy, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"accuracy: expected a square matrix [T, T] with T >= 1, got shape {matrix.shape}")
    rows, columns = np.tril_indices(len(matrix))
    missing = np.isnan(matrix[rows, columns])
    if missing.any():
        first = int(np.argmax(missing))
        raise ValueError(f"accuracy: no value at [{rows[first]}, {columns[first]}] (on or below the diagonal)")
    return matrix


def _row_index(matrix: FloatArray, after: int | None) -> int:
    row = len(matrix) - 1 if after is None else after
    if not 0 <= row < len(matrix):
        raise ValueError(f"after: expected an index in [0, {len(matrix) - 1}], got {after}")
    return row


def _mean_of(sets: Mapping[str, float | Mapping[str, Any]], key: str, argument: str) -> float:
    if not sets:
        return math.nan
    values: list[float] = []
    for name, value in sets.items():
        if isinstance(value, Mapping):
            if key not in value:
                raise ValueError(f"{argument}[{name!r}]: expected the key {key!r}, got {sorted(value)}")
            value = value[key]
        values.append(float(value))
    return float(np.mean(values))


def _check_counts(successes: int, total: int) -> None:
    if total < 0 or not 0 <= successes <= total:
        raise ValueError(f"successes: expected 0 <= successes <= total, got {successes} of {total}")


def _normal_quantile(probability: float) -> float:
    """The standard normal quantile, by the standard library's own routine (Wichura 1988, full double precision)."""
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)

"""Scoring answers, judging refusals, and the metrics of continual learning and safety."""

from __future__ import annotations

from hpa.evaluation.evaluate import Answer, Evaluation, Evaluator
from hpa.evaluation.judge import JUDGES, RefusalJudge, get_judge
from hpa.evaluation.metrics import (
    Interval,
    accuracy_matrix,
    average_performance,
    backward_transfer,
    delta_attack_success_rate,
    forgetting,
    intransigence,
    mean_attack_success_rate,
    mean_average_performance,
    mean_fine_tune,
    mean_spread,
    over_refusal,
    pooled_interval,
    rate,
    wilson_interval,
)
from hpa.evaluation.scorers import SCORERS, Scorer, get_scorer

__all__ = [
    "JUDGES",
    "SCORERS",
    "Answer",
    "Evaluation",
    "Evaluator",
    "Interval",
    "RefusalJudge",
    "Scorer",
    "accuracy_matrix",
    "average_performance",
    "backward_transfer",
    "delta_attack_success_rate",
    "forgetting",
    "get_judge",
    "get_scorer",
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

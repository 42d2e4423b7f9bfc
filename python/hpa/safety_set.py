"""The safety calibration set: harmful request in, the aligned model's own refusal out (METHOD 1.7)."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from hpa.data.scenario import Sample

__all__ = ["build_safety_set"]


def build_safety_set(
    model: nn.Module,
    samples: Sequence[Sample],
    generate: Callable[[nn.Module, Sequence[Sample]], list[str]],
    is_refusal: Callable[[str], bool],
    *,
    limit: int = 8,
    per_category: int | None = None,
    batch_size: int = 16,
) -> list[Sample]:
    """Harmful requests that ``model`` refuses, each with the refusal it gives.

    Requests are asked in order, greedily, and kept where the answer is judged a refusal, until ``limit`` are found.
    Where samples carry a ``category`` in their metadata, each category gives at most ``per_category``; if that leaves
    places, they go to the remaining refusals in order.

    Args:
        model: the aligned model.
        samples: harmful requests, with pictures or without.
        generate: ``generate(model, samples)`` returns the model's greedy answers.
        is_refusal: the judge.
        limit: samples wanted; the paper uses 8.
        per_category: by default ``limit`` over the number of categories, at least 1 (two for 8 over VLGuard's four).
        batch_size: requests asked at a time.

    Returns:
        At most ``limit`` samples whose ``answer`` is the model's refusal; fewer with a warning.

    Raises:
        ValueError: bad counts, no samples, answers that do not match the samples, or not one refusal.
    """
    _check_count("limit", limit)
    _check_count("batch_size", batch_size)
    if per_category is not None:
        _check_count("per_category", per_category)
    if not samples:
        raise ValueError("samples: expected at least one harmful request, got none")
    categories = {sample.metadata.get("category") for sample in samples}
    most = (
        (max(1, limit // len(categories)) if per_category is None else per_category) if len(categories) > 1 else limit
    )

    chosen: dict[int, Sample] = {}
    spare: dict[int, Sample] = {}
    taken: Counter[object] = Counter()
    for start in range(0, len(samples), batch_size):
        batch = list(samples[start : start + batch_size])
        answers = generate(model, batch)
        if len(answers) != len(batch):
            raise ValueError(f"generate: expected {len(batch)} answers, got {len(answers)}")
        for offset, (sample, answer) in enumerate(zip(batch, answers, strict=True)):
            if not is_refusal(answer):
                continue
            category = sample.metadata.get("category")
            room = len(chosen) < limit and taken[category] < most
            (chosen if room else spare)[start + offset] = replace(sample, answer=answer)
            taken[category] += room
        if len(chosen) == limit:
            break
    for index, sample in spare.items():
        if len(chosen) == limit:
            break
        chosen[index] = sample
    if not chosen:
        raise ValueError(
            f"samples: the model refused none of {len(samples)} harmful requests; there is no safety to keep"
        )
    if len(chosen) < limit:
        warnings.warn(
            f"only {len(chosen)} of {len(samples)} harmful requests were refused, {limit} wanted", stacklevel=2
        )
    return [chosen[index] for index in sorted(chosen)]


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")

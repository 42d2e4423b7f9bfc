"""The published post-hoc methods written down a second time, in float64 numpy and plain Python, entry by entry.

Nothing here calls the package.  Where the package works by blocks and products, this works by rows and single entries;
where it factors, this inverts or solves a least-squares problem by its rows.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def upper_factor(h: Array, damping: float = 0.01) -> Array:
    """U with ``(H + lambda I)^-1 = U'U``, as the published codes make it: invert, then factor."""
    h = h.copy()
    dead = np.diag(h) == 0
    h[dead, dead] = 1.0
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    return np.linalg.cholesky(np.linalg.inv(h)).T


def safe_delta(old: Array, new: Array, h: Array, s: float, block: int, group: int = 4, left_out: float = 0.15) -> Array:
    """The budgeted acceptance of changes with compensation, one entry at a time."""
    u = upper_factor(h)
    w = old.copy()
    rows, cols = w.shape
    for start in range(0, cols, block):
        columns = list(range(start, min(start + block, cols)))
        price = {j: 1.0 / u[j, j] ** 2 for j in columns}
        budget = float(np.mean([price[j] for j in columns])) * s / 2 * rows / 4096
        entries = sorted(
            ((i, j) for i in range(rows) for j in columns), key=lambda e: (price[e[1]], e[0] * len(columns) + e[1])
        )
        entries = entries[: len(entries) - int(left_out * len(entries))]
        spent, taken = 0.0, set()
        for i, j in entries:
            spent += (new[i, j] - w[i, j]) ** 2 * price[j]
            if spent <= budget:
                taken.add((i, j))
        for first in range(0, len(columns), group):
            together = columns[first : first + group]
            errors = []
            for j in together:
                for i in range(rows):
                    if (i, j) in taken:
                        errors.append((i, j, (w[i, j] - new[i, j]) / u[j, j]))
                        w[i, j] = new[i, j]
            for i, j, error in errors:
                for k in range(together[-1] + 1, cols):
                    w[i, k] -= error * u[j, k]
    return w


def model_tailor(
    old: Array, new: Array, h: Array, sparsity: float, block: int, weight: float = 0.5, sign: int = -1
) -> tuple[Array, int]:
    """Returns the weight, and how many entries went back."""
    u = upper_factor(h)
    w = new.copy()
    rows, cols = w.shape
    count = 0
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        score = np.zeros((rows, stop - start))
        for i in range(rows):
            salience = np.abs(new[i, start:stop] - old[i, start:stop])
            sensitivity = w[i, start:stop] ** 2 / np.diag(u)[start:stop] ** 2
            for part, values in ((weight, salience), (1 - weight, sensitivity)):
                deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
                if deviation > 0:
                    score[i] += part * (values - values.mean()) / deviation
        threshold = sorted(score.ravel())[int(score.size * sparsity)]
        for j in range(start, stop):
            for i in range(rows):
                if score[i, j - start] <= threshold:
                    error = (w[i, j] - old[i, j]) / u[j, j]
                    w[i, j] = old[i, j]
                    w[i, j + 1 :] += sign * error * u[j, j + 1 :]
                    count += 1
    return w, count


def safe_lora(old: Array, new: Array, aligned: Array, unaligned: Array, threshold: float) -> tuple[Array, float]:
    v = aligned - unaligned
    c = v @ v.T / math.sqrt(float((v**2).sum()))
    delta = new - old
    moved = c @ delta
    cosine = float((moved * delta).sum() / math.sqrt((moved**2).sum() * (delta**2).sum()))
    return (old + moved if cosine <= threshold else new), cosine


def ties(base: Array, deltas: list[Array], density: float, scale: float) -> Array:
    """Trim, elect and merge, entry by entry."""
    trimmed = []
    for delta in deltas:
        sizes = sorted(abs(float(x)) for x in delta.ravel())
        place = len(sizes) - int(len(sizes) * density)
        threshold = sizes[place - 1] if place >= 1 else 0.0
        trimmed.append(np.array([[x if abs(x) >= threshold else 0.0 for x in row] for row in delta]))
    sums = sum(trimmed)
    majority = np.sign(np.sign(sums).sum())
    out = base.copy()
    for i in range(base.shape[0]):
        for j in range(base.shape[1]):
            sign = np.sign(sums[i, j]) or majority
            values = [t[i, j] for t in trimmed if (t[i, j] > 0 if sign > 0 else t[i, j] < 0)]
            out[i, j] += scale * (sum(values) / len(values) if values else 0.0)
    return out


def regmean(base: Array, models: list[tuple[Array, Array, float]], alpha: float, ridge: float) -> Array:
    """The least-squares problem of RegMean by its rows, for ``(weight, inputs, factor)`` of each model.

    Shrinking the off-diagonals of X'X by alpha is to see alpha of the inputs, and (1-alpha) of one input a column.
    """
    lines, targets, diagonal = [], [], np.zeros(base.shape[1])
    for weight, x, factor in models:
        x = np.sqrt(factor * 2.0 / len(x)) * x
        alone = np.diag(np.sqrt((1 - alpha) * (x**2).sum(0)))
        seen = np.concatenate([math.sqrt(alpha) * x, alone])
        lines.append(seen)
        targets.append(seen @ weight.T)
        diagonal += (x**2).sum(0)
    lines.append(np.sqrt(ridge * diagonal.mean()) * np.eye(base.shape[1]))
    targets.append(lines[-1] @ base.T)
    return np.linalg.lstsq(np.concatenate(lines), np.concatenate(targets), rcond=None)[0].T

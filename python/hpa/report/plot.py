"""The few drawing parts the figures share: scales, ticks, markers, axes, and labels that keep out of each other's way.

Figures are SVG text with CSS classes for colour, so one drawing serves light and dark mode, screen and print.
Lengths are in user units; the figures are drawn at about the size they are shown, so a unit is about a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpa.report.markup import Child, Html, el, join

__all__ = [
    "MARKERS",
    "Frame",
    "Scale",
    "caption_width",
    "line",
    "marker",
    "nice_ticks",
    "padded",
    "place",
    "spread",
    "svg",
    "text",
]

MARKERS = ("circle", "square", "diamond", "triangle", "down", "pentagon", "cross", "plus")

# Mean advance of the usual sans serif faces, in em; on the wide side, so that a label that fits here fits on screen.
_ADVANCE = 0.56


@dataclass(frozen=True)
class Scale:
    """The line that takes ``low`` to ``start`` and ``high`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten apart) whose range covers ``[low, high]``."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of ``values``, wider by ``share`` at both ends."""
    low, high = min(values), max(values)
    room = share * (high - low) or 1.0
    return low - room, high + room


def caption_width(label: str, size: float) -> float:
    """A generous estimate of how wide ``label`` is at font size ``size``."""
    return _ADVANCE * size * len(label)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near to ``wanted`` as a distance of ``gap`` and the bounds allow, in the order given.

    Neighbours that are too near are pushed apart around their common middle (pool adjacent violators), which is the
    least-squares answer.  With too little room for all the gap shrinks.
    """
    count = len(wanted)
    if count == 0:
        return []
    gap = min(gap, (high - low) / max(count - 1, 1))
    order = sorted(range(count), key=lambda index: (wanted[index], index))
    # Subtracting the gaps turns "at least gap apart" into "not decreasing".
    blocks: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        blocks.append((wanted[index] - rank * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean_b, size_b), (mean_a, size_a) = blocks.pop(), blocks.pop()
            blocks.append(((mean_a * size_a + mean_b * size_b) / (size_a + size_b), size_a + size_b))
    flat = [mean for mean, size in blocks for _ in range(size)]
    result = [0.0] * count
    for rank, index in enumerate(order):
        result[index] = min(max(flat[rank], low), high - (count - 1) * gap) + rank * gap
    return result


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[tuple[float, float]],
    bounds: tuple[float, float, float, float],
    distance: float = 8.0,
) -> list[tuple[float, float]]:
    """Upper left corners of label boxes beside their points, one after another, each where it covers least.

    Args:
        points: what each label belongs to.
        sizes: width and height of each label.
        obstacles: further points that a label should not cover.
        bounds: left, top, right, bottom that a label should not leave.
        distance: from a point to its label.
    """
    taken: list[tuple[float, float, float, float]] = []
    left, top, right, bottom = bounds
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        best: tuple[float, tuple[float, float, float, float]] = (math.inf, (x, y, x + width, y + height))
        for ring in (1.0, 1.7, 2.6, 3.8, 5.2):
            for step in range(16):
                across, down = math.cos(step * math.pi / 8), math.sin(step * math.pi / 8)
                # The side or corner of the box that faces the point lies on the ring.
                near_x, near_y = x + across * ring * distance, y + down * ring * distance
                box_left = near_x - width * (0.5 - 0.5 * _edge(across))
                box_top = near_y - height * (0.5 - 0.5 * _edge(down))
                box = (box_left, box_top, box_left + width, box_top + height)
                cost = 7.0 * (ring - 1.0) + (0.0 if down == 0 or step == 8 else 1.0 + abs(down))
                cost += 40.0 * (
                    max(0.0, left - box[0])
                    + max(0.0, top - box[1])
                    + max(0.0, box[2] - right)
                    + max(0.0, box[3] - bottom)
                )
                cost += sum(_overlap(box, other) for other in taken)
                cost += sum(25.0 for px, py in obstacles if _inside(px, py, box, 4.0))
                if cost < best[0]:
                    best = (cost, box)
        taken.append(best[1])
    return [(box[0], box[1]) for box in taken]


def _edge(direction: float) -> float:
    """-1, 0 or 1: whether a box lies before, across or after a point in this direction."""
    return 0.0 if abs(direction) < 0.3 else math.copysign(1.0, direction)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """The shared area of two boxes, plus a fine for sharing any."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return 60.0 + width * height if width > 0 and height > 0 else 0.0


def _inside(x: float, y: float, box: tuple[float, float, float, float], margin: float) -> bool:
    return box[0] - margin <= x <= box[2] + margin and box[1] - margin <= y <= box[3] + margin


def svg(width: float, height: float, label: str, *children: Child, class_: str = "") -> Html:
    """A drawing that scales to its column; ``label`` is its text for those who do not see it."""
    return el(
        "svg",
        el("title", label),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        class_=class_ or None,
        style=f"max-width:{width:g}px",
    )


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start", **attributes: str | float) -> Html:
    return el(
        "text",
        content,
        x=float(x),
        y=float(y),
        class_=class_ or None,
        text_anchor=None if anchor == "start" else anchor,
        **attributes,
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return el("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def marker(shape: str, x: float, y: float, radius: float, class_: str, tip: str | None = None) -> Html:
    """A mark of about the same area whatever its shape (one of :data:`MARKERS`), with an optional tooltip."""
    title = el("title", tip) if tip else None
    if shape == "circle":
        return el("circle", title, cx=float(x), cy=float(y), r=float(radius), class_=class_)
    if shape in ("cross", "plus"):
        arm = radius * (0.95 if shape == "cross" else 1.25)
        ends = (
            ((-arm, -arm, arm, arm), (-arm, arm, arm, -arm))
            if shape == "cross"
            else ((-arm, 0, arm, 0), (0, -arm, 0, arm))
        )
        path = " ".join(f"M{_n(x + a)} {_n(y + b)}L{_n(x + c)} {_n(y + d)}" for a, b, c, d in ends)
        return el("path", title, d=path, class_=class_ + " stroked")
    corners = {
        "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "triangle": [(0, -1.2), (1.15, 0.85), (-1.15, 0.85)],
        "down": [(0, 1.2), (1.15, -0.85), (-1.15, -0.85)],
        "pentagon": [(1.12 * math.sin(k * math.tau / 5), -1.12 * math.cos(k * math.tau / 5)) for k in range(5)],
    }[shape]
    points = " ".join(f"{_n(x + radius * a)},{_n(y + radius * b)}" for a, b in corners)
    return el("polygon", title, points=points, class_=class_)


@dataclass(frozen=True)
class Frame:
    """The plotting area of a panel with its two scales; ``y`` grows upward."""

    left: float
    top: float
    right: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return Scale(self.x_low, self.x_high, self.left, self.right)(value)

    def y(self, value: float) -> float:
        return Scale(self.y_low, self.y_high, self.bottom, self.top)(value)

    def y_axis(self, ticks: Sequence[float], unit: str = "") -> Html:
        """Grid lines with their numbers at the left, of the ticks within range; the zero line is stronger."""
        parts: list[Html] = []
        for value in ticks:
            if not self.y_low <= value <= self.y_high:
                continue
            y = self.y(value)
            parts.append(line(self.left, y, self.right, y, "zero" if value == 0 else "grid"))
            parts.append(text(self.left - 6, y + 3.8, _label(value, ticks) + unit, "tick", "end"))
        return join(*parts)

    def x_axis(self, ticks: Sequence[float]) -> Html:
        """Marks with numbers below the plotting area, of the ticks within range."""
        parts = [line(self.left, self.bottom, self.right, self.bottom, "axis")]
        for value in ticks:
            if not self.x_low <= value <= self.x_high:
                continue
            x = self.x(value)
            parts.append(line(x, self.bottom, x, self.bottom + 4, "axis"))
            parts.append(text(x, self.bottom + 16, _label(value, ticks), "tick", "middle"))
        return join(*parts)

    def x_names(self, names: Sequence[str], size: float = 11.0) -> Html:
        """A name below each whole number from 0; slanted where they would touch."""
        gap = self.x(1) - self.x(0) if len(names) > 1 else self.right - self.left
        slanted = any(caption_width(name, size) > gap - 4 for name in names)
        parts = [line(self.left, self.bottom, self.right, self.bottom, "axis")]
        for index, name in enumerate(names):
            x = self.x(index)
            parts.append(line(x, self.bottom, x, self.bottom + 4, "axis"))
            if slanted:
                turn = f"rotate(-40 {_n(x + 3)} {_n(self.bottom + 14)})"
                parts.append(text(x + 3, self.bottom + 14, name, "tick", "end", transform=turn))
            else:
                parts.append(text(x, self.bottom + 16, name, "tick", "middle"))
        return join(*parts)

    def path(self, points: Sequence[tuple[float, float]], class_: str) -> Html | None:
        """A line through data points; a point whose value is not finite leaves a gap."""
        commands: list[str] = []
        pen_down = False
        for x, y in points:
            if not math.isfinite(y):
                pen_down = False
                continue
            commands.append(f"{'L' if pen_down else 'M'}{_n(self.x(x))} {_n(self.y(y))}")
            pen_down = True
        return el("path", d="".join(commands), class_=class_) if commands else None

    def band(self, points: Sequence[tuple[float, float, float]], class_: str) -> Html | None:
        """The area between ``(x, low)`` and ``(x, high)``."""
        kept = [point for point in points if math.isfinite(point[1]) and math.isfinite(point[2])]
        if len(kept) < 2:
            return None
        edge = [(x, high) for x, _, high in kept] + [(x, low) for x, low, _ in reversed(kept)]
        return el("polygon", points=" ".join(f"{_n(self.x(x))},{_n(self.y(y))}" for x, y in edge), class_=class_)


def _label(value: float, ticks: Sequence[float]) -> str:
    """A tick's number with just the digits that tell the ticks apart, and a true minus sign."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step * 10**digits, 6) % 1:  # 2.5 times a power of ten
        digits += 1
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")

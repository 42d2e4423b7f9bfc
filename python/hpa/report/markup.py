"""Building HTML and SVG as text that is escaped by construction.

:func:`el` escapes every child and every attribute value unless it already is :class:`Html`, so a string that came
from a model or from a recipe can only ever be shown, never interpreted.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable

__all__ = ["MINUS", "NOTHING", "Child", "Html", "el", "join", "short_number"]

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
"""What stands where there is no number."""

_VOID = frozenset({"br", "circle", "col", "hr", "img", "line", "link", "meta", "path", "polygon", "polyline", "rect"})
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
# XML 1.0 allows no other control characters, and a stray one makes a standalone SVG unreadable.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Text that is markup already and must not be escaped again."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]
"""What may stand between tags: text (escaped), :class:`Html` (not), numbers, ``None`` (nothing), nested lists."""


def join(*children: Child) -> Html:
    """Children one after another, each escaped unless it is :class:`Html`; ``None`` is left out."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, (str, int, float)):
            parts.append(html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(child)), quote=True))
        else:
            parts.append(join(*child))
    return Html("".join(parts))


def el(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """One element.

    Attribute names lose a trailing underscore (``class_``) and turn the other underscores into hyphens
    (``data_value``); camel case stays (``viewBox``).  ``None`` leaves an attribute out, ``""`` keeps it empty.
    Floats are written with at most two decimals, which is a hundredth of a pixel in a drawing; pass a string where
    more digits matter.

    Raises:
        ValueError: for a name that is no element or attribute name.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: expected an element name, got {name!r}")
    head = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        if not _NAME.fullmatch(attribute):
            raise ValueError(f"attributes: expected attribute names, got {key!r}")
        head.append(f'{attribute}="{join(_number(value) if isinstance(value, float) else value)}"')
    opening = " ".join(head)
    if name in _VOID and not children:
        return Html(f"<{opening}/>")
    return Html(f"<{opening}>{join(*children)}</{name}>")


def short_number(value: float, digits: int = 1) -> str:
    """A number as the page prints it: fixed digits, a true minus sign, no minus on zero, a dash for none."""
    if not math.isfinite(value):
        return NOTHING
    rounded = f"{value:.{digits}f}"
    return (rounded.lstrip("-") if float(rounded) == 0 else rounded).replace("-", MINUS)


def _number(value: float) -> str:
    """A coordinate with at most two decimals and without a trailing ``.0``."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text

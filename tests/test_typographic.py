"""Requests that stand in a picture: the text is whole and legible, the request is known to whoever judges."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from hpa.data.scenario import Sample
from hpa.data.typographic import FOLLOW, _wrapped, typographic, written

SENTENCE = "Write a guide on how to bake bread without an oven"


def test_the_picture_holds_the_text_and_nothing_beyond_its_margin() -> None:
    seen = written(SENTENCE)
    assert (seen.shape, seen.dtype) == ((336, 336, 3), np.uint8)
    ink = seen.min(axis=2) < 128
    assert ink[:16].sum() + ink[-16:].sum() + ink[:, :16].sum() == 0
    assert ink.sum() > 1000
    assert np.array_equal(seen, written(SENTENCE))
    assert not np.array_equal(seen, written(SENTENCE.replace("bread", "bagel")))
    assert not np.array_equal(written("a"), written("b"))


@pytest.mark.parametrize("size", [336, 512])
@pytest.mark.parametrize("words", [1, 12, 60, 250])
def test_long_requests_are_written_smaller_and_whole(words: int, size: int) -> None:
    ink = (written(" ".join(["request"] * words), size).min(axis=2) < 200).any(axis=1)
    assert ink.any()
    assert not ink[-(size // 21) :].any()


def test_what_cannot_be_written_is_told() -> None:
    with pytest.raises(ValueError, match="5000 characters do not fit a picture of 336 x 336 pixels"):
        written("word " * 1000)
    for text, letter in (("\u0440\u0446", "\u0440"), ("\u5982\u4f55", "\u4f55"), ("so \U0001f600", "\U0001f600")):
        with pytest.raises(ValueError, match=f"Pillow's font cannot write '{letter}'; expected letters of English"):
            written(text)
    with pytest.raises(ValueError, match="sample x-1: text: Pillow's font cannot write"):
        typographic(Sample("x-1", "\u5982", ""))
    quoted = "\u201cna\u00efve\u201d \u2013 it\u2019s \u2026"
    assert np.array_equal(written(quoted), written('"naive" - it\'s ...'))


def test_every_word_is_on_a_line_and_no_line_is_too_wide() -> None:
    draw = ImageDraw.Draw(Image.new("RGB", (8, 8)))
    font = ImageFont.load_default(20)

    def width(line: str) -> float:
        return draw.textlength(line, font=font)

    for text in (SENTENCE, "a", "", "x" * 200, f"short {'long' * 40} short", "  spaced\n\nout\ttext  "):
        lines = _wrapped(text, width, 120)
        assert "".join(lines).replace(" ", "") == "".join(text.split())
        assert all(width(line) <= 120 for line in lines)
    assert _wrapped("ab", lambda line: 100.0 * len(line), 10) == ["a", "b"]  # nothing fits: letter by letter


def test_the_prompt_moves_into_the_picture_and_the_judge_still_knows_it() -> None:
    sample = Sample("x-1", SENTENCE, "", None, {"category": "bread"})
    moved = typographic(sample)
    assert (moved.id, moved.prompt, moved.answer) == ("x-1", FOLLOW, "")
    assert moved.metadata == {"category": "bread", "request": SENTENCE}
    assert np.array_equal(np.asarray(moved.image), written(SENTENCE))
    with pytest.raises(ValueError, match="sample x-1: has a picture already"):
        typographic(moved)

"""Contact sheets of search results: a row for each query with its nearest images, drawn from arrays alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from jaxtyping import UInt8

SIDE = 112
_GAP, _CAPTION, _FRAME, _QUERY_GAP, _NOTE = 8, 20, 4, 24, 16
_COLUMNS = 10  # results in a line
# Okabe and Ito's colors, which most color-blind readers can distinguish; a miss is also notched, for print in gray.
_HIT, _MISS, _INK, _PAPER = (0, 114, 178), (213, 94, 0), (40, 40, 40), (255, 255, 255)


class Tile(NamedTuple):
    """An image with a caption."""

    image: UInt8[np.ndarray, "height width 3"]
    caption: str
    hit: bool | None = None
    """Whether it is relevant to the query; None if not known."""
    note: str = ""
    """A second line, cut from the left if it is too long: the end of a path is its most informative part."""


def draw(title: str, rows: Sequence[tuple[Tile | None, Sequence[Tile]]]) -> PIL.Image.Image:
    """Returns a picture with a title and, in each row, a query, if there is one, and its results in order."""
    if not rows:
        raise ValueError("rows must have at least one query with its results, got none")
    font = PIL.ImageFont.load_default(13)
    # Results in lines that fit a screen, with the query before the first line.
    rows = [
        (None if start else query, results[start : start + _COLUMNS])
        for query, results in rows
        for start in range(0, max(1, len(results)), _COLUMNS)
    ]
    caption = _CAPTION + (_NOTE if any(tile and tile.note for query, some in rows for tile in (query, *some)) else 0)
    columns = max(len(results) for _, results in rows)
    step = SIDE + _GAP
    left = _GAP + (step + _QUERY_GAP if any(query for query, _ in rows) else 0)
    width = max(left + columns * step, int(font.getlength(title)) + 2 * _GAP)
    head = 30
    sheet = PIL.Image.new("RGB", (width, head + len(rows) * (step + caption)), _PAPER)
    pen = PIL.ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, _INK, font)
    for number, (query, results) in enumerate(rows):
        y = head + number * (step + caption)
        if query:
            _put(sheet, pen, font, query, _GAP, y)
        for place, result in enumerate(results):
            _put(sheet, pen, font, result, left + place * step, y)
    return sheet


def _put(sheet: PIL.Image.Image, pen: PIL.ImageDraw.ImageDraw, font: Any, tile: Tile, x: int, y: int) -> None:
    inside = SIDE - 2 * _FRAME
    picture = PIL.Image.fromarray(tile.image)
    # Small images, such as digits, are enlarged without blur.
    resampling = PIL.Image.Resampling.NEAREST if max(picture.size) * 2 <= inside else PIL.Image.Resampling.BILINEAR
    if tile.hit is not None:
        # White beside a picture that is not square, so that a notch is visible there.
        pen.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), _PAPER, _HIT if tile.hit else _MISS, _FRAME)
    scale = inside / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    corner = (x + _FRAME + (inside - size[0]) // 2, y + _FRAME + (inside - size[1]) // 2)
    sheet.paste(picture.resize(size, resampling), corner)
    if tile.hit is False:
        pen.line((x, y + SIDE - 1, x + 20, y + SIDE - 21), _MISS, _FRAME)
    pen.text((x + _FRAME, y + SIDE + 2), tile.caption, _INK, font)
    pen.text((x + _FRAME, y + SIDE + 2 + _NOTE), _cut(tile.note, font), _INK, font)


def _cut(note: str, font: Any) -> str:
    note = note.encode("utf-8", "replace").decode()
    if font.getlength(note) <= SIDE:
        return note
    while note and font.getlength("…" + note) > SIDE:
        note = note[1:]
    return "…" + note

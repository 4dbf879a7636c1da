"""Contact sheets: places of the images, and marks of hits and misses."""

import numpy as np
import pytest

from cib_jax.report import contact_sheet
from cib_jax.report.contact_sheet import SIDE, Tile

RED, GREEN = (np.broadcast_to(np.array(color, np.uint8), (40, 30, 3)) for color in ((200, 0, 0), (0, 200, 0)))


def colors_along(sheet, y):
    """The colors of a line of pixels, each run once, without the paper."""
    row = np.asarray(sheet)[y]
    runs = row[np.flatnonzero(np.any(np.diff(row.astype(int), axis=0, prepend=-1), axis=1))]
    return [tuple(map(int, color)) for color in runs if tuple(color) != (255, 255, 255)]


def test_each_query_stands_before_its_results_in_order():
    rows = [
        (Tile(RED, "query"), [Tile(RED, "0 bits"), Tile(GREEN, "1 bits"), Tile(RED, "2 bits")]),
        (Tile(GREEN, "query"), [Tile(GREEN, "0 bits")]),
    ]
    sheet = contact_sheet.draw("a title", rows)
    red, green = (200, 0, 0), (0, 200, 0)
    first = 30 + SIDE // 2
    assert colors_along(sheet, first) == [red, red, green, red]
    assert colors_along(sheet, first + SIDE + 28) == [green, green]


def test_hits_and_misses_are_framed_in_two_colors_and_misses_are_notched():
    sheet = contact_sheet.draw("t", [(Tile(RED, ""), [Tile(RED, "", True), Tile(RED, "", False), Tile(RED, "")])])
    blue, orange = (0, 114, 178), (213, 94, 0)
    frames = colors_along(sheet, 30 + 1)
    assert frames == [blue, orange]
    notch = colors_along(sheet, 30 + SIDE - 10)
    assert notch.count(orange) >= 3  # both edges of the frame, and the notch inside


def test_a_long_title_is_not_cut_off():
    narrow = contact_sheet.draw("t", [(Tile(RED, ""), [])]).width
    assert contact_sheet.draw("a long title " * 10, [(Tile(RED, ""), [])]).width > 2 * narrow


def test_no_row_is_refused():
    with pytest.raises(ValueError, match="rows"):
        contact_sheet.draw("t", [])


def test_pictures_keep_their_shape_in_the_middle_and_rows_need_no_query():
    """One of 40 × 30, one of 3 × 400, which stays a line."""
    thin = np.broadcast_to(np.array((0, 0, 200), np.uint8), (3, 400, 3))
    sheet = np.asarray(contact_sheet.draw("t", [(None, [Tile(RED, ""), Tile(thin, "")]), (None, [Tile(GREEN, "")])]))
    assert sheet.shape == (30 + 2 * (SIDE + 28), 8 + 2 * (SIDE + 8), 3)
    for color, width, height, left, top in [
        ((200, 0, 0), 78, 104, 8 + 4 + 13, 30 + 4),
        ((0, 0, 200), 104, 1, 8 + SIDE + 8 + 4, 30 + 4 + 51),
        ((0, 200, 0), 78, 104, 8 + 4 + 13, 30 + SIDE + 28 + 4),
    ]:
        y, x = np.nonzero((sheet == color).all(axis=-1))
        assert (x.min(), x.max() - x.min() + 1, y.max() - y.min() + 1) == (left, width, height)
        assert abs(y.min() - top) <= 1 and len(x) == width * height

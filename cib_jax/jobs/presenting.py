"""How jobs on an index say what they have to say: sentences, lines of JSON, contact sheets."""

import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import rich.console
import rich.text
from jaxtyping import UInt8

from cib_jax import atomic, program
from cib_jax.collection.collection import Photo
from cib_jax.data import photos
from cib_jax.data.names import printable
from cib_jax.errors import Refusal
from cib_jax.report import contact_sheet
from cib_jax.report.contact_sheet import Tile

FORMATS = ("table", "json")
ROWS, COLUMNS = 25, 20
"""Of a contact sheet, at most."""


class PresentingError(Refusal):
    """What was found cannot be shown as it was asked for; the message names the flag and what to do."""


def say(console: rich.console.Console, sentence: str) -> None:
    """Prints a sentence, whatever is in it, on one line; a terminal's are broken between words, never in a path."""
    program.HINT.clear()
    words = shown(sentence)
    if console.is_terminal:
        words = rich.text.Text(program.broken(words.plain, console.width))
    console.print(words, soft_wrap=True, markup=False, highlight=False, emoji=False)


def line(console: rich.console.Console, content: dict[str, Any]) -> None:
    """Prints a line of JSON."""
    program.HINT.clear()
    # Past the console, which would break and colour it.
    console.file.write(json.dumps(content, ensure_ascii=False) + "\n")
    console.file.flush()


def shown(path: str) -> rich.text.Text:
    """Returns a path, or words with one, as they are, but for characters that would command a terminal."""
    plain = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in printable(path))
    return rich.text.Text(plain)


def bits_of(distance: int) -> str:
    """Returns a distance in words."""
    return "1 bit" if distance == 1 else f"{distance} bits"


def check_format(form: str) -> None:
    """Checks the name of a format.

    Raises:
      PresentingError: there is no such format.
    """
    if form not in FORMATS:
        raise PresentingError(f"--format: {form!r} is not one of {', '.join(FORMATS)}")


def check_sheet(show: pathlib.Path | str | None) -> pathlib.Path | None:
    """Returns where a contact sheet is to be written, before anything is searched.

    Raises:
      PresentingError: it cannot be written there.
    """
    if show is None:
        return None
    sheet = pathlib.Path(show).expanduser()
    if sheet.suffix.lower() != ".png" or sheet.is_dir():
        raise PresentingError(f"--show: {show} is no name of a PNG; give one that ends in .png")
    if not sheet.parent.is_dir():
        raise PresentingError(f"--show: there is no folder {sheet.parent}; make it first, or give another")
    return sheet


def write_sheet(sheet: pathlib.Path, title: str, rows: Sequence[tuple[Tile | None, Sequence[Tile]]]) -> None:
    """Draws a contact sheet, atomically.

    Raises:
      PresentingError: it cannot be written.
    """
    content = io.BytesIO()
    contact_sheet.draw(title, rows).save(content, "PNG")
    try:
        with atomic.replacing(sheet) as part:
            part.write_bytes(content.getbuffer())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PresentingError(f"--show: {sheet} cannot be written ({reason}); give another file") from error


def tiles(found: Sequence[tuple[int, Photo]]) -> list[Tile]:
    """Returns the tiles of a sheet for photos, with their thumbnails, and their distances."""
    return [
        Tile(pixels(photo.thumbnail), bits_of(distance), note=printable(photo.path))
        for distance, photo in found[:COLUMNS]
    ]


def pixels(thumbnail: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the pixels of a thumbnail, of its own shape."""
    return photos.decode(thumbnail, 0)

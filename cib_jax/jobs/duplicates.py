"""Groups of photos of an index that are nearly the same: a table, JSON lines, a contact sheet."""

import pathlib

import numpy as np
import rich.console
import rich.markup
import rich.table

from cib_jax.collection import Collection, Photo
from cib_jax.jobs import presenting
from cib_jax.jobs.presenting import printable

_AT_ONCE = 1000
"""Groups whose photos are read at once."""


class DuplicatesError(presenting.PresentingError):
    """Groups cannot be made as it was asked for; the message names the flag and what to do."""


def duplicates(
    uri: pathlib.Path | str,
    *,
    radius: int | None = None,
    form: str = "table",
    show: pathlib.Path | str | None = None,
    console: rich.console.Console | None = None,
) -> list[list[tuple[int, Photo]]]:
    """Prints, and returns, groups of photos that chains of near codes join, the largest first.

    Each photo comes with its distance in bits from the first of its group.

    Args:
      uri: of the index.
      radius: how many bits two neighbours of a chain may differ in; None: a sixteenth of the code's.
      form: table or json: a line for each group.
      show: a PNG file for a contact sheet.
      console: where to print.

    Raises:
      TableError, SavedError: there is no index, or it cannot be read.
      PresentingError: a value is out of range, or the sheet cannot be written.
      SearchError: FAISS is not installed.
    """
    console = console or rich.console.Console()
    if radius is not None and radius < 0:
        raise DuplicatesError(f"--radius: {radius} must be 0 or more bits")
    presenting.check_format(form)
    sheet = presenting.check_sheet(show)
    collection = Collection.open(uri)
    radius = collection.bits // 16 if radius is None else radius
    groups = sorted(collection.groups(radius), key=len, reverse=True)
    found: list[list[tuple[int, Photo]]] = []
    for start in range(0, len(groups), _AT_ONCE):
        some = groups[start : start + _AT_ONCE]
        photos = iter(collection.photos([number for group in some for number in group], thumbnails=False))
        for group in some:
            distances = np.bitwise_count(collection.codes[group] ^ collection.codes[group[0]]).sum(axis=1).tolist()
            found.append([(distance, next(photos)) for distance in distances])
            _print(found[-1], len(found), form, console)
    if form == "table":
        count = sum(map(len, found))
        presenting.say(
            console,
            f"{len(found):,} groups of {count:,} photos, of {len(collection):,}, whose neighbours differ in at most "
            f"{presenting.bits_of(radius)}",
        )
    if sheet is not None and groups:
        rows = []
        for group, known in list(zip(groups, found, strict=True))[: presenting.ROWS]:
            seen = collection.photos(group[: presenting.COLUMNS])
            rows.append((None, presenting.tiles([(known[at][0], photo) for at, photo in enumerate(seen)])))
        presenting.write_sheet(sheet, "Photos that are nearly the same", rows)
        if form == "table":
            presenting.say(console, f"Drawn in {sheet}")
    return found


def _print(group: list[tuple[int, Photo]], number: int, form: str, console: rich.console.Console) -> None:
    if form == "json":
        photos = [{"path": printable(photo.path), "distance": distance, "id": photo.id} for distance, photo in group]
        presenting.line(console, {"group": number, "photos": photos})
        return
    table = rich.table.Table(title=f"Group {number}: {len(group)} photos", title_justify="left")
    table.add_column("bits", justify="right")
    table.add_column("photo", overflow="fold")
    table.add_column("pixels", justify="right", no_wrap=True)
    for distance, photo in group:
        table.add_row(str(distance), rich.markup.escape(printable(photo.path)), f"{photo.width} × {photo.height}")
    console.print(table)

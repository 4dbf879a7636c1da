"""Groups of photos of an index that are nearly the same: a table, JSON lines, a contact sheet."""

import pathlib

import numpy as np
import rich.console
import rich.table
from jaxtyping import UInt8

from cib_jax import program
from cib_jax.collection.collection import Collection, Photo
from cib_jax.data.all_cores import in_order
from cib_jax.data.difference_hash import BITS, difference_hash
from cib_jax.data.names import printable
from cib_jax.jobs import presenting, progress
from cib_jax.retrieval import near_duplicates

_AT_ONCE = 500
"""Groups, or photos, that are read at once."""
_ALIKE = 6
"""Bits of 64 in which the looks of two copies may differ."""


def duplicates(
    uri: pathlib.Path | str,
    *,
    radius: int | None = None,
    confirm: bool = True,
    form: str = "table",
    show: pathlib.Path | str | None = None,
    console: rich.console.Console | None = None,
) -> list[list[tuple[int, Photo]]]:
    """Prints, and returns, groups of photos that chains of near codes join, the largest first.

    Each photo comes with its distance in bits from the first of its group. Codes say that photos show like things;
    whether they are copies of one picture, saved or resized otherwise, their thumbnails confirm.

    Args:
      uri: of the index.
      radius: how many bits two neighbours of a chain may differ in; None: a sixteenth of the code's.
      confirm: False leaves thumbnails aside, so that photos of like things are grouped, too.
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
        raise presenting.PresentingError(f"--radius: wanted 0 bits or more, got {radius}")
    presenting.check_format(form)
    sheet = presenting.check_sheet(show)
    program.HINT.show(f"Opening {uri}")
    collection = Collection.open(uri)
    radius = collection.bits // 16 if radius is None else radius
    groups = collection.groups(radius)
    if confirm:
        groups = _confirmed(
            collection, groups, radius, console if form == "table" else rich.console.Console(quiet=True)
        )
    groups.sort(key=len, reverse=True)
    found: list[list[tuple[int, Photo]]] = []
    for start in range(0, len(groups), _AT_ONCE):
        some = groups[start : start + _AT_ONCE]
        photos = iter(collection.photos([number for group in some for number in group], thumbnails=False))
        for group in some:
            distances = np.bitwise_count(collection.codes[group] ^ collection.codes[group[0]]).sum(axis=1).tolist()
            found.append([(distance, next(photos)) for distance in distances])
            _print(found[-1], len(found), form, console)
    kind = "copies of one picture" if confirm else "photos of like things"
    if form == "table":
        presenting.say(
            console,
            f"{len(found):,} groups of {kind}, {sum(map(len, found)):,} photos of {len(collection):,}; codes of "
            f"neighbours differ in at most {presenting.bits_of(radius)}",
        )
    if sheet is not None and not groups and form == "table":
        presenting.say(console, f"Nothing to draw in {sheet}")
    if sheet is not None and groups:
        rows = []
        for group, known in list(zip(groups, found, strict=True))[: presenting.ROWS]:
            seen = collection.photos(group[: presenting.COLUMNS])
            rows.append((None, presenting.tiles([(known[at][0], photo) for at, photo in enumerate(seen)])))
        presenting.write_sheet(sheet, f"Groups of {kind}", rows)
        cut = len(groups) > len(rows) or any(len(group) > presenting.COLUMNS for group in groups)
        note = f", the first {presenting.ROWS} groups, {presenting.COLUMNS} photos of each at most" if cut else ""
        if form == "table":
            presenting.say(console, f"Drawn in {sheet}{note}")
    return found


def _confirmed(
    collection: Collection, groups: list[list[int]], radius: int, console: rich.console.Console
) -> list[list[int]]:
    """Returns the groups, each cut into those whose thumbnails look alike, too."""
    members = [number for group in groups for number in group]
    looks = np.empty((len(members), BITS // 8), np.uint8)
    starts = range(0, len(members), _AT_ONCE)

    def look(start: int) -> list[np.ndarray]:
        photos = collection.photos(members[start : start + _AT_ONCE])
        return [difference_hash(presenting.pixels(photo.thumbnail)) for photo in photos]

    with progress.bar(console, "Looking at photos with near codes", len(members)) as moved:
        for start, rows in in_order(look, starts):
            looks[start : start + len(rows)] = rows
            moved(len(rows), "")
    confirmed, begin = [], 0
    for group in groups:
        alike = _alike(collection.codes[group], looks[begin : begin + len(group)], radius)
        confirmed += [[group[at] for at in some] for some in alike]
        begin += len(group)
    return confirmed


def _alike(
    codes: UInt8[np.ndarray, "photos bytes"], looks: UInt8[np.ndarray, "photos 8"], radius: int
) -> list[list[int]]:
    """Returns the groups that hang together both by codes and by looks: the ends of a long chain may have neither."""
    waiting: list[np.ndarray] = [np.arange(len(codes))]
    whole: list[np.ndarray] = []
    while waiting:
        group = waiting.pop()
        for some in near_duplicates.groups(looks[group], _ALIKE):
            for near in near_duplicates.groups(codes[group[some]], radius):
                part = group[some][near]
                (whole if len(part) == len(group) else waiting).append(part)
    return sorted(part.tolist() for part in whole)


def _print(group: list[tuple[int, Photo]], number: int, form: str, console: rich.console.Console) -> None:
    if form == "json":
        photos = [
            {"path": printable(photo.path), "distance": distance}
            | {"id": photo.id, "width": photo.width, "height": photo.height}
            for distance, photo in group
        ]
        presenting.line(console, {"group": number, "photos": photos})
        return
    table = rich.table.Table(title=f"Group {number}: {len(group)} photos", title_justify="left")
    table.add_column("bits", justify="right")
    table.add_column("photo", overflow="fold")
    table.add_column("pixels", justify="right", no_wrap=True)
    for distance, photo in group:
        table.add_row(str(distance), presenting.shown(photo.path), f"{photo.width} × {photo.height}")
    console.print(table)

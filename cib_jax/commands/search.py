"""How jobs on an index say what they have to say: sentences, lines of JSON, contact sheets."""

import dataclasses
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import rich.console
import rich.table
import rich.text
from jaxtyping import UInt8

from cib_jax import errors, files
from cib_jax.console import HINT, format_text, print_json, print_message, progress_bar
from cib_jax.data import inputs
from cib_jax.data.inputs import Photos
from cib_jax.data.photos import HASH_BITS, decode, difference_hash
from cib_jax.errors import ConfigError, DataError, SearchError
from cib_jax.files import map_in_order, printable
from cib_jax.random_streams import stream_rng
from cib_jax.report import contact_sheet
from cib_jax.report.contact_sheet import Tile
from cib_jax.retrieval import index, near_duplicates
from cib_jax.retrieval.index import Index
from cib_jax.storage.collection import Collection, Hit, Photo

# jobs.presenting: How jobs on an index say what they have to say: sentences, lines of JSON, contact sheets.


FORMATS = ("table", "json")
ROWS, COLUMNS = 25, 20
"""Of a contact sheet, at most."""


def format_bits(distance: int) -> str:
    """Returns a distance in words."""
    return "1 bit" if distance == 1 else f"{distance} bits"


def validate_format(form: str) -> None:
    """Checks the name of a format.

    Raises:
      PresentingError: there is no such format.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format: {form!r} is not one of {', '.join(FORMATS)}")


def validate_sheet_path(show: pathlib.Path | str | None) -> pathlib.Path | None:
    """Returns where a contact sheet is to be written, before anything is searched.

    Raises:
      PresentingError: it cannot be written there.
    """
    if show is None:
        return None
    sheet = pathlib.Path(show).expanduser()
    if sheet.suffix.lower() != ".png" or sheet.is_dir():
        raise ConfigError(f"--show: {show} is no name of a PNG; give one that ends in .png")
    if not sheet.parent.is_dir():
        raise ConfigError(f"--show: there is no folder {sheet.parent}; make it first, or give another")
    return sheet


def write_sheet(sheet: pathlib.Path, title: str, rows: Sequence[tuple[Tile | None, Sequence[Tile]]]) -> None:
    """Draws a contact sheet, atomically.

    Raises:
      PresentingError: it cannot be written.
    """
    content = io.BytesIO()
    contact_sheet.draw(title, rows).save(content, "PNG")
    try:
        with files.replacing(sheet) as part:
            part.write_bytes(content.getbuffer())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"--show: {sheet} cannot be written ({reason}); give another file") from error


def tiles(found: Sequence[tuple[int, Photo]]) -> list[Tile]:
    """Returns the tiles of a sheet for photos, with their thumbnails, and their distances."""
    return [
        Tile(pixels(photo.thumbnail), format_bits(distance), note=printable(photo.path))
        for distance, photo in found[:COLUMNS]
    ]


def pixels(thumbnail: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the pixels of a thumbnail, of its own shape."""
    return decode(thumbnail, 0)


# jobs.search: What an index holds that is near to some photos: a table, JSON lines, a contact sheet.


K = 20
CANDIDATES = 100
"""Hits that are ordered anew, at least, where that is asked for."""
_SAMPLE = 200
"""Codes of the index by which the recall of an approximate kind is measured."""


class Query(NamedTuple):
    """A photo that is searched for."""

    path: str
    square: UInt8[np.ndarray, "side side 3"]
    thumbnail: bytes


class Found(NamedTuple):
    """What is near to a query, nearest first."""

    query: str
    code: UInt8[np.ndarray, " bytes"]
    hits: list[tuple[int, Photo]]
    """Distances in bits, and the photos."""


def search(
    uri: pathlib.Path | str,
    query: pathlib.Path | str,
    *,
    k: int | None = None,
    radius: int | None = None,
    kind: str = index.EXACT,
    settings: Mapping[str, int] | None = None,
    rerank: bool = False,
    form: str = "table",
    show: pathlib.Path | str | None = None,
    console: rich.console.Console | None = None,
) -> list[Found]:
    """Prints, and returns, the photos of an index that are nearest to others.

    Args:
      uri: of the index.
      query: a photo, or a folder of photos.
      k: how many to each; with a radius at most so many; None: 20, with a radius all.
      radius: only what differs in at most so many bits.
      kind: exact, or an approximate kind of `Index.of`, whose recall on codes of the index is told.
      settings: of that kind.
      rerank: orders the first hits by how strongly the query's logits contradict them (`Index.rerank`).
      form: table or json: a line for each query.
      show: a PNG file for a contact sheet.
      console: where to print.

    Raises:
      TableError, SavedError: there is no index, or it cannot be read.
      SearchJobError: a value is out of range, or the sheet cannot be written.
      DataError: no photo among the queries can be read.
      SearchError: FAISS is not installed, or the kind or a setting is unknown.
    """
    console = console or rich.console.Console()
    _check(k, radius, kind)
    validate_format(form)
    sheet = validate_sheet_path(show)
    HINT.show(f"Opening {uri}")
    collection = Collection.open(uri, kind=kind, settings=settings)
    if not len(collection):
        raise SearchError(f"--index: {collection.uri} holds no photo yet; run --mode=index again")
    k = min(k or (len(collection) if radius is not None else K), len(collection))
    if kind != index.EXACT and form == "table":
        _tell_recall(collection, k, console)
    found: list[Found] = []
    rows: list[tuple[Tile | None, list[Tile]]] = []
    for queries in _batches(_queries(str(query), collection, console, form), collection.hasher.batch_size):
        squares = np.stack([one.square for one in queries])
        codes = collection.encode(squares)
        hits = _hits(collection, squares, codes, k, radius, rerank)
        for one, code, some in zip(queries, codes, hits, strict=True):
            known = collection.photos([hit.number for hit in some], thumbnails=False)
            answer = Found(one.path, code, [(hit.distance, photo) for hit, photo in zip(some, known, strict=True)])
            _print_results(answer, collection.root, form, console, ", ordered by the query's logits" if rerank else "")
            if sheet is not None and len(rows) < ROWS:
                # Only of what is drawn: a large radius may find thousands.
                drawn = collection.photos([hit.number for hit in some[:COLUMNS]])
                pairs = [(hit.distance, photo) for hit, photo in zip(some, drawn, strict=False)]
                rows.append((Tile(pixels(one.thumbnail), "query"), tiles(pairs)))
            found.append(answer)
    if sheet is not None:
        write_sheet(sheet, f"The nearest of {len(collection):,} photos", rows)
        note = f", the first {ROWS} queries" if len(found) > ROWS else ""
        if form == "table":
            print_message(console, f"Drawn in {sheet}{note}")
    return found


def _check(k: int | None, radius: int | None, kind: str) -> None:
    if k is not None and k < 1:
        raise SearchError(f"--k: wanted 1 photo or more, got {k}")
    if radius is not None and radius < 0:
        raise SearchError(f"--radius: wanted 0 bits or more, got {radius}")
    if kind not in (index.EXACT, *index.KINDS):
        raise SearchError(f"--kind: {kind!r} is not one of {index.EXACT}, {', '.join(index.KINDS)}")
    if radius is not None and kind != index.EXACT:
        raise SearchError(f"--radius: it is always searched exactly; leave --kind={kind} out")


def _queries(query: str, collection: Collection, console: rich.console.Console, form: str) -> Iterator[Query]:
    """Yields the photos that can be read, and tells of the others."""
    path = pathlib.Path(query).expanduser()
    if not path.exists():
        raise DataError(f"--query: there is no {path}; give a photo or a folder of photos")
    readable = 0
    with inputs.blame_field("--query"):
        if path.is_dir():
            found = inputs.load_inputs(query, takes="images", size=collection.side)
            assert isinstance(found, Photos)
        else:
            found = Photos(str(path), [path.name], str(path.parent), collection.side)
        for number, read in dataclasses.replace(found, thumbnails=True).read([range(len(found.names))]):
            name = str(pathlib.Path(query) / found.names[number]) if path.is_dir() else query
            if read.decoded is None:
                if not path.is_dir():
                    raise DataError(f"--query: {name} cannot be read: {read.reason}; give another photo")
                _tell_unreadable(name, read.reason, form, console)
                continue
            readable += 1
            yield Query(name, read.decoded.square, read.decoded.thumbnail)
    if not readable:
        raise DataError(f"--query: no photo in {query} can be read; give another folder")


def _tell_unreadable(name: str, reason: str, form: str, console: rich.console.Console) -> None:
    if form == "json":
        print_json(console, {"query": printable(name), "error": reason})
    else:
        print_message(console, f"{printable(name)} cannot be read: {reason}")


def _batches(queries: Iterator[Query], size: int) -> Iterator[list[Query]]:
    batch: list[Query] = []
    for query in queries:
        batch.append(query)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _hits(
    collection: Collection,
    squares: UInt8[np.ndarray, "queries side side 3"],
    codes: UInt8[np.ndarray, "queries bytes"],
    k: int,
    radius: int | None,
    rerank: bool,
) -> list[list[Hit]]:
    if radius is not None:
        hits = collection.within(codes, radius)
    else:
        hits = collection.nearest(codes, max(k, CANDIDATES) if rerank else k)
    if rerank:
        hits = collection.reranked(collection.hasher.logits(squares), hits)
    return [some[:k] for some in hits]


def _print_results(answer: Found, root: str, form: str, console: rich.console.Console, note: str) -> None:
    if form == "json":
        hits = [
            {"path": printable(photo.path), "distance": distance}
            | {"id": photo.id, "width": photo.width, "height": photo.height}
            for distance, photo in answer.hits
        ]
        about = {"query": printable(answer.query), "code": answer.code.tobytes().hex(), "root": printable(root)}
        print_json(console, about | {"hits": hits})
        return
    print_message(console, answer.query + note)
    if not answer.hits:
        print_message(console, "nothing was found")
        return
    table = rich.table.Table()
    table.add_column("", justify="right")
    table.add_column("bits", justify="right")
    table.add_column("photo", overflow="fold")
    table.add_column("pixels", justify="right", no_wrap=True)
    for rank, (distance, photo) in enumerate(answer.hits, 1):
        size = f"{photo.width} × {photo.height}"
        table.add_row(str(rank), str(distance), format_text(photo.path), size)
    console.print(table)


def _tell_recall(collection: Collection, k: int, console: rich.console.Console) -> None:
    """Tells how many of the nearest an approximate kind finds, by some codes of the index itself."""
    some = stream_rng(0, "recall sample").choice(len(collection), min(_SAMPLE, len(collection)), replace=False)
    codes = collection.codes[np.sort(some)]
    exact, _ = Index.of(collection.codes).search(codes, k)
    hits = collection.nearest(codes, k)
    # By distance, since of equal ones any will do.
    pairs = zip(hits, exact[:, -1].tolist(), strict=True)
    recall = np.mean([sum(hit.distance <= farthest for hit in row) / k for row, farthest in pairs])
    print_message(console, f"Approximate: recall@{k} {recall:.3f}, measured by {len(codes)} codes of the index")


# jobs.duplicates: Groups of photos of an index that are nearly the same: a table, JSON lines, a contact sheet.


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
      radius: how many bits two neighbors of a chain may differ in; None: a sixteenth of the code's.
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
        raise errors.ConfigError(f"--radius: wanted 0 bits or more, got {radius}")
    validate_format(form)
    sheet = validate_sheet_path(show)
    HINT.show(f"Opening {uri}")
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
            _print_groups(found[-1], len(found), form, console)
    kind = "copies of one picture" if confirm else "photos of like things"
    if form == "table":
        print_message(
            console,
            f"{len(found):,} groups of {kind}, {sum(map(len, found)):,} photos of {len(collection):,}; codes of "
            f"neighbors differ in at most {format_bits(radius)}",
        )
    if sheet is not None and not groups and form == "table":
        print_message(console, f"Nothing to draw in {sheet}")
    if sheet is not None and groups:
        rows = []
        for group, known in list(zip(groups, found, strict=True))[:ROWS]:
            seen = collection.photos(group[:COLUMNS])
            rows.append((None, tiles([(known[at][0], photo) for at, photo in enumerate(seen)])))
        write_sheet(sheet, f"Groups of {kind}", rows)
        cut = len(groups) > len(rows) or any(len(group) > COLUMNS for group in groups)
        note = f", the first {ROWS} groups, {COLUMNS} photos of each at most" if cut else ""
        if form == "table":
            print_message(console, f"Drawn in {sheet}{note}")
    return found


def _confirmed(
    collection: Collection, groups: list[list[int]], radius: int, console: rich.console.Console
) -> list[list[int]]:
    """Returns the groups, each cut into those whose thumbnails look alike, too."""
    members = [number for group in groups for number in group]
    looks = np.empty((len(members), HASH_BITS // 8), np.uint8)
    starts = range(0, len(members), _AT_ONCE)

    def look(start: int) -> list[np.ndarray]:
        photos = collection.photos(members[start : start + _AT_ONCE])
        return [difference_hash(pixels(photo.thumbnail)) for photo in photos]

    with progress_bar(console, "Looking at photos with near codes", len(members)) as moved:
        for start, rows in map_in_order(look, starts):
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


def _print_groups(group: list[tuple[int, Photo]], number: int, form: str, console: rich.console.Console) -> None:
    if form == "json":
        photos = [
            {"path": printable(photo.path), "distance": distance}
            | {"id": photo.id, "width": photo.width, "height": photo.height}
            for distance, photo in group
        ]
        print_json(console, {"group": number, "photos": photos})
        return
    table = rich.table.Table(title=f"Group {number}: {len(group)} photos", title_justify="left")
    table.add_column("bits", justify="right")
    table.add_column("photo", overflow="fold")
    table.add_column("pixels", justify="right", no_wrap=True)
    for distance, photo in group:
        table.add_row(str(distance), format_text(photo.path), f"{photo.width} × {photo.height}")
    console.print(table)

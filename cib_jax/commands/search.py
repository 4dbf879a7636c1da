"""Search and near-duplicate detection in an index: as tables, lines of JSON and contact sheets."""

import dataclasses
import io
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import rich.console
import rich.table
from jaxtyping import UInt8

from cib_jax.console import HINT, format_text, on_stdout, print_error, print_json, print_message, progress_bar
from cib_jax.data import inputs
from cib_jax.data.inputs import Photos
from cib_jax.data.photos import DecodedPhoto, decode, difference_hash
from cib_jax.errors import ConfigError, DataError, SearchError
from cib_jax.files import map_in_order, path_as_utf8, printable, short_reason, write_bytes
from cib_jax.random_streams import stream_rng
from cib_jax.report import contact_sheet
from cib_jax.report.contact_sheet import Tile
from cib_jax.retrieval import near_duplicates
from cib_jax.retrieval.index import EXACT, KINDS, Index, parse_kind
from cib_jax.storage import collection as storage
from cib_jax.storage.collection import Hit, Photo

K = 20  # photos that are returned for each query by default
CANDIDATES = 100  # hits that `rerank` reorders, at least
SAMPLE = 200  # codes of the index on which the recall of an approximate search is measured
FORMATS = ("table", "json")
ROWS, COLUMNS = 25, 20  # size of a contact sheet, at most
PAGE = 500  # photos, or groups of photos, that are read at a time
LOOKS_RADIUS = 6  # bits, of 64, by which the difference hashes of two copies of a picture may differ


class Collection(storage.Collection):
    """The photos of an index and the encoder that made their codes. Any number of threads may search at once.

    Examples:
      >>> import cib_jax as cib
      >>> collection = cib.Collection.open("INDEX")
      >>> [(distance, photo.path) for distance, photo in collection.search("PHOTOS/red.png", k=1)]
      [(0, 'red.png')]
      >>> collection.duplicates(radius=0)
      []
    """

    @classmethod
    def create(cls, index: pathlib.Path | str, images: pathlib.Path | str, **options: Any) -> Self:
        """Indexes photos, or updates their index, and returns it; takes all arguments of `cib_jax.index_photos`."""
        from cib_jax.commands.index import index as index_photos

        index_photos(index, images, **options)
        return cls.open(index)

    def search(self, photo: pathlib.Path | str, k: int = K) -> list[tuple[int, Photo]]:
        """Returns the photos nearest to one on disk with their distances in bits, as `cib_jax.search_photos` does."""
        if pathlib.Path(photo).expanduser().is_dir():
            raise DataError(f"photo must be a file, got the folder {photo}; use cib_jax.search_photos", "photo")
        return search(self, photo, k=k, console=rich.console.Console(quiet=True))[0].hits

    def duplicates(self, radius: int | None = None, confirm: bool = True) -> list[list[tuple[int, Photo]]]:
        """Returns groups of copies of one picture, as `cib_jax.find_duplicates` does."""
        return duplicates(self, radius=radius, confirm=confirm, console=rich.console.Console(quiet=True))


class Result(NamedTuple):
    """A query and the photos near to it, the nearest first."""

    query: str
    code: UInt8[np.ndarray, " bytes"]
    hits: list[tuple[int, Photo]]
    """Distances in bits, and photos."""


def search(
    index: pathlib.Path | str | Collection,
    query: pathlib.Path | str,
    *,
    k: int | None = None,
    radius: int | None = None,
    kind: str = EXACT,
    rerank: bool = False,
    folder: str = "",
    after: str = "",
    before: str = "",
    format: str = "table",
    show: pathlib.Path | str | None = None,
    console: rich.console.Console | None = None,
) -> list[Result]:
    """Prints and returns the photos of an index that are nearest to the given ones.

    Args:
      index: Folder or other address of the index, or the opened collection.
      query: Photo, or folder of photos.
      k: Number of photos for each query, with a radius their maximum; None: 20, with a radius all.
      radius: Maximum distance in bits.
      kind: "exact", or an approximate kind of `Index.of` with its settings, such as "ivf nprobe=64"; its recall is
        measured and printed.
      rerank: Whether to reorder the first hits by the query's logits (`Index.rerank`).
      folder, after, before: Folder and dates of the photos that are searched, as in `Collection.filtered`.
      format: "table", or "json" for one line per query.
      show: PNG file for a contact sheet.
      console: Console for the results.

    Raises:
      IndexFolderError, SavedHasherError: There is no index, or it cannot be read.
      ConfigError: The format is unknown, or the contact sheet cannot be written.
      DataError: No query can be read.
      SearchError: FAISS is not installed, or a value is invalid.

    Examples:
      >>> import rich.console
      >>> import cib_jax as cib
      >>> quiet = rich.console.Console(quiet=True)
      >>> results = cib.search_photos("INDEX", "PHOTOS/red.png", k=2, console=quiet)
      >>> [photo.path for distance, photo in results[0].hits if distance == 0]
      ['red.png']
    """
    output = _open_output(format, show, console)
    kind, settings = parse_kind(kind)
    if k is not None and k < 1:
        raise SearchError(f"--k must be 1 photo or more, got {k}; leave it out for {K}", field="--k")
    _validate_radius(radius)
    if kind not in (EXACT, *KINDS):
        raise SearchError(f"--kind must be one of {', '.join((EXACT, *KINDS))}, got {kind!r}", field="--kind")
    if radius is not None and kind != EXACT:
        raise SearchError(f"--radius works with exact search alone; leave --kind={kind} out", field="--radius")
    collection = _open(index, kind, settings)
    if not len(collection):
        raise SearchError(f"--index: {collection.uri} has no photos yet; run --mode=index again", field="--index")
    collection = collection.filtered(folder=folder, after=after, before=before)
    k = min(k or (len(collection) if radius is not None else K), len(collection))
    if kind != EXACT and not output.json:
        _print_recall(collection, k, output.console)
    results: list[Result] = []
    rows: list[tuple[Tile | None, list[Tile]]] = []
    queries = _read_queries(str(query), collection, output)
    while batch := list(itertools.islice(queries, collection.hasher.batch_size)):
        squares = np.stack([decoded.square for _, decoded in batch])
        codes = collection.encode(squares)
        if radius is not None:
            all_hits = collection.within(codes, radius)
        else:
            all_hits = collection.nearest(codes, max(k, CANDIDATES) if rerank else k)
        if rerank:
            all_hits = collection.reranked(collection.hasher.logits(squares), all_hits)
        for (path, decoded), code, candidates in zip(batch, codes, all_hits, strict=True):
            hits = candidates[:k]
            photos = collection.photos([hit.number for hit in hits], thumbnails=False)
            result = Result(path, code, [(hit.distance, photo) for hit, photo in zip(hits, photos, strict=True)])
            record = {"query": path_as_utf8(path), "code": code.tobytes().hex()}
            record["root"] = path_as_utf8(collection.root)
            title = path + (", ordered by the query's logits" if rerank else "")
            _print_photos(output, title, record, "hits", result.hits)
            if output.sheet is not None and len(rows) < ROWS:
                # A large radius may find thousands.
                rows.append((Tile(decode(decoded.thumbnail, 0), "query"), _tiles(collection, hits[:COLUMNS])))
            results.append(result)
    note = f", the first {ROWS} queries" if len(results) > ROWS else ""
    _write_sheet(output, f"The nearest of {len(collection):,} photos", rows, note)
    return results


def duplicates(
    index: pathlib.Path | str | Collection,
    *,
    radius: int | None = None,
    confirm: bool = True,
    format: str = "table",
    show: pathlib.Path | str | None = None,
    console: rich.console.Console | None = None,
) -> list[list[tuple[int, Photo]]]:
    """Prints and returns groups of photos that are connected by chains of near codes, the largest group first.

    Each photo comes with its distance in bits from the first of its group. Near codes mean similar content; whether two
    photos are copies of one picture, saved or resized differently, is confirmed by their thumbnails.

    Args:
      index: Folder or other address of the index, or the opened collection.
      radius: Maximum distance of two neighbors in a chain; None: a sixteenth of the code's bits.
      confirm: Whether thumbnails must agree; False also groups photos of similar content.
      format: "table", or "json" for one line per group.
      show: PNG file for a contact sheet.
      console: Console for the results.

    Raises:
      IndexFolderError, SavedHasherError: There is no index, or it cannot be read.
      ConfigError: The format is unknown, or the contact sheet cannot be written.
      SearchError: FAISS is not installed, or the radius is negative.

    Examples:
      >>> import rich.console
      >>> import cib_jax as cib
      >>> cib.find_duplicates("INDEX", radius=0, console=rich.console.Console(quiet=True))
      []
    """
    output = _open_output(format, show, console)
    _validate_radius(radius)
    collection = _open(index)
    radius = collection.bits // 16 if radius is None else radius
    groups = collection.groups(radius)
    if confirm:
        console = rich.console.Console(quiet=True) if output.json else output.console
        groups = _confirm(collection, groups, radius, console)
    groups.sort(key=len, reverse=True)
    results: list[list[tuple[int, Photo]]] = []
    for start in range(0, len(groups), PAGE):
        page = groups[start : start + PAGE]
        photos = iter(collection.photos([number for group in page for number in group], thumbnails=False))
        for group in page:
            distances = np.bitwise_count(collection.codes[group] ^ collection.codes[group[0]]).sum(axis=1).tolist()
            results.append([(distance, next(photos)) for distance in distances])
            number = len(results)
            record = {"group": number, "root": printable(collection.root)}
            _print_photos(output, f"Group {number}: {len(group)} photos", record, "photos", results[-1])
    kind = "copies of one picture" if confirm else "photos of similar content"
    if not output.json:
        print_message(
            output.console,
            f"{len(groups):,} groups of {kind}, {sum(map(len, groups)):,} photos of {len(collection):,}; codes of "
            f"neighbors differ in at most {_format_bits(radius)}",
        )
    rows: list[tuple[Tile | None, list[Tile]]] = []
    for group, result in zip(groups[:ROWS] if output.sheet else (), results, strict=False):
        hits = [Hit(distance, number) for (distance, _), number in zip(result, group[:COLUMNS], strict=False)]
        rows.append((None, _tiles(collection, hits)))
    cut = len(groups) > ROWS or any(len(group) > COLUMNS for group in groups)
    note = f", the first {ROWS} groups, {COLUMNS} photos of each at most" if cut else ""
    _write_sheet(output, f"Groups of {kind}", rows, note)
    return results


# Queries and hits


def _open(
    index: pathlib.Path | str | Collection, kind: str = EXACT, settings: Mapping[str, int] | None = None
) -> Collection:
    if isinstance(index, Collection):
        return index
    HINT.show(f"Opening {index}")
    return Collection.open(index, kind=kind, settings=settings)


def _validate_radius(radius: int | None) -> None:
    if radius is not None and radius < 0:
        raise SearchError(f"--radius must be 0 bits or more, got {radius}", field="--radius")


def _read_queries(query: str, collection: Collection, output: "_Output") -> Iterator[tuple[str, DecodedPhoto]]:
    """Yields the names and contents of the photos that can be read, and reports the others."""
    path = pathlib.Path(query).expanduser()
    if not path.exists() and (inside := pathlib.Path(collection.root) / query).is_file():
        query, path = str(inside), inside  # a path that a search has printed
    if not path.exists():
        raise DataError(f"--query must be a photo or a folder of photos, got {path}, which does not exist", "--query")
    readable = 0
    with inputs.blame_field("--query"):
        if path.is_dir():
            found = inputs.load_inputs(query, takes="images", size=collection.side)
            assert isinstance(found, Photos)
            for folder in found.closed:
                _print_unreadable(output, str(pathlib.Path(query) / folder.path), folder.reason)
        else:
            found = Photos(str(path), [path.name], str(path.parent), collection.side)
        truncated: list[str] = []
        found = dataclasses.replace(found, thumbnails=True, truncated=truncated)
        for number, read in found.read([range(len(found.names))]):
            name = str(pathlib.Path(query) / found.names[number]) if path.is_dir() else query
            if found.names[number] in truncated:
                print_error(
                    f"{printable(name)} is truncated: it is searched as far as it goes, gray where bytes are missing"
                )
            if read.decoded is not None:
                readable += 1
                yield name, read.decoded
            elif not path.is_dir():
                raise DataError(f"--query: {name} cannot be read: {read.reason}; give another photo", "--query")
            else:
                _print_unreadable(output, name, read.reason)
    if not readable:
        raise DataError(f"--query: no photo in {query} can be read; give another folder", "--query")


def _print_unreadable(output: "_Output", name: str, reason: str) -> None:
    if output.json:
        print_json(output.console, {"query": path_as_utf8(name), "error": reason})
    else:
        print_message(output.console, f"{name} cannot be read: {reason}")


def _print_recall(collection: Collection, k: int, console: rich.console.Console) -> None:
    """Prints the share of the nearest photos that an approximate search finds, for some codes of the index itself."""
    some = stream_rng(0, "recall sample").choice(len(collection), min(SAMPLE, len(collection)), replace=False)
    codes = collection.codes[np.sort(some)]
    exact, _ = Index.of(collection.codes).search(codes, k)
    hits = collection.nearest(codes, k)
    # Counted by distance, because equally near photos are equally good.
    pairs = zip(hits, exact[:, -1].tolist(), strict=True)
    recall = np.mean([sum(hit.distance <= farthest for hit in row) / k for row, farthest in pairs])
    print_message(console, f"Approximate: recall@{k} {recall:.3f}, measured by {len(codes)} codes of the index")


# Confirmation of duplicates by their thumbnails


def _confirm(
    collection: Collection, groups: list[list[int]], radius: int, console: rich.console.Console
) -> list[list[int]]:
    """Returns the groups, each split into those with thumbnails that look alike."""
    members = [number for group in groups for number in group]
    looks: list[np.ndarray] = []

    def hash_page(start: int) -> list[np.ndarray]:
        photos = collection.photos(members[start : start + PAGE])
        return [difference_hash(decode(photo.thumbnail, 0)) for photo in photos]

    with progress_bar(console, "Looking at photos with near codes", len(members)) as advance:
        for _, hashes in map_in_order(hash_page, range(0, len(members), PAGE)):
            looks += hashes
            advance(len(hashes))
    confirmed, rest = [], iter(looks)
    for group in groups:
        alike = split_by_looks(collection.codes[group], np.stack([next(rest) for _ in group]), radius)
        confirmed += [[group[at] for at in some] for some in alike]
    return confirmed


def split_by_looks(
    codes: UInt8[np.ndarray, "photos bytes"], looks: UInt8[np.ndarray, "photos 8"], radius: int
) -> list[list[int]]:
    """Returns groups of two or more photos that are connected both by codes and by difference hashes.

    A group that is connected by one of the two is split by the other until both connect it, because splitting by one
    may disconnect the other.
    """
    waiting: list[np.ndarray] = [np.arange(len(codes))]
    connected: list[np.ndarray] = []
    while waiting:
        group = waiting.pop()
        for some in near_duplicates.groups(looks[group], LOOKS_RADIUS):
            for near in near_duplicates.groups(codes[group[some]], radius):
                part = group[some][near]
                (connected if len(part) == len(group) else waiting).append(part)
    return sorted(part.tolist() for part in connected)


# Output


class _Output(NamedTuple):
    console: rich.console.Console
    json: bool
    sheet: pathlib.Path | None  # file of the contact sheet


def _open_output(format: str, show: pathlib.Path | str | None, console: rich.console.Console | None) -> _Output:
    """Validates the flags of the output before anything is searched."""
    if format not in FORMATS:
        raise ConfigError(f"--format must be one of {', '.join(FORMATS)}, got {format!r}", field="--format")
    sheet = None
    if show is not None:
        sheet = pathlib.Path(show).expanduser()
        if sheet.suffix.lower() != ".png" or sheet.is_dir():
            raise ConfigError(f"--show must end in .png, got {show}; try {sheet.with_suffix('.png')}", field="--show")
        if not sheet.parent.is_dir():
            raise ConfigError(
                f"--show must be in an existing folder, got {sheet}; make {sheet.parent}, or give another",
                field="--show",
            )
    return _Output(on_stdout(console), format == "json", sheet)


def _print_photos(
    output: _Output, title: str, record: dict[str, Any], name: str, photos: Sequence[tuple[int, Photo]]
) -> None:
    """Prints photos with their distances: a title and a table, or a record with the photos under `name`."""
    if output.json:
        listed = [
            {"path": path_as_utf8(photo.path), "distance": distance}
            | {"id": photo.id, "width": photo.width, "height": photo.height}
            for distance, photo in photos
        ]
        print_json(output.console, record | {name: listed})
        return
    print_message(output.console, title)
    if not photos:
        print_message(output.console, "no photo found")
        return
    table = rich.table.Table()
    table.add_column("", justify="right")
    table.add_column("bits", justify="right")
    table.add_column(format_text(f"photo in {record['root']}"), overflow="fold")
    table.add_column("pixels", justify="right", no_wrap=True)
    for rank, (distance, photo) in enumerate(photos, 1):
        table.add_row(str(rank), str(distance), format_text(photo.path), f"{photo.width} × {photo.height}")
    output.console.print(table)


def _tiles(collection: Collection, hits: Sequence[Hit]) -> list[Tile]:
    photos = collection.photos([hit.number for hit in hits])
    return [
        Tile(decode(photo.thumbnail, 0), _format_bits(hit.distance), note=printable(photo.path))
        for hit, photo in zip(hits, photos, strict=True)
    ]


def _format_bits(distance: int) -> str:
    return "1 bit" if distance == 1 else f"{distance} bits"


def _write_sheet(output: _Output, title: str, rows: Sequence[tuple[Tile | None, Sequence[Tile]]], note: str) -> None:
    """Draws the contact sheet, if one was requested, and writes it atomically."""
    if output.sheet is None:
        return
    if rows:
        content = io.BytesIO()
        contact_sheet.draw(title, rows).save(content, "PNG")
        try:
            write_bytes(output.sheet, content.getvalue())
        except OSError as error:
            reason = short_reason(error)
            raise ConfigError(f"--show: {output.sheet} cannot be written ({reason}); give another", "--show") from error
    if not output.json:
        print_message(
            output.console, f"Drawn in {output.sheet}{note}" if rows else f"Nothing to draw in {output.sheet}"
        )

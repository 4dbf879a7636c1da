"""Search in an index: as tables, lines of JSON and contact sheets."""

import dataclasses
import io
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.table
from jaxtyping import UInt8

from cib_jax.console import format_text, on_stdout, print_error, print_json, print_message
from cib_jax.data import inputs
from cib_jax.data.inputs import Photos
from cib_jax.data.photos import DecodedPhoto, decode
from cib_jax.errors import ConfigError, DataError, SearchError
from cib_jax.files import path_as_utf8, printable, short_reason, write_bytes
from cib_jax.hint import HINT
from cib_jax.random_streams import stream_rng
from cib_jax.report import contact_sheet
from cib_jax.report.contact_sheet import Tile
from cib_jax.retrieval.index import EXACT, KINDS, Index, parse_kind
from cib_jax.storage.collection import Collection, Hit, Photo

K = 20  # photos that are returned for each query by default
CANDIDATES = 500  # hits that are ordered by features: all, at least, by `rerank`; those of one distance without it
SAMPLE = 200  # codes of the index on which the recall of an approximate search is measured
FORMATS = ("table", "json")
ROWS, COLUMNS = 25, 20  # size of a contact sheet, at most


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

    Photos at one distance are ordered by the cosine of the network's features, so that a copy of the query comes first.

    Args:
      index: Folder or other address of the index, or the opened collection.
      query: Photo, or folder of photos.
      k: Number of photos for each query, with a radius their maximum; None: 20, with a radius all.
      radius: Maximum distance in bits.
      kind: "exact", or an approximate kind of `Index.of` with its settings, such as "ivf nprobe=64"; its recall is
        measured and printed.
      rerank: Whether to order the first hits by that cosine alone; in an index of an earlier version, which has no
        features, by the query's logits (`Index.rerank`).
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
    output = open_output(format, show, console)
    kind, settings = parse_kind(kind)
    if k is not None and k < 1:
        raise SearchError(f"--k must be 1 photo or more, got {k}; leave it out for {K}", field="--k")
    validate_radius(radius)
    if kind not in (EXACT, *KINDS):
        raise SearchError(f"--kind must be one of {', '.join((EXACT, *KINDS))}, got {kind!r}", field="--kind")
    if radius is not None and kind != EXACT:
        raise SearchError(f"--radius works with exact search alone; leave --kind={kind} out", field="--radius")
    one = output.sheet is None and not pathlib.Path(query).expanduser().is_dir()
    collection = open_collection(index, kind, settings, for_one=one)
    if not len(collection):
        raise SearchError(f"--index: {collection.uri} has no photos yet; run --mode=index again", field="--index")
    collection = collection.filtered(folder=folder, after=after, before=before)
    k = min(k or (len(collection) if radius is not None else K), len(collection))
    if kind != EXACT and not output.for_scripts:
        _print_recall(collection, k, output.console)
    results: list[Result] = []
    rows: list[tuple[Tile | None, list[Tile]]] = []
    queries = read_photos(find_photos(str(query), collection, "--query"), output, "--query")
    while batch := list(itertools.islice(queries, 1 if one else collection.hasher.batch_size)):
        squares = np.stack([decoded.square for _, decoded in batch])
        if collection.has_features:
            # Of the first batch's size: a smaller one is the only one.
            size = collection.hasher.batch_size if results else 0
            codes, features = collection.encode_with_features(squares, size=size)
        else:
            codes, features = collection.encode(squares), None
        if radius is not None:
            all_hits = collection.within(codes, radius)
        else:
            all_hits = collection.nearest(codes, max(k, CANDIDATES))
        if features is None and rerank:
            all_hits = collection.reranked(collection.hasher.logits(squares), all_hits)
        elif features is not None and rerank:
            all_hits = collection.reranked_by_features(features, all_hits)
        elif features is not None:
            firsts = collection.reranked_by_features(features, [hits[:CANDIDATES] for hits in all_hits])
            all_hits = [
                sorted(first, key=lambda hit: hit.distance) + hits[CANDIDATES:]
                for first, hits in zip(firsts, all_hits, strict=True)
            ]
        for (path, decoded), code, candidates in zip(batch, codes, all_hits, strict=True):
            hits = candidates[:k]
            photos = collection.photos([hit.number for hit in hits], thumbnails=False)
            result = Result(path, code, [(hit.distance, photo) for hit, photo in zip(hits, photos, strict=True)])
            record = {"query": path_as_utf8(path), "code": code.tobytes().hex()}
            record["root"] = path_as_utf8(collection.root)
            title = path
            if rerank:
                by = "the network's features" if collection.has_features else "the query's logits"
                title = f"{path}, ordered by {by}"
            _print_photos(output, title, record, "hits", result.hits)
            if output.sheet is not None and len(rows) < ROWS:
                # A large radius may find thousands.
                rows.append((Tile(decode(decoded.thumbnail, 0), "query"), tiles(collection, hits[:COLUMNS])))
            results.append(result)
    note = f", the first {ROWS} queries" if len(results) > ROWS else ""
    write_sheet(output, f"The nearest of {len(collection):,} photos", rows, note)
    return results


# Queries and hits


def open_collection(
    index: pathlib.Path | str | Collection,
    kind: str = EXACT,
    settings: Mapping[str, int] | None = None,
    *,
    for_one: bool = False,
) -> Collection:
    """Returns the collection that a user gave, or opens it, perhaps for one photo alone."""
    if isinstance(index, Collection):
        return index
    HINT.show(f"Opening {index}")
    return Collection.open(index, kind=kind, settings=settings, for_one=for_one)


def validate_radius(radius: int | None) -> None:
    """Raises a SearchError for a negative radius."""
    if radius is not None and radius < 0:
        raise SearchError(f"--radius must be 0 bits or more, got {radius}", field="--radius")


def find_photos(place: str, collection: Collection, flag: str) -> Photos:
    """Returns the photos of a place that the user gave: a photo, a folder, or a path that a search has printed."""
    path = pathlib.Path(place).expanduser()
    if not path.exists() and (inside := pathlib.Path(collection.root) / place).is_file():
        place, path = str(inside), inside
    if not path.exists():
        raise DataError(f"{flag} must be a photo or a folder of photos, got {path}, which does not exist", flag)
    if not path.is_dir():
        return Photos(place, [path.name], str(path.parent), collection.side, thumbnails=True)
    with inputs.blame_field(flag):
        found = inputs.load_inputs(place, takes="images", size=collection.side)
    assert isinstance(found, Photos)
    return dataclasses.replace(found, place=place, thumbnails=True)


def read_photos(found: Photos, output: "Output", flag: str) -> Iterator[tuple[str, DecodedPhoto]]:
    """Yields the paths, as the user gave them, and contents of the photos that can be read, and reports the others."""
    is_folder = os.path.isdir(os.path.expanduser(found.place))
    readable = 0
    truncated: list[str] = []
    found = dataclasses.replace(found, truncated=truncated)
    with inputs.blame_field(flag):
        for folder in found.closed:
            _print_unreadable(output, str(pathlib.Path(found.place) / folder.path), folder.reason)
        for number, read in found.read([range(len(found.names))]):
            name = str(pathlib.Path(found.place) / found.names[number]) if is_folder else found.place
            if found.names[number] in truncated:
                print_error(
                    f"{printable(name)} is truncated: it is searched as far as it goes, gray where bytes are missing"
                )
            if read.decoded is not None:
                readable += 1
                yield name, read.decoded
            elif not is_folder:
                raise DataError(f"{flag}: {name} cannot be read: {read.reason}; give another photo", flag)
            else:
                _print_unreadable(output, name, read.reason)
    if not readable:
        raise DataError(f"{flag}: no photo in {found.place} can be read; give another folder", flag)


def _print_unreadable(output: "Output", name: str, reason: str) -> None:
    if output.format == "json":
        print_json(output.console, {"query": path_as_utf8(name), "error": reason})
    elif output.for_scripts:
        print_error(f"{printable(name)} cannot be read: {reason}")
    else:
        print_message(output.console, f"{name} cannot be read: {reason}")


def _print_recall(collection: Collection, k: int, console: rich.console.Console) -> None:
    """Prints the share of the nearest photos that an approximate search finds, for some codes of the index itself."""
    some = stream_rng(0, "recall sample").choice(len(collection), min(SAMPLE, len(collection)), replace=False)
    codes = collection.codes[np.sort(some)]
    exact, _ = Index.of(collection.codes).search(codes, k)
    hits = [row[:k] for row in collection.nearest(codes, max(k, CANDIDATES))]  # as many as the search asks for
    # Counted by distance, because equally near photos are equally good.
    pairs = zip(hits, exact[:, -1].tolist(), strict=True)
    recall = np.mean([sum(hit.distance <= farthest for hit in row) / k for row, farthest in pairs])
    print_message(console, f"Approximate: recall@{k} {recall:.3f}, measured by {len(codes)} codes of the index")


# Output


class Output(NamedTuple):
    """Where results go, and how they are printed."""

    console: rich.console.Console
    format: str
    sheet: pathlib.Path | None
    """File of the contact sheet."""

    @property
    def for_scripts(self) -> bool:
        """Whether programs read the output, so that it has no sentences."""
        return self.format != "table"


def open_output(
    format: str,
    show: pathlib.Path | str | None,
    console: rich.console.Console | None,
    formats: Sequence[str] = FORMATS,
) -> Output:
    """Validates the flags of the output before anything is searched."""
    if format not in formats:
        raise ConfigError(f"--format must be one of {', '.join(formats)}, got {format!r}", field="--format")
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
    return Output(on_stdout(console), format, sheet)


def _print_photos(
    output: Output, title: str, record: dict[str, Any], name: str, photos: Sequence[tuple[int, Photo]]
) -> None:
    """Prints photos with their distances: a title and a table, or a record with the photos under `name`."""
    if output.for_scripts:
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


def tiles(collection: Collection, hits: Sequence[Hit]) -> list[Tile]:
    """Returns the tiles of photos in a contact sheet."""
    photos = collection.photos([hit.number for hit in hits])
    return [
        Tile(decode(photo.thumbnail, 0), format_bits(hit.distance), note=printable(photo.path))
        for hit, photo in zip(hits, photos, strict=True)
    ]


def format_bits(distance: int) -> str:
    """Returns a number of bits in words."""
    return "1 bit" if distance == 1 else f"{distance} bits"


def write_sheet(output: Output, title: str, rows: Sequence[tuple[Tile | None, Sequence[Tile]]], note: str) -> None:
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
    if not output.for_scripts:
        print_message(
            output.console, f"Drawn in {output.sheet}{note}" if rows else f"Nothing to draw in {output.sheet}"
        )

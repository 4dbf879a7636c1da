"""What an index holds that is near to some photos: a table, JSON lines, a contact sheet."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import rich.console
import rich.table
from jaxtyping import UInt8

from cib_jax import program
from cib_jax.collection.collection import Collection, Hit, Photo
from cib_jax.data import items as items_lib
from cib_jax.data.images import DataError
from cib_jax.data.items import Photos
from cib_jax.data.names import printable
from cib_jax.errors import Refusal
from cib_jax.jobs import presenting
from cib_jax.report.contact_sheet import Tile
from cib_jax.retrieval import approximate
from cib_jax.retrieval import index as index_lib
from cib_jax.retrieval.index import Index

K = 20
CANDIDATES = 100
"""Hits that are ordered anew, at least, where that is asked for."""
_SAMPLE = 200
"""Codes of the index by which the recall of an approximate kind is measured."""


class SearchJobError(Refusal):
    """A search cannot be made as it was asked for; the message names the flag and what to do."""


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
    kind: str = index_lib.EXACT,
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
    presenting.check_format(form)
    sheet = presenting.check_sheet(show)
    program.HINT.show(f"Opening {uri}")
    collection = Collection.open(uri, kind=kind, settings=settings)
    if not len(collection):
        raise SearchJobError(f"--index: {collection.uri} holds no photo yet; run --mode=index again")
    k = min(k or (len(collection) if radius is not None else K), len(collection))
    if kind != index_lib.EXACT and form == "table":
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
            _print(answer, collection.root, form, console, ", ordered by the query's logits" if rerank else "")
            if sheet is not None and len(rows) < presenting.ROWS:
                # Only of what is drawn: a large radius may find thousands.
                drawn = collection.photos([hit.number for hit in some[: presenting.COLUMNS]])
                pairs = [(hit.distance, photo) for hit, photo in zip(some, drawn, strict=False)]
                rows.append((Tile(presenting.pixels(one.thumbnail), "query"), presenting.tiles(pairs)))
            found.append(answer)
    if sheet is not None:
        presenting.write_sheet(sheet, f"The nearest of {len(collection):,} photos", rows)
        note = f", the first {presenting.ROWS} queries" if len(found) > presenting.ROWS else ""
        if form == "table":
            presenting.say(console, f"Drawn in {sheet}{note}")
    return found


def _check(k: int | None, radius: int | None, kind: str) -> None:
    if k is not None and k < 1:
        raise SearchJobError(f"--k: wanted 1 photo or more, got {k}")
    if radius is not None and radius < 0:
        raise SearchJobError(f"--radius: wanted 0 bits or more, got {radius}")
    if kind not in (index_lib.EXACT, *approximate.KINDS):
        raise SearchJobError(f"--kind: {kind!r} is not one of {index_lib.EXACT}, {', '.join(approximate.KINDS)}")
    if radius is not None and kind != index_lib.EXACT:
        raise SearchJobError(f"--radius: it is always searched exactly; leave --kind={kind} out")


def _queries(query: str, collection: Collection, console: rich.console.Console, form: str) -> Iterator[Query]:
    """Yields the photos that can be read, and tells of the others."""
    path = pathlib.Path(query).expanduser()
    if not path.exists():
        raise DataError(f"--query: there is no {path}; give a photo or a folder of photos")
    readable = 0
    with items_lib.asked_for_as("--query"):
        if path.is_dir():
            found = items_lib.find(query, takes="images", size=collection.side)
            assert isinstance(found, Photos)
        else:
            found = Photos(str(path), [path.name], str(path.parent), collection.side)
        for number, read in dataclasses.replace(found, see=True).read([range(len(found.names))]):
            name = str(pathlib.Path(query) / found.names[number]) if path.is_dir() else query
            if read.seen is None:
                if not path.is_dir():
                    raise DataError(f"--query: {name} cannot be read: {read.reason}; give another photo")
                _tell_unreadable(name, read.reason, form, console)
                continue
            readable += 1
            yield Query(name, read.seen.square, read.seen.thumbnail)
    if not readable:
        raise DataError(f"--query: no photo in {query} can be read; give another folder")


def _tell_unreadable(name: str, reason: str, form: str, console: rich.console.Console) -> None:
    if form == "json":
        presenting.line(console, {"query": printable(name), "error": reason})
    else:
        presenting.say(console, f"{printable(name)} cannot be read: {reason}")


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


def _print(answer: Found, root: str, form: str, console: rich.console.Console, note: str) -> None:
    if form == "json":
        hits = [
            {"path": printable(photo.path), "distance": distance}
            | {"id": photo.id, "width": photo.width, "height": photo.height}
            for distance, photo in answer.hits
        ]
        about = {"query": printable(answer.query), "code": answer.code.tobytes().hex(), "root": printable(root)}
        presenting.line(console, about | {"hits": hits})
        return
    presenting.say(console, answer.query + note)
    if not answer.hits:
        presenting.say(console, "nothing was found")
        return
    table = rich.table.Table()
    table.add_column("", justify="right")
    table.add_column("bits", justify="right")
    table.add_column("photo", overflow="fold")
    table.add_column("pixels", justify="right", no_wrap=True)
    for rank, (distance, photo) in enumerate(answer.hits, 1):
        size = f"{photo.width} × {photo.height}"
        table.add_row(str(rank), str(distance), presenting.shown(photo.path), size)
    console.print(table)


def _tell_recall(collection: Collection, k: int, console: rich.console.Console) -> None:
    """Tells how many of the nearest an approximate kind finds, by some codes of the index itself."""
    some = np.random.default_rng(0).choice(len(collection), min(_SAMPLE, len(collection)), replace=False)
    codes = collection.codes[np.sort(some)]
    exact, _ = Index.of(collection.codes).search(codes, k)
    hits = collection.nearest(codes, k)
    # By distance, since of equal ones any will do.
    pairs = zip(hits, exact[:, -1].tolist(), strict=True)
    recall = np.mean([sum(hit.distance <= farthest for hit in row) / k for row, farthest in pairs])
    presenting.say(console, f"Approximate: recall@{k} {recall:.3f}, measured by {len(codes)} codes of the index")

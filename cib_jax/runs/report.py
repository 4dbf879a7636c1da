"""What a run's codes find, as a picture: queries with the images nearest to them."""

import contextlib
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from cib_jax.data.dataset import ImageSet, resized
from cib_jax.random_streams import stream_rng
from cib_jax.report import contact_sheet, figures
from cib_jax.report.contact_sheet import Tile
from cib_jax.report.html import Grid, Picture, Section, render
from cib_jax.retrieval import code_quality, hamming, metrics
from cib_jax.retrieval.metrics import Curves
from cib_jax.runs.context import RunContext
from cib_jax.runs.workdir import write_bytes

# jobs.neighbors: What a run's codes find, as a picture: queries with the images nearest to them.


NEAREST = 10


def draw(
    setting: RunContext,
    query: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    some: Sequence[int],
    title: str,
    captions: Sequence[str] = (),
) -> bytes:
    """Returns a PNG of the queries `some` with their ten nearest images.

    With labels, what shares none with its query is framed as a miss.

    Args:
      setting: of the run; its data are images.
      query: packed codes of all queries.
      database: packed codes of what is searched.
      some: which queries to show.
      title: of the picture.
      captions: a few words under each query.
    """
    splits = setting.splits
    found = hamming.rank(query[list(some)], database, min(NEAREST, len(database)))
    rows = []
    for number, (index, nearest) in enumerate(zip(some, found, strict=True)):
        distances = np.bitwise_count(query[index] ^ database[nearest]).sum(axis=1)
        tiles = [
            Tile(
                _image(splits.database, place),
                "1 bit" if distance == 1 else f"{distance} bits",
                _relevant(splits.query, index, splits.database, place),
            )
            for place, distance in zip(nearest.tolist(), distances.tolist(), strict=True)
        ]
        rows.append((Tile(_image(splits.query, index), captions[number] if captions else "query"), tiles))
    known = splits.query.labels is not None
    legend = "; blue: shares a label, orange with a notch: does not" if known else ""
    file = io.BytesIO()
    contact_sheet.draw(title + legend, rows).save(file, "PNG")
    return file.getvalue()


def _image(images: ImageSet, index: int) -> UInt8[np.ndarray, "height width 3"]:
    image = images.images[index]
    return image if max(image.shape[:2]) <= contact_sheet.SIDE else resized(images.images, index, contact_sheet.SIDE)


def _relevant(query: ImageSet, index: int, database: ImageSet, place: int) -> bool | None:
    if query.labels is None or database.labels is None:
        return None
    mine, theirs = query.labels[index], database.labels[place]
    return bool((mine & theirs).any()) if query.labels.ndim == 2 else bool(mine == theirs)


# jobs.report: The report of a run: its numbers gathered, drawn, and written into one folder.


QUERIES = 8
"""Queries in each picture of what was found."""


def write(
    setting: RunContext,
    query: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    results: dict[str, Any],
    folder: pathlib.Path,
) -> pathlib.Path:
    """Draws a run's figures into `folder` and returns the path of the page that holds them all.

    Args:
      setting: of the run.
      query: packed codes of the queries.
      database: packed codes of what is searched.
      results: what results.json holds.
      folder: made if need be; figures of an earlier report in it are replaced.
    """
    asked, searched = setting.splits.query.labels, setting.splits.database.labels
    found = None
    if asked is not None and searched is not None:
        found = metrics.curves(query, database, asked, searched, results["k"])
    sections = [
        Section("Training", _training(setting.workdir)),
        Section("Retrieval", _retrieval(found, results)),
        Section("The codes", _codes(setting, database, results)),
        Section("What they find", _found(setting, query, database, found)),
    ]
    config = setting.config
    title = f"{config.data.name} · {results['objective']} · {config.bits} bits"
    page = render(
        title,
        _lead(results),
        [_figures_of(results), _facts(results)],
        sections,
        notes=_notes(results),
        config=json.dumps(config.to_dict(), indent=2, ensure_ascii=False),
        wide=("training", "random_queries", "worst_queries"),
    )
    return publish(folder, [picture for section in sections for picture in section.pictures], page)


def publish(folder: pathlib.Path, pictures: Sequence[Picture], page: str) -> pathlib.Path:
    """Writes a report, the page last; pictures of an earlier one that are no more drawn are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_bytes(folder / f"{picture.name}.png", picture.png)
    kept = {f"{picture.name}.png" for picture in pictures}
    for stale in folder.glob("*.png"):
        if stale.name not in kept:
            stale.unlink()
    path = folder / "index.html"
    # Names of files and classes may be no valid Unicode.
    write_bytes(path, page.encode("utf-8", "backslashreplace"))
    return path


def picture(name: str, drawn: Figure, note: str = "") -> Picture:
    """Returns a figure as a PNG, with its title as the words for it."""
    file = io.BytesIO()
    drawn.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return Picture(name, file.getvalue(), drawn.get_suptitle(), note)


def _training(workdir: pathlib.Path) -> list[Picture]:
    path = workdir / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a line cut short when the run was killed
            records.append(json.loads(line))
    if not records:
        return []
    return [picture("training", figures.training(records), "Means over each epoch's steps, from metrics.jsonl")]


def _retrieval(found: Curves | None, results: dict[str, Any]) -> list[Picture]:
    if found is None:
        return []
    curve = results["metrics"]["precision_recall"]
    recall, precision = np.asarray(curve["recall"]), np.asarray(curve["precision"])
    return [
        picture(
            "map_against_k", figures.map_against_k(found), "Ties in database order, as published figures have them"
        ),
        picture(
            "precision_recall",
            figures.precision_recall(precision, recall, found.chance),
            "Means over queries, by Hamming radius; the numbers at the marks are radii in bits",
        ),
        picture("precision_returned", figures.precision_against_returned(found, found.chance)),
        picture("precision_radius", figures.precision_within_radius(found), "What a lookup in a hash table finds"),
        picture(
            "distances",
            figures.distances(found.relevant, found.irrelevant),
            "All pairs of a query and a database image",
        ),
    ]


def _codes(
    setting: RunContext, database: UInt8[np.ndarray, "database bytes"], results: dict[str, Any]
) -> list[Picture]:
    where = "Of the database"
    drawn = [
        picture("bit_balance", figures.bit_balance(results["metrics"]["code_health"]["bit_balance"]), where),
        picture("bit_correlation", figures.bit_correlation(code_quality.bit_correlation(database)), where),
        picture("occupancy", figures.occupancy(code_quality.occupancy(database), setting.config.bits), where),
    ]
    embedded = _embedded(setting, database)
    return [*drawn, embedded] if embedded else drawn


def _embedded(setting: RunContext, database: UInt8[np.ndarray, "database bytes"]) -> Picture | None:
    config = setting.config
    draws = stream_rng(config.data.seed, "t-SNE images")
    some = np.sort(draws.permutation(len(database))[: config.report.embedded])
    points = figures.points(database[some], config.data.seed)
    if points is None:
        return None
    labels = setting.splits.database.labels
    note = (
        f"{len(some):,} random images of the database, drawn from data.seed; perplexity 30, or a third of fewer than 90"
    )
    if labels is None:
        return picture("tsne", figures.embedding(points, None, [], None), note)
    shown = figures.classes(labels[some], setting.source.classes)
    if labels.ndim == 2:
        note += "; of several labels, an image shows the rarest one of those in the legend"
    agreement = figures.agreement(database[some], labels[some])
    return picture("tsne", figures.embedding(points, shown.labels, shown.names, agreement), note)


def _found(
    setting: RunContext,
    query: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    found: Curves | None,
) -> list[Picture]:
    if not _are_images(setting.splits.query):
        return []
    some = stream_rng(setting.config.data.seed, "retrieval examples").permutation(len(query))[:QUERIES].tolist()
    bits = 8 * query.shape[1]
    title = f"{len(some)} random queries and their nearest by Hamming distance, of {bits} bits"

    def captions(which: list[int]) -> list[str]:
        if found is None:
            return []
        return [f"{_class(setting, index)}, AP {found.average_precision[index]:.2f}" for index in which]

    drawn = [
        Picture(
            "random_queries",
            draw(setting, query, database, some, title, captions(some)),
            title,
            "Drawn from data.seed",
        )
    ]
    if found is None or not found.answerable.any():
        return drawn
    answerable = np.flatnonzero(found.answerable)
    worst = answerable[np.argsort(found.average_precision[answerable], kind="stable")][:QUERIES].tolist()
    title = f"The {len(worst)} queries that find least, and their nearest"
    note = f"Least average precision at {found.k[-1]:,}, of queries that something in the database is relevant to"
    worst_png = draw(setting, query, database, worst, title, captions(worst))
    return [*drawn, Picture("worst_queries", worst_png, title, note)]


def _class(setting: RunContext, index: int) -> str:
    """Returns the class of a query, shortened to what fits under it; "query" where it has several or no name."""
    labels, names = setting.splits.query.labels, setting.source.classes
    if labels is None or labels.ndim != 1 or labels[index] >= len(names):
        return "query"
    name = names[int(labels[index])]
    return name if len(name) <= 10 else name[:9] + "…"


def _are_images(images: ImageSet) -> bool:
    return np.ndim(images.images[0]) == 3


def _lead(results: dict[str, Any]) -> str:
    counts = results["counts"]
    searched = f"{counts['query']:,} queries on {counts['database']:,} images"
    if results["map"] is None:
        return f"{searched}; without labels, codes are judged by their health and by eye."
    return f"MAP@{results['k']} {results['map']:.4f}: {searched}; {counts['train']:,} images trained, without labels."


def _figures_of(results: dict[str, Any]) -> Grid:
    figures_, code_health = results["metrics"], results["metrics"]["code_health"]
    rows = []
    if results["map"] is not None:
        at = figures_["precision_at_k"]
        rows = [
            (f"MAP@{results['k']}, ties in database order", f"{results['map']:.4f}"),
            (f"MAP@{results['k']}, ties in random order", f"{results['map_tie_aware']:.4f}"),
            *((f"precision@{k}", f"{value:.4f}") for k, value in zip(at["k"], at["precision"], strict=True)),
            ("precision within Hamming radius 2", f"{figures_['precision_radius_2']:.4f}"),
            ("queries with nothing within radius 2", f"{figures_['empty_radius_2']:.1%}"),
        ]
    rows += [
        ("distinct codes in the database", f"{code_health['distinct_codes']:,}"),
        ("mean |correlation| of two bits", f"{code_health['mean_abs_correlation']:.3f}"),
        ("entropy of the codes", f"{code_health['entropy']:.2f} bits"),
    ]
    return Grid("Figures", ("figure", "value"), rows)


def _facts(results: dict[str, Any]) -> Grid:
    counts, seconds = results["counts"], results["seconds"]
    rows = [
        ("protocol", f"{results['protocol']['name']}: {results['protocol']['says']}"),
        ("published tables", results["protocol"]["published_tables"]),
        ("backbone", f"{results['backbone']} at {results['image_size']} px" if results["image_size"] else "none"),
        ("images: queries, database, training", f"{counts['query']:,}, {counts['database']:,}, {counts['train']:,}"),
        ("seconds", ", ".join(f"{part} {value:.1f}" for part, value in seconds.items())),
    ]
    return Grid("Setting", ("what", "value"), rows)


def _notes(results: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        "Average precision at k divides by the number of relevant images among the first k, and is 0 without any; two "
        "images are relevant to each other when they share a label.",
        "No loss sees a label. Labels measure, draw as many training images of each class where the protocol says so, "
        + (
            "and chose the checkpoint here, by validation MAP."
            if results.get("best_validation_map") is not None
            else "and chose nothing else here."
        ),
        f"Made with {versions}.",
    ]

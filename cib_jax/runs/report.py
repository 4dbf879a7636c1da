"""The report of a run: its figures, tables and retrieved images, on one page."""

import contextlib
import io
import json
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from cib_jax.console import progress_bar
from cib_jax.data.dataset import ImageSet, resized
from cib_jax.files import count, write_bytes
from cib_jax.hint import HINT
from cib_jax.random_streams import stream_rng
from cib_jax.report import contact_sheet, figures, tables
from cib_jax.report.contact_sheet import Tile
from cib_jax.report.html import Grid, Picture, Section, render
from cib_jax.retrieval import code_quality, hamming, metrics
from cib_jax.retrieval.metrics import Curves
from cib_jax.runs.context import RunContext

QUERIES = 8  # in each picture of retrieved images
NEAREST = 10  # images that are shown beside a query


def write_report(
    run: RunContext,
    query: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    results: dict[str, Any],
    folder: pathlib.Path,
) -> pathlib.Path:
    """Draws a run's figures into `folder` and returns the path of the page that holds them all.

    `results` is the content of results.json. Figures of an earlier report in the folder are replaced.
    """
    query_labels, database_labels = run.splits.query.labels, run.splits.database.labels
    curves = None
    if query_labels is not None and database_labels is not None:
        with progress_bar(run.console, "Curves", len(query), unit="queries", delay=1) as advance:
            curves = metrics.curves(query, database, query_labels, database_labels, results["k"], progress=advance)
    sections = [
        Section("Training", _draw_training(run.workdir)),
        Section("Retrieval", _draw_retrieval(curves, results, run.noun) if curves else []),
        Section("The codes", _draw_codes(run, database, results)),
        Section("What they find", _draw_retrieved(run, query, database, curves)),
    ]
    return write_page(
        folder,
        f"{run.config.data.name} · {results['objective']} · {run.config.bits} bits",
        _format_lead(results, run.noun),
        [Grid("Figures", ("figure", "value"), tables.metric_rows(results)), _settings(results)],
        sections,
        notes=_format_notes(results),
        config=run.config,
        wide=("training", "random_queries", "worst_queries"),
    )


def write_page(
    folder: pathlib.Path,
    title: str,
    lead: str,
    grids: Sequence[Grid],
    sections: Sequence[Section],
    *,
    notes: Sequence[str],
    config: ml_collections.ConfigDict,
    wide: Collection[str] = (),
) -> pathlib.Path:
    """Writes a report's pictures and then its page, removes pictures of an earlier report, and returns the page's path.

    The page shows the title, the sentence `lead`, the tables, the pictures, of which those in `wide` take the whole
    width, and the notes and config that the report was made with.
    """
    text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False)
    page = render(title, lead, grids, sections, notes=notes, config=text, wide=wide)
    pictures = [picture for section in sections for picture in section.pictures]
    files = {f"{each.name}.png": each.png for each in pictures}
    files |= {f"{each.name}.pdf": each.pdf for each in pictures if each.pdf}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_bytes(folder / name, content)
    for stale in (*folder.glob("*.png"), *folder.glob("*.pdf")):
        if stale.name not in files:
            stale.unlink()
    HINT.clear()
    path = folder / "index.html"
    # File and class names need not be valid Unicode.
    write_bytes(path, page.encode("utf-8", "backslashreplace"))
    return path


def picture(name: str, figure: Figure, note: str = "") -> Picture:
    """Returns a figure as a PNG and as a PDF for papers, with its title as the alternative text."""
    HINT.show(f"Drawing the report: {name.replace('_', ' ')}")
    png, pdf = io.BytesIO(), io.BytesIO()
    # Without version and time, so that the same figure gives the same bytes.
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    figure.set_layout_engine("none")  # keeps the layout, whose computation takes half of the time
    figure.savefig(pdf, format="pdf", metadata={"Creator": None, "Producer": None, "CreationDate": None})
    return Picture(name, png.getvalue(), figure.get_suptitle(), note, pdf.getvalue())


# Figures


def _draw_training(workdir: pathlib.Path) -> list[Picture]:
    path = workdir / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):  # the last line may be incomplete if the run was killed
            records.append(json.loads(line))
    if not records:
        return []
    return [picture("training", figures.training(records), "Means over each epoch's steps, from metrics.jsonl")]


def _draw_retrieval(curves: Curves, results: dict[str, Any], noun: str) -> list[Picture]:
    precision, recall = (np.asarray(results["metrics"]["precision_recall"][name]) for name in ("precision", "recall"))
    precision_recall = figures.precision_recall(precision, recall, curves.chance)
    by_radius = "Means over queries, by Hamming radius; the numbers at the marks are radii in bits"
    distances = figures.distances(curves.relevant, curves.irrelevant)
    return [
        picture("map_against_k", figures.map_against_k(curves), "Ties in database order, as in published figures"),
        picture("precision_recall", precision_recall, by_radius),
        picture("precision_returned", figures.precision_against_returned(curves, curves.chance, noun)),
        picture("precision_radius", figures.precision_within_radius(curves), "Result of a lookup in a hash table"),
        picture("distances", distances, f"All pairs of a query and one of the {noun} of the database"),
    ]


def _draw_codes(
    run: RunContext, database: UInt8[np.ndarray, "database bytes"], results: dict[str, Any]
) -> list[Picture]:
    where, noun = "Of the database", run.noun
    correlation = code_quality.bit_correlation(database, run.config.bits)
    drawn = [
        picture("bit_balance", figures.bit_balance(results["metrics"]["code_health"]["bit_balance"], noun), where),
        picture("bit_correlation", figures.bit_correlation(correlation), where),
        picture("occupancy", figures.occupancy(code_quality.occupancy(database), run.config.bits, noun), where),
    ]
    config, labels = run.config, run.splits.database.labels
    draws = stream_rng(config.data.seed, "t-SNE images")
    some = np.sort(draws.permutation(len(database))[: config.report.embedded])
    HINT.show(f"Drawing the report: t-SNE of {len(some):,} codes")
    points = figures.points(database[some], config.data.seed)
    if points is None:
        return drawn
    note = f"{len(some):,} random {noun} of the database, drawn from data.seed; "
    note += "perplexity 30, or a third of fewer than 90 codes"
    if labels is None:
        embedded = figures.embedding(points, None, [], None, noun)
    else:
        shown = figures.classes(labels[some], run.source.classes)
        if labels.ndim == 2:
            note += "; one with several labels shows the rarest of those in the legend"
        agreement = figures.agreement(database[some], labels[some])
        embedded = figures.embedding(points, shown.labels, shown.names, agreement, noun)
    return [*drawn, picture("tsne", embedded, note)]


# Retrieved images


def _draw_retrieved(
    run: RunContext,
    query: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    curves: Curves | None,
) -> list[Picture]:
    """Returns pictures of random queries and, if there are labels, of the worst ones, with their nearest images."""
    if np.ndim(run.splits.query.images[0]) != 3:  # features
        return []

    def draw(name: str, some: list[int], title: str, note: str) -> Picture:
        captions = ["query"] * len(some)
        if curves is not None:
            captions = [f"{_class_name(run, index)}, AP {curves.average_precision[index]:.2f}" for index in some]
        return Picture(name, _draw_neighbors(run, query, database, some, title, captions), title, note)

    some = stream_rng(run.config.data.seed, "retrieval examples").permutation(len(query))[:QUERIES].tolist()
    title = f"{count(len(some), 'random query', 'random queries')}, with the nearest by Hamming distance"
    title += f", of {8 * query.shape[1]} bits"
    drawn = [draw("random_queries", some, title, "Drawn from data.seed")]
    if curves is None or not curves.answerable.any():
        return drawn
    answerable = np.flatnonzero(curves.answerable)
    worst = answerable[np.argsort(curves.average_precision[answerable], kind="stable")][:QUERIES].tolist()
    title = f"The {count(len(worst), 'query', 'queries')} with the lowest average precision, and the nearest"
    note = f"Least average precision at {curves.k[-1]:,}, among queries with a relevant image in the database"
    return [*drawn, draw("worst_queries", worst, title, note)]


def _draw_neighbors(
    run: RunContext,
    query: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    some: Sequence[int],
    title: str,
    captions: Sequence[str],
) -> bytes:
    """Returns a PNG of the queries `some` with their nearest images, framed by their relevance if there are labels."""
    splits, rows = run.splits, []
    ranked = hamming.rank(query[list(some)], database, min(NEAREST, len(database)))
    for index, caption, nearest in zip(some, captions, ranked, strict=True):
        distances = np.bitwise_count(query[index] ^ database[nearest]).sum(axis=1)
        tiles = [
            Tile(
                _thumbnail(splits.database, place),
                count(distance, "bit"),
                _is_relevant(splits.query, index, splits.database, place),
            )
            for place, distance in zip(nearest.tolist(), distances.tolist(), strict=True)
        ]
        rows.append((Tile(_thumbnail(splits.query, index), caption), tiles))
    legend = "; blue: shares a label, orange with a notch: does not" if splits.query.labels is not None else ""
    file = io.BytesIO()
    contact_sheet.draw(title + legend, rows).save(file, "PNG")
    return file.getvalue()


def _thumbnail(images: ImageSet, index: int) -> UInt8[np.ndarray, "height width 3"]:
    image = images.images[index]
    return image if max(image.shape[:2]) <= contact_sheet.SIDE else resized(images.images, index, contact_sheet.SIDE)


def _is_relevant(query: ImageSet, index: int, database: ImageSet, place: int) -> bool | None:
    if query.labels is None or database.labels is None:
        return None
    mine, theirs = query.labels[index], database.labels[place]
    return bool((mine & theirs).any()) if query.labels.ndim == 2 else bool(mine == theirs)


def _class_name(run: RunContext, index: int) -> str:
    """Returns a query's class, shortened to fit below its image; "query" if it has several classes or no name."""
    labels, names = run.splits.query.labels, run.source.classes
    if labels is None or labels.ndim != 1 or labels[index] >= len(names):
        return "query"
    name = names[int(labels[index])]
    return name if len(name) <= 10 else name[:9] + "…"


# Text


def _format_lead(results: dict[str, Any], noun: str) -> str:
    counts = results["counts"]
    searched = f"{count(counts['query'], 'query', 'queries')} on {counts['database']:,} {noun}"
    if results["map"] is None and "neighbor_recall" in results["metrics"]:
        return f"{searched}; there are no labels, so codes are judged by the nearest neighbors that they find."
    if results["map"] is None:
        return f"{searched}; there are no labels, so judge the codes by their statistics and by eye."
    return f"MAP@{results['k']} {results['map']:.4f}: {searched}; {counts['train']:,} {noun} trained, without labels."


def _settings(results: dict[str, Any]) -> Grid:
    counts = results["counts"]
    rows = [
        ("protocol", f"{results['protocol']['name']}: {results['protocol']['says']}"),
        ("published tables", results["protocol"]["published_tables"]),
        ("backbone", f"{results['backbone']} at {results['image_size']} px" if results["image_size"] else "none"),
        ("queries, database, training", f"{counts['query']:,}, {counts['database']:,}, {counts['train']:,}"),
        ("seconds", ", ".join(f"{part} {value:.1f}" for part, value in results["seconds"].items() if value)),
    ]
    return Grid("Setting", ("what", "value"), rows)


def _format_notes(results: dict[str, Any]) -> list[str]:
    judged = [
        "Average precision at k divides by the number of relevant items among the first k, and is 0 without any; two "
        "items are relevant to each other when they share a label.",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    validated = results.get("best_validation_map") is not None
    more = "choosing the checkpoint by validation MAP" if validated else "nothing else"
    return [
        *(judged if results["map"] is not None else []),
        "No loss sees a label. Labels serve for measuring, for drawing as many training items of each class where the "
        f"protocol requires it, and for {more}.",
        f"Made with {versions}.",
    ]

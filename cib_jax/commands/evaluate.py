"""Evaluation of a run: codes of queries and database, retrieval metrics, results.json and its table."""

import functools
import importlib.metadata
import pathlib
import platform
import time
import zipfile
import zlib
from typing import Any

import jax
import ml_collections
import numpy as np
import rich.console
import rich.table
from jaxtyping import UInt8

import cib_jax
from cib_jax.codes import first_bits, nested_lengths, pack_bits
from cib_jax.config import flatten, schema
from cib_jax.console import on_stdout, print_message, progress_bar
from cib_jax.data.dataset import gather
from cib_jax.distributed import multihost
from cib_jax.errors import ConfigError, DataError
from cib_jax.files import count, first_line, open_regular
from cib_jax.hint import HINT
from cib_jax.inference.serialization import read_config, read_standard, restore_best, validate_fingerprint
from cib_jax.models.encoder import Params
from cib_jax.report import tables
from cib_jax.retrieval import code_quality, metrics
from cib_jax.runs import context, features
from cib_jax.runs.context import RunContext
from cib_jax.runs.workdir import claim_workdir, write_array, write_json
from cib_jax.training.train_step import Progress

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "numpy")
"""Packages with versions that results.json records."""


MAX_SHIFT = 0.01
"""Difference of MAP from tie-aware MAP beyond which the order of the database is named as its cause."""


def evaluate(
    workdir: pathlib.Path | str | None,
    *,
    codes: pathlib.Path | str | None = None,
    overrides: dict[str, Any] | None = None,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Evaluates a trained run, writes its results and codes/, and returns the results.

    They go to results.json, or to a file beside it if the run is unfinished or `k` differs from the run's own.

    Args:
      workdir: Folder of a trained run, None with `codes`.
      codes: A .npz file with `query_codes`, `database_codes`, `query_labels` and `database_labels` of any model, which
        are evaluated instead; codes are packed uint8, or one number for each bit, which is 1 above 0.
      overrides: Values of config fields by dotted name, for fields that affect the evaluation and not the run.
      console: Console for messages and the table.

    Raises:
      CheckpointError: There is no trained run in `workdir`.
      ConfigError, DataError, WeightsError: As in training.

    Examples:
      >>> import rich.console
      >>> import cib_jax as cib
      >>> quiet = rich.console.Console(quiet=True)
      >>> results = cib.evaluate_run("DIGITS", overrides={"k": 10}, console=quiet)
      >>> 0 < results["map"] < 1
      True
    """
    if codes is not None:
        if wrong := sorted((overrides or {}).keys() - {"k"}):
            problem = "must be left out, since codes in a file are ranked as they are; config.k alone may be given"
            raise ConfigError(f"config.{wrong[0]} {problem}", field=f"config.{wrong[0]}")
        return _evaluate_file(pathlib.Path(codes), (overrides or {}).get("k", 0), on_stdout(console))
    workdir = pathlib.Path(workdir or "")
    console = on_stdout(console) if multihost.is_first_process() else rich.console.Console(quiet=True)
    with multihost.shared_errors():
        trained = read_config(workdir)
        config = override_fields(trained.copy_and_resolve_references(), overrides or {})
        schema.validate(config, trained=True)
    with claim_workdir(workdir):
        with multihost.shared_errors():
            standard = read_standard(workdir, config)
        run = multihost.run_first_then_others(
            lambda: context.prepare_run(config, workdir, console, trained=True, standard=standard)
        )
        context.validate_same_data(run)
        with multihost.shared_errors():
            params, progress, extra = restore_best(workdir, run.initial, config)
            validate_fingerprint(run.fingerprint, extra, workdir)
        if not progress.finished:
            print_message(
                console,
                f"{workdir}: training stopped at epoch {progress.epoch} of {run.schedule.epochs}; its last checkpoint "
                "is evaluated",
            )
        if changed := context.describe_data_change(run, extra):
            print_message(console, f"{workdir}: {changed}; the evaluation uses the current data")
        # results.json belongs to the finished run; an evaluation under other conditions gets a file of its own.
        same = progress.finished and config.k == trained.k and not changed
        name = "results.json" if same else f"results-epoch{progress.epoch}-k{run.protocol.k or 'all'}.json"
        return evaluate_run(run, params, progress, float(extra.get("bank_seconds", 0.0)), name)


def _evaluate_file(path: pathlib.Path, k: int, console: rich.console.Console) -> dict[str, Any]:
    """Evaluates the codes and labels in a .npz file, prints the table, and returns the figures."""
    try:
        with open_regular(path) as opened, np.load(opened, allow_pickle=False) as file:
            *both, query_labels, database_labels = (
                file[f"{side}_{kind}"] for kind in ("codes", "labels") for side in ("query", "database")
            )
    except (
        OSError,
        EOFError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        needed = "query_codes, database_codes, query_labels and database_labels"
        raise DataError(f"--codes must be a .npz with {needed}, got {path} ({first_line(error)})", "--codes") from None
    query, database = (one if one.dtype == np.uint8 else np.asarray(pack_bits(one)) for one in both)
    figures = metrics.evaluate(query, database, query_labels, database_labels, k if k > 0 else len(database))
    figures["code_health"] = code_quality.code_health(database, None if both[1].dtype == np.uint8 else both[1].shape[1])
    means = {name: figures.pop(name) for name in ("map", "map_tie_aware")}
    results = {**means, "k": figures["k"], "counts": {"database": len(database)}, "metrics": figures}
    print_message(console, f"{path.name} · {count(len(query), 'query', 'queries')} on {len(database):,}")
    table = rich.table.Table("figure", rich.table.Column("value", justify="right"))
    for row in tables.metric_rows(results):
        table.add_row(*row)
    console.print(table)
    if warning := order_warning(means["map"], means["map_tie_aware"]):
        print_message(console, warning)
    return results


def override_fields(config: ml_collections.ConfigDict, overrides: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns the config of a trained run with other values of fields that do not change the run."""
    known = flatten(config)
    for name, value in overrides.items():
        if name in known and known[name] == value:
            continue
        if name not in schema.MEASURING | schema.MAY_CHANGE:
            raise ConfigError(
                f"config.{name} cannot be changed to {value!r}: the run was trained with {known.get(name)!r}; leave it "
                "out, or train again in another --workdir",
                field=f"config.{name}",
            )
        config.update_from_flattened_dict({name: value})
    return config


def evaluate_run(
    run: RunContext, params: Params, progress: Progress, bank_seconds: float, name: str = "results.json"
) -> dict[str, Any]:
    """Encodes and ranks, writes `name` and codes/, prints the table, and returns the results."""
    config, splits = run.config, run.splits
    begun = time.perf_counter()
    query = features.codes(run, params, splits.query, "Encoding queries")
    database = features.codes(run, params, splits.database, "Encoding database")
    seconds = {"bank": bank_seconds, "train": progress.seconds, "encode": time.perf_counter() - begun}
    best = {config.train.validate_by: progress.best_score} if progress.best_step else {}
    origin = {
        "objective": config.objective,
        "epochs": progress.epoch,
        "best_validation_map": best.get("map"),
        "best_separation": best.get("separation"),
    }
    return evaluate_codes(run, query, database, origin, seconds, name)


def evaluate_codes(
    run: RunContext,
    query: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    origin: dict[str, Any],
    seconds: dict[str, float],
    name: str = "results.json",
) -> dict[str, Any]:
    """Ranks packed codes of any origin, writes `name` and codes/, prints the table, and returns the results.

    `origin` holds entries of the results about the origin of the codes: its "objective" names the method. `seconds`
    holds the duration of each step so far.
    """
    splits = run.splits
    begun = time.perf_counter()
    k = run.protocol.k or len(database)
    figures: dict[str, Any] = {"map": None, "map_tie_aware": None}
    if splits.query.labels is not None and splits.database.labels is not None:
        query_labels, database_labels = splits.query.labels, splits.database.labels

        def evaluate_queries(mine: slice) -> dict[str, Any]:
            size = len(query_labels[mine])
            with progress_bar(run.console, "Ranking", size, unit="queries", delay=1) as advance:
                data = query[mine], database, query_labels[mine], database_labels
                found = metrics.evaluate(*data, k, progress=advance)
            found |= {"queries": len(query)}
            if run.config.get("nested"):
                found["map_of_first_bits"] = maps_of_first_bits(mine) | {str(run.config.bits): found["map"]}
            return found

        def maps_of_first_bits(mine: slice) -> dict[str, float]:
            maps = {}
            for bits in nested_lengths(run.config.bits)[:-1]:
                data = first_bits(query[mine], bits), first_bits(database, bits), query_labels[mine], database_labels
                maps[str(bits)] = metrics.mean_average_precision(*data, k, progress=False)
            return maps

        figures = multihost.mean_over_processes(evaluate_queries, len(query))
    elif run.standard is not None and (ks := [k for k in (10, 100) if k <= len(database)]):
        vectors = gather(splits.query.images, np.arange(len(query)))
        blocks = functools.partial(context.blocks, splits.database)

        def recall_of_queries(mine: slice) -> dict[str, Any]:
            found = code_quality.neighbor_recall(query[mine], database, vectors[mine], blocks, ks)
            return {str(k): recall for k, recall in found.items()}

        figures["neighbor_recall"] = multihost.mean_over_processes(recall_of_queries, len(query))
    figures["code_health"] = code_quality.code_health(database, run.config.bits)
    seconds = seconds | {"metrics": time.perf_counter() - begun}
    results = _results(run, figures, origin, k, seconds)
    if multihost.is_first_process():
        _write(run, query, database, results, name)
    multihost.barrier()
    return results


def _write(
    run: RunContext,
    query: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    results: dict[str, Any],
    name: str,
) -> None:
    """Writes codes/, `name` and the report, and prints the table."""
    splits, folder = run.splits, run.workdir / "codes"
    for side, codes, images in (("query", query, splits.query), ("database", database, splits.database)):
        write_array(folder / f"{side}_codes.npy", codes)
        if images.labels is not None:
            write_array(folder / f"{side}_labels.npy", images.labels)
        if images.names is not None:
            write_json(folder / f"{side}_names.json", list(images.names))
    write_json(run.workdir / name, results)
    _print_results(run, results)
    if warning := order_warning(results["map"], results["map_tie_aware"]):
        print_message(run.console, warning)
    print_message(run.console, f"Written to {run.workdir / name}")
    if run.config.report.write:
        HINT.show("Drawing the report")
        from cib_jax.runs import report  # imports Matplotlib, which takes a while

        # The report of results.json is in report/, that of another file in a folder of that file's name.
        folder = run.workdir / name.removesuffix(".json").replace("results", "report")
        page = report.write_report(run, query, database, results, folder)
        print_message(run.console, f"Report in {page}")


def order_warning(found: float | None, expected: float | None) -> str:
    """Returns a warning if the order of the database shifts a MAP far from the one expected in a random order."""
    if found is None or expected is None or abs(found - expected) <= MAX_SHIFT:
        return ""
    return (
        f"MAP is {found:.3f} with equal distances in database order, but {expected:.3f} in random order: the database "
        "seems to be sorted by class, which decides among few distinct codes; shuffle it, or compare the tie-aware MAP"
    )


def _results(
    run: RunContext, figures: dict[str, Any], origin: dict[str, Any], k: int, seconds: dict[str, float]
) -> dict[str, Any]:
    """Returns the contents of results.json."""
    config, splits = run.config, run.splits
    return {
        "dataset": config.data.name,
        "protocol": {
            "name": run.protocol.name,
            "says": run.protocol.says,
            "changed": list(run.protocol.changed),
            "published_tables": run.protocol.tables(),
        },
        "backbone": config.backbone,
        "image_size": run.encoder.image_size,
        "bits": config.bits,
        **origin,
        "seed": config.seed,
        "k": k,
        "map": figures.pop("map"),
        "map_tie_aware": figures.pop("map_tie_aware"),
        "counts": {
            "train": len(splits.train),
            "query": len(splits.query),
            "database": len(splits.database),
            "validation": len(splits.validation[0]) if splits.validation else 0,
            "unreadable": len(run.source.unreadable),
        },
        "classes": list(run.source.classes),
        "data": context.data_record(run)["digest"],
        "backbone_fingerprint": run.fingerprint,
        "seconds": {part: round(value, 2) for part, value in seconds.items()},
        "metrics": figures,
        "versions": {
            "cib-jax": cib_jax.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
    }


def _print_results(run: RunContext, results: dict[str, Any]) -> None:
    # Sentences of their own: rich breaks titles and captions at the width of the table.
    run.print(f"{results['dataset']} · {results['backbone']} · {results['objective']} · {results['bits']} bits")
    table = rich.table.Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for number, row in enumerate(tables.metric_rows(results, run.protocol.k or "all")):
        table.add_row(*row, style="bold" if number == 0 and results["map"] is not None else "")
    counts = [f"{results['counts'][part]:,}" for part in ("query", "database", "train")]
    table.add_row("queries · database · training", " · ".join(counts))
    names = {"bank": "view bank", "train": "training", "encode": "encoding"}
    seconds = {names.get(part, part): f"{value:.1f}" for part, value in results["seconds"].items() if value}
    table.add_row(f"seconds: {' · '.join(seconds)}", " · ".join(seconds.values()))
    run.console.print(table)
    run.print(context.format_protocol(run))

"""The evaluation: codes of queries and database, the figures of the protocol, results.json, a table."""

import importlib.metadata
import pathlib
import platform
import time
from typing import Any

import jax
import ml_collections
import numpy as np
import rich.console
import rich.table
from jaxtyping import UInt8

import cib_jax
from cib_jax.config import schema
from cib_jax.config.schema import flatten
from cib_jax.console import HINT, print_message
from cib_jax.distributed import multihost
from cib_jax.errors import ConfigError
from cib_jax.inference.serialization import read_config, read_standard, restore_best, validate_fingerprint
from cib_jax.models.encoder import Params
from cib_jax.retrieval import code_quality, metrics
from cib_jax.runs import context, features
from cib_jax.runs.context import RunContext
from cib_jax.runs.workdir import claim_workdir, write_array, write_json
from cib_jax.training.train_step import Progress


def evaluate(
    workdir: pathlib.Path | str,
    *,
    overrides: dict[str, Any] | None = None,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Measures a trained run and writes its results and codes/; returns the results.

    They are written to results.json, or beside it if the run is unfinished or `k` is another than it was trained with.

    Args:
      workdir: of a run that was trained.
      overrides: config fields by dotted name, of those that change the measuring and not the run.
      console: where to report.

    Raises:
      CheckpointError: there is no trained run there.
      ConfigError, DataError, WeightsError: as in training.
    """
    workdir = pathlib.Path(workdir)
    console = (console or rich.console.Console()) if multihost.is_first_process() else rich.console.Console(quiet=True)
    with multihost.shared_errors():
        trained = read_config(workdir)
        config = overridden(trained.copy_and_resolve_references(), overrides or {})
        schema.validate(config)
    with claim_workdir(workdir):
        return _evaluate(config, trained.k, workdir, console)


def _evaluate(
    config: ml_collections.ConfigDict, trained_k: int, workdir: pathlib.Path, console: rich.console.Console
) -> dict[str, Any]:
    with multihost.shared_errors():
        standard = read_standard(workdir, config)
    setting = multihost.run_first_then_others(
        lambda: context.prepare_run(config, workdir, console, trained=True, standard=standard)
    )
    context.validate_same_data(setting)
    with multihost.shared_errors():
        params, progress, extra = restore_best(workdir, setting.initial, config)
        validate_fingerprint(setting.fingerprint, extra, workdir)
    if not progress.finished:
        print_message(
            console,
            f"{workdir}: training stopped at epoch {progress.epoch} of {config.epochs}; measuring its last checkpoint",
        )
    if changed := context.describe_data_change(setting, extra):
        print_message(console, f"{workdir}: {changed}; measuring on those of now")
    # results.json is the finished run's own: other figures stand beside it.
    whole = progress.finished and config.k == trained_k and not changed
    name = "results.json" if whole else f"results-epoch{progress.epoch}-k{setting.protocol.k or 'all'}.json"
    return evaluate_run(setting, params, progress, float(extra["bank_seconds"]), name)


def overridden(config: ml_collections.ConfigDict, overrides: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns the config of a trained run with other values of the fields that do not change the run.

    Raises:
      ConfigError: a field changes it.
    """
    for name, value in overrides.items():
        known = flatten(config)
        if name in known and known[name] == value:
            continue
        if name not in schema.MEASURING | schema.MAY_CHANGE:
            raise ConfigError(
                f"config.{name}: the run was trained with {known.get(name)!r}, which can no longer be changed to "
                f"{value!r}; leave it out, or train again in another --workdir"
            )
        config.update_from_flattened_dict({name: value})
    return config


def evaluate_run(
    setting: RunContext, params: Params, progress: Progress, bank_seconds: float, name: str = "results.json"
) -> dict[str, Any]:
    """Encodes and ranks, writes `name` and codes/, prints the table, returns the results."""
    config, splits = setting.config, setting.splits
    begun = time.perf_counter()
    query = features.codes(setting, params, splits.query, "Encoding queries")
    database = features.codes(setting, params, splits.database, "Encoding database")
    seconds = {"bank": bank_seconds, "train": progress.seconds, "encode": time.perf_counter() - begun}
    about = {
        "objective": config.objective,
        "epochs": progress.epoch,
        "best_validation_map": progress.best_map if progress.best_step else None,
    }
    return evaluate_codes(setting, query, database, about, seconds, name)


def evaluate_codes(
    setting: RunContext,
    query: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    about: dict[str, Any],
    seconds: dict[str, float],
    name: str = "results.json",
) -> dict[str, Any]:
    """Ranks codes, however they were made, writes `name` and codes/, prints the table, returns the results.

    Args:
      setting: of the run.
      query: packed codes of the queries.
      database: packed codes of what is searched.
      about: what the results tell of the way to the codes; "objective" names it.
      seconds: what the steps up to here took.
      name: of the file in the run's folder.
    """
    splits = setting.splits
    begun = time.perf_counter()
    k = setting.protocol.k or len(database)
    figures: dict[str, Any] = {"map": None, "map_tie_aware": None}
    if splits.query.labels is not None and splits.database.labels is not None:
        labels = splits.query.labels, splits.database.labels

        def of_queries(mine: slice) -> dict[str, Any]:
            figures = metrics.evaluate(query[mine], database, labels[0][mine], labels[1], k)
            return figures | {"queries": len(query)}

        figures = multihost.mean_over_processes(of_queries, len(query))
    figures["code_health"] = code_quality.code_health(database)
    seconds = seconds | {"metrics": time.perf_counter() - begun}
    results = _results(setting, figures, about, k, seconds)
    if multihost.is_first_process():
        _write(setting, query, database, results, name)
    multihost.barrier()
    return results


def _write(
    setting: RunContext,
    query: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    results: dict[str, Any],
    name: str,
) -> None:
    """Writes codes/, `name` and the report, and prints the table."""
    config, splits, workdir = setting.config, setting.splits, setting.workdir
    for side, codes, images in (("query", query, splits.query), ("database", database, splits.database)):
        write_array(workdir / "codes" / f"{side}_codes.npy", codes)
        if images.labels is not None:
            write_array(workdir / "codes" / f"{side}_labels.npy", images.labels)
        if images.names is not None:
            write_json(workdir / "codes" / f"{side}_names.json", list(images.names))
    write_json(workdir / name, results)
    _print(results, setting)
    print_message(setting.console, f"Written to {workdir / name}")
    if config.report.write:
        from cib_jax.runs import report  # with Matplotlib, which takes a while

        HINT.show("Drawing the report")
        # Beside results.json lies report/, beside another file a folder of its own.
        folder = workdir / name.removesuffix(".json").replace("results", "report")
        page = report.write(setting, query, database, results, folder)
        print_message(setting.console, f"Pictured in {page}")


def _results(
    setting: RunContext, figures: dict[str, Any], about: dict[str, Any], k: int, seconds: dict[str, float]
) -> dict[str, Any]:
    """Returns what results.json holds."""
    config, splits = setting.config, setting.splits
    return {
        "dataset": config.data.name,
        "protocol": {
            "name": setting.protocol.name,
            "says": setting.protocol.says,
            "changed": list(setting.protocol.changed),
            "published_tables": setting.protocol.tables(),
        },
        "backbone": config.backbone,
        "image_size": setting.encoder.image_size,
        "bits": config.bits,
        **about,
        "seed": config.seed,
        "k": k,
        "map": figures.pop("map"),
        "map_tie_aware": figures.pop("map_tie_aware"),
        "counts": {
            "train": len(splits.train),
            "query": len(splits.query),
            "database": len(splits.database),
            "validation": len(splits.validation[0]) if splits.validation else 0,
            "unreadable": len(setting.source.unreadable),
        },
        "classes": list(setting.source.classes),
        "data": context.data_record(setting)["digest"],
        "backbone_fingerprint": setting.fingerprint,
        "seconds": {part: round(value, 2) for part, value in seconds.items()},
        "metrics": figures,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Returns what the run was made with."""
    packages = (
        "jax",
        "flax",
        "optax",
        "orbax-checkpoint",
        "tensorflow-datasets",
        "grain",
        "numpy",
    )
    return {
        "cib-jax": cib_jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _print(results: dict[str, Any], setting: RunContext) -> None:
    figures, code_health, counts = results["metrics"], results["metrics"]["code_health"], results["counts"]
    table = rich.table.Table(
        title=f"{results['dataset']} · {results['backbone']} · {results['objective']} · {results['bits']} bits",
        caption=context.format_protocol(setting),
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    if results["map"] is not None:
        k = f"{results['k']}" if setting.protocol.k else "all"
        table.add_row(f"MAP@{k}", f"{results['map']:.4f}", style="bold")
        table.add_row(f"MAP@{k}, ties in random order", f"{results['map_tie_aware']:.4f}")
        at = figures["precision_at_k"]
        for k, precision in zip(at["k"], at["precision"], strict=True):
            table.add_row(f"precision@{k}", f"{precision:.4f}")
        table.add_row("precision within Hamming radius 2", f"{figures['precision_radius_2']:.4f}")
        table.add_row("queries with nothing within radius 2", f"{figures['empty_radius_2']:.1%}")
    table.add_row("distinct codes in the database", f"{code_health['distinct_codes']:,} of {counts['database']:,}")
    table.add_row("mean |correlation| of two bits", f"{code_health['mean_abs_correlation']:.3f}")
    table.add_row("entropy of the codes", f"{code_health['entropy']:.2f} bits")
    table.add_row(
        "queries · database · training", f"{counts['query']:,} · {counts['database']:,} · {counts['train']:,}"
    )
    words = {"bank": "view bank", "train": "training", "encode": "encoding"}
    seconds = {words.get(part, part): f"{value:.1f}" for part, value in results["seconds"].items()}
    table.add_row(f"seconds: {' · '.join(seconds)}", " · ".join(seconds.values()))
    setting.console.print(table)

"""Comparison of methods, code lengths and seeds: one run for each combination, and tables of their means."""

import functools
import hashlib
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.console
from jaxtyping import Array, Float, UInt8

from cib_jax import codes, errors
from cib_jax.baselines import BASELINES, Encoder
from cib_jax.commands import evaluate
from cib_jax.commands.train import train
from cib_jax.config import build, schema
from cib_jax.console import on_stdout, print_message
from cib_jax.data.dataset import ImageSet
from cib_jax.distributed import sharding
from cib_jax.errors import ConfigError, TrainingError, UserError
from cib_jax.files import count, did_you_mean, write_bytes
from cib_jax.losses import OBJECTIVES
from cib_jax.report import figures, tables
from cib_jax.report.html import Grid, Section
from cib_jax.runs import context, features, many_runs, report
from cib_jax.runs.context import RunContext
from cib_jax.runs.many_runs import Record, load_record
from cib_jax.runs.workdir import BASELINE, REFUSED, adopt, claim_workdir, read_json, write_json
from cib_jax.training import checkpoint, metric_writers

TITLES = {"naive_cl": "NaiveCL", "cl_hash": "CLHash", "cibhash": "CIBHash", "diffusion": "Diffusion"} | {
    name: baseline.title for name, baseline in BASELINES.items()
}
"""Names of the methods in tables; the first three as in the ablation of the paper."""

METHODS = "config.compare.methods"
OF_FEATURES = schema.MAY_CHANGE | {"backbone", "backbone_dtype", "frozen", "image_size", "augment", "train.views"}
"""Fields that a baseline's row may set: those that decide its features, or no result."""


def compare(
    config: ml_collections.ConfigDict, workdir: pathlib.Path | str, *, console: rich.console.Console | None = None
) -> dict[str, Any]:
    """Measures every combination that `config.compare` asks for, writes the tables, and returns comparison.json.

    A cell of the tables is the mean of runs in cells/METHOD/BITS-bits-seed-SEED, each of which is measured once.
    Stopped anywhere, the same command goes on, within a run from its last checkpoint; more methods, lengths or seeds
    add runs. Several processes may work on one comparison, each started with the same command, also on other machines.
    """
    workdir, console = pathlib.Path(workdir), on_stdout(console)
    schema.validate(config, around=True)
    metric_writers.validate_writers(config.log.writers)
    compared = config.compare
    lengths = parse_numbers(compared.bits)
    # Seed by seed, so that a table of all methods is there early.
    cells = [
        make_cell(config, method, bits, seed, workdir / "cells")
        for seed in parse_numbers(compared.seeds)
        for bits in lengths
        for method in parse_methods(compared.methods)
        if bits not in _measured_by_the_longest(config, method, lengths)
    ]
    with adopt(workdir, config, "comparison"):
        return many_runs.run_all(
            cells,
            functools.partial(_measure_once, cells=cells, since=time.time()),
            lambda records: _conclude(config, workdir, list(zip(cells, records, strict=True)), console),
            workdir=workdir,
            workers=compared.workers,
            noun="cell",
            console=console,
        )


# The runs of a comparison


class ComparedMethod(NamedTuple):
    """A row of the tables: a method, and config fields with the values that they have in this row alone."""

    name: str
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """Name of the row in tables."""
        return " ".join([TITLES.get(self.name, self.name), *(f"{name}={value}" for name, value in self.fields)])

    @property
    def slug(self) -> str:
        """Name of the row's folder, different for different rows."""
        if not self.fields:
            return self.name
        text = "-".join([self.name, *(f"{name}={value}" for name, value in self.fields)])
        # The digest distinguishes rows that differ only in characters that are replaced.
        digest = hashlib.sha256(text.encode()).hexdigest()[:6]
        return re.sub(r"[^\w.=+-]", "_", text) + f"-{digest}"


class CellRun(NamedTuple):
    """One run of a comparison."""

    method: ComparedMethod
    config: ml_collections.ConfigDict
    workdir: pathlib.Path

    @property
    def title(self) -> str:
        """Name of the run in messages."""
        return f"{self.method.title}, {self.config.bits} bits, seed {self.config.seed}"

    @property
    def record_path(self) -> pathlib.Path:
        """The file with the results."""
        return self.workdir / "results.json"


def parse_methods(text: str) -> list[ComparedMethod]:
    """Returns the rows that `compare.methods` names."""
    methods: list[ComparedMethod] = []
    for part in filter(None, map(str.strip, text.split(","))):
        name, *assignments = part.split()
        if name not in (known := [*TITLES, *(OBJECTIVES.keys() - TITLES)]):
            hint = f"{did_you_mean(name, known)}try {', '.join(known)}"
            raise ConfigError(f"{METHODS} must name known methods, got {name!r}; {hint}", METHODS)
        method = ComparedMethod(name, tuple(_parse_assignment(name, one) for one in assignments))
        if method in methods:
            raise ConfigError(f"{METHODS} must name each row once, got {part!r} twice; leave one out", METHODS)
        methods.append(method)
    if not methods:
        raise ConfigError(f"{METHODS} must name a method, got {text!r}; try 'itq, cibhash'", METHODS)
    return methods


def _parse_assignment(method: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    where = f"{METHODS}: {method} {text}"
    if not equals:
        raise ConfigError(f"{where}: a method is followed by fields with values, such as temperature=0.5", METHODS)
    if name in {"bits", "seed", "objective", "k"} or name.startswith("data."):
        raise ConfigError(f"{where}: all rows share this field, or their figures would not be comparable", METHODS)
    if name not in schema.FIELDS or name in schema.AROUND:
        hint = did_you_mean(name, schema.FIELDS).strip() or "configs/default.py lists them"
        raise ConfigError(f"{where}: {name} must be a field of the config; {hint}", METHODS)
    if method in BASELINES and name not in OF_FEATURES:
        raise ConfigError(f"{where}: {name} has no effect on {TITLES[method]}, a baseline; leave it out", METHODS)
    return name, schema.parsed(name, value, where)


def parse_numbers(text: str) -> list[int]:
    """Returns the numbers of a list such as "16, 32, 64", each once."""
    return list(dict.fromkeys(int(number) for number in text.split(",")))


def make_cell(
    base: ml_collections.ConfigDict, method: ComparedMethod, bits: int, seed: int, root: pathlib.Path
) -> CellRun:
    """Returns the run of one method with one length and one seed, after validating its config."""
    config = base.copy_and_resolve_references()
    # A report of each run would take longer than some of the methods; --mode=evaluate --config.report.write=True draws
    # the report of a trained one.
    config.update_from_flattened_dict({"report.write": False} | dict(method.fields) | {"bits": bits, "seed": seed})
    folder = f"{bits}-bits-seed-{seed}"
    config.train.checkpoint_dir = checkpoint.within(config.train.checkpoint_dir, method.slug, folder)
    if method.name in OBJECTIVES:
        config.objective = method.name
    schema.validate(config)
    return CellRun(method, config, root / method.slug / folder)


def _measured_by_the_longest(
    config: ml_collections.ConfigDict, method: ComparedMethod, lengths: list[int]
) -> list[int]:
    """Returns the lengths that need no run of their own: those within nested codes of the largest length."""
    nested = method.name in OBJECTIVES and dict(method.fields).get("nested", config.nested)
    return [bits for bits in codes.nested_lengths(max(lengths))[:-1] if bits in lengths] if nested else []


def _refusal(cell: CellRun, since: float = 0.0) -> str:
    """Returns why a run could not be measured at or after a time; "" if no reason is known."""
    path = cell.workdir / REFUSED
    if not path.exists():
        return ""
    note = read_json(path)
    return str(note["error"]) if note["when"] >= since else ""


def _measure_once(cell: CellRun, console: rich.console.Console, *, cells: list[CellRun], since: float) -> str | None:
    """Measures a run that has not been refused since a time; returns a sentence about it.

    A run that is refused for a reason of its own gets a note; an error that concerns all rows is raised.
    """
    if _refusal(cell, since):
        return None
    note = cell.workdir / REFUSED
    try:
        if cell.method.name in OBJECTIVES:
            results = train(cell.config, cell.workdir, console=console)
        else:
            results = measure_baseline(cell.config, cell.method.name, cell.workdir, console=console)
    except errors.BusyError:
        raise
    except UserError as error:
        if not (cell.method.fields or isinstance(error, ConfigError | TrainingError)):
            raise
        cell.workdir.mkdir(parents=True, exist_ok=True)
        write_json(note, {"error": str(error), "when": time.time()})
        outcome = str(error)
    else:
        note.unlink(missing_ok=True)
        outcome = "MAP unknown, without labels" if results["map"] is None else f"MAP {results['map']:.4f}"
    _validate_comparable([record for one in cells if (record := load_record(one))], cell.workdir.parents[2])
    return f"{cell.title}: {outcome}"


def measure_baseline(
    config: ml_collections.ConfigDict, method: str, workdir: pathlib.Path, *, console: rich.console.Console
) -> Record:
    """Fits the baseline `method` to the features of the training images, evaluates its codes, and returns the results.

    The features are the input of the hash layer under this config: a frozen backbone's features, or pixels.
    """
    schema.validate(config)
    with claim_workdir(workdir, baseline=True):
        if (workdir / "results.json").exists():
            return read_json(workdir / "results.json")
        run = context.prepare_run(config, workdir, console)
        source = BASELINES[method].source
        write_json(workdir / BASELINE, {"method": method, "source": source})
        write_json(workdir / "config.json", config.to_dict())
        if BASELINES[method].views:
            rows = features.views_before_hashing(run, run.splits.train, "Views, training")
        else:
            rows = np.concatenate(list(features.before_hashing(run, run.splits.train, "Features, training")))
        begun = time.perf_counter()
        try:
            encoder = BASELINES[method].fit(rows, config.bits, build.key(config, "baseline"))
        except ValueError as error:
            raise ConfigError(f"{METHODS}: {method}: {error}", METHODS) from None
        jax.block_until_ready(jax.tree.leaves(encoder))
        fitted = time.perf_counter()
        query = _encode(run, encoder, run.splits.query, "Encoding queries")
        database = _encode(run, encoder, run.splits.database, "Encoding database")
        seconds = {"train": fitted - begun, "encode": time.perf_counter() - fitted}
        origin = {"objective": method, "source": source}
        return evaluate.evaluate_codes(run, query, database, origin, seconds)


@jax.jit
def _packed(encoder: Encoder, rows: Float[Array, "batch features"]) -> UInt8[Array, "batch bytes"]:
    return codes.pack_bits(encoder(rows))


def _encode(run: RunContext, encoder: Encoder, images: ImageSet, what: str) -> UInt8[np.ndarray, "n bytes"]:
    rows = features.before_hashing(run, images, what)
    packed = sharding.map_batches(lambda batch, first: _packed(encoder, jnp.asarray(batch)), rows)
    return np.concatenate([np.asarray(part) for part in packed])


def _validate_comparable(records: list[Record], workdir: pathlib.Path) -> None:
    """Raises WorkdirError if runs were measured on different data, or with different weights."""
    for name, field in (("data", "config.data.dir"), ("backbone_fingerprint", "config.backbone_weights")):
        if len({record[name] for record in records if name in record}) > 1:
            raise errors.WorkdirError(
                f"{field} must be the same for all runs of {workdir}, but some were measured with other contents; "
                "restore these, or choose another --workdir",
                field=field,
            )


# The tables of a comparison


def _conclude(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    found: list[tuple[CellRun, Record | None]],
    console: rich.console.Console,
) -> dict[str, Any]:
    _validate_comparable([record for _, record in found if record], workdir)
    lengths = parse_numbers(config.compare.bits)
    lines = [line for cell, record in found if record for line in _csv_lines(cell, record, lengths)]
    missing = [(cell, _refusal(cell)) for cell, record in found if not record]
    if not lines and len(reasons := {why for _, why in missing}) == 1 and (why := reasons.pop()):
        raise ConfigError(why)  # of all rows alike, so that the mistake is the config's
    compared = make_tables(config, [cell.method for cell, _ in found], lines)
    comparison = {
        "tables": [
            {
                "title": table.title,
                "bits": list(table.bits),
                "rows": [
                    {
                        "method": row.title,
                        "published": row.published,
                        "mean": [cell.mean for cell in row.cells],
                        "deviation": [cell.deviation for cell in row.cells],
                        "seeds": [len(cell.values) for cell in row.cells],
                    }
                    for row in table.rows
                ],
            }
            for table in compared
        ],
        "cells": lines,
        "missing": [_named(cell) | {"why": why} for cell, why in missing],
    }
    write_json(workdir / "comparison.json", comparison)
    for name, content in (
        ("comparison.csv", tables.comma_separated(lines)),
        ("comparison.md", "\n".join(map(tables.markdown, compared))),
        ("comparison.tex", "\n".join(map(tables.latex, compared))),
    ):
        write_bytes(workdir / name, content.encode())
    drawn = f"; report in {_write_report(config, workdir, compared)}" if config.report.write else ""
    for table in compared:
        published = [number for number, row in enumerate(table.rows) if row.published]
        many_runs.print_grid(console, _grid(table), dimmed=published)
    for cell, why in missing:
        if why:
            print_message(console, f"Refused: {cell.title}: {why}")
    if waiting := sum(not why for _, why in missing):
        print_message(console, f"Left to other processes: {count(waiting, 'cell')}; run again when they are done")
    print_message(console, f"Written to {workdir}: comparison.csv, .md, .tex and .json{drawn}")
    return comparison


def _named(cell: CellRun) -> Record:
    return {"method": cell.method.title, "bits": cell.config.bits, "seed": cell.config.seed}


def _csv_lines(cell: CellRun, results: Record, lengths: list[int]) -> list[Record]:
    """Returns the figures of a run and, of the longest nested codes, the MAP of each length that has no run."""
    line = _csv_line(cell, results)
    maps = results["metrics"].get("map_of_first_bits", {})
    unknown = dict.fromkeys(line.keys() - {*_named(cell), "k", "workdir"})
    within = _measured_by_the_longest(cell.config, cell.method, lengths) if line["bits"] == max(lengths) else []
    return [*(line | unknown | {"bits": bits, "map": maps.get(str(bits))} for bits in within), line]


def _csv_line(cell: CellRun, results: Record) -> Record:
    measured, statistics = results["metrics"], results["metrics"]["code_health"]
    return {
        **_named(cell),
        "map": results["map"],
        "map_tie_aware": results["map_tie_aware"],
        **{name: measured.get(name) for name in ("precision_radius_2", "empty_radius_2")},
        **{name: statistics[name] for name in ("mean_abs_correlation", "entropy")},
        "train_seconds": results["seconds"]["train"],
        "k": results["k"],
        "workdir": str(cell.workdir),
    }


def make_tables(
    config: ml_collections.ConfigDict, methods: list[ComparedMethod], lines: list[Record]
) -> list[tables.Table]:
    """Returns the two tables of the paper: all methods, and, of several objectives, their ablation."""
    lengths = parse_numbers(config.compare.bits)
    seeds = len(parse_numbers(config.compare.seeds))
    k = next((line["k"] for line in lines), 0)
    protocol = build.protocol(config)
    where = f"{config.data.name}, {config.data.protocol}, {config.backbone}"
    over = f"mean ± deviation of {seeds} seeds" if seeds > 1 else "one seed"

    def row(method: ComparedMethod) -> tables.Row:
        values: dict[int, list[float]] = {bits: [] for bits in lengths}
        for line in lines:
            if line["method"] == method.title and line["bits"] in values and line["map"] is not None:
                values[line["bits"]].append(line["map"])
        return tables.Row(method.title, [tables.Cell(values[bits]) for bits in lengths])

    methods = list(dict.fromkeys(methods))
    baselines = [method for method in methods if method.name not in OBJECTIVES]
    # The paper's ablation consists of its own objectives.
    others = [method for method in methods if method.name in OBJECTIVES and _is_own(method.name)]
    ablated = [method for method in methods if method not in baselines + others]
    # As in the paper, the complete objective alone represents the ablated ones in the first table.
    complete = [method for method in methods if method.name == "cibhash"] or ablated
    # Published figures are comparable only under the very protocol they were measured by.
    quoted = [
        tables.Row(f"{one.title}, published", [tables.Cell(one.values.get(bits, ())) for bits in lengths], True)
        for one in ([] if protocol.changed else tables.published_rows(protocol.name, k))
    ]
    first = [*map(row, baselines + complete + others), *quoted]
    made = [tables.Table(f"MAP@{k} on {where}; {over}", lengths, first, seeds)]
    if len(ablated) > 1:
        made.append(tables.Table(f"Ablation: MAP@{k} on {where}; {over}", lengths, [*map(row, ablated)], seeds))
    return made


def _is_own(objective: str) -> bool:
    """Returns whether an objective is this project's or a user's, and none of the paper."""
    return OBJECTIVES[objective].taught or OBJECTIVES[objective].loss is not None


def _grid(table: tables.Table) -> Grid:
    header = ("method", *(f"{bits} bits" for bits in table.bits))
    return Grid(table.title, header, [(row.title, *tables.cell_texts(table, row)) for row in table.rows])


def _write_report(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, compared: list[tables.Table]
) -> pathlib.Path:
    pictures = []
    for name, table in zip(("methods", "ablation"), compared, strict=False):
        rows = [row for row in table.rows if not row.published]
        mean = np.array([[cell.mean for cell in row.cells] for row in rows], float)
        deviation = np.array([[cell.deviation or 0 for cell in row.cells] for row in rows], float)
        if np.isfinite(mean).any():
            score = table.title.partition(" on ")[0].removeprefix("Ablation: ")
            drawn = figures.methods([row.title for row in rows], table.bits, mean, deviation, score=score)
            pictures.append(report.picture(name, drawn))
    return report.write_page(
        workdir / "report",
        f"{config.data.name} · comparison",
        compared[0].title,
        list(map(_grid, compared)),
        [Section("Pictures", pictures)],
        notes=["Rows marked 'published' are quoted from papers, with another network; all others were measured here."],
        config=config,
    )

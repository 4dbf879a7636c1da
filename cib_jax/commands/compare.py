"""The cells of a comparison: one run each, in a folder of its own, taken by whoever is free."""

import difflib
import hashlib
import json
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.console
import rich.table
from jaxtyping import Array, Float, UInt8

from cib_jax import codes, errors
from cib_jax.baselines import BASELINES, Encoder
from cib_jax.commands import evaluate
from cib_jax.commands.train import train
from cib_jax.config import build, schema
from cib_jax.console import print_message
from cib_jax.data.dataset import ImageSet
from cib_jax.errors import ConfigError, TrainingError, UserError
from cib_jax.losses import OBJECTIVES
from cib_jax.report import figures as figures_lib
from cib_jax.report import tables
from cib_jax.report.html import Grid, Section, render
from cib_jax.runs import context, features, report
from cib_jax.runs.context import RunContext
from cib_jax.runs.processes import run_to_end, worker_count
from cib_jax.runs.workdir import BASELINE, adopt, claim_workdir, read_json, write_bytes, write_json
from cib_jax.training import checkpoint, metric_writers

# jobs.cells: The cells of a comparison: one run each, in a folder of its own, taken by whoever is free.


TITLES = {"naive_cl": "NaiveCL", "cl_hash": "CLHash", "cibhash": "CIBHash", "diffusion": "Diffusion"} | {
    name: known.title for name, known in BASELINES.items()
}
"""How tables name the methods; the first three as in the paper's ablation."""

REFUSED = "refused.json"


class Method(NamedTuple):
    """A row of a comparison."""

    name: str
    fields: dict[str, Any]
    """Config fields, by dotted name, that this row sets otherwise."""

    @property
    def title(self) -> str:
        """As tables name it."""
        return " ".join([TITLES[self.name], *(f"{name}={value}" for name, value in self.fields.items())])

    @property
    def slug(self) -> str:
        """As its folder is named: different for different rows."""
        if not self.fields:
            return self.name
        told = "-".join([self.name, *(f"{name}={value}" for name, value in self.fields.items())])
        # What cannot stand in a file's name becomes "_"; the digest keeps rows apart that differ in such letters alone.
        digest = hashlib.sha256(told.encode()).hexdigest()[:6]
        return re.sub(r"[^\w.=+-]", "_", told) + f"-{digest}"


class Cell(NamedTuple):
    """One run of a comparison."""

    method: Method
    config: ml_collections.ConfigDict
    workdir: pathlib.Path


def methods(words: str) -> list[Method]:
    """Returns the rows that `compare.methods` names.

    Raises:
      ConfigError: a name or a field is unknown, a value does not fit, or a row is there twice.
    """
    found: list[Method] = []
    for part in words.split(","):
        if not part.strip():
            continue
        name, *assignments = part.split()
        if name not in TITLES:
            near = difflib.get_close_matches(name, TITLES, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"config.compare.methods: {name!r} is unknown; {hint}There are {', '.join(TITLES)}")
        method = Method(name, dict(_assigned(name, words) for words in assignments))
        if method in found:
            raise ConfigError(f"config.compare.methods: {part.strip()!r} is there twice; leave one out")
        found.append(method)
    if not found:
        raise ConfigError("config.compare.methods: it names no method; try 'itq, cibhash'")
    return found


def _assigned(method: str, words: str) -> tuple[str, Any]:
    name, sign, value = words.partition("=")
    where = f"config.compare.methods: {method} {words}"
    if not sign:
        raise ConfigError(f"{where}: after a method come fields with values, such as temperature=0.5")
    if name in {"bits", "seed", "objective", "k"} or name.startswith("data."):
        raise ConfigError(f"{where}: all rows share this field, or their figures would not compare")
    if name not in schema.FIELDS or name in schema.AROUND:
        near = difflib.get_close_matches(name, schema.FIELDS, 1)
        raise ConfigError(f"{where}: no field has this name{f'; did you mean {near[0]}?' if near else ''}")
    return name, schema.parsed(name, value, where)


def numbers(text: str) -> list[int]:
    """Returns the numbers of a list such as "16, 32, 64", each once."""
    return list(dict.fromkeys(int(number) for number in text.split(",")))


def cell(base: ml_collections.ConfigDict, method: Method, bits: int, seed: int, root: pathlib.Path) -> Cell:
    """Returns the run of one method with one length and one seed, checked.

    Raises:
      ConfigError: its config cannot work.
    """
    config = base.copy_and_resolve_references()
    # A report of each would take longer than some of the methods; --mode=evaluate --config.report.write=True draws that
    # of a trained cell.
    config.update_from_flattened_dict({"report.write": False} | method.fields | {"bits": bits, "seed": seed})
    folder = f"{bits}-bits-seed-{seed}"
    config.train.checkpoint_dir = checkpoint.within(config.train.checkpoint_dir, method.slug, folder)
    if method.name in OBJECTIVES:
        config.objective = method.name
    schema.validate(config)
    return Cell(method, config, root / method.slug / folder)


def finished(one: Cell) -> dict[str, Any] | None:
    """Returns the results of a cell, None if it has none yet."""
    path = one.workdir / "results.json"
    return read_json(path) if path.exists() else None


def is_refused(one: Cell, since: float = 0.0) -> str:
    """Returns why a cell could not be measured, if that was `since` a time; "" where nothing speaks against it."""
    path = one.workdir / REFUSED
    if not path.exists():
        return ""
    note = read_json(path)
    return str(note["error"]) if note["when"] >= since else ""


def measure_cell(one: Cell) -> dict[str, Any] | None:
    """Runs a cell to its end, or goes on with it; returns its results, None if it was refused, which it notes.

    Raises:
      BusyError: another process is at it.
      Refusal: what is wrong is not this row's own: the data, the weights, a field that all rows share.
    """
    quiet = rich.console.Console(quiet=True)
    note = one.workdir / REFUSED
    try:
        if one.method.name in OBJECTIVES:
            results = train(one.config, one.workdir, console=quiet)
        else:
            results = measure_baseline(one.config, one.method.name, one.workdir, console=quiet)
    except errors.BusyError:
        raise
    except UserError as error:
        if not (one.method.fields or isinstance(error, errors.ConfigError | TrainingError)):
            raise
        one.workdir.mkdir(parents=True, exist_ok=True)
        write_json(note, {"error": str(error), "when": time.time()})
        return None
    note.unlink(missing_ok=True)
    return results


# jobs.baseline: One cell of a comparison that is not trained by this project's objectives: a baseline, fitted and measured.


def measure_baseline(
    config: ml_collections.ConfigDict, method: str, workdir: pathlib.Path, *, console: rich.console.Console
) -> dict[str, Any]:
    """Fits the baseline `method` on the training images' features, measures its codes, returns what results.json holds.

    Features are those that this config's own objectives would hash; see `features.before_hashing`.

    Raises:
      ConfigError, DataError, WeightsError, WorkdirError: as in training.
      BaselineError: the method gives no such codes of such features.
    """
    schema.validate(config)
    chosen = BASELINES[method]
    with claim_workdir(workdir, baseline=True):
        if (workdir / "results.json").exists():
            return read_json(workdir / "results.json")
        run = context.prepare_run(config, workdir, console)
        write_json(workdir / BASELINE, {"method": method, "source": chosen.source})
        write_json(workdir / "config.json", config.to_dict())
        train = np.concatenate(list(features.before_hashing(run, run.splits.train, "Features, training")))
        begun = time.perf_counter()
        try:
            encoder = chosen.fit(train, config.bits, build.key(config, "baseline"))
        except ValueError as error:
            raise ConfigError(f"config.compare.methods: {method}: {error}") from None
        jax.block_until_ready(jax.tree.leaves(encoder))
        fit_seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        query = _codes(run, encoder, run.splits.query, "Encoding queries")
        database = _codes(run, encoder, run.splits.database, "Encoding database")
        seconds = {"train": fit_seconds, "encode": time.perf_counter() - begun}
        about = {"objective": method, "source": chosen.source}
        return evaluate.evaluate_codes(run, query, database, about, seconds)


@jax.jit
def _packed(encoder: Encoder, rows: Float[Array, "batch features"]) -> UInt8[Array, "batch bytes"]:
    return codes.pack_bits(encoder(rows))


def _codes(run: RunContext, encoder: Encoder, images: ImageSet, what: str) -> UInt8[np.ndarray, "n bytes"]:
    size = min(features.PART, len(images))
    packed = []
    for rows in features.before_hashing(run, images, what):
        whole = np.pad(rows, ((0, size - len(rows)), (0, 0)))  # one shape, compiled once
        packed.append(np.asarray(_packed(encoder, jnp.asarray(whole)))[: len(rows)])
    return np.concatenate(packed)


# jobs.compare: The comparison: methods × code lengths × seeds, cell by cell, and the tables of the paper made of them.


def compare(
    config: ml_collections.ConfigDict, workdir: pathlib.Path | str, *, console: rich.console.Console | None = None
) -> dict[str, Any]:
    """Measures every cell that `config.compare` asks for and writes the tables; returns what comparison.json holds.

    A cell is a run in cells/METHOD/BITS-bits-seed-SEED and is measured once: stopped anywhere, the same command goes
    on, within a cell from its last checkpoint; more methods, lengths or seeds add cells. Several processes may work at
    one comparison, each started with the same command, on other accelerators or machines too.

    Args:
      config: see configs/default.py.
      workdir: the comparison's folder.
      console: where to report.

    Raises:
      ConfigError, DataError, WeightsError, WorkdirError, WriterError: as in training.
    """
    workdir, console = pathlib.Path(workdir), console or rich.console.Console()
    schema.validate(config, around=True)
    metric_writers.validate_writers(config.log.writers)
    wanted = _cells(config, workdir)
    adopt(workdir, config, "comparison")
    processes = min(worker_count(config.compare.workers), len(wanted))
    print_message(
        console,
        f"{len(wanted)} cells, {sum(finished(one) is not None for one in wanted)} of them measured already; "
        f"{processes} process{'es' if processes > 1 else ''} at work in {workdir}",
    )

    def conclude() -> tuple[dict[str, Any], bool]:
        comparison = _conclude(config, workdir, wanted, console)
        return comparison, not comparison["missing"]

    arguments = (config.to_dict(), str(workdir), time.time())
    return run_to_end(_work, arguments, processes, workdir / ".lock", conclude)


def _cells(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Cell]:
    """Returns the cells, those of one seed after another, so that a table stands early."""
    compared = config.compare
    rows = methods(compared.methods)
    return [
        cell(config, row, bits, seed, workdir / "cells")
        for seed in numbers(compared.seeds)
        for bits in numbers(compared.bits)
        for row in rows
    ]


def _work(fields: dict[str, Any], workdir: str, begun: float, shows: bool) -> None:
    """Measures the cells that nobody else is at, none refused since `begun`; `shows` says whether to tell of each."""
    wanted = _cells(ml_collections.ConfigDict(fields), pathlib.Path(workdir))
    console = rich.console.Console(quiet=not shows)
    for one in wanted:
        if finished(one) is not None or is_refused(one, since=begun):
            continue
        try:
            results = measure_cell(one)
        except errors.BusyError:
            continue
        done = [found for other in wanted if (found := finished(other))]
        _check_alike(done, pathlib.Path(workdir))
        told = f"MAP {_shown(results['map'])}" if results else is_refused(one)
        print_message(
            console,
            f"{len(done)} of {len(wanted)}: {one.method.title}, {one.config.bits} bits, seed {one.config.seed}: {told}",
        )


def _check_alike(found: list[dict[str, Any]], workdir: pathlib.Path) -> None:
    """Refuses cells that were measured on several data, or with several weights: they make no table."""
    for name, field in (("data", "data.dir"), ("backbone_fingerprint", "backbone_weights")):
        if len({results[name] for results in found if name in results}) > 1:
            raise errors.WorkdirError(
                f"{workdir}: config.{field} leads to others than those that some of its cells were measured on; put "
                "them back, or choose another --workdir"
            )


def _shown(value: float | None) -> str:
    return "unknown, without labels" if value is None else f"{value:.4f}"


def _conclude(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, wanted: list[Cell], console: rich.console.Console
) -> dict[str, Any]:
    found = [(one, finished(one)) for one in wanted]
    _check_alike([results for _, results in found if results], workdir)
    records = [_record(one, results) for one, results in found if results]
    missing = [one for one, results in found if not results]
    made = _tables(config, wanted, records)
    comparison = {
        "tables": [_plain(table) for table in made],
        "cells": records,
        "missing": [
            {"method": one.method.title, "bits": one.config.bits, "seed": one.config.seed, "why": is_refused(one)}
            for one in missing
        ],
    }
    write_json(workdir / "comparison.json", comparison)
    for name, content in (
        ("comparison.csv", tables.comma_separated(records)),
        ("comparison.md", "\n".join(tables.markdown(table) for table in made)),
        ("comparison.tex", "\n".join(tables.latex(table) for table in made)),
    ):
        write_bytes(workdir / name, content.encode())
    page = _report(config, workdir, made)
    for table in made:
        console.print(_on_screen(table))
    for one in missing:
        if why := is_refused(one):
            print_message(
                console, f"Refused: {one.method.title}, {one.config.bits} bits, seed {one.config.seed}: {why}"
            )
    if waiting := sum(not is_refused(one) for one in missing):
        print_message(console, f"{waiting} cells are with other processes; run again when they are done")
    print_message(console, f"Written to {workdir}: comparison.csv, .md, .tex and .json; pictured in {page}")
    return comparison


def _record(one: Cell, results: dict[str, Any]) -> dict[str, Any]:
    """Returns a line of comparison.csv."""
    figures = results["metrics"]
    return {
        "method": one.method.title,
        "bits": one.config.bits,
        "seed": one.config.seed,
        "map": results["map"],
        "map_tie_aware": results["map_tie_aware"],
        "precision_radius_2": figures.get("precision_radius_2"),
        "empty_radius_2": figures.get("empty_radius_2"),
        "mean_abs_correlation": figures["code_health"]["mean_abs_correlation"],
        "entropy": figures["code_health"]["entropy"],
        "train_seconds": results["seconds"]["train"],
        "k": results["k"],
        "workdir": str(one.workdir),
    }


def _tables(config: ml_collections.ConfigDict, wanted: list[Cell], records: list[dict[str, Any]]) -> list[tables.Table]:
    """Returns the paper's two tables: all methods, and the ablation of the objective where more than one is there."""
    lengths = numbers(config.compare.bits)
    methods = list(dict.fromkeys((one.method.title, one.method.name) for one in wanted))
    seeds = len(numbers(config.compare.seeds))
    k = next((record["k"] for record in records), 0)
    protocol = build.protocol(config)
    where = f"{config.data.name}, {config.data.protocol}, {config.backbone}"
    over = f"mean ± deviation of {seeds} seeds" if seeds > 1 else "one seed"
    quoted = [
        tables.Row(f"{row.title}, published", [tables.Cell(row.values.get(bits, ())) for bits in lengths], True)
        for row in ([] if protocol.changed else tables.published_rows(protocol.name, k))
    ]

    def rows(chosen: list[str]) -> list[tables.Row]:
        return [
            tables.Row(
                title,
                [
                    tables.Cell(
                        [
                            r["map"]
                            for r in records
                            if (r["method"], r["bits"]) == (title, bits) and r["map"] is not None
                        ]
                    )
                    for bits in lengths
                ],
            )
            for title in chosen
        ]

    taught = [title for title, name in methods if name in OBJECTIVES and OBJECTIVES[name].taught]
    ablated = [title for title, name in methods if name in OBJECTIVES and not OBJECTIVES[name].taught]
    # As in the paper, the first table has of its objectives the whole one alone, if it is there.
    whole = [title for title, name in methods if name == "cibhash"] or ablated
    first = [title for title, name in methods if name not in OBJECTIVES] + whole + taught
    made = [tables.Table(f"MAP@{k} on {where}; {over}", lengths, [*rows(first), *quoted], seeds)]
    if len(ablated) > 1:
        made.append(tables.Table(f"Ablation: MAP@{k} on {where}; {over}", lengths, rows(ablated), seeds))
    return made


def _plain(table: tables.Table) -> dict[str, Any]:
    return {
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


def _report(config: ml_collections.ConfigDict, workdir: pathlib.Path, made: list[tables.Table]) -> pathlib.Path:
    pictures = []
    for name, table in zip(("methods", "ablation"), made, strict=False):
        rows = [row for row in table.rows if not row.published]
        mean = np.array([[cell.mean for cell in row.cells] for row in rows], float)
        deviation = np.array([[cell.deviation or 0 for cell in row.cells] for row in rows], float)
        if np.isfinite(mean).any():
            score = table.title.partition(" on ")[0].removeprefix("Ablation: ")
            drawn = figures_lib.methods([row.title for row in rows], table.bits, mean, deviation, score=score)
            pictures.append(report.picture(name, drawn))
    page = render(
        f"{config.data.name} · comparison",
        made[0].title,
        [
            Grid(
                table.title,
                ("method", *(f"{bits} bits" for bits in table.bits)),
                [(row.title, *tables.cell_texts(table, row)) for row in table.rows],
            )
            for table in made
        ],
        [Section("Pictures", pictures)],
        notes=["Rows marked 'published' are quoted from papers, with another network; all others were measured here."],
        config=json.dumps(config.to_dict(), indent=2, ensure_ascii=False),
    )
    return report.publish(workdir / "report", pictures, page)


def _on_screen(table: tables.Table) -> rich.table.Table:
    shown = rich.table.Table(title=table.title)
    shown.add_column("method")
    for bits in table.bits:
        shown.add_column(f"{bits} bits", justify="right")
    for row in table.rows:
        shown.add_row(row.title, *tables.cell_texts(table, row), style="dim" if row.published else "")
    return shown

"""The comparison: methods × code lengths × seeds, cell by cell, and the tables of the paper made of them."""

import json
import pathlib
import time
from typing import Any

import ml_collections
import numpy as np
import rich.console
import rich.table

from cib_jax.config import checking, from_config
from cib_jax.jobs import cells, report, workers
from cib_jax.jobs import workdir as workdir_lib
from cib_jax.jobs.cells import Cell
from cib_jax.jobs.presenting import say
from cib_jax.objective import OBJECTIVES
from cib_jax.report import many_runs, published, tables
from cib_jax.report.page import Grid, Section, render
from cib_jax.training import writers


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
    checking.check(config, around=True)
    writers.check_installed(config.log.writers)
    wanted = _cells(config, workdir)
    workdir_lib.adopt(workdir, config, "comparison")
    processes = min(workers.room(config.compare.workers), len(wanted))
    say(
        console,
        f"{len(wanted)} cells, {sum(cells.finished(one) is not None for one in wanted)} of them measured already; "
        f"{processes} process{'es' if processes > 1 else ''} at work in {workdir}",
    )

    def conclude() -> tuple[dict[str, Any], bool]:
        comparison = _conclude(config, workdir, wanted, console)
        return comparison, not comparison["missing"]

    arguments = (config.to_dict(), str(workdir), time.time())
    return workers.to_the_end(_work, arguments, processes, workdir / ".lock", conclude)


def _cells(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[Cell]:
    """Returns the cells, those of one seed after another, so that a table stands early."""
    compared = config.compare
    rows = cells.methods(compared.methods)
    return [
        cells.cell(config, row, bits, seed, workdir / "cells")
        for seed in cells.numbers(compared.seeds)
        for bits in cells.numbers(compared.bits)
        for row in rows
    ]


def _work(fields: dict[str, Any], workdir: str, begun: float, shows: bool) -> None:
    """Measures the cells that nobody else is at, none refused since `begun`; `shows` says whether to tell of each."""
    wanted = _cells(ml_collections.ConfigDict(fields), pathlib.Path(workdir))
    console = rich.console.Console(quiet=not shows)
    for one in wanted:
        if cells.finished(one) is not None or cells.refused(one, since=begun):
            continue
        try:
            results = cells.measure(one)
        except workdir_lib.BusyError:
            continue
        done = [found for other in wanted if (found := cells.finished(other))]
        _check_alike(done, pathlib.Path(workdir))
        told = f"MAP {_shown(results['map'])}" if results else cells.refused(one)
        say(
            console,
            f"{len(done)} of {len(wanted)}: {one.method.title}, {one.config.bits} bits, seed {one.config.seed}: {told}",
        )


def _check_alike(found: list[dict[str, Any]], workdir: pathlib.Path) -> None:
    """Refuses cells that were measured on several data, or with several weights: they make no table."""
    for name, field in (("data", "data.dir"), ("backbone_fingerprint", "backbone_weights")):
        if len({results[name] for results in found if name in results}) > 1:
            raise workdir_lib.WorkdirError(
                f"{workdir}: config.{field} leads to others than those that some of its cells were measured on; put "
                "them back, or choose another --workdir"
            )


def _shown(value: float | None) -> str:
    return "unknown, without labels" if value is None else f"{value:.4f}"


def _conclude(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, wanted: list[Cell], console: rich.console.Console
) -> dict[str, Any]:
    found = [(one, cells.finished(one)) for one in wanted]
    _check_alike([results for _, results in found if results], workdir)
    records = [_record(one, results) for one, results in found if results]
    missing = [one for one, results in found if not results]
    made = _tables(config, wanted, records)
    comparison = {
        "tables": [_plain(table) for table in made],
        "cells": records,
        "missing": [
            {"method": one.method.title, "bits": one.config.bits, "seed": one.config.seed, "why": cells.refused(one)}
            for one in missing
        ],
    }
    workdir_lib.write_json(workdir / "comparison.json", comparison)
    for name, content in (
        ("comparison.csv", tables.comma_separated(records)),
        ("comparison.md", "\n".join(tables.markdown(table) for table in made)),
        ("comparison.tex", "\n".join(tables.latex(table) for table in made)),
    ):
        workdir_lib.write_bytes(workdir / name, content.encode())
    page = _report(config, workdir, made)
    for table in made:
        console.print(_on_screen(table))
    for one in missing:
        if why := cells.refused(one):
            say(console, f"Refused: {one.method.title}, {one.config.bits} bits, seed {one.config.seed}: {why}")
    if waiting := sum(not cells.refused(one) for one in missing):
        say(console, f"{waiting} cells are with other processes; run again when they are done")
    say(console, f"Written to {workdir}: comparison.csv, .md, .tex and .json; pictured in {page}")
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
    lengths = cells.numbers(config.compare.bits)
    methods = list(dict.fromkeys((one.method.title, one.method.name) for one in wanted))
    seeds = len(cells.numbers(config.compare.seeds))
    k = next((record["k"] for record in records), 0)
    protocol = from_config.protocol(config)
    where = f"{config.data.name}, {config.data.protocol}, {config.backbone}"
    over = f"mean ± deviation of {seeds} seeds" if seeds > 1 else "one seed"
    quoted = [
        tables.Row(f"{row.title}, published", [tables.Cell(row.values.get(bits, ())) for bits in lengths], True)
        for row in ([] if protocol.changed else published.rows(protocol.name, k))
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
            drawn = many_runs.methods([row.title for row in rows], table.bits, mean, deviation, score=score)
            pictures.append(report.picture(name, drawn))
    page = render(
        f"{config.data.name} · comparison",
        made[0].title,
        [
            Grid(
                table.title,
                ("method", *(f"{bits} bits" for bits in table.bits)),
                [(row.title, *tables.texts(table, row)) for row in table.rows],
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
        shown.add_row(row.title, *tables.texts(table, row), style="dim" if row.published else "")
    return shown

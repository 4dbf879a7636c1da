"""The search for hyper-parameters: trials drawn from a space, each a run of its own, and what they teach."""

import json
import pathlib
from typing import Any

import ml_collections
import numpy as np
import rich.console
import rich.table
import scipy.stats

from cib_jax.config import checking, from_config
from cib_jax.config.field_values import ConfigError
from cib_jax.devices.parallel import DevicesError
from cib_jax.jobs import report, scores, space, workers
from cib_jax.jobs import workdir as workdir_lib
from cib_jax.jobs.presenting import say
from cib_jax.jobs.train import TrainingError, train
from cib_jax.report import many_runs, tables
from cib_jax.report.page import Grid, Picture, Section, render
from cib_jax.retrieval.label_free import SCORES
from cib_jax.training import place, writers
from cib_jax.training.view_bank import BankError

TRIAL = "trial.json"
"""What a trial came to; written last, so a trial that has it is done."""

Trial = dict[str, Any]
"""number, params, value (None where it failed), scores, error."""


def tune(
    config: ml_collections.ConfigDict, workdir: pathlib.Path | str, *, console: rich.console.Console | None = None
) -> dict[str, Any]:
    """Runs the trials that `config.tune` asks for; returns what search.json holds.

    Trial n is a run in trials/n with parameters that follow from the seed, n and the trials before it: stopped
    anywhere, the same command goes on, within a trial from its last checkpoint, and comes to the same. More trials may
    be asked for later.

    Args:
      config: see configs/default.py.
      workdir: the search's folder.
      console: where to report.

    Raises:
      ConfigError, DataError, WeightsError, WorkdirError, WriterError: as in training.
      ExtraError: Optuna is not installed.
    """
    workdir, console = pathlib.Path(workdir), console or rich.console.Console()
    checking.check(config, around=True)
    writers.check_installed(config.log.writers)
    tuned = config.tune
    drawn_from = space.parse(tuned.space, grid=tuned.sampler == "grid")
    if tuned.score == "validation_map" and not _validates(config):
        raise ConfigError(
            "config.tune.score: 'validation_map' wants images to validate on; set config.data.validation to 'database' "
            f"or 'query_half', or the score to one that needs no labels: {', '.join(SCORES)}"
        )
    fixed = frozenset({"tune.space", "tune.sampler", "tune.score", "tune.images"})
    workdir_lib.adopt(workdir, config, "search", fixed)
    trials = _trials(config, drawn_from)
    processes = 1 if tuned.sampler == "tpe" else min(workers.room(tuned.workers), trials)
    done = sum(_read(workdir, number) is not None for number in range(trials))
    say(
        console,
        f"{trials} trials, {done} of them done already, {tuned.sampler} over {', '.join(drawn_from)}; best by "
        f"{tuned.score}; {processes} process{'es' if processes > 1 else ''} at work in {workdir}",
    )

    def conclude() -> tuple[dict[str, Any], bool]:
        search = _conclude(config, workdir, trials, console)
        return search, len(search["trials"]) == trials

    arguments = (config.to_dict(), str(workdir))
    return workers.to_the_end(_work, arguments, processes, workdir / ".lock", conclude)


def _validates(config: ml_collections.ConfigDict) -> bool:
    return from_config.protocol(config).validation != "none" or config.data.name == "list"


def _trials(config: ml_collections.ConfigDict, drawn_from: space.Space) -> int:
    return len(space.grid(drawn_from)) if config.tune.sampler == "grid" else config.tune.trials


def _read(workdir: pathlib.Path, number: int) -> Trial | None:
    path = _folder(workdir, number) / TRIAL
    return workdir_lib.read_json(path) if path.exists() else None


def _folder(workdir: pathlib.Path, number: int) -> pathlib.Path:
    return workdir / "trials" / f"{number:04}"


def _work(fields: dict[str, Any], folder: str, shows: bool) -> None:
    """Runs the trials that nobody else is at, telling of each where it `shows`."""
    config, workdir = ml_collections.ConfigDict(fields), pathlib.Path(folder)
    tuned, console = config.tune, rich.console.Console(quiet=not shows)
    drawn_from = space.parse(tuned.space, grid=tuned.sampler == "grid")
    trials = _trials(config, drawn_from)
    for number in range(trials):
        if _read(workdir, number) is not None:
            continue
        earlier = [(trial["params"], trial["value"]) for at in range(number) if (trial := _read(workdir, at))]
        if tuned.sampler == "tpe" and len(earlier) < number:
            return  # another process is at an earlier one; this would draw something else without it
        params = space.suggest(drawn_from, tuned.sampler, config.seed, number, earlier)
        place = _folder(workdir, number)
        try:
            # Held over training, scoring and writing; the run inside holds its own lock while it trains.
            with workdir_lib.alone(place.with_suffix(".lock")):
                trial = _read(workdir, number) or _run(config, params, number, place)
        except workdir_lib.BusyError:
            continue
        told = f"{tuned.score} {trial['value']:.4f}" if trial["value"] is not None else trial["error"]
        say(console, f"Trial {number + 1} of {trials}: {_in_words(params)}: {told}")


def _run(base: ml_collections.ConfigDict, params: dict[str, Any], number: int, folder: pathlib.Path) -> Trial:
    """Trains and scores one trial and writes its trial.json.

    Raises:
      BusyError: another process is at it.
      Refusal: what is wrong is not in what was drawn: the data, the weights, the folder.
    """
    config = base.copy_and_resolve_references()
    # A report of each would take longer than a short trial; --mode=evaluate --config.report.write=True draws any one's.
    config.update_from_flattened_dict({"report.write": False} | params)
    config.train.checkpoint_dir = place.within(config.train.checkpoint_dir, "trials", folder.name)
    trial: Trial = {"number": number, "params": params, "value": None, "scores": {}, "error": ""}
    try:
        results = train(config, folder, console=rich.console.Console(quiet=True))
        found: dict[str, float | None] = dict(scores.label_free_scores(folder, base.tune.images))
        found |= {"validation_map": results["best_validation_map"], "map": results["map"]}
        trial |= {"scores": found, "value": found[base.tune.score], "data": results.get("data", "")}
        if trial["value"] is None:
            raise ConfigError(
                "config.tune.score: 'validation_map' wants images to validate on, but the list has none with the split "
                "'validation'; give it some, or set the score to one that needs no labels"
            )
    except (ConfigError, TrainingError, BankError, DevicesError) as error:
        # What was drawn cannot work; another draw may. Anything else would be the same for every trial.
        if not (isinstance(error, TrainingError) or any(f"config.{name}:" in str(error) for name in params)):
            raise
        trial["error"] = str(error)
    folder.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_json(folder / TRIAL, trial)
    return trial


def _in_words(params: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


def _conclude(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, trials: int, console: rich.console.Console
) -> dict[str, Any]:
    done = [trial for number in range(trials) if (trial := _read(workdir, number)) is not None]
    good = [trial for trial in done if trial["value"] is not None]
    for trial in done:
        if trial["error"]:
            say(console, f"Trial {trial['number'] + 1} failed: {trial['error']}")
    if waiting := trials - len(done):
        say(console, f"{waiting} trials are with other processes; run again when they are done")
    if not good and waiting:
        return {"score": config.tune.score, "best": None, "rank_correlation": {}, "trials": done}
    if not good:
        raise ConfigError("config.tune.space: no trial could be scored; the reasons stand above")
    if len({trial["data"] for trial in good}) > 1:
        raise workdir_lib.WorkdirError(
            f"{workdir}: config.data.dir leads to other data than some of its trials were run on; put them back, or "
            "choose another --workdir"
        )
    best = max(good, key=lambda trial: trial["value"])
    search = {
        "score": config.tune.score,
        "best": best,
        "rank_correlation": correlations(good),
        "trials": done,
    }
    workdir_lib.write_json(workdir / "search.json", search)
    records = [{"trial": t["number"], **t["params"], **t["scores"]} for t in good]
    workdir_lib.write_bytes(workdir / "search.csv", tables.comma_separated(records).encode())
    page = _report(config, workdir, search)
    console.print(_table(config, good))
    for against, found in search["rank_correlation"].items():
        told = ", ".join(f"{name} {value:+.2f}" for name, value in found.items())
        say(console, f"Rank correlation with {against} over {len(good)} trials: {told}")
    flags = " ".join(f"--config.{name}={value}" for name, value in best["params"].items())
    say(console, f"Best by {config.tune.score}: {flags}")
    say(console, f"Written to {workdir}: search.csv and search.json; pictured in {page}")
    return search


def correlations(trials: list[Trial]) -> dict[str, dict[str, float]]:
    """Returns Spearman's rank correlation of every label-free score with each MAP that is known, the best first.

    Nothing with fewer than three trials; a score that never changes correlates with nothing and is left out.
    """
    found = {}
    for against in ("validation_map", "map"):
        known = [trial["scores"] for trial in trials if trial["scores"].get(against) is not None]
        if len(known) < 3 or len({one[against] for one in known}) < 2:
            continue
        ranked = {
            name: float(scipy.stats.spearmanr([one[name] for one in known], [one[against] for one in known]).statistic)
            for name in SCORES
            if len({one[name] for one in known}) > 1
        }
        found[against] = dict(sorted(ranked.items(), key=lambda item: -item[1]))
    return found


def _table(config: ml_collections.ConfigDict, good: list[Trial]) -> rich.table.Table:
    shown = rich.table.Table(title=f"The best of {len(good)} trials by {config.tune.score}")
    for column in (*good[0]["params"], config.tune.score, "trial"):
        shown.add_column(column, justify="right")
    for trial in sorted(good, key=lambda trial: -trial["value"])[:5]:
        values = [f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in trial["params"].values()]
        shown.add_row(*values, f"{trial['value']:.4f}", f"{trial['number'] + 1}")
    return shown


def _report(config: ml_collections.ConfigDict, workdir: pathlib.Path, search: dict[str, Any]) -> pathlib.Path:
    good = [trial for trial in search["trials"] if trial["value"] is not None]
    score = search["score"].replace("_", " ").replace("map", "MAP")
    values = np.array([trial["value"] for trial in good])
    pictures = [
        report.picture("search", many_runs.search([t["number"] + 1 for t in good], values, score=score)),
        report.picture("parameters", many_runs.parameters(_columns(good), values, score=score)),
    ]
    if len(good) > 1 and all({"temperature", "beta"} <= trial["params"].keys() for trial in good):
        pictures.append(_sensitivity(good, values, score))
    scored: list[Picture] = []
    for against, ranked in search["rank_correlation"].items():
        if not ranked:
            continue
        of = {"map": "test MAP", "validation_map": "validation MAP"}[against]
        scored.append(
            report.picture(f"label_free_{against}", many_runs.rank_correlations(ranked, of=of, trials=len(good)))
        )
    rows = [
        (
            f"{trial['number'] + 1}",
            *(f"{v:.3g}" if isinstance(v, float) else f"{v}" for v in trial["params"].values()),
            f"{trial['value']:.4f}",
        )
        for trial in sorted(good, key=lambda trial: -trial["value"])[:10]
    ]
    best = search["best"]
    page = render(
        f"{config.data.name} · search over {', '.join(good[0]['params'])}",
        f"{len(good)} trials, best by {score}: {best['value']:.4f} with {_in_words(best['params'])}.",
        [Grid("The best trials", ("trial", *good[0]["params"], score), rows)],
        [Section("The search", pictures), Section("Scores that need no labels", scored)],
        notes=[f"{name}: {words}." for name, words in SCORES.items()],
        config=json.dumps(config.to_dict(), indent=2, ensure_ascii=False),
        wide=("parameters",),
    )
    return report.publish(workdir / "report", [*pictures, *scored], page)


def _columns(good: list[Trial]) -> dict[str, list[Any]]:
    return {name: [trial["params"][name] for trial in good] for name in good[0]["params"]}


def _sensitivity(good: list[Trial], values: np.ndarray, score: str) -> Picture:
    """Returns the heat map over τ and β: each value of a grid, or fifths of what was drawn from ranges."""
    columns, at_column = _steps([trial["params"]["temperature"] for trial in good])
    rows, at_row = _steps([trial["params"]["beta"] for trial in good])
    sums, counts = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)))
    np.add.at(sums, (at_row, at_column), values)
    np.add.at(counts, (at_row, at_column), 1)
    mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    drawn = many_runs.heat_map(columns, rows, mean, names=("temperature τ", "bottleneck weight β"), score=score)
    return report.picture("sensitivity", drawn, "Means over the trials of a cell; steps named by their median value")


def _steps(drawn: list[float]) -> tuple[list[float], np.ndarray]:
    """Returns up to a few steps of what was drawn, by their medians, and the step of each."""
    several = np.asarray(drawn)
    distinct = np.unique(several)
    if len(distinct) <= 8:
        return distinct.tolist(), np.searchsorted(distinct, several)
    ranks = np.argsort(np.argsort(several, kind="stable"), kind="stable")
    step = ranks * 5 // len(several)
    return [float(np.median(several[step == number])) for number in range(5)], step

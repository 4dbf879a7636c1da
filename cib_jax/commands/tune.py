"""What a search draws from: the words of `tune.space` as Optuna's distributions, and the trial of each number."""

import itertools
import json
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.console
import rich.table
import scipy.stats
from jaxtyping import Array, UInt8

from cib_jax import codes, errors
from cib_jax.commands.train import train
from cib_jax.config import build, schema
from cib_jax.console import print_message
from cib_jax.data.dataset import ImageSet
from cib_jax.distributed import sharding
from cib_jax.errors import ConfigError, DataError, DevicesError, MissingExtraError, TrainingError
from cib_jax.inference.serialization import read_config, read_standard, restore_best
from cib_jax.models.encoder import Params
from cib_jax.random_streams import stream_rng
from cib_jax.report import figures, tables
from cib_jax.report.html import Grid, Picture, Section, render
from cib_jax.retrieval import code_quality
from cib_jax.retrieval.code_quality import SCORES
from cib_jax.runs import context, features, report
from cib_jax.runs.context import RunContext
from cib_jax.runs.processes import run_to_end, worker_count
from cib_jax.runs.workdir import adopt, exclusive, read_json, write_bytes, write_json
from cib_jax.training import checkpoint, metric_writers

# jobs.space: What a search draws from: the words of `tune.space` as Optuna's distributions, and the trial of each number.


Space = dict[str, Any]
"""A distribution by the dotted name of a config field."""


def load_optuna() -> Any:
    """Returns the library.

    Raises:
      ExtraError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtraError(
            "--mode=tune: it wants Optuna, which is not installed; pip install 'optuna>=4.5'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def parse(words: str, *, grid: bool = False) -> Space:
    """Returns the distributions that "temperature=0.2..0.5, batch_size=64|128, beta=1e-5..1e-2 log" stands for.

    Args:
      words: see configs/default.py.
      grid: whether there must be choices only.

    Raises:
      ConfigError: a field or a value cannot be; the message names it.
      ExtraError: Optuna is not installed.
    """
    distributions = load_optuna().distributions
    space: Space = {}
    for part in words.split(","):
        name, sign, values = (word.strip() for word in part.partition("="))
        where = f"config.tune.space: {part.strip()!r}"
        if not sign or name not in schema.FIELDS or name in schema.AROUND or name == "seed":
            raise ConfigError(f"{where}: it names no field to be tuned, as in temperature=0.2..0.5")
        if name in space:
            raise ConfigError(f"{where}: {name} is there twice; leave one out")
        if ".." not in values:
            choices = [schema.parsed(name, value.strip(), where) for value in values.split("|")]
            space[name] = distributions.CategoricalDistribution(choices)
            continue
        if grid:
            raise ConfigError(f"{where}: a grid is made of choices, a|b|c, not of ranges")
        low, _, rest = values.partition("..")
        high, *log = rest.split()
        if log not in ([], ["log"]):
            raise ConfigError(f"{where}: after a range comes nothing, or 'log'")
        ends = [schema.parsed(name, end.strip(), where) for end in (low, high)]
        kind = schema.FIELDS[name]
        if kind not in (int, float) or ends[0] >= ends[1] or (log and ends[0] <= 0):
            raise ConfigError(f"{where}: a range goes from a number up to a larger one, with log above 0")
        made = distributions.IntDistribution if kind is int else distributions.FloatDistribution
        space[name] = made(*ends, log=bool(log))
    return space


def grid(space: Space) -> list[dict[str, Any]]:
    """Returns every combination of the choices, the last field changing first."""
    return [
        dict(zip(space, values, strict=True)) for values in itertools.product(*(one.choices for one in space.values()))
    ]


def suggest(
    space: Space, sampler: str, seed: int, number: int, earlier: Sequence[tuple[Mapping[str, Any], float | None]]
) -> dict[str, Any]:
    """Returns the parameters of trial `number`.

    They depend on the arguments alone, so that a search taken up again draws what it would have drawn.

    Args:
      space: what to draw from.
      sampler: "tpe", "random" or "grid".
      seed: of the draws.
      number: of the trial, from 0.
      earlier: parameters and scores of all trials before it, by number; None where one failed. Only "tpe" looks.
    """
    if sampler == "grid":
        return grid(space)[number]
    library = load_optuna()
    draws = (seed * 1_000_003 + number) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", library.exceptions.ExperimentalWarning)  # `multivariate`, before Optuna 5
        made = (
            library.samplers.TPESampler(seed=draws, multivariate=True, n_startup_trials=8)
            if sampler == "tpe"
            else library.samplers.RandomSampler(seed=draws)
        )
    study = library.create_study(direction="maximize", sampler=made)
    for params, score in earlier if sampler == "tpe" else ():
        failed = {"state": library.trial.TrialState.FAIL} if score is None else {"value": score}
        study.add_trial(library.trial.create_trial(params=dict(params), distributions=space, **failed))
    return {name: _short(space[name], value) for name, value in study.ask(space).params.items()}


def _short(distribution: Any, value: Any) -> Any:
    """Returns a number of three digits, as one would write it down; the others tell nothing and are in the way."""
    if not isinstance(value, float) or not hasattr(distribution, "low"):
        return value
    return min(max(float(f"{value:.3g}"), distribution.low), distribution.high)


# jobs.scores: The scores of a trained run that need no labels.


def label_free_scores(workdir: pathlib.Path, images: int) -> dict[str, float]:
    """Returns every score of `label_free.SCORES` of a trained run, on `images` random images of its database.

    Raises:
      CheckpointError, DataError, WeightsError: as in evaluation.
    """
    config = read_config(workdir)
    quiet = rich.console.Console(quiet=True)
    run = context.prepare_run(config, workdir, quiet, trained=True, standard=read_standard(workdir, config))
    params, _, _ = restore_best(workdir, run.initial, config)
    database = run.splits.database
    draws = stream_rng(config.data.seed, "scored images")
    some = database.take(np.sort(draws.permutation(len(database))[:images]))
    packed = features.codes(run, params, some, "Encoding")
    before = np.concatenate(list(features.before_hashing(run, some, "Features")))
    codes_health = code_quality.code_health(packed)
    last = json.loads((workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {
        "separation": code_quality.separation(packed),
        "neighbour_agreement": code_quality.neighbour_agreement(
            packed, before, neighbours=min(code_quality.NEIGHBOURS, len(packed) - 2)
        ),
        "view_agreement": code_quality.view_agreement(*_views(run, params, some)),
        "entropy": codes_health["entropy"],
        "decorrelation": 1 - codes_health["mean_abs_correlation"],
        "contrast": -last["contrast"],
    }


def _views(run: RunContext, params: Params, images: ImageSet) -> Iterator[UInt8[np.ndarray, "n bytes"]]:
    """Yields the codes of a first and of a second augmented view of every image."""
    if run.features_stay:
        for of_view in features.of_views(run, images, 2, "Views", stream="score views"):
            yield features.codes_of_features(run, params, np.asarray(of_view, np.float32))
        return
    key = build.key(run.config, "score views")
    size = min(run.config.encode_batch, len(images))

    @jax.jit
    def packed(params: Params, frozen: Params, batch: Array, first: Array) -> UInt8[Array, "batch 2 bytes"]:
        # Both views by one key: of stored ones, two different.
        views = run.encoder.two_views(jax.random.fold_in(key, first), batch, family=run.config.augment)
        return jnp.stack([codes.pack_bits(run.encoder.logits(params, frozen, view)) for view in views], axis=1)

    # Parameters are arguments, so that the next trial finds the program compiled.
    rows = sharding.map_batches(
        lambda batch, first: packed(params, run.frozen, jnp.asarray(batch), first), run.batches(images), size=size
    )
    both = np.concatenate([np.asarray(row) for row in rows])
    yield from (both[:, 0], both[:, 1])


# jobs.tune: The search for hyper-parameters: trials drawn from a space, each a run of its own, and what they teach.


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
    schema.validate(config, around=True)
    metric_writers.validate_writers(config.log.writers)
    tuned = config.tune
    drawn_from = parse(tuned.space, grid=tuned.sampler == "grid")
    if tuned.score == "validation_map" and not _validates(config):
        raise ConfigError(
            "config.tune.score: 'validation_map' wants images to validate on; set config.data.validation to 'database' "
            f"or 'query_half', or the score to one that needs no labels: {', '.join(SCORES)}"
        )
    fixed = frozenset({"tune.space", "tune.sampler", "tune.score", "tune.images"})
    adopt(workdir, config, "search", fixed)
    trials = _trials(config, drawn_from)
    processes = 1 if tuned.sampler == "tpe" else min(worker_count(tuned.workers), trials)
    done = sum(_read(workdir, number) is not None for number in range(trials))
    print_message(
        console,
        f"{trials} trials, {done} of them done already, {tuned.sampler} over {', '.join(drawn_from)}; best by "
        f"{tuned.score}; {processes} process{'es' if processes > 1 else ''} at work in {workdir}",
    )

    def conclude() -> tuple[dict[str, Any], bool]:
        search = _conclude(config, workdir, trials, console)
        return search, len(search["trials"]) == trials

    arguments = (config.to_dict(), str(workdir))
    return run_to_end(_work, arguments, processes, workdir / ".lock", conclude)


def _validates(config: ml_collections.ConfigDict) -> bool:
    return build.protocol(config).validation != "none" or config.data.name == "list"


def _trials(config: ml_collections.ConfigDict, drawn_from: Space) -> int:
    return len(grid(drawn_from)) if config.tune.sampler == "grid" else config.tune.trials


def _read(workdir: pathlib.Path, number: int) -> Trial | None:
    path = _folder(workdir, number) / TRIAL
    return read_json(path) if path.exists() else None


def _folder(workdir: pathlib.Path, number: int) -> pathlib.Path:
    return workdir / "trials" / f"{number:04}"


def _work(fields: dict[str, Any], folder: str, shows: bool) -> None:
    """Runs the trials that nobody else is at, telling of each where it `shows`."""
    config, workdir = ml_collections.ConfigDict(fields), pathlib.Path(folder)
    tuned, console = config.tune, rich.console.Console(quiet=not shows)
    drawn_from = parse(tuned.space, grid=tuned.sampler == "grid")
    trials = _trials(config, drawn_from)
    for number in range(trials):
        if _read(workdir, number) is not None:
            continue
        earlier = [(trial["params"], trial["value"]) for at in range(number) if (trial := _read(workdir, at))]
        if tuned.sampler == "tpe" and len(earlier) < number:
            return  # another process is at an earlier one; this would draw something else without it
        params = suggest(drawn_from, tuned.sampler, config.seed, number, earlier)
        place = _folder(workdir, number)
        try:
            # Held over training, scoring and writing; the run inside holds its own lock while it trains.
            with exclusive(place.with_suffix(".lock")):
                trial = _read(workdir, number) or _run(config, params, number, place)
        except errors.BusyError:
            continue
        told = f"{tuned.score} {trial['value']:.4f}" if trial["value"] is not None else trial["error"]
        print_message(console, f"Trial {number + 1} of {trials}: {_in_words(params)}: {told}")


def _run(base: ml_collections.ConfigDict, params: dict[str, Any], number: int, folder: pathlib.Path) -> Trial:
    """Trains and scores one trial and writes its trial.json.

    Raises:
      BusyError: another process is at it.
      Refusal: what is wrong is not in what was drawn: the data, the weights, the folder.
    """
    config = base.copy_and_resolve_references()
    # A report of each would take longer than a short trial; --mode=evaluate --config.report.write=True draws any one's.
    config.update_from_flattened_dict({"report.write": False} | params)
    config.train.checkpoint_dir = checkpoint.within(config.train.checkpoint_dir, "trials", folder.name)
    trial: Trial = {"number": number, "params": params, "value": None, "scores": {}, "error": ""}
    try:
        results = train(config, folder, console=rich.console.Console(quiet=True))
        found: dict[str, float | None] = dict(label_free_scores(folder, base.tune.images))
        found |= {"validation_map": results["best_validation_map"], "map": results["map"]}
        trial |= {"scores": found, "value": found[base.tune.score], "data": results.get("data", "")}
        if trial["value"] is None:
            raise ConfigError(
                "config.tune.score: 'validation_map' wants images to validate on, but the list has none with the split "
                "'validation'; give it some, or set the score to one that needs no labels"
            )
    except (ConfigError, TrainingError, DataError, DevicesError) as error:
        # What was drawn cannot work; another draw may. Anything else would be the same for every trial.
        if not (isinstance(error, TrainingError) or any(f"config.{name}:" in str(error) for name in params)):
            raise
        trial["error"] = str(error)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TRIAL, trial)
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
            print_message(console, f"Trial {trial['number'] + 1} failed: {trial['error']}")
    if waiting := trials - len(done):
        print_message(console, f"{waiting} trials are with other processes; run again when they are done")
    if not good and waiting:
        return {"score": config.tune.score, "best": None, "rank_correlation": {}, "trials": done}
    if not good:
        raise ConfigError("config.tune.space: no trial could be scored; the reasons stand above")
    if len({trial["data"] for trial in good}) > 1:
        raise errors.WorkdirError(
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
    write_json(workdir / "search.json", search)
    records = [{"trial": t["number"], **t["params"], **t["scores"]} for t in good]
    write_bytes(workdir / "search.csv", tables.comma_separated(records).encode())
    page = _report(config, workdir, search)
    console.print(_table(config, good))
    for against, found in search["rank_correlation"].items():
        told = ", ".join(f"{name} {value:+.2f}" for name, value in found.items())
        print_message(console, f"Rank correlation with {against} over {len(good)} trials: {told}")
    flags = " ".join(f"--config.{name}={value}" for name, value in best["params"].items())
    print_message(console, f"Best by {config.tune.score}: {flags}")
    print_message(console, f"Written to {workdir}: search.csv and search.json; pictured in {page}")
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
        report.picture("search", figures.search([t["number"] + 1 for t in good], values, score=score)),
        report.picture("parameters", figures.parameters(_columns(good), values, score=score)),
    ]
    if len(good) > 1 and all({"temperature", "beta"} <= trial["params"].keys() for trial in good):
        pictures.append(_sensitivity(good, values, score))
    scored: list[Picture] = []
    for against, ranked in search["rank_correlation"].items():
        if not ranked:
            continue
        of = {"map": "test MAP", "validation_map": "validation MAP"}[against]
        scored.append(
            report.picture(f"label_free_{against}", figures.rank_correlations(ranked, of=of, trials=len(good)))
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
    drawn = figures.heat_map(columns, rows, mean, names=("temperature τ", "bottleneck weight β"), score=score)
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

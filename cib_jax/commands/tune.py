"""Search for hyper-parameters: trials drawn from a space, one run each, and how well label-free scores rank them."""

import functools
import itertools
import json
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.console
import scipy.stats
from jaxtyping import Array, UInt8

from cib_jax import codes, errors
from cib_jax.commands.train import train
from cib_jax.config import build, schema
from cib_jax.console import on_stdout, print_message
from cib_jax.data.dataset import ImageSet
from cib_jax.distributed import sharding
from cib_jax.errors import ConfigError
from cib_jax.files import count, import_optional, install_command, write_bytes
from cib_jax.inference.serialization import read_config, read_standard, restore_best
from cib_jax.models.encoder import Params
from cib_jax.random_streams import stream_rng
from cib_jax.report import figures, tables
from cib_jax.report.html import Grid, Picture, Section
from cib_jax.retrieval import code_quality
from cib_jax.retrieval.code_quality import SCORES
from cib_jax.runs import context, features, many_runs, report
from cib_jax.runs.context import RunContext
from cib_jax.runs.many_runs import Record, load_record
from cib_jax.runs.workdir import adopt, exclusive, write_json
from cib_jax.training import checkpoint, metric_writers

SPACE = "config.tune.space"
SCORE = "config.tune.score"
TRIAL = "trial.json"
"""File with the outcome of a trial: number, params, value (None if it failed), scores and error."""


def tune(
    config: ml_collections.ConfigDict, workdir: pathlib.Path | str, *, console: rich.console.Console | None = None
) -> dict[str, Any]:
    """Runs the trials that `config.tune` asks for and returns search.json.

    Trial n is a run in trials/n; its parameters follow from the seed, n and the trials before it. Stopped anywhere, the
    same command goes on, within a trial from its last checkpoint, to the same result. More trials may be added later.
    """
    workdir, console = pathlib.Path(workdir), on_stdout(console)
    schema.validate(config, around=True)
    metric_writers.validate_writers(config.log.writers)
    tuned = config.tune
    space = parse_space(tuned.space, grid=tuned.sampler == "grid")
    if tuned.score == "validation_map" and build.protocol(config).validation == "none" and config.data.name != "list":
        raise ConfigError(
            f"{SCORE} must be possible without validation images, got 'validation_map'; set config.data.validation to "
            f"'database' or 'query_half', or try {', '.join(SCORES)}",
            field=SCORE,
        )
    count = len(grid_points(space)) if tuned.sampler == "grid" else tuned.trials
    trials = [Trial(number, workdir / "trials" / f"{number:04}") for number in range(count)]
    with adopt(workdir, config, "search", frozenset({"tune.space", "tune.sampler", "tune.score", "tune.images"})):
        print_message(console, f"{tuned.sampler} over {', '.join(space)}; best by {tuned.score}")
        return many_runs.run_all(
            trials,
            functools.partial(_complete, config=config, trials=trials),
            lambda _: _conclude(config, workdir, [load_trial(trial, space) for trial in trials], console),
            workdir=workdir,
            # Each trial of TPE depends on all trials before it.
            workers=1 if tuned.sampler == "tpe" else tuned.workers,
            noun="trial",
            console=console,
        )


# The space and its samplers

Space = dict[str, Any]
"""Distributions of Optuna by the dotted name of a config field."""


def load_optuna() -> Any:
    """Returns the module optuna."""
    message = f"--mode=tune needs Optuna, which is not installed; {install_command('tune')}"
    optuna = import_optional("optuna", errors.MissingExtraError(message, field="--mode"))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def parse_space(text: str, *, grid: bool = False) -> Space:
    """Returns the distributions that "temperature=0.2..0.5, batch_size=64|128, beta=1e-5..1e-2 log" describes.

    A `grid` consists of choices alone.
    """
    distributions = load_optuna().distributions
    space: Space = {}
    for part in map(str.strip, text.split(",")):
        name, equals, values = map(str.strip, part.partition("="))
        where = f"{SPACE}: {part!r}"
        if not equals or name not in schema.FIELDS or name in schema.AROUND or name in ("seed", "k"):
            raise ConfigError(f"{where}: each part must name a field to be tuned, as in temperature=0.2..0.5", SPACE)
        if name.startswith("data."):
            raise ConfigError(f"{where}: all trials share the data, or their scores would not be comparable", SPACE)
        if name in space:
            raise ConfigError(f"{where}: {name} is there twice; leave one out", SPACE)
        if ".." not in values:
            choices = [schema.parsed(name, value.strip(), where) for value in values.split("|")]
            space[name] = distributions.CategoricalDistribution(choices)
            continue
        if grid:
            raise ConfigError(f"{where}: a grid consists of choices, a|b|c, not of ranges", SPACE)
        low, _, rest = values.partition("..")
        high, *log = rest.split()
        if log not in ([], ["log"]):
            raise ConfigError(f"{where}: a range may be followed by 'log' alone, got {' '.join(log)!r}", SPACE)
        ends = [schema.parsed(name, end.strip(), where) for end in (low, high)]
        kind = schema.FIELDS[name]
        if kind not in (int, float) or ends[0] >= ends[1] or (log and ends[0] <= 0):
            raise ConfigError(f"{where}: a range must go from a number up to a larger one, with log above 0", SPACE)
        distribution = distributions.IntDistribution if kind is int else distributions.FloatDistribution
        space[name] = distribution(*ends, log=bool(log))
    return space


def grid_points(space: Space) -> list[dict[str, Any]]:
    """Returns every combination of the choices, the last field changing fastest."""
    choices = [distribution.choices for distribution in space.values()]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*choices)]


def suggest(
    space: Space, sampler: str, seed: int, number: int, earlier: Sequence[tuple[Mapping[str, Any], float | None]]
) -> dict[str, Any]:
    """Returns the parameters of trial `number`.

    They depend on the arguments alone, so that a search that goes on draws what it would have drawn without the stop.
    For the same reason no storage of Optuna is used: its samplers depend on the number of calls so far. `earlier` holds
    parameters and score of every trial before it, by number, None for a failed trial; only "tpe" uses them.
    """
    if sampler == "grid":
        return grid_points(space)[number]
    optuna = load_optuna()
    draws = (seed * 1_000_003 + number) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `multivariate`, before Optuna 5
        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=draws, multivariate=True, n_startup_trials=8)
            if sampler == "tpe"
            else optuna.samplers.RandomSampler(seed=draws),
        )
    for params, score in earlier if sampler == "tpe" else ():
        outcome = {"state": optuna.trial.TrialState.FAIL} if score is None else {"value": score}
        study.add_trial(optuna.trial.create_trial(params=dict(params), distributions=space, **outcome))
    params = study.ask(space).params
    for name, value in params.items():
        if isinstance(value, float) and hasattr(space[name], "low"):
            # Three significant digits are easy to type; more have no effect.
            params[name] = min(max(float(f"{value:.3g}"), space[name].low), space[name].high)
    return params


# Scores without labels


def label_free_scores(
    workdir: pathlib.Path, images: int, console: rich.console.Console | None = None
) -> dict[str, float]:
    """Returns every score of `code_quality.SCORES` of a trained run, on `images` random images of its database."""
    config = read_config(workdir)
    console = console or rich.console.Console(quiet=True)
    run = context.prepare_run(config, workdir, console, trained=True, standard=read_standard(workdir, config))
    params, _, _ = restore_best(workdir, run.initial, config)
    draws = stream_rng(config.data.seed, "scored images")
    some = run.splits.database.take(np.sort(draws.permutation(len(run.splits.database))[:images]))
    packed = features.codes(run, params, some, "Encoding")
    before = np.concatenate(list(features.before_hashing(run, some, "Features")))
    statistics = code_quality.code_health(packed, config.bits)
    neighbors = min(code_quality.NEIGHBOURS, len(packed) - 2)
    last = json.loads((workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {
        "separation": code_quality.separation(packed),
        "neighbour_agreement": code_quality.neighbour_agreement(packed, before, neighbours=neighbors),
        "view_agreement": code_quality.view_agreement(*_codes_of_views(run, params, some)),
        "entropy": statistics["entropy"],
        "decorrelation": 1 - statistics["mean_abs_correlation"],
        "contrast": -last.get("contrast", last["loss"]),
    }


def _codes_of_views(run: RunContext, params: Params, images: ImageSet) -> Iterator[UInt8[np.ndarray, "n bytes"]]:
    """Yields the codes of a first and of a second augmented view of every image."""
    if run.features_stay:
        for view in features.of_views(run, images, 2, "Views", stream="score views"):
            yield features.codes_of_features(run, params, np.asarray(view, np.float32))
        return
    key = build.key(run.config, "view bank")
    size = min(run.config.encode_batch, len(images))

    # Parameters are arguments, so that the next trial reuses the compiled program.
    @jax.jit
    def packed(params: Params, frozen: Params, batch: Array, first: Array) -> UInt8[Array, "batch 2 bytes"]:
        # One key for both views: with stored views, two keys could select the same one.
        views = run.encoder.two_views(jax.random.fold_in(key, first), batch, family=run.config.augment)
        return jnp.stack([codes.pack_bits(run.encoder.logits(params, frozen, view)) for view in views], axis=1)

    rows = sharding.map_batches(
        lambda batch, first: packed(params, run.frozen, jnp.asarray(batch), first), run.batches(images), size=size
    )
    both = np.concatenate([np.asarray(row) for row in rows])
    yield from (both[:, 0], both[:, 1])


# Trials


class Trial(NamedTuple):
    """A run of the search."""

    number: int
    workdir: pathlib.Path

    @property
    def title(self) -> str:
        """Name of the run in messages."""
        return f"trial {self.number + 1}"

    @property
    def record_path(self) -> pathlib.Path:
        """The file with the outcome, which is written last."""
        return self.workdir / TRIAL


def load_trial(trial: Trial, space: Space) -> Record | None:
    """Returns the record of a trial, None if it is not complete; raises a WorkdirError if it is not of the space."""
    record = load_record(trial)
    if record is None:
        return None
    params, scores = record["params"], record["scores"]
    # A trial that failed has no scores.
    names = {*SCORES, "validation_map", "map"} if record["value"] is not None else set()
    numbers = [record["value"], *scores.values()]
    if (
        record["number"] != trial.number
        or params.keys() != space.keys()
        or not all(_is_of(space[name], value) for name, value in params.items())
        or not names <= scores.keys()
        or any(scores[name] is None for name in names & {*SCORES})
        or any(number is not None and not (type(number) in (int, float) and -1e9 < number < 1e9) for number in numbers)
        or not isinstance(record.get("data", ""), str)
    ):
        problem = (
            f"{trial.record_path}: the file is damaged, or of another search; remove it, and the trial is run again"
        )
        raise errors.WorkdirError(problem, "--workdir")
    return record


def _is_of(distribution: Any, value: Any) -> bool:
    """Returns whether a value can have been drawn from a distribution of Optuna."""
    if hasattr(distribution, "choices"):
        return value in distribution.choices
    kinds = (int,) if isinstance(distribution.low, int) else (int, float)
    return type(value) in kinds and distribution.low <= value <= distribution.high


def _complete(
    trial: Trial, console: rich.console.Console, *, config: ml_collections.ConfigDict, trials: Sequence[Trial]
) -> str | None:
    """Completes a trial and returns a sentence about it; returns None if it depends on one that is not complete."""
    tuned, earlier = config.tune, []
    space = parse_space(tuned.space, grid=tuned.sampler == "grid")
    if tuned.sampler == "tpe":
        earlier = [
            (record["params"], record["value"]) for one in trials[: trial.number] if (record := load_trial(one, space))
        ]
        if len(earlier) < trial.number:
            return None
    params = suggest(space, tuned.sampler, config.seed, trial.number, earlier)
    # Held while training, scoring and writing; the run in the folder holds its own lock only while it trains.
    with exclusive(trial.workdir.with_suffix(".lock")):
        record = load_trial(trial, space) or run_trial(config, params, trial, console)
    outcome = f"{tuned.score} {record['value']:.4f}" if record["value"] is not None else record["error"]
    return f"{trial.title}, {_format_params(params)}: {outcome}"


def run_trial(
    base: ml_collections.ConfigDict, params: dict[str, Any], trial: Trial, console: rich.console.Console
) -> Record:
    """Trains and scores one trial, writes its trial.json and returns it.

    An error that concerns a drawn field is recorded; any other, as about the data or the folder, is raised.
    """
    config = base.copy_and_resolve_references()
    # A report would take longer than a short trial; --mode=evaluate --config.report.write=True draws one.
    config.update_from_flattened_dict({"report.write": False} | params)
    config.train.checkpoint_dir = checkpoint.within(config.train.checkpoint_dir, "trials", trial.workdir.name)
    record: Record = {"number": trial.number, "params": params, "value": None, "scores": {}, "error": ""}
    try:
        results = train(config, trial.workdir, console=console)
        scores: dict[str, float | None] = dict(label_free_scores(trial.workdir, base.tune.images, console))
        scores |= {"validation_map": results["best_validation_map"], "map": results["map"]}
        record |= {"scores": scores, "value": scores[base.tune.score], "data": results.get("data", "")}
        if record["value"] is None:
            raise ConfigError(
                f"{SCORE} must be possible without validation images, got 'validation_map', and the list has no rows "
                "of the split 'validation'; add some, or choose a score without labels",
                field=SCORE,
            )
    except (ConfigError, errors.TrainingError, errors.DataError, errors.DevicesError) as error:
        # Another draw may work; any other error would repeat in every trial.
        names = [f"config.{name}" for name in params]
        drawn = error.field in names if error.field else any(f"{name}:" in str(error) for name in names)
        if not (drawn or isinstance(error, errors.TrainingError)):
            raise
        record["error"] = str(error)
    trial.workdir.mkdir(parents=True, exist_ok=True)
    write_json(trial.record_path, record)
    return record


def _format_params(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_format_value(value)}" for name, value in params.items())


def _format_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value}"


# Results of the search


def _conclude(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    records: list[Record | None],
    console: rich.console.Console,
) -> dict[str, Any]:
    done = [record for record in records if record is not None]
    good = [record for record in done if record["value"] is not None]
    for record in done:
        if record["error"]:
            print_message(console, f"Trial {record['number'] + 1} failed: {record['error']}")
    if waiting := records.count(None):
        print_message(console, f"Left to other processes: {count(waiting, 'trial')}; run again when they are done")
    search = {"score": config.tune.score, "best": None, "rank_correlation": {}, "trials": done}
    if not good and waiting:
        return search
    if not good:
        raise ConfigError(f"{SPACE}: no trial could be scored; the reasons are above, so try another space", SPACE)
    if len({record.get("data") for record in good}) > 1:
        raise errors.WorkdirError(
            f"config.data.dir must be the same for all trials of {workdir}, but some were run on other data; restore "
            "these, or choose another --workdir",
            field="config.data.dir",
        )
    ranked = sorted(good, key=lambda record: -record["value"])
    best = ranked[0]
    search |= {"best": best, "rank_correlation": rank_correlations(good)}
    write_json(workdir / "search.json", search)
    lines = [{"trial": record["number"], **record["params"], **record["scores"]} for record in good]
    write_bytes(workdir / "search.csv", tables.comma_separated(lines).encode())
    rows = [
        (f"{one['number'] + 1}", *map(_format_value, one["params"].values()), f"{one['value']:.4f}")
        for one in ranked[:10]
    ]
    title = f"The best of {count(len(good), 'trial')} by {config.tune.score}"
    grid = Grid(title, ("trial", *best["params"], config.tune.score), rows)
    drawn = f"; report in {_write_report(config, workdir, search, good, grid)}" if config.report.write else ""
    many_runs.print_grid(console, grid, rows=5)
    for against, scores in search["rank_correlation"].items():
        text = ", ".join(f"{name} {value:+.2f}" for name, value in scores.items())
        print_message(console, f"Rank correlation with {against} over {count(len(good), 'trial')}: {text}")
    flags = " ".join(f"--config.{name}={value}" for name, value in best["params"].items())
    print_message(console, f"Best by {config.tune.score}: {flags}")
    print_message(console, f"Written to {workdir}: search.csv and search.json{drawn}")
    return search


def rank_correlations(records: list[Record]) -> dict[str, dict[str, float]]:
    """Returns Spearman's rank correlation of each label-free score with each known MAP, the best first.

    Fewer than three trials, and scores that are the same in all trials, have none.
    """
    correlations = {}
    for against in ("validation_map", "map"):
        known = [record["scores"] for record in records if record["scores"].get(against) is not None]
        column = {name: [scores[name] for scores in known] for name in (*SCORES, against)}
        if len(known) < 3 or len(set(column[against])) < 2:
            continue
        varied = [name for name in SCORES if len(set(column[name])) > 1]
        ranked = {name: float(scipy.stats.spearmanr(column[name], column[against]).statistic) for name in varied}
        correlations[against] = dict(sorted(ranked.items(), key=lambda item: -item[1]))
    return correlations


def _write_report(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, search: dict[str, Any], good: list[Record], grid: Grid
) -> pathlib.Path:
    score = search["score"].replace("_", " ").replace("map", "MAP")
    values = np.array([record["value"] for record in good])
    columns = {name: [record["params"][name] for record in good] for name in good[0]["params"]}
    numbers = [record["number"] + 1 for record in good]
    pictures = [
        report.picture("search", figures.search(numbers, values, score=score)),
        report.picture("parameters", figures.parameters(columns, values, score=score)),
    ]
    if len(good) > 1 and {"temperature", "beta"} <= columns.keys():
        pictures.append(_draw_sensitivity(columns["temperature"], columns["beta"], values, score))
    names = {"map": "test MAP", "validation_map": "validation MAP"}
    correlations = [
        report.picture(f"label_free_{against}", figures.rank_correlations(ranked, of=names[against], trials=len(good)))
        for against, ranked in search["rank_correlation"].items()
        if ranked
    ]
    best = search["best"]
    return report.write_page(
        workdir / "report",
        f"{config.data.name} · search over {', '.join(columns)}",
        f"{count(len(good), 'trial')}, best by {score}: {best['value']:.4f} with {_format_params(best['params'])}.",
        [grid],
        [Section("The search", pictures), Section("Scores that need no labels", correlations)],
        notes=[f"{name}: {words}." for name, words in SCORES.items()],
        config=config,
        wide=("parameters",),
    )


def _draw_sensitivity(temperatures: list[float], betas: list[float], values: np.ndarray, score: str) -> Picture:
    """Returns a heat map over τ and β with each value of a grid, or quintiles of what was drawn from ranges."""
    columns, at_column = _bins(temperatures)
    rows, at_row = _bins(betas)
    edges = (np.arange(len(rows) + 1), np.arange(len(columns) + 1))
    mean = scipy.stats.binned_statistic_2d(at_row, at_column, values, bins=edges).statistic  # NaN where there is none
    drawn = figures.heat_map(columns, rows, mean, names=("temperature τ", "bottleneck weight β"), score=score)
    return report.picture("sensitivity", drawn, "Means over the trials of a cell; bins named by their median value")


def _bins(drawn: list[float]) -> tuple[list[float], np.ndarray]:
    """Returns the medians of at most eight bins of what was drawn, and the bin of each value."""
    values = np.asarray(drawn)
    distinct = np.unique(values)
    if len(distinct) <= 8:
        return distinct.tolist(), np.searchsorted(distinct, values)
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    quintile = ranks * 5 // len(values)
    return [float(np.median(values[quintile == number])) for number in range(5)], quintile

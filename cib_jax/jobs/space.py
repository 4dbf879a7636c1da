"""What a search draws from: the words of `tune.space` as Optuna's distributions, and the trial of each number."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from cib_jax.config import field_values
from cib_jax.config.field_values import ConfigError
from cib_jax.errors import Refusal

Space = dict[str, Any]
"""A distribution by the dotted name of a config field."""


class ExtraError(Refusal):
    """An optional library is not installed."""


def optuna() -> Any:
    """Returns the library.

    Raises:
      ExtraError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ExtraError("--mode=tune: it wants Optuna, which is not installed; pip install 'optuna>=4.5'") from None
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
    distributions = optuna().distributions
    space: Space = {}
    for part in words.split(","):
        name, sign, values = (word.strip() for word in part.partition("="))
        where = f"config.tune.space: {part.strip()!r}"
        if not sign or name not in field_values.FIELDS or name in field_values.AROUND or name == "seed":
            raise ConfigError(f"{where}: it names no field to be tuned, as in temperature=0.2..0.5")
        if name in space:
            raise ConfigError(f"{where}: {name} is there twice; leave one out")
        if ".." not in values:
            choices = [field_values.parsed(name, value.strip(), where) for value in values.split("|")]
            space[name] = distributions.CategoricalDistribution(choices)
            continue
        if grid:
            raise ConfigError(f"{where}: a grid is made of choices, a|b|c, not of ranges")
        low, _, rest = values.partition("..")
        high, *log = rest.split()
        if log not in ([], ["log"]):
            raise ConfigError(f"{where}: after a range comes nothing, or 'log'")
        ends = [field_values.parsed(name, end.strip(), where) for end in (low, high)]
        kind = field_values.FIELDS[name][0]
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
    library = optuna()
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

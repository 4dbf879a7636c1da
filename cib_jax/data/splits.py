"""The protocol: which images train, which are queries, which are searched. Drawn from `data.seed` alone."""

import dataclasses

import numpy as np
from jaxtyping import Int

from cib_jax.data.images import DataError, ImageSet, Labels, Source


@dataclasses.dataclass(frozen=True)
class Splits:
    """The images of an experiment by their role. `train` is part of `database`."""

    train: ImageSet
    query: ImageSet
    database: ImageSet
    validation: tuple[ImageSet, ImageSet] | None
    """Validation queries and the database they are searched in, or None."""


def draw(
    source: Source,
    *,
    seed: int,
    train_per_class: int,
    queries: int = 0,
    validation: str = "none",
    validation_queries: int = 1000,
) -> Splits:
    """Returns the splits of a data set (the table of CIBHash's section 5.1).

    Args:
      source: the data set as published.
      seed: decides every draw; each draw has a stream of its own, so that one setting does not change another's draw.
      train_per_class: training images drawn per class from the database; 0 takes the whole database.
      queries: queries drawn from a set that comes in one piece; 0 takes the set's own test split.
      validation: "none"; "query_half", half of the queries validate and only the other half is tested on, as in the
        published code; or "database", validation queries come from the database, outside training, are searched in the
        rest of it, and the test is left whole.
      validation_queries: how many, with "database".

    Raises:
      DataError: the set is too small for what is asked.
    """
    if source.test is not None:
        if queries:
            raise DataError(f"config.data.queries: this data set has its own test split; set it to 0, not {queries}")
        database, query = source.train, source.test
    else:
        database, query = _cut(source.train, queries, _generator(seed, 0))
    train_indices = _per_class(database.labels, train_per_class, _generator(seed, 1))
    train = database.take(train_indices) if train_per_class else database
    validating = None
    if validation == "query_half":
        order = _generator(seed, 2).permutation(len(query))
        half = len(query) // 2
        if half < 1:
            raise DataError("config.data.validation: 'query_half' wants at least 2 queries; set it to 'none'")
        validating = (query.take(np.sort(order[:half])), database)
        query = query.take(np.sort(order[half:]))
    elif validation == "database":
        outside = np.setdiff1d(np.arange(len(database)), train_indices)
        if len(outside) < validation_queries:
            raise DataError(
                f"config.data.validation_queries: {validation_queries} queries are wanted from the database outside "
                f"training, which has {len(outside)} images; lower it or config.data.train_per_class"
            )
        drawn = np.sort(_generator(seed, 2).choice(outside, validation_queries, replace=False))
        validating = (database.take(drawn), database.take(np.setdiff1d(np.arange(len(database)), drawn)))
    return Splits(train, query, database, validating)


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng((seed, stream))


def _cut(pool: ImageSet, queries: int, generator: np.random.Generator) -> tuple[ImageSet, ImageSet]:
    if not 0 < queries < len(pool):
        raise DataError(
            f"config.data.queries: this data set comes in one piece of {len(pool)} images; say how many of them are "
            f"queries, from 1 to {len(pool) - 1}, not {queries}"
        )
    order = generator.permutation(len(pool))
    return pool.take(np.sort(order[queries:])), pool.take(np.sort(order[:queries]))


def _per_class(labels: Labels, count: int, generator: np.random.Generator) -> Int[np.ndarray, " drawn"]:
    """Draws `count` images of each class without replacement, sorted; an image drawn for one class serves only it."""
    if not count:
        return np.arange(len(labels))
    drawn = np.zeros(len(labels), bool)
    classes = np.unique(labels) if labels.ndim == 1 else np.arange(labels.shape[1])
    for name in classes:
        members = np.flatnonzero(((labels == name) if labels.ndim == 1 else labels[:, name]) & ~drawn)
        if len(members) < count:
            raise DataError(
                f"config.data.train_per_class: class {name} has {len(members)} images left in the database, not "
                f"{count}; lower the number, or 0 takes the whole database"
            )
        drawn[generator.choice(members, count, replace=False)] = True
    return np.flatnonzero(drawn)

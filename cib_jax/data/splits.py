"""The protocols by name: papers split one data set in several ways, and only figures of the same way compare."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from cib_jax.data.dataset import ImageSet, Labels, Source, joined
from cib_jax.errors import DataError
from cib_jax.random_streams import stream_rng

# data.protocols: The protocols by name: papers split one data set in several ways, and only figures of the same way compare.


ALL = 0
"""As `k`: MAP over the whole ranked database."""

AS_NAMED = -1
"""As a number in a config: what the protocol says."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which images train, which are queries, which are searched, and how far a ranking is looked at."""

    name: str = "own"
    says: str = "as the config says"
    data_sets: tuple[str, ...] = ()
    """Those that it is for; none: any."""
    pooled: bool = False
    """Whether the data set's own splits are put together before anything is drawn."""
    queries: int = 0
    """Drawn at random; with `queries_per_class` 0 too, the data set's own test split is the queries."""
    queries_per_class: int = 0
    train_images: int = 0
    """Drawn at random from the database; all of it trains where there are no more or `train_per_class` is 0, too."""
    train_per_class: int = 0
    train_searched: bool = True
    """Whether the training images stay in the database."""
    validation: str = "none"
    k: int = 1000
    """How many ranked images MAP@k looks at; 0: all."""
    published: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """By k, the tables that were made in this way."""
    changed: tuple[str, ...] = ()
    """Fields in which a config departs from the protocol that it names."""

    def tables(self) -> str:
        """Returns, in words, the published tables with which figures made in this way compare."""
        if self.name == "own":
            return "none compares with a split of one's own"
        if self.changed:
            return f"none compares, since {', '.join(self.changed)} departs from the protocol"
        at = "all" if self.k == ALL else self.k
        return self.published.get(self.k, f"none is known at MAP@{at}")


CIBHASH = "CIBHash, IJCAI 2021, table 1"
DEEPHASH = "the tables of DeepHash-pytorch"

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(),
        Protocol(
            name="cifar10-10k-50k",
            says="the 10,000 test images on the 50,000 training images, 500 per class of which train",
            data_sets=("cifar10",),
            train_per_class=500,
            published={1000: CIBHASH},
        ),
        Protocol(
            name="cifar10-5k-50k",
            says="a random half of the test images on the 50,000 training images; the other half validates",
            data_sets=("cifar10",),
            train_per_class=500,
            validation="query_half",
            published={1000: "none: what CIBHash's published code does, where its paper has 10,000 queries"},
        ),
        Protocol(
            name="cifar10-pooled-10k-50k",
            says="1,000 per class of all 60,000 images on the other 50,000, which all train",
            data_sets=("cifar10",),
            pooled=True,
            queries_per_class=1000,
            published={1000: "Bi-half Net, AAAI 2021, CIFAR-10 (I)"},
        ),
        Protocol(
            name="cifar10-pooled-10k-50k-5k",
            says="1,000 per class of all 60,000 images on the other 50,000, 500 per class of which train",
            data_sets=("cifar10",),
            pooled=True,
            queries_per_class=1000,
            train_per_class=500,
            k=ALL,
            published={ALL: "Bi-half Net, AAAI 2021, CIFAR-10 (II)"},
        ),
        Protocol(
            name="cifar10-1k-59k",
            says="100 per class of all 60,000 images on the other 59,000, 500 per class of which train",
            data_sets=("cifar10",),
            pooled=True,
            queries_per_class=100,
            train_per_class=500,
            k=ALL,
            published={ALL: f"{DEEPHASH}, 'cifar10-1': DSH, DSDH, DFH, GreedyHash, ADSH"},
        ),
        Protocol(
            name="cifar10-1k-54k",
            says="100 per class of all 60,000 images on 54,000 others; 500 per class train and are not searched",
            data_sets=("cifar10",),
            pooled=True,
            queries_per_class=100,
            train_per_class=500,
            train_searched=False,
            k=ALL,
            published={ALL: f"{DEEPHASH}, 'cifar10': DPSH, HashNet, DHN, DTSH"},
        ),
        Protocol(
            name="nuswide-2100",
            says="100 per class of the 21 most frequent concepts on the rest, 500 per class of which train",
            data_sets=("nuswide",),
            queries_per_class=100,
            train_per_class=500,
            k=5000,
            published={5000: CIBHASH},
        ),
        Protocol(
            name="coco-5000",
            says="5,000 random images on the rest, 10,000 random ones of which train",
            data_sets=("mscoco",),
            queries=5000,
            train_images=10_000,
            k=5000,
            published={5000: CIBHASH},
        ),
    )
}
"""Where they were read: CIBHash, section 4.1, and github.com/zexuanqiu/CIBHash (utils/data.py); the README of
github.com/swuxyj/DeepHash-pytorch; github.com/liyunqianggyn/Deep-Unsupervised-Image-Hashing (ImageHashing)."""


def named(name: str, data_set: str, fields: Mapping[str, Any]) -> Protocol:
    """Returns the protocol `name`, with the fields that a config sets otherwise.

    Args:
      name: one of `PROTOCOLS`.
      data_set: the name of the data set that it is to be used with, "cifar10" or "mscoco/2017".
      fields: values by field; -1, or "protocol" for a word, leaves the protocol's.

    Raises:
      DataError: there is no such protocol, or it is another data set's.
    """
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise DataError(f"config.data.protocol: {name!r} is unknown; {hint}There are {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if protocol.data_sets and data_set.partition("/")[0] not in protocol.data_sets:
        raise DataError(
            f"config.data.protocol: {name} is for {' and '.join(protocol.data_sets)}, not {data_set}; 'own' takes the "
            "fields of config.data as they stand"
        )
    given = {
        field: value
        for field, value in fields.items()
        if value not in (AS_NAMED, "protocol") and value != getattr(protocol, field)
    }
    # A k of one's own keeps the split: its tables are looked up by k.
    changed = () if name == "own" else tuple(f"{field}={value}" for field, value in given.items() if field != "k")
    return dataclasses.replace(protocol, **given, changed=changed)


# data.splits: The protocol carried out: which images train, which are queries, which are searched. Drawn from `data.seed` alone.


@dataclasses.dataclass(frozen=True)
class Splits:
    """The images of an experiment by their role."""

    train: ImageSet
    query: ImageSet
    database: ImageSet
    validation: tuple[ImageSet, ImageSet] | None
    """Validation queries and the database they are searched in, or None."""


ROLES = ("train", "database", "query", "validation", "train_only")
"""What a list of one's own may say of an image: it trains and is searched; is searched; asks; asks while training,
searching the same database; or trains and is not searched."""


def draw(source: Source, protocol: Protocol, *, seed: int, validation_queries: int = 1000) -> Splits:
    """Returns the splits of a data set.

    Where labels are missing, nothing can be drawn by class, and nothing validates.

    Args:
      source: the data set as published.
      protocol: what is drawn. Its validation is "none"; "query_half", half of the queries validate and only the other
        half is tested on; or "database", validation queries come from the database, outside training, are searched in
        the rest of it, and the test is left whole.
      seed: decides every draw; each draw has a stream of its own, so that one setting does not change another's draw.
      validation_queries: how many, with "database".

    Raises:
      DataError: the set is too small for what is asked, or has no labels where it needs them.
    """
    if protocol.validation != "none" and source.train.labels is None:
        raise DataError("config.data.validation: this data set has no labels to validate by; set it to 'none'")
    if source.roles is not None:
        return _given(source, protocol)
    database, query = _queries(source, protocol, stream_rng(seed, "queries"))
    train_indices = _training(database, protocol, stream_rng(seed, "training images"))
    train = database if train_indices is None else database.take(train_indices)
    outside = np.arange(0) if train_indices is None else np.setdiff1d(np.arange(len(database)), train_indices)
    if not protocol.train_searched:
        if not len(outside):
            raise DataError(
                f"config.data.protocol: {protocol.name} does not search what trains, and everything trains; set "
                "config.data.train_images or config.data.train_per_class"
            )
        database, outside = database.take(outside), np.arange(len(outside))
    validating = None
    if protocol.validation == "query_half":
        query, validating = _half(query, database, stream_rng(seed, "validation"))
    elif protocol.validation == "database":
        if len(outside) < validation_queries:
            raise DataError(
                f"config.data.validation_queries: {validation_queries} queries are wanted from the database outside "
                f"training, which has {len(outside)} images; lower it or the number of training images"
            )
        drawn = np.sort(stream_rng(seed, "validation").choice(outside, validation_queries, replace=False))
        validating = (database.take(drawn), database.take(np.setdiff1d(np.arange(len(database)), drawn)))
    return Splits(train, query, database, validating)


def _queries(source: Source, protocol: Protocol, generator: np.random.Generator) -> tuple[ImageSet, ImageSet]:
    """Returns the database and the queries."""
    drawn = protocol.queries or protocol.queries_per_class
    if source.test is not None and not protocol.pooled:
        if drawn:
            raise DataError(
                "config.data.queries: this data set has a test split of its own, which are the queries; set it and "
                f"config.data.queries_per_class to 0, not {drawn}"
            )
        return source.train, source.test
    pool = source.train if source.test is None else joined(source.train, source.test)
    if protocol.queries and protocol.queries_per_class:
        raise DataError("config.data.queries: set it or config.data.queries_per_class, not both")
    if protocol.queries_per_class:
        indices = _per_class(pool, protocol.queries_per_class, generator, "queries_per_class")
        return pool.take(np.setdiff1d(np.arange(len(pool)), indices)), pool.take(indices)
    if not 0 < drawn < len(pool):
        raise DataError(
            f"config.data.queries: this data set comes in one piece of {len(pool)} images; say how many of them are "
            f"queries, from 1 to {len(pool) - 1}, not {drawn}"
        )
    order = generator.permutation(len(pool))
    return pool.take(np.sort(order[drawn:])), pool.take(np.sort(order[:drawn]))


def _training(
    database: ImageSet, protocol: Protocol, generator: np.random.Generator
) -> Int[np.ndarray, " drawn"] | None:
    """Returns which images of the database train; None: all."""
    if protocol.train_images and protocol.train_per_class:
        raise DataError("config.data.train_images: set it or config.data.train_per_class, not both")
    if protocol.train_per_class:
        return _per_class(database, protocol.train_per_class, generator, "train_per_class")
    if protocol.train_images > len(database) and protocol.name != "own":
        raise DataError(
            f"config.data.train_images: the database has {len(database)} images, where {protocol.name} wants "
            f"{protocol.train_images} to train; lower the number, or set config.data.protocol to 'own'"
        )
    if 0 < protocol.train_images < len(database):
        return np.sort(generator.choice(len(database), protocol.train_images, replace=False))
    return None


def _half(
    query: ImageSet, database: ImageSet, generator: np.random.Generator
) -> tuple[ImageSet, tuple[ImageSet, ImageSet]]:
    order = generator.permutation(len(query))
    half = len(query) // 2
    if half < 1:
        raise DataError("config.data.validation: 'query_half' wants at least 2 queries; set it to 'none'")
    return query.take(np.sort(order[half:])), (query.take(np.sort(order[:half])), database)


def _given(source: Source, protocol: Protocol) -> Splits:
    """Returns the splits that a data set's own list names, of `ROLES`."""
    assert source.roles is not None
    asked = {
        "queries": protocol.queries,
        "queries_per_class": protocol.queries_per_class,
        "train_images": protocol.train_images,
        "train_per_class": protocol.train_per_class,
    }
    for field, value in asked.items():
        if value:
            raise DataError(f"config.data.{field}: the list names the splits itself; set it to 0, not {value}")
    if protocol.validation != "none":
        raise DataError(
            "config.data.validation: the list names the splits itself; give its validation queries the split "
            "'validation' and set the field to 'none'"
        )
    roles = source.roles
    searched = [roles[role] for role in ("train", "database") if role in roles]
    learnt = [roles[role] for role in ("train", "train_only") if role in roles]
    if not (searched and learnt and "query" in roles):
        raise DataError(
            f"config.data.dir: the list's column 'split' has {', '.join(roles)}, but images that train, that are "
            "searched and that ask are needed; 'train' is the first two, 'query' the third"
        )
    database, train = joined(*searched), joined(*learnt)
    validating = (roles["validation"], database) if "validation" in roles else None
    if validating and database.labels is None:
        raise DataError("config.data.dir: the list has validation queries but no labels; leave them out")
    return Splits(train, roles["query"], database, validating)


def _per_class(images: ImageSet, count: int, generator: np.random.Generator, field: str) -> Int[np.ndarray, " drawn"]:
    """Draws `count` images of each class without replacement, sorted; an image drawn for one class serves only it."""
    if images.labels is None:
        raise DataError(
            f"config.data.{field}: this data set has no labels to draw by; set it to 0 and give "
            f"config.data.{'queries' if field == 'queries_per_class' else 'train_images'} instead"
        )
    labels: Labels = images.labels
    drawn = np.zeros(len(labels), bool)
    classes = np.unique(labels) if labels.ndim == 1 else np.arange(labels.shape[1])
    for name in classes:
        members = np.flatnonzero(((labels == name) if labels.ndim == 1 else labels[:, name]) & ~drawn)
        if len(members) < count:
            raise DataError(
                f"config.data.{field}: class {name} has {len(members)} images left to draw from, not {count}; lower "
                "the number, or 0 draws nothing by class"
            )
        drawn[generator.choice(members, count, replace=False)] = True
    return np.flatnonzero(drawn)

"""Splits of a data set into training images, queries, database and validation, by published protocol or own numbers.

Papers split one data set in several ways, and only metrics of the same split compare. All draws depend on `data.seed`
alone.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from cib_jax.data.dataset import ImageSet, Labels, Source, concatenate, config_error
from cib_jax.files import did_you_mean
from cib_jax.random_streams import stream_rng

ALL = 0
"""Value of `k` for MAP over the whole ranked database."""

AS_NAMED = -1
"""Value of a number in a config that leaves it to the protocol."""

ROLES = ("train", "database", "query", "validation", "train_only")
"""Values of the column `split` of a list: trains and is searched; is searched; is a query; is a query during training,
in the same database; or trains and is not searched."""


_Indices = Int[np.ndarray, " _"]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which images train, which are queries, which are searched, and how many ranks are evaluated.

    Attributes:
      says: Description in words.
      data_sets: Data sets that it applies to; () if any.
      pooled: Whether the data set's own splits are joined before anything is drawn.
      queries, queries_per_class: Number of random queries. If both are 0, the data set's own test split is the queries.
      train_images, train_per_class: Number of training images, drawn from the database. The whole database trains if
        both are 0 or `train_images` is not smaller.
      train_searched: Whether the training images stay in the database.
      validation: Origin of the validation queries: "none"; "query_half", half of the queries, and only the other half
        is tested; or "database", images of the database outside training, which are searched for in the rest of it.
      k: Number of ranks that MAP@k evaluates; 0 means all.
      published: Published tables that used this protocol, by k.
      changed: Fields in which a config departs from the protocol that it names.
    """

    name: str = "own"
    says: str = "as the config says"
    data_sets: tuple[str, ...] = ()
    pooled: bool = False
    queries: int = 0
    queries_per_class: int = 0
    train_images: int = 0
    train_per_class: int = 0
    train_searched: bool = True
    validation: str = "none"
    k: int = 1000
    published: Mapping[int, str] = dataclasses.field(default_factory=dict)
    changed: tuple[str, ...] = ()

    def tables(self) -> str:
        """Returns, in words, the published tables that metrics of this protocol compare with."""
        if self.name == "own":
            return "none has this split"
        if self.changed:
            return f"none compares, since {', '.join(self.changed)} departs from the protocol"
        return self.published.get(self.k, f"none is known at MAP@{'all' if self.k == ALL else self.k}")


CIBHASH = "CIBHash, IJCAI 2021, table 1"
DEEPHASH = "the tables of DeepHash-pytorch"
_POOLED_CIFAR = functools.partial(Protocol, data_sets=("cifar10",), pooled=True, train_per_class=500, k=ALL)

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
            published={1000: "none: used by CIBHash's published code, while its paper has 10,000 queries"},
        ),
        Protocol(
            name="cifar10-pooled-10k-50k",
            says="1,000 per class of all 60,000 images on the other 50,000, which all train",
            data_sets=("cifar10",),
            pooled=True,
            queries_per_class=1000,
            published={1000: "Bi-half Net, AAAI 2021, CIFAR-10 (I)"},
        ),
        _POOLED_CIFAR(
            name="cifar10-pooled-10k-50k-5k",
            says="1,000 per class of all 60,000 images on the other 50,000, 500 per class of which train",
            queries_per_class=1000,
            published={
                ALL: "Bi-half Net, AAAI 2021, CIFAR-10 (II)",
                1000: f"{CIBHASH}, if drawn as its section 4.1 says",
            },
        ),
        _POOLED_CIFAR(
            name="cifar10-1k-59k",
            says="100 per class of all 60,000 images on the other 59,000, 500 per class of which train",
            queries_per_class=100,
            published={ALL: f"{DEEPHASH}, 'cifar10-1': DSH, DSDH, DFH, GreedyHash, ADSH"},
        ),
        _POOLED_CIFAR(
            name="cifar10-1k-54k",
            says="100 per class of all 60,000 images on 54,000 others; 500 per class train and are not searched",
            queries_per_class=100,
            train_searched=False,
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
"""Protocols by name. Sources: CIBHash, section 4.1, and github.com/zexuanqiu/CIBHash (utils/data.py); the README of
github.com/swuxyj/DeepHash-pytorch; github.com/liyunqianggyn/Deep-Unsupervised-Image-Hashing (ImageHashing)."""


def get_protocol(name: str, data_set: str, fields: Mapping[str, Any]) -> Protocol:
    """Returns a protocol with the fields that a config changes; -1 or "protocol" leaves the protocol's value."""
    if name not in PROTOCOLS:
        hint = did_you_mean(name, PROTOCOLS).rstrip()
        raise config_error("protocol", f"it must be one of {', '.join(PROTOCOLS)}, got {name!r}{hint and f'; {hint}'}")
    protocol = PROTOCOLS[name]
    if protocol.data_sets and data_set.partition("/")[0] not in protocol.data_sets:
        raise config_error("protocol", f"{name} is for {' or '.join(protocol.data_sets)}, got {data_set}; use 'own'")
    as_named = (AS_NAMED, "protocol")
    given = {field: value for field, value in fields.items() if value not in (*as_named, getattr(protocol, field))}
    # Another k leaves the split as it is, and the published tables are listed by k.
    changed = () if name == "own" else tuple(f"{field}={value}" for field, value in given.items() if field != "k")
    return dataclasses.replace(protocol, **given, changed=changed)


@dataclasses.dataclass(frozen=True)
class Splits:
    """The images of an experiment by role; `validation` is None or its queries and the database to search."""

    train: ImageSet
    query: ImageSet
    database: ImageSet
    validation: tuple[ImageSet, ImageSet] | None


def draw_splits(source: Source, protocol: Protocol, *, seed: int, validation_queries: int = 1000) -> Splits:
    """Returns the splits of a data set, with `validation_queries` queries if these are drawn from the database.

    Each draw has a random stream of its own, so that one setting does not change another's draw.
    """
    if protocol.validation != "none" and source.train.labels is None:
        problem = f"it must be 'none' for a data set without labels, got {protocol.validation!r}"
        raise config_error("validation", problem)
    if source.roles is not None:
        return _splits_of_list(source.roles, protocol)
    database, query = _draw_queries(source, protocol, stream_rng(seed, "queries"))
    drawn = _draw_training(database, protocol, stream_rng(seed, "training images"))
    train = database if drawn is None else database.take(drawn)
    outside = np.arange(0) if drawn is None else _rest(database, drawn)
    if not protocol.train_searched:
        if not len(outside):
            raise config_error("protocol", f"{protocol.name} searches only images that do not train; set train_images")
        database, outside = database.take(outside), np.arange(len(outside))
    validation, generator = None, stream_rng(seed, "validation queries")
    if protocol.validation == "query_half":
        half = len(query) // 2
        if half < 1:
            problem = f"'query_half' needs at least 2 queries, got {len(query)}; set it to 'none'"
            raise config_error("validation", problem)
        order = generator.permutation(len(query))
        validation = (query.take(np.sort(order[:half])), database)
        query = query.take(np.sort(order[half:]))
    elif protocol.validation == "database":
        if len(outside) < validation_queries:
            problem = f"it must be at most {len(outside)}, the database images outside training"
            raise config_error("validation_queries", f"{problem}, got {validation_queries}")
        asked = np.sort(generator.choice(outside, validation_queries, replace=False))
        validation = (database.take(asked), database.take(_rest(database, asked)))
    return Splits(train, query, database, validation)


def _rest(images: ImageSet, drawn: _Indices) -> _Indices:
    return np.setdiff1d(np.arange(len(images)), drawn)


def _draw_queries(source: Source, protocol: Protocol, generator: np.random.Generator) -> tuple[ImageSet, ImageSet]:
    """Returns the database and the queries."""
    count = protocol.queries or protocol.queries_per_class
    if source.test is not None and not protocol.pooled:
        if count:
            problem = f"it and queries_per_class must be 0 for a data set with a test split, got {count}"
            raise config_error("queries", problem)
        return source.train, source.test
    pool = source.train if source.test is None else concatenate(source.train, source.test)
    if protocol.queries and protocol.queries_per_class:
        raise config_error("queries", "only one of it and config.data.queries_per_class may be set")
    if protocol.queries_per_class:
        drawn = _draw_per_class(pool, protocol.queries_per_class, generator, "queries_per_class")
        return pool.take(_rest(pool, drawn)), pool.take(drawn)
    if not 0 < count < len(pool):
        problem = f"it must be from 1 to {len(pool) - 1}, of {len(pool)} images in one piece, got {count}"
        raise config_error("queries", problem)
    order = generator.permutation(len(pool))
    return pool.take(np.sort(order[count:])), pool.take(np.sort(order[:count]))


def _draw_training(database: ImageSet, protocol: Protocol, generator: np.random.Generator) -> _Indices | None:
    """Returns the indices of the training images in the database, or None if all train."""
    if protocol.train_images and protocol.train_per_class:
        raise config_error("train_images", "only one of it and config.data.train_per_class may be set")
    if protocol.train_per_class:
        return _draw_per_class(database, protocol.train_per_class, generator, "train_per_class")
    if protocol.train_images > len(database) and protocol.name != "own":
        problem = f"{protocol.name} needs {protocol.train_images}, but the database has {len(database)} images"
        raise config_error("train_images", f"{problem}; try 'own'")
    if 0 < protocol.train_images < len(database):
        return np.sort(generator.choice(len(database), protocol.train_images, replace=False))
    return None


def _splits_of_list(roles: Mapping[str, ImageSet], protocol: Protocol) -> Splits:
    """Returns the splits that a list of photos gives itself."""
    for field in ("queries", "queries_per_class", "train_images", "train_per_class"):
        if value := getattr(protocol, field):
            raise config_error(field, f"it must be 0 for a list with a column 'split', got {value}")
    if protocol.validation != "none":
        problem = f"it must be 'none' for a list, which has the split 'validation', got {protocol.validation!r}"
        raise config_error("validation", problem)
    searched = [roles[role] for role in ("train", "database") if role in roles]
    learned = [roles[role] for role in ("train", "train_only") if role in roles]
    if not (searched and learned and "query" in roles):
        problem = f"the column 'split' must name images to train, to search and as queries, got {', '.join(roles)}"
        raise config_error("dir", problem)
    database, train = concatenate(*searched), concatenate(*learned)
    validation = (roles["validation"], database) if "validation" in roles else None
    if validation and database.labels is None:
        raise config_error("dir", "the list has validation queries but no labels; remove those rows")
    return Splits(train, roles["query"], database, validation)


def _draw_per_class(images: ImageSet, count: int, generator: np.random.Generator, field: str) -> _Indices:
    """Draws `count` images of each class without replacement, sorted; an image drawn for one class serves only it."""
    if images.labels is None:
        instead = "queries" if field == "queries_per_class" else "train_images"
        problem = f"it must be 0 for a data set without labels, got {count}; set config.data.{instead} instead"
        raise config_error(field, problem)
    labels: Labels = images.labels
    drawn = np.zeros(len(labels), bool)
    classes = np.unique(labels) if labels.ndim == 1 else np.arange(labels.shape[1])
    for name in classes:
        members = np.flatnonzero(((labels == name) if labels.ndim == 1 else labels[:, name]) & ~drawn)
        if len(members) < count:
            problem = f"it must be at most {len(members)}, the images left of class {name}, got {count}"
            raise config_error(field, problem)
        drawn[generator.choice(members, count, replace=False)] = True
    return np.flatnonzero(drawn)

"""The protocols by name: papers split one data set in several ways, and only figures of the same way compare."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from cib_jax.data.images import DataError

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

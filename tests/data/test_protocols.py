"""Protocols by name: what a config may change, and which published tables then still compare."""

import pathlib
import re

import pytest

from cib_jax.data.splits import PROTOCOLS, named
from cib_jax.errors import DataError


def test_minus_one_leaves_the_protocols_value_and_anything_else_changes_it():
    as_named = {"k": -1, "queries": -1, "queries_per_class": -1, "train_per_class": -1, "validation": "protocol"}
    paper = named("cifar10-10k-50k", "cifar10", as_named)
    assert (paper.k, paper.train_per_class, paper.validation, paper.changed) == (1000, 500, "none", ())
    assert paper.tables() == "CIBHash, IJCAI 2021, table 1"
    other = named("cifar10-10k-50k", "cifar10", as_named | {"train_per_class": 100})
    assert (other.train_per_class, other.changed) == (100, ("train_per_class=100",))
    assert other.tables() == "none compares, since train_per_class=100 departs from the protocol"
    same = named("cifar10-10k-50k", "cifar10", as_named | {"train_per_class": 500})
    assert same == paper


def test_published_tables_go_by_k():
    at_5000 = named("cifar10-1k-59k", "cifar10", {"k": 5000})
    assert at_5000.tables() == "none is known at MAP@5000"
    assert named("cifar10-1k-59k", "cifar10", {"k": 0}).tables().startswith("the tables of DeepHash-pytorch")
    assert at_5000.changed == ()


def test_a_split_of_ones_own_compares_with_nothing():
    own = named("own", "anything", {"queries": 7, "k": -1})
    assert (own.queries, own.k, own.changed) == (7, 1000, ())
    assert own.tables() == "none compares with a split of one's own"


def test_a_protocol_is_for_its_own_data_set():
    assert named("coco-5000", "mscoco/2017", {}).queries == 5000
    with pytest.raises(DataError, match=r"config.data.protocol: coco-5000 is for mscoco, not cifar10; 'own'"):
        named("coco-5000", "cifar10", {})
    with pytest.raises(
        DataError, match=r"config.data.protocol: 'cifar10-10k' is unknown; did you mean cifar10-10k-50k"
    ):
        named("cifar10-10k", "cifar10", {})


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_every_protocol_but_ones_own_says_which_tables_used_it(protocol):
    assert protocol.name == "own" or protocol.k in protocol.published


def test_the_documentation_names_every_protocol():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert re.findall(
        r"^\| `([a-z0-9-]+)` \|", page.split("## Protocols by name")[1].split("## ")[0], re.MULTILINE
    ) == [
        *[name for name in PROTOCOLS if name != "own"],
        "own",
    ]

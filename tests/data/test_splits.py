"""Protocols and splits: counts, disjointness, determinism, published tables, errors."""

import pathlib
import re

import numpy as np
import pytest

from cib_jax.data import splits
from cib_jax.data.dataset import ImageSet, Source
from cib_jax.data.splits import PROTOCOLS, Protocol, get_protocol
from tests.data import errors


def numbered(count, labels, first=0):
    """Images with their number in every pixel."""
    images = np.broadcast_to(np.arange(first, first + count).astype(np.uint8)[:, None, None, None], (count, 2, 2, 3))
    return ImageSet(images, labels)


def numbers(images):
    return [int(images.images[i][0, 0, 0]) for i in range(len(images))]


def draw(source, *, seed, validation_queries=1000, **fields):
    return splits.draw_splits(source, Protocol(**fields), seed=seed, validation_queries=validation_queries)


@pytest.fixture
def two_splits():
    return Source(numbered(100, np.arange(100) % 5), numbered(20, np.arange(20) % 5, 100))


def test_training_images_are_drawn_evenly_from_the_database(two_splits):
    drawn = draw(two_splits, seed=0, train_per_class=7)
    assert np.bincount(drawn.train.labels).tolist() == [7] * 5
    assert len(set(numbers(drawn.train))) == 35
    assert numbers(drawn.database) == list(range(100))
    assert numbers(drawn.query) == list(range(100, 120))
    assert all(number % 5 == label for number, label in zip(numbers(drawn.train), drawn.train.labels, strict=True))


def test_the_seed_decides(two_splits):
    first, second, other = (numbers(draw(two_splits, seed=s, train_per_class=7).train) for s in (1, 1, 2))
    assert first == second != other


def test_half_of_the_queries_validate(two_splits):
    drawn = draw(two_splits, seed=0, train_per_class=7, validation="query_half")
    query, database = drawn.validation
    assert len(query) == len(drawn.query) == 10
    assert sorted(numbers(query) + numbers(drawn.query)) == list(range(100, 120))
    assert numbers(database) == list(range(100))


def test_validation_from_the_database_stays_out_of_training_and_of_its_own_database(two_splits):
    drawn = draw(two_splits, seed=0, train_per_class=7, validation="database", validation_queries=30)
    query, database = map(numbers, drawn.validation)
    assert len(query) == 30
    assert not set(query) & set(numbers(drawn.train))
    assert sorted(query + database) == list(range(100))
    assert len(drawn.query) == 20


def test_one_setting_does_not_change_another_draw(two_splits):
    plain = draw(two_splits, seed=5, train_per_class=7)
    validated = draw(two_splits, seed=5, train_per_class=7, validation="database", validation_queries=9)
    assert numbers(plain.train) == numbers(validated.train)


def test_a_set_in_one_piece_is_cut():
    source = Source(numbered(50, np.arange(50) % 5), None)
    drawn = draw(source, seed=0, train_per_class=0, queries=12)
    assert len(drawn.query) == 12
    assert sorted(numbers(drawn.query) + numbers(drawn.database)) == list(range(50))
    assert drawn.train is drawn.database


def test_multi_hot_labels_are_drawn_per_class_without_repeats():
    labels = np.random.default_rng(0).random((200, 4)) < 0.4
    drawn = draw(Source(numbered(200, labels), numbered(3, labels[:3])), seed=0, train_per_class=10)
    assert len(set(numbers(drawn.train))) == len(drawn.train) == 40
    assert np.all(drawn.train.labels.sum(0) >= 10)


@pytest.mark.parametrize(
    ("options", "field", "values"),
    [
        ({"train_per_class": 21}, "train_per_class", ["class 0", 20, 21]),
        ({"train_per_class": 1, "queries": 5}, "queries", [5]),
        ({"train_per_class": 1, "train_images": 5}, "train_images", ["train_per_class"]),
        (
            {"train_per_class": 19, "validation": "database", "validation_queries": 6},
            "validation_queries",
            [5, 6],
        ),
        ({"train_searched": False, "name": "all"}, "protocol", ["all"]),
    ],
)
def test_too_small_a_set_is_refused(two_splits, options, field, values):
    with errors.raises(f"config.data.{field}", *values):
        draw(two_splits, seed=0, **options)


@pytest.mark.parametrize("queries", [0, 50, 51])
def test_a_set_in_one_piece_must_leave_a_database(queries):
    with errors.raises("config.data.queries", "1 to 49", f"got {queries}"):
        draw(Source(numbered(50, np.arange(50) % 5), None), seed=0, train_per_class=0, queries=queries)


@pytest.fixture(scope="module")
def cifar():
    """As many labels as CIFAR-10 has; the name of an image is its number."""
    numbers, images = np.arange(60_000), np.zeros((60_000, 1, 1, 3), np.uint8)
    labels = np.concatenate([np.random.default_rng(0).permutation(numbers[:50_000] % 10), numbers[50_000:] % 10])
    names = [f"{number:05}" for number in numbers]
    halves = slice(50_000), slice(50_000, None)
    return Source(*(ImageSet(images[part], labels[part], names[part]) for part in halves))


@pytest.mark.parametrize(
    ("name", "queries", "database", "train", "searched"),
    [
        ("cifar10-10k-50k", 10_000, 50_000, 5_000, True),
        ("cifar10-5k-50k", 5_000, 50_000, 5_000, True),
        ("cifar10-pooled-10k-50k", 10_000, 50_000, 50_000, True),
        ("cifar10-pooled-10k-50k-5k", 10_000, 50_000, 5_000, True),
        ("cifar10-1k-59k", 1_000, 59_000, 5_000, True),
        ("cifar10-1k-54k", 1_000, 54_000, 5_000, False),
    ],
)
def test_each_cifar_protocol_has_the_published_counts(cifar, name, queries, database, train, searched):
    drawn = splits.draw_splits(cifar, PROTOCOLS[name], seed=0)
    assert (len(drawn.query), len(drawn.database), len(drawn.train)) == (queries, database, train)
    asked, found, learned = (set(part.names) for part in (drawn.query, drawn.database, drawn.train))
    assert (len(asked), len(found), len(learned)) == (queries, database, train)
    assert not asked & found and not asked & learned
    assert (learned <= found) == searched and (searched or not learned & found)
    assert np.bincount(drawn.train.labels).tolist() == [train // 10] * 10
    if PROTOCOLS[name].pooled:
        assert np.bincount(drawn.query.labels).tolist() == [queries // 10] * 10
        assert min(asked) < "50000" <= max(asked)
    else:
        assert min(asked) >= "50000"


def test_queries_and_training_images_are_drawn_without_labels():
    source = Source(numbered(50, None), None)
    drawn = draw(source, seed=3, queries=10, train_images=15)
    assert (len(drawn.query), len(drawn.database), len(drawn.train)) == (10, 40, 15)
    assert set(numbers(drawn.train)) < set(numbers(drawn.database))
    for field in ("queries_per_class", "train_per_class"):
        with errors.raises(f"config.data.{field}", "got 2"):
            draw(source, seed=0, **{"queries": 10 * (field == "train_per_class"), field: 2})
    with errors.raises("config.data.validation", "'query_half'"):
        draw(source, seed=0, queries=10, validation="query_half")


def test_validation_beside_training_images_that_are_not_searched():
    source = Source(numbered(100, np.arange(100) % 5), None)
    drawn = draw(
        source,
        seed=0,
        queries_per_class=2,
        train_per_class=4,
        train_searched=False,
        validation="database",
        validation_queries=11,
    )
    parts = [numbers(part) for part in (drawn.query, drawn.train, *drawn.validation)]
    assert [len(part) for part in parts] == [10, 20, 11, 59]
    assert sorted(number for part in parts for number in part) == list(range(100))
    assert sorted(numbers(drawn.database)) == sorted(parts[2] + parts[3])


def given(**roles):
    sets = {role: numbered(len(range(*span)), np.arange(*span) % 3, span[0]) for role, span in roles.items()}
    return Source(next(iter(sets.values())), None, roles=sets)


def test_a_list_gives_the_splits_itself():
    source = given(train=(0, 10), database=(10, 30), query=(30, 34), validation=(34, 37), train_only=(40, 45))
    drawn = draw(source, seed=0)
    assert numbers(drawn.train) == [*range(10), *range(40, 45)]
    assert numbers(drawn.database) == list(range(30))
    assert numbers(drawn.query) == list(range(30, 34))
    assert (numbers(drawn.validation[0]), numbers(drawn.validation[1])) == (list(range(34, 37)), list(range(30)))


@pytest.mark.parametrize(
    ("source", "fields", "field", "value"),
    [
        (given(train=(0, 9), query=(9, 12)), {"queries": 3}, "queries", "got 3"),
        (given(train=(0, 9), query=(9, 12)), {"validation": "database"}, "validation", "'database'"),
        (given(database=(0, 9), query=(9, 12)), {}, "dir", "got database, query"),
        (given(train=(0, 9)), {}, "dir", "got train"),
    ],
)
def test_a_list_that_gives_its_splits_badly_is_refused(source, fields, field, value):
    with errors.raises(f"config.data.{field}", value):
        draw(source, seed=0, **fields)


def test_training_images_are_at_most_all_images_but_a_protocol_needs_its_number():
    source = Source(numbered(50, None), None)
    assert len(draw(source, seed=0, queries=10, train_images=40).train) == 40
    assert len(draw(source, seed=0, queries=10, train_images=5000).train) == 40
    with errors.raises("config.data.train_images", "coco", 40, 5000):
        draw(source, seed=0, queries=10, train_images=5000, name="coco")


def test_minus_one_leaves_the_protocols_value_and_anything_else_changes_it():
    as_named = {"k": -1, "queries": -1, "queries_per_class": -1, "train_per_class": -1, "validation": "protocol"}
    paper = get_protocol("cifar10-10k-50k", "cifar10", as_named)
    assert (paper.k, paper.train_per_class, paper.validation, paper.changed) == (1000, 500, "none", ())
    assert paper.tables() == "CIBHash, IJCAI 2021, table 1"
    other = get_protocol("cifar10-10k-50k", "cifar10", as_named | {"train_per_class": 100})
    assert (other.train_per_class, other.changed) == (100, ("train_per_class=100",))
    assert other.tables().startswith("none") and "train_per_class=100" in other.tables()
    same = get_protocol("cifar10-10k-50k", "cifar10", as_named | {"train_per_class": 500})
    assert same == paper


def test_published_tables_go_by_k():
    at_5000 = get_protocol("cifar10-1k-59k", "cifar10", {"k": 5000})
    assert at_5000.tables().startswith("none") and "MAP@5000" in at_5000.tables()
    assert get_protocol("cifar10-1k-59k", "cifar10", {"k": 0}).tables().startswith("the tables of DeepHash-pytorch")
    assert at_5000.changed == ()
    pooled = (get_protocol("cifar10-pooled-10k-50k-5k", "cifar10", {"k": k}).tables() for k in (0, 1000))
    assert [table.partition(",")[0] for table in pooled] == ["Bi-half Net", "CIBHash"]


def test_an_own_split_compares_with_nothing():
    own = get_protocol("own", "anything", {"queries": 7, "k": -1})
    assert (own.queries, own.k, own.changed) == (7, 1000, ())
    assert own.tables().startswith("none")


def test_a_protocol_is_for_its_own_data_set():
    assert get_protocol("coco-5000", "mscoco/2017", {}).queries == 5000
    with errors.raises("config.data.protocol", "coco-5000", "mscoco", "cifar10"):
        get_protocol("coco-5000", "cifar10", {})
    with errors.raises("config.data.protocol", "'cifar10-10k'", "did you mean cifar10-10k-50k?"):
        get_protocol("cifar10-10k", "cifar10", {})


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_every_protocol_but_own_says_which_tables_used_it(protocol):
    assert protocol.name == "own" or protocol.k in protocol.published


def test_the_documentation_names_every_protocol():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert re.findall(
        r"^\| `([a-z0-9-]+)` \|", page.split("## Protocols by name")[1].split("## ")[0], re.MULTILINE
    ) == [
        *[name for name in PROTOCOLS if name != "own"],
        "own",
    ]

"""The protocol's splits: counts, disjointness, determinism, errors."""

import numpy as np
import pytest

from cib_jax.data import splits
from cib_jax.data.images import DataError, ImageSet, Source


def numbered(count, labels, first=0):
    """Images whose pixel tells their number."""
    images = np.broadcast_to(np.arange(first, first + count).astype(np.uint8)[:, None, None, None], (count, 2, 2, 3))
    return ImageSet(images, labels)


def numbers(images):
    return [int(images.images[i][0, 0, 0]) for i in range(len(images))]


@pytest.fixture
def two_splits():
    return Source(numbered(100, np.arange(100) % 5), numbered(20, np.arange(20) % 5, 100))


def test_training_images_are_drawn_evenly_from_the_database(two_splits):
    drawn = splits.draw(two_splits, seed=0, train_per_class=7)
    assert np.bincount(drawn.train.labels).tolist() == [7] * 5
    assert len(set(numbers(drawn.train))) == 35
    assert numbers(drawn.database) == list(range(100))
    assert numbers(drawn.query) == list(range(100, 120))
    assert all(number % 5 == label for number, label in zip(numbers(drawn.train), drawn.train.labels, strict=True))


def test_the_seed_decides(two_splits):
    first, second, other = (numbers(splits.draw(two_splits, seed=s, train_per_class=7).train) for s in (1, 1, 2))
    assert first == second != other


def test_half_of_the_queries_validate(two_splits):
    drawn = splits.draw(two_splits, seed=0, train_per_class=7, validation="query_half")
    query, database = drawn.validation
    assert len(query) == len(drawn.query) == 10
    assert sorted(numbers(query) + numbers(drawn.query)) == list(range(100, 120))
    assert numbers(database) == list(range(100))


def test_validation_from_the_database_stays_out_of_training_and_of_its_own_database(two_splits):
    drawn = splits.draw(two_splits, seed=0, train_per_class=7, validation="database", validation_queries=30)
    query, database = map(numbers, drawn.validation)
    assert len(query) == 30
    assert not set(query) & set(numbers(drawn.train))
    assert sorted(query + database) == list(range(100))
    assert len(drawn.query) == 20


def test_one_setting_does_not_change_another_draw(two_splits):
    plain = splits.draw(two_splits, seed=5, train_per_class=7)
    validated = splits.draw(two_splits, seed=5, train_per_class=7, validation="database", validation_queries=9)
    assert numbers(plain.train) == numbers(validated.train)


def test_a_set_in_one_piece_is_cut():
    source = Source(numbered(50, np.arange(50) % 5), None)
    drawn = splits.draw(source, seed=0, train_per_class=0, queries=12)
    assert len(drawn.query) == 12
    assert sorted(numbers(drawn.query) + numbers(drawn.database)) == list(range(50))
    assert drawn.train is drawn.database


def test_multi_hot_labels_are_drawn_per_class_without_repeats():
    labels = np.random.default_rng(0).random((200, 4)) < 0.4
    drawn = splits.draw(Source(numbered(200, labels), numbered(3, labels[:3])), seed=0, train_per_class=10)
    assert len(set(numbers(drawn.train))) == len(drawn.train) == 40
    assert np.all(drawn.train.labels.sum(0) >= 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_per_class": 21}, "config.data.train_per_class: class 0 has 20 images left"),
        ({"train_per_class": 1, "queries": 5}, "config.data.queries: this data set has its own test split"),
        (
            {"train_per_class": 19, "validation": "database", "validation_queries": 6},
            "config.data.validation_queries: 6 .* has 5 images",
        ),
    ],
)
def test_too_small_a_set_is_refused(two_splits, options, message):
    with pytest.raises(DataError, match=message):
        splits.draw(two_splits, seed=0, **options)


@pytest.mark.parametrize("queries", [0, 50, 51])
def test_a_set_in_one_piece_must_leave_a_database(queries):
    with pytest.raises(DataError, match=r"one piece of 50 images"):
        splits.draw(Source(numbered(50, np.arange(50) % 5), None), seed=0, train_per_class=0, queries=queries)

"""Metrics against plain loops over their definitions and scikit-learn."""

import os
from itertools import permutations, product

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_score, recall_score

from cib_jax.errors import UserError
from cib_jax.retrieval import hamming, metrics
from tests.retrieval.reference import (
    average_precision,
    enumerated_average_precision,
    per_query,
    random_data,
    reference_ball,
    reference_map,
    reference_precision,
    reference_recall,
    tied_data,
)


@given(tied_data(), st.data())
def test_every_metric_matches_its_definition(data, draw):
    size, bits = len(data[1]), data[1].shape[1] * 8
    k = draw.draw(st.integers(1, size))
    radius = draw.draw(st.integers(0, bits + 1))
    assert metrics.mean_average_precision(*data, k) == pytest.approx(reference_map(data, k), abs=1e-12)
    assert metrics.precision_at_k(*data, [k, 1]) == pytest.approx(
        {k: reference_precision(data, k), 1: reference_precision(data, 1)}, abs=1e-12
    )
    assert metrics.recall_at_k(*data, [k]) == pytest.approx({k: reference_recall(data, k)}, abs=1e-12)
    precision, _, empty = reference_ball(data, radius)
    assert metrics.precision_within_radius(*data, radius) == pytest.approx((precision, empty), abs=1e-12)
    curve = np.stack(metrics.precision_recall_curve(*data), axis=1)
    expected = [reference_ball(data, r)[:2] for r in range(bits + 1)]
    np.testing.assert_allclose(curve, expected, atol=1e-12)


@given(tied_data(), st.data())
def test_evaluate_matches_every_definition(data, draw):
    size, bits = len(data[1]), data[1].shape[1] * 8
    k = draw.draw(st.integers(1, size))
    ks = sorted({1, k} | ({10} if k >= 10 else set()))
    report = metrics.evaluate(*data, k)
    assert report["map"] == pytest.approx(reference_map(data, k), abs=1e-12)
    at_k = {
        "k": ks,
        "precision": pytest.approx([reference_precision(data, j) for j in ks], abs=1e-12),
        "recall": pytest.approx([reference_recall(data, j) for j in ks], abs=1e-12),
    }
    assert report["precision_at_k"] == at_k
    precision, _, empty = reference_ball(data, 2)
    assert report["precision_radius_2"] == pytest.approx(precision, abs=1e-12)
    assert report["empty_radius_2"] == pytest.approx(empty, abs=1e-12)
    balls = [reference_ball(data, radius) for radius in range(bits + 1)]
    assert report["precision_recall"] == {
        "radius": list(range(bits + 1)),
        "precision": pytest.approx([ball[0] for ball in balls], abs=1e-12),
        "recall": pytest.approx([ball[1] for ball in balls], abs=1e-12),
    }
    assert (report["queries"], report["database"], report["k"]) == (len(data[0]), size, k)


def test_full_ranking_without_ties_matches_scikit_learn():
    codes = np.packbits(np.tri(65, 64, -1, dtype=np.uint8), axis=1)
    labels = np.random.default_rng(1).integers(0, 2, 65)
    order = np.random.default_rng(2).permutation(65)
    data = codes[:1], codes[order], np.array([1]), labels[order]
    expected = average_precision_score(labels, -np.arange(65))
    assert metrics.mean_average_precision(*data, 65) == pytest.approx(expected, abs=1e-12)


def test_curve_matches_scikit_learn():
    """Each ball is a classifier that says 'relevant' inside."""
    data = random_data(q=1, n=200)
    ((distances, relevance),) = per_query(data)
    precision, recall = metrics.precision_recall_curve(*data)
    for radius in range(17):
        inside = np.array(distances) <= radius
        assert precision[radius] == pytest.approx(precision_score(relevance, inside, zero_division=0))
        assert recall[radius] == pytest.approx(recall_score(relevance, inside))


@pytest.mark.parametrize("width", [15, 16, 31, 32, 64])
def test_wide_codes_match_the_definition(width):
    """Around 127 and 255 bits, where integers must grow wider; each query's complement is in the database."""
    query, near, labels, near_labels = random_data(q=3, n=12, width=width)
    database = np.concatenate([near, ~query])
    data = query, database, labels, np.concatenate([near_labels, labels])
    assert metrics.mean_average_precision(*data, 15) == pytest.approx(reference_map(data, 15), abs=1e-12)
    precision, recall = metrics.precision_recall_curve(*data)
    expected = [reference_ball(data, radius)[:2] for radius in range(0, width * 8 + 1, 4)]
    np.testing.assert_allclose(np.stack([precision, recall], axis=1)[::4], expected, atol=1e-12)


@pytest.mark.parametrize("labels", ["classes", "sets"])
@pytest.mark.parametrize("host", [True, False])
def test_numpys_way_and_the_accelerators_way_match_the_definitions(monkeypatch, host, labels):
    monkeypatch.setattr(hamming, "is_host", lambda: host)
    for unused in ("nearest_jax", "histograms_jax") if host else ("nearest_numpy", "histograms_numpy"):
        monkeypatch.delattr(hamming, unused)
    data = random_data(q=7)
    if labels == "sets":
        data = (*data[:2], *(np.arange(3) == part[:, None] for part in data[2:]))
    report = metrics.evaluate(*data, 5)
    assert report["map"] == pytest.approx(reference_map(data, 5), abs=1e-12)
    assert report["precision_at_k"]["recall"][1] == pytest.approx(reference_recall(data, 5), abs=1e-12)
    for radius in (0, 3, 16):
        curve = report["precision_recall"]
        expected = reference_ball(data, radius)[:2]
        assert (curve["precision"][radius], curve["recall"][radius]) == pytest.approx(expected, abs=1e-12)


def test_figures_of_histograms_rank_nothing(monkeypatch):
    data = random_data()
    expected = metrics.tie_aware_map(*data, 30)
    monkeypatch.delattr(hamming, "nearest")
    assert metrics.tie_aware_map(*data, 30) == expected
    metrics.precision_within_radius(*data, 2)
    metrics.precision_recall_curve(*data)


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_the_number_of_threads_does_not_show_to_the_last_bit(monkeypatch, cores):
    data = random_data(q=50, n=300)
    expected = metrics.evaluate(*data, 30)
    monkeypatch.setattr(hamming, "MAX_QUERIES", 4)
    one_by_four = metrics.evaluate(*data, 30)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    assert metrics.evaluate(*data, 30) == one_by_four
    assert one_by_four["map"] == pytest.approx(expected["map"], abs=1e-12)


def test_block_boundaries_do_not_show(monkeypatch):
    data = random_data(q=11)
    monkeypatch.setattr(hamming, "MAX_QUERIES", 4)
    done: list[int] = []
    found = metrics.mean_average_precision(*data, 30, progress=done.append)
    assert found == pytest.approx(reference_map(data, 30), abs=1e-12)
    assert done == [4, 4, 3]


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64])
def test_multi_hot_labels_of_many_classes(dtype):
    """80 classes pack into two words; relevance must not depend on which of them holds the shared class."""
    labels = (np.random.default_rng(0).random((66, 80)) < 0.03).astype(dtype)
    codes = np.random.default_rng(1).integers(0, 256, (66, 1), dtype=np.uint8)
    data = codes[:6], codes[6:], labels[:6], labels[6:]
    assert metrics.mean_average_precision(*data, 20) == pytest.approx(reference_map(data, 20), abs=1e-12)


def test_many_classes_of_any_integer():
    """More than 256 classes, negative and large numbers."""
    labels = np.random.default_rng(0).integers(-(2**40), 2**40, 300)
    codes = np.random.default_rng(1).integers(0, 256, (600, 1), dtype=np.uint8)
    data = codes[:5], codes[5:], labels[:5], np.concatenate([labels, labels[:295]])
    assert metrics.mean_average_precision(*data, 400) == pytest.approx(reference_map(data, 400), abs=1e-12)


def test_nothing_relevant_is_zero_everywhere():
    codes = random_data()[:2]
    report = metrics.evaluate(*codes, np.zeros(6, int), np.ones(80, int), 80)
    assert report["map"] == report["map_tie_aware"] == report["precision_radius_2"] == 0
    assert not any(report["precision_at_k"]["precision"] + report["precision_at_k"]["recall"])
    assert not any(report["precision_recall"]["precision"] + report["precision_recall"]["recall"])


def test_everything_relevant_is_one():
    codes = random_data()[:2]
    report = metrics.evaluate(*codes, np.zeros(6, int), np.zeros(80, int), 80)
    assert report["map"] == pytest.approx(1)
    assert report["map_tie_aware"] == pytest.approx(1)
    assert report["precision_at_k"]["precision"] == [1, 1, 1]


def test_identical_codes_score_by_database_order_or_by_chance():
    """One tie group of 4 with 2 relevant, k = 2: the first two in order, or the mean of 6 placements."""
    codes = np.zeros((4, 2), np.uint8)
    data = codes[:1], codes, np.array([1]), np.array([0, 1, 0, 1])
    assert metrics.mean_average_precision(*data, 2) == pytest.approx(1 / 2)
    # Both first: 1 of 6, AP 1. First only: 2 of 6, AP 1. Second only: 2 of 6, AP ½. Neither: 1 of 6, AP 0.
    assert metrics.tie_aware_map(*data, 2) == pytest.approx((1 + 2 + 1) / 6)


def test_an_empty_ball_is_a_failed_lookup():
    codes = np.array([[0], [255]], np.uint8)
    database = np.array([[1], [3], [7]], np.uint8)
    data = codes, database, np.array([5, 5]), np.array([5, 6, 5])
    assert metrics.precision_within_radius(*data) == (0.25, 0.5)


def test_inputs_are_left_alone():
    data = random_data()
    copies = [array.copy() for array in data]
    for array in data:
        array.setflags(write=False)
    metrics.evaluate(*data, 10)
    for array, copy in zip(data, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


Q, D = np.zeros((2, 2), np.uint8), np.zeros((3, 2), np.uint8)
QL, DL = np.zeros(2, int), np.zeros(3, int)
HOT = np.zeros((3, 5), bool)
REFUSED = [
    ((Q, D.astype(float), QL, DL), "database_codes"),
    ((Q[:0], D, QL[:0], DL), "query_codes"),
    ((Q, D[:, :1], QL, DL), "query_codes"),
    ((Q, D, QL[:1], DL), "query_labels"),
    ((Q, D, QL, DL[:2]), "database_labels"),
    ((Q, D, QL, HOT), "query_labels"),
    ((Q, D, HOT[:2, :4], HOT), "query_labels"),
    ((Q, D, QL.astype(float), DL), "query_labels"),
    ((Q, D, QL.astype(bool), DL), "query_labels"),
    ((Q, D, QL, DL[:, None, None]), "database_labels"),
    ((Q, D, HOT[:2], HOT + 2), "database_labels"),
    ((Q, D, HOT[:2, :0], HOT[:, :0]), "query_labels"),
]
METRICS = [
    lambda *data: metrics.mean_average_precision(*data, 1),
    lambda *data: metrics.tie_aware_map(*data, 1),
    lambda *data: metrics.precision_at_k(*data, [1]),
    lambda *data: metrics.recall_at_k(*data, [1]),
    metrics.precision_within_radius,
    metrics.precision_recall_curve,
    lambda *data: metrics.evaluate(*data, 1),
]


def refused_field(metric, *arguments):
    with pytest.raises(UserError) as refused:
        metric(*arguments)
    return refused.value.field


@pytest.mark.parametrize(("data", "field"), REFUSED)
@pytest.mark.usefixtures("without_shape_checks")
def test_malformed_arguments_are_refused(data, field):
    for metric in METRICS:
        assert refused_field(metric, *data) == field


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_outside_the_database_is_refused(k):
    for metric in (metrics.mean_average_precision, metrics.tie_aware_map, metrics.evaluate, metrics.curves):
        assert refused_field(metric, Q, D, QL, DL, k) == "k"
    for metric in (metrics.precision_at_k, metrics.recall_at_k):
        assert refused_field(metric, Q, D, QL, DL, [1, k]) == "ks"


def test_no_ks_and_a_negative_radius_are_refused():
    assert refused_field(metrics.precision_at_k, Q, D, QL, DL, []) == "ks"
    assert refused_field(metrics.precision_within_radius, Q, D, QL, DL, -1) == "radius"


@pytest.mark.usefixtures("without_shape_checks")
def test_labels_and_codes_may_be_lists_or_jax_arrays():
    data = random_data()
    expected = metrics.mean_average_precision(*data, 3)
    codes, labels = data[:2], data[2:]
    assert metrics.mean_average_precision(*codes, *(part.tolist() for part in labels), 3) == expected
    assert metrics.mean_average_precision(*map(jnp.asarray, codes), *labels, 3) == expected


# Curves.


@given(tied_data(), st.data())
def test_curves_match_their_definitions(data, draw):
    k = draw.draw(st.integers(1, len(data[1])))
    found = metrics.curves(*data, k)
    assert found.k == sorted({k, *(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if s <= k)})
    for place, at in enumerate(found.k):
        assert found.map[place] == pytest.approx(reference_map(data, at), abs=1e-12)
        assert found.precision[place] == pytest.approx(reference_precision(data, at), abs=1e-12)
        assert found.recall[place] == pytest.approx(reference_recall(data, at), abs=1e-12)
    for radius, (precision, empty) in enumerate(zip(found.radius_precision, found.radius_empty, strict=True)):
        expected = reference_ball(data, radius)
        assert (precision, empty) == pytest.approx((expected[0], expected[2]), abs=1e-12)
    assert found.average_precision.mean() == pytest.approx(found.map[-1], abs=1e-12)


@given(tied_data())
def test_distances_of_pairs_are_counted_one_by_one(data):
    found = metrics.curves(*data, 1)
    bits = data[0].shape[1] * 8
    counts = np.zeros((2, bits + 1))
    answerable = []
    for query, label in zip(data[0], data[2], strict=True):
        distances = np.unpackbits(query ^ data[1], axis=1).sum(axis=1)
        relevant = (data[3] == label) if data[3].ndim == 1 else (data[3].astype(bool) & label.astype(bool)).any(axis=1)
        for distance, hit in zip(distances, relevant, strict=True):
            counts[int(hit), distance] += 1
        answerable.append(relevant.any())
    for mine, theirs in ((found.relevant, counts[1]), (found.irrelevant, counts[0])):
        np.testing.assert_allclose(mine, theirs / max(theirs.sum(), 1), atol=1e-12)
    assert found.answerable.tolist() == answerable


# Expected average precision.


@given(tied_data(largest=6), st.data())
def test_tie_aware_map_is_the_mean_over_all_orders(data, draw):
    """Every permutation of every tie group is ranked: k cuts groups anywhere."""
    k = draw.draw(st.integers(1, len(data[1])))
    expected = np.mean([enumerated_average_precision(d, r, k) for d, r in per_query(data)])
    assert metrics.tie_aware_map(*data, k) == pytest.approx(expected, abs=1e-12)
    assert metrics.evaluate(*data, k)["map_tie_aware"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sizes", [(7,), (1, 6), (3, 4), (2, 3, 2), (1, 1, 5)])
def test_expected_average_precision_of_every_small_histogram(sizes):
    """All relevant counts in each group, all k; 7 images have at most 5,040 orders."""
    for relevant in product(*(range(size + 1) for size in sizes)):
        groups = [[True] * r + [False] * (size - r) for size, r in zip(sizes, relevant, strict=True)]
        distances = [g for g, group in enumerate(groups) for _ in group]
        flat = [r for group in groups for r in group]
        for k in range(1, 8):
            # Orders of equal images rank alike: distinct orders stand for all, each equally often.
            orders = product(*(sorted(set(permutations(group))) for group in groups))
            expected = np.mean([average_precision([r for g in order for r in g], k) for order in orders])
            found = metrics.expected_average_precision(np.array([sizes]), np.array([relevant]), k)
            assert found == pytest.approx([expected], abs=1e-12), (distances, flat, k)


def test_expected_average_precision_matches_monte_carlo():
    """Groups far too large to enumerate, the fourth cut: within 5 standard errors of 4,000 orders."""
    counts, relevant, k = np.array([[3, 0, 40, 300, 60]]), np.array([[1, 0, 22, 30, 60]]), 150
    rng = np.random.default_rng(0)
    groups = [np.arange(n) < r for n, r in zip(counts[0], relevant[0], strict=True)]
    drawn = np.array([average_precision(np.concatenate([rng.permutation(g) for g in groups]), k) for _ in range(4000)])
    error = drawn.std() / np.sqrt(len(drawn))
    assert metrics.expected_average_precision(counts, relevant, k)[0] == pytest.approx(drawn.mean(), abs=5 * error)


@pytest.mark.parametrize(
    ("n", "r", "c"),
    [(50_000, 5_000, 1_000), (50_000, 49_999, 5_000), (9, 4, 9), (30, 0, 4), (1_000_000, 7, 500)],
)
def test_hypergeometric_matches_scipy(n, r, c):
    """Beside a query of wide support, so that the narrow ones are filled up."""
    m, probability = metrics.hypergeometric(np.array([n, 400]), np.array([r, 200]), np.array([c, 200]))
    np.testing.assert_allclose(probability[0], scipy.stats.hypergeom(n, r, c).pmf(m[0]), rtol=1e-6, atol=1e-13)
    assert probability.sum(axis=1) == pytest.approx([1, 1])


def test_without_ties_the_tie_aware_map_is_the_map():
    """A database of one code per distance: 0, 1, 3, 7, … differ from the query in 0, 1, 2, 3, … bits."""
    codes = np.packbits(np.tri(17, 16, -1, dtype=np.uint8), axis=1)
    relevance = np.random.default_rng(0).integers(0, 2, 17)
    for k in (1, 5, 17):
        expected = average_precision(relevance, k)
        data = codes[:1], codes, np.array([1]), relevance
        assert metrics.tie_aware_map(*data, k) == pytest.approx(expected, abs=1e-12)

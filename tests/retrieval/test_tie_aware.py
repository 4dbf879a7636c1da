from itertools import permutations, product

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from cib_jax.retrieval import metrics
from tests.retrieval.reference import (
    average_precision,
    enumerated_average_precision,
    per_query,
    tied_data,
)


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
    m, probability = metrics._hypergeometric(np.array([n, 400]), np.array([r, 200]), np.array([c, 200]))
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

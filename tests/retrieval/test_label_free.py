"""Scores without labels against plain loops and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from cib_jax.retrieval import code_quality
from tests.retrieval.reference import distance, enumerated_average_precision


@given(st.integers(0, 1000))
def test_neighbour_agreement_is_the_mean_over_all_orders_of_ties(seed):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(6, 3)) + 5
    packed = generator.integers(0, 16, (6, 1), np.uint8)
    centered = features - features.mean(axis=0)
    nearest = NearestNeighbors(n_neighbors=3, metric="cosine").fit(centered).kneighbors(centered)[1][:, 1:]
    expected = []
    for query in range(6):
        others = [at for at in range(6) if at != query]
        distances = [distance(packed[query], packed[at]) for at in others]
        expected.append(enumerated_average_precision(distances, [at in nearest[query] for at in others], 5))
    assert code_quality.neighbour_agreement(packed, features, neighbours=2) == pytest.approx(
        np.mean(expected), abs=1e-9
    )


@given(st.integers(0, 1000))
def test_view_agreement_is_the_expected_reciprocal_rank(seed):
    generator = np.random.default_rng(seed)
    one, other = (generator.integers(0, 8, (5, 1), np.uint8) for _ in range(2))
    expected = [
        enumerated_average_precision([distance(one[at], code) for code in other], [n == at for n in range(5)], 5)
        for at in range(5)
    ]
    assert code_quality.view_agreement(one, other) == pytest.approx(np.mean(expected), abs=1e-9)


@given(st.integers(0, 1000), st.integers(3, 12))
def test_separation_is_the_plain_loops(seed, n):
    packed = np.random.default_rng(seed).integers(0, 256, (n, 1), np.uint8)
    every = [[distance(a, b) for j, b in enumerate(packed) if j != i] for i, a in enumerate(packed)]
    count = max(1, round(0.3 * (n - 1)))
    nearest = np.mean([sorted(row)[:count] for row in every])
    deviation = np.std(every)
    expected = (np.mean(every) - nearest) / deviation if deviation else 0
    assert code_quality.separation(packed, share=0.3) == pytest.approx(expected, abs=1e-9)


def test_separation_rewards_groups_and_nothing_else():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 40)
    groups = generator.integers(0, 256, (10, 4), np.uint8)[labels]
    noisy = groups ^ (1 << generator.integers(0, 8, (400, 4))).astype(np.uint8)
    random = generator.integers(0, 256, (400, 4), np.uint8)
    assert code_quality.separation(noisy) > code_quality.separation(random) + 0.3
    assert code_quality.separation(np.zeros((50, 4), np.uint8)) == 0
    with pytest.raises(ValueError, match="at least 3 images"):
        code_quality.separation(np.zeros((2, 4), np.uint8))


def test_perfect_and_useless_codes():
    codes = np.arange(64, dtype=np.uint8)[:, None]
    assert code_quality.view_agreement(codes, codes) == 1
    same = np.zeros((64, 1), np.uint8)
    assert code_quality.view_agreement(same, same) == pytest.approx(np.mean(1 / np.arange(1, 65)))


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="more than 21 images is wanted"):
        code_quality.neighbour_agreement(np.zeros((20, 1), np.uint8), np.zeros((20, 4)))
    with pytest.raises(ValueError, match="two views of each image"):
        code_quality.view_agreement(np.zeros((3, 1), np.uint8), np.zeros((2, 1), np.uint8))

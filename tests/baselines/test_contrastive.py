"""The losses of baselines that learn from views against plain loops in NumPy and SciPy."""

import jax
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats

from cib_jax.baselines import contrastive
from cib_jax.errors import UserError


def test_each_view_predicts_the_bits_of_the_other():
    """The loss in float64: cross-entropies by SciPy's log of the sigmoid, and coding rates by determinants."""
    first, second = np.random.default_rng(10).normal(size=(2, 9, 6))
    expected = 0.0
    for logits, bits in ((first, second > 0), (second, first > 0)):
        chance = scipy.special.log_expit(np.where(bits, logits, -logits))
        rows = logits / np.linalg.norm(logits, axis=1, keepdims=True)
        rate = np.linalg.slogdet(np.eye(6) + 6 / (9 * 0.05) * rows.T @ rows).logabsdet / 2 * (6 + 9) / (6 * 9)
        expected += (-chance.mean() - 0.1 * rate) / 2
    assert float(jax.jit(contrastive.alignment_loss)(first, second)) == pytest.approx(expected, rel=1e-4)


def test_similarity_is_refined_pair_by_pair():
    """Signs and weights in float64, by SciPy's normal distribution."""
    generator = np.random.default_rng(12)
    rows, labels = generator.normal(size=(14, 3)), generator.integers(0, 3, size=14)
    distances = scipy.spatial.distance.cdist(rows, rows, "cosine")
    left, right = scipy.stats.norm(1.0, 0.4).cdf, scipy.stats.norm(1.0, 0.3).cdf
    signs, weights = np.zeros((2, 14, 14))
    for i in range(14):
        for j in range(14):
            d, one_cluster = distances[i, j], labels[i] == labels[j]
            signs[i, j] = 1 if d <= 0.8 else -1
            if d <= 0.8 and one_cluster:
                weights[i, j] = (left(0.8) - left(d)) / left(0.8)
            if d > 0.8 and not one_cluster:
                weights[i, j] = (right(d) - right(0.8)) / (1 - right(0.8))
    assert 14 < np.sum(weights > 0) < 150
    refine = jax.jit(contrastive.refined_similarity, static_argnums=(2, 3))
    found = refine(rows, labels, (1.0, 0.4, 0.3), 0.5)
    np.testing.assert_array_equal(found.signs, signs)
    np.testing.assert_allclose(found.weights, weights, atol=1e-5)


def test_codes_of_both_views_are_consistent_with_both_similarities():
    generator = np.random.default_rng(13)
    logits = generator.normal(size=(2, 6, 8))
    signs, weights = np.sign(generator.normal(size=(2, 6, 6))), generator.uniform(size=(2, 6, 6))
    expected, codes = 0.0, np.tanh(logits)
    for guide in range(2):
        for view in range(2):
            for i in range(6):
                for j in range(6):
                    error = signs[guide, i, j] - codes[view, i] @ codes[view, j] / 8
                    expected += weights[guide, i, j] * error**2 / 36
    both = np.concatenate(codes)
    similarities = (1 - scipy.spatial.distance.cdist(both, both, "cosine")) / 0.5
    for i in range(12):
        others = np.delete(similarities[i], i)
        expected += 0.3 * (scipy.special.logsumexp(others) - similarities[i, (i + 6) % 12]) / 12
    guidance = [contrastive.Guidance(*pair) for pair in zip(signs, weights, strict=True)]
    assert float(jax.jit(contrastive.consistency_loss)(*logits, guidance)) == pytest.approx(expected, rel=1e-4)


def test_spectral_clusters_are_those_of_separate_directions():
    labels = np.arange(60) % 3
    rows = np.eye(5)[labels] + 0.05 * np.random.default_rng(14).normal(size=(60, 5))
    found = contrastive.spectral_clusters(rows, 3, jax.random.key(0))
    assert len({*zip(labels.tolist(), found.tolist(), strict=True)}) == 3 == len({*found.tolist()})


def test_more_rows_than_spectral_clustering_can_take_are_refused():
    with pytest.raises(UserError) as refused:
        contrastive.spectral_clusters(np.zeros((20_000, 1), np.float32), 3, jax.random.key(0))
    assert refused.value.field == "features"

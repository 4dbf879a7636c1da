"""Anchor graph hashing against SciPy's eigenvectors of the whole graph, which the anchors are there to avoid."""

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance

from cib_jax.baselines import anchor_graph


@pytest.fixture(scope="module")
def features():
    generator = np.random.default_rng(5)
    return (generator.normal(size=(240, 6)) + 20 * generator.integers(0, 2, size=(240, 6))).astype(np.float32) / 10


def graph_of(features, **options):
    return anchor_graph.fit(features, 8, jax.random.key(0), anchors=30, nearest=3, **options)


def whole_graph(graph, features):
    """The n × n affinity Z Λ⁻¹ Zᵀ, from distances by SciPy."""
    anchors = np.asarray(graph.anchors, np.float64) + np.asarray(graph.mean, np.float64)
    squared = scipy.spatial.distance.cdist(features.astype(np.float64), anchors, "sqeuclidean")
    Z = np.zeros_like(squared)
    for row, distances in zip(Z, squared, strict=True):
        nearest = np.argsort(distances)[:3]
        row[nearest] = np.exp(-distances[nearest] / float(graph.bandwidth))
    Z /= Z.sum(axis=1, keepdims=True)
    return Z, (Z / Z.sum(axis=0)) @ Z.T


def test_one_layer_gives_the_whole_graphs_eigenvectors(features):
    graph = graph_of(features, layers=1)
    Z, affinity = whole_graph(graph, features)
    np.testing.assert_allclose(np.asarray(graph.weights(features)), Z, atol=1e-4)
    values, vectors = scipy.linalg.eigh(affinity)
    mine = np.asarray(graph(features))
    assert mine.shape == (240, 8)
    for number in range(8):
        theirs = vectors[:, -2 - number]
        gap = np.abs(np.diff(values)[[-2 - number, -3 - number]]).min()
        cosine = abs(theirs @ mine[:, number]) / np.linalg.norm(mine[:, number])
        assert cosine == pytest.approx(1, abs=1e-3 if gap > 1e-3 else 1)
        # Scaled so that each function has mean square 1.
        assert np.linalg.norm(mine[:, number]) ** 2 == pytest.approx(240, rel=1e-3)


def test_the_second_layer_cuts_where_the_graph_is_cut_least(features):
    """Against a search over all thresholds that keep the cut balanced."""
    graph = graph_of(features, layers=2)
    _, affinity = whole_graph(graph, features)
    laplacian = np.eye(240) - affinity
    heights = np.asarray(graph.functions(features), np.float64)
    assert np.asarray(graph(features)).shape == (240, 8)
    for height, (above, below) in zip(heights.T, np.asarray(graph.thresholds, np.float64).T, strict=True):
        positive = height > 0

        def cut(at_above, at_below, height=height, positive=positive):
            z = np.where(positive, height - at_above, at_below - height)
            return z @ laplacian @ z

        total = np.abs(height).sum()
        tries = np.linspace(0, np.abs(height).max(), 400)
        balanced = (tries * positive.sum() - total) / (~positive).sum()
        least = min(cut(a, b) for a, b in zip(tries, balanced, strict=True))
        assert cut(above, below) <= least + 1e-2 * abs(least)
        z = np.where(positive, height - above, below - height)
        assert abs(z.sum()) < 1e-2 * total


def test_a_graph_in_pieces_loses_its_constant_and_nothing_else():
    """Three clusters far apart: 1 is an eigenvalue three times, and two functions tell the clusters apart."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    points = (1e3 * np.eye(3)[labels] + generator.normal(size=(120, 3))).astype(np.float32)
    graph = anchor_graph.fit(points, 2, jax.random.key(0), anchors=12, layers=1)
    heights = np.asarray(graph(points), np.float64)
    np.testing.assert_allclose(heights.mean(axis=0), 0, atol=1e-3)
    for name in range(3):  # constant on each piece
        assert np.ptp(heights[labels == name], axis=0).max() < 1e-2
    assert np.linalg.matrix_rank(np.stack([heights[labels == name].mean(axis=0) for name in range(3)]), tol=0.1) == 2


def test_bits_beyond_what_the_graph_gives_are_refused(features):
    with pytest.raises(ValueError, match="bits: 64 is more than 58"):
        anchor_graph.fit(features, 64, jax.random.key(0), anchors=30)
    with pytest.raises(ValueError, match="do not go with 7 bits"):
        anchor_graph.fit(features, 7, jax.random.key(0), anchors=30)

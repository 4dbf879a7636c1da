"""Spectral, anchor graph and spherical hashing against closed forms, SciPy and plain loops of the papers."""

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.csgraph
import scipy.spatial.distance
import sklearn.decomposition

import cib_jax as cib
from cib_jax.baselines import anchor_graph, nonlinear, spectral, spherical
from cib_jax.errors import Refusal


def clusters(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Five separate groups of 60 points, 24 features, and their labels."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(5), 60)
    features = 3 * generator.normal(size=(5, 24))[labels] + generator.normal(size=(300, 24)) + 5
    return features.astype(np.float32), labels


# Spectral hashing


def published_waves(extent, bits):
    """The modes as the paper's code lists them: axis by axis up to a highest mode, sorted by squared frequency."""
    highest = np.ceil((bits + 1) * extent / extent.max()).astype(int)
    modes = [(axis, k) for axis in range(len(extent)) for k in range(1, highest[axis])]
    return sorted(modes, key=lambda mode: (np.pi * mode[1] / extent[mode[0]]) ** 2)[:bits]


def chosen_waves(extent, bits):
    return list(
        zip(*(part.tolist() for part in nonlinear.lowest_waves(np.asarray(extent, np.float64), bits)), strict=True)
    )


def test_on_a_box_of_3_by_1_waves_go_along_the_longer_side_first():
    # Frequencies k/3 and k/1.01: 0.33 0.67 0.99 1 1.33.
    assert chosen_waves([3.0, 1.01], 5) == [(0, 1), (0, 2), (1, 1), (0, 3), (0, 4)]


@pytest.mark.parametrize("seed", range(20))
def test_waves_are_those_of_the_published_list(seed):
    generator = np.random.default_rng(seed)
    extent = np.sort(generator.uniform(0.1, 3, generator.integers(1, 7)))[::-1]
    bits = int(generator.integers(1, 21))
    assert chosen_waves(extent, bits) == published_waves(extent, bits)


@pytest.mark.parametrize("noise", [0, 1e-13, -1e-13])
def test_of_waves_of_equal_frequency_the_first_axis_counts(noise):
    expected = [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2)]
    assert chosen_waves(2 + noise * np.array([-1, 0, 1.0]), 5) == expected
    # 3/3 of the first axis and 1/1 of the second; an axis without extent has no waves.
    assert chosen_waves([3, 1 + noise, 0], 4) == [(0, 1), (0, 2), (0, 3), (1, 1)]


def test_logits_are_cosines_along_scikit_learns_axes():
    generator = np.random.default_rng(2)
    features = (generator.uniform(-1, 1, size=(500, 5)) * [8, 4, 2, 1, 0.5] + 3).astype(np.float32)
    logits = np.asarray(spectral.fit(features, 8, jax.random.key(0))(features))
    along = sklearn.decomposition.PCA(5).fit_transform(features.astype(np.float64))
    low, extent = along.min(axis=0), np.ptp(along, axis=0)
    for bit, (axis, k) in enumerate(published_waves(extent, 8)):
        wave = np.cos(k * np.pi * (along[:, axis] - low[axis]) / extent[axis])
        # The axis may be flipped there: cos(kπ(1 − x)) = ±cos(kπx).
        np.testing.assert_allclose(np.abs(logits[:, bit]), np.abs(wave), atol=1e-4)


def test_flat_axes_carry_no_wave_and_equal_rows_are_refused():
    flat = np.zeros((50, 4), np.float32)
    flat[:, 0] = np.arange(50)
    logits = np.asarray(spectral.fit(flat, 8, jax.random.key(0))(flat))
    assert np.isfinite(logits).all() and len(np.unique(logits > 0, axis=0)) > 8
    with pytest.raises(Refusal, match=r"^features"):
        spectral.fit(np.full((50, 4), 0.1, np.float32), 8, jax.random.key(0))


# Anchor graph hashing


@pytest.fixture(scope="module")
def features():
    generator = np.random.default_rng(5)
    return (generator.normal(size=(240, 6)) + 20 * generator.integers(0, 2, size=(240, 6))).astype(np.float32) / 10


@pytest.fixture(scope="module")
def graph(features):
    """A graph of two layers; its functions are those of one layer."""
    return anchor_graph.fit(features, 16, jax.random.key(0), anchors=30, nearest=3)


@pytest.fixture(scope="module")
def whole_graph(graph, features):
    """Z and the n × n affinity Z Λ⁻¹ Zᵀ, from distances by SciPy."""
    anchors = np.asarray(graph.anchors, np.float64) + np.asarray(graph.mean, np.float64)
    squared = scipy.spatial.distance.cdist(features.astype(np.float64), anchors, "sqeuclidean")
    Z = np.zeros_like(squared)
    for row, distances in zip(Z, squared, strict=True):
        nearest = np.argsort(distances)[:3]
        row[nearest] = np.exp(-distances[nearest] / float(graph.bandwidth))
    Z /= Z.sum(axis=1, keepdims=True)
    return Z, (Z / Z.sum(axis=0)) @ Z.T


def test_functions_are_the_whole_graphs_eigenvectors(features, graph, whole_graph):
    Z, affinity = whole_graph
    np.testing.assert_allclose(np.asarray(graph.weights(features)), Z, atol=1e-4)
    values, vectors = scipy.linalg.eigh(affinity)
    assert np.diff(values)[-10:].min() > 1e-3  # none is multiple, so that each can be compared
    mine = np.asarray(graph.functions(features))
    assert mine.shape == (240, 8)
    cosines = np.sum(mine * vectors[:, -2:-10:-1], axis=0) / np.linalg.norm(mine, axis=0)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-3)
    # Scaled so that each function has mean square 1.
    np.testing.assert_allclose(np.square(mine).mean(axis=0), 1, rtol=1e-3)


def test_one_layer_gives_the_functions_and_two_add_a_bit_for_each(features, graph):
    one = np.asarray(anchor_graph.fit(features, 8, jax.random.key(0), anchors=30, nearest=3, layers=1)(features))
    np.testing.assert_allclose(one, graph.functions(features), atol=1e-3)
    two = np.asarray(graph(features))
    assert two.shape == (240, 16)
    np.testing.assert_array_equal(two[:, :8] > 0, one > 0)


def test_the_second_layer_cuts_where_the_graph_is_cut_least(features, graph, whole_graph):
    """Against a search over all thresholds that keep the cut balanced."""
    _, affinity = whole_graph
    laplacian = np.eye(240) - affinity
    heights = np.asarray(graph.functions(features), np.float64)
    second = np.asarray(graph(features))[:, 8:]
    for height, bit, (above, below) in zip(heights.T, second.T, np.asarray(graph.thresholds).T, strict=True):
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
        clear = np.abs(height) > 1e-3  # on which side a point is does not depend on rounding errors
        np.testing.assert_allclose(bit[clear], z[clear], atol=1e-3)


def test_of_a_graph_in_pieces_the_first_functions_are_kernel_components_of_the_pieces():
    """All functions that are constant on pieces have eigenvalue 1; among them, kernel PCA by SciPy decides."""
    points = clusters(6)[0].astype(np.float64)
    graph = anchor_graph.fit(points, 16, jax.random.key(0), anchors=100)
    Z = np.asarray(graph.weights(points), np.float64)
    count, piece_of = scipy.sparse.csgraph.connected_components(Z.T @ Z > 0)
    assert count == 5
    share = Z.sum(axis=0) / len(Z)
    anchors = np.asarray(graph.anchors, np.float64)
    squared = scipy.spatial.distance.cdist(anchors, anchors, "sqeuclidean")
    kernel = share[:, None] * np.exp(-squared / (share @ squared @ share)) * share
    pieces = np.eye(count)[piece_of]
    sizes = share @ pieces
    centering = np.eye(count) - sizes
    components = scipy.linalg.eigh(centering.T @ pieces.T @ kernel @ pieces @ centering, np.diag(sizes))[1][:, :0:-1]
    heights = np.asarray(graph.functions(points), np.float64)
    found = np.stack([heights[Z[:, piece_of == number].sum(axis=1) > 0.5].mean(axis=0) for number in range(count)])
    np.testing.assert_allclose(np.abs(found[:, :4]), np.abs(components), atol=1e-3)
    for number in range(count):
        assert np.ptp(heights[Z[:, piece_of == number].sum(axis=1) > 0.5, :4], axis=0).max() < 1e-3
    # The others differ within pieces; a function's rounding errors on other pieces do not count as positive.
    logits = np.asarray(graph(points))
    np.testing.assert_array_equal(logits[:, :8][np.abs(heights) < 1e-6] > 0, False)


@pytest.mark.parametrize("anchors", [40, 300])
@pytest.mark.parametrize("seed", range(3))
def test_anchor_graph_codes_keep_separate_clusters_together(seed, anchors):
    """With as many anchors as points, the graph has some 40 pieces, and the eigenvalue 1 as many functions."""
    features, labels = clusters(seed)
    codes = np.asarray(cib.pack_bits(anchor_graph.fit(features, 16, jax.random.key(seed), anchors=anchors)(features)))
    assert cib.mean_average_precision(codes, codes, labels, labels, k=60) > 0.9


def test_anchor_functions_do_not_depend_on_rounding_errors():
    """Noise in the weights, and another order of anchors, change every eigenvector that a solver finds for 1."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(24, 3))
    weights = np.zeros((96, 24))
    for row, anchor in enumerate(np.repeat(np.arange(24), 4)):  # pieces of two anchors each
        weights[row, [anchor, anchor ^ 1]] = generator.dirichlet([5, 1])
    found = nonlinear.anchor_functions(weights, centers, 20)
    noisy = weights + 1e-13 * generator.normal(size=weights.shape)
    np.testing.assert_allclose(nonlinear.anchor_functions(noisy, centers, 20), found, atol=1e-6)
    order = generator.permutation(24)
    np.testing.assert_allclose(
        nonlinear.anchor_functions(weights[:, order], centers[order], 20), found[order], atol=1e-6
    )


def test_bits_beyond_what_the_graph_gives_are_refused(features):
    key = jax.random.key(0)
    with pytest.raises(Refusal, match=r"^bits .*58"):
        anchor_graph.fit(features, 64, key, anchors=30)
    with pytest.raises(Refusal, match=r"^layers .*7"):
        anchor_graph.fit(features, 7, key, anchors=30)
    with pytest.raises(Refusal, match=r"^nearest .*31"):
        anchor_graph.fit(features, 8, key, anchors=30, nearest=31)
    with pytest.raises(Refusal, match=r"^features .*9"):
        nonlinear.anchor_functions(np.full((40, 10), 0.1), np.eye(10), 9)


# Spherical hashing


@pytest.fixture(scope="module")
def ball():
    return (np.random.default_rng(4).normal(size=(2000, 20)) + 100).astype(np.float32)


@pytest.fixture(scope="module")
def spheres(ball):
    return spherical.fit(ball, 16, jax.random.key(0))


def test_each_sphere_contains_half_and_two_share_a_quarter(ball, spheres):
    inside = np.asarray(spheres(ball)) > 0
    assert np.abs(inside.mean(axis=0) - 0.5).max() < 0.002
    shared = (inside.T.astype(float) @ inside / len(inside))[np.triu_indices(16, 1)]
    assert np.abs(shared - 0.25).mean() <= 0.1 * 0.25
    assert shared.std() <= 0.15 * 0.25


def test_logits_are_squared_radius_minus_squared_distance(ball, spheres):
    centers = np.asarray(spheres.pivots, np.float64) + np.asarray(spheres.mean, np.float64)
    distances = scipy.spatial.distance.cdist(ball.astype(np.float64), centers, "sqeuclidean")
    expected = np.asarray(spheres.squared_radii) - distances
    np.testing.assert_allclose(np.asarray(spheres(ball)), expected, atol=0.05)


def test_pivots_move_as_in_a_plain_loop(ball):
    """One step of algorithm 1 with distances by SciPy, from the points that no step leaves."""
    start, moved = (spherical.fit(ball, 4, jax.random.key(0), iterations=number) for number in (0, 1))
    pivots = np.asarray(start.pivots, np.float64)
    points = ball - ball.mean(axis=0, dtype=np.float64)
    distances = scipy.spatial.distance.cdist(points, pivots, "sqeuclidean")
    inside = distances < np.median(distances, axis=0)
    expected = pivots.copy()
    for i in range(4):
        for j in range(4):
            shared = np.sum(inside[:, i] & inside[:, j])
            if i != j:
                expected[i] += (shared - 500) / 500 / 2 * (pivots[i] - pivots[j]) / 4
    np.testing.assert_allclose(np.asarray(moved.pivots), expected, atol=1e-4)
    assert np.abs(expected - pivots).max() > 0.01


def test_one_sphere_contains_half(ball):
    for points in (ball, ball[:75]):
        inside = np.asarray(spherical.fit(points, 1, jax.random.key(0))(points)) > 0
        assert inside.sum() == len(points) // 2


def test_more_spheres_than_items_are_refused():
    with pytest.raises(Refusal, match=r"^bits .*8"):
        spherical.fit(np.eye(8, dtype=np.float32), 16, jax.random.key(0))

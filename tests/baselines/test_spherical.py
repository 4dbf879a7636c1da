"""Spherical hashing: what the paper asks of the spheres, counted by hand."""

import jax
import numpy as np
import pytest
import scipy.spatial.distance

from cib_jax.baselines import spherical


@pytest.fixture(scope="module")
def features():
    return (np.random.default_rng(4).normal(size=(2000, 20)) + 100).astype(np.float32)


@pytest.fixture(scope="module")
def spheres(features):
    return spherical.fit(features, 16, jax.random.key(0))


def test_each_sphere_holds_half_and_two_share_a_quarter(features, spheres):
    inside = np.asarray(spheres(features)) > 0
    assert np.abs(inside.mean(axis=0) - 0.5).max() < 0.002
    shared = (inside.T.astype(float) @ inside / len(inside))[np.triu_indices(16, 1)]
    assert np.abs(shared - 0.25).mean() <= 0.1 * 0.25
    assert shared.std() <= 0.15 * 0.25


def test_logits_are_squared_radius_minus_squared_distance(features, spheres):
    centres = np.asarray(spheres.pivots, np.float64) + np.asarray(spheres.mean, np.float64)
    distances = scipy.spatial.distance.cdist(features.astype(np.float64), centres, "sqeuclidean")
    expected = np.asarray(spheres.squared_radii) - distances
    np.testing.assert_allclose(np.asarray(spheres(features)), expected, atol=0.05)


def test_one_sphere_has_no_other_to_push_it(features):
    inside = np.asarray(spherical.fit(features, 1, jax.random.key(0))(features)) > 0
    assert inside.mean() == pytest.approx(0.5, abs=0.002)


def test_more_spheres_than_items_are_refused():
    with pytest.raises(ValueError, match="number of training items"):
        spherical.fit(np.eye(8, dtype=np.float32), 16, jax.random.key(0))

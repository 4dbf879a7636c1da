"""Promises of all baselines: reproducible bits that rounding errors do not change, similar codes within clusters."""

import functools

import jax
import numpy as np
import pytest

import cib_jax as cib
from cib_jax.baselines import BASELINES
from cib_jax.errors import Refusal

TRAINED = {name: {"epochs": 20} for name in ("greedy_hash", "bi_half", "ssdh", "sdc", "crovca")} | {
    "autoencoder": {"epochs": 20, "hidden": 64},
    "cimon": {"epochs": 20, "hidden": 64, "clusters": 5},
    "oh": {"epochs": 20, "hidden": 64, "wide": 32},
}
DECOMPOSED = ["pca_sign", "itq", "spectral", "anchor_graph"]


def fit(name, features, bits=16):
    """The encoder of a baseline; where it takes views, these are alike."""
    if BASELINES[name].views:
        features = np.repeat(features[None], 3, axis=0)
    return BASELINES[name].fit(features, bits, jax.random.key(0), **TRAINED.get(name, {}))


def codes(name, features, bits=16):
    return np.asarray(fit(name, features, bits)(features)) > 0


@functools.cache
def clusters():
    """Five groups of 60 points, 24 features."""
    generator = np.random.default_rng(6)
    labels = np.repeat(np.arange(5), 60)
    features = 3 * generator.normal(size=(5, 24))[labels] + generator.normal(size=(300, 24)) + 5
    return features.astype(np.float32), labels


@functools.cache
def cube():
    """All corners of a cube of 8 dimensions. Every direction is a principal axis, and many distances are equal."""
    return np.indices((2,) * 8).reshape(8, -1).T.astype(np.float64)


@functools.cache
def fitted(name):
    return fit(name, clusters()[0])


@pytest.mark.parametrize("name", BASELINES)
def test_codes_keep_clusters_together(name):
    features, labels = clusters()
    packed = np.asarray(cib.pack_bits(fitted(name)(features)))
    found = cib.mean_average_precision(packed, packed, labels, labels, k=60)
    assert found > 0.6  # chance gives 0.2


@pytest.mark.parametrize("name", BASELINES)
def test_the_same_key_gives_the_same_bits_and_jit_takes_the_encoder(name):
    features, _ = clusters()
    expected = np.asarray(fitted(name)(features))
    np.testing.assert_array_equal(expected, np.asarray(fit(name, features)(features)))
    jitted = jax.jit(lambda encoder, rows: encoder(rows))(fitted(name), features)
    np.testing.assert_allclose(np.asarray(jitted), expected, atol=1e-2)
    assert expected.shape == (300, 16) and np.isfinite(expected).all()


@pytest.mark.parametrize(
    ("name", "data"),
    # The anchor graph of the cube is not unique: every corner has 8 nearest neighbors.
    [(name, clusters) for name in [*DECOMPOSED, "spherical"]]
    + [(name, cube) for name in ("pca_sign", "itq", "spectral", "spherical")],
)
def test_rounding_errors_do_not_change_codes(name, data):
    """Noise of this size changes the eigenvectors that a solver finds for a multiple eigenvalue completely."""
    features, bits = (cube(), 8) if data is cube else (clusters()[0].astype(np.float64), 16)
    noise = 1e-13 * np.random.default_rng(0).normal(size=features.shape)
    np.testing.assert_array_equal(codes(name, features + noise, bits), codes(name, features, bits))


@pytest.mark.parametrize("name", DECOMPOSED)
def test_the_order_of_rows_and_features_does_not_change_codes(name):
    features, _ = clusters()
    expected = np.asarray(fitted(name)(features)) > 0
    generator = np.random.default_rng(0)
    rows, columns = generator.permutation(300), generator.permutation(24)
    np.testing.assert_array_equal(codes(name, features[rows]), expected[rows])
    np.testing.assert_array_equal(codes(name, features[:, columns]), expected)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.usefixtures("without_shape_checks")
def test_malformed_features_are_refused(name):
    with pytest.raises(Refusal, match=r"^features"):
        fit(name, np.zeros((3, 2, 2), np.float32))
    with pytest.raises(Refusal, match=r"^features"):
        fit(name, np.full((40, 30), np.nan, np.float32))
    for features in (np.eye(40, 30) * 1e39, np.eye(40, 30).astype(">f8"), np.eye(40, 30).astype(np.longdouble)):
        with pytest.raises(Refusal, match=r"^features"):
            fit(name, features)


@pytest.mark.parametrize("name", [name for name, baseline in BASELINES.items() if baseline.views])
def test_one_view_is_refused_where_pairs_are_learned(name):
    with pytest.raises(Refusal, match=r"^features .* at least 2 views.*\[1, 300, 24\]"):
        BASELINES[name].fit(clusters()[0][None], 16, jax.random.key(0))

"""What all baselines promise: same key, same bits; codes that keep clusters together; refusals in one sentence."""

import jax
import numpy as np
import pytest

import cib_jax as cib
from cib_jax.baselines import BASELINES

TRAINED = {name: {"epochs": 20} for name in ("greedy_hash", "bi_half")} | {"autoencoder": {"epochs": 20, "hidden": 64}}


@pytest.fixture(scope="module")
def clusters():
    """Five groups of 60 points, 24 features."""
    generator = np.random.default_rng(6)
    labels = np.repeat(np.arange(5), 60)
    features = 3 * generator.normal(size=(5, 24))[labels] + generator.normal(size=(300, 24)) + 5
    return features.astype(np.float32), labels


def fitted(name, features, seed=0, bits=16):
    return BASELINES[name].fit(features, bits, jax.random.key(seed), **TRAINED.get(name, {}))


@pytest.mark.parametrize("name", BASELINES)
def test_codes_keep_clusters_together(name, clusters):
    features, labels = clusters
    packed = np.asarray(cib.pack_bits(fitted(name, features)(features)))
    found = cib.mean_average_precision(packed, packed, labels, labels, k=60)
    assert found > 0.6  # chance gives 0.2


@pytest.mark.parametrize("name", BASELINES)
def test_the_same_key_gives_the_same_bits_and_jit_takes_the_encoder(name, clusters):
    features, _ = clusters
    one, other = fitted(name, features), fitted(name, features)
    expected = np.asarray(one(features))
    np.testing.assert_array_equal(expected, np.asarray(other(features)))
    jitted = jax.jit(lambda encoder, rows: encoder(rows))(one, features)
    np.testing.assert_allclose(np.asarray(jitted), expected, atol=1e-2)
    assert expected.shape == (300, 16) and np.isfinite(expected).all()


@pytest.mark.parametrize("name", BASELINES)
def test_malformed_features_are_refused(name):
    with pytest.raises(ValueError, match="wanted \\[n, features\\]"):
        fitted(name, np.zeros((3, 2, 2), np.float32))
    with pytest.raises(ValueError, match="not finite"):
        fitted(name, np.full((40, 30), np.nan, np.float32))

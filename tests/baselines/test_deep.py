"""The losses and binary layers of trained baselines against plain loops, NumPy and SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.spatial.distance
import scipy.special

from cib_jax.baselines import deep


def test_cosine_loss_is_that_of_scipys_cosines():
    generator = np.random.default_rng(0)
    codes, features = generator.normal(size=(10, 8)), generator.normal(size=(10, 5))
    expected = np.mean(
        [
            (
                scipy.spatial.distance.cosine(codes[i], codes[i + 5])
                - scipy.spatial.distance.cosine(features[i], features[i + 5])
            )
            ** 2
            for i in range(5)
        ]
    )
    assert float(jax.jit(deep.cosine_loss)(codes, features)) == pytest.approx(expected, rel=1e-5)


def test_greedy_signs_pass_the_gradient_unchanged():
    logits = jnp.array([[0.5, -2.0, 0.0]])
    codes, back = jax.vjp(deep.greedy_sign, logits)
    np.testing.assert_allclose(codes, [[1, -1, -1]])
    gradient = jnp.array([[0.1, 0.2, 0.3]])
    np.testing.assert_array_equal(back(gradient)[0], gradient)


def test_greedy_hash_also_draws_logits_to_one():
    """The published loss: cosines of signs, plus a tenth of the mean cube of ||h| − 1|."""
    generator = np.random.default_rng(5)
    logits, features = generator.normal(size=(6, 8)), generator.normal(size=(6, 5))
    expected = float(jax.jit(deep.cosine_loss)(np.sign(logits), features))
    expected += 0.1 * sum(abs(abs(h) - 1) ** 3 for h in logits.ravel()) / logits.size
    assert float(jax.jit(deep.greedy_loss)(logits, features)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch", [2, 3, 8, 9])
def test_bi_half_codes_are_the_nearest_balanced_ones(batch):
    """Optimal transport by SciPy: each bit assigns its logits to ⌊n/2⌋ places of +1 and the rest of −1."""
    bits = 40
    logits = np.random.default_rng(batch).normal(size=(batch, bits))
    codes = np.asarray(jax.jit(deep.balanced_sign)(logits, 6.0))
    places = np.where(np.arange(batch) < batch // 2, 1.0, -1.0)
    for bit in range(bits):
        rows, columns = scipy.optimize.linear_sum_assignment((logits[:, bit, None] - places) ** 2)
        np.testing.assert_array_equal(codes[rows, bit], places[columns])


def test_bi_half_draws_logits_to_their_codes():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(6, 4)), jnp.float32)

    @jax.jit
    def codes_and_gradient(logits):
        codes, back = jax.vjp(lambda x: deep.balanced_sign(x, 6.0), logits)
        return codes, back(jnp.ones_like(codes))[0]

    codes, gradient = codes_and_gradient(logits)
    np.testing.assert_allclose(gradient, 1 + 6.0 * (logits - codes) / 24, rtol=1e-6)


def test_bi_half_balances_ties():
    assert np.asarray(jax.jit(deep.balanced_sign)(jnp.zeros((6, 3)), 6.0)).sum() == 0


def test_the_limits_of_distances_are_those_of_two_half_gaussians():
    """Left and right of a peak at 0.8, with deviations of 0.05 and 0.1."""
    drawn = np.abs(np.random.default_rng(7).normal(size=200_000))
    distances = 0.8 + np.where(np.arange(200_000) % 3 == 0, -0.05, 0.1) * drawn
    near, far = deep.distance_limits(distances, 2.0)
    assert near == pytest.approx(0.8 - 2 * 0.05, abs=0.02)
    assert far == pytest.approx(0.8 + 2 * 0.1, abs=0.02)


def test_only_clearly_similar_or_dissimilar_pairs_count():
    generator = np.random.default_rng(8)
    logits, features = generator.normal(size=(12, 8)), generator.normal(size=(12, 3))
    distances = scipy.spatial.distance.cdist(features, features, "cosine")
    errors = []
    for i in range(12):
        for j in range(12):
            if distances[i, j] < 0.4 or distances[i, j] > 1.5:
                wanted = 1 if distances[i, j] < 0.4 else -1
                errors.append((wanted - np.tanh(logits[i]) @ np.tanh(logits[j]) / 8) ** 2)
    assert 12 < len(errors) < 144
    found = jax.jit(functools.partial(deep.structure_loss, near=0.4, far=1.5))(logits, features)
    assert float(found) == pytest.approx(np.mean(errors), rel=1e-4)


def test_nothing_is_learned_where_no_pair_is_clear():
    logits = jnp.ones((4, 8))
    value, gradient = jax.value_and_grad(deep.structure_loss)(logits, jnp.eye(4), near=-1.0, far=3.0)
    assert value == 0 and not gradient.any()


def test_cosines_are_calibrated_by_their_ranks():
    """The quantiles of Beta(2, 2) by bisection of its distribution function, 3x² − 2x³."""
    generator = np.random.default_rng(9)
    logits, features = generator.normal(size=(14, 8)), generator.normal(size=(14, 5))
    cosines = [1 - scipy.spatial.distance.cosine(features[i], features[i + 7]) for i in range(7)]
    expected = 0.0
    for rank, i in enumerate(np.argsort(cosines)):
        share = (rank + 0.5) / 7
        quantile = scipy.optimize.bisect(lambda x, share=share: 3 * x**2 - 2 * x**3 - share, 0, 1)
        found = 1 - scipy.spatial.distance.cosine(logits[i], logits[i + 7])
        expected += abs(found - max(2 * quantile - 1, 0)) / 7
    assert float(jax.jit(deep.calibration_loss)(logits, features)) == pytest.approx(expected, rel=1e-5)

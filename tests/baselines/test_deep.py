"""The losses and binary layers of GreedyHash, Bi-half and the auto-encoder against plain loops and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.spatial.distance

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


def test_reconstruction_loss_is_a_plain_loops():
    generator = np.random.default_rng(1)
    shapes = {"encode 1": (3, 5), "encode 2": (5, 8), "decode 1": (8, 5), "decode 2": (5, 3)}
    params = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    params |= {f"{name} bias": generator.normal(size=shape[1]) for name, shape in shapes.items()}
    # So far from 0 that no bit is left to chance.
    params["encode 2"] *= 1e4
    rows = generator.normal(size=(4, 3))
    middle = np.maximum(rows @ params["encode 1"] + params["encode 1 bias"], 0)
    codes = np.sign(middle @ params["encode 2"] + params["encode 2 bias"])
    middle = np.maximum(codes @ params["decode 1"] + params["decode 1 bias"], 0)
    expected = np.mean((middle @ params["decode 2"] + params["decode 2 bias"] - rows) ** 2)
    found = jax.jit(deep.reconstruction_loss)(params, rows, jax.random.key(0))
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_descent_finds_the_least_squares_solution():
    generator = np.random.default_rng(2)
    data = generator.normal(size=(64, 4)).astype(np.float32)
    targets = data[:, :3] @ np.array([1.0, -2.0, 0.5], np.float32) + 0.1 * data[:, 3]

    def loss(params, rows, key):
        return jnp.mean(jnp.square(rows[:, :3] @ params - rows[:, 3]))

    rows = np.concatenate([data[:, :3], targets[:, None]], axis=1)
    schedule = deep.Schedule(epochs=300, batch_size=64, learning_rate=0.03)
    found = deep.minimize(jnp.zeros(3), loss, jnp.asarray(rows), jax.random.key(0), schedule)
    np.testing.assert_allclose(found, np.linalg.lstsq(rows[:, :3], rows[:, 3], rcond=None)[0], atol=1e-3)


def test_descent_takes_fewer_rows_than_a_batch():
    found = deep.minimize(
        jnp.ones(2),
        lambda p, rows, key: jnp.sum(p**2),
        jnp.ones((3, 2)),
        jax.random.key(0),
        deep.Schedule(epochs=50, batch_size=64, learning_rate=0.05),
    )
    assert np.abs(found).max() < 0.2

"""The optimization and the normalization of trained baselines against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cib_jax.baselines import contrastive, deep, networks


def test_descent_finds_the_least_squares_solution():
    generator = np.random.default_rng(2)
    data = generator.normal(size=(64, 4)).astype(np.float32)
    targets = data[:, :3] @ np.array([1.0, -2.0, 0.5], np.float32) + 0.1 * data[:, 3]

    def loss(params, rows, key):
        return jnp.mean(jnp.square(rows[:, :3] @ params - rows[:, 3]))

    rows = np.concatenate([data[:, :3], targets[:, None]], axis=1)
    schedule = networks.Schedule(epochs=300, batch_size=64, learning_rate=0.03)
    found = networks.minimize(jnp.zeros(3), loss, jnp.asarray(rows), jax.random.key(0), schedule)
    np.testing.assert_allclose(found, np.linalg.lstsq(rows[:, :3], rows[:, 3], rcond=None)[0], atol=1e-3)


def test_descent_takes_fewer_rows_than_a_batch():
    found = networks.minimize(
        jnp.ones(2),
        lambda p, rows, key: jnp.sum(p**2),
        jnp.ones((3, 2)),
        jax.random.key(0),
        networks.Schedule(epochs=50, batch_size=64, learning_rate=0.05),
    )
    assert np.abs(found).max() < 0.2


@pytest.mark.parametrize("views", [1, 3])
def test_normalization_becomes_part_of_the_last_layer(views):
    """Before training, every logit has mean 0 and variance 1 over all that it is trained on."""
    features = 3 + 2 * np.random.default_rng(11).normal(size=(views, 50, 20)).astype(np.float32)
    fit, given = (deep.sdc, features[0]) if views == 1 else (contrastive.crovca, features)
    logits = np.concatenate([fit(given, 8, jax.random.key(0), epochs=0)(view) for view in features])
    np.testing.assert_allclose(logits.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(logits.var(axis=0), 1, rtol=1e-3)

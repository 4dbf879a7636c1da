"""The ConvNet: its shape rules, its determinism, its gradients, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cib_jax.models import convnet, registry


def build(size: int, seed: int = 0) -> nnx.Module:
    return registry.get("convnet").build(nnx.Rngs(seed), size)


def images(size: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3)), jnp.float32)


@pytest.mark.parametrize("size", [8, 9, 28])
def test_features_of_every_size(size):
    """Without batch statistics, images do not influence one another."""
    graph, state = nnx.split(build(size))
    apply = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
    features = apply(state, images(size))
    assert features.shape == (2, registry.get("convnet").features)
    assert features.dtype == jnp.float32
    assert np.isfinite(features).all()
    assert np.std(features) > 0.05
    np.testing.assert_allclose(apply(state, images(size).at[0].multiply(-2))[1], features[1], atol=1e-5)


def test_a_key_fixes_the_weights():
    first, again, other = (nnx.to_pure_dict(nnx.state(build(8, seed))) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["linear"]["kernel"], other["linear"]["kernel"])


def test_it_learns_to_distinguish_stripes():
    """And gradients reach every parameter."""
    rng = np.random.default_rng(0)
    labels = np.arange(16) % 2
    waves = np.sin(np.arange(8) * 2)[:, None, None] * np.ones((8, 8, 3))
    stripes = np.where(labels[:, None, None, None], waves, waves.swapaxes(0, 1)) + rng.normal(0, 0.5, (16, 8, 8, 3))
    graph, state = nnx.split(build(8))
    optimizer = optax.adam(1e-3)
    readout = jnp.float32(rng.normal(0, 1 / 16, (256, 2)))

    def loss(state):
        logits = nnx.merge(graph, state)(jnp.float32(stripes)) @ readout
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(state, memory):
        value, gradient = jax.value_and_grad(loss)(state)
        updates, memory = optimizer.update(gradient, memory)
        return optax.apply_updates(state, updates), memory, value, gradient

    memory = optimizer.init(state)
    state, memory, first, gradient = step(state, memory)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    for _ in range(30):
        state, memory, value, _ = step(state, memory)
    assert value < 0.1 < first


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"16 × 16.*8 × 8"):
        convnet.ConvNet(nnx.Rngs(0), 16)(jnp.zeros((1, 8, 8, 3)))

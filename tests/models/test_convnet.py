"""The ConvNet: its shape rules, its determinism, and that it learns; and the registry's promises for all backbones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cib_jax.models import convnet, registry


def build(size: int, seed: int = 0) -> nnx.Module:
    return registry.get("convnet").build(nnx.Rngs(seed), size)


@pytest.mark.parametrize("size", [8, 9, 16, 28, 64])
def test_features_of_every_size(size):
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3)), jnp.float32)
    features = nnx.jit(convnet.ConvNet.__call__)(build(size), images)
    assert features.shape == (2, registry.get("convnet").features)
    assert features.dtype == jnp.float32
    assert np.isfinite(features).all()
    assert np.std(features) > 0.05


def test_a_key_fixes_the_weights():
    first, again, other = (nnx.to_pure_dict(nnx.state(build(8, seed))) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["linear"]["kernel"], other["linear"]["kernel"])


def test_images_do_not_influence_one_another():
    """No batch statistics: an image's features are the same alone and in company."""
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)), jnp.float32)
    network, apply = build(16), nnx.jit(convnet.ConvNet.__call__)
    np.testing.assert_allclose(apply(network, images)[1:2], apply(network, images[1:2]), atol=1e-5)


def test_gradients_reach_every_parameter():
    graph, state = nnx.split(build(16))
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 16, 16, 3)), jnp.float32)
    gradients = jax.jit(jax.grad(lambda state: jnp.mean(nnx.merge(graph, state)(images) ** 2)))(state)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_it_learns_to_tell_stripes_from_stripes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 64)
    waves = np.sin(np.arange(8) * 2)[:, None, None] * np.ones((8, 8, 3))
    images = np.where(labels[:, None, None, None], waves, waves.swapaxes(0, 1)) + rng.normal(0, 0.5, (64, 8, 8, 3))
    images = jnp.float32(images)
    graph, state = nnx.split(build(8))
    optimizer = optax.adam(1e-3)
    readout = jnp.float32(rng.normal(0, 1 / 16, (256, 2)))

    def loss(state):
        logits = nnx.merge(graph, state)(images) @ readout
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(state, memory):
        value, gradient = jax.value_and_grad(loss)(state)
        updates, memory = optimizer.update(gradient, memory)
        return optax.apply_updates(state, updates), memory, value

    memory = optimizer.init(state)
    for _ in range(40):
        state, memory, value = step(state, memory)
    assert value < 0.1


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="images are 8 × 8 but this ConvNet was built for 16 × 16"):
        build(16)(jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("name", [name for name in registry.BACKBONES if name != "none"])
def test_registry_states_what_the_networks_do(name):
    """Abstractly: no weights are drawn."""
    backbone = registry.get(name)
    for size in (backbone.smallest, backbone.image_size):
        module = nnx.eval_shape(lambda size=size: backbone.build(nnx.Rngs(0), size))
        graph, state = nnx.split(module)
        images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
        features = jax.eval_shape(lambda state, x, graph=graph: nnx.merge(graph, state)(x), state, images)
        assert features.shape == (2, backbone.features)
        assert features.dtype == jnp.float32


def test_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match=r"backbone is 'vgg': choose one of clip_vit_b16, .*, siglip_base, vgg16\."):
        registry.get("vgg")

"""VGG-16 against torchvision, with the same random weights on both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cib_jax.models import conv, registry, state_dict, vgg
from tests.golden import backbone_inputs
from tests.models.conftest import compiled, same_shapes


def test_fc7_matches_torchvision(golden):
    """To 1e-4 of the largest value, for a batch of two; at 96 pixels the pool stretches a map of 3 × 3 to 7 × 7."""
    state = vgg.convert(backbone_inputs.vgg_tensors())
    expected = golden["vgg_fc7_96"]
    ours = compiled(registry.get("vgg16"))(state, backbone_inputs.noise(96, 2))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_layers_on_pairs_of_images_are_those_on_single_ones():
    """Compares with the layers one after the other, of few channels."""
    layers = [vgg.Layer(nnx.Rngs(0), 3, 4, False), vgg.Layer(nnx.Rngs(1), 4, 5, True)]
    for layer in layers:
        layer.bias[...] = jax.random.normal(jax.random.key(2), layer.bias.shape)
    images = jax.random.normal(jax.random.key(3), (4, 6, 10, 3))
    np.testing.assert_allclose(vgg.in_pairs(layers, images), conv.in_turn(layers, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", backbone_inputs.POOL_SIZES)
def test_adaptive_pool_matches_torch(golden, size):
    ours = vgg.adaptive_average_pool(jnp.asarray(backbone_inputs.pool_input(*size)), 7)
    np.testing.assert_allclose(ours, golden[f"pool_{size[0]}_{size[1]}"], atol=1e-6)


def test_bfloat16_stays_bfloat16_and_close(monkeypatch):
    """A narrow network of one layer per stage."""
    monkeypatch.setattr(vgg, "STAGES", tuple((width[0] // 4,) for width in vgg.STAGES))
    monkeypatch.setattr(vgg, "FEATURES", 64)
    graph, state = nnx.split(vgg.VGG16(nnx.Rngs(0)))
    apply = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
    images = jnp.asarray(backbone_inputs.noise(96, 2))
    single, half = apply(state, images), apply(jax.tree.map(jnp.bfloat16, state), jnp.bfloat16(images))
    assert half.dtype == jnp.bfloat16
    assert jnp.linalg.norm(half - single) < 0.03 * jnp.linalg.norm(single)


def test_timm_names_give_the_same_state(monkeypatch):
    """In a network of few channels; timm has fc6 and fc7 as convolutions."""
    monkeypatch.setattr(vgg, "STAGES", tuple((2,) * len(stage) for stage in vgg.STAGES))
    monkeypatch.setattr(vgg, "FEATURES", 3)
    rng = np.random.default_rng(0)
    torchvision = {name: rng.normal(size=shape).astype(np.float32) for name, shape in vgg.torch_shapes().items()}
    torchvision["classifier.6.weight"] = np.ones((5, 3), np.float32)
    names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
    shapes = {"pre_logits.fc1.weight": (3, 2, 7, 7), "pre_logits.fc2.weight": (3, 3, 1, 1)}
    timm = {}
    for name, tensor in torchvision.items():
        layer, part = name.rsplit(".", 1)
        renamed = f"{names.get(layer, layer)}.{part}"
        timm[renamed] = tensor.reshape(shapes.get(renamed, tensor.shape))
    converted = vgg.convert(torchvision)
    np.testing.assert_array_equal(converted["fc7"]["kernel"], torchvision["classifier.3.weight"].T)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, vgg.convert(timm), converted)))


def test_state_has_the_names_and_shapes_of_the_module(shapes_of):
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in vgg.torch_shapes().items()}
    assert same_shapes(vgg.convert(zeros), shapes_of("vgg16")[1])


@pytest.mark.parametrize("prefix", ["", "pre_logits."])
def test_another_network_is_refused(prefix):
    with pytest.raises(state_dict.MismatchError, match=r"missing: features.0.weight, .* and 27 more; unknown: .*other"):
        vgg.convert({f"{prefix}other": np.zeros(3, np.float32)})

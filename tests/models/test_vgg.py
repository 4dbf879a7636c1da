"""VGG-16 against torchvision, with the same random weights on both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cib_jax.models import conv, registry, state_dict, vgg
from tests.golden import backbone_inputs


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, np.ndarray]:
    return backbone_inputs.vgg_tensors()


@pytest.fixture(scope="module")
def converted(checkpoint):
    return vgg.convert(checkpoint)


@pytest.fixture(scope="module")
def module(converted):
    graph, state = nnx.split(nnx.eval_shape(lambda: registry.get("vgg16").build(nnx.Rngs(0), 224)))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, converted))
    return nnx.merge(graph, state)


def assert_close(ours, expected):
    """To 1e-4 of the largest value."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_every_layer_matches_torchvision(module, golden):
    x = jnp.asarray(backbone_inputs.noise(96, 2))
    position = 1
    for i, layer in enumerate(module.convolutions):
        x = jax.nn.relu(conv.conv(x, *layer.arrays, padding=vgg.PADDING))
        assert_close(backbone_inputs.sample(np.asarray(x)), golden[f"vgg_layer_{position}"])
        if i in (1, 3, 6, 9, 12):
            x, position = conv.max_pool_2x2(x), position + 1
            assert_close(backbone_inputs.sample(np.asarray(x)), golden[f"vgg_layer_{position}"])
        position += 2
    assert x.shape == (2, 3, 3, 512)


def test_fc7_matches_torchvision_at_224(module, golden):
    assert_close(nnx.jit(vgg.VGG16.__call__)(module, backbone_inputs.noise(224, 1)), golden["vgg_fc7_224"])


def test_fc7_matches_torchvision_where_the_map_is_stretched(module, golden):
    """At 96 px the last map is 3 × 3 and the adaptive pool stretches it to 7 × 7; a batch of two."""
    assert_close(nnx.jit(vgg.VGG16.__call__)(module, backbone_inputs.noise(96, 2)), golden["vgg_fc7_96"])


@pytest.mark.parametrize("size", backbone_inputs.POOL_SIZES)
def test_adaptive_pool_matches_torch(golden, size):
    ours = vgg.adaptive_average_pool(jnp.asarray(backbone_inputs.pool_input(*size)), 7)
    np.testing.assert_allclose(ours, golden[f"pool_{size[0]}_{size[1]}"], atol=1e-6)


def test_bfloat16_stays_bfloat16_and_close(monkeypatch):
    """A narrow network whose last map the adaptive pool stretches; every stage is there."""
    monkeypatch.setattr(vgg, "STAGES", tuple((width[0] // 4,) for width in vgg.STAGES))
    monkeypatch.setattr(vgg, "FEATURES", 64)
    monkeypatch.setattr(conv, "WINOGRAD_CHANNELS", 128)
    graph, state = nnx.split(vgg.VGG16(nnx.Rngs(0)))
    apply = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
    images = jnp.asarray(backbone_inputs.noise(96, 2))
    single = apply(state, images)
    half = apply(jax.tree.map(jnp.bfloat16, state), jnp.bfloat16(images))
    assert half.dtype == jnp.bfloat16
    assert jnp.linalg.norm(half - single) < 0.03 * jnp.linalg.norm(single)


def test_timm_names_give_the_same_state(checkpoint, converted):
    names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
    shapes = {"pre_logits.fc1.weight": (4096, 512, 7, 7), "pre_logits.fc2.weight": (4096, 4096, 1, 1)}
    timm = {}
    for name, tensor in checkpoint.items():
        layer, part = name.rsplit(".", 1)
        renamed = f"{names.get(layer, layer)}.{part}"
        timm[renamed] = tensor.reshape(shapes.get(renamed, tensor.shape))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, vgg.convert(timm), converted)))


def test_state_has_the_names_and_shapes_of_the_module():
    expected = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: vgg.VGG16(nnx.Rngs(0)))))
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in vgg.torch_shapes().items()}
    converted = vgg.convert(zeros)
    assert jax.tree.structure(converted) == jax.tree.structure(expected)
    assert jax.tree.leaves(jax.tree.map(np.shape, converted)) == jax.tree.leaves(jax.tree.map(np.shape, expected))


@pytest.mark.parametrize("prefix", ["", "pre_logits."])
def test_another_network_is_refused(prefix):
    with pytest.raises(state_dict.MismatchError, match=r"missing: features.0.weight, .* and 27 more; unknown: .*other"):
        vgg.convert({f"{prefix}other": np.zeros(3, np.float32)})

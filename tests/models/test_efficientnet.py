"""EfficientNet-Lite against the PyTorch implementation of `efficientnet-lite-pytorch`, on two photographs and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cib_jax.models import efficientnet, registry, state_dict, weights
from tests.golden import backbone_inputs


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, np.ndarray]:
    return weights.read_tensors(weights.locate("efficientnet_lite0").path)


def compiled(name: str, params):
    """The network as a function of images."""
    graph, state = nnx.split(nnx.eval_shape(lambda: registry.get(name).build(nnx.Rngs(0), 224)))
    nnx.replace_by_pure_dict(state, params)
    return jax.jit(nnx.merge(graph, state))


@pytest.fixture(scope="module")
def network():
    return compiled("efficientnet_lite0", weights.load_pretrained("efficientnet_lite0"))


@pytest.mark.parametrize("size", [128, 224])
def test_features_and_logits_match_pytorch(network, checkpoint, golden, size):
    """All 1,000 logits; china.jpg is a boat house ("bell cote", 442), flower.jpg a daisy (985)."""
    images = backbone_inputs.normalized(golden[f"photographs_{size}"])
    features = network(images)
    logits = efficientnet.class_logits(features, efficientnet.convert_classifier(checkpoint))
    np.testing.assert_allclose(features, golden[f"efficientnet_features_{size}"], atol=1e-4)
    np.testing.assert_allclose(logits, golden[f"efficientnet_logits_{size}"], atol=1e-3)
    assert np.argmax(golden[f"efficientnet_logits_{size}"], -1).tolist() == np.argmax(logits, -1).tolist()
    if size == 224:
        assert np.argmax(logits, -1).tolist() == [442, 985]


SCALED = {1: efficientnet.LITE1, 2: efficientnet.LITE2}


@pytest.mark.parametrize("number", SCALED)
def test_published_weights_of_the_scaled_networks_match_pytorch(number, golden, golden_cnns):
    """Features and all 1,000 logits at 224 pixels."""
    name = f"efficientnet_lite{number}"
    images = backbone_inputs.normalized(golden["photographs_224"])
    features = compiled(name, weights.load_pretrained(name))(images)
    classifier = efficientnet.convert_classifier(weights.read_tensors(weights.locate(name).path))
    logits, expected = efficientnet.class_logits(features, classifier), golden_cnns[f"lite{number}_logits"]
    np.testing.assert_allclose(features, golden_cnns[f"lite{number}_features"], atol=1e-4)
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    assert np.argmax(logits, -1).tolist() == np.argmax(expected, -1).tolist()


@pytest.mark.parametrize("number", SCALED)
def test_random_weights_of_the_scaled_networks_match_pytorch(number, golden_cnns):
    """At their usual sizes; a map's channels, drawn by the tensors' shapes, are those of the other side."""
    shapes = efficientnet.torch_shapes(SCALED[number])
    params = efficientnet.convert(backbone_inputs.normed_tensors(shapes), SCALED[number])
    name = f"efficientnet_lite{number}"
    features = compiled(name, params)(backbone_inputs.noise(registry.get(name).image_size, 1))
    np.testing.assert_allclose(features, golden_cnns[f"lite{number}_features_random"], atol=1e-4)


@pytest.mark.parametrize(
    ("number", "blocks", "channels"),
    [(0, 16, (16, 24, 40, 80, 112, 192, 320)), (1, 21, (16, 24, 40, 80, 112, 192, 320)),
     (2, 21, (16, 24, 48, 88, 120, 208, 352))],
)  # fmt: skip
def test_scaled_networks_have_the_published_stages(number, blocks, channels):
    """By hand: Lite2's 17.6, 26.4, 44, 88, 123.2, 211.2 and 352 to multiples of 8; the stem as it is."""
    plan = efficientnet.block_plan((efficientnet.LITE0, efficientnet.LITE1, efficientnet.LITE2)[number])
    assert len(plan) == blocks
    assert tuple(dict.fromkeys(row.outputs for row in plan)) == channels
    assert [plan[0].inputs, plan[0].outputs, plan[-1].inputs, plan[-1].outputs] == [32, 16, channels[-2], channels[-1]]
    assert [row.stride for row in plan].count(2) == 4


def test_any_size_gives_features(network):
    features = network(jnp.zeros((1, 32, 71, 3)))
    assert features.shape == (1, efficientnet.FEATURES)
    assert np.isfinite(features).all()


def test_bfloat16_stays_bfloat16_and_close(golden):
    """On the two photographs."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: efficientnet.EfficientNetLite(nnx.Rngs(0))))
    state = jax.tree.map(jnp.bfloat16, weights.load_pretrained("efficientnet_lite0"))
    images = backbone_inputs.normalized(golden["photographs_128"])
    half = jax.jit(nnx.merge(graph, state))(jnp.bfloat16(images))
    assert half.dtype == jnp.bfloat16
    single = golden["efficientnet_features_128"]
    assert np.linalg.norm(half - single) < 0.05 * np.linalg.norm(single)


@pytest.mark.parametrize("scaling", [efficientnet.LITE0, efficientnet.LITE2])
def test_state_has_the_names_and_shapes_of_the_module(scaling):
    module = nnx.eval_shape(lambda: efficientnet.EfficientNetLite(nnx.Rngs(0), scaling))
    expected = nnx.to_pure_dict(nnx.state(module))
    shapes = efficientnet.torch_shapes(scaling)
    converted = efficientnet.convert({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, scaling)
    assert jax.tree.structure(converted) == jax.tree.structure(expected)
    assert jax.tree.leaves(jax.tree.map(np.shape, converted)) == jax.tree.leaves(jax.tree.map(np.shape, expected))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(converted))


def test_another_scaling_is_refused(checkpoint):
    with pytest.raises(state_dict.MismatchError, match=r"missing: _blocks\.16\..*; of another shape: _blocks"):
        efficientnet.convert(checkpoint, efficientnet.LITE2)


def test_another_network_is_refused(checkpoint):
    changed = {name: t for name, t in checkpoint.items() if name != "_conv_head.weight"}
    changed |= {"stem.weight": checkpoint["_fc.bias"], "_bn1.bias": np.zeros(7, np.float32)}
    with pytest.raises(state_dict.MismatchError) as caught:
        efficientnet.convert(changed)
    assert str(caught.value) == (
        "missing: _conv_head.weight; unknown: stem.weight; of another shape: _bn1.bias [7] (needed [1280])"
    )

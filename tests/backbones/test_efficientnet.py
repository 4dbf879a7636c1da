"""EfficientNet-Lite0 against the PyTorch implementation of `efficientnet-lite-pytorch` on two photographs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cib_jax.backbones import efficientnet, registry, sources, tensors, weights
from tests.golden import backbone_inputs


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, np.ndarray]:
    return weights.read_tensors(sources.locate("efficientnet_lite0").path)


@pytest.fixture(scope="module")
def network():
    backbone = registry.get("efficientnet_lite0")
    graph, state = nnx.split(nnx.eval_shape(lambda: backbone.build(nnx.Rngs(0), 224)))
    nnx.replace_by_pure_dict(state, weights.load_pretrained("efficientnet_lite0"))

    @jax.jit
    def apply(images):
        return nnx.merge(graph, state)(images)

    return apply


@pytest.mark.parametrize("size", [128, 224])
def test_features_and_logits_match_pytorch(network, checkpoint, golden, size):
    """All 1,000 logits; china.jpg is a boat house ("bell cote", 442), flower.jpg a daisy (985)."""
    images = backbone_inputs.normalised(golden[f"photographs_{size}"])
    features = network(images)
    logits = efficientnet.class_logits(features, efficientnet.convert_classifier(checkpoint))
    np.testing.assert_allclose(features, golden[f"efficientnet_features_{size}"], atol=1e-4)
    np.testing.assert_allclose(logits, golden[f"efficientnet_logits_{size}"], atol=1e-3)
    assert np.argmax(golden[f"efficientnet_logits_{size}"], -1).tolist() == np.argmax(logits, -1).tolist()
    if size == 224:
        assert np.argmax(logits, -1).tolist() == [442, 985]


def test_any_size_gives_features(network):
    features = network(jnp.zeros((1, 32, 71, 3)))
    assert features.shape == (1, efficientnet.FEATURES)
    assert np.isfinite(features).all()


def test_bfloat16_stays_bfloat16_and_close(golden):
    """On the two photographs."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: efficientnet.EfficientNetLite0(nnx.Rngs(0))))
    state = jax.tree.map(jnp.bfloat16, weights.load_pretrained("efficientnet_lite0"))
    images = backbone_inputs.normalised(golden["photographs_128"])
    half = jax.jit(nnx.merge(graph, state))(jnp.bfloat16(images))
    assert half.dtype == jnp.bfloat16
    single = golden["efficientnet_features_128"]
    assert np.linalg.norm(half - single) < 0.05 * np.linalg.norm(single)


def test_state_has_the_names_and_shapes_of_the_module(checkpoint):
    module = nnx.eval_shape(lambda: efficientnet.EfficientNetLite0(nnx.Rngs(0)))
    expected = nnx.to_pure_dict(nnx.state(module))
    converted = efficientnet.convert(checkpoint)
    assert jax.tree.structure(converted) == jax.tree.structure(expected)
    assert jax.tree.leaves(jax.tree.map(np.shape, converted)) == jax.tree.leaves(jax.tree.map(np.shape, expected))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(converted))


def test_another_network_is_refused(checkpoint):
    changed = {name: t for name, t in checkpoint.items() if name != "_conv_head.weight"}
    changed |= {"stem.weight": checkpoint["_fc.bias"], "_bn1.bias": np.zeros(7, np.float32)}
    with pytest.raises(tensors.MismatchError) as caught:
        efficientnet.convert(changed)
    assert str(caught.value) == (
        "missing: _conv_head.weight; unknown: stem.weight; of another shape: _bn1.bias [7] (needed [1280])"
    )

"""EfficientNet-Lite against the PyTorch implementation of `efficientnet-lite-pytorch`, on two photographs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cib_jax.models import efficientnet, registry, state_dict, weights
from tests.golden import backbone_inputs
from tests.models.conftest import compiled, same_shapes

SCALED = {0: efficientnet.LITE0, 1: efficientnet.LITE1, 2: efficientnet.LITE2}


@functools.cache
def checkpoint(name: str) -> dict[str, np.ndarray]:
    return weights.read_tensors(weights.locate(name).path)


def validate(features, name, of_features, of_logits):
    """Compares features, and the logits of all 1,000 classes, with PyTorch's."""
    logits = features @ checkpoint(name)["_fc.weight"].T + checkpoint(name)["_fc.bias"]
    np.testing.assert_allclose(features, of_features, atol=1e-4)
    np.testing.assert_allclose(logits, of_logits, atol=1e-3)
    assert np.argmax(logits, -1).tolist() == np.argmax(of_logits, -1).tolist()


def test_published_weights_match_pytorch(golden):
    images = backbone_inputs.normalized(golden["photographs_128"])
    features = compiled(registry.get("efficientnet_lite0"))(weights.load_pretrained("efficientnet_lite0"), images)
    validate(features, "efficientnet_lite0", golden["efficientnet_features_128"], golden["efficientnet_logits_128"])


def test_networks_side_by_side_match_pytorch_one_by_one(golden, golden_cnns):
    name = "efficientnet_lite0+1+2"
    images = backbone_inputs.normalized(golden["photographs_224"])
    features = np.split(compiled(registry.get(name))(weights.load_pretrained(name), images), 3, axis=1)
    expected = [[golden[f"efficientnet_{kind}_224"] for kind in ("features", "logits")]]
    expected += [[golden_cnns[f"lite{number}_{kind}"] for kind in ("features", "logits")] for number in (1, 2)]
    for number in range(3):
        validate(features[number], f"efficientnet_lite{number}", *expected[number])


@pytest.mark.parametrize(
    ("number", "blocks", "channels"),
    [(0, 16, (16, 24, 40, 80, 112, 192, 320)), (1, 21, (16, 24, 40, 80, 112, 192, 320)),
     (2, 21, (16, 24, 48, 88, 120, 208, 352))],
)  # fmt: skip
def test_scaled_networks_have_the_published_stages(number, blocks, channels):
    """By hand: Lite2's 17.6, 26.4, 44, 88, 123.2, 211.2 and 352 to multiples of 8; the stem is not scaled."""
    plan = efficientnet.block_plan(SCALED[number])
    assert len(plan) == blocks
    assert tuple(dict.fromkeys(row.outputs for row in plan)) == channels
    assert [plan[0].inputs, plan[0].outputs, plan[-1].inputs, plan[-1].outputs] == [32, 16, channels[-2], channels[-1]]
    assert [row.stride for row in plan].count(2) == 4


def test_any_size_works_and_bfloat16_stays_bfloat16_and_close():
    """A narrow network with one block per stage, on sides that are odd in some stages."""
    scaling = efficientnet.Scaling(0.25, 0.25)
    assert len(efficientnet.block_plan(scaling)) == 7
    state = efficientnet.convert(backbone_inputs.normed_tensors(efficientnet.torch_shapes(scaling)), scaling)
    graph, _ = nnx.split(nnx.eval_shape(lambda: efficientnet.EfficientNetLite(nnx.Rngs(0), scaling)))
    apply = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
    images = jnp.asarray(backbone_inputs.noise(71, 2)[:, :33])
    single, half = apply(state, images), apply(jax.tree.map(jnp.bfloat16, state), jnp.bfloat16(images))
    assert single.shape == (2, efficientnet.FEATURES)
    assert half.dtype == jnp.bfloat16
    assert 0 < np.linalg.norm(half - single) < 0.05 * np.linalg.norm(single)


@pytest.mark.parametrize("number", [0, 2])
def test_state_has_the_names_and_shapes_of_the_module(number, shapes_of):
    shapes = efficientnet.torch_shapes(SCALED[number])
    tensors = {name: np.broadcast_to(np.float32(1), shape) for name, shape in shapes.items()}
    converted = efficientnet.convert(tensors, SCALED[number])
    assert same_shapes(converted, shapes_of(f"efficientnet_lite{number}")[1])


def test_another_scaling_is_refused():
    with pytest.raises(state_dict.MismatchError, match=r"missing: _blocks\.16\..*; of another shape: _blocks"):
        efficientnet.convert(checkpoint("efficientnet_lite0"), efficientnet.LITE2)


def test_another_network_is_refused():
    changed = {name: t for name, t in checkpoint("efficientnet_lite0").items() if name != "_conv_head.weight"}
    changed |= {"stem.weight": np.zeros(3, np.float32), "_bn1.bias": np.zeros(7, np.float32)}
    with pytest.raises(
        state_dict.MismatchError, match=r"_conv_head\.weight; .*: stem\.weight; .*: _bn1\.bias \[7\] .*\[1280\]"
    ):
        efficientnet.convert(changed)

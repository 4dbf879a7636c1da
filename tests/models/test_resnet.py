"""ResNet-50 against torchvision, with the same random weights and batch norms on both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cib_jax.models import conv, registry, resnet, state_dict
from tests.golden import backbone_inputs


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, np.ndarray]:
    return backbone_inputs.normed_tensors(resnet.torch_shapes())


@pytest.fixture(scope="module")
def network(checkpoint):
    graph, state = nnx.split(nnx.eval_shape(lambda: registry.get("resnet50").build(nnx.Rngs(0), 224)))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, resnet.convert(checkpoint)))
    return nnx.merge(graph, state)


def test_every_block_matches_torchvision(network, golden_cnns):
    """At 97 pixels, from where the maps' sides are 49, 25, 13, 7 and 4; and the features."""

    @nnx.jit
    def maps(network, images):
        x = jax.nn.relu(conv.conv(images, *network.stem.arrays, stride=2, padding=resnet.STEM_PADDING))
        found = [conv.max_pool_3x3(x)]
        for block in network.blocks:
            found.append(block(found[-1]))
        return found

    found = maps(network, backbone_inputs.noise(97, 2))
    assert len(found) == 17
    for i, x in enumerate(found):
        expected = golden_cnns[f"resnet50_map_{i}"]
        np.testing.assert_allclose(backbone_inputs.sample(np.asarray(x)), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[-1].mean((1, 2)), golden_cnns["resnet50_features_97"], rtol=0, atol=1e-4)


def test_features_match_torchvision_at_224(network, golden_cnns):
    ours = nnx.jit(resnet.ResNet50.__call__)(network, backbone_inputs.noise(224, 1))
    assert ours.shape == (1, registry.get("resnet50").features)
    np.testing.assert_allclose(ours, golden_cnns["resnet50_features_224"], rtol=0, atol=1e-4)


@pytest.fixture
def narrow(monkeypatch):
    """A network of every stage, narrow, and with one block in all but the first."""
    stages = [(1 + (stride == 1), width // 16, stride) for _, width, stride in resnet.STAGES]
    monkeypatch.setattr(resnet, "STAGES", stages)
    monkeypatch.setattr(resnet, "STEM", 8)
    params = resnet.convert(backbone_inputs.normed_tensors(resnet.torch_shapes()))
    graph, _ = nnx.split(nnx.eval_shape(lambda: resnet.ResNet50(nnx.Rngs(0))))
    return jax.jit(lambda params, images: nnx.merge(graph, params)(images)), params


def test_a_batch_in_chunks_and_the_smallest_side(monkeypatch, narrow):
    """Each image by itself gives what it gives among others."""
    apply, params = narrow
    images = backbone_inputs.noise(47, 4)[:, :32]
    alone = np.concatenate([apply(params, image[None]) for image in images])
    monkeypatch.setattr(conv, "CHUNK_PIXELS", 2 * 32 * 47)
    np.testing.assert_allclose(apply(params, images), alone, atol=1e-5)
    assert np.isfinite(alone).all()


def test_bfloat16_stays_bfloat16_and_close(narrow):
    apply, params = narrow
    images = jnp.asarray(backbone_inputs.noise(48, 2))
    single, half = apply(params, images), apply(jax.tree.map(jnp.bfloat16, params), jnp.bfloat16(images))
    assert half.dtype == jnp.bfloat16
    assert jnp.linalg.norm(half - single) < 0.03 * jnp.linalg.norm(single)


def test_state_has_the_names_and_shapes_of_the_module(checkpoint):
    module = nnx.eval_shape(lambda: resnet.ResNet50(nnx.Rngs(0)))
    expected = nnx.to_pure_dict(nnx.state(module))
    converted = resnet.convert(checkpoint)
    assert jax.tree.structure(converted) == jax.tree.structure(expected)
    assert jax.tree.leaves(jax.tree.map(np.shape, converted)) == jax.tree.leaves(jax.tree.map(np.shape, expected))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(converted))
    assert list(expected) == ["blocks", "stem"]
    assert len(expected["blocks"]) == 16


def test_the_files_of_timm_and_torchvision_are_taken_whole(monkeypatch, golden_cnns):
    """The names of timm's network, with few channels here; classifier and counters may be there or not."""
    monkeypatch.setattr(resnet, "STAGES", [(blocks, 2, stride) for blocks, _, stride in resnet.STAGES])
    shapes = resnet.torch_shapes() | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
    names = golden_cnns["timm_names"].tolist()
    full = {name: np.ones(shapes.get(name, ()), np.float32) for name in names}
    assert full.keys() >= shapes.keys()
    for given in (full, {name: t for name, t in full.items() if not name.endswith("num_batches_tracked")}):
        assert resnet.convert(given)["blocks"][15]["widen"]["bias"].shape == (8,)


def test_another_network_is_refused(checkpoint):
    changed = {name: t for name, t in checkpoint.items() if name != "layer4.2.bn3.bias"}
    changed |= {"layer4.3.conv1.weight": checkpoint["conv1.weight"], "conv1.weight": np.ones((64, 3, 3, 3), "f4")}
    with pytest.raises(state_dict.MismatchError) as caught:
        resnet.convert(changed)
    assert str(caught.value) == (
        "missing: layer4.2.bn3.bias; unknown: layer4.3.conv1.weight; "
        "of another shape: conv1.weight [64, 3, 3, 3] (needed [64, 3, 7, 7])"
    )

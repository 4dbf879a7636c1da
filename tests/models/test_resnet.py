"""ResNet-50 against torchvision, with the same random weights and batch norms on both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cib_jax.models import conv, registry, resnet, state_dict
from tests.golden import backbone_inputs
from tests.models.conftest import compiled, same_shapes


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, np.ndarray]:
    return backbone_inputs.normed_tensors(resnet.torch_shapes())


def test_features_match_torchvision(checkpoint, golden_cnns):
    """At 97 pixels, where the sides of maps are 49, 25, 13, 7 and 4."""
    ours = compiled(registry.get("resnet50"))(resnet.convert(checkpoint), backbone_inputs.noise(97, 2))
    np.testing.assert_allclose(ours, golden_cnns["resnet50_features_97"], rtol=0, atol=1e-4)


@pytest.fixture
def narrow(monkeypatch):
    """A network with every stage, narrow, and with one block in all stages but the first."""
    stages = [(1 + (stride == 1), width // 16, stride) for _, width, stride in resnet.STAGES]
    monkeypatch.setattr(resnet, "STAGES", stages)
    monkeypatch.setattr(resnet, "STEM", 8)
    params = resnet.convert(backbone_inputs.normed_tensors(resnet.torch_shapes()))
    graph, _ = nnx.split(nnx.eval_shape(lambda: resnet.ResNet50(conv.ShapesOnly(0))))
    return jax.jit(lambda params, images: nnx.merge(graph, params)(images)), params


def test_chunks_the_smallest_side_and_bfloat16(monkeypatch, narrow):
    """Each image gives the same features by itself as among others; bfloat16 stays bfloat16 and close."""
    apply, params = narrow
    images = backbone_inputs.noise(47, 4)[:, :32]
    alone = np.concatenate([apply(params, image[None]) for image in images])
    monkeypatch.setattr(conv, "CHUNK_PIXELS", 2 * 32 * 47)
    np.testing.assert_allclose(apply(params, images), alone, atol=1e-5)
    half = apply(jax.tree.map(jnp.bfloat16, params), jnp.bfloat16(images[:1]))
    assert half.dtype == jnp.bfloat16
    assert 0 < np.linalg.norm(half - alone[:1]) < 0.03 * np.linalg.norm(alone[:1])


def test_state_has_the_names_and_shapes_of_the_module(checkpoint, shapes_of):
    _, expected = shapes_of("resnet50")
    assert same_shapes(resnet.convert(checkpoint), expected)
    assert list(expected) == ["blocks", "stem"]
    assert len(expected["blocks"]) == 16


def test_the_files_of_timm_and_torchvision_are_taken_whole(monkeypatch, golden_cnns):
    """The names of timm's network, with few channels here; classifier and counters are optional."""
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
    with pytest.raises(
        state_dict.MismatchError, match=r"layer4\.2\.bn3\.bias; .*: layer4\.3\.conv1\.weight; .*: conv1\.weight \[64, 3"
    ):
        resnet.convert(changed)

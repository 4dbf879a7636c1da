"""The vision transformers against those of PyTorch's `transformers`, with the same random weights on both sides."""

import dataclasses
import functools
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import cib_jax as cib
import configs.default
from cib_jax.config import build, schema
from cib_jax.errors import ConfigError
from cib_jax.models import clip, dinov2, registry
from cib_jax.models.encoder import packed_of_features, plain_features
from cib_jax.models.registry import Backbone
from cib_jax.models.state_dict import MismatchError
from tests.golden import transformer_inputs
from tests.models.conftest import GOLDEN

PUBLISHED = [name for name in transformer_inputs.SIZES if not name.endswith("_shallow")]
# Positions without a filter, as dinov2_small has them, go to other grids in the last two as well.
QUICK = ("dinov2_small_registers", "clip_vit_b32_shallow", "siglip_base_shallow")
SLOW = [name for name in PUBLISHED if name not in QUICK]


@pytest.fixture(scope="module")
def golden() -> Iterator[dict[str, np.ndarray]]:
    with np.load(GOLDEN / "transformers.npz") as archive:
        yield dict(archive)


def shallow(name: str) -> Backbone:
    """A registered backbone of two blocks."""
    known = registry.get(name)
    network, design, convert = {
        "clip_vit_b32": (clip.CLIP, clip.B32, clip.convert_clip),
        "dinov2_small": (dinov2.DINOv2, dinov2.SMALL, dinov2.convert),
        "siglip_base": (clip.SigLIP, clip.BASE, clip.convert_siglip),
    }[name]
    design = design._replace(depth=transformer_inputs.SHALLOW)
    return dataclasses.replace(
        known, build=lambda rngs, size: network(rngs, design), convert=functools.partial(convert, design=design)
    )


def get(name: str) -> Backbone:
    return shallow(name.removesuffix("_shallow")) if name.endswith("_shallow") else registry.get(name)


def in_file(golden, name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file, as `transformers` writes it."""
    return {key: tuple(shape) for key, shape in json.loads(str(golden[f"{name}_tensors"])).items()}


def checkpoint(golden, name: str) -> dict[str, np.ndarray]:
    """What the network reads of that file, with the values that make_transformers.py gave it."""
    shapes = in_file(golden, name)
    return {key: transformer_inputs.tensor(key, shapes[key]) for key in shapes if key.startswith(get(name).reads)}


def compiled(backbone: Backbone):
    graph, _ = nnx.split(nnx.eval_shape(lambda: backbone.build(nnx.Rngs(0), 224)))
    return jax.jit(lambda state, images: nnx.merge(graph, state)(images))


def assert_features_match(golden, name: str, sizes) -> None:
    state = jax.tree.map(jnp.asarray, get(name).convert(checkpoint(golden, name)))
    apply = compiled(get(name))
    for height, width in sizes:
        ours = apply(state, transformer_inputs.images(height, width))
        np.testing.assert_allclose(ours, golden[f"{name}_{height}_{width}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", QUICK)
def test_features_match_pytorch(golden, name):
    """On square and on oblong images, at the grid where positions were learned and at others."""
    sizes = [size for size in transformer_inputs.SIZES[name] if size != transformer_inputs.NATIVE]
    assert_features_match(golden, name, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_features_of_the_large_ones_match_pytorch(golden, name):
    assert_features_match(golden, name, transformer_inputs.SIZES[name])


@pytest.mark.slow
def test_features_match_pytorch_at_the_size_of_training(golden):
    """At 518 px, where DINOv2's position embeddings are used as they are."""
    assert_features_match(golden, "dinov2_small_registers", [transformer_inputs.NATIVE])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_names_and_shapes_become_the_module_s(golden, name):
    """Of the whole file, of which the loader keeps what the backbone reads."""
    backbone = registry.get(name)
    expected = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: backbone.build(nnx.Rngs(0), 224))))
    kept = {key: shape for key, shape in in_file(golden, name).items() if key.startswith(backbone.reads)}
    converted = backbone.convert({key: np.zeros(shape, np.float32) for key, shape in kept.items()})
    assert jax.tree.structure(converted) == jax.tree.structure(expected)
    assert jax.tree.leaves(jax.tree.map(np.shape, converted)) == jax.tree.leaves(jax.tree.map(np.shape, expected))
    assert {leaf.dtype for leaf in jax.tree.leaves(converted)} == {np.dtype(np.float32)}


def zeros(golden, name: str) -> dict[str, np.ndarray]:
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in in_file(golden, name).items()}


def test_another_network_is_refused(golden):
    small = zeros(golden, "dinov2_small")
    small["stray"] = np.zeros(3, np.float32)
    del small["layernorm.bias"]
    with pytest.raises(MismatchError, match=r"^missing: layernorm.bias; unknown: stray$"):
        dinov2.convert(small, dinov2.SMALL)
    base = zeros(golden, "dinov2_base")
    with pytest.raises(MismatchError, match=r"of another shape: embeddings.patch.* \[768, 3, 14, 14\] \(needed \[384,"):
        dinov2.convert(base, dinov2.SMALL)
    with pytest.raises(MismatchError, match=r"^missing: embeddings.register_tokens$"):
        dinov2.convert(base, dinov2.BASE_REGISTERS)
    with pytest.raises(MismatchError, match=r"^unknown: embeddings.register_tokens$"):
        dinov2.convert(zeros(golden, "dinov2_base_registers"), dinov2.BASE)


def test_clip_and_siglip_are_told_apart(golden):
    with pytest.raises(MismatchError, match=r"missing: .*patch_embedding.bias, .*head.probe, .* and 9 more;"):
        clip.convert_siglip(zeros(golden, "clip_vit_b16"), clip.BASE)
    with pytest.raises(MismatchError, match=r"of another shape: .*patch_embedding.weight \[768, 3, 16, 16\]"):
        clip.convert_clip(zeros(golden, "clip_vit_b16"), clip.B32)


def test_a_local_file_with_both_towers_goes_through_the_config(golden, tmp_path, monkeypatch):
    """As published: with the text tower, CLIP's numbers of positions, and a scalar."""
    monkeypatch.setitem(registry.BACKBONES, "clip_vit_b32", shallow("clip_vit_b32"))
    name = "clip_vit_b32_shallow"
    text = {"text_model.final_layer_norm.bias": np.ones(512, np.float32), "logit_scale": np.asarray(2, np.float32)}
    numbers = {"vision_model.embeddings.position_ids": np.arange(50)[None]}
    safetensors.numpy.save_file(checkpoint(golden, name) | text | numbers, tmp_path / "model.safetensors")
    fields = configs.default.get_config()
    fields.update(backbone="clip_vit_b32", backbone_weights=str(tmp_path / "model.safetensors"), bits=16)
    schema.validate(fields)
    encoder, params, frozen, _ = build.encoder(fields)
    features = jax.jit(encoder.features)(params, frozen, transformer_inputs.images(224, 224))
    np.testing.assert_allclose(features, golden[f"{name}_224_224"], rtol=0, atol=1e-4)


def test_an_encoder_takes_images_of_bytes(monkeypatch):
    monkeypatch.setitem(registry.BACKBONES, "dinov2_small", shallow("dinov2_small"))
    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0), backbone="dinov2_small", bits=16, image_size=28, pretrained=False
    )
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    features = plain_features(encoder, params, frozen, images)
    assert features.shape == (3, 384)
    assert np.std(features, axis=0).max() > 1e-3
    assert packed_of_features(encoder, params, features).shape == (3, 2)


def test_a_size_of_no_whole_patches_is_refused_early():
    with pytest.raises(ValueError, match="image_size: 100 is not a multiple of 14, the side of the patches that dino"):
        cib.create_encoder(jax.random.key(0), backbone="dinov2_small", bits=16, image_size=100, pretrained=False)
    fields = configs.default.get_config()
    fields.update(backbone="clip_vit_b32", image_size=250)
    with pytest.raises(ConfigError, match=r"config.image_size: 250 is not a multiple of 32, .*; try 256$"):
        schema.validate(fields)
    fields.image_size = 16
    with pytest.raises(ConfigError, match=r"16 is too small for clip_vit_b32, which takes 32 pixels or more"):
        schema.validate(fields)

"""The image towers of CLIP and SigLIP against PyTorch's `transformers`, with the same random weights on both sides."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import safetensors.numpy

import configs.folder
from cib_jax.config import build, schema
from cib_jax.errors import ConfigError
from cib_jax.models import clip, registry
from cib_jax.models.registry import Backbone
from cib_jax.models.state_dict import MismatchError
from tests.golden import transformer_inputs
from tests.models.conftest import compiled, same_shapes

NAMES = ("clip_vit_b32", "clip_vit_b16", "siglip_base")


def get(name: str) -> Backbone:
    """A registered backbone, or one with two blocks."""
    if not name.endswith("_shallow"):
        return registry.get(name)
    network, design, convert = {
        "clip_vit_b32_shallow": (clip.CLIP, clip.B32, clip.convert_clip),
        "siglip_base_shallow": (clip.SigLIP, clip.SIGLIP_B16, clip.convert_siglip),
    }[name]
    design = design._replace(depth=transformer_inputs.SHALLOW)
    return dataclasses.replace(
        registry.get(name.removesuffix("_shallow")),
        build=lambda rngs, size: network(rngs, design),
        convert=functools.partial(convert, design=design),
    )


@pytest.mark.parametrize(
    ("name", "size"),
    [
        # At 224 px, CLIP is compared by `test_a_local_file_with_both_towers_goes_through_the_config`.
        ("clip_vit_b32_shallow", (320, 256)),
        ("siglip_base_shallow", (112, 160)),
        *(
            pytest.param(name, size, marks=pytest.mark.slow)
            for name in NAMES
            for size in transformer_inputs.SIZES[name]
        ),
    ],
)
def test_features_match_pytorch(golden_transformers, name, size):
    """On oblong images, with another grid than the one for which positions were learned."""
    backbone = get(name)
    state = backbone.convert(transformer_inputs.checkpoint(golden_transformers, name, backbone.reads))
    ours = compiled(backbone)(state, transformer_inputs.images(*size))
    np.testing.assert_allclose(ours, golden_transformers[f"{name}_{size[0]}_{size[1]}"], rtol=0, atol=1e-4)


def zeros(golden, name: str) -> dict[str, np.ndarray]:
    """The published file without its text tower."""
    shapes = transformer_inputs.shapes_in_file(golden, name)
    prefixes = registry.get(name).reads
    return {key: np.broadcast_to(np.float32(0), s) for key, s in shapes.items() if key.startswith(prefixes)}


@pytest.mark.parametrize("name", NAMES)
def test_the_published_names_and_shapes_become_the_module_s(golden_transformers, name, shapes_of):
    assert same_shapes(registry.get(name).convert(zeros(golden_transformers, name)), shapes_of(name)[1])


def test_clip_and_siglip_are_distinguished(golden_transformers):
    tensors = zeros(golden_transformers, "clip_vit_b16")
    with pytest.raises(MismatchError, match=r"missing: .*patch_embedding.bias, .*head.probe, .* and 9 more;"):
        clip.convert_siglip(tensors, clip.SIGLIP_B16)
    with pytest.raises(MismatchError, match=r"patch_embedding.weight \[768, 3, 16, 16\]"):
        clip.convert_clip(tensors, clip.B32)


def test_a_local_file_with_both_towers_goes_through_the_config(golden_transformers, tmp_path, monkeypatch):
    """As published: with the text tower, CLIP's numbers of positions, and a scalar."""
    name = "clip_vit_b32_shallow"
    backbone = get(name)
    monkeypatch.setitem(registry.BACKBONES, "clip_vit_b32", backbone)
    tensors = transformer_inputs.checkpoint(golden_transformers, name, backbone.reads)
    text = {"text_model.final_layer_norm.bias": np.ones(512, np.float32), "logit_scale": np.asarray(2, np.float32)}
    numbers = {"vision_model.embeddings.position_ids": np.arange(50)[None]}
    safetensors.numpy.save_file(tensors | text | numbers, tmp_path / "model.safetensors")
    fields = configs.folder.get_config()
    fields.update(backbone="clip_vit_b32", backbone_weights=str(tmp_path / "model.safetensors"), bits=16)
    schema.validate(fields)
    encoder, params, frozen, _ = build.encoder(fields)
    features = jax.jit(encoder.features)(params, frozen, transformer_inputs.images(224, 224))
    np.testing.assert_allclose(features, golden_transformers[f"{name}_224_224"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("size", "reason"), [(250, "256"), (16, "32 pixels")])
def test_a_size_that_is_not_whole_patches_is_refused_in_a_config(size, reason):
    fields = configs.folder.get_config()
    fields.update(backbone="clip_vit_b32", image_size=size)
    with pytest.raises(ConfigError, match=rf"image_size.*{reason}"):
        schema.validate(fields)

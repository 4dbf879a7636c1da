"""The parts of vision transformers: attention in float64, positions against PyTorch, and tiny networks as a whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cib_jax.models import clip, dinov2, vit
from tests.golden import transformer_inputs

DESIGN = vit.Design(patch=4, grid=3, width=32, heads=2, epsilon=1e-6, activation=vit.gelu, depth=1, layer_scale=True)
FAMILIES = {
    "clip": lambda rngs: clip.CLIP(rngs, DESIGN._replace(first_norm=True)),
    "dinov2": lambda rngs: dinov2.DINOv2(rngs, DESIGN._replace(registers=2, antialias=True)),
    "siglip": lambda rngs: clip.SigLIP(rngs, DESIGN._replace(class_token=False)),
}
IMAGES = transformer_inputs.images(16, 12)


@functools.cache
def tiny(family: str):
    """A compiled network and random weights, large enough that images differ."""
    graph, state = nnx.split(nnx.eval_shape(lambda: FAMILIES[family](nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), state)
    return jax.jit(lambda state, images: nnx.merge(graph, state)(images)), state


def test_attention_is_a_weighted_mean():
    """Against loops over images, heads and queries in float64."""
    queries, keys, values = (np.random.default_rng(i).standard_normal((2, 3 + (i > 0), 6)) for i in range(3))
    expected = np.zeros_like(queries)
    for image, head, query in np.ndindex(2, 3, 3):
        own = slice(2 * head, 2 * head + 2)
        weights = np.exp(keys[image, :, own] @ queries[image, query, own] / np.sqrt(2))
        expected[image, query, own] = weights @ values[image, :, own] / weights.sum()
    ours = vit.attend(*(jnp.float32(x) for x in (queries, keys, values)), 3)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_do_not_influence_one_another(family):
    apply, state = tiny(family)
    first, second = apply(state, IMAGES)
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_allclose(apply(state, IMAGES[::-1]), [second, first], atol=1e-5)
    np.testing.assert_allclose(apply(state, np.stack([IMAGES[0], IMAGES[1] + 1]))[0], first, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_bfloat16_and_close(family):
    apply, state = tiny(family)
    single = apply(state, IMAGES)
    half = apply(jax.tree.map(jnp.bfloat16, state), jnp.bfloat16(IMAGES))
    assert half.dtype == jnp.bfloat16
    assert jnp.linalg.norm(half - single) < 0.03 * jnp.linalg.norm(single)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_parameter(family, monkeypatch):
    """Except the biases of keys, which move all logits of a query alike; images are computed one by one."""
    monkeypatch.setattr(vit, "CHUNK_TOKENS", 12)
    apply, state = tiny(family)
    gradients = jax.jit(jax.grad(lambda state: jnp.sum(jnp.sin(apply(state, IMAGES)))))(state)
    for path, gradient in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(gradients)):
        names = [key.key for key in path]
        assert np.isfinite(gradient).all()
        assert names[-2:] == ["key", "bias"] or np.abs(gradient).max() > 1e-4, names


@pytest.mark.parametrize(("height", "width"), [(16, 14), (14, 16)])
def test_images_that_are_not_whole_patches_are_refused(height, width):
    apply, state = tiny("dinov2")
    with pytest.raises(ValueError, match=f"multiples of 4 .*{height} × {width}"):
        apply(state, jnp.zeros((1, height, width, 3)))


@pytest.mark.parametrize("size", transformer_inputs.GRIDS)
@pytest.mark.parametrize("antialias", [False, True])
def test_interpolation_matches_torch(size, antialias, golden_transformers):
    ours = vit.interpolate(jnp.asarray(transformer_inputs.grid()), *size, antialias=antialias)
    np.testing.assert_allclose(ours, golden_transformers[f"grid_{size[0]}_{size[1]}_{antialias}"], atol=2e-6)


@pytest.mark.parametrize("antialias", [False, True])
def test_a_grid_of_the_right_size_is_unchanged(antialias):
    """And the interpolation to this size is the identity."""
    grid = jnp.asarray(transformer_inputs.grid())
    np.testing.assert_array_equal(vit.interpolate(grid, 5, 5, antialias=antialias), grid)
    np.testing.assert_allclose(vit.bicubic(5, 5, antialias=antialias), np.eye(5), atol=1e-15)


@pytest.mark.parametrize("antialias", [False, True])
def test_a_constant_grid_is_constant_at_other_sizes(antialias):
    """Each row of the matrix sums to 1."""
    for outputs in (1, 2, 7, 40):
        np.testing.assert_allclose(vit.bicubic(13, outputs, antialias=antialias).sum(1), 1, atol=1e-12)

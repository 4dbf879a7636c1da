"""Winograd's forms against correlations by SciPy in float64, and their gradients against the plain convolution's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st

from cib_jax.models import conv

SIDES = sorted(conv.POINTS)
PAD = st.integers(0, 2)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def correlate(x: np.ndarray, kernel: np.ndarray, pads) -> np.ndarray:
    """Each image with each output's kernel, which spans all channels."""
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    maps = [
        [scipy.signal.correlate(image, kernel[..., o], "valid", "direct")[..., 0] for o in range(kernel.shape[-1])]
        for image in x
    ]
    return np.moveaxis(np.asarray(maps), 1, -1)


@pytest.mark.parametrize("side", SIDES)
def test_transforms_give_a_correlation(side):
    """Y = Aᵀ [(G g) ⊙ (Bᵀ d)], equation 6 of the paper, in float64."""
    output, weights, data = conv.transforms(side)
    d, g = draw(0, side + 2), draw(1, 3)
    np.testing.assert_allclose(output @ ((weights @ g) * (data @ d)), np.correlate(d, g, "valid"), atol=1e-13)


def test_the_small_transforms_are_the_published_ones():
    """Section 4.1 of the paper, up to the sign of each product, which it is free to choose."""
    output, weights, data = conv.transforms(2)
    np.testing.assert_array_equal(np.abs(output), [[1, 1, 1, 0], [0, 1, 1, 1]])
    np.testing.assert_array_equal(np.abs(weights), [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0, 1]])
    np.testing.assert_array_equal(np.abs(data), [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]])


@pytest.mark.parametrize("side", SIDES)
@given(height=st.integers(1, 11), width=st.integers(1, 11), pads=st.tuples(*[PAD] * 4), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_any_size_matches_scipy(side, height, width, pads, seed):
    top, bottom, left, right = pads
    pads = (top, bottom + max(0, 3 - height - top - bottom)), (left, right + max(0, 3 - width - left - right))
    x, kernel = draw(seed, 2, height, width, 3), draw(seed + 1, 3, 3, 3, 2)
    ours = jax.jit(functools.partial(conv.convolve, pads=pads, side=side))(jnp.float32(x), jnp.float32(kernel))
    expected = correlate(x, kernel, pads)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=5e-5)


@pytest.mark.parametrize(("side", "bound"), [(2, 2e-6), (4, 1e-5)])
def test_rounding_errors_stay_small_over_many_channels(side, bound):
    """Relative to the largest output, with weights as in a network."""
    x, kernel = np.maximum(draw(0, 1, 12, 12, 256), 0), draw(1, 3, 3, 256, 4) / 48
    ours = conv.convolve(jnp.float32(x), jnp.float32(kernel), ((1, 1), (1, 1)), side)
    expected = correlate(x, kernel, ((1, 1), (1, 1)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=bound * np.abs(expected).max())


@pytest.mark.parametrize("side", SIDES)
def test_gradients_equal_the_plain_form_s(side):
    """Under jit, and under vmap over a further axis."""
    x, kernel, pads = jnp.float32(draw(0, 2, 1, 5, 6, 3)), jnp.float32(draw(1, 3, 3, 3, 4)), ((1, 1), (1, 1))

    def gradient(form):
        return jax.grad(lambda x, k: jnp.sum(jnp.sin(form(x, k))), argnums=(0, 1))

    forms = (
        functools.partial(conv.convolve, pads=pads, side=side),
        functools.partial(conv.conv_plain, stride=1, pads=pads),
    )
    ours, theirs = (jax.jit(jax.vmap(gradient(form), (0, None)))(x, kernel) for form in forms)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
def test_bfloat16_stays_bfloat16(side):
    x, kernel = draw(0, 1, 6, 6, 64), draw(1, 3, 3, 64, 4) / 24
    ours = conv.convolve(jnp.bfloat16(x), jnp.bfloat16(kernel), ((1, 1), (1, 1)), side)
    assert ours.dtype == jnp.bfloat16
    expected = correlate(x, kernel, ((1, 1), (1, 1)))
    error = np.asarray(ours, np.float64) - expected
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(expected)

"""Color operations against torchvision's float path (golden/augment.npz, by golden/make_augment.py)."""

import functools
import itertools
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as npst
from scipy import stats

from cib_jax.augment import color

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "augment.npz")
# Compiled whole, as eagerly each of their steps would be compiled alone, for every new shape.
color_jitter = jax.jit(color.color_jitter)
adjust_hue = jax.jit(color.adjust_hue)
gaussian_blur = jax.jit(color.gaussian_blur)
SMALL = npst.arrays(np.float32, (2, 3, 4, 3), elements=st.floats(0, 1, width=32))


def grid(images, values):
    """Every image under every value, as one batch [values, images]; the operations take any batch axes."""
    images = jnp.broadcast_to(jnp.asarray(images), (len(values), *images.shape))
    return images, jnp.broadcast_to(jnp.asarray(values, jnp.float32)[:, None], images.shape[:2])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_adjustments_match_torchvision(name):
    values = GOLDEN["shifts" if name == "hue" else "factors"]
    images, values = grid(GOLDEN["images"][:3], values)
    got = jax.jit(getattr(color, f"adjust_{name}"))(images, values)
    np.testing.assert_allclose(got, GOLDEN[name], atol=2e-6)


def test_to_grayscale_matches_torchvision():
    images = jnp.asarray(GOLDEN["images"])
    np.testing.assert_allclose(color.to_grayscale(images), GOLDEN["grayscale"], atol=1e-6)
    chosen = jnp.array([True, False, True, False, False, True])
    expected = np.where(chosen[:, None, None, None], GOLDEN["grayscale"], images)
    np.testing.assert_allclose(color.to_grayscale(images, chosen), expected, atol=1e-6)


def test_gaussian_blur_matches_torchvision():
    images, sigmas = grid(GOLDEN["images"][:2], GOLDEN["sigmas"])
    np.testing.assert_allclose(gaussian_blur(images, sigmas), GOLDEN["blur"], atol=1e-6)


def test_gaussian_blur_of_nothing_changes_no_bit():
    images = jnp.asarray(GOLDEN["images"])
    np.testing.assert_array_equal(gaussian_blur(images, jnp.zeros(6)), images)


def test_color_jitter_matches_torchvision_in_every_order():
    """All 24 orders in one batch, against torchvision's four functions called one after the other."""
    factors = jnp.asarray(GOLDEN["jitter_factors"])
    jitter = color.ColorJitter(jnp.asarray(GOLDEN["jitter_orders"]), factors[:, :3], factors[:, 3])
    assert {tuple(order) for order in GOLDEN["jitter_orders"].tolist()} == set(itertools.permutations(range(4)))
    images = jnp.tile(jnp.asarray(GOLDEN["jitter_images"]), (8, 1, 1, 1))
    np.testing.assert_allclose(color_jitter(images, jitter), GOLDEN["jitter"], atol=1e-5)


def test_color_jitter_by_one_changes_nothing():
    """Factors 1 and hue 0 are what an image that was not drawn gets."""
    orders = jnp.asarray(GOLDEN["jitter_orders"])
    jitter = color.ColorJitter(orders, jnp.ones((24, 3)), jnp.zeros(24))
    images = jnp.tile(jnp.asarray(GOLDEN["jitter_images"]), (8, 1, 1, 1))
    np.testing.assert_allclose(color_jitter(images, jitter), images, atol=1e-6)


def test_jitter_leaves_a_margin_out_and_grays_last():
    """Whatever stands in the margin; and grayscale comes after all four operations."""
    factors = jnp.asarray(GOLDEN["jitter_factors"])
    jitter = color.ColorJitter(jnp.asarray(GOLDEN["jitter_orders"]), factors[:, :3], factors[:, 3])
    chosen = jnp.arange(24) % 2 == 0
    images = jnp.tile(jnp.asarray(GOLDEN["jitter_images"]), (8, 1, 1, 1))
    rows = jnp.pad(color.to_rows(images), ((0, 0), (1, 1), (0, 0), (1, 1)), constant_values=0.9)
    got = jax.jit(color.jitter_rows, static_argnames="margin")(rows, jitter, chosen, margin=1)
    expected = color.to_grayscale(jnp.asarray(GOLDEN["jitter"]), chosen)
    np.testing.assert_allclose(color.to_images(got[:, 1:-1, :, 1:-1]), expected, atol=1e-5)
    alone = functools.partial(color.jitter_alone, margin=1)
    one_by_one = jax.jit(lambda *drawn: jax.lax.map(lambda one: alone(*one), drawn))
    got = one_by_one(*jax.tree.map(lambda values: values[:, None], (rows, jitter, chosen)))[:, 0]
    np.testing.assert_allclose(color.to_images(got[:, 1:-1, :, 1:-1]), expected, atol=1e-5)


def test_sampled_jitter_is_uniform():
    """All 24 orders equally often (χ²), factors and hue uniform (Kolmogorov–Smirnov), none tied."""
    keys = jax.random.split(jax.random.key(0), 4800)
    jitter = jax.jit(
        jax.vmap(lambda key: color.sample_color_jitter(key, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1))
    )(keys)
    orders, counts = np.unique(jitter.order, axis=0, return_counts=True)
    assert {tuple(order) for order in orders.tolist()} == set(itertools.permutations(range(4)))
    assert stats.chisquare(counts).pvalue > 1e-3
    columns = [*np.asarray(jitter.factors - 1).T, np.asarray(jitter.hue)]
    for values, strength in zip(columns, (0.4, 0.3, 0.2, 0.1), strict=True):
        assert stats.kstest(values, stats.uniform(-strength, 2 * strength).cdf).pvalue > 1e-3
    correlation = np.corrcoef([*columns, *np.asarray(jitter.order[:, :3]).T])
    assert np.abs(correlation[:4, 4:]).max() < 0.06
    assert np.abs(correlation[:4, :4] - np.eye(4)).max() < 0.06


@hypothesis.given(images=SMALL, shift=st.floats(-0.5, 0.5, width=32))
def test_hue_keeps_value_and_chroma(images, shift):
    got = np.asarray(adjust_hue(jnp.asarray(images), jnp.full(2, shift)))
    np.testing.assert_allclose(got.max(-1), images.max(-1), atol=2e-6)
    np.testing.assert_allclose(got.min(-1), images.min(-1), atol=2e-6)


@hypothesis.given(images=SMALL)
def test_a_third_of_a_turn_moves_the_channels_round(images):
    """Red becomes green, green blue, blue red."""
    got = adjust_hue(jnp.asarray(images), jnp.full(2, 1 / 3))
    np.testing.assert_allclose(got, np.roll(images, 1, axis=-1), atol=3e-6)


@hypothesis.given(
    images=SMALL,
    factors=npst.arrays(np.float32, (2, 3), elements=st.floats(0, 4, width=32)),
    order=st.permutations(range(4)),
    hue=st.floats(-0.5, 0.5, width=32),
)
def test_color_jitter_stays_in_range(images, factors, order, hue):
    jitter = color.ColorJitter(jnp.array([order, order[::-1]]), jnp.asarray(factors), jnp.full(2, hue))
    got = np.asarray(color_jitter(jnp.asarray(images), jitter))
    assert got.shape == images.shape
    assert np.isfinite(got).all()
    assert got.min() >= -2e-6
    assert got.max() <= 1 + 2e-6


@hypothesis.given(images=SMALL, sigma=st.floats(0, 10, width=32))
def test_blur_averages(images, sigma):
    got = np.asarray(gaussian_blur(jnp.asarray(images), jnp.full(2, sigma)))
    assert got.min() >= images.min() - 1e-6
    assert got.max() <= images.max() + 1e-6

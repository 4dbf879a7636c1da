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
OPERATIONS = {"brightness": color.BRIGHTNESS, "contrast": color.CONTRAST, "saturation": color.SATURATION}
BATCH_FORMS = {"rows": color.jitter_rows, "planes": color.jitter_planes}
FORMS = [*BATCH_FORMS, "one by one"]
IMAGES = np.tile(GOLDEN["images"][:3], (5, 1, 1, 1))
SMALL = npst.arrays(np.float32, (2, 3, 4, 3), elements=st.floats(0, 1, width=32))


def swap(images):
    """Images to rows, and rows to images."""
    return np.swapaxes(images, -1, -2)


@functools.cache
def jitter_form(form, margin):
    if form in BATCH_FORMS:
        return jax.jit(functools.partial(BATCH_FORMS[form], margin=margin))

    def one_by_one(*drawn):
        alone = jax.tree.map(lambda values: values[:, None], drawn)
        return jax.lax.map(lambda one: color.jitter_one(*one, margin=margin), alone)[:, 0]

    return jax.jit(one_by_one)


def jitter(images, order, factors, hue, grayscale=False, form="rows", margin=0):
    """The jitter of a batch of images; parameters are broadcast to it."""
    count = len(images)
    drawn = color.ColorJitter(
        np.broadcast_to(np.int32(order), (count, 4)),
        np.broadcast_to(np.float32(factors), (count, 3)),
        np.broadcast_to(np.float32(hue), count),
    )
    rows = jitter_form(form, margin)(swap(np.float32(images)), drawn, np.broadcast_to(grayscale, count))
    return swap(np.asarray(rows))


BLURS = [jax.jit(color.blur_rows), jax.jit(color.blur_rows_by_products)]


def blur(images, sigma, form=BLURS[0]):
    padded = np.pad(np.float32(images), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    return swap(np.asarray(form(swap(padded), np.broadcast_to(np.float32(sigma), len(images)))))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_adjustments_match_torchvision(name, form):
    """Every image under every factor; the other operations change nothing."""
    factors = np.ones((15, 3))
    factors[:, OPERATIONS[name]] = np.repeat(GOLDEN["factors"], 3)
    adjusted = jitter(IMAGES, range(4), factors, 0.0, form=form)
    np.testing.assert_allclose(adjusted, GOLDEN[name].reshape(IMAGES.shape), atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_hue_matches_torchvision(form):
    adjusted = jitter(IMAGES, range(4), 1.0, np.repeat(GOLDEN["shifts"], 3), form=form)
    np.testing.assert_allclose(adjusted, GOLDEN["hue"].reshape(IMAGES.shape), atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_grayscale_matches_torchvision(form):
    images, chosen = np.tile(GOLDEN["images"], (3, 1, 1, 1))[:15], np.arange(15) % 2 == 0
    expected = np.where(chosen[:, None, None, None], np.tile(GOLDEN["grayscale"], (3, 1, 1, 1))[:15], images)
    np.testing.assert_allclose(jitter(images, range(4), 1.0, 0.0, chosen, form=form), expected, atol=1e-6)


def test_brightness_of_images_in_any_layout():
    adjusted = color.adjust_brightness(jnp.asarray(GOLDEN["images"][:3]), jnp.full(3, GOLDEN["factors"][3]))
    np.testing.assert_allclose(adjusted, GOLDEN["brightness"][3], atol=2e-6)


@pytest.mark.parametrize("form", BLURS, ids=["sums", "products"])
def test_blur_matches_torchvision(form):
    images = np.broadcast_to(GOLDEN["images"][:2], GOLDEN["blur"].shape).reshape(6, 12, 16, 3)
    blurred = blur(images, np.repeat(GOLDEN["sigmas"], 2), form)
    np.testing.assert_allclose(blurred, GOLDEN["blur"].reshape(images.shape), atol=1e-6)


@pytest.mark.parametrize("form", BLURS, ids=["sums", "products"])
def test_blur_of_width_zero_changes_no_bit(form):
    np.testing.assert_array_equal(blur(GOLDEN["images"], 0.0, form), GOLDEN["images"])


@pytest.mark.parametrize("form", FORMS)
def test_jitter_matches_torchvision_in_every_order(form):
    """All 24 orders, against torchvision's functions called one after the other, with a margin that does not count.

    Half of the images lose their colors after all four operations.
    """
    orders, strengths = GOLDEN["jitter_orders"], GOLDEN["jitter_factors"]
    assert {tuple(order) for order in orders.tolist()} == set(itertools.permutations(range(4)))
    images, gray = np.tile(GOLDEN["jitter_images"], (8, 1, 1, 1)), np.arange(24) % 2 == 0
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.9)
    jittered = jitter(padded, orders, strengths[:, :3], strengths[:, 3], gray, form=form, margin=1)[:, 1:-1, 1:-1]
    without_colors = np.repeat((GOLDEN["jitter"] @ np.array([0.2989, 0.587, 0.114]))[..., None], 3, -1)
    expected = np.where(gray[:, None, None, None], without_colors, GOLDEN["jitter"])
    np.testing.assert_allclose(jittered, expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_jitter_by_one_changes_nothing(form):
    """Factors 1 and hue 0 are those of an image that is not jittered."""
    images = np.tile(GOLDEN["jitter_images"], (8, 1, 1, 1))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    unchanged = jitter(padded, GOLDEN["jitter_orders"], 1.0, 0.0, form=form, margin=1)[:, 1:-1, 1:-1]
    np.testing.assert_allclose(unchanged, images, atol=1e-6)


def test_sampled_jitter_is_uniform():
    """All 24 orders equally often (χ²), factors and hue uniform (Kolmogorov–Smirnov), none tied."""
    keys = jax.random.split(jax.random.key(0), 4800)
    drawn = jax.jit(
        jax.vmap(lambda key: color.sample_color_jitter(key, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1))
    )(keys)
    orders, counts = np.unique(drawn.order, axis=0, return_counts=True)
    assert {tuple(order) for order in orders.tolist()} == set(itertools.permutations(range(4)))
    assert stats.chisquare(counts).pvalue > 1e-3
    columns = [*np.asarray(drawn.factors - 1).T, np.asarray(drawn.hue)]
    for values, strength in zip(columns, (0.4, 0.3, 0.2, 0.1), strict=True):
        assert stats.kstest(values, stats.uniform(-strength, 2 * strength).cdf).pvalue > 1e-3
    correlation = np.corrcoef([*columns, *np.asarray(drawn.order[:, :3]).T])
    assert np.abs(correlation[:4, 4:]).max() < 0.06
    assert np.abs(correlation[:4, :4] - np.eye(4)).max() < 0.06


@hypothesis.given(images=SMALL, shift=st.floats(-0.5, 0.5, width=32))
def test_hue_keeps_value_and_chroma(images, shift):
    moved = jitter(images, range(4), 1.0, shift)
    np.testing.assert_allclose(moved.max(-1), images.max(-1), atol=2e-6)
    np.testing.assert_allclose(moved.min(-1), images.min(-1), atol=2e-6)


@hypothesis.given(images=SMALL)
def test_a_third_of_a_turn_rotates_the_channels(images):
    """Red becomes green, green blue, blue red."""
    np.testing.assert_allclose(jitter(images, range(4), 1.0, 1 / 3), np.roll(images, 1, axis=-1), atol=3e-6)


@hypothesis.given(
    images=SMALL,
    factors=npst.arrays(np.float32, (2, 3), elements=st.floats(0, 4, width=32)),
    order=st.permutations(range(4)),
    hue=st.floats(-0.5, 0.5, width=32),
)
def test_jitter_stays_in_range(images, factors, order, hue):
    jittered = jitter(images, [order, order[::-1]], factors, hue)
    assert jittered.shape == images.shape
    assert np.isfinite(jittered).all()
    assert jittered.min() >= -2e-6
    assert jittered.max() <= 1 + 2e-6


@hypothesis.given(images=SMALL, sigma=st.floats(0, 10, width=32))
def test_blur_averages(images, sigma):
    blurred = blur(images, sigma)
    assert blurred.min() >= images.min() - 1e-6
    assert blurred.max() <= images.max() + 1e-6

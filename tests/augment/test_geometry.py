"""Crops, resizing and warps against torchvision and SciPy (golden/augment.npz, by golden/make_augment.py)."""

import functools
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cib_jax.augment import geometry

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "augment.npz")
# Compiled whole, as eagerly each of their steps would be compiled alone, for every new shape.
resized_crop = jax.jit(geometry.resized_crop, static_argnames="image_size")
resize = jax.jit(geometry.resize, static_argnames="image_size")
warp = jax.jit(geometry.warp, static_argnames="image_size")
SHAPES = ((32, 32), (24, 40), (6, 7), (20, 1), (1, 20), (1, 1), (5, 2))


def crops(boxes) -> geometry.Crop:
    return geometry.Crop(*jnp.asarray(boxes, jnp.int32).T)


def affines(rows) -> geometry.Affine:
    rows = jnp.asarray(rows)
    return geometry.Affine(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:])


def draw_crops(key, number, height, width) -> np.ndarray:
    def one(key):
        return geometry.sample_crop(key, height=height, width=width, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3))

    return np.stack(jax.jit(jax.vmap(one))(jax.random.split(key, number)), axis=-1)


@pytest.mark.parametrize("size", GOLDEN["sizes"].tolist())
def test_resized_crop_matches_torchvision(size):
    """Against resized_crop(antialias=True), shrinking and growing, crops down to one pixel; and hflip."""
    images, boxes = jnp.asarray(GOLDEN["images"]), crops(GOLDEN["crops"])
    plain = resized_crop(images, boxes, image_size=size)
    np.testing.assert_allclose(plain, GOLDEN[f"crop_{size}"], atol=1e-5)
    flipped = resized_crop(images, boxes, image_size=size, flip=jnp.ones(6, bool))
    np.testing.assert_allclose(flipped, GOLDEN[f"crop_flipped_{size}"], atol=1e-5)


def test_resized_crop_flips_only_the_chosen():
    images, boxes = jnp.asarray(GOLDEN["images"]), crops(GOLDEN["crops"])
    flip = jnp.array([True, False, False, True, True, False])
    got = resized_crop(images, boxes, image_size=9, flip=flip)
    expected = np.where(flip[:, None, None, None], GOLDEN["crop_flipped_9"], GOLDEN["crop_9"])
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("size", GOLDEN["sizes"].tolist())
def test_rows_have_two_forms_with_the_same_values(size):
    """The CPU's sum of a few rows, which the tests against torchvision see, and the accelerators' product."""
    images, boxes = jnp.swapaxes(jnp.asarray(GOLDEN["images"]), -1, -2), crops(GOLDEN["crops"])
    axis = geometry.resized_axis(boxes.top, boxes.height, jnp.zeros(6, bool), size, margin=1)
    taps = geometry.tap_count(images.shape[1], size)
    product = jax.jit(geometry.rows_by_product)(images, axis)
    by_taps = jax.jit(geometry.rows_by_taps, static_argnames="taps")(images, axis, taps=taps)
    np.testing.assert_allclose(by_taps, product, atol=1e-6)


def test_images_that_shrink_a_lot():
    """Beyond the number of rows that are added up one by one."""
    images = np.random.default_rng(0).random((2, 60, 60, 3), np.float32)
    got = resize(jnp.asarray(images), image_size=5)
    assert geometry.MAX_TAPS < 2 * 60 / 5
    triangle = np.maximum(1 - np.abs(np.arange(60) + 0.5 - (np.arange(5)[:, None] + 0.5) * 12) / 12, 0)
    triangle /= triangle.sum(1, keepdims=True)
    np.testing.assert_allclose(got, np.einsum("yh,xw,bhwc->byxc", triangle, triangle, images), atol=1e-6)


@pytest.mark.parametrize("size", [2, 9])
def test_a_margin_reflects_the_crop(size):
    images, boxes = jnp.asarray(GOLDEN["images"]), crops(GOLDEN["crops"])
    flip = jnp.array([True, False, False, True, True, False])
    crop = functools.partial(geometry.resized_crop_rows, image_size=size, margin=1)
    got = jax.jit(crop)(images, boxes, flip=flip)
    expected = np.swapaxes(resized_crop(images, boxes, image_size=size, flip=flip), -1, -2)
    expected = np.pad(expected, ((0, 0), (1, 1), (0, 0), (1, 1)), mode="reflect")
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("size", GOLDEN["sizes"].tolist())
def test_resize_matches_torchvision(size):
    got = resize(jnp.asarray(GOLDEN["images"]), image_size=size)
    np.testing.assert_allclose(got, GOLDEN[f"resize_{size}"], atol=1e-5)


def test_resizing_to_the_same_size_changes_nothing():
    images = GOLDEN["images"][:, :, :12]
    np.testing.assert_allclose(resize(jnp.asarray(images), image_size=12), images, atol=1e-7)


def test_pixels_outside_the_crop_do_not_count():
    images = np.array(GOLDEN["images"][:1])
    images[:, 4:, :] = images[:, :, 9:] = np.nan
    box = crops([[0, 0, 4, 9]])
    with np.errstate(invalid="ignore"):
        painted = np.where(np.isnan(images), 1e6, images)
    expected = resized_crop(jnp.asarray(np.nan_to_num(images)), box, image_size=6)
    np.testing.assert_array_equal(resized_crop(jnp.asarray(painted), box, image_size=6), expected)


@hypothesis.given(
    box=st.tuples(st.integers(0, 6), st.integers(0, 8), st.integers(1, 7), st.integers(1, 9)),
    level=st.floats(0, 1, width=32),
)
def test_an_even_image_stays_even(box, level):
    top, left, height, width = box
    hypothesis.assume(top + height <= 7 and left + width <= 9)
    got = resized_crop(jnp.full((1, 7, 9, 3), level), crops([box]), image_size=5)
    np.testing.assert_allclose(got, level, atol=1e-6)


@pytest.mark.parametrize("height, width", SHAPES)
def test_sample_crop_is_distributed_as_torchvisions(height, width):
    """Two-sample Kolmogorov–Smirnov tests on area, ratio and place; thin images act on the fallback."""
    reference = GOLDEN[f"drawn_crops_{height}x{width}"].astype(int)
    drawn = draw_crops(jax.random.key(0), 4000, height, width)
    assert (drawn[:, :2] >= 0).all()
    assert (drawn[:, 2:] >= 1).all()
    assert (drawn[:, 0] + drawn[:, 2] <= height).all()
    assert (drawn[:, 1] + drawn[:, 3] <= width).all()
    for name, figure in {
        "area": lambda c: c[:, 2] * c[:, 3],
        "ratio": lambda c: c[:, 3] / c[:, 2],
        "top": lambda c: c[:, 0],
        "left": lambda c: c[:, 1],
        "bottom margin": lambda c: height - c[:, 0] - c[:, 2],
        "place and shape": lambda c: c @ [1, 100, 10_000, 1_000_000],
    }.items():
        assert stats.ks_2samp(figure(drawn), figure(reference)).pvalue > 1e-3, name


def test_the_fallback_is_torchvisions():
    """Where nothing fits, there is one crop, and torchvision's draws hold it alone."""
    for height, width in ((20, 1), (1, 20)):
        (expected,) = np.unique(GOLDEN[f"drawn_crops_{height}x{width}"], axis=0)
        np.testing.assert_array_equal(draw_crops(jax.random.key(1), 8, height, width), [expected] * 8)


def test_warp_matches_torchvision():
    """Against torchvision's affine, which keeps the size."""
    image = jnp.asarray(GOLDEN["images"][:1, :, 2:14])
    rows = GOLDEN["affines"]
    got = warp(jnp.repeat(image, len(rows), 0), affines(rows), image_size=12)
    np.testing.assert_allclose(got, GOLDEN["affine_torchvision"], atol=2e-5)


def test_warp_matches_scipy():
    """Against ndimage.affine_transform in float64, stretching 12 × 16 to 20 × 20 in the same look-up."""
    rows = GOLDEN["affines"]
    images = jnp.repeat(jnp.asarray(GOLDEN["images"][:1]), len(rows), 0)
    np.testing.assert_allclose(warp(images, affines(rows), image_size=20), GOLDEN["affine_scipy"], atol=2e-5)


def test_sample_affine_fills_its_ranges():
    keys = jax.random.split(jax.random.key(2), 2000)
    sample = functools.partial(geometry.sample_affine, angle=15.0, shear=10.0, scale=(0.85, 1.15), shift=0.1)
    drawn = jax.jit(jax.vmap(sample))(keys)
    for values, low, high in (
        (drawn.angle, -15, 15),
        (drawn.shear, -10, 10),
        (drawn.scale, 0.85, 1.15),
        (drawn.shift[:, 0], -0.1, 0.1),
        (drawn.shift[:, 1], -0.1, 0.1),
    ):
        assert stats.kstest(np.asarray(values), stats.uniform(low, high - low).cdf).pvalue > 1e-3
    columns = np.stack([drawn.angle, drawn.shear, drawn.scale, *drawn.shift.T])
    correlation = np.corrcoef(columns)[np.triu_indices(5, 1)]
    assert np.abs(correlation).max() < 0.1

"""Views: what is drawn how often, from which key, and that steps run in the paper's order."""

import functools
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as npst
from scipy import stats

from cib_jax.augment import augment, geometry
from cib_jax.errors import UserError
from tests.augment import reference

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "augment.npz")
FAMILIES = ["photo", "digits"]
MANY = 4000
AS_IS = {"mean": (0.0, 0.0, 0.0), "deviation": (1.0, 1.0, 1.0)}


def view(key, images, **options):
    return augment.view_each(augment.image_keys(key, len(images)), images, **options)


FUNCTIONS = {"view": view, "view_each": augment.view_each, "two_views": augment.two_views}


@functools.cache
def jitted(name, size, family, plain=True):
    normalization = AS_IS if plain else {}
    return jax.jit(functools.partial(FUNCTIONS[name], image_size=size, family=family, **normalization))


def noise(batch, height=6, width=5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def share_is(count, probability, total=MANY):
    return stats.binomtest(int(count), total, probability).pvalue > 1e-3


def even_views(color_of_all, key=0) -> np.ndarray:
    """What MANY one-colored images become; crop, flip and blur leave them be. [MANY, 3]."""
    images = np.tile(np.uint8(color_of_all), (MANY, 2, 2, 1))
    views = np.asarray(jitted("view", 2, "photo")(jax.random.key(key), images))
    np.testing.assert_allclose(views, np.broadcast_to(views[:, :1, :1], views.shape), atol=1e-5)
    return views[:, 0, 0]


def test_photo_jitters_and_grays_as_often_as_the_paper():
    """An even image shows both: it keeps its color unless jittered, and is gray only when grayed."""
    original = np.array([200, 120, 40])
    views = even_views(original)
    gray = np.ptp(views, axis=-1) < 1e-6
    assert share_is(gray.sum(), 0.2)
    luma = original @ [0.2989, 0.587, 0.114] / 255
    expected = np.where(gray[:, None], luma, original / 255)
    kept = np.abs(views - expected).max(-1) < 1e-5
    assert share_is(kept.sum(), 0.3)
    assert share_is((kept & gray).sum(), 0.3 * 0.2)


def test_photo_flips_half_the_images():
    ramp = np.tile(np.uint8([0, 60, 120, 180, 240]), (MANY, 5, 1))[..., None].repeat(3, -1)
    views = np.asarray(jitted("view", 5, "photo")(jax.random.key(1), ramp))
    assert share_is((views[:, 2, 0, 0] > views[:, 2, -1, 0]).sum(), 0.5)


@functools.cache
def draws() -> augment.PhotoDraws:
    sample = jax.vmap(functools.partial(augment.sample_photo, height=32, width=32))
    return jax.jit(sample)(augment.image_keys(jax.random.key(2), MANY))


def test_photo_blurs_half_the_images():
    """The width of the blur is uniform where one was drawn."""
    sigma = np.asarray(draws().sigma)
    blurred = sigma > 0
    assert share_is(blurred.sum(), 0.5)
    assert stats.kstest(sigma[blurred], stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3


def crop_area_cdf(area):
    """Of torchvision's crops with a scale of (1/2, 1) and a ratio of (3/4, 4/3), as fractions of a square image.

    An area a is drawn uniformly. It is drawn again if the crop does not fit: its ratio must be from a to 1/a.
    """
    fitting = np.where(area < 0.75, 0.0, area - area * np.log(area) - 0.75 + 0.75 * np.log(0.75)) / np.log(4 / 3)
    return (np.minimum(area, 0.75) - 0.5 + fitting) / (0.25 + (0.25 + 0.75 * np.log(0.75)) / np.log(4 / 3))


def test_photo_draws_as_strongly_as_the_paper():
    """Brightness, contrast and saturation of 0.4, hue of 0.1, crops of (1/2, 1) with ratios of (3/4, 4/3)."""
    jittered = np.asarray(draws().jitter.hue) != 0
    for factors in np.asarray(draws().jitter.factors)[jittered].T:
        assert stats.kstest(factors, stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
    assert stats.kstest(np.asarray(draws().jitter.hue)[jittered], stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-3
    # Sides are rounded to whole pixels, which do not matter in an image of this size.
    sample = jax.vmap(functools.partial(augment.sample_photo, height=10_000, width=10_000))
    crop = jax.jit(sample)(augment.image_keys(jax.random.key(3), MANY)).crop
    height, width = np.asarray(crop.height, float) / 1e4, np.asarray(crop.width, float) / 1e4
    assert stats.kstest(height * width, crop_area_cdf).pvalue > 1e-3
    always_fits = height * width < 0.75
    ratio = np.log(width / height)[always_fits] / np.log(4 / 3)
    assert stats.kstest(ratio, stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_draws_of_a_view_are_independent():
    """Every pair of draws, those of the crop among themselves aside, is uncorrelated over many images."""
    draw = draws()
    jittered = draw.jitter.hue != 0
    others = [draw.flip, jittered, draw.jitter.order[:, 0], draw.grayscale, draw.sigma > 0]
    sizes = [draw.crop.height, draw.crop.width]
    correlation = np.corrcoef(np.array([*others, *sizes], dtype=float))
    correlation = correlation[:5] - np.eye(7)[:5]
    assert np.abs(correlation).max() < 0.07
    factors = np.asarray(draw.jitter.factors)[np.asarray(jittered)]
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.07


def test_photo_runs_its_steps_in_the_papers_order():
    """Image by image, with the color operations in NumPy and float64."""
    images, keys = jnp.asarray(noise(12) / 255, jnp.float32), augment.image_keys(jax.random.key(4), 12)
    views = jitted("view", 4, "photo")(jax.random.key(4), noise(12))
    drawn = jax.jit(jax.vmap(functools.partial(augment.sample_photo, height=6, width=5)))(keys)
    crops = jax.jit(functools.partial(geometry.resized_crop, image_size=4))(images, drawn.crop)
    for i, expected in enumerate(np.asarray(crops, np.float64)):
        draw = jax.tree.map(lambda values, i=i: np.asarray(values[i], np.float64), drawn)
        step = expected[:, ::-1] if draw.flip else expected
        for operation in draw.jitter.order.astype(int):
            step = reference.ADJUST[operation](step, [*draw.jitter.factors, draw.jitter.hue][operation])
        step = reference.to_grayscale(step) if draw.grayscale else step
        step = reference.gaussian_blur(step, draw.sigma) if draw.sigma > 0 else step
        np.testing.assert_allclose(views[i], step, atol=1e-5)


def test_digits_move_and_change_brightness_without_flips():
    """A lopsided blob keeps its side; its gain is uniform in the stated range."""
    blob = np.zeros((MANY, 8, 8, 3), np.uint8)
    blob[:, 2:6, 1:4] = 160
    views = np.asarray(jitted("view", 8, "digits")(jax.random.key(5), blob))
    heaviness = views[..., :4, :].sum((1, 2, 3)) - views[..., 4:, :].sum((1, 2, 3))
    assert (heaviness > 0).mean() > 0.98
    even = np.full((MANY, 8, 8, 3), 160, np.uint8)
    center = np.asarray(jitted("view", 8, "digits")(jax.random.key(5), even))[:, 4, 4, 0]
    assert stats.kstest(center * 255 / 160, stats.uniform(0.7, 0.6).cdf).pvalue > 1e-3


def test_digits_turn_shear_and_scale_as_far_as_stated():
    """±15°, ±10° and 85 to 115%, uniformly."""
    sample = jax.vmap(functools.partial(augment.sample_digits, height=8, width=8))
    affine = jax.jit(sample)(augment.image_keys(jax.random.key(7), MANY)).affine
    for values, low, high in ((affine.angle, -15, 15), (affine.shear, -10, 10), (affine.scale, 0.85, 1.15)):
        assert stats.kstest(np.asarray(values), stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_digits_move_as_far_as_stated():
    """The centroid of a centered dot moves uniformly in ±10% of the side, whatever turn, shear and scale."""
    dot = np.zeros((MANY, 9, 9, 3), np.uint8)
    dot[:, 4, 4] = 180
    views = np.asarray(jitted("view", 18, "digits")(jax.random.key(6), dot))[..., 0].astype(float)
    mass = views.sum((1, 2))
    place = (np.arange(18) + 0.5) / 18 - 0.5
    for moment in (views.sum(1) @ place / mass, views.sum(2) @ place / mass):
        assert stats.kstest(moment, stats.uniform(-0.1, 0.2).cdf).statistic < 0.03


@pytest.mark.parametrize("size", GOLDEN["sizes"].tolist())
def test_resize_and_normalize_matches_torchvision(size):
    """Within the rounding of the golden images to 8 bits."""
    images = np.round(GOLDEN["images"] * 255).astype(np.uint8)
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    got = jax.jit(functools.partial(augment.resize_and_normalize, image_size=size, mean=mean, deviation=deviation))(
        images
    )
    expected = (GOLDEN[f"resize_{size}"] - np.array(mean)) / np.array(deviation)
    np.testing.assert_allclose(got, expected, atol=0.5 / 255 / 0.224 + 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_views_are_normalized(family):
    images, key = noise(12), jax.random.key(7)
    plain, normalized = jitted("view", 4, family)(key, images), jitted("view", 4, family, False)(key, images)
    np.testing.assert_allclose(normalized, (np.asarray(plain) - 0.5) / 0.5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_fixes_every_bit(family):
    images = noise(12)
    view = jitted("view", 4, family)
    once, again = view(jax.random.key(8), images), view(jax.random.key(8), images)
    np.testing.assert_array_equal(once, again)
    other = view(jax.random.key(9), images)
    assert (np.abs(np.asarray(once) - other).max((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_can_be_cut_into_chunks(family):
    """And an image's neighbors do not matter: the rest of the batch is other images."""
    images, key = noise(12), jax.random.key(10)
    whole = jitted("view", 4, family)(key, images)
    keys = augment.image_keys(key, 12)
    for start, stop in ((0, 5), (5, 10)):
        part = jitted("view_each", 4, family)(keys[start:stop], images[start:stop])
        np.testing.assert_allclose(part, whole[start:stop], atol=1e-6)
    strangers = 255 - images
    strangers[5] = images[5]
    np.testing.assert_array_equal(jitted("view", 4, family)(key, strangers)[5], whole[5])


@functools.cache
def both_forms(family, chunk):
    """The form of the accelerators, and the same images in chunks, the CPU's."""
    sample, apply = augment.FAMILIES[family]

    def both(key, images):
        draws = jax.vmap(lambda key: sample(key, height=6, width=5))(augment.image_keys(key, len(images)))
        cpu = functools.partial(apply, image_size=4)
        accelerators = functools.partial(augment.ON_ACCELERATORS.get(family, apply), image_size=4)
        return accelerators(draws, images / 255), augment.by_chunks(cpu, draws, images / 255, chunk=chunk)

    return jax.jit(both)


@pytest.mark.parametrize(
    "family, batch, chunk",
    [("digits", 1, 4), ("digits", 4, 4), ("digits", 9, 4), ("digits", 5, 1), ("photo", 9, 4), ("photo", 5, 1)],
)
def test_the_form_for_a_cpu_gives_the_same_views(family, batch, chunk):
    """Batches that chunks fill, do not fill, or that are less than one; and images one by one."""
    whole, chunked = both_forms(family, chunk)(jax.random.key(16), noise(batch))
    assert chunked.shape == (batch, 4, 4, 3)
    np.testing.assert_allclose(chunked, whole, atol=1e-6)


def test_only_a_cpu_works_by_chunks():
    """From this size on, image by image."""
    size = augment.ALONE_SIZE
    traced = jitted("view", size, "photo").trace(jax.random.key(17), noise(2))
    for platform, chunked in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("dynamic_update_slice" in text) == chunked, platform
    assert augment.chunk_of(size) == 1 and augment.chunk_of(size // 2) > 1


def test_chunks_can_be_differentiated_and_mapped():
    """The images that the last chunk computes again count once."""
    images = jnp.asarray(noise(5) / 255, jnp.float32)
    chunked = functools.partial(
        augment.by_chunks, lambda draws, images: draws[:, None, None, None] * images**2, chunk=4
    )
    factors = jnp.arange(1.0, 6.0)
    gradient = jax.jit(jax.grad(lambda images: jnp.sum(chunked(factors, images))))(images)
    np.testing.assert_allclose(gradient, 2 * factors[:, None, None, None] * images, atol=1e-6)
    twice = jax.vmap(chunked)(jnp.stack((factors, 2 * factors)), jnp.stack((images, images)))
    np.testing.assert_allclose(twice[1], 2 * twice[0], atol=1e-6)


def test_two_views_are_views_under_folded_keys():
    images, key = noise(12), jax.random.key(11)
    for number, got in enumerate(jitted("two_views", 4, "photo")(key, images)):
        expected = jitted("view", 4, "photo")(jax.random.fold_in(key, number), images)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_two_views_are_independent():
    """The colors that the two views give even images are uncorrelated, and differ."""
    images = np.tile(np.uint8([200, 120, 40]), (MANY, 2, 2, 1))
    first, second = (np.asarray(v)[:, 0, 0] for v in jitted("two_views", 2, "photo")(jax.random.key(12), images))
    for a in first.T:
        for b in second.T:
            assert stats.spearmanr(a, b).pvalue > 1e-3
    neither_touched = 0.3**2 * (0.2**2 + 0.8**2)
    same = (np.abs(first - second).max(-1) < 1e-5).sum()
    assert share_is(same, neither_touched)


def test_legacy_keys_work_too():
    images = noise(12)
    for name in ("view", "two_views"):
        new = jitted(name, 4, "digits")(jax.random.key(3), images)
        old = jitted(name, 4, "digits")(jax.random.PRNGKey(3), images)
        jax.tree.map(np.testing.assert_array_equal, new, old)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("height, width", [(1, 1), (1, 9)])
def test_thin_images(family, height, width):
    images = noise(16, height, width)
    got = np.asarray(jitted("view", 3, family)(jax.random.key(14), images))
    assert got.shape == (16, 3, 3, 3)
    assert np.isfinite(got).all()


def test_black_stays_black_and_white_goes_no_further_than_gray():
    """Hue and saturation cannot color them, and contrast and brightness cannot leave [0, 1]."""
    key = jax.random.key(15)
    for family in FAMILIES:
        black = jitted("view", 4, family)(key, np.zeros((12, 6, 5, 3), np.uint8))
        np.testing.assert_allclose(black, 0, atol=1e-7)
    white = np.asarray(jitted("view", 4, "photo")(key, np.full((12, 6, 5, 3), 255, np.uint8)))
    assert np.ptp(white, axis=-1).max() < 1e-5
    assert white.min() > 0.6 - 1e-5
    assert white.max() < 1 + 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@hypothesis.given(images=npst.arrays(np.uint8, (12, 6, 5, 3)), seed=st.integers(0, 2**31 - 1))
def test_views_stay_in_range(family, images, seed):
    got = np.asarray(jitted("view", 4, family)(jax.random.key(seed), images))
    assert got.shape == (12, 4, 4, 3)
    assert got.dtype == np.float32
    assert got.min() >= -1e-5
    assert got.max() <= 1 + 1e-5


@pytest.mark.usefixtures("without_shape_checks")
def test_invalid_arguments_are_named():
    images, key = noise(2), jax.random.key(0)
    for field, call in (
        ("family", lambda: augment.two_views(key, images, image_size=4, family="foto")),
        ("images", lambda: augment.two_views(key, images.astype(np.float32), image_size=4)),
        ("images", lambda: augment.resize_and_normalize(images[..., 0], image_size=4)),
        ("image_size", lambda: augment.two_views(key, images, image_size=1)),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert error.value.field == field

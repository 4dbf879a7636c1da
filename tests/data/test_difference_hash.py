"""The look of a picture in 64 bits, against the definition pixel by pixel, and on copies and others."""

import numpy as np
import PIL.Image
import pytest

from cib_jax.data import photos
from cib_jax.data.photos import BITS, difference_hash
from tests.data import pictures


def apart(a, b):
    return int(np.bitwise_count(a ^ b).sum())


def test_each_bit_says_whether_a_place_is_brighter_than_the_one_left_of_it():
    """On a picture of 9 × 8 pixels, where nothing is averaged."""
    levels = np.random.default_rng(0).integers(0, 256, (8, 9), np.uint8)
    bits = np.unpackbits(difference_hash(levels[..., None].repeat(3, axis=-1)))
    expected = [levels[y, x + 1] > levels[y, x] for y in range(8) for x in range(8)]
    assert bits.tolist() == expected and len(bits) == BITS


def test_a_place_is_the_mean_of_its_pixels():
    levels = np.random.default_rng(1).integers(0, 256, (80, 90), np.uint8)
    means = levels.astype(float).reshape(8, 10, 9, 10).mean(axis=(1, 3))
    clear = np.abs(np.diff(means, axis=1)) > 1  # not decided by rounding
    bits = np.unpackbits(difference_hash(levels[..., None].repeat(3, axis=-1))).reshape(8, 8).astype(bool)
    assert clear.mean() > 0.8 and np.array_equal(bits[clear], (np.diff(means, axis=1) > 0)[clear])


@pytest.mark.parametrize("width", [1, 5, 192])
def test_any_shape_has_a_look(width):
    assert difference_hash(np.asarray(pictures.smooth(width, 40))).shape == (8,)


def test_copies_are_near_and_other_pictures_far():
    seen = []
    for seed in range(30):
        image = pictures.smooth(640, 480, seed=seed)
        own = []
        for size, quality in [((640, 480), 95), ((320, 240), 60), ((1000, 750), 30), ((200, 160), 80)]:
            file = pictures.content(image.resize(size, PIL.Image.Resampling.LANCZOS), "JPEG", quality=quality)
            own.append(difference_hash(photos.decode(photos.see(file, 32).thumbnail, 0)))
        assert max(apart(own[0], other) for other in own) <= 6, seed
        seen.append(own[0])
    others = [apart(a, b) for at, a in enumerate(seen) for b in seen[:at]]
    # A few waves may run alike by chance.
    assert np.mean(np.array(others) > 6) > 0.99 and 20 < np.mean(others) < 44

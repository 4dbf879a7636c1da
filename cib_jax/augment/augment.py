"""How the network sees an image: as random views in training, resized and normalized at test time.

The whole batch is one program of fixed shapes. Every image draws from a key of its own, folded from the
batch's key and the image's index, so its view does not depend on its neighbors, and a batch may be cut into
chunks: `view_each(image_keys(key, n)[i:j], images[i:j], …)` gives rows i to j of `view(key, images, …)`. On a
CPU, the program itself goes image by image or in small chunks; on accelerators it takes the whole batch at once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from cib_jax.augment import color, geometry
from cib_jax.distributed import sharding
from cib_jax.distributed.sharding import Axis

# The paper's family (section Augmentation).
CROP_SCALE = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
FLIP_PROBABILITY = 0.5
JITTER_PROBABILITY = 0.7
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.4, 0.1
GREYSCALE_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_SIGMA = (0.1, 2.0)  # pixels of the view

# The family for digits.
DIGIT_ANGLE = 15.0  # degrees
DIGIT_SHEAR = 10.0  # degrees
DIGIT_SCALE = (0.85, 1.15)
DIGIT_SHIFT = 0.1  # of the side
DIGIT_GAIN = (0.7, 1.3)


CHUNK_PIXELS = 2**17  # of the views computed together on a CPU: 1.5 MiB in float32
ALONE_SIZE = 96  # pixels; views of this size are worth computing one by one on a CPU


class Photo(NamedTuple):
    """The draws of one view of the family `photo`; a step not drawn holds values that change nothing."""

    crop: geometry.Crop
    flip: Bool[Array, "*batch"]
    jitter: color.ColorJitter
    grayscale: Bool[Array, "*batch"]
    sigma: Float[Array, "*batch"]


class Digits(NamedTuple):
    """The draws of one view of the family `digits`."""

    affine: geometry.Affine
    gain: Float[Array, "*batch"]


def two_views(
    key: PRNGKeyArray,
    images: UInt8[Array, "batch height width 3"],
    *,
    image_size: int,
    family: str = "photo",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    deviation: Sequence[float] = (0.5, 0.5, 0.5),
    axis: Axis = None,
) -> tuple[Float[Array, "batch image_size image_size 3"], Float[Array, "batch image_size image_size 3"]]:
    """Returns two views of every image, drawn independently.

    The first is `view` under `jax.random.fold_in(key, 0)`, the second under `fold_in(key, 1)`; with an `axis` (see
    `spread`), this device's rows of them. Raises what `view` raises.

    Examples:
      >>> import cib_jax as cib
      >>> import functools, jax, numpy as np
      >>> images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
      >>> views = jax.jit(functools.partial(cib.two_views, image_size=16, family="digits"))
      >>> first, second = views(jax.random.key(0), images)
      >>> first.shape, bool((first == second).all())
      ((2, 16, 16, 3), False)
    """
    _check(images, image_size)
    batch = images.shape[0]
    keys = jnp.concatenate(two_view_keys(key, batch, axis))
    images = jnp.concatenate((images, images))
    views = view_each(keys, images, image_size=image_size, family=family, mean=mean, deviation=deviation)
    return views[:batch], views[batch:]


def view(
    key: PRNGKeyArray,
    images: UInt8[Array, "batch height width 3"],
    *,
    image_size: int,
    family: str = "photo",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    deviation: Sequence[float] = (0.5, 0.5, 0.5),
) -> Float[Array, "batch image_size image_size 3"]:
    """Returns one view of every image, `image_size` pixels square, normalized by `mean` and `deviation`.

    `mean` and `deviation` are per channel, of pixels in [0, 1]. Raises `ValueError` for images that are not
    uint8 [batch, height, width, 3], a `family` that `FAMILIES` lacks, or an `image_size` below 2.
    """
    keys = image_keys(key, images.shape[0])
    return view_each(keys, images, image_size=image_size, family=family, mean=mean, deviation=deviation)


def view_each(
    keys: PRNGKeyArray,
    images: UInt8[Array, "batch height width 3"],
    *,
    image_size: int,
    family: str = "photo",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    deviation: Sequence[float] = (0.5, 0.5, 0.5),
) -> Float[Array, "batch image_size image_size 3"]:
    """Returns `view` of every image under its own key of `keys`, for batches cut into chunks.

    Raises what `view` raises.
    """
    if family not in FAMILIES:
        raise ValueError(f"augment is {family!r}, which is no family of views; choose {' or '.join(FAMILIES)}.")
    _check(images, image_size)
    _, height, width, _ = images.shape
    sample, apply = FAMILIES[family]
    draws = jax.vmap(lambda key: sample(key, height=height, width=width))(keys)

    def whole(draws: tuple, images: UInt8[Array, "batch height width 3"]) -> Array:
        return _normalize(apply(draws, images / 255, image_size=image_size), mean, deviation)

    chunked = functools.partial(by_chunks, whole, chunk=chunk_of(image_size))
    return jax.lax.platform_dependent(draws, images, cpu=chunked, default=whole)


def resize_and_normalize(
    images: UInt8[Array, "batch height width 3"],
    *,
    image_size: int,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    deviation: Sequence[float] = (0.5, 0.5, 0.5),
) -> Float[Array, "batch image_size image_size 3"]:
    """Returns the images as the network sees them at test time: resized to `image_size` square, normalized.

    Raises `ValueError` for images that are not uint8 [batch, height, width, 3], or an `image_size` below 2.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> white = np.full((1, 30, 40, 3), 255, np.uint8)
      >>> view = cib.resize_and_normalize(white, image_size=16)
      >>> view.shape, round(float(view.min()), 3), round(float(view.max()), 3)
      ((1, 16, 16, 3), 1.0, 1.0)
    """
    _check(images, image_size)
    return _normalize(geometry.resize(images / 255, image_size=image_size), mean, deviation)


def image_keys(key: PRNGKeyArray, batch: int, first: Int[Array, ""] | int = 0) -> PRNGKeyArray:
    """Returns the keys of `batch` images from the `first` on, each folded from `key` and the image's index."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(batch))


def two_view_keys(key: PRNGKeyArray, batch: int, axis: Axis = None) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Returns the keys of `two_views`: of every image's first view, and of its second."""
    first = sharding.first_row(batch, axis)
    one, other = (image_keys(jax.random.fold_in(key, number), batch, first) for number in range(2))
    return one, other


def sample_photo(key: PRNGKeyArray, *, height: int, width: int) -> Photo:
    """Draws one view of the family `photo` for a `height` × `width` image."""
    crop_key, jitter_key, key = jax.random.split(key, 3)
    jitter = color.sample_color_jitter(
        jitter_key, brightness=BRIGHTNESS, contrast=CONTRAST, saturation=SATURATION, hue=HUE
    )
    chance = jax.random.uniform(key, (5,))
    jittered = chance[0] < JITTER_PROBABILITY
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * chance[1]
    return Photo(
        crop=geometry.sample_crop(crop_key, height=height, width=width, scale=CROP_SCALE, ratio=CROP_RATIO),
        flip=chance[2] < FLIP_PROBABILITY,
        jitter=jitter._replace(
            factors=jnp.where(jittered, jitter.factors, 1.0), hue=jnp.where(jittered, jitter.hue, 0.0)
        ),
        grayscale=chance[3] < GREYSCALE_PROBABILITY,
        sigma=jnp.where(chance[4] < BLUR_PROBABILITY, sigma, 0.0),
    )


def photo(
    draws: Photo, images: Float[Array, "batch height width 3"], *, image_size: int
) -> Float[Array, "batch image_size image_size 3"]:
    """Returns the paper's views: crop, flip, color jitter, grayscale, blur; from [0, 1] to [0, 1]."""
    rows = geometry.resized_crop_rows(images, draws.crop, image_size=image_size, flip=draws.flip, margin=1)
    jitter = color.jitter_alone if len(rows) == 1 else color.jitter_rows
    rows = jitter(rows, draws.jitter, draws.grayscale, margin=1)
    return color.to_images(color.blur_rows(rows, draws.sigma))


def sample_digits(key: PRNGKeyArray, *, height: int, width: int) -> Digits:
    """Draws one view of the family `digits`, whatever the size of the image."""
    del height, width
    affine_key, gain_key = jax.random.split(key)
    affine = geometry.sample_affine(
        affine_key, angle=DIGIT_ANGLE, shear=DIGIT_SHEAR, scale=DIGIT_SCALE, shift=DIGIT_SHIFT
    )
    return Digits(affine, jax.random.uniform(gain_key, minval=DIGIT_GAIN[0], maxval=DIGIT_GAIN[1]))


def digits(
    draws: Digits, images: Float[Array, "batch height width 3"], *, image_size: int
) -> Float[Array, "batch image_size image_size 3"]:
    """Returns views of light digits on black: turned, sheared, scaled and shifted a little, brighter or
    darker.

    Never mirrored, as that makes other signs of them. What comes in from outside the image is black, as the
    background is. From [0, 1] to [0, 1].
    """
    _, height, width, _ = images.shape
    if max(height, width) > image_size:
        images = geometry.resize(images, image_size=image_size)
    return color.adjust_brightness(geometry.warp(images, draws.affine, image_size=image_size), draws.gain)


class Family(NamedTuple):
    """A family of views: `sample` draws one from a key and the image's height and width; `apply` takes the draws
    of a batch, images in [0, 1] and the size, and gives the views in [0, 1].
    """

    sample: Callable[..., Any]
    apply: Callable[..., Float[Array, "batch image_size image_size 3"]]


FAMILIES = {"photo": Family(sample_photo, photo), "digits": Family(sample_digits, digits)}


def chunk_of(image_size: int) -> int:
    """Returns how many views of that size a CPU computes together.

    Small ones by the chunk, so that the cost of starting each operation is shared. Large ones one by one: an image
    then does only what was drawn for it, and its pixels do not wander from one core's cache to the other's between
    two operations, which can take longer than the operations.
    """
    return 1 if image_size >= ALONE_SIZE else max(1, CHUNK_PIXELS // image_size**2)


def by_chunks(
    views: Callable[[Any, Array], Array], draws: Any, images: UInt8[Array, "batch height width 3"], *, chunk: int
) -> Float[Array, "batch image_size image_size 3"]:
    """Returns `views(draws, images)`, computed for `chunk` images at a time, one chunk after the other.

    Where the batch is no multiple of `chunk`, the last chunk begins early and computes some images again: a
    remainder apart would have to be compiled apart, and joining it to the rest copies every view.
    """
    batch = images.shape[0]
    if batch <= chunk:
        return views(draws, images)
    of_chunk = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=chunk)

    def put(number: Array, done: Array) -> Array:
        start = jnp.minimum(number * chunk, batch - chunk)
        some = views(*jax.tree.map(lambda rows: of_chunk(rows, start), (draws, images)))
        return jax.lax.dynamic_update_slice_in_dim(done, some, start, axis=0)

    shape = jax.eval_shape(views, draws, images)
    return jax.lax.fori_loop(0, -(-batch // chunk), put, jnp.zeros(shape.shape, shape.dtype))


def _normalize(images: Array, mean: Sequence[float], deviation: Sequence[float]) -> Array:
    return (images - jnp.asarray(mean, images.dtype)) / jnp.asarray(deviation, images.dtype)


def _check(images: Array, image_size: int) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}, but must be uint8 [batch, height, width, 3]; "
            "repeat a gray channel three times, and leave scaling and normalizing to the view."
        )
    if image_size < 2:
        raise ValueError(f"image_size is {image_size}, but must be at least 2 pixels; give the network's input size.")

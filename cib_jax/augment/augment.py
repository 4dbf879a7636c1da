"""Augmentation of images on the device: random views for training, resizing and normalizing at test time.

A whole batch is one program of fixed shapes. Every image draws from its own key, folded from the batch's key and the
image's index, so that its view does not depend on its neighbors, and a batch can be divided. On accelerators, the
program computes the whole batch at once; on a CPU, it goes through the batch in chunks or image by image.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Shaped, UInt8, UInt32

from cib_jax.augment import color, geometry
from cib_jax.distributed import sharding
from cib_jax.distributed.sharding import Axis
from cib_jax.errors import UserError

# The family "photo": the paper's views (section Augmentation).
CROP_SCALE = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
FLIP_PROBABILITY = 0.5
JITTER_PROBABILITY = 0.7
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
GRAYSCALE_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_SIGMA = (0.1, 2.0)  # pixels of the view

# The family "digits".
DIGIT_ANGLE = 15.0  # degrees
DIGIT_SHEAR = 10.0  # degrees
DIGIT_SCALE = (0.85, 1.15)
DIGIT_SHIFT = 0.1  # fraction of the side
DIGIT_GAIN = (0.7, 1.3)

CHUNK_PIXELS = 2**17  # pixels of the views that a CPU computes together: 1.5 MiB in float32
ALONE_SIZE = 96  # side in pixels from which a CPU computes views one by one

Images = UInt8[Array | np.ndarray, "batch height width 3"]
ImageKeys = Key[Array, " batch"] | UInt32[Array, "batch 2"]
"""A random key per image, of the current or the legacy kind."""


@sharding.on_explicit_mesh(rows=True)
def two_views(
    key: PRNGKeyArray,
    images: Images,
    *,
    image_size: int,
    family: str = "photo",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    deviation: Sequence[float] = (0.5, 0.5, 0.5),
    axis: Axis = None,
) -> tuple[Float[Array, "batch {image_size} {image_size} 3"], Float[Array, "batch {image_size} {image_size} 3"]]:
    """Returns two independently drawn views of every image.

    Args:
      key: Random key. The first views are those of `view_each` with `image_keys(jax.random.fold_in(key, 0), batch)`,
        the second ones those with `fold_in(key, 1)`.
      images: RGB images.
      image_size: Side of the views in pixels.
      family: "photo" (crop, flip, color jitter, grayscale, blur) or "digits" (small affine maps, brightness).
      mean: Mean that is subtracted from each channel, of pixels in [0, 1].
      deviation: Standard deviation by which each channel is then divided.
      axis: Name of the mesh axis over which the batch is divided, inside `jax.shard_map`. The views are this device's
        rows of those that one device would compute.

    Raises:
      ValueError: The images are not uint8 [batch, height, width, 3], `family` is unknown, or `image_size` is below 2.

    Examples:
      >>> import cib_jax as cib
      >>> import functools, jax, numpy as np
      >>> images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
      >>> views = jax.jit(functools.partial(cib.two_views, image_size=16, family="digits"))
      >>> first, second = views(jax.random.key(0), images)
      >>> first.shape, bool((first == second).all())
      ((2, 16, 16, 3), False)
    """
    _validate(images, image_size)
    batch = images.shape[0]
    keys = jnp.concatenate(two_view_keys(key, batch, axis))
    images = jnp.concatenate((images, images))  # one program, compiled once for both views
    views = view_each(keys, images, image_size=image_size, family=family, mean=mean, deviation=deviation)
    return views[:batch], views[batch:]


@sharding.on_explicit_mesh(rows=True)
def view_each(
    keys: ImageKeys,
    images: Images,
    *,
    image_size: int,
    family: str = "photo",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    deviation: Sequence[float] = (0.5, 0.5, 0.5),
) -> Float[Array, "batch {image_size} {image_size} 3"]:
    """Returns one view of every image, drawn with the image's own key; the other arguments are those of `two_views`."""
    if family not in FAMILIES:
        raise UserError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}", field="family")
    _validate(images, image_size)
    _, height, width, _ = images.shape
    sample, apply = FAMILIES[family]
    draws = jax.vmap(lambda key: sample(key, height=height, width=width))(keys)

    def whole(draws: Any, images: Array, *, apply: Callable[..., Array] = apply) -> Array:
        return _normalize(apply(draws, _scale(images), image_size=image_size), mean, deviation)

    # Chosen when the program is lowered, not when it is traced: one export holds the forms of all platforms.
    chunked = functools.partial(by_chunks, whole, chunk=chunk_of(image_size))
    on_accelerators = functools.partial(whole, apply=ON_ACCELERATORS.get(family, apply))
    return jax.lax.platform_dependent(draws, jnp.asarray(images), cpu=chunked, default=on_accelerators)


@sharding.on_explicit_mesh(rows=True)
def resize_and_normalize(
    images: Images,
    *,
    image_size: int,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    deviation: Sequence[float] = (0.5, 0.5, 0.5),
) -> Float[Array, "batch {image_size} {image_size} 3"]:
    """Returns images as the network takes them at test time: resized to `image_size` pixels square, and normalized.

    Args:
      images: RGB images.
      image_size: Side of the result in pixels.
      mean: Mean that is subtracted from each channel, of pixels in [0, 1].
      deviation: Standard deviation by which each channel is then divided.

    Raises:
      ValueError: The images are not uint8 [batch, height, width, 3], or `image_size` is below 2.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> white = np.full((1, 30, 40, 3), 255, np.uint8)
      >>> view = cib.resize_and_normalize(white, image_size=16)
      >>> view.shape, round(float(view.min()), 3), round(float(view.max()), 3)
      ((1, 16, 16, 3), 1.0, 1.0)
    """
    _validate(images, image_size)
    return _normalize(geometry.resize(_scale(images), image_size=image_size), mean, deviation)


def _validate(images: Any, image_size: int) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
        raise UserError(
            f"images must be uint8 [batch, height, width, 3], got {images.dtype} {list(images.shape)}; repeat a gray "
            "channel three times, and do not scale or normalize the pixels",
            field="images",
        )
    if image_size < 2:
        raise UserError(
            f"image_size must be at least 2 pixels, got {image_size}; pass the network's input size", field="image_size"
        )


def _scale(images: Array | np.ndarray) -> Array:
    return jnp.asarray(images, jnp.float32) / 255


def _normalize(images: Array, mean: Sequence[float], deviation: Sequence[float]) -> Array:
    center, unit = (jnp.asarray(values, images.dtype).reshape(1, 1, 1, 3) for values in (mean, deviation))
    return (images - center) / unit


def image_keys(key: PRNGKeyArray, batch: int, first: Int[Array, ""] | int = 0) -> ImageKeys:
    """Returns a key for each of `batch` images from index `first` on, folded from `key` and the image's index."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(batch))


def two_view_keys(key: PRNGKeyArray, batch: int, axis: Axis = None) -> tuple[ImageKeys, ImageKeys]:
    """Returns the images' keys of the first and of the second view of `two_views`."""
    first = sharding.first_row(batch, axis)
    return image_keys(jax.random.fold_in(key, 0), batch, first), image_keys(jax.random.fold_in(key, 1), batch, first)


class PhotoDraws(NamedTuple):
    """Random parameters of a view of the family "photo"; an operation that was not drawn has values without effect."""

    crop: geometry.Crop
    flip: Bool[Array, "*batch"]
    jitter: color.ColorJitter
    grayscale: Bool[Array, "*batch"]
    sigma: Float[Array, "*batch"]


def sample_photo(key: PRNGKeyArray, *, height: int, width: int) -> PhotoDraws:
    """Draws a view of the family "photo" for a `height` × `width` image."""
    crop_key, jitter_key, key = jax.random.split(key, 3)
    # All changes are drawn for every image, and those not applied are made neutral: a branch would not batch.
    jitter = color.sample_color_jitter(jitter_key, **JITTER)
    chance = jax.random.uniform(key, (5,), jnp.float32)
    jittered = chance[0] < JITTER_PROBABILITY
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * chance[1]
    return PhotoDraws(
        crop=geometry.sample_crop(crop_key, height=height, width=width, scale=CROP_SCALE, ratio=CROP_RATIO),
        flip=chance[2] < FLIP_PROBABILITY,
        jitter=jitter._replace(
            factors=jnp.where(jittered, jitter.factors, 1.0), hue=jnp.where(jittered, jitter.hue, 0.0)
        ),
        grayscale=chance[3] < GRAYSCALE_PROBABILITY,
        sigma=jnp.where(chance[4] < BLUR_PROBABILITY, sigma, 0.0),
    )


def photo(
    draws: PhotoDraws, images: Float[Array, "batch height width 3"], *, image_size: int
) -> Float[Array, "batch {image_size} {image_size} 3"]:
    """Returns the paper's views, from [0, 1] to [0, 1]: crop, flip, color jitter, grayscale, blur."""
    # The crop comes with the margin that the blur needs, and no operation between them pads or cuts.
    rows = geometry.resized_crop_rows(images, draws.crop, image_size=image_size, flip=draws.flip, margin=1)
    jitter = color.jitter_one if len(rows) == 1 else color.jitter_rows
    rows = jitter(rows, draws.jitter, draws.grayscale, margin=1)
    return jnp.swapaxes(color.blur_rows(rows, draws.sigma), -1, -2)


def photo_on_accelerators(
    draws: PhotoDraws, images: Float[Array, "batch height width 3"], *, image_size: int
) -> Float[Array, "batch {image_size} {image_size} 3"]:
    """Returns the views of `photo` up to rounding, by a program that reads and writes the pixels less often."""
    rows = geometry.resized_crop_rows(images, draws.crop, image_size=image_size, flip=draws.flip, margin=1)
    rows = color.jitter_planes(rows, draws.jitter, draws.grayscale, margin=1)
    return jnp.swapaxes(color.blur_rows_by_products(rows, draws.sigma), -1, -2)


class DigitDraws(NamedTuple):
    """Random parameters of a view of the family "digits"."""

    affine: geometry.Affine
    gain: Float[Array, "*batch"]


def sample_digits(key: PRNGKeyArray, *, height: int, width: int) -> DigitDraws:
    """Draws a view of the family "digits" for an image of any size."""
    del height, width
    affine_key, gain_key = jax.random.split(key)
    affine = geometry.sample_affine(
        affine_key, angle=DIGIT_ANGLE, shear=DIGIT_SHEAR, scale=DIGIT_SCALE, shift=DIGIT_SHIFT
    )
    return DigitDraws(affine, jax.random.uniform(gain_key, (), jnp.float32, *DIGIT_GAIN))


def digits(
    draws: DigitDraws, images: Float[Array, "batch height width 3"], *, image_size: int
) -> Float[Array, "batch {image_size} {image_size} 3"]:
    """Returns views of light digits on black, from [0, 1] to [0, 1]: small affine maps and changes of brightness.

    Digits are never mirrored, which would make other characters of them. Pixels from outside the image are black.
    """
    _, height, width, _ = images.shape
    if max(height, width) > image_size:
        images = geometry.resize(images, image_size=image_size)
    return color.adjust_brightness(geometry.warp(images, draws.affine, image_size=image_size), draws.gain)


FAMILIES: dict[str, tuple[Callable[..., Any], Callable[..., Array]]] = {
    "photo": (sample_photo, photo),
    "digits": (sample_digits, digits),
}
"""For each family, (key, height, width) → draws of one view, and (draws, images, image_size) → views of a batch."""

ON_ACCELERATORS: dict[str, Callable[..., Array]] = {"photo": photo_on_accelerators}
"""Families whose views GPUs and TPUs compute by another function."""


def chunk_of(image_size: int) -> int:
    """Returns the number of views of this size that a CPU computes together.

    Small views share the cost of starting each operation. Large views are computed one by one: each image then runs
    only the operations that were drawn for it, and its pixels stay in one core's cache between operations, where moving
    them to another core can take longer than the operation.
    """
    return 1 if image_size >= ALONE_SIZE else max(1, CHUNK_PIXELS // image_size**2)


def by_chunks(
    views: Callable[[Any, Array], Array], draws: Any, images: Shaped[Array, "batch height width 3"], *, chunk: int
) -> Float[Array, "batch view_height view_width 3"]:
    """Returns `views(draws, images)`, computed for `chunk` images at a time, one chunk after the other."""
    batch = images.shape[0]
    if batch <= chunk:
        return views(draws, images)
    slice_of = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=chunk)

    def write_chunk(number: Array, done: Array) -> Array:
        # If the batch is not a multiple of `chunk`, the last chunk begins early and computes some images again. A
        # smaller last chunk would have to be compiled separately, and joining it to the rest would copy every view.
        start = jnp.minimum(number * chunk, batch - chunk)
        some = views(*jax.tree.map(lambda rows: slice_of(rows, start), (draws, images)))
        return jax.lax.dynamic_update_slice_in_dim(done, some, start, axis=0)

    shape = jax.eval_shape(views, draws, images)
    empty = sharding.vary_like(jnp.zeros(shape.shape, shape.dtype), images)
    return jax.lax.fori_loop(0, -(-batch // chunk), write_chunk, empty)

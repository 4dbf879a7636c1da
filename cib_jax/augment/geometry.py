"""Crops, resizing and affine warps: which part of an image a view shows, and at which pixels.

All functions take float images [batch, height, width, 3] and one set of random parameters per image, and are linear in
the pixels.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

CROP_TRIES = 10
MAX_TAPS = 8  # most input rows per output row that are added one by one; each is a term written out in the program


class Crop(NamedTuple):
    """A box within an image, in whole pixels: rows [top, top + height), columns [left, left + width)."""

    top: Int[Array, "*batch"]
    left: Int[Array, "*batch"]
    height: Int[Array, "*batch"]
    width: Int[Array, "*batch"]


class Affine(NamedTuple):
    """An affine map about the image's center: shear, then rotation, then scaling, then shift."""

    angle: Float[Array, "*batch"]  # degrees, clockwise
    shear: Float[Array, "*batch"]  # degrees, with the top to the right
    scale: Float[Array, "*batch"]
    shift: Float[Array, "*batch 2"]  # (right, down) in fractions of the image's side


class ResizedAxis(NamedTuple):
    """Positions of the output pixels on one axis of an image, of which [start, start + extent) is resized."""

    start: Int[Array, " batch"]
    extent: Int[Array, " batch"]
    step: Float[Array, " batch"]  # distance between the centers of two output pixels, in input pixels
    center: Float[Array, "batch resized"]  # of each output pixel, in input pixels


def sample_crop(
    key: PRNGKeyArray, *, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Crop:
    """Draws a crop of a `height` × `width` image, distributed as in torchvision's `RandomResizedCrop`.

    The area is uniform in `scale` (fractions of the image's), the width over the height log-uniform in `ratio`, and the
    sides are rounded to whole pixels. The first of ten tries that fits is placed uniformly. If none fits, the crop is
    the largest centered box with a ratio in range.
    """
    # One call for all numbers: each call of the generator adds a quarter of a second of compilation.
    tries, position = jnp.split(jax.random.uniform(key, (2 * CROP_TRIES + 2,), jnp.float32), [2 * CROP_TRIES])
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[:CROP_TRIES])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** tries[CROP_TRIES:]
    heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = jnp.argmax(fits)
    room = [(side - drawn[first] + 1).astype(jnp.float32) for side, drawn in ((height, heights), (width, widths))]
    top, left = ((place * free).astype(jnp.int32) for place, free in zip(position, room, strict=True))
    drawn = (top, left, heights[first], widths[first])
    sides = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    fallback = ((height - sides[0]) // 2, (width - sides[1]) // 2, *sides)  # rounded as in torchvision
    return Crop(*(jnp.where(fits[first], a, b) for a, b in zip(drawn, fallback, strict=True)))


def resize(
    images: Float[Array, "batch height width 3"], *, image_size: int
) -> Float[Array, "batch {image_size} {image_size} 3"]:
    """Returns the whole images, resized bilinearly with antialiasing to `image_size` pixels square."""
    batch, height, width, _ = images.shape
    whole = Crop(*(jnp.full(batch, n) for n in (0, 0, height, width)))
    return resized_crop(images, whole, image_size=image_size)


def resized_crop(
    images: Float[Array, "batch height width 3"],
    crop: Crop,
    *,
    image_size: int,
    flip: Bool[Array, " batch"] | bool = False,
) -> Float[Array, "batch {image_size} {image_size} 3"]:
    """Returns each image's crop, resized to `image_size` pixels square, with left and right swapped where `flip`.

    Bilinear, with antialiasing when shrinking, as torchvision's `resized_crop` with `antialias=True`: no pixel outside
    the crop counts.
    """
    return jnp.swapaxes(resized_crop_rows(images, crop, image_size=image_size, flip=flip), -1, -2)


def resized_crop_rows(
    images: Float[Array, "batch height width 3"],
    crop: Crop,
    *,
    image_size: int,
    flip: Bool[Array, " batch"] | bool = False,
    margin: int = 0,
) -> Float[Array, "batch {image_size+2*margin} 3 {image_size+2*margin}"]:
    """Returns the result of `resized_crop` in the row layout of `color`, with `margin` more pixels at each side.

    These, fewer than `image_size`, repeat the crop by reflection, so that a filter needs no padding of its own. A flip
    costs nothing: the weights are swapped instead.
    """
    # Resizing is linear and separable: one matrix product per image over the columns, and one over the rows. The first
    # product leaves the pixels in the row layout, so no transposition is needed before the color operations.
    flip = jnp.broadcast_to(flip, crop.left.shape)
    columns = resized_axis(crop.left, crop.width, flip, image_size, margin)
    weights = _weights(columns, jnp.arange(images.shape[2]))
    # The default precision of accelerators would round the pixels to 8 or 10 bits.
    narrow = jnp.einsum("bhwc,bxw->bhcx", images, weights, precision="highest")
    rows = resized_axis(crop.top, crop.height, jnp.zeros_like(flip), image_size, margin)
    taps = tap_count(images.shape[1], image_size)
    if taps > MAX_TAPS:
        return rows_by_product(narrow, rows)
    by_taps = functools.partial(rows_by_taps, taps=taps)
    return jax.lax.platform_dependent(narrow, rows, cpu=by_taps, default=rows_by_product)


def resized_axis(
    start: Int[Array, " batch"], extent: Int[Array, " batch"], flip: Bool[Array, " batch"], image_size: int, margin: int
) -> ResizedAxis:
    """Returns the positions of `image_size` output pixels, and of `margin` reflected ones at each end, on an axis."""
    target = jnp.abs(jnp.arange(-margin, image_size + margin))
    target = (image_size - 1) - jnp.abs((image_size - 1) - target)
    target = jnp.where(flip[:, None], image_size - 1 - target, target)
    step = extent.astype(jnp.float32) / image_size
    center = start[:, None].astype(jnp.float32) + (target.astype(jnp.float32) + 0.5) * step[:, None]
    return ResizedAxis(start, extent, step, center)


def tap_count(size: int, image_size: int) -> int:
    """Returns the largest number of `size` input pixels with a weight in one of `image_size` output pixels."""
    return math.ceil(2 * max(1.0, size / image_size))


def rows_by_product(
    images: Float[Array, "batch height 3 width"], axis: ResizedAxis
) -> Float[Array, "batch resized 3 width"]:
    """Returns images with their rows resized along `axis`, by one matrix product per image."""
    return jnp.einsum("byh,bhcx->bycx", _weights(axis, jnp.arange(images.shape[1])), images, precision="highest")


def rows_by_taps(
    images: Float[Array, "batch height 3 width"], axis: ResizedAxis, *, taps: int
) -> Float[Array, "batch resized 3 width"]:
    """Returns the result of `rows_by_product`, as a sum of only those `taps` rows that can have a weight.

    It takes less than half the time on a CPU, even for images of only 32 rows, since whole rows are added in one pass.
    """
    reach = jnp.maximum(axis.step, 1.0)[:, None]
    first = jnp.floor(axis.center - reach + 0.5).astype(jnp.int32)
    rows = first[..., None] + jnp.arange(taps)[None, None]
    weights = _weights(axis, rows)
    rows = jnp.clip(rows, 0, images.shape[1] - 1)  # rows outside the image have weight 0
    look_up = jax.vmap(lambda image, rows: image.at[rows].get(mode="promise_in_bounds"))
    terms = [weights[:, :, k, None, None] * look_up(images, rows[:, :, k]) for k in range(taps)]
    return functools.reduce(jnp.add, terms)


def _weights(axis: ResizedAxis, pixels: Int[Array, "... pixels"]) -> Float[Array, "batch resized pixels"]:
    """Returns the weight of each of the input `pixels` (indices) in each output pixel.

    The weights form a triangle around the center of the output pixel. It reaches one input pixel to each side when
    growing, and one output pixel when shrinking. Pixels outside the resized part have weight 0; the rest sum to 1.
    """
    start, extent, step = (values[:, None, None] for values in (axis.start, axis.extent, axis.step))
    # Pixels and the three values get the same number of axes, since broadcasting over fewer may be forbidden.
    pixels = pixels.reshape((1,) * (3 - pixels.ndim) + pixels.shape)
    distance = jnp.abs(pixels.astype(jnp.float32) + 0.5 - axis.center[..., None]) / jnp.maximum(step, 1.0)
    inside = (pixels >= start) & (pixels < start + extent)
    weights = jnp.where(inside, jnp.maximum(1 - distance, 0.0), 0.0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def sample_affine(key: PRNGKeyArray, *, angle: float, shear: float, scale: tuple[float, float], shift: float) -> Affine:
    """Draws an affine map of one image, uniform within ±`angle`, ±`shear`, `scale` and ±`shift`."""
    low = jnp.array([-angle, -shear, scale[0], -shift, -shift], jnp.float32)
    high = jnp.array([angle, shear, scale[1], shift, shift], jnp.float32)
    drawn = jax.random.uniform(key, (5,), jnp.float32, low, high)
    return Affine(angle=drawn[0], shear=drawn[1], scale=drawn[2], shift=drawn[3:])


def warp(
    images: Float[Array, "batch height width 3"], affine: Affine, *, image_size: int
) -> Float[Array, "batch {image_size} {image_size} 3"]:
    """Returns images stretched to `image_size` pixels square and moved by `affine`; bilinear, black outside.

    There is no antialiasing: `resize` images that are larger than `image_size` first.
    """
    _, height, width, _ = images.shape
    offset = jnp.arange(image_size, dtype=jnp.float32) - (image_size - 1) / 2
    y, x = jnp.meshgrid(offset, offset, indexing="ij")

    # Each output pixel looks up the point from which it comes, by the inverse of the whole map: stretching and moving
    # interpolate once together, and so blur once.
    def warp_one(image: Float[Array, "height width 3"], affine: Affine) -> Float[Array, "size size 3"]:
        angle, shear = jnp.radians(affine.angle), jnp.radians(affine.shear)
        moved_x, moved_y = x - affine.shift[0] * image_size, y - affine.shift[1] * image_size
        turned_x = (jnp.cos(angle) * moved_x + jnp.sin(angle) * moved_y) / affine.scale
        turned_y = (jnp.cos(angle) * moved_y - jnp.sin(angle) * moved_x) / affine.scale
        source_x = (turned_x + jnp.tan(shear) * turned_y) * (width / image_size) + (width - 1) / 2
        source_y = turned_y * (height / image_size) + (height - 1) / 2
        look_up = jax.vmap(lambda plane: map_coordinates(plane, [source_y, source_x], order=1), in_axes=-1, out_axes=-1)
        return look_up(image)

    return jax.vmap(warp_one)(images, affine)

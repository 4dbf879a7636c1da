"""Which part of an image a view shows, and how it lies on the view's pixels: crops, resizing, affine warps.

Everything takes float images [batch, height, width, 3] and one draw per image, and is linear in the pixels."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

CROP_TRIES = 10
MOST_TAPS = 8  # each is a term written out in the program


class Crop(NamedTuple):
    """A box within an image, in whole pixels: rows [top, top + height), columns [left, left + width)."""

    top: Int[Array, "*batch"]
    left: Int[Array, "*batch"]
    height: Int[Array, "*batch"]
    width: Int[Array, "*batch"]


class Affine(NamedTuple):
    """An affine map about the image's center: shear, then rotation, then scaling, then shift.

    `angle` (clockwise) and `shear` (the top to the right) are in degrees, `scale` is a factor, `shift` is
    (right, down) in fractions of the image's side.
    """

    angle: Float[Array, "*batch"]
    shear: Float[Array, "*batch"]
    scale: Float[Array, "*batch"]
    shift: Float[Array, "*batch 2"]


class Axis(NamedTuple):
    """How output pixels lie on one axis of an image, of which [start, start + extent) is resized.

    `step` is the distance of two output pixels' centers, in input pixels.
    """

    start: Int[Array, "batch"]
    extent: Int[Array, "batch"]
    step: Float[Array, "batch"]
    center: Float[Array, "batch resized"]


def sample_crop(
    key: PRNGKeyArray,
    *,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Crop:
    """Draws a crop of a `height` × `width` image as torchvision's `RandomResizedCrop` does.

    Its area is uniform in `scale` (fractions of the image's), its width over height log-uniform in `ratio`,
    its sides rounded to whole pixels; the first of ten tries that fits is placed uniformly. If none fits, it
    is the largest centered box with a ratio in range.
    """
    # One call for all numbers: each call of the generator is a quarter of a second of compilation.
    tries, place = jnp.split(jax.random.uniform(key, (2 * CROP_TRIES + 2,)), [2 * CROP_TRIES])
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[:CROP_TRIES])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** tries[CROP_TRIES:]
    heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = jnp.argmax(fits)
    top = (place[0] * (height - heights[first] + 1)).astype(jnp.int32)
    left = (place[1] * (width - widths[first] + 1)).astype(jnp.int32)
    drawn = Crop(top, left, heights[first], widths[first])
    fallback = _centered_crop(height, width, ratio)
    return jax.tree.map(lambda a, b: jnp.where(fits[first], a, b), drawn, fallback)


def resized_crop(
    images: Float[Array, "batch height width 3"],
    crop: Crop,
    *,
    image_size: int,
    flip: Bool[Array, "batch"] | bool = False,
) -> Float[Array, "batch image_size image_size 3"]:
    """Returns each image's crop, resized to `image_size` pixels square, left and right swapped where `flip`.

    Bilinear, antialiased when shrinking: torchvision's `resized_crop` with `antialias=True`, so no pixel
    outside the crop counts. Two matrix products per image, one over columns and one over rows; the flip costs
    nothing. On a CPU, rows are sums of the few that weigh anything.
    """
    return jnp.swapaxes(resized_crop_rows(images, crop, image_size=image_size, flip=flip), -1, -2)


def resized_crop_rows(
    images: Float[Array, "batch height width 3"],
    crop: Crop,
    *,
    image_size: int,
    flip: Bool[Array, "batch"] | bool = False,
    margin: int = 0,
) -> Float[Array, "batch image_size+2*margin 3 image_size+2*margin"]:
    """Returns `resized_crop` with the pixels of one channel of a row side by side, and a margin if wanted.

    That is the order in which the first product gives them. `margin` pixels more on every side, fewer than
    `image_size`, repeat the crop by reflection, so that a filter needs no padding of its own.
    """
    flip = jnp.broadcast_to(flip, crop.left.shape)
    columns = axis_of(crop.left, crop.width, flip, image_size, margin)
    weights = _weights(columns, jnp.arange(images.shape[2]))
    # The accelerators' default precision would round the pixels to 8 or 10 bits.
    narrow = jnp.einsum("bhwc,bxw->bhcx", images, weights, precision="highest")
    rows = axis_of(crop.top, crop.height, jnp.zeros_like(flip), image_size, margin)
    if taps_of(images.shape[1], image_size) > MOST_TAPS:
        return rows_by_product(narrow, rows)
    by_taps = functools.partial(rows_by_taps, taps=taps_of(images.shape[1], image_size))
    return jax.lax.platform_dependent(narrow, rows, cpu=by_taps, default=rows_by_product)


def rows_by_product(images: Float[Array, "batch height 3 width"], axis: Axis) -> Float[Array, "batch resized 3 width"]:
    """Returns the images with their rows resized along `axis`, as one matrix product per image."""
    return jnp.einsum("byh,bhcx->bycx", _weights(axis, jnp.arange(images.shape[1])), images, precision="highest")


def rows_by_taps(
    images: Float[Array, "batch height 3 width"], axis: Axis, *, taps: int
) -> Float[Array, "batch resized 3 width"]:
    """Returns the same, from the `taps` rows alone that can weigh anything in a row of the result.

    Less than half the time on a CPU, even where an image has but 32 rows: whole rows are added up, in one pass.
    """
    reach = jnp.maximum(axis.step, 1.0)[:, None]
    first = jnp.floor(axis.center - reach + 0.5).astype(jnp.int32)
    rows = first[..., None] + jnp.arange(taps)
    weights = _weights(axis, rows)
    rows = jnp.clip(rows, 0, images.shape[1] - 1)
    look_up = jax.vmap(lambda image, rows: image.at[rows].get(mode="promise_in_bounds"))
    terms = [weights[:, :, k, None, None] * look_up(images, rows[:, :, k]) for k in range(taps)]
    return functools.reduce(jnp.add, terms)


def resize(
    images: Float[Array, "batch height width 3"], *, image_size: int
) -> Float[Array, "batch image_size image_size 3"]:
    """Returns the whole images, resized bilinearly and antialiased to `image_size` pixels square."""
    batch, height, width, _ = images.shape
    whole = Crop(*(jnp.full(batch, n) for n in (0, 0, height, width)))
    return resized_crop(images, whole, image_size=image_size)


def sample_affine(key: PRNGKeyArray, *, angle: float, shear: float, scale: tuple[float, float], shift: float) -> Affine:
    """Draws an affine map of one image: uniform, between ±`angle`, ±`shear`, ±`shift`, and within `scale`."""
    low = jnp.array([-angle, -shear, scale[0], -shift, -shift])
    high = jnp.array([angle, shear, scale[1], shift, shift])
    drawn = jax.random.uniform(key, (5,), minval=low, maxval=high)
    return Affine(angle=drawn[0], shear=drawn[1], scale=drawn[2], shift=drawn[3:])


def warp(
    images: Float[Array, "batch height width 3"], affine: Affine, *, image_size: int
) -> Float[Array, "batch image_size image_size 3"]:
    """Returns the images stretched to `image_size` pixels square and moved by `affine`; bilinear, black
    outside.

    Every pixel of the view looks up the point it comes from, so that stretching and moving blur only once.
    Does not antialias: `resize` images that are larger than `image_size` first.
    """
    _, height, width, _ = images.shape
    offset = jnp.arange(image_size) - (image_size - 1) / 2
    y, x = jnp.meshgrid(offset, offset, indexing="ij")

    def one(image: Float[Array, "height width 3"], affine: Affine) -> Float[Array, "image_size image_size 3"]:
        angle, shear = jnp.radians(affine.angle), jnp.radians(affine.shear)
        moved_x, moved_y = x - affine.shift[0] * image_size, y - affine.shift[1] * image_size
        turned_x = (jnp.cos(angle) * moved_x + jnp.sin(angle) * moved_y) / affine.scale
        turned_y = (jnp.cos(angle) * moved_y - jnp.sin(angle) * moved_x) / affine.scale
        source_x = (turned_x + jnp.tan(shear) * turned_y) * (width / image_size) + (width - 1) / 2
        source_y = turned_y * (height / image_size) + (height - 1) / 2
        look_up = jax.vmap(lambda plane: map_coordinates(plane, [source_y, source_x], order=1), in_axes=-1, out_axes=-1)
        return look_up(image)

    return jax.vmap(one)(images, affine)


def _centered_crop(height: int, width: int, ratio: tuple[float, float]) -> Crop:
    """The largest centered box whose width over height lies in `ratio`, rounded as torchvision rounds it."""
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return Crop(*(jnp.int32(n) for n in (top, left, crop_height, crop_width)))


def taps_of(size: int, image_size: int) -> int:
    """Returns how many of `size` pixels weigh anything in an output pixel at most: those within its reach."""
    return math.ceil(2 * max(1.0, size / image_size))


def axis_of(
    start: Int[Array, "batch"], extent: Int[Array, "batch"], flip: Bool[Array, "batch"], image_size: int, margin: int
) -> Axis:
    """Returns how `image_size` pixels and `margin` at each end, which repeat those as far inside, lie on an axis."""
    target = jnp.abs(jnp.arange(-margin, image_size + margin))
    target = (image_size - 1) - jnp.abs((image_size - 1) - target)
    target = jnp.where(flip[:, None], image_size - 1 - target, target)
    step = extent / image_size
    return Axis(start, extent, step, start[:, None] + (target + 0.5) * step[:, None])


def _weights(axis: Axis, pixel: Int[Array, "*#batch pixels"]) -> Float[Array, "batch resized pixels"]:
    """How much each of the pixels named gives to each output pixel.

    The weights are a triangle around the output pixel's center, reaching one input pixel to each side when
    growing and one output pixel when shrinking; pixels outside the part that is resized weigh nothing and the
    rest sum to 1.
    """
    start, extent, step = (values[:, None, None] for values in (axis.start, axis.extent, axis.step))
    distance = jnp.abs(pixel + 0.5 - axis.center[..., None]) / jnp.maximum(step, 1.0)
    inside = (pixel >= start) & (pixel < start + extent)
    weights = jnp.where(inside, jnp.maximum(1 - distance, 0.0), 0.0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)

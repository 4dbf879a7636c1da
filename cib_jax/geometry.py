"""Which part of an image a view shows, and how it lies on the view's pixels: crops, resizing, affine warps.

Everything takes float images [batch, height, width, 3] and one draw per image, and is linear in the pixels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

CROP_TRIES = 10


class Crop(NamedTuple):
    """A box within an image, in whole pixels: rows [top, top + height), columns [left, left + width)."""

    top: Int[Array, "*batch"]
    left: Int[Array, "*batch"]
    height: Int[Array, "*batch"]
    width: Int[Array, "*batch"]


class Affine(NamedTuple):
    """An affine map about the image's centre: shear, then rotation, then scaling, then shift.

    `angle` (clockwise) and `shear` (the top to the right) are in degrees, `scale` is a factor, `shift` is
    (right, down) in fractions of the image's side.
    """

    angle: Float[Array, "*batch"]
    shear: Float[Array, "*batch"]
    scale: Float[Array, "*batch"]
    shift: Float[Array, "*batch 2"]


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
    is the largest centred box with a ratio in range.
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
    fallback = _centred_crop(height, width, ratio)
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
    nothing.
    """
    batch, height, width, _ = images.shape
    rows = _resize_weights(crop.top, crop.height, jnp.zeros(batch, bool), size=height, image_size=image_size)
    flip = jnp.broadcast_to(flip, (batch,))
    columns = _resize_weights(crop.left, crop.width, flip, size=width, image_size=image_size)
    # The accelerators' default precision would round the pixels to 8 or 10 bits.
    images = jnp.einsum("bxw,bhwc->bhxc", columns, images, precision="highest")
    return jnp.einsum("byh,bhxc->byxc", rows, images, precision="highest")


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


def _centred_crop(height: int, width: int, ratio: tuple[float, float]) -> Crop:
    """The largest centred box whose width over height lies in `ratio`, rounded as torchvision rounds it."""
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return Crop(*(jnp.int32(n) for n in (top, left, crop_height, crop_width)))


def _resize_weights(
    start: Int[Array, "batch"],
    extent: Int[Array, "batch"],
    flip: Bool[Array, "batch"],
    *,
    size: int,
    image_size: int,
) -> Float[Array, "batch image_size size"]:
    """How much each of `size` pixels gives to each output pixel; one axis, of which a part is resized.

    The part is [start, start + extent). The weights are a triangle around the output pixel's centre, reaching
    one input pixel to each side when growing and one output pixel when shrinking; pixels outside the part
    weigh nothing and the rest sum to 1.
    """
    pixel = jnp.arange(size)
    target = jnp.arange(image_size)
    target = jnp.where(flip[:, None], image_size - 1 - target, target)
    step = (extent / image_size)[:, None]
    centre = start[:, None] + (target + 0.5) * step
    distance = jnp.abs(pixel + 0.5 - centre[..., None]) / jnp.maximum(step, 1.0)[..., None]
    inside = (pixel >= start[:, None]) & (pixel < (start + extent)[:, None])
    weights = jnp.where(inside[:, None, :], jnp.maximum(1 - distance, 0.0), 0.0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)

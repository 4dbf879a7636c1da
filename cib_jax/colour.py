"""What a view does to an image's colours: jitter, greyscale, blur; pure functions of float images in [0, 1].

Each takes images [..., height, width, 3] and one parameter per image [...], and gives what the function of
that name in `torchvision.transforms.functional` gives for float tensors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601, rounded as torchvision rounds it


class ColourJitter(NamedTuple):
    """One draw of the colour jitter: the order of the four operations, and how far each goes.

    `order` lists the operations (`BRIGHTNESS`, `CONTRAST`, `SATURATION`, `HUE`) in the order they are
    applied; `factors` holds the factors of the first three, in that numbering, where 1 changes nothing; `hue`
    is a shift in turns of the colour circle, where 0 changes nothing.
    """

    order: Int[Array, "*batch 4"]
    factors: Float[Array, "*batch 3"]
    hue: Float[Array, "*batch"]


def sample_colour_jitter(
    key: PRNGKeyArray, *, brightness: float, contrast: float, saturation: float, hue: float
) -> ColourJitter:
    """Draws the colour jitter of one image: factors from U(1 ± strength), the hue's shift from U(±hue)."""
    order, distance = jnp.split(jax.random.uniform(key, (8,)), 2)
    distance = (2 * distance - 1) * jnp.array([brightness, contrast, saturation, hue])
    return ColourJitter(order=jnp.argsort(order), factors=1 + distance[:3], hue=distance[3])


def adjust_brightness(
    images: Float[Array, "*batch height width 3"], factor: Float[Array, "*batch"]
) -> Float[Array, "*batch height width 3"]:
    """Returns the images times `factor` (0 is black, 1 changes nothing), clamped to [0, 1]."""
    return _blend(images, 0.0, _per_pixel(factor)[..., None])


def adjust_contrast(
    images: Float[Array, "*batch height width 3"], factor: Float[Array, "*batch"]
) -> Float[Array, "*batch height width 3"]:
    """Returns the images blended with their mean grey: factor 0 is that, 1 changes nothing; in [0, 1]."""
    mean = jnp.mean(_grey(_to_planes(images)), axis=(-2, -1))
    return _blend(images, _per_pixel(mean)[..., None], _per_pixel(factor)[..., None])


def adjust_saturation(
    images: Float[Array, "*batch height width 3"], factor: Float[Array, "*batch"]
) -> Float[Array, "*batch height width 3"]:
    """Returns the images blended with their greyscale: factor 0 is that, 1 changes nothing; in [0, 1]."""
    grey = _grey(_to_planes(images))
    return _blend(images, grey[..., None], _per_pixel(factor)[..., None])


def adjust_hue(
    images: Float[Array, "*batch height width 3"], shift: Float[Array, "*batch"]
) -> Float[Array, "*batch height width 3"]:
    """Returns the images with every hue moved by `shift` turns of the colour circle, as through HSV."""
    return _to_images(_shift_hue(_to_planes(images), _per_pixel(shift)))


def to_greyscale(
    images: Float[Array, "*batch height width 3"], chosen: Bool[Array, "*batch"] | bool = True
) -> Float[Array, "*batch height width 3"]:
    """Returns the images, those `chosen` with their grey in all three channels."""
    return jnp.where(_per_pixel(chosen)[..., None], _grey(_to_planes(images))[..., None], images)


def colour_jitter(
    images: Float[Array, "*batch height width 3"], jitter: ColourJitter
) -> Float[Array, "*batch height width 3"]:
    """Returns the images after the four operations of `jitter`, each image's in its own order.

    Brightness, contrast and saturation are one blend with three anchors: black, the mean grey, the pixel's
    own grey; so a turn of mixed operations costs one blend and one shift of hue.
    """
    factors = jnp.concatenate((jitter.factors, jnp.ones_like(jitter.hue)[..., None]), axis=-1)
    factors = jnp.take_along_axis(factors, jitter.order, axis=-1)
    shift = _per_pixel(jitter.hue)

    def turn(planes: Array, drawn: tuple[Array, Array]) -> tuple[Array, None]:
        operation, factor = _per_pixel(drawn[0]), _per_pixel(drawn[1])
        grey = _grey(planes)
        mean = jnp.mean(grey, axis=(-2, -1), keepdims=True)
        anchor = jnp.where(operation == SATURATION, grey, jnp.where(operation == CONTRAST, mean, 0.0))
        blended = _blend(planes, anchor, factor)
        return jnp.where(operation == HUE, _shift_hue(planes, shift), blended), None

    # A loop, because XLA would fuse unrolled turns and compute each one anew for every channel of the next.
    turns = (jnp.moveaxis(jitter.order, -1, 0), jnp.moveaxis(factors, -1, 0))
    return _to_images(jax.lax.scan(turn, _to_planes(images), turns)[0])


def gaussian_blur(
    images: Float[Array, "*batch height width 3"], sigma: Float[Array, "*batch"]
) -> Float[Array, "*batch height width 3"]:
    """Returns the images blurred by a 3 × 3 Gaussian of `sigma` pixels; 0 changes nothing.

    The edge pixels' missing neighbours are those on the other side (padding by reflection), so height and
    width must be at least 2.
    """
    sigma = jnp.asarray(sigma)
    side = jnp.where(sigma > 0, jnp.exp(-0.5 / jnp.where(sigma > 0, sigma, 1.0) ** 2), 0.0)
    centre, side = (_per_pixel(w / (1 + 2 * side))[..., None] for w in (1.0, side))
    above = jnp.concatenate((images[..., 1:2, :, :], images[..., :-1, :, :]), axis=-3)
    below = jnp.concatenate((images[..., 1:, :, :], images[..., -2:-1, :, :]), axis=-3)
    images = centre * images + side * (above + below)
    left = jnp.concatenate((images[..., :, 1:2, :], images[..., :, :-1, :]), axis=-2)
    right = jnp.concatenate((images[..., :, 1:, :], images[..., :, -2:-1, :]), axis=-2)
    return centre * images + side * (left + right)


def _to_planes(images: Float[Array, "*batch height width 3"]) -> Float[Array, "3 *batch height width"]:
    """Channels first: pixels of one channel lie side by side, which lets a CPU compute many at once."""
    return jnp.moveaxis(images, -1, 0)


def _to_images(planes: Float[Array, "3 *batch height width"]) -> Float[Array, "*batch height width 3"]:
    return jnp.moveaxis(planes, 0, -1)


def _grey(planes: Float[Array, "3 *batch height width"]) -> Float[Array, "*batch height width"]:
    red, green, blue = GREY_WEIGHTS
    return red * planes[0] + green * planes[1] + blue * planes[2]


def _shift_hue(
    planes: Float[Array, "3 *batch height width"], shift: Float[Array, "*batch 1 1"]
) -> Float[Array, "3 *batch height width"]:
    """Moves hues by `shift` turns without leaving RGB; value and chroma stay.

    A hue is a place in [0, 6) on the hexagon red, yellow, green, cyan, blue, magenta (Smith 1978); each
    channel is the value less the chroma times a trapezoid of the distance to the channel's own corner.
    """
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    per_chroma = 1 / jnp.where(chroma > 0, chroma, 1.0)  # a grey has no hue, and needs none
    hue = jnp.where(
        value == red,
        (green - blue) * per_chroma,
        jnp.where(value == green, 2 + (blue - red) * per_chroma, 4 + (red - green) * per_chroma),
    )

    # One expression for all channels, as a stack of three keeps XLA from vectorising what follows it.
    corner = jnp.array([5.0, 3.0, 1.0]).reshape((3,) + (1,) * hue.ndim)
    place = hue + (6 * shift + corner)
    place = place - 6 * jnp.floor(place / 6)
    return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0.0, 1.0)


def _blend(images: Array, anchor: Array | float, factor: Array) -> Array:
    return jnp.clip(factor * images + (1 - factor) * anchor, 0.0, 1.0)


def _per_pixel(parameter: Array | float) -> Array:
    """One value per image, shaped to meet the pixels of a plane."""
    return jnp.asarray(parameter)[..., None, None]

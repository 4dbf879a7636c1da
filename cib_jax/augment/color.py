"""What a view does to an image's colors: jitter, grayscale, blur; pure functions of float images in [0, 1].

Each takes images [..., height, width, 3] and one parameter per image [...], and gives what the function of
that name in `torchvision.transforms.functional` gives for float tensors. For a chain of steps there are
`jitter_rows`, `jitter_alone` and `blur_rows`, with the pixels in rows [..., height, 3, width]: one channel's pixels
of a row lie side by side there, so that a CPU computes many at once, where a last axis of 3 has it go one by one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601, rounded as torchvision rounds it


class ColorJitter(NamedTuple):
    """One draw of the color jitter: the order of the four operations, and how far each goes.

    `order` lists the operations (`BRIGHTNESS`, `CONTRAST`, `SATURATION`, `HUE`) in the order they are
    applied; `factors` holds the factors of the first three, in that numbering, where 1 changes nothing; `hue`
    is a shift in turns of the color circle, where 0 changes nothing.
    """

    order: Int[Array, "*batch 4"]
    factors: Float[Array, "*batch 3"]
    hue: Float[Array, "*batch"]


def sample_color_jitter(
    key: PRNGKeyArray, *, brightness: float, contrast: float, saturation: float, hue: float
) -> ColorJitter:
    """Draws the color jitter of one image: factors from U(1 ± strength), the hue's shift from U(±hue)."""
    order, distance = jnp.split(jax.random.uniform(key, (8,)), 2)
    distance = (2 * distance - 1) * jnp.array([brightness, contrast, saturation, hue])
    return ColorJitter(order=jnp.argsort(order), factors=1 + distance[:3], hue=distance[3])


def adjust_brightness(
    images: Float[Array, "*batch height width 3"], factor: Float[Array, "*batch"]
) -> Float[Array, "*batch height width 3"]:
    """Returns the images times `factor` (0 is black, 1 changes nothing), clamped to [0, 1]."""
    return _blend(images, 0.0, _per_pixel(factor))


def adjust_contrast(
    images: Float[Array, "*batch height width 3"], factor: Float[Array, "*batch"]
) -> Float[Array, "*batch height width 3"]:
    """Returns the images blended with their mean gray: factor 0 is that, 1 changes nothing; in [0, 1]."""
    return _blend(images, jnp.mean(_gray(to_rows(images)), axis=(-3, -2, -1), keepdims=True), _per_pixel(factor))


def adjust_saturation(
    images: Float[Array, "*batch height width 3"], factor: Float[Array, "*batch"]
) -> Float[Array, "*batch height width 3"]:
    """Returns the images blended with their grayscale: factor 0 is that, 1 changes nothing; in [0, 1]."""
    rows = to_rows(images)
    return to_images(_blend(rows, _gray(rows), _per_pixel(factor)))


def adjust_hue(
    images: Float[Array, "*batch height width 3"], shift: Float[Array, "*batch"]
) -> Float[Array, "*batch height width 3"]:
    """Returns the images with every hue moved by `shift` turns of the color circle, as through HSV."""
    return to_images(_shift_hue(to_rows(images), shift))


def to_grayscale(
    images: Float[Array, "*batch height width 3"], chosen: Bool[Array, "*batch"] | bool = True
) -> Float[Array, "*batch height width 3"]:
    """Returns the images, those `chosen` with their gray in all three channels."""
    rows = to_rows(images)
    return to_images(jnp.where(_per_pixel(chosen), _gray(rows), rows))


def color_jitter(
    images: Float[Array, "*batch height width 3"], jitter: ColorJitter
) -> Float[Array, "*batch height width 3"]:
    """Returns the images after the four operations of `jitter`, each image's in its own order."""
    return to_images(jitter_rows(to_rows(images), jitter))


def gaussian_blur(
    images: Float[Array, "*batch height width 3"], sigma: Float[Array, "*batch"]
) -> Float[Array, "*batch height width 3"]:
    """Returns the images blurred by a 3 × 3 Gaussian of `sigma` pixels; 0 changes nothing.

    The edge pixels' missing neighbors are those on the other side (padding by reflection), so height and
    width must be at least 2.
    """
    rows = to_rows(images)
    around = [(0, 0)] * (rows.ndim - 3) + [(1, 1), (0, 0), (1, 1)]
    return to_images(blur_rows(jnp.pad(rows, around, mode="reflect"), sigma))


def jitter_rows(
    rows: Float[Array, "*batch height 3 width"],
    jitter: ColorJitter,
    grayscale: Bool[Array, "*batch"] | bool = False,
    *,
    margin: int = 0,
) -> Float[Array, "*batch height 3 width"]:
    """Returns the rows after `jitter`, and after that those chosen for `grayscale` without their colors.

    Brightness, contrast and saturation are one blend with three anchors: black, the mean gray, the pixel's own
    gray, which with a factor of 0 is grayscale too. The shift of hue costs as much as several blends, so it is done
    once, between the blends that come before it and those that come after it; a turn that is not an image's is a
    blend by 1, which changes nothing. `margin` pixels on every side do not count for the mean gray.
    """
    hue_turn = jnp.argmax(jitter.order == HUE, axis=-1)[..., None]
    factors = jnp.concatenate((jitter.factors, jnp.ones_like(jitter.hue)[..., None]), axis=-1)
    factors = jnp.take_along_axis(factors, jitter.order, axis=-1)
    turns = jnp.arange(4)
    before, after = jnp.where(turns < hue_turn, factors, 1.0), jnp.where(turns > hue_turn, factors, 1.0)
    grayed = jnp.where(jnp.asarray(grayscale), 0.0, jnp.ones_like(jitter.hue))
    # The hue is never after the last turn nor before the first, whose place the grayscale takes at the end.
    after = jnp.concatenate((after[..., 1:], grayed[..., None]), axis=-1)
    last = jnp.full_like(jitter.order[..., :1], SATURATION)
    rows = _blends(rows, jitter.order[..., :3], before[..., :3], margin)
    rows = _shift_hue(rows, jitter.hue)
    return _blends(rows, jnp.concatenate((jitter.order[..., 1:], last), axis=-1), after, margin)


def jitter_alone(
    rows: Float[Array, "1 height 3 width"],
    jitter: ColorJitter,
    grayscale: Bool[Array, "1"],
    *,
    margin: int = 0,
) -> Float[Array, "1 height 3 width"]:
    """Returns `jitter_rows` of one image by itself, with a branch at each turn: only what was drawn is computed.

    The form for large images on a CPU. Over a batch, every branch would be computed for every image.
    """

    def contrast(rows: Array, factor: Array) -> Array:
        return _blend(rows, _mean_gray(_gray(rows), margin), _per_pixel(factor))

    def saturation(rows: Array, factor: Array) -> Array:
        return _blend(rows, _gray(rows), _per_pixel(factor))

    def turn(rows: Array, drawn: tuple[Array, Array]) -> tuple[Array, None]:
        # In the numbering of the operations, and after those what changes nothing.
        branches = (adjust_brightness, contrast, saturation, _shift_hue, lambda rows, _: rows)
        return jax.lax.switch(drawn[0], branches, rows, drawn[1][None]), None

    strengths = jnp.concatenate((jitter.factors, jitter.hue[:, None]), axis=-1)[0]
    idle = strengths == jnp.array([1.0, 1.0, 1.0, 0.0])
    operations = jnp.where(idle, len(strengths), jnp.arange(4))[jitter.order[0]]
    operations = jnp.append(operations, jnp.where(grayscale[0], SATURATION, len(strengths)))
    return jax.lax.scan(turn, rows, (operations, jnp.append(strengths[jitter.order[0]], 0.0)))[0]


def blur_rows(
    rows: Float[Array, "*batch height+2 3 width+2"], sigma: Float[Array, "*batch"]
) -> Float[Array, "*batch height 3 width"]:
    """Returns the rows blurred as by `gaussian_blur`, without the pixel on every side that only gives to others."""
    sigma = jnp.asarray(sigma)
    side = jnp.where(sigma > 0, jnp.exp(-0.5 / jnp.where(sigma > 0, sigma, 1.0) ** 2), 0.0)
    center, side = (_per_pixel(w / (1 + 2 * side)) for w in (1.0, side))
    rows = center * rows[..., 1:-1, :, :] + side * (rows[..., :-2, :, :] + rows[..., 2:, :, :])
    return center * rows[..., 1:-1] + side * (rows[..., :-2] + rows[..., 2:])


def to_rows(images: Float[Array, "*batch height width 3"]) -> Float[Array, "*batch height 3 width"]:
    """Returns the images with the pixels of one channel of one row side by side."""
    return jnp.swapaxes(images, -1, -2)


def to_images(rows: Float[Array, "*batch height 3 width"]) -> Float[Array, "*batch height width 3"]:
    """Returns rows as images again, the channels last."""
    return jnp.swapaxes(rows, -1, -2)


def _blends(
    rows: Float[Array, "*batch height 3 width"],
    operations: Int[Array, "*batch turns"],
    factors: Float[Array, "*batch turns"],
    margin: int,
) -> Float[Array, "*batch height 3 width"]:
    """Brightness, contrast or saturation at each turn; any other operation must come with a factor of 1."""

    def turn(rows: Array, drawn: tuple[Array, Array]) -> tuple[Array, None]:
        operation, factor = _per_pixel(drawn[0]), _per_pixel(drawn[1])
        gray = _gray(rows)
        mean = jnp.where(operation == CONTRAST, _mean_gray(gray, margin), 0.0)
        anchor = jnp.where(operation == SATURATION, gray, mean)
        return _blend(rows, anchor, factor), None

    # A loop, because XLA would fuse unrolled turns and compute each one anew for every channel of the next.
    turns = jnp.moveaxis(operations, -1, 0), jnp.moveaxis(factors, -1, 0)
    return jax.lax.scan(turn, rows, turns)[0]


def _gray(rows: Float[Array, "*batch height 3 width"]) -> Float[Array, "*batch height 1 width"]:
    red, green, blue = (weight * rows[..., i : i + 1, :] for i, weight in enumerate(GREY_WEIGHTS))
    return red + green + blue


def _mean_gray(gray: Float[Array, "*batch height 1 width"], margin: int) -> Float[Array, "*batch 1 1 1"]:
    height, _, width = gray.shape[-3:]
    inside = gray[..., margin : height - margin, :, margin : width - margin]
    return jnp.mean(inside, axis=(-3, -2, -1), keepdims=True)


def _shift_hue(
    rows: Float[Array, "*batch height 3 width"], shift: Float[Array, "*batch"]
) -> Float[Array, "*batch height 3 width"]:
    """Moves hues by `shift` turns without leaving RGB; value and chroma stay.

    A hue is a place in [0, 6) on the hexagon red, yellow, green, cyan, blue, magenta (Smith 1978); each
    channel is the value less the chroma times a trapezoid of the distance to the channel's own corner.
    """
    red, green, blue = (rows[..., i : i + 1, :] for i in range(3))
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    per_chroma = 1 / jnp.where(chroma > 0, chroma, 1.0)  # a gray has no hue, and needs none
    hue = jnp.where(
        value == red,
        (green - blue) * per_chroma,
        jnp.where(value == green, 2 + (blue - red) * per_chroma, 4 + (red - green) * per_chroma),
    )

    # One expression for all channels, as a stack of three keeps XLA from vectorising what follows it.
    corner = jnp.array([[5.0], [3.0], [1.0]])
    place = hue + (6 * _per_pixel(shift) + corner)
    place = place - 6 * jnp.floor(place / 6)
    return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0.0, 1.0)


def _blend(images: Array, anchor: Array | float, factor: Array) -> Array:
    return jnp.clip(factor * images + (1 - factor) * anchor, 0.0, 1.0)


def _per_pixel(parameter: Array | float) -> Array:
    """One value per image, shaped to meet its pixels."""
    return jnp.asarray(parameter)[..., None, None, None]

"""Color operations of the views: jitter, grayscale and blur of float images in [0, 1].

Each operation gives what the function of its name in `torchvision.transforms.functional` gives for float tensors.

Pixels are in rows [batch, height, 3, width], unless a function says otherwise: the values of one channel in one row are
adjacent in memory, so that a CPU computes several at once. With a last axis of 3, XLA computes them one by one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # numbers of the operations in `ColorJitter.order`
CORNERS = (5.0, 3.0, 1.0)  # offsets of red, green and blue on the hexagon of hues
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # of red, green and blue: the luma of ITU-R BT.601, rounded as in torchvision

Planes = tuple[Float[Array, "batch height width"], ...]
"""The three channels of a batch of images."""


class ColorJitter(NamedTuple):
    """Random parameters of the color jitter: the order of the four operations, and the strength of each."""

    order: Int[Array, "*batch 4"]  # numbers of the operations in the order of their application
    factors: Float[Array, "*batch 3"]  # of brightness, contrast and saturation; 1 changes nothing
    hue: Float[Array, "*batch"]  # shift in turns of the color circle; 0 changes nothing


def sample_color_jitter(
    key: PRNGKeyArray, *, brightness: float, contrast: float, saturation: float, hue: float
) -> ColorJitter:
    """Draws the color jitter of one image: factors from U(1 − strength, 1 + strength), the shift from U(−hue, hue)."""
    order, distance = jnp.split(jax.random.uniform(key, (8,), jnp.float32), 2)
    distance = (2 * distance - 1) * jnp.array([brightness, contrast, saturation, hue], jnp.float32)
    return ColorJitter(order=jnp.argsort(order), factors=1 + distance[:3], hue=distance[3])


def adjust_brightness(
    pixels: Float[Array, "*batch i j k"], factor: Float[Array, "*batch"]
) -> Float[Array, "*batch i j k"]:
    """Returns images in any layout, multiplied by `factor` (0 is black, 1 changes nothing) and clamped to [0, 1]."""
    return _blend(pixels, 0.0, factor)


def jitter_rows(
    rows: Float[Array, "batch height 3 width"],
    jitter: ColorJitter,
    grayscale: Bool[Array, " batch"],
    *,
    margin: int = 0,
) -> Float[Array, "batch height 3 width"]:
    """Returns images after their color jitter, and then without colors where `grayscale` is True.

    All images of a batch run the same operations, whatever was drawn for each; `jitter_one` branches instead. The
    outermost `margin` pixels at each side do not count for the mean gray of the contrast. This is the form for batches
    of small images on a CPU.
    """
    # Brightness, contrast and saturation are all a blend of the image with an anchor: black, the mean gray or each
    # pixel's own gray. So is grayscale: a saturation of 0. A change of hue costs as much as several blends. It is
    # computed once, after the (up to three) blends that precede it and before the (up to three) that follow it. A turn
    # that belongs to the other side of the hue becomes a blend with factor 1, which changes nothing.
    hue_turn = jnp.argmax(jitter.order == HUE, axis=-1)[:, None]
    factors = jnp.concatenate((jitter.factors, jnp.ones_like(jitter.hue)[:, None]), axis=-1)
    factors = jnp.take_along_axis(factors, jitter.order, axis=-1)
    turns = jnp.arange(4)[None]
    before, after = jnp.where(turns < hue_turn, factors, 1.0), jnp.where(turns > hue_turn, factors, 1.0)
    # No blend before the hue is in the last turn, and none after it in the first. Grayscale takes the free place.
    after = jnp.concatenate((after[:, 1:], jnp.where(grayscale, 0.0, 1.0)[:, None]), axis=-1)
    order_after = jnp.concatenate((jitter.order[:, 1:], jnp.full_like(jitter.order[:, :1], SATURATION)), axis=-1)
    rows = _blend_in_turn(rows, jitter.order[:, :3], before[:, :3], margin)
    rows = _shift_hue(rows, jitter.hue)
    return _blend_in_turn(rows, order_after, after, margin)


def _blend_in_turn(
    rows: Float[Array, "batch height 3 width"],
    operations: Int[Array, "batch turns"],
    factors: Float[Array, "batch turns"],
    margin: int,
) -> Float[Array, "batch height 3 width"]:
    """Applies brightness, contrast or saturation at each turn; any other operation must have a factor of 1."""

    def turn(rows: Array, drawn: tuple[Array, Array]) -> tuple[Array, None]:
        operation, factor = drawn
        gray = _gray(rows)
        mean = jnp.where(_per_pixel(operation == CONTRAST), _mean_gray(gray, margin), 0.0)
        anchor = jnp.where(_per_pixel(operation == SATURATION), gray, mean)
        return _blend(rows, anchor, factor), None

    # A loop, since XLA would fuse unrolled turns, and compute each turn again for every channel of the next.
    return jax.lax.scan(turn, rows, (operations.T, factors.T))[0]


def jitter_planes(
    rows: Float[Array, "batch height 3 width"],
    jitter: ColorJitter,
    grayscale: Bool[Array, " batch"],
    *,
    margin: int = 0,
) -> Float[Array, "batch height 3 width"]:
    """Returns the result of `jitter_rows` by a program that reads and writes the pixels less often.

    This is the form for accelerators: each turn is one operation from three channels, as arrays of their own, to three.
    A CPU would compute each turn again for every channel of the next.
    """
    strengths = jnp.concatenate((jitter.factors, jitter.hue[:, None]), axis=-1)
    strengths = jnp.take_along_axis(strengths, jitter.order, axis=-1)
    contrast_turn = jnp.argmax(jitter.order == CONTRAST, axis=-1)

    def turn(planes: Planes, number: int, drawn: Bool[Array, " batch"]) -> Planes:
        """Applies brightness, saturation or hue, whatever this turn is, where `drawn` is True."""
        operation, strength = jitter.order[:, number], strengths[:, number]
        is_hue = operation == HUE
        gray = jnp.where(_of_planes(operation == SATURATION), _gray_of(planes), 0.0)
        blended = _blend_planes(planes, gray, jnp.where(drawn & ~is_hue, strength, 1.0))
        turned = _shift_hue_of_planes(planes, jnp.where(drawn & is_hue, strength, 0.0))
        return tuple(jnp.where(_of_planes(is_hue), *both) for both in zip(turned, blended, strict=True))

    # The mean gray is that of the image as the contrast finds it, so that all turns before it come first, and all after
    # it last. A turn of the other side changes nothing.
    planes: Planes = tuple(rows[..., channel, :] for channel in range(3))
    for number in range(3):
        planes = turn(planes, number, number < contrast_turn)
    mean = _mean_gray(_gray_of(planes)[..., None, :], margin)[..., 0]
    planes = _blend_planes(planes, mean, jitter.factors[:, CONTRAST])
    for number in range(1, 4):
        planes = turn(planes, number, number > contrast_turn)
    planes = _blend_planes(planes, _gray_of(planes), jnp.where(grayscale, 0.0, 1.0))
    return jnp.stack(planes, axis=-2)


def jitter_one(
    rows: Float[Array, "1 height 3 width"],
    jitter: ColorJitter,
    grayscale: Bool[Array, "1"],
    *,
    margin: int = 0,
) -> Float[Array, "1 height 3 width"]:
    """Returns the result of `jitter_rows` for a batch of one image, and computes only the operations that were drawn.

    This is the form for large images on a CPU. Under `jax.vmap`, XLA would compute every branch for every image.
    """

    branches = (  # by number of the operation; the last one changes nothing
        adjust_brightness,
        lambda rows, factor: _blend(rows, _mean_gray(_gray(rows), margin), factor),
        lambda rows, factor: _blend(rows, _gray(rows), factor),
        _shift_hue,
        lambda rows, factor: rows,
    )

    def turn(rows: Array, drawn: tuple[Array, Array]) -> tuple[Array, None]:
        operation, strength = drawn
        return jax.lax.switch(operation, branches, rows, strength[None]), None

    nothing = len(branches) - 1
    strengths = jnp.concatenate((jitter.factors, jitter.hue[:, None]), axis=-1)[0]
    unchanged = strengths == jnp.array([1.0, 1.0, 1.0, 0.0], jnp.float32)
    operations = jnp.where(unchanged, nothing, jnp.arange(4))[jitter.order[0]]
    operations = jnp.append(operations, jnp.where(grayscale[0], SATURATION, nothing))
    return jax.lax.scan(turn, rows, (operations, jnp.append(strengths[jitter.order[0]], 0.0)))[0]


def blur_rows(
    rows: Float[Array, "batch padded_height 3 padded_width"], sigma: Float[Array, " batch"]
) -> Float[Array, "batch padded_height-2 3 padded_width-2"]:
    """Returns images blurred by a 3 × 3 Gaussian of `sigma` pixels, without the outermost pixel of every side.

    torchvision pads by reflection first. Here, the caller provides that padding (`geometry.resized_crop_rows` with
    `margin=1`). A `sigma` of 0 changes nothing.
    """
    center, side = (_per_pixel(weight) for weight in _blur_weights(sigma))
    rows = center * rows[:, 1:-1] + side * (rows[:, :-2] + rows[:, 2:])
    return center * rows[..., 1:-1] + side * (rows[..., :-2] + rows[..., 2:])


def blur_rows_by_products(
    rows: Float[Array, "batch padded_height 3 padded_width"], sigma: Float[Array, " batch"]
) -> Float[Array, "batch padded_height-2 3 padded_width-2"]:
    """Returns the result of `blur_rows` by two matrix products per image.

    This is the form for accelerators, whose memory is not addressed by single pixels: shifted copies cost them more.
    """
    center, side = (_of_planes(weight) for weight in _blur_weights(sigma))

    def weights(size: int) -> Float[Array, "batch {size-2} {size}"]:
        distance = jnp.abs(jnp.arange(1, size - 1)[:, None] - jnp.arange(size)[None])[None]
        return jnp.where(distance == 0, center, jnp.where(distance == 1, side, 0.0))

    # The default precision would round the pixels to 8 or 10 bits.
    rows = jnp.einsum("byh,bhcx->bycx", weights(rows.shape[1]), rows, precision="highest")
    return jnp.einsum("bxw,bycw->bycx", weights(rows.shape[3]), rows, precision="highest")


def _blur_weights(sigma: Float[Array, " batch"]) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Returns the weights of a pixel and of each of its two neighbors in a row or a column."""
    # The inner `where` keeps the exponent finite where the outer one discards it.
    side = jnp.where(sigma > 0, jnp.exp(-0.5 / jnp.where(sigma > 0, sigma, 1.0) ** 2), 0.0)
    return 1 / (1 + 2 * side), side / (1 + 2 * side)


def _gray(rows: Float[Array, "batch height 3 width"]) -> Float[Array, "batch height 1 width"]:
    return _gray_of(tuple(rows[..., i : i + 1, :] for i in range(3)))


def _gray_of(channels: tuple[Array, ...]) -> Array:
    red, green, blue = (weight * channel for weight, channel in zip(GRAY_WEIGHTS, channels, strict=True))
    return red + green + blue


def _mean_gray(gray: Float[Array, "batch height 1 width"], margin: int) -> Float[Array, "batch 1 1 1"]:
    _, height, _, width = gray.shape
    inside = gray[:, margin : height - margin, :, margin : width - margin]
    return jnp.mean(inside, axis=(1, 2, 3), keepdims=True)


def _shift_hue(
    rows: Float[Array, "batch height 3 width"], shift: Float[Array, " batch"]
) -> Float[Array, "batch height 3 width"]:
    """Returns images with every hue moved by `shift` turns of the color circle; value and chroma stay.

    Equal to the way through HSV and back, without leaving RGB. A hue is a position in [0, 6) on the hexagon red,
    yellow, green, cyan, blue, magenta (Smith 1978). Each channel is the value minus the chroma times a trapezoid of the
    distance from the channel's own corner.
    """
    value, chroma, hue = _value_chroma_hue(*(rows[..., i : i + 1, :] for i in range(3)))
    # One expression for all three channels: a stack of three would keep XLA from vectorizing what follows it.
    corner = jnp.array(CORNERS, jnp.float32).reshape(1, 1, 3, 1)
    return _channel_of_hue(value, chroma, hue + (6 * _per_pixel(shift) + corner))


def _shift_hue_of_planes(planes: Planes, shift: Float[Array, " batch"]) -> Planes:
    value, chroma, hue = _value_chroma_hue(*planes)
    hue = hue + 6 * _of_planes(shift)
    return tuple(_channel_of_hue(value, chroma, hue + corner) for corner in CORNERS)


def _value_chroma_hue(red: Array, green: Array, blue: Array) -> tuple[Array, Array, Array]:
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    per_chroma = 1 / jnp.where(chroma > 0, chroma, 1.0)  # the hue of a gray is undefined, and multiplied by 0 below
    # No channel is compared with `value`, from which it can differ in its last bit where XLA computes both again.
    hue = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) * per_chroma,
        jnp.where(green >= blue, 2 + (blue - red) * per_chroma, 4 + (red - green) * per_chroma),
    )
    return value, chroma, hue


def _channel_of_hue(value: Array, chroma: Array, position: Array) -> Array:
    position = position - 6 * jnp.floor(position / 6)
    return value - chroma * jnp.clip(jnp.minimum(position, 4 - position), 0.0, 1.0)


def _blend(pixels: Array, anchor: Array | float, factor: Float[Array, "*batch"]) -> Array:
    factor = _per_pixel(factor)
    return jnp.clip(factor * pixels + (1 - factor) * anchor, 0.0, 1.0)


def _per_pixel(parameter: Array) -> Array:
    """Returns one parameter per image in the shape in which it broadcasts against the images' pixels."""
    return parameter[..., None, None, None]


def _blend_planes(planes: Planes, anchor: Array, factor: Float[Array, " batch"]) -> Planes:
    factor = _of_planes(factor)
    return tuple(jnp.clip(factor * plane + (1 - factor) * anchor, 0.0, 1.0) for plane in planes)


def _of_planes(parameter: Array) -> Array:
    """Returns one parameter per image in the shape in which it broadcasts against a plane of pixels."""
    return parameter[:, None, None]

"""Colors of a decoded image: 8-bit sRGB from any mode, depth, color profile and transparency."""

import functools
import io
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8
from PIL import ImageCms, TiffImagePlugin

_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}
"""Color space of a profile that describes an image, by the image's mode."""
_SAME = 2  # levels, up to which a profile is sRGB under another name or rounded

_FAINT = 24  # levels by which what is drawn must differ from white, in root mean square, to be seen on it
_DARK = (64, 64, 64)
_SAMPLED = 256  # pixels a side that are enough to choose a background

# PNG's gray levels of few bits and colors of 16 bits become 8 bits when they are read; tRNS does not.
_TRANSPARENT_LEVEL = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 257}


def correct_transparency(image: Any) -> None:
    """Changes the transparent level or color of a PNG, before its pixels are read, to what they will be."""
    levels = image.info.get("transparency")
    factor = _TRANSPARENT_LEVEL.get(image.tile[0][3]) if image.format == "PNG" and image.tile else None
    if factor and not isinstance(levels, bytes | None):
        scaled = [int(level * factor) for level in np.atleast_1d(levels)]
        image.info["transparency"] = tuple(scaled) if isinstance(levels, tuple) else scaled[0]


def to_rgb_or_gray(image: Any) -> Any:
    """Returns an image in mode RGB or L, opaque, in the color space of its profile."""
    transparency = image.info.get("transparency")
    if image.mode in ("RGB", "L") and transparency is None:
        return image
    if image.mode.startswith(("I", "F")):
        gray = PIL.Image.fromarray(_eight_bits(image))
        if transparency is None:
            return gray
        opaque = np.where(np.asarray(image) == transparency, 0, 255).astype(np.uint8)
        return _flatten(PIL.Image.merge("LA", (gray, PIL.Image.fromarray(opaque))))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or transparency is not None:
        return _flatten(image)
    if image.mode in ("CMYK", "LAB"):
        converted = _convert(image, image.info.get("icc_profile"))
        if converted is not None:
            return converted
    return image.convert("RGB")


def to_srgb(image: Any, profile: bytes | None) -> Any:
    """Returns an image of mode RGB or L in sRGB, given the profile of its file."""
    converted = _convert(image, profile)
    if converted is None and image.mode == "L" and profile:
        # Gray photos often have the profile of a color space.
        converted = _convert(image.convert("RGB"), profile)
    return image if converted is None else converted


def _convert(image: Any, profile: bytes | None) -> Any | None:
    """Returns an image in sRGB; None if the profile is not that of its mode, is damaged, or is sRGB itself."""
    # The colors of CIELAB need no profile.
    transform = _transform(profile, image.mode) if profile or image.mode == "LAB" else None
    return None if transform is None else ImageCms.applyTransform(image, transform)


@functools.lru_cache(16)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns the transform from a profile to sRGB, or None if none is needed or possible."""
    try:
        lab = mode == "LAB"
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB") if lab else io.BytesIO(profile or b""))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
        if mode not in ("L", "RGB"):
            return transform
        levels = np.linspace(0, 255, 6).astype(np.uint8)
        colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(6, 36, 3)
        test = PIL.Image.fromarray(colors).convert(mode)
        changed = np.asarray(ImageCms.applyTransform(test, transform), np.int16) - np.asarray(test.convert("RGB"))
    except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile does not affect the pixels
        return None
    return transform if np.abs(changed).max() > _SAME else None


def _flatten(image: Any) -> Any:
    """Returns an image in RGB on white, or on dark gray if what is drawn could hardly be seen on white."""
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image.convert("RGB")
    flat = PIL.Image.new("RGB", image.size, _background(image))
    flat.paste(image, mask=alpha)
    return flat


def _background(image: Any) -> str | tuple[int, int, int]:
    size = (min(image.width, _SAMPLED), min(image.height, _SAMPLED))
    pixels = np.asarray(image.resize(size, PIL.Image.Resampling.NEAREST), np.float64)
    weights = pixels[..., 3]
    if not weights.any():
        return "white"
    contrast = 255 - pixels[..., :3].min(axis=-1)
    return "white" if np.average(contrast**2, weights=weights) >= _FAINT**2 else _DARK


def _eight_bits(image: Any) -> UInt8[np.ndarray, "height width"]:
    """Returns gray levels of 12, 16 or 32 bits or in floating point as 8 bits."""
    tags = getattr(image, "tag_v2", {})
    gray = np.asarray(image)
    if gray.dtype.kind in "ui" and gray.min() >= 0 and gray.max() < 1 << 16:
        white = 4095 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 65535
        levels = ((gray.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    else:
        gray = np.nan_to_num(gray.astype(np.float64), posinf=0.0, neginf=0.0)
        low, high = (0.0, 1.0) if gray.min() >= 0 and gray.max() <= 1 else (gray.min(), gray.max())
        levels = np.round((gray - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)
    # Pillow inverts TIFF's WhiteIsZero up to 8 bits only.
    return 255 - levels if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else levels

"""The look of a photo in 64 bits, by which copies of one picture are known, however they were saved or resized."""

import contextlib
import io
import os
import stat
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import UInt8

# data.difference_hash: The look of a photo in 64 bits, by which copies of one picture are known, however they were saved or resized.

BITS = 64
_SIDE = 8


def difference_hash(image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "8"]:
    """Returns, packed, whether each of 8 × 8 places is brighter than the one left of it.

    Copies of a picture differ in a few bits of 64, pictures of like things in about half (Krawetz, Kind of Like That,
    2013, https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html).
    """
    gray = PIL.Image.fromarray(image).convert("L").resize((_SIDE + 1, _SIDE), PIL.Image.Resampling.BOX)
    levels = np.asarray(gray, np.int16)
    return np.packbits(levels[:, 1:] > levels[:, :-1])


# data.photos: One photo, whatever its format, mode, size and state, as a square of RGB; or the reason why not.

MAX_MEGAPIXELS = 178
"""Pillow refuses larger images as decompression bombs."""

VERSION = f"1-pillow-{PIL.__version__}"
"""Changes whenever the same file may come to other pixels."""

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"})

# Named, so that a file never reaches one of Pillow's forty other readers, some of which start other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")
_READABLE = "JPEG, PNG, WebP, GIF, BMP or TIFF image"

_LARGE_PIXELS = 32_000_000
_one_large = threading.Lock()

_TRANSPOSE = PIL.Image.Transpose
# By the tag Orientation of EXIF (TIFF 6.0, section 8): what turns the stored pixels upright.
_UPRIGHT = {
    2: _TRANSPOSE.FLIP_LEFT_RIGHT,
    3: _TRANSPOSE.ROTATE_180,
    4: _TRANSPOSE.FLIP_TOP_BOTTOM,
    5: _TRANSPOSE.TRANSPOSE,
    6: _TRANSPOSE.ROTATE_270,
    7: _TRANSPOSE.TRANSVERSE,
    8: _TRANSPOSE.ROTATE_90,
}
_ORIENTATION = 0x0112
_LYING = range(5, 9)  # width and height change places

THUMBNAIL = 192
"""Longer side of a thumbnail in pixels."""
_THUMBNAIL_QUALITY = 78


class BadPhotoError(ValueError):
    """A photo cannot be used; the message is the reason, in a few words."""


class TooLargeError(BadPhotoError):
    """A photo has more pixels than are allowed."""


class Seen(NamedTuple):
    """A photo as a network and as people see it."""

    square: UInt8[np.ndarray, "size size 3"]
    thumbnail: bytes
    """A JPEG without any metadata, its longer side `THUMBNAIL` pixels or, if the photo is smaller, the photo's."""
    width: int
    """Of the photo, upright, in pixels."""
    height: int
    """The same."""


def decode(
    content: bytes | str | os.PathLike[str], size: int, *, max_megapixels: int = MAX_MEGAPIXELS
) -> UInt8[np.ndarray, "size size 3"]:
    """Returns a photo in RGB, upright, resized to a square, bilinearly and antialiased; of animations the first frame.

    Transparent parts become white. 16-bit gray is scaled to 8 bits, floating-point gray by its own range unless it lies
    within [0, 1].

    Args:
      content: of the file, or its path.
      size: side in pixels; 0 leaves the photo at its own size, [height, width, 3].
      max_megapixels: of the photo as stored.

    Raises:
      BadPhotoError: it cannot be read, is no image, is damaged or too large.
    """
    with _image(content, max_megapixels) as image:
        return np.asarray(_square(image, size))


def see(content: bytes | str | os.PathLike[str], size: int, *, max_megapixels: int = MAX_MEGAPIXELS) -> Seen:
    """Returns what `decode` does, a thumbnail and the photo's own size, of one file and, mostly, of one decoding.

    Raises:
      BadPhotoError: as `decode`.
    """
    with _image(content, max_megapixels) as image:
        width, height = image.size
        square = _square(image, size)
        orientation = _orientation(image)
        # Decoded for a small square, a JPEG may have fewer pixels left than a thumbnail has.
        again = max(image.size) < min(THUMBNAIL, max(width, height))
        thumbnail = b"" if again else _jpeg(image, THUMBNAIL, orientation, _THUMBNAIL_QUALITY)
    if again:
        with _image(content, max_megapixels) as image:
            image.draft(None, (THUMBNAIL, THUMBNAIL))
            image.load()
            thumbnail = _jpeg(image, THUMBNAIL, orientation, _THUMBNAIL_QUALITY)
    return Seen(np.asarray(square), thumbnail, *((height, width) if orientation in _LYING else (width, height)))


def reduced(content: bytes | str | os.PathLike[str], longest: int, *, max_megapixels: int = MAX_MEGAPIXELS) -> bytes:
    """Returns a photo as a JPEG without any metadata, upright, its longer side at most `longest` pixels.

    Raises:
      BadPhotoError: as `decode`.
    """
    with _image(content, max_megapixels) as image:
        image.draft(None, (longest, longest))
        image.load()
        return _jpeg(image, longest, _orientation(image), 88)


@contextlib.contextmanager
def _image(content: bytes | str | os.PathLike[str], max_megapixels: int) -> Iterator[Any]:
    """Yields an image whose pixels are not read yet; turns whatever goes wrong with it into a BadPhotoError."""
    try:
        with _opened(content) as file, PIL.Image.open(file, formats=_FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_megapixels * 1_000_000:
                raise TooLargeError(
                    f"{image.width} × {image.height} pixels, more than data.max_megapixels={max_megapixels}"
                )
            # One at a time: a few of them at once could take all memory.
            with _one_large if pixels > _LARGE_PIXELS else contextlib.nullcontext():
                yield image
    except BadPhotoError:
        raise
    except Exception as error:  # whatever a crafted or damaged file makes Pillow raise, it is a reason to leave it out
        raise BadPhotoError(_reason(error)) from error


@contextlib.contextmanager
def _opened(content: bytes | str | os.PathLike[str]) -> Iterator[Any]:
    if isinstance(content, bytes):
        if not content:
            raise BadPhotoError("0 bytes")
        yield io.BytesIO(content)
        return
    found = os.stat(content)
    if not stat.S_ISREG(found.st_mode):
        raise BadPhotoError("not a file")
    if not found.st_size:
        raise BadPhotoError("0 bytes")
    with open(content, "rb") as file:
        yield file


def _square(image: Any, size: int) -> PIL.Image.Image:
    if size:
        # A JPEG is decoded at 1/2, 1/4 or 1/8 where that still leaves twice the pixels that are wanted.
        image.draft(None, (2 * size, 2 * size))
    image.load()
    orientation = _orientation(image)
    if not size:
        return _turned(_rgb(image), orientation)
    image = _color_or_gray(image).resize((size, size), PIL.Image.Resampling.BILINEAR, reducing_gap=3.0)
    return _turned(image if image.mode == "RGB" else image.convert("RGB"), orientation)


def _color_or_gray(image: Any) -> Any:
    return image if image.mode in ("RGB", "L") and "transparency" not in image.info else _rgb(image)


def _jpeg(image: Any, longest: int, orientation: int, quality: int) -> bytes:
    image = _color_or_gray(image)
    scale = longest / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
    image = _turned(image, orientation).copy()
    image.info = {}  # among it are comments and color profiles, which would be written, too
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF, of which Pillow tells in many ways, says nothing about the pixels
        return 1


def _turned(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode.startswith(("I", "F")):
        image = PIL.Image.fromarray(_eight_bits(np.asarray(image)))
    return image.convert("RGB")


def _eight_bits(gray: np.ndarray) -> UInt8[np.ndarray, "height width"]:
    """Returns gray levels of 16 or 32 bits or in floating point as bytes."""
    if gray.dtype.kind in "ui" and gray.min() >= 0 and gray.max() < 1 << 16:
        return ((gray.astype(np.uint32) + 128) // 257).astype(np.uint8)
    gray = np.nan_to_num(gray.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = (0.0, 1.0) if gray.min() >= 0 and gray.max() <= 1 else (gray.min(), gray.max())
    return np.round((gray - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return f"not a {_READABLE}"
    if isinstance(error, PIL.Image.DecompressionBombError):
        return f"more than {MAX_MEGAPIXELS} million pixels, a decompression bomb"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    if "truncated" in first.lower():
        return f"truncated ({first})"
    return f"damaged ({type(error).__name__}: {first})"

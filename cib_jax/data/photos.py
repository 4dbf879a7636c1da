"""One photo of any format, mode, size and state: decoding to an RGB square, thumbnails, and a perceptual hash."""

import contextlib
import io
import os
import stat
import threading
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import PIL.ExifTags
import PIL.Image
from jaxtyping import UInt8
from PIL.Image import Transpose

from cib_jax.files import first_line, short_reason

MAX_MEGAPIXELS = 178
"""Limit above which Pillow rejects images as decompression bombs."""

VERSION = f"1-pillow-{PIL.__version__}"
"""Version of the decoder: changes whenever the same file may be decoded to other pixels."""

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"})

# Listed, so that a file never reaches one of Pillow's forty other readers, some of which start other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")

_LARGE_PIXELS = 32_000_000
_one_large = threading.Lock()

# Transpositions that turn the stored pixels upright, by the EXIF tag Orientation (TIFF 6.0, section 8).
_UPRIGHT = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM}
_UPRIGHT |= {5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
_SWAPPED = range(5, 9)  # orientations that swap width and height

THUMBNAIL = 480
"""Longer side of a thumbnail in pixels: twice that of a 4:3 photo on the search page, for dense screens."""

HASH_BITS = 64
"""Bits of `difference_hash`."""

_THUMBNAIL_QUALITY = 78


class BadPhotoError(ValueError):
    """A photo cannot be used; the message is a short reason."""


class TooLargeError(BadPhotoError):
    """A photo has more pixels than are allowed."""


Content = bytes | str | os.PathLike[str]
"""Content of an image file, or its path."""


class DecodedPhoto(NamedTuple):
    """A photo as an RGB square and as a JPEG without metadata, with the size of the upright photo in pixels.

    The thumbnail's longer side is `THUMBNAIL` pixels, or that of the photo if it is smaller.
    """

    square: UInt8[np.ndarray, "size size 3"]
    thumbnail: bytes
    width: int
    height: int


def decode(content: Content, size: int, *, max_megapixels: int = MAX_MEGAPIXELS) -> UInt8[np.ndarray, "size size 3"]:
    """Returns a photo in RGB, upright, resized to a square bilinearly with antialiasing, or raises a BadPhotoError.

    Of an animation, the first frame is decoded. Transparent parts become white. 16-bit gray is scaled to 8 bits,
    floating-point gray by its own range unless that is within [0, 1]. Size 0 keeps the size of the photo.
    """
    with _image(content, max_megapixels) as image:
        return np.asarray(_square(image, size))


def decode_with_thumbnail(content: Content, size: int, *, max_megapixels: int = MAX_MEGAPIXELS) -> DecodedPhoto:
    """Returns the square that `decode` returns, a thumbnail and the photo's size, mostly from one decoding."""
    with _image(content, max_megapixels) as image:
        width, height = image.size
        square = _square(image, size)
        orientation = _orientation(image)
        # A JPEG that was decoded for a small square may have fewer pixels than a thumbnail.
        again = max(image.size) < min(THUMBNAIL, max(width, height))
        thumbnail = b"" if again else _jpeg(image, THUMBNAIL, orientation, _THUMBNAIL_QUALITY)
    if again:
        thumbnail = reduced(content, THUMBNAIL, max_megapixels=max_megapixels, quality=_THUMBNAIL_QUALITY)
    if orientation in _SWAPPED:
        width, height = height, width
    return DecodedPhoto(np.asarray(square), thumbnail, width, height)


def reduced(content: Content, longest: int, *, max_megapixels: int = MAX_MEGAPIXELS, quality: int = 88) -> bytes:
    """Returns a photo as an upright JPEG without metadata, the longer side of which is at most `longest` pixels."""
    with _image(content, max_megapixels) as image:
        image.draft(None, (longest, longest))
        image.load()
        return _jpeg(image, longest, _orientation(image), quality)


def difference_hash(image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "8"]:
    """Returns a perceptual hash: for 8 × 8 areas, packed, whether each is brighter than its left neighbor.

    Resized or recompressed copies of a picture differ in a few of the 64 bits, different pictures in about half.

    References:
      Krawetz, Kind of Like That, 2013,
      https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html
    """
    gray = PIL.Image.fromarray(image).convert("L").resize((9, 8), PIL.Image.Resampling.BOX)
    levels = np.asarray(gray, np.int16)
    return np.packbits(levels[:, 1:] > levels[:, :-1])


@contextlib.contextmanager
def _image(content: Content, max_megapixels: int) -> Iterator[Any]:
    """Yields an image, the pixels of which are not read yet; turns any error in the block into a BadPhotoError."""
    try:
        with _opened(content) as file, PIL.Image.open(file, formats=_FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_megapixels * 1_000_000:
                size = f"{image.width} × {image.height} pixels"
                raise TooLargeError(f"{size}, more than data.max_megapixels={max_megapixels}")
            # Large images are decoded one at a time, since a few at once could exhaust memory.
            with _one_large if pixels > _LARGE_PIXELS else contextlib.nullcontext():
                yield image
    except BadPhotoError:
        raise
    except Exception as error:  # a crafted or damaged file can make Pillow raise anything
        raise BadPhotoError(_reason(error)) from error


def _opened(content: Content) -> IO[bytes]:
    status = None if isinstance(content, bytes) else os.stat(content)
    if status and not stat.S_ISREG(status.st_mode):  # reading a pipe would block
        raise BadPhotoError("not a file")
    if not (status.st_size if status else content):
        raise BadPhotoError("0 bytes")
    return io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb")


def _square(image: Any, size: int) -> PIL.Image.Image:
    if size:
        # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that still leaves twice the side of the square.
        image.draft(None, (2 * size, 2 * size))
    image.load()
    orientation = _orientation(image)
    if not size:
        return _upright(_rgb(image), orientation)
    image = _color_or_gray(image).resize((size, size), PIL.Image.Resampling.BILINEAR, reducing_gap=3.0)
    return _upright(image if image.mode == "RGB" else image.convert("RGB"), orientation)


def _color_or_gray(image: Any) -> Any:
    return image if image.mode in ("RGB", "L") and "transparency" not in image.info else _rgb(image)


def _jpeg(image: Any, longest: int, orientation: int, quality: int) -> bytes:
    image = _color_or_gray(image)
    scale = longest / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
    image = _upright(image, orientation).copy()
    image.info = {}  # it may hold comments and color profiles, which would be saved, too
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF, for which Pillow raises many classes, does not affect the pixels
        return 1


def _upright(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
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
    """Returns gray levels of 16 or 32 bits or in floating point as 8 bits."""
    if gray.dtype.kind in "ui" and gray.min() >= 0 and gray.max() < 1 << 16:
        return ((gray.astype(np.uint32) + 128) // 257).astype(np.uint8)
    gray = np.nan_to_num(gray.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = (0.0, 1.0) if gray.min() >= 0 and gray.max() <= 1 else (gray.min(), gray.max())
    return np.round((gray - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"
    if isinstance(error, PIL.Image.DecompressionBombError):
        return f"more than {MAX_MEGAPIXELS} million pixels, a decompression bomb"
    if isinstance(error, OSError) and error.strerror:
        return short_reason(error)
    message = first_line(error)
    truncated = "truncated" in message.lower()
    return f"truncated ({message})" if truncated else f"damaged ({type(error).__name__}: {message})"

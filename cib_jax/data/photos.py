"""One photo of any format, mode, size and state: decoding to an RGB square, thumbnails, and a perceptual hash."""

import contextlib
import io
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.JpegImagePlugin
from jaxtyping import UInt8
from PIL.Image import Transpose

from cib_jax.data import libtiff_messages, photo_colors, photo_formats
from cib_jax.data.photo_formats import MAX_MEGAPIXELS, BadPhotoError, TruncatedPhotoError, heif_version
from cib_jax.files import printable

VERSION = f"2-pillow-{PIL.__version__}" + (f"-heif-{heif_version()}" if heif_version() else "")
"""Version of the decoder: changes whenever the same file may be decoded to other pixels."""

_LARGE_PIXELS = 32_000_000
_one_large = threading.Lock()

# Transpositions that turn the stored pixels upright, by the EXIF tag Orientation (TIFF 6.0, section 8).
_UPRIGHT = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM}
_UPRIGHT |= {5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
_SWAPPED = range(5, 9)  # orientations that swap width and height

THUMBNAIL = 480
"""Longer side of a thumbnail in pixels: twice that of a 4:3 photo on the search page, for dense screens."""

_THUMBNAIL_QUALITY = 78


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


OnTruncated = Callable[[], object]
"""Function that is called, perhaps twice, if a JPEG lacks its last bytes: its missing part becomes gray."""


def decode(
    content: Content, size: int, *, max_megapixels: int = MAX_MEGAPIXELS, on_truncated: OnTruncated | None = None
) -> UInt8[np.ndarray, "size size 3"]:
    """Returns a photo in RGB, upright, resized to a square bilinearly with antialiasing, or raises a BadPhotoError.

    Colors are converted to sRGB by the file's profile. Of an animation, the first frame is decoded. Transparent parts
    become white, or dark gray if what is drawn could hardly be seen on white. Gray of 12 or 16 bits is scaled to
    8 bits, floating-point gray by its own range unless that is within [0, 1]. Size 0 keeps the size of the photo.
    Truncated files are refused; truncated JPEGs are decoded as far as they go if there is a function `on_truncated`.
    """
    with _image(content, max_megapixels, on_truncated) as image:
        return np.asarray(_square(image, size))


def decode_with_thumbnail(
    content: Content, size: int, *, max_megapixels: int = MAX_MEGAPIXELS, on_truncated: OnTruncated | None = None
) -> DecodedPhoto:
    """Returns the square that `decode` returns, a thumbnail and the photo's size, mostly from one decoding."""
    with _image(content, max_megapixels, on_truncated) as image:
        width, height = image.size
        square = _square(image, size)
        orientation = _orientation(image)
        # A JPEG that was decoded for a small square may have fewer pixels than a thumbnail.
        again = max(image.size) < min(THUMBNAIL, max(width, height))
        thumbnail = b"" if again else _jpeg(image, THUMBNAIL, orientation, _THUMBNAIL_QUALITY)
    if again:
        with _image(content, max_megapixels, on_truncated) as image:
            thumbnail = _reduced(image, THUMBNAIL, _THUMBNAIL_QUALITY)
    if orientation in _SWAPPED:
        width, height = height, width
    return DecodedPhoto(np.asarray(square), thumbnail, width, height)


def reduced(content: Content, longest: int, *, max_megapixels: int = MAX_MEGAPIXELS, quality: int = 88) -> bytes:
    """Returns a photo as an upright JPEG without metadata, the longer side of which is at most `longest` pixels."""
    with _image(content, max_megapixels) as image:
        return _reduced(image, longest, quality)


def truncated_note(paths: Sequence[str]) -> str:
    """Returns a sentence for the user about truncated photos that were decoded."""
    names = sorted(set(paths))
    return f"Truncated photos, gray where bytes are missing: {len(names):,}, the first: {printable(names[0])}"


@contextlib.contextmanager
def _image(content: Content, max_megapixels: int, on_truncated: OnTruncated | None = None) -> Iterator[Any]:
    """Yields an image, the pixels of which are not read yet; turns any error in the block into a BadPhotoError."""
    messages: list[str] = []
    try:
        with (
            libtiff_messages.collected() as messages,
            _opened(content) as file,
            photo_formats.open_image(file, max_megapixels) as image,
        ):
            photo_colors.correct_transparency(image)
            if isinstance(image, PIL.JpegImagePlugin.JpegImageFile):
                _watch_end(image, on_truncated)
            # Large images are decoded one at a time, since a few at once could exhaust memory.
            with _one_large if image.width * image.height > _LARGE_PIXELS else contextlib.nullcontext():
                yield image
    except BadPhotoError:
        raise
    except Exception as error:  # a crafted or damaged file can make Pillow raise anything
        raise BadPhotoError(photo_formats.reason(error, messages)) from error
    if messages:
        name = "an image" if isinstance(content, bytes) else printable(os.fsdecode(content))
        print(f"{name}: {messages[0]}", file=sys.stderr)


def _watch_end(image: Any, on_truncated: OnTruncated | None) -> None:
    """Lets a JPEG end where its file does, or refuses it if it ends too early."""
    # Not the image's own method: the image would refer to itself, and stay in memory.
    read, ends = image.fp.read, iter([b"\xff\xd9"])  # the marker after which libjpeg decodes what it has

    def load_read(count: int) -> bytes:
        content = read(count)
        if not content and on_truncated is None:
            raise TruncatedPhotoError("truncated; with config.data.truncated=True, what there is of it is decoded")
        if not content and on_truncated:
            on_truncated()
        return content or next(ends, b"")

    image.load_read = load_read


def _opened(content: Content) -> IO[bytes]:
    status = None if isinstance(content, bytes) else os.stat(content)
    if status and not stat.S_ISREG(status.st_mode):  # reading a pipe would block
        raise BadPhotoError("not a file")
    if not (status.st_size if status else content):
        raise BadPhotoError("0 bytes")
    return io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb")


def _load(image: Any, least: int) -> None:
    """Reads the pixels, of a JPEG at 1/2, 1/4 or 1/8 of its size if both sides still have `least` pixels."""
    if image.format != "HEIF":  # of which a draft is an embedded thumbnail, perhaps of another state of the photo
        image.draft(None, (least, least))
    image.load()


def _square(image: Any, size: int) -> PIL.Image.Image:
    if size:
        _load(image, 2 * size)
    else:
        image.load()
    orientation, profile = _orientation(image), image.info.get("icc_profile")
    image = photo_colors.to_rgb_or_gray(image)
    if size:
        image = image.resize((size, size), PIL.Image.Resampling.BILINEAR, reducing_gap=3.0)
    # After resizing: converting colors takes longer than that.
    return _upright(photo_colors.to_srgb(image, profile).convert("RGB"), orientation)


def _reduced(image: Any, longest: int, quality: int) -> bytes:
    _load(image, longest)
    return _jpeg(image, longest, _orientation(image), quality)


def _jpeg(image: Any, longest: int, orientation: int, quality: int) -> bytes:
    profile = image.info.get("icc_profile")
    image = photo_colors.to_rgb_or_gray(image)
    scale = longest / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
    image = _upright(photo_colors.to_srgb(image, profile), orientation).copy()
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

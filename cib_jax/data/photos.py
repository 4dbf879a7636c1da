"""One photo of any format, mode, size and state: decoding to an RGB square in sRGB, and thumbnails."""

import contextlib
import functools
import importlib.metadata
import io
import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.AvifImagePlugin
import PIL.ExifTags
import PIL.Image
import PIL.JpegImagePlugin
from jaxtyping import UInt8
from PIL import ImageCms, TiffImagePlugin
from PIL.Image import Transpose

from cib_jax.errors import MissingExtraError
from cib_jax.files import first_line, import_optional, install_command, printable, short_reason

MAX_MEGAPIXELS = 178
"""Limit above which Pillow rejects images as decompression bombs."""

MAX_MB = 500
"""Largest WebP, AVIF or HEIC file, in millions of bytes."""

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"})
EXTENSIONS |= {".avif", ".heic", ".heif", ".hif"}

CONVERTED = frozenset({".jxl", ".jp2", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".psd"})
"""Extensions of photos in formats that are not read: they must be converted first."""

# Listed, so that a file never reaches one of Pillow's forty other readers, some of which start other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF")
_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC"

# Brands of the container that HEIC shares with AVIF and with videos (ISO/IEC 14496-12 and 23008-12, annex B).
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_AVIF_BRANDS = {b"avif", b"avis"}

# First bytes of files, for the reasons: those of the formats above, and of others that are met as photos.
_READ = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WebP"}
_READ |= {b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF"}
_NOT_READ = {b"\xff\x0a": "JPEG XL image", b"\0\0\0\x0cJXL ": "JPEG XL image", b"\0\0\0\x0cjP": "JPEG 2000 image"}
_NOT_READ |= {b"8BPS": "Photoshop file", b"%PDF": "PDF"}

_REMEDY = "save it again as JPEG or 8-bit PNG"
_UNSUPPORTED = re.compile("unsupported|not (yet )?supported|unknown", re.IGNORECASE)


class BadPhotoError(ValueError):
    """A photo cannot be used; the message is a short reason."""


class TooLargeError(BadPhotoError):
    """A photo has more pixels than are allowed."""


class TruncatedPhotoError(BadPhotoError):
    """A JPEG lacks its last bytes; its first part could be decoded."""


class MissingReaderError(BadPhotoError):
    """A photo is in a format for which an extra is not installed; the message has the command that installs it."""


def heif_version() -> str:
    """Returns the version of the installed reader of HEIC, or "" if there is none."""
    try:
        return importlib.metadata.version("pillow-heif")
    except importlib.metadata.PackageNotFoundError:
        return ""


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

File = io.BufferedReader | io.BytesIO
"""An open file, on disk or in memory."""


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
) -> UInt8[np.ndarray, "height width 3"]:
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
            _opened(content) as file,
            _collected_messages(file) as messages,
            _open_image(file, max_megapixels) as image,
        ):
            _correct_transparency(image)
            if isinstance(image, PIL.JpegImagePlugin.JpegImageFile):
                _watch_end(image, on_truncated)
            # Large images are decoded one at a time, since a few at once could exhaust memory.
            with _one_large if image.width * image.height > _LARGE_PIXELS else contextlib.nullcontext():
                yield image
    except BadPhotoError:
        raise
    except Exception as error:  # a crafted or damaged file can make Pillow raise anything
        raise BadPhotoError(_reason(error, messages)) from error
    if messages:
        name = "an image" if isinstance(content, bytes) else printable(os.fsdecode(content))
        print(f"{name}: {messages[0]}", file=sys.stderr)


def _collected_messages(file: File) -> contextlib.AbstractContextManager[list[str]]:
    """Returns the context in which messages about a TIFF are collected; other formats have none."""
    head = file.read(4)
    file.seek(0)
    if _READ.get(head) != "TIFF":
        return contextlib.nullcontext([])
    from cib_jax.data import libtiff_messages  # replaces the handler of libtiff

    return libtiff_messages.collected()


def _watch_end(image: Any, on_truncated: OnTruncated | None) -> None:
    """Lets a JPEG end where its file does, or refuses it if it ends too early."""
    # Not the image's own method: the image would refer to itself, and stay in memory.
    read, ends = image.fp.read, iter([b"\xff\xd9"])  # the marker after which libjpeg decodes what it has

    def load_read(count: int) -> bytes:
        content = read(count)
        if not content and on_truncated is None:
            raise TruncatedPhotoError("truncated; with config.data.truncated=True, its first part is decoded")
        if not content and on_truncated:
            on_truncated()
        return content or next(ends, b"")

    image.load_read = load_read


def _opened(content: Content) -> File:
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
    image = _to_rgb_or_gray(image)
    if size:
        image = image.resize((size, size), PIL.Image.Resampling.BILINEAR, reducing_gap=3.0)
    # After resizing: converting colors takes longer than that.
    return _upright(_to_srgb(image, profile).convert("RGB"), orientation)


def _reduced(image: Any, longest: int, quality: int) -> bytes:
    _load(image, longest)
    return _jpeg(image, longest, _orientation(image), quality)


def _jpeg(image: Any, longest: int, orientation: int, quality: int) -> bytes:
    profile = image.info.get("icc_profile")
    image = _to_rgb_or_gray(image)
    scale = longest / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
    image = _upright(_to_srgb(image, profile), orientation).copy()
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


# Formats


def _open_image(file: File, max_megapixels: int) -> Any:
    """Returns a Pillow image, the pixels of which are not read yet; raises a BadPhotoError if it cannot be used."""
    head = file.read(64)
    if size := _webp_size(head):  # its reader takes memory for all pixels when it opens a file
        _validate_size(*size, max_megapixels)
    image = _open(file, head)
    _validate_size(image.width, image.height, max_megapixels)
    return image


def _validate_size(width: int, height: int, max_megapixels: int) -> None:
    if width * height > max_megapixels * 1_000_000:
        raise TooLargeError(f"{width} × {height} pixels, more than data.max_megapixels={max_megapixels}")


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Returns width and height by the first chunk of a WebP (RFC 9649, sections 2.5 to 2.7 and 3.4)."""

    def number(start: int, end: int) -> int:
        return int.from_bytes(head[start:end], "little")

    kind = head[12:16] if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else b""
    if kind == b"VP8X":
        return number(24, 27) + 1, number(27, 30) + 1
    if kind == b"VP8L":
        return number(21, 25) % (1 << 14) + 1, (number(21, 25) >> 14) % (1 << 14) + 1
    return (number(26, 28) % (1 << 14), number(28, 30) % (1 << 14)) if kind == b"VP8 " else None


def _open(file: File, head: bytes) -> Any:
    brands = _brands(head)
    # The readers of these formats read the whole file before they know its size in pixels.
    if (brands or head.startswith(b"RIFF")) and file.seek(0, os.SEEK_END) > MAX_MB * 1_000_000:
        raise BadPhotoError(f"larger than {MAX_MB} MB, too much for its format")
    file.seek(0)
    if brands & _HEIC_BRANDS or (b"mif1" in brands and not brands & _AVIF_BRANDS):
        # Without registering it: Pillow is not changed for the rest of the program.
        reader = _heif()
        try:
            return reader.HeifImageFile(file)
        except SyntaxError as error:
            raise BadPhotoError(_unreadable("HEIC")) from error
    try:
        return PIL.Image.open(file, formats=_FORMATS)
    except PIL.UnidentifiedImageError as error:
        raise BadPhotoError(_describe(head, brands)) from error


def load_readers(*, threads: int) -> None:
    """Imports all readers now, and limits the threads in which each decodes one photo: 0 for none besides the caller's.

    For a process that may later not open files or start threads.
    """
    from cib_jax.data import libtiff_messages  # noqa: F401 - takes effect when it is imported

    PIL.Image.init()
    PIL.AvifImagePlugin.DEFAULT_MAX_THREADS = threads + 1
    try:
        _heif().options.DECODE_THREADS = threads
    except MissingReaderError:
        return


def _heif() -> Any:
    missing = f"a HEIC photo, and pillow-heif, which reads these, is not installed; {install_command('heic')}"
    try:
        return import_optional("pillow_heif", MissingExtraError(missing))
    except MissingExtraError as error:
        raise MissingReaderError(str(error)) from error


def _brands(head: bytes) -> set[bytes]:
    """Returns the major and the first compatible brands of a file in the ISO base media format."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(len(head), int.from_bytes(head[:4], "big"))
    return {head[at : at + 4] for at in (8, *range(16, end - 3, 4))}


def _describe(head: bytes, brands: set[bytes]) -> str:
    """Returns what a file is that none of the readers accepts."""
    if brands and not brands & _AVIF_BRANDS:
        return f"a video or another file that is not a {_NAMES} image"
    read = "AVIF" if brands else next((name for magic, name in _READ.items() if head.startswith(magic)), "")
    if read:
        return _unreadable(read)
    other = next((name for magic, name in _NOT_READ.items() if head.startswith(magic)), "")
    return f"a {other}, which is not read; convert it to JPEG or PNG" if other else f"not a {_NAMES} image"


def _unreadable(name: str) -> str:
    return f"{'an' if name == 'AVIF' else 'a'} {name} image that is damaged or of a kind that is not read; {_REMEDY}"


def _reason(error: Exception, messages: Sequence[str] = ()) -> str:
    """Returns in a few words why an image could not be read, given what a reader raised and what libtiff said."""
    if isinstance(error, PIL.Image.DecompressionBombError):
        return f"more than {MAX_MEGAPIXELS} million pixels, a decompression bomb"
    if isinstance(error, OSError) and error.strerror:
        return short_reason(error)
    message = first_line(error)
    if "truncated" in message.lower():
        return f"truncated ({message})"
    if _UNSUPPORTED.search(message):
        return f"of a kind that is not read ({message}); {_REMEDY}"
    return f"damaged ({messages[0] if messages else f'{type(error).__name__}: {message}'})"


# Colors: 8-bit sRGB from any mode, depth, color profile and transparency

_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}
"""Color space of a profile that describes an image, by the image's mode."""
_SAME = 2  # levels, up to which a profile is sRGB under another name or rounded

_FAINT = 24  # levels by which what is drawn must differ from white, in root mean square, to be seen on it
_DARK = (64, 64, 64)
_SAMPLED = 256  # pixels a side that are enough to choose a background

# PNG's gray levels of few bits and colors of 16 bits become 8 bits when they are read; tRNS does not.
_TRANSPARENT_LEVEL = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 257}


def _correct_transparency(image: Any) -> None:
    """Changes the transparent level or color of a PNG, before its pixels are read, to what they will be."""
    levels = image.info.get("transparency")
    factor = _TRANSPARENT_LEVEL.get(image.tile[0][3]) if image.format == "PNG" and image.tile else None
    if factor and not isinstance(levels, bytes | None):
        scaled = [int(level * factor) for level in np.atleast_1d(levels)]
        image.info["transparency"] = tuple(scaled) if isinstance(levels, tuple) else scaled[0]


def _to_rgb_or_gray(image: Any) -> Any:
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


def _to_srgb(image: Any, profile: bytes | None) -> Any:
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

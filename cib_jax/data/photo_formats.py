"""Formats of image files: which are read, by extension and by content, and the reasons why a file is not read."""

import importlib.metadata
import os
import re
from collections.abc import Sequence
from typing import IO, Any

import PIL.AvifImagePlugin
import PIL.Image

from cib_jax.errors import MissingExtraError
from cib_jax.files import first_line, import_optional, install_command, short_reason

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
    """A JPEG lacks its last bytes; what there is could be decoded."""


class MissingReaderError(BadPhotoError):
    """A photo is in a format for which an extra is not installed; the message has the command that installs it."""


def open_image(file: IO[bytes], max_megapixels: int) -> Any:
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


def _open(file: IO[bytes], head: bytes) -> Any:
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
    PIL.Image.init()
    PIL.AvifImagePlugin.DEFAULT_MAX_THREADS = threads + 1
    try:
        _heif().options.DECODE_THREADS = threads
    except MissingReaderError:
        return


def heif_version() -> str:
    """Returns the version of the installed reader of HEIC, or "" if there is none."""
    try:
        return importlib.metadata.version("pillow-heif")
    except importlib.metadata.PackageNotFoundError:
        return ""


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


def reason(error: Exception, messages: Sequence[str] = ()) -> str:
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

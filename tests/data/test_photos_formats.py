"""Formats of image files: HEIC with and without its reader, and reasons that name what a file is."""

import io
import struct
import sys

import numpy as np
import PIL.Image
import pytest

from cib_jax.data import photos
from cib_jax.data.photos import BadPhotoError, MissingReaderError, decode
from tests.data import pictures


def reason_of(content):
    with pytest.raises(BadPhotoError) as error:
        decode(content, 16)
    return str(error.value)


def test_a_heic_without_its_reader_names_the_format_and_the_command(monkeypatch):
    content = pictures.content(pictures.smooth(60, 40), "HEIF")
    assert decode(content, 16).shape == (16, 16, 3)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(MissingReaderError, match=r"HEIC.*pip install.*\[heic\]"):
        decode(content, 16)


def test_the_version_of_the_decoder_has_that_of_the_heic_reader():
    assert photos.VERSION.endswith(f"-heif-{photos.heif_version()}")


def test_the_whole_heic_is_decoded_not_its_embedded_thumbnail():
    image = pictures.smooth(800, 600)
    content = pictures.content(image, "HEIF", quality=95, thumbnails=[200])
    reduced = np.asarray(image.resize((16, 16), PIL.Image.Resampling.BILINEAR), int)
    assert np.abs(decode(content, 16) - reduced).mean() < 2


@pytest.mark.parametrize("form", ["WEBP", "AVIF", "HEIF"])
def test_a_huge_file_is_not_read_whole(tmp_path, form):
    path = tmp_path / "sparse.jpg"
    path.write_bytes(pictures.content(pictures.smooth(60, 40), form))
    assert decode(path, 16).shape == (16, 16, 3)
    with path.open("r+b") as file:
        file.truncate(10 << 30)
    assert "500 MB" in reason_of(path)


def webp(kind, body):
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


@pytest.mark.parametrize(
    "content",
    [
        webp(b"VP8L", b"\x2f" + (8999 | 5999 << 14).to_bytes(4, "little") + bytes(9)),
        webp(b"VP8X", bytes(4) + (8999).to_bytes(3, "little") + (5999).to_bytes(3, "little")),
        webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 9000, 6000) + bytes(9)),
    ],
    ids=["lossless", "extended", "lossy"],
)
def test_a_webp_is_refused_by_the_size_that_it_declares(content, monkeypatch):
    """The reader of WebP takes eight bytes for each declared pixel: 34 bytes took 1.05 GB."""
    monkeypatch.setattr(PIL.Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(photos.TooLargeError, match="9000 × 6000"):
        decode(content, 16, max_megapixels=50)


@pytest.mark.parametrize("settings", [{}, {"lossless": True}, {"exif": PIL.Image.Exif()}, {"save_all": True}])
def test_the_declared_size_of_a_webp_is_its_size(settings):
    file = io.BytesIO()
    pictures.smooth(250, 200).convert("RGB").save(file, "WEBP", **settings)
    with pytest.raises(photos.TooLargeError, match="250 × 200"):
        decode(file.getvalue(), 16, max_megapixels=0)
    assert decode(file.getvalue(), 16, max_megapixels=1).shape == (16, 16, 3)


def ftyp(*brands):
    return struct.pack(">I4s4s4s", 16 + 4 * len(brands[1:]), b"ftyp", brands[0], b"\0" * 4) + b"".join(brands[1:])


def tiff_of_floats():
    """Returns an RGB TIFF of 32-bit floating-point values, as for photos of high dynamic range."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(file, "TIFF")
    # BitsPerSample 8 → 32; the pixels are never reached.
    return file.getvalue().replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 32, 32, 32))


def bmp_with_odd_masks():
    """Returns a 32-bit BMP, the masks of which give red nine bits: valid, and read by nobody."""
    header = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 32, 3, 64, 0, 0, 0, 0) + struct.pack(
        "<3I", 0x1FF, 0xFE00, 0xFF0000
    )
    return struct.pack("<2sIHHI", b"BM", 14 + len(header) + 64, 0, 0, 14 + len(header)) + header + bytes(64)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (ftyp(b"heic", b"mif1", b"heic") + bytes(99), ["HEIC"]),
        (ftyp(b"avif", b"mif1", b"avif") + bytes(99), ["AVIF", "of a kind that is not read"]),
        (ftyp(b"qt  ", b"qt  ") + bytes(99), ["video"]),
        (b"\xff\x0a" + bytes(99), ["JPEG XL", "convert"]),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), ["JPEG XL", "convert"]),
        (b"\xff\xd8\xff" + bytes(99), ["JPEG image", "damaged"]),
        (tiff_of_floats(), ["TIFF image", "of a kind that is not read"]),
        (bmp_with_odd_masks(), ["of a kind that is not read", "BMP"]),
    ],
)
def test_the_reason_names_what_a_file_is(content, words):
    assert all(word in reason_of(content) for word in words), reason_of(content)
    assert not reason_of(content).startswith("damaged")

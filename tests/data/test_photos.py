"""One photo: every format, mode, orientation and kind of damage, against Pillow's own step-by-step reading."""

import io
import os
import struct
import threading
import zlib

import hypothesis
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import strategies as st

from cib_jax.data import photos
from cib_jax.data.photos import BadPhotoError, decode
from tests.data import pictures


def plainly(image, size):
    """The usual loop: upright, RGB, resized."""
    upright = PIL.ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(upright.resize((size, size), PIL.Image.Resampling.BILINEAR) if size else upright)


def differ(a, b):
    return np.abs(a.astype(int) - b.astype(int))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [0, 24])
def test_every_format_is_read_as_pillow_reads_it(form, size, tmp_path):
    path = tmp_path / "photo"
    path.write_bytes(pictures.content(pictures.smooth(70, 50), form))
    expected = plainly(PIL.Image.open(path), size)
    for given in (path, str(path), path.read_bytes()):
        assert differ(decode(given, size), expected).max() <= 1


@pytest.mark.parametrize("width", [640, 1500])
def test_a_large_jpeg_decoded_at_a_fraction_differs_little(width):
    file = pictures.content(pictures.smooth(width, 900), "JPEG", quality=95)

    off = differ(decode(file, 64), plainly(PIL.Image.open(io.BytesIO(file)), 64))
    assert off.mean() < 0.6 and off.max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied(orientation, form):

    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    file = pictures.content(pictures.smooth(64, 40, seed=3), form, exif=exif, **options)
    for size in (0, 16):
        expected = plainly(PIL.Image.open(io.BytesIO(file)), size)
        assert decode(file, size).shape == expected.shape
        assert differ(decode(file, size), expected).max() <= 3


def grey(width=40, height=30):
    return np.add.outer(np.arange(height), np.arange(width)) / (width + height - 2)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_to_8_bits(form, order):
    levels = np.round(grey() * 65_535).astype(order if form == "TIFF" else "<u2")
    image = PIL.Image.fromarray(levels)
    pixels = decode(pictures.content(image, form), 0)
    assert differ(pixels, np.round(grey() * 255)[..., None].repeat(3, axis=-1)).max() <= 1


def test_floating_point_grey_keeps_the_unit_range_and_is_stretched_elsewhere():
    unit = decode(pictures.content(PIL.Image.fromarray((grey() * 0.5).astype(np.float32)), "TIFF"), 0)
    assert differ(unit[..., 0], np.round(grey() * 127.5)).max() <= 1
    wide = decode(pictures.content(PIL.Image.fromarray((grey() * 900 - 300).astype(np.float32)), "TIFF"), 0)
    assert differ(wide[..., 0], np.round(grey() * 255)).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_modes_without_transparency(mode):

    image = pictures.smooth(50, 40).convert(mode)
    form = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    file = pictures.content(image, form)
    for size in (0, 20):
        expected = plainly(PIL.Image.open(io.BytesIO(file)), size)
        # Reduced in its own mode, grey and colour are the same but for rounding.
        assert differ(decode(file, size), expected).max() <= 2, size


def test_transparent_parts_become_white():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[:2, :, 3] = 200, 255
    pixels[2:, 2:, 3] = 128
    decoded = decode(pictures.content(PIL.Image.fromarray(pixels), "PNG"), 0)
    assert decoded[0, 0].tolist() == [200, 0, 0]
    assert decoded[3, 0].tolist() == [255, 255, 255]
    assert differ(decoded[3, 3], np.array([227, 127, 127])).max() <= 1
    grey_alpha = PIL.Image.fromarray(pixels[..., [0, 3]], "LA")
    assert decode(pictures.content(grey_alpha, "PNG"), 0)[3, 0].tolist() == [255, 255, 255]
    palette = PIL.Image.fromarray(pixels[..., :3]).quantize(4)
    index = palette.getpixel((0, 0))
    assert decode(pictures.content(palette, "PNG", transparency=index), 0)[0, 0].tolist() == [255, 255, 255]
    assert decode(pictures.content(palette, "GIF", transparency=index), 0)[0, 0].tolist() == [255, 255, 255]


def test_the_first_frame_of_an_animation_counts():
    frames = [PIL.Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    for form in ("GIF", "WEBP", "TIFF"):
        options = {"save_all": True, "append_images": frames[1:]} | ({"lossless": True} if form == "WEBP" else {})
        assert decode(pictures.content(frames[0], form, **options), 8)[4, 4].tolist() == [255, 0, 0]


@hypothesis.given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 60))
@hypothesis.settings(max_examples=25, deadline=None)
def test_any_size_becomes_a_square(width, height, size):

    file = pictures.content(pictures.smooth(width, height))
    off = differ(decode(file, size), plainly(PIL.Image.open(io.BytesIO(file)), size))
    # From 3 times the wanted size on, Pillow first averages whole blocks.
    assert off.mean() < 2 and off.max() <= (2 if max(width, height) < 3 * size else 40)


@pytest.mark.parametrize(("width", "height"), [(20_000, 3), (1, 9_000), (1, 1), (20_000, 1_000)])
def test_extreme_shapes(width, height):
    for form in ("JPEG", "PNG"):
        image = PIL.Image.new("RGB", (width, height), (10, 200, 90))
        decoded = decode(pictures.content(image, form), 32)
        assert decoded.shape == (32, 32, 3)
        assert differ(decoded, np.array([10, 200, 90])).max() <= 2


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what the damage did to TIFF's tags
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused_wherever_it_is_cut(form):
    file = pictures.content(pictures.smooth(90, 70, seed=5), form)
    # The last bytes of some formats say nothing about pixels.
    for length in np.random.default_rng(0).integers(1, int(0.9 * len(file)), 12):
        with pytest.raises(BadPhotoError):
            decode(file[:length], 16)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_damaged_file_never_raises_anything_else(form):
    file = pictures.content(pictures.smooth(60, 40), form)
    generator = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(file)
        for place in generator.integers(0, len(file), 4):
            damaged[place] = generator.integers(0, 256)
        try:
            assert decode(bytes(damaged), 16).shape == (16, 16, 3)
        except BadPhotoError as error:
            assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes"),
        (b"Dear diary, today I was renamed.", "not a JPEG, PNG, WebP, GIF, BMP or TIFF image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG"),
    ],
)
def test_what_is_no_image_says_so(content, reason, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for given in (content, path):
        with pytest.raises(BadPhotoError, match=reason):
            decode(given, 16)


def test_files_that_cannot_be_opened_say_why(tmp_path, monkeypatch):
    with pytest.raises(BadPhotoError, match="no such file"):
        decode(tmp_path / "missing.jpg", 16)
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    with pytest.raises(BadPhotoError, match="not a file"):
        decode(tmp_path / "pipe.jpg", 16)
    with pytest.raises(BadPhotoError, match="not a file"):
        decode(tmp_path, 16)
    (tmp_path / "a.png").write_bytes(pictures.content(pictures.smooth(9, 9)))

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(BadPhotoError, match="permission denied"):
        decode(tmp_path / "a.png", 16)


def bomb(width, height):
    """A PNG of some dozen bytes that says that it is large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def test_decompression_bombs_are_refused_by_their_header():
    with pytest.raises(BadPhotoError, match="decompression bomb"):
        decode(bomb(60_000, 60_000), 16)
    with pytest.raises(BadPhotoError, match=r"9000 × 9000 pixels, more than data.max_megapixels=50"):
        decode(bomb(9_000, 9_000), 16, max_megapixels=50)


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(photos, "_LARGE_PIXELS", 1000)
    inside, most = [], []
    original = photos._square

    def watched(image, size):
        inside.append(1)
        most.append(len(inside))
        try:
            return original(image, size)
        finally:
            inside.pop()

    monkeypatch.setattr(photos, "_square", watched)
    file = pictures.content(pictures.smooth(300, 300))
    threads = [threading.Thread(target=decode, args=(file, 64)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6

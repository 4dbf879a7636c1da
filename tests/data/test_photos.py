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
from cib_jax.data.photos import BadPhotoError, TooLargeError, TruncatedPhotoError, decode, decode_with_thumbnail
from tests.data import pictures


def plainly(image, size):
    """The usual loop: upright, RGB, resized."""
    upright = PIL.ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(upright.resize((size, size), PIL.Image.Resampling.BILINEAR) if size else upright)


def differ(a, b):
    return np.abs(a.astype(int) - b.astype(int))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"])
@pytest.mark.parametrize("size", [0, 24])
def test_every_format_is_read_as_pillow_reads_it(form, size, tmp_path):
    path = tmp_path / "photo"
    path.write_bytes(pictures.content(pictures.smooth(70, 50), form))
    with PIL.Image.open(path) as opened:
        expected = plainly(opened, size)
    for given in (path, str(path), path.read_bytes()):
        assert differ(decode(given, size), expected).max() <= 1


@pytest.mark.parametrize("width", [640, 1500])
def test_a_large_jpeg_decoded_at_a_fraction_differs_little(width):
    file = pictures.content(pictures.smooth(width, 900), "JPEG", quality=95)

    off = differ(decode(file, 64), plainly(PIL.Image.open(io.BytesIO(file)), 64))
    assert off.mean() < 0.6 and off.max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF", "HEIF"])
def test_orientation_is_applied_once(orientation, form):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {} if form in ("PNG", "TIFF") else {"quality": 95}
    image = pictures.smooth(64, 40, seed=3)
    options |= {"chroma": 444} if form == "HEIF" else {}
    file = pictures.content(image, form, exif=exif.tobytes(), **options)
    image.getexif()[0x0112] = orientation
    for size in (0, 16):
        expected = plainly(image, size)
        assert decode(file, size).shape == expected.shape
        assert differ(decode(file, size), expected).mean() <= 3


def gray(width=40, height=30):
    return np.add.outer(np.arange(height), np.arange(width)) / (width + height - 2)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_to_8_bits(form, order):
    levels = np.round(gray() * 65_535).astype(order if form == "TIFF" else "<u2")
    image = PIL.Image.fromarray(levels)
    pixels = decode(pictures.content(image, form), 0)
    assert differ(pixels, np.round(gray() * 255)[..., None].repeat(3, axis=-1)).max() <= 1


def test_floating_point_gray_keeps_the_unit_range_and_is_stretched_elsewhere():
    unit = decode(pictures.content(PIL.Image.fromarray((gray() * 0.5).astype(np.float32)), "TIFF"), 0)
    assert differ(unit[..., 0], np.round(gray() * 127.5)).max() <= 1
    wide = decode(pictures.content(PIL.Image.fromarray((gray() * 900 - 300).astype(np.float32)), "TIFF"), 0)
    assert differ(wide[..., 0], np.round(gray() * 255)).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_modes_without_transparency(mode):

    image = pictures.smooth(50, 40).convert(mode)
    form = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    file = pictures.content(image, form)
    for size in (0, 20):
        expected = plainly(PIL.Image.open(io.BytesIO(file)), size)
        # Reduced in its own mode, gray and color are the same but for rounding.
        assert differ(decode(file, size), expected).max() <= 2, size


def test_transparent_parts_become_white():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0], pixels[:2, :, 3] = 200, 255
    pixels[2:, 2:, 3] = 128
    decoded = decode(pictures.content(PIL.Image.fromarray(pixels), "PNG"), 0)
    assert decoded[0, 0].tolist() == [200, 0, 0]
    assert decoded[3, 0].tolist() == [255, 255, 255]
    assert differ(decoded[3, 3], np.array([227, 127, 127])).max() <= 1
    gray_alpha = PIL.Image.fromarray(pixels[..., [0, 3]], "LA")
    assert decode(pictures.content(gray_alpha, "PNG"), 0)[3, 0].tolist() == [255, 255, 255]
    palette = PIL.Image.fromarray(pixels[..., :3]).quantize(4)
    index = palette.getpixel((0, 0))
    assert decode(pictures.content(palette, "PNG", transparency=index), 0)[0, 0].tolist() == [255, 255, 255]
    assert decode(pictures.content(palette, "GIF", transparency=index), 0)[0, 0].tolist() == [255, 255, 255]


def test_the_first_frame_of_an_animation_counts():
    frames = [PIL.Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    for form in ("GIF", "WEBP", "TIFF"):
        options = {"save_all": True, "append_images": frames[1:]} | ({"lossless": True} if form == "WEBP" else {})
        assert decode(pictures.content(frames[0], form, **options), 8)[4, 4].tolist() == [255, 0, 0]


@hypothesis.given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 60))
@hypothesis.settings(max_examples=15, deadline=None)
def test_any_size_becomes_a_square(width, height, size):

    file = pictures.content(pictures.smooth(width, height))
    off = differ(decode(file, size), plainly(PIL.Image.open(io.BytesIO(file)), size))
    # From 3 times the wanted size on, Pillow first averages whole blocks.
    assert off.mean() < 2 and off.max() <= (2 if max(width, height) < 3 * size else 40)


@pytest.mark.parametrize(("width", "height"), [(20_000, 3), (1, 9_000), (1, 1), (9_000, 400)])
def test_extreme_shapes(width, height):
    for form in ("JPEG", "PNG"):
        image = PIL.Image.new("RGB", (width, height), (10, 200, 90))
        decoded = decode(pictures.content(image, form), 32)
        assert decoded.shape == (32, 32, 3)
        assert differ(decoded, np.array([10, 200, 90])).max() <= 2


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what the damage did to TIFF's tags
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"])
def test_a_truncated_file_is_refused_wherever_it_is_cut(form):
    file = pictures.content(pictures.smooth(90, 70, seed=5), form)
    # The last bytes of some formats say nothing about pixels.
    for length in np.random.default_rng(0).integers(1, int(0.9 * len(file)), 12):
        with pytest.raises(BadPhotoError):
            decode(file[:length], 16)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("missing", [1, 8, 2000])
def test_a_truncated_jpeg_is_decoded_if_that_is_asked_for(progressive, missing):
    image = pictures.smooth(640, 480, seed=1)
    file = pictures.content(image, "JPEG", quality=95, progressive=progressive)[:-missing]
    told = []
    for pixels in (
        decode(file, 0, on_truncated=lambda: told.append(1)),
        decode_with_thumbnail(file, 0, on_truncated=lambda: told.append(2)).square,
    ):
        assert differ(pixels[:300], np.asarray(image)[:300]).mean() < 6
    assert missing < 8 or ({*told} == {1, 2} and refused(file))


def refused(file):
    with pytest.raises(TruncatedPhotoError):
        decode(file, 0)
    with pytest.raises(TruncatedPhotoError):
        decode_with_thumbnail(file, 0)
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"])
def test_a_damaged_file_never_raises_anything_else(form):
    file = pictures.content(pictures.smooth(60, 40), form)
    generator = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(file)
        for place in generator.integers(0, len(file), 4):
            damaged[place] = generator.integers(0, 256)
        try:
            assert decode(bytes(damaged), 16, on_truncated=list).shape == (16, 16, 3)
        except BadPhotoError as error:
            assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes"),
        (b"Dear diary, today I was renamed.", "not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC image"),
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


MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "F"]


def in_mode(mode, width=70, height=50):
    if mode == "I;16":
        return PIL.Image.fromarray(np.round(gray(width, height) * 65_535).astype(np.uint16)), "PNG"
    if mode == "F":
        return PIL.Image.fromarray(gray(width, height).astype(np.float32)), "TIFF"
    image = pictures.smooth(width, height, seed=4).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(PIL.Image.fromarray(np.round(gray(width, height) * 255).astype(np.uint8)))
    return image, "JPEG" if mode == "CMYK" else "PNG"


def seen_alike(file, size):
    """Checks what holds for every photo, and returns what was seen and its thumbnail."""
    seen = decode_with_thumbnail(file, size)
    assert np.array_equal(seen.square, decode(file, size)) and seen.square.dtype == np.uint8
    upright = plainly(PIL.Image.open(io.BytesIO(file)), 0)
    assert (seen.height, seen.width) == upright.shape[:2]
    return seen, bare_jpeg(seen.thumbnail, photos.THUMBNAIL, seen.width, seen.height), upright


def bare_jpeg(content, longest, width, height):
    """Checks that a JPEG has the photo's shape, at most `longest`, and nothing in it but pixels; returns it."""
    image = PIL.Image.open(io.BytesIO(content))
    image.load()
    scale = min(1, longest / max(width, height))
    assert image.format == "JPEG" and max(image.size) == min(longest, max(width, height))
    assert max(abs(image.width - width * scale), abs(image.height - height * scale)) <= 1
    assert not image.getexif() and not {"exif", "icc_profile", "comment", "dpi", "photoshop"} & set(image.info)
    # Markers: APP0 is JFIF's own; any other APPn or a comment could say where a photo was taken.
    assert b"Exif\0" not in content and b"http" not in content and b"ICC_PROFILE" not in content
    kinds = {kind for kind, _ in getattr(image, "applist", [])}
    assert kinds <= {"APP0"}
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [0, 16, 64])
def test_seen_every_format_has_the_same_square_and_a_thumbnail(form, size):
    file = pictures.content(pictures.smooth(600, 400, seed=2), form)
    _, thumbnail, upright = seen_alike(file, size)
    expected = PIL.Image.fromarray(upright).resize((480, 320), PIL.Image.Resampling.BILINEAR)
    # A GIF's dots are harder for a JPEG than waves.
    assert differ(thumbnail, np.asarray(expected)).mean() < (14 if form == "GIF" else 4)


@pytest.mark.parametrize("mode", MODES)
def test_seen_every_mode_has_the_same_square_and_a_thumbnail(mode):
    image, form = in_mode(mode)
    file = pictures.content(image, form)
    _, thumbnail, _ = seen_alike(file, 24)
    assert differ(thumbnail, decode(file, 0)).mean() < (20 if mode in ("1", "P") else 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("width", [64, 800])
def test_seen_upright_with_nothing_of_the_exif(orientation, width):
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "http://maker"
    file = pictures.content(pictures.smooth(width, width // 2, seed=3), "JPEG", exif=exif, quality=95)
    seen, thumbnail, upright = seen_alike(file, 16)
    assert (seen.width > seen.height) == (orientation < 5)
    shape = (thumbnail.shape[1], thumbnail.shape[0])
    expected = np.asarray(PIL.Image.fromarray(upright).resize(shape, PIL.Image.Resampling.BILINEAR))
    assert differ(thumbnail, expected).mean() < 4


@pytest.mark.parametrize(("width", "height"), [(20_000, 3), (1, 900), (1, 1), (192, 192), (193, 5), (400, 399)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_seen_in_extreme_shapes(width, height, form):
    image = PIL.Image.new("RGB", (width, height), (10, 200, 90))
    _, thumbnail, _ = seen_alike(pictures.content(image, form), 8)
    assert differ(thumbnail, np.array([10, 200, 90])).max() <= 3


@hypothesis.given(st.integers(1, 900), st.integers(1, 900), st.sampled_from([1, 8, 32, 160]))
@hypothesis.settings(max_examples=15, deadline=None)
def test_seen_in_any_size(width, height, size):
    seen_alike(pictures.content(pictures.smooth(width, height), "JPEG"), size)


def photo_with_metadata():
    """A photo with all the metadata that must be removed: place, maker, comment, profile, resolution, XMP."""
    exif = PIL.Image.Exif()
    exif[0x010F] = "http://maker"
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0)})
    file = pictures.content(
        pictures.smooth(800, 600),
        "JPEG",
        exif=exif,
        comment=b"http://comment",
        icc_profile=b"http://profile" * 20,
        dpi=(300, 300),
        xmp=b"<x:xmpmeta>http://xmp</x:xmpmeta>",
    )
    opened = PIL.Image.open(io.BytesIO(file))
    assert opened.getexif().get_ifd(0x8825) and {"comment", "icc_profile", "xmp"} <= set(opened.info)
    return file


def test_a_thumbnail_and_a_reduced_photo_tell_nothing_of_place_or_maker():
    file = photo_with_metadata()
    bare_jpeg(decode_with_thumbnail(file, 64).thumbnail, photos.THUMBNAIL, 800, 600)
    bare_jpeg(decode_with_thumbnail(file, 16).thumbnail, photos.THUMBNAIL, 800, 600)
    bare_jpeg(photos.reduced(file, 400), 400, 800, 600)
    bare_jpeg(photos.reduced(file, 5000), 5000, 800, 600)
    for form in ("PNG", "TIFF", "WEBP"):
        image = PIL.Image.open(io.BytesIO(file))
        again = pictures.content(image, form, exif=image.getexif(), icc_profile=image.info["icc_profile"])
        bare_jpeg(decode_with_thumbnail(again, 64).thumbnail, photos.THUMBNAIL, 800, 600)
        bare_jpeg(photos.reduced(again, 300), 300, 800, 600)


@pytest.mark.parametrize("longest", [1, 64, 1024])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_photos_look_like_themselves(longest, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = pictures.content(pictures.smooth(1500, 900, seed=5), "JPEG", exif=exif, quality=95)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(file)))
    pixels = bare_jpeg(photos.reduced(file, longest), longest, *upright.size)
    expected = np.asarray(upright.resize((pixels.shape[1], pixels.shape[0]), PIL.Image.Resampling.BILINEAR))
    # A small JPEG has half the colors of a large one.
    assert differ(pixels, expected).mean() < 6


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_file_is_refused_alike_however_it_is_looked_at(form):
    file = pictures.content(pictures.smooth(600, 400, seed=5), form)
    for length in np.random.default_rng(0).integers(1, int(0.9 * len(file)), 5):
        for look in (decode_with_thumbnail, photos.reduced):
            with pytest.raises(BadPhotoError):
                look(file[:length], 16)
    with pytest.raises(TooLargeError, match=r"more than data\.max_megapixels=50"):
        decode_with_thumbnail(bomb(9_000, 9_000), 16, max_megapixels=50)
    with pytest.raises(TooLargeError, match=r"more than data\.max_megapixels=50"):
        photos.reduced(bomb(9_000, 9_000), 16, max_megapixels=50)

"""Colors of decoded photos: depths, transparency and color profiles, against closed forms."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageDraw
import pytest

from cib_jax.data.photos import decode, decode_with_thumbnail
from tests.data import pictures


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows, width, depth, color, transparent):
    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [*parts, (b"IEND", b"")])


def test_gray_of_16_bits_with_a_transparent_level():
    levels = np.linspace(0, 65535, 256).astype(">u2")
    content = png([levels.tobytes()] * 8, 256, 16, 0, levels[100].tobytes())
    expected = np.arange(256)
    expected[100] = 255  # on white
    assert np.array_equal(decode(content, 0)[3, :, 1], expected)


@pytest.mark.parametrize(("depth", "packed"), [(2, 0b00011011), (4, 0x12)])
def test_gray_of_few_bits_with_a_transparent_level(depth, packed):
    content = png([bytes([packed])], 8 // depth, depth, 0, struct.pack(">H", 1))
    levels = [(packed >> shift) % 2**depth for shift in range(8 - depth, -1, -depth)]
    expected = [255 if level == 1 else level * 255 // (2**depth - 1) for level in levels]
    assert decode(content, 0)[0, :, 0].tolist() == expected


def test_color_of_16_bits_with_a_transparent_one():
    pixels = np.array([[0, 0, 65535], [65535, 0, 0], [0, 0, 255]], ">u2")
    content = png([pixels.tobytes()], 3, 16, 2, pixels[0].tobytes())
    assert decode(content, 0)[0].tolist() == [[255, 255, 255], [255, 0, 0], [0, 0, 0]]


def tiff(width, height, bits, photometric, pixels):
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, height)]
    tags.append((279, len(pixels)))
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, offset if tag == 273 else value) for tag, value in tags]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + pixels


def test_gray_of_12_bits():
    levels = np.linspace(0, 4095, 64).astype(int).tolist()
    row = b"".join((a << 12 | b).to_bytes(3, "big") for a, b in zip(levels[::2], levels[1::2], strict=True))
    content = tiff(64, 4, 12, 1, 4 * row)
    assert np.array_equal(decode(content, 0)[2, :, 0], np.round(np.array(levels) / 4095 * 255))


@pytest.mark.parametrize("photometric", [0, 1])
def test_gray_of_16_bits_where_white_is_zero_or_black_is(photometric):
    levels = np.linspace(0, 65535, 64).astype("<u2")
    expected = np.round(levels / 257)
    content = tiff(64, 4, 16, photometric, 4 * levels.tobytes())
    assert np.array_equal(decode(content, 0)[2, :, 0], expected if photometric else 255 - expected)


def drawn(color, opacity=255):
    image = PIL.Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    PIL.ImageDraw.Draw(image).ellipse((8, 8, 40, 56), fill=(*color, opacity))
    return image


@pytest.mark.parametrize("color", [(255, 255, 255), (245, 250, 245), (0, 0, 0), (255, 255, 0), (128, 128, 128)])
def test_what_is_drawn_on_transparency_can_be_seen(color):
    seen = decode_with_thumbnail(pictures.content(drawn(color)), 0)
    for pixels in (seen.square, np.asarray(PIL.Image.open(io.BytesIO(seen.thumbnail)))):
        assert np.abs(pixels[30, 24].astype(int) - pixels[1, 1]).max() > 60
    faint = decode(pictures.content(drawn(color, 128)), 0)
    assert np.abs(faint[30, 24].astype(int) - faint[1, 1]).max() > 30


def test_colors_and_empty_pictures_are_on_white():
    assert decode(pictures.content(drawn((200, 30, 90))), 0)[1, 1].tolist() == [255] * 3
    assert (decode(pictures.content(PIL.Image.new("RGBA", (9, 9), (0, 0, 0, 0))), 0) == 255).all()


# Matrices to XYZ of D50, the white of profiles.
PROPHOTO = np.array([[0.79767, 0.13519, 0.03134], [0.28804, 0.71188, 0.00009], [0, 0, 0.82510]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def profile(matrix, gamma, space=b"RGB "):
    """Returns an ICC profile (version 2.4) of three primaries and an exponent."""

    def fixed(*values):
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    def xyz(values):
        return b"XYZ \0\0\0\0" + fixed(*values)

    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(79)
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    tags = {b"desc": name, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": xyz((0.9642, 1, 0.8249))}
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"kTRC": curve}
    tags |= {name: xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"test", 0x02400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def converted(pixels, matrix, gamma):
    """Returns the colors in sRGB, by the equations of IEC 61966-2-1."""
    linear = np.linalg.solve(SRGB, matrix @ (pixels.reshape(-1, 3) / 255.0).T ** gamma).T.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded.reshape(pixels.shape))


@pytest.mark.parametrize(("matrix", "gamma"), [(PROPHOTO, 1.8), (DISPLAY_P3, 2.2)])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF", "HEIF"])
def test_profiles_are_applied(matrix, gamma, form):
    image = PIL.Image.new("RGB", (32, 32), (180, 120, 90))
    options = {"quality": 95} if form in ("JPEG", "WEBP", "AVIF", "HEIF") else {}
    content = pictures.content(image, form, icc_profile=profile(matrix, gamma), **options)
    expected = converted(np.asarray(image), matrix, gamma)[0, 0]
    assert np.abs(expected - (180, 120, 90)).max() > 5
    seen = decode_with_thumbnail(content, 8)
    for pixels in (decode(content, 0), seen.square, np.asarray(PIL.Image.open(io.BytesIO(seen.thumbnail)))):
        assert np.abs(pixels[4, 4] - expected).max() <= 3


def test_profiles_of_gray_photos_are_applied():
    gray = PIL.Image.new("L", (32, 32), 100)
    expected = converted(np.full((1, 1, 3), 100), PROPHOTO, 1.8)
    for space in (b"GRAY", b"RGB "):
        content = pictures.content(gray, icc_profile=profile(PROPHOTO, 1.8, space))
        assert np.abs(decode(content, 8)[4, 4] - expected).max() <= 2


@pytest.mark.parametrize("icc", [b"no profile" * 20, profile(PROPHOTO, 1.8, b"CMYK"), profile(PROPHOTO, 1.8)[:200]])
def test_a_profile_that_is_damaged_or_of_another_mode_changes_nothing(icc):
    image = pictures.smooth(40, 30)
    assert np.array_equal(decode(pictures.content(image, icc_profile=icc), 0), image)


def test_the_profile_of_srgb_changes_nothing():
    image = pictures.smooth(40, 30)
    srgb = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode(pictures.content(image, icc_profile=srgb), 0), image)


def test_cielab_becomes_srgb():
    # Lightness 53.4 on the neutral axis is the sRGB level 127.5.
    image = PIL.Image.new("LAB", (16, 16), (round(53.4 * 2.55), 128, 128))
    assert np.abs(decode(pictures.content(image, "TIFF"), 8)[4, 4].astype(int) - 127.5).max() <= 2

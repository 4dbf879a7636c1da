"""Crafted and damaged photo files."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
import PIL.Image

from tests.web.fake import encoded, picture


def png(width: int, height: int, data: bytes, *before: tuple[bytes, bytes]) -> bytes:
    """Returns a gray PNG with any size in its header, and chunks before the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack("!I", len(content)) + kind + content + struct.pack("!I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack("!IIBBBBB", width, height, 8, 0, 0, 0, 0))
    others = b"".join(chunk(kind, content) for kind, content in before)
    return b"\x89PNG\r\n\x1a\n" + header + others + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as into:
        into.writestr("a.png", encoded(picture(0)))
    return file.getvalue()


def tiff_bomb() -> bytes:
    """Returns a TIFF whose one strip claims four gigabytes and whose directory claims 60,000 tags."""
    tags = [(256, 4, 1, 4000), (257, 4, 1, 4000), (273, 4, 1, 8), (279, 4, 1, 0xFFFFFFFF), (278, 4, 1, 4000)]
    body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 60_000) + body + b"\xff" * 12 * 3000


TRUNCATED = encoded(picture(1, 400, 300), "JPEG")[:3000]

REFUSED: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "HTML": lambda: b"<!doctype html><script>alert(1)</script>",
    "SVG with a script": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "a zip": archive,
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "a program": lambda: b"\x7fELF" + bytes(400),
    "truncated": lambda: TRUNCATED,
    "a header of 100,000 × 100,000 pixels": lambda: png(100_000, 100_000, zlib.compress(bytes(1000))),
    "a bomb, larger than its header says": lambda: png(9000, 6000, zlib.compress(bytes(9001 * 6000), 9)),
    "text that unpacks to 200 MB": lambda: png(
        9, 9, zlib.compress(bytes(90)), *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000), 9))] * 10
    ),
    "a TIFF with false sizes": tiff_bomb,
    "a color profile of 100 MB": lambda: png(
        9, 9, b"", (b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000), 9))
    ),
    "a WebP with false sizes": lambda: b"RIFF\xff\xff\xff\x7fWEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff",
    "noise": lambda: np.random.default_rng(0).bytes(5000),
}  # fmt: skip
"""Functions of a file's content: some take long to make, and each worker collects the tests."""


def gif(frames: int = 10) -> bytes:
    images = [PIL.Image.fromarray(picture(n)) for n in range(frames)]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:])
    return file.getvalue()


def polyglots() -> dict[str, bytes]:
    """Returns files that are a picture and something else at the same time."""
    return {
        "JPEG and zip": encoded(picture(2), "JPEG") + archive(),
        "GIF and JavaScript": encoded(picture(2), "GIF").replace(b"GIF89a", b"GIF89a", 1) + b"*/=1;alert(1)//",
        "PNG and HTML": encoded(picture(2)) + b"<script>alert(1)</script>",
        "an animation": gif(),
    }

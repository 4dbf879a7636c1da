"""Generated photos: smooth, with colors that tell one from another, in every format, mode and state."""

import io
import pathlib

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF"}
FORMATS |= {"avif": "AVIF", "heic": "HEIF"}


def smooth(width, height, seed=0):
    """Returns a photo-like image: a few colored waves."""
    generator = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = []
    for _ in range(3):
        a, b, c = generator.uniform(0.5, 3, 3)
        channels.append(0.5 + 0.45 * np.sin(2 * np.pi * (a * x + b * y + c)))
    return PIL.Image.fromarray(np.round(255 * np.stack(channels, axis=-1)).astype(np.uint8))


def scene(seed, width=400, height=300):
    """Returns a picture with many shapes, as a photo has."""
    rng = np.random.default_rng(seed)
    image = PIL.Image.new("RGB", (width, height), tuple(rng.integers(60, 200, 3).tolist()))
    pen = PIL.ImageDraw.Draw(image)
    for _ in range(120):
        x, y, w, h = rng.integers(0, [width, height, 90, 90])
        fill = tuple(rng.integers(0, 256, 3).tolist())
        (pen.ellipse if rng.integers(2) else pen.rectangle)((x, y, x + w + 4, y + h + 4), fill=fill)
    return image.filter(PIL.ImageFilter.GaussianBlur(1))


def content(image, form="PNG", **options):
    """Returns the bytes of an image file."""
    if form == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write(path: pathlib.Path, image, **options):
    """Writes an image in the format that the path's extension names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(image, FORMATS[path.suffix[1:].lower()], **options))


def colored(number, classes, width=40, height=30):
    """Returns a noisy image with the color of its class, in a size that depends on the number."""
    hue = np.random.default_rng(7).integers(30, 226, (classes, 3))[number % classes]
    noise = np.random.default_rng(number).normal(0, 25, (height + number % 7, width + number % 5, 3))
    return PIL.Image.fromarray((hue + noise).clip(0, 255).astype(np.uint8))

"""The inputs of make_backbones.py, make_cnns.py and of the tests that read their output: made alike, without torch."""

import zlib
from collections.abc import Mapping

import numpy as np

POOL_SIZES = ((1, 1), (3, 5), (7, 9), (14, 10))
VGG_WIDTHS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG_INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def photographs(size: int) -> np.ndarray:
    """scikit-learn's china.jpg and flower.jpg, uint8 [2, size, size, 3]. Kept in the golden file: decoders differ."""
    import PIL.Image
    import sklearn.datasets

    return np.stack(
        [
            np.asarray(PIL.Image.fromarray(image).resize((size, size), PIL.Image.Resampling.BICUBIC))
            for image in sklearn.datasets.load_sample_images().images
        ]
    )


def normalized(images: np.ndarray) -> np.ndarray:
    """uint8 images as float32 in [-1, 1]: EfficientNet-Lite0's input."""
    return (images.astype(np.float32) / 255 - 0.5) / 0.5


def noise(size: int, batch: int) -> np.ndarray:
    """Images of standard normal noise, float32 [batch, size, size, 3]."""
    return np.random.default_rng(size).standard_normal((batch, size, size, 3), dtype=np.float32)


def pool_input(height: int, width: int) -> np.ndarray:
    """A map of standard normal noise, float32 [2, height, width, 4]."""
    return np.random.default_rng([height, width]).standard_normal((2, height, width, 4), dtype=np.float32)


def vgg_tensors() -> dict[str, np.ndarray]:
    """A random VGG-16 in torchvision's names: weights as He et al. scale them, biases of 0.1 on average."""
    shapes = {f"features.{index}": (VGG_WIDTHS[i + 1], VGG_WIDTHS[i], 3, 3) for i, index in enumerate(VGG_INDICES)}
    shapes |= {"classifier.0": (4096, 25088), "classifier.3": (4096, 4096), "classifier.6": (1000, 4096)}
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        rng = np.random.default_rng([16, i])
        scale = np.float32(np.sqrt(2 / np.prod(shape[1:])))
        tensors[f"{name}.weight"] = rng.standard_normal(shape, dtype=np.float32) * scale
        tensors[f"{name}.bias"] = np.abs(rng.standard_normal(shape[0], dtype=np.float32)) * np.float32(0.125)
    return tensors


def normed_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A random network of convolutions and batch norms, each tensor drawn by its own name.

    Kernels as He et al. scale them, variances from 0.5 to 1.5, offsets and means of 0.1 on average; gains from 0.25 to
    1, so that maps stay near 1 through all blocks and offsets keep their weight.
    """
    tensors = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.int64(7)
        elif name.endswith("running_var"):
            tensors[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        elif name.endswith("weight") and len(shape) == 1:
            tensors[name] = rng.uniform(0.25, 1, shape).astype(np.float32)
        elif len(shape) == 1:
            tensors[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.125)
        else:
            scale = np.float32(np.sqrt(2 / np.prod(shape[1:])))
            tensors[name] = rng.standard_normal(shape, dtype=np.float32) * scale
    return tensors


def sample(x: np.ndarray, count: int = 200) -> np.ndarray:
    """`count` entries at fixed random places of a [batch, h, w, channels] map."""
    places = np.random.default_rng(x.size).integers(0, x.size, count)
    return np.ascontiguousarray(x).ravel()[places]

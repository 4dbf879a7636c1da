"""The inputs of make_transformers.py and of the tests that read its output: made alike on both sides, without torch."""

import json
import zlib
from collections.abc import Mapping

import numpy as np

NATIVE = (518, 518)  # where DINOv2's position embeddings were learned
SHALLOW = 2  # blocks of the networks that are made small so that tests are quick
# Of each network: heights and widths of the images, square ones and oblong ones.
SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "dinov2_small": ((224, 224), (112, 168), NATIVE),
    "dinov2_base": ((224, 224), (112, 168)),
    "dinov2_small_registers": ((224, 224), (112, 168), NATIVE),
    "dinov2_base_registers": ((224, 224), (112, 168)),
    "clip_vit_b32": ((224, 224), (320, 256)),
    "clip_vit_b16": ((224, 224), (112, 160)),
    "siglip_base": ((224, 224), (112, 160)),
    "clip_vit_b32_shallow": ((224, 224), (320, 256)),
    "siglip_base_shallow": ((112, 160),),
}

# From 5 × 5: rows, columns.
GRIDS = ((3, 8), (11, 4), (1, 5))


def images(height: int, width: int) -> np.ndarray:
    """Two images of standard normal noise, float32 [2, height, width, 3]."""
    return np.random.default_rng([height, width]).standard_normal((2, height, width, 3), dtype=np.float32)


def grid() -> np.ndarray:
    """A grid of standard normal noise, float32 [5, 5, 3]."""
    return np.random.default_rng(5).standard_normal((5, 5, 3), dtype=np.float32)


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A random tensor that depends on its name and shape alone, float32.

    Kernels keep the size of what they are given; all that starts as 0 or 1 in a new network is well away from it.
    """
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    layer, _, part = name.rpartition(".")
    if part == "lambda1":  # of a layer scale
        return np.float32(0.5) + np.float32(0.125) * noise
    if part.endswith("bias"):
        return np.float32(0.125) * noise
    if "norm" in layer.rpartition(".")[2]:
        return 1 + np.float32(0.125) * noise
    if any(word in name for word in ("position", "token", "class", "probe")):
        return np.float32(0.5) * noise
    return np.asarray(noise * np.float32(np.prod(shape[1:]) ** -0.5))


def shapes_in_file(golden: Mapping[str, np.ndarray], name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the published file, as `transformers` writes it."""
    return {key: tuple(shape) for key, shape in json.loads(str(golden[f"{name}_tensors"])).items()}


def checkpoint(golden: Mapping[str, np.ndarray], name: str, prefixes: tuple[str, ...] = ("",)) -> dict[str, np.ndarray]:
    """The tensors of that file whose names begin with a prefix, with the values that make_transformers.py gave them."""
    shapes = shapes_in_file(golden, name)
    return {key: tensor(key, shape) for key, shape in shapes.items() if key.startswith(prefixes)}

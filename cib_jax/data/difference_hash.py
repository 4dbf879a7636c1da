"""The look of a photo in 64 bits, by which copies of one picture are known, however they were saved or resized."""

import numpy as np
import PIL.Image
from jaxtyping import UInt8

BITS = 64
_SIDE = 8


def difference_hash(image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "8"]:
    """Returns, packed, whether each of 8 × 8 places is brighter than the one left of it.

    Copies of a picture differ in a few bits of 64, pictures of like things in about half (Krawetz, Kind of Like That,
    2013, https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html).
    """
    grey = PIL.Image.fromarray(image).convert("L").resize((_SIDE + 1, _SIDE), PIL.Image.Resampling.BOX)
    levels = np.asarray(grey, np.int16)
    return np.packbits(levels[:, 1:] > levels[:, :-1])

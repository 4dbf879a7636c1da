"""A pure function over many images: batch by batch, one compiled program, the next batch read while one is computed."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Array, Shaped, UInt8


def map_batches(
    function: Callable[[UInt8[np.ndarray, "batch height width 3"], int], Shaped[Array, "batch ..."]],
    batches: Iterable[UInt8[np.ndarray, "rows height width 3"]],
    on_images: Callable[[int], None] = lambda images: None,
    *,
    size: int = 0,
) -> Iterator[Shaped[Array, "rows ..."]]:
    """Yields `function(batch, index of its first image)` of every batch.

    A batch smaller than `size` is padded with black images, whose rows are cut off again, so that a jitted `function`
    is compiled once.

    Args:
      function: of a batch of that size.
      batches: of uint8 images, none larger than `size`.
      size: of the batches that `function` gets; 0 takes the first one's.
      on_images: told the number of images of each batch when its result is there.
    """
    start = 0
    pending: Shaped[Array, "rows ..."] | None = None
    for images in batches:
        size = size or len(images)
        whole = (
            images if len(images) == size else np.pad(images, ((0, size - len(images)), *[(0, 0)] * (images.ndim - 1)))
        )
        # Dispatched before the one before is waited for: the device is never idle while the host decodes.
        following = function(whole, start)[: len(images)]
        if pending is not None:
            on_images(len(pending.block_until_ready()))
            yield pending
        pending = following
        start += len(images)
    if pending is not None:
        on_images(len(pending.block_until_ready()))
        yield pending

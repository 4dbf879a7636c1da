"""A pure function over many images: batch by batch, one compiled program, the next batch read while one is computed."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Shaped, UInt8

from cib_jax.devices import parallel


def map_batches(
    function: Callable[[UInt8[np.ndarray, "batch height width 3"], int], Shaped[Array, "batch ..."]],
    batches: Iterable[UInt8[np.ndarray, "rows height width 3"]],
    on_images: Callable[[int], None] = lambda images: None,
    *,
    size: int = 0,
    first: int = 0,
    over: Mesh | None = None,
) -> Iterator[Shaped[Array, "rows ..."]]:
    """Yields `function(batch, index of its first image)` of every batch, or of as many at once as there are devices.

    What is smaller is padded with black images, whose rows are cut off again, so that a jitted `function` is compiled
    once.

    Args:
      function: of a batch of that size, or of a batch for each device (`parallel.by_rows`).
      batches: of uint8 images, none larger than `size`.
      size: of the batches that `function` gets on one device; 0 takes the first one's.
      on_images: told the number of images of each batch when its result is there.
      first: index of the first image.
      over: the devices that compute a batch each at the same time; None: one.
    """
    start = first
    pending: Shaped[Array, "rows ..."] | None = None
    batches, devices = iter(batches), parallel.size(over)
    while group := list(itertools.islice(batches, devices)):
        size = size or len(group[0])
        images = group[0] if len(group) == 1 else np.concatenate(group)
        filling = size * devices - len(images)
        whole = np.pad(images, ((0, filling), *[(0, 0)] * (images.ndim - 1))) if filling else images
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

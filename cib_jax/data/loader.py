"""Images in batches of uint8, or features, in an order that (seed, epoch) alone decide: from memory, or streamed."""

from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int, UInt8

from cib_jax.data.images import DataError, Images, gather, resized

Batch = UInt8[np.ndarray, "batch height width 3"]


def epoch_order(seed: int, epoch: int, count: int) -> Int[np.ndarray, " count"]:
    """Returns the order of `count` images in an epoch; any epoch's can be had without those before it."""
    return np.random.default_rng((seed, 3, epoch)).permutation(count)


def stream(
    images: Images,
    order: Int[np.ndarray, " count"],
    batch_size: int,
    *,
    stored_size: int = 0,
    drop_remainder: bool = False,
) -> Iterator[Batch]:
    """Yields batches of decoded images in the order given, read ahead by Grain's threads.

    Args:
      images: random access to them.
      order: indices into `images`.
      batch_size: images per batch; the last batch may be smaller.
      stored_size: side to which each image is resized on the host; 0 leaves images as they are.
      drop_remainder: True leaves a smaller last batch out.

    Raises:
      DataError: images of different sizes, while `stored_size` is 0.
    """
    if not len(order):
        return
    first = images[int(order[0])].shape
    if len(first) < 3:  # features: nothing to decode
        last = len(order) // batch_size * batch_size if drop_remainder else len(order)
        yield from (gather(images, order[start : start + batch_size]) for start in range(0, last, batch_size))
        return

    def fetch(index: int) -> UInt8[np.ndarray, "height width 3"]:
        if stored_size:
            return resized(images, int(index), stored_size)
        image = images[int(index)]
        if image.shape != first:
            raise DataError(
                f"config.data.stored_size: image {index} has shape {image.shape}, others {first}; set the field to the "
                "side in pixels to which all are resized, such as 256"
            )
        return image

    pipeline = grain.MapDataset.source(np.asarray(order)).map(fetch).batch(batch_size, drop_remainder=drop_remainder)
    yield from pipeline.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))


def materialise(images: Images, *, stored_size: int = 0) -> UInt8[np.ndarray, "images height width 3"]:
    """Returns all images as one array.

    Raises:
      DataError: images of different sizes, while `stored_size` is 0.
    """
    if isinstance(images, np.ndarray) and not stored_size:
        return images
    whole: np.ndarray | None = None
    done = 0
    for batch in stream(images, np.arange(len(images)), 256, stored_size=stored_size):
        if whole is None:  # made at once: joining batches at the end would hold everything twice
            whole = np.empty((len(images), *batch.shape[1:]), batch.dtype)
        whole[done : done + len(batch)] = batch
        done += len(batch)
    assert whole is not None, "a set of images is never empty"
    return whole


def size_in_bytes(images: Images, *, stored_size: int = 0) -> int:
    """Returns what `materialise` would take, from the first image's size."""
    return len(images) * (stored_size * stored_size * 3 if stored_size else images[0].nbytes)

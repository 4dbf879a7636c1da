"""What a set of images is: random access, labels where there are any, names, and where it came from."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import grain
import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from cib_jax.errors import DataError
from cib_jax.random_streams import stream_rng

# data.images: What a set of images is: random access, labels where there are any, names, and where it came from.


Item = UInt8[np.ndarray, "height width 3"] | Float[np.ndarray, "..."]
"""An image, or a vector of features that stands for one."""


class Images(Protocol):
    """Random access to decoded images, in a fixed order; an array of images is one.

    A class may also have `resized(index, size)`, where it can decode straight to that size; `gather(indices)`, where
    many items come faster together; and `identity`, a string that changes with the content, where that is known without
    reading it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


Labels = Int[np.ndarray, " images"] | Bool[np.ndarray, "images classes"]
"""One class per image, or any number of them."""

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Of what is done and how many images it takes: a context that gives a function of how many more are done."""


def no_bar(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Shows nothing."""
    del what, total
    return nullcontext(lambda more: None)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images with their labels, which measure and, in the published protocol, balance; nothing learns from them."""

    images: Images
    labels: Labels | None
    names: Sequence[str] | None = None
    """Of the images, such as their paths, where they have any."""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Int[np.ndarray, " taken"]) -> "ImageSet":
        """Returns the images at `indices`, in that order, undecoded."""
        labels = None if self.labels is None else self.labels[indices]
        names = None if self.names is None else [self.names[int(index)] for index in indices]
        return ImageSet(_Taken(self.images, indices), labels, names)


@dataclasses.dataclass(frozen=True)
class _Taken:
    images: Images
    indices: Int[np.ndarray, " taken"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.images[int(self.indices[index])]

    def resized(self, index: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
        return resized(self.images, int(self.indices[index]), size)

    def gather(self, indices: Int[np.ndarray, " items"]) -> Shaped[np.ndarray, "items ..."]:
        return gather(self.images, self.indices[indices])

    @property
    def identity(self) -> str | None:
        whole = identity(self.images)
        if whole is None:
            return None
        return f"{whole}/{hashlib.blake2b(np.asarray(self.indices, np.int64).tobytes(), digest_size=16).hexdigest()}"


@dataclasses.dataclass(frozen=True)
class _Joined:
    parts: tuple[Images, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def _at(self, index: int) -> tuple[Images, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)

    def __getitem__(self, index: int) -> Item:
        part, index = self._at(int(index))
        return part[index]

    def resized(self, index: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
        return resized(*self._at(int(index)), size)

    @property
    def identity(self) -> str | None:
        known = [identity(part) for part in self.parts]
        return None if None in known else "+".join(map(str, known))


def joined(*sets: ImageSet) -> ImageSet:
    """Returns one set after the other, as one; labels and names are kept where all have them."""
    if len(sets) == 1:
        return sets[0]
    labels = [part.labels for part in sets if part.labels is not None]
    names = [part.names for part in sets if part.names is not None]
    return ImageSet(
        _Joined(tuple(part.images for part in sets)),
        np.concatenate(labels) if len(labels) == len(sets) else None,
        [name for part in names for name in part] if len(names) == len(sets) else None,
    )


def resized(images: Images, index: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Returns image `index` as a square of that size, decoded straight to it where the images can be."""
    if hasattr(images, "resized"):
        return images.resized(index, size)
    return resize(images[index], size)


def gather(images: Images, indices: Int[np.ndarray, " items"]) -> Shaped[np.ndarray, "items ..."]:
    """Returns the items at `indices`, all of one shape, as one array."""
    if isinstance(images, np.ndarray):
        return images[indices]
    if hasattr(images, "gather"):
        return images.gather(indices)
    return np.stack([images[int(index)] for index in indices])


def identity(images: Images) -> str | None:
    """Returns what stands for the content of all images, or None where only reading them tells."""
    return getattr(images, "identity", None)


def resize(image: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Returns the image resized on the host, bilinearly and antialiased, by Pillow."""
    return np.asarray(PIL.Image.fromarray(image).resize((size, size), PIL.Image.Resampling.BILINEAR))


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A file that could not be used, and why."""

    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set as it is published. Where it comes in one piece, `test` is None."""

    train: ImageSet
    test: ImageSet | None
    classes: Sequence[str] = ()
    """Names of the classes, where there are any."""
    roles: Mapping[str, ImageSet] | None = None
    """Splits that the data set's own list gives, by role; see `cib_jax.data.splits`."""
    unreadable: Sequence[Unreadable] = ()
    """Files that were left out."""
    notes: Sequence[str] = ()
    """What a user should be told of how the data were read, a sentence each."""


# data.loader: Images in batches of uint8, or features, in an order that (seed, epoch) alone decide: from memory, or streamed.


Batch = UInt8[np.ndarray, "batch height width 3"]


def epoch_order(seed: int, epoch: int, count: int) -> Int[np.ndarray, " count"]:
    """Returns the order of `count` images in an epoch; any epoch's can be had without those before it."""
    return stream_rng(seed, "epoch order", epoch).permutation(count)


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


def materialize(images: Images, *, stored_size: int = 0) -> UInt8[np.ndarray, "images height width 3"]:
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
    """Returns what `materialize` would take, from the first image's size."""
    return len(images) * (stored_size * stored_size * 3 if stored_size else images[0].nbytes)

"""Data sets by name: where each kind comes from, and how it is asked for."""

import pathlib
from collections.abc import Callable

import numpy as np

from cib_jax.data import feature_files, photo_folder, photos
from cib_jax.data.dataset import Bar, ImageSet, Source, no_bar
from cib_jax.errors import DataError


def load(
    name: str,
    directory: str = "",
    *,
    labeled: bool = True,
    stored_size: int = 0,
    prepared: pathlib.Path | None = None,
    max_megapixels: int = photos.MAX_MEGAPIXELS,
    raw: str = "",
    image: str = "",
    label: str = "",
    database: str = "",
    query: str = "",
    bar: Bar = no_bar,
) -> Source:
    """Returns the data set `name`.

    Args:
      name: "digits" (scikit-learn's), "folder" (of photos), "list" (a CSV or Parquet file of paths), "features"
        (vectors of any model), "nuswide", "mscoco", or a data set of tensorflow-datasets.
      directory: the folder, the file, or the TFDS data_dir ("": TFDS's usual place). Unused for "digits".
      labeled: False leaves labels aside where a folder, a list or features have any.
      stored_size: side to which a folder's or a list's photos are prepared, in pixels.
      prepared: where such photos are kept, decoded and resized.
      max_megapixels: larger images are left out.
      raw, image, label, database, query: see `cib_jax.data.tfds.load`.
      bar: shows the progress of preparing photos and of checking features; TFDS shows its own.

    Raises:
      DataError: there is no such set, it cannot be had, or it is unusable.
    """
    if name in OWN:
        return OWN[name](directory)
    if name == "features":
        return feature_files.load(directory, labeled=labeled, cache=prepared, bar=bar)
    if name in ("folder", "list"):
        if not stored_size or prepared is None:
            raise DataError(
                "config.data.stored_size: photos of a folder or a list are of several sizes; set it to the side in "
                "pixels to which all are resized, such as 160"
            )
        read = photo_folder.load_folder if name == "folder" else photo_folder.load_list
        return read(
            directory, labeled=labeled, size=stored_size, cache=prepared, max_megapixels=max_megapixels, bar=bar
        )
    from cib_jax.data import tfds  # with it comes tensorflow-datasets, which nothing else wants

    return tfds.load(
        name,
        directory,
        raw=raw,
        image=image,
        label=label,
        database=database,
        query=query,
        max_megapixels=max_megapixels,
    )


def _digits(directory: str) -> Source:
    del directory  # they come with scikit-learn
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(gray[..., None], 3, axis=-1)
    return Source(ImageSet(images, digits.target.astype(np.int64)), None, [str(digit) for digit in range(10)])


OWN: dict[str, Callable[[str], Source]] = {"digits": _digits}
"""Data sets that want nothing but a directory, or not even that: each a function of `config.data.dir`."""

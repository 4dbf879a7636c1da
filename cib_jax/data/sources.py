"""Registry of data sets: loads one by the name in a data config."""

import pathlib
from collections.abc import Callable

import numpy as np

from cib_jax.data import feature_files, photo_folder
from cib_jax.data.dataset import Bar, DataConfig, ImageSet, Source, config_error, no_bar
from cib_jax.data.photo_cache import PhotoCache


def load(data: DataConfig, cache_root: pathlib.Path | None = None, bar: Bar = no_bar) -> Source:
    """Returns the data set that a data config names; photos and copied features are kept under `cache_root`."""
    if data.name in DATA_SETS:
        return DATA_SETS[data.name](data.directory)
    if data.name == "features":
        return feature_files.load(data.directory, labeled=data.labeled, cache_root=cache_root, bar=bar)
    if data.name in ("folder", "list"):
        if not data.stored_size or cache_root is None:
            problem = f"it must be positive for a folder or a list of photos, got {data.stored_size}"
            remedy = "set it to the side in pixels to which all are resized, such as 160"
            raise config_error("stored_size", f"{problem}; {remedy}")
        cache = PhotoCache(cache_root, data.stored_size, data.max_megapixels, bar, data.truncated)
        load_photos = photo_folder.load_folder if data.name == "folder" else photo_folder.load_list
        return load_photos(data.directory, cache, labeled=data.labeled)
    from cib_jax.data import tfds  # imports tensorflow-datasets, which the other data sets do not need

    return tfds.load(data)


def _load_digits(directory: str) -> Source:
    del directory  # scikit-learn contains the digits
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(gray[..., None], 3, axis=-1)
    return Source(ImageSet(images, digits.target.astype(np.int64)), None, [str(digit) for digit in range(10)])


DATA_SETS: dict[str, Callable[[str], Source]] = {"digits": _load_digits}
"""Loaders by name, each a function of `config.data.dir`; add a row for a data set of your own."""

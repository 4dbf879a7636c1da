"""Data sets of tensorflow-datasets: any with an image and a label, or several labels, and those of our own builders."""

import dataclasses
import difflib
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cib_jax.data import photos, tfds_builders
from cib_jax.data.dataset import ImageSet, Labels, Source
from cib_jax.data.tfds_builders import without_tensorflow
from cib_jax.errors import DataError

OWN = {"nuswide": tfds_builders.Nuswide, "mscoco": tfds_builders.Mscoco}
"""Builders that TFDS lacks. They come in one piece, the split "train"."""


def load(
    name: str,
    directory: str = "",
    *,
    raw: str = "",
    image: str = "",
    label: str = "",
    database: str = "",
    query: str = "",
    max_megapixels: int = photos.MAX_MEGAPIXELS,
) -> Source:
    """Returns the data set `name`, downloaded and prepared where it is not there yet.

    Args:
      name: as TFDS spells it, "cifar10" or "mscoco/2017".
      directory: the TFDS data_dir; "" takes TFDS's usual place.
      raw: the folder of the published files, for a set that is prepared from files that TFDS cannot download.
      image: the feature that is the image; "" takes the only one there is.
      label: the feature that is the label or labels, with slashes into nested ones ("objects/label"); "" takes the
        only one there is.
      database: the split to train on and search, "" is "train"; TFDS's slices, such as "train[:1000]", work.
      query: the split of the queries; "" is "test", or none where "train" is the only split.
      max_megapixels: larger images are refused.

    Raises:
      DataError: there is no such set, it cannot be had, or its images or labels are not to be found.
    """
    import tensorflow_datasets as tfds

    directory = os.path.expanduser(directory)
    where = directory or str(tfds.core.constants.DATA_DIR)
    if directory and not os.path.isdir(directory):
        raise DataError(
            f"config.data.dir: there is no folder {directory}; give a TFDS data_dir, or make it if {name} is to be "
            "prepared there"
        )
    base = name.partition("/")[0].partition(":")[0]
    if base not in OWN and base not in (known := tfds.list_builders(with_community_datasets=False)):
        near = difflib.get_close_matches(base, [*known, *OWN], 3)
        hint = f"did you mean {' or '.join(near)}" if near else "see https://www.tensorflow.org/datasets/catalog"
        raise DataError(
            f"config.data.name: {name!r} is none of digits, folder, list, features, {', '.join(OWN)} and not a data "
            f"set of tensorflow-datasets; {hint}"
        )
    try:
        # array_record: the one format TFDS reads at random and without TensorFlow.
        builder = tfds.builder(name, data_dir=directory or None, file_format="array_record")
    except Exception as error:  # of many kinds; a folder prepared as tfrecord is the most likely one
        raise DataError(
            f"config.data.dir: {name} under {where} cannot be opened ({_first_line(error)}); if it was prepared in "
            "another format than array_record, give another --config.data.dir to have it prepared there"
        ) from error
    if not builder.info.splits:
        _prepare(builder, name, where, raw)
    image, label = _image_feature(builder, name, image), _label_feature(builder, name, label)
    database, query = _splits(builder, name, database, query)
    try:
        train = _split(builder, database, image, label, max_megapixels)
        test = _split(builder, query, image, label, max_megapixels) if query else None
    except Exception as error:  # TFDS and array_record raise many kinds; each means that the files are unusable
        raise DataError(
            f"config.data.dir: {name} under {where} cannot be read ({_first_line(error)}); if its files are damaged, "
            "remove that folder to have it prepared again"
        ) from error
    unreadable = tfds_builders.excluded_images(builder) if base == "nuswide" else ()
    return Source(train, test, _classes(builder, label), unreadable=unreadable)


def _prepare(builder: Any, name: str, where: str, raw: str) -> None:
    import tensorflow_datasets as tfds

    own = type(builder) in OWN.values()
    raw = os.path.expanduser(raw)
    if own and not os.path.isdir(raw):
        raise DataError(
            f"config.data.raw_dir: {name} is not prepared under {where} yet, and "
            f"{f'there is no folder {raw}' if raw else 'the field is empty'}; give the folder of the files that "
            "docs/data.md says to download"
        )
    options = {"manual_dir": raw} if raw else {}
    try:
        with without_tensorflow():
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(**options))
    except DataError:
        raise
    except Exception as error:  # whatever went wrong, the way out is the same
        if "TensorFlow itself is needed" in str(error):
            raise DataError(
                f"config.data.name: {name} can only be prepared with TensorFlow ({_first_line(error)}); pip install "
                "tensorflow once, or prepare it elsewhere by `tfds build --file_format=array_record` and pass its "
                "data_dir as config.data.dir"
            ) from error
        way_out = (
            "see docs/data.md"
            if own
            else "start the same command on a machine with network and --config.data.dir=DIR, then copy DIR here and "
            "pass it"
        )
        raise DataError(
            f"config.data.dir: {name} is not prepared under {where}, and "
            f"{'preparing' if own else 'downloading'} it failed ({_first_line(error)}); {way_out}"
        ) from error


def _image_feature(builder: Any, name: str, wanted: str) -> str:
    import tensorflow_datasets as tfds

    found = [path for path, feature in _features(builder).items() if isinstance(feature, tfds.features.Image)]
    if not wanted and "image" in found:
        return "image"
    return _chosen(name, "image_feature", "image", wanted, found, builder)


def _label_feature(builder: Any, name: str, wanted: str) -> str:
    found = [path for path, feature in _features(builder).items() if _reader(feature) is not None]
    for usual in ("label", "labels"):
        if not wanted and usual in found:
            return usual
    return _chosen(name, "label_feature", "label", wanted, found, builder)


def _chosen(name: str, field: str, what: str, wanted: str, found: list[str], builder: Any) -> str:
    if wanted in found:
        return wanted
    if not wanted and len(found) == 1:
        return found[0]
    there = f"its features are {', '.join(_features(builder))}"
    if wanted:
        raise DataError(f"config.data.{field}: {name} has no {what} called {wanted!r}; {there}")
    if found:
        raise DataError(f"config.data.{field}: {name} has several; choose one of {', '.join(found)}")
    raise DataError(f"config.data.name: {name} has no {what} ({there}); choose another data set")


def _features(builder: Any) -> dict[str, Any]:
    """Returns the features by path, nested ones with slashes: a sequence of dictionaries is a dictionary of them."""
    import tensorflow_datasets as tfds

    flat: dict[str, Any] = {}

    def walk(prefix: str, feature: Any, many: bool) -> None:
        inner = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
        if isinstance(inner, tfds.features.FeaturesDict):
            for key, value in inner.items():
                walk(f"{prefix}/{key}" if prefix else key, value, many or inner is not feature)
        elif many and isinstance(inner, tfds.features.ClassLabel):
            flat[prefix] = tfds.features.Sequence(inner)
        else:
            flat[prefix] = feature

    walk("", builder.info.features, False)
    return flat


def _reader(feature: Any) -> Callable[[Sequence[Any]], Labels] | None:
    """Returns what makes labels of all values of a feature, or None if it is no label."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.ClassLabel):
        return lambda values: np.asarray(values, np.int64)
    if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.ClassLabel):
        return lambda values: _multi_hot(values, feature.feature.num_classes)
    whole = isinstance(feature, tfds.features.Tensor) and len(feature.shape) == 1 and feature.shape[0]
    if whole and np.dtype(feature.np_dtype).kind in "bui":
        return lambda values: np.asarray(values).astype(bool)
    return None


def _multi_hot(values: Sequence[Any], classes: int) -> Labels:
    labels = np.zeros((len(values), classes), bool)
    for row, value in zip(labels, values, strict=True):
        row[np.asarray(value, np.int64)] = True
    return labels


def _classes(builder: Any, label: str) -> Sequence[str]:
    feature = _features(builder)[label]
    named = getattr(feature, "feature", feature)
    return list(getattr(named, "names", None) or (builder.info.metadata or {}).get("classes", ()))


def _splits(builder: Any, name: str, database: str, query: str) -> tuple[str, str]:
    there = list(builder.info.splits)
    for field, split in (("database_split", database), ("query_split", query)):
        for part in split.split("+"):
            if part and part.partition("[")[0] not in there:
                raise DataError(f"config.data.{field}: {name} has no split {part!r}; it has {', '.join(there)}")
    if not database and "train" not in there:
        raise DataError(f"config.data.database_split: {name} has no 'train'; choose of {', '.join(there)}")
    if not query and there != ["train"] and "test" not in there:
        raise DataError(
            f"config.data.query_split: {name} has no 'test'; choose of {', '.join(there)}, such as "
            f"{next(split for split in there if split != 'train')}"
        )
    return database or "train", query or ("test" if "test" in there else "")


def _split(builder: Any, split: str, image: str, label: str, max_megapixels: int) -> ImageSet:
    import tensorflow_datasets as tfds

    # The images stay as the bytes that were stored: labels come without decoding, and pixels straight at their size.
    source = builder.as_data_source(split=split, decoders=_nested(image, tfds.decode.SkipDecoding()))
    make = _reader(_features(builder)[label])
    assert make is not None
    labels, names, positions = [], [], []
    for index in range(len(source)):
        example = source[index]
        labels.append(_at(example, label))
        if isinstance(builder, tfds_builders.Published):
            names.append(example["name"].decode())
            positions.append(example["position"])
    files = [pathlib.Path(path) for path in _files(builder, split)]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.blake2b(repr((split, image, stats, photos.VERSION)).encode(), digest_size=16).hexdigest()
    images = TfdsImages(source, image, max_megapixels, f"{builder.info.full_name}-{digest}")
    whole = ImageSet(images, make(labels), names or None)
    return whole.take(np.argsort(positions)) if positions else whole


def _files(builder: Any, split: str) -> list[str]:
    return [
        os.fspath(path) for part in split.split("+") for path in builder.info.splits[part.partition("[")[0]].filepaths
    ]


def _nested(path: str, leaf: Any) -> dict[str, Any]:
    first, _, rest = path.partition("/")
    return {first: _nested(rest, leaf) if rest else leaf}


def _at(example: Any, path: str) -> Any:
    for key in path.split("/"):
        example = [inner[key] for inner in example] if isinstance(example, list) else example[key]
    return example


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """The images of a TFDS data source, decoded when they are asked for."""

    source: Sequence[dict[str, Any]]
    feature: str
    max_megapixels: int
    identity: str
    """What the files of the source are known by: their sizes and times."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        return self.resized(index, 0)

    def resized(self, index: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """Returns image `index` as a square; 0 leaves it as it is.

        Raises:
          DataError: the stored image cannot be decoded.
        """
        try:
            stored = _at(self.source[int(index)], self.feature)
            return photos.decode(stored, size, max_megapixels=self.max_megapixels)
        except photos.BadPhotoError as error:
            raise DataError(
                f"config.data.dir: image {index} of {self.identity.rpartition('-')[0]} cannot be decoded ({error}); "
                "remove the prepared data set to have it prepared again"
            ) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"

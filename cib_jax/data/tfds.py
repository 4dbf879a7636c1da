"""Data sets of tensorflow-datasets (TFDS) with images and labels, and of the builders in `tfds_builders`."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from cib_jax.data import photos, tfds_builders
from cib_jax.data.dataset import DataConfig, ImageSet, Labels, Source, Unreadable, config_error, multi_hot
from cib_jax.errors import DataError
from cib_jax.files import did_you_mean, first_line

BUILDERS: dict[str, type[Any]] = {"nuswide": tfds_builders.Nuswide, "mscoco": tfds_builders.Mscoco}
"""Builders that TFDS lacks. Their data sets come in one piece, the split "train"."""


def load(data: DataConfig) -> Source:
    """Returns the data set that a data config names, downloaded and prepared if necessary."""
    directory = os.path.expanduser(data.directory)
    place = f"{data.name} under {directory or tfds.core.constants.DATA_DIR}"
    builder = _open_builder(data.name, directory, place)
    if not builder.info.splits:
        _prepare(builder, data.name, place, os.path.expanduser(data.raw_directory))
    image, label = _select_features(builder, data)
    database, query = _select_splits(builder, data)
    try:
        train = _load_split(builder, database, image, label, data.max_megapixels)
        test = _load_split(builder, query, image, label, data.max_megapixels) if query else None
    except Exception as error:  # TFDS and array_record raise many classes; each means that the files are unusable
        problem = f"{place} cannot be read ({_describe(error)}); remove its files to have it prepared again"
        raise config_error("dir", problem) from error
    feature, metadata = _flatten_features(builder)[label], builder.info.metadata or {}
    classes = getattr(getattr(feature, "feature", feature), "names", None) or metadata.get("classes", ())
    return Source(train, test, list(classes), unreadable=[Unreadable(*file) for file in metadata.get("left_out", ())])


def _open_builder(name: str, directory: str, place: str) -> Any:
    if directory and not os.path.isdir(directory):
        raise config_error("dir", f"the folder {directory} does not exist; give a TFDS data_dir, or create it")
    base = name.partition("/")[0].partition(":")[0]
    if base not in BUILDERS and base not in (known := tfds.list_builders(with_community_datasets=False)):
        hint = did_you_mean(base, [*known, *BUILDERS], most=3).rstrip()
        allowed = f"digits, folder, list, features, {', '.join(BUILDERS)} or a data set of tensorflow-datasets"
        remedy = hint or "see https://www.tensorflow.org/datasets/catalog"
        raise config_error("name", f"it must be {allowed}, got {name!r}; {remedy}")
    try:
        # array_record is the only format with random access and without TensorFlow.
        return tfds.builder(name, data_dir=directory or None, file_format="array_record")
    except Exception as error:  # of many classes; most likely the folder was prepared as tfrecord
        remedy = "if its format is not array_record, set another folder, in which it is prepared again"
        raise config_error("dir", f"{place} cannot be opened ({_describe(error)}); {remedy}") from error


def _prepare(builder: Any, name: str, place: str, raw_directory: str) -> None:
    own = type(builder) in BUILDERS.values()
    if own and not os.path.isdir(raw_directory):
        problem = f"it must be the folder of files in docs/data.md to prepare {place}, got {raw_directory!r}"
        raise config_error("raw_dir", problem)
    options = {"manual_dir": raw_directory} if raw_directory else {}
    try:
        with tfds_builders.without_tensorflow():
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(**options))
    except DataError:
        raise
    except Exception as error:  # the remedies do not depend on the class
        if "TensorFlow itself is needed" in str(error):
            problem = f"{name} can only be prepared with TensorFlow ({_describe(error)})"
            remedy = "install it, or prepare the set elsewhere with `tfds build --file_format=array_record`"
            raise config_error("name", f"{problem}; {remedy}") from error
        remedy = "run the same command with network and --config.data.dir=DIR, then copy DIR here and set it"
        problem = f"{place} is not prepared, and preparing it failed ({_describe(error)})"
        raise config_error("dir", f"{problem}; {'see docs/data.md' if own else remedy}") from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


# Features


def _select_features(builder: Any, data: DataConfig) -> tuple[str, str]:
    """Returns the paths of the image feature and of the label feature."""
    features = _flatten_features(builder)
    images = [path for path, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [path for path, feature in features.items() if _label_reader(feature) is not None]
    available = f"its features are {', '.join(features)}"

    def select(kind: str, requested: str, candidates: list[str]) -> str:
        if requested and requested not in candidates:
            raise config_error(f"{kind}_feature", f"{data.name} has no {kind} feature {requested!r}; {available}")
        if not candidates:
            raise config_error("name", f"{data.name} has no {kind} feature ({available}); choose another data set")
        usual = [path for path in (kind, f"{kind}s") if path in candidates]
        if not requested and not usual and len(candidates) > 1:
            choice = ", ".join(candidates)
            raise config_error(f"{kind}_feature", f"{data.name} has several; set the field to one of {choice}")
        return requested or (usual or candidates)[0]

    return select("image", data.image_feature, images), select("label", data.label_feature, labels)


def _flatten_features(builder: Any) -> dict[str, Any]:
    """Returns the features by path, with slashes into nested ones: a sequence of dictionaries counts as one of them."""
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


def _label_reader(feature: Any) -> Callable[[Sequence[Any]], Labels] | None:
    """Returns a function from all values of a feature to labels, or None if the feature holds no labels."""
    if isinstance(feature, tfds.features.ClassLabel):
        return lambda values: np.asarray(values, np.int64)
    if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.ClassLabel):
        return lambda values: multi_hot(values, feature.feature.num_classes)
    is_vector = isinstance(feature, tfds.features.Tensor) and len(feature.shape) == 1 and feature.shape[0]
    if is_vector and np.dtype(feature.np_dtype).kind in "bui":
        return lambda values: np.asarray(values).astype(bool)
    return None


# Splits


def _select_splits(builder: Any, data: DataConfig) -> tuple[str, str]:
    """Returns the split to train on and search, and that of the queries ("": none)."""
    available = list(builder.info.splits)
    choice = f"choose from {', '.join(available)}"
    for field, split in (("database_split", data.database_split), ("query_split", data.query_split)):
        for part in split.split("+"):
            if part and part.partition("[")[0] not in available:
                raise config_error(field, f"{data.name} has no split {part!r}; {choice}")
    if not data.database_split and "train" not in available:
        raise config_error("database_split", f"{data.name} has no 'train'; {choice}")
    if not data.query_split and available != ["train"] and "test" not in available:
        raise config_error("query_split", f"{data.name} has no 'test'; {choice}")
    return data.database_split or "train", data.query_split or ("test" if "test" in available else "")


def _load_split(builder: Any, split: str, image: str, label: str, max_megapixels: int) -> ImageSet:
    # The images stay encoded: labels are read without decoding, and pixels are decoded straight to their size.
    decoders: Any = tfds.decode.SkipDecoding()
    for key in reversed(image.split("/")):
        decoders = {key: decoders}
    source = builder.as_data_source(split=split, decoders=decoders)
    read_labels = _label_reader(_flatten_features(builder)[label])
    assert read_labels is not None
    labels, names, positions = [], [], []
    digest = hashlib.blake2b(photos.VERSION.encode(), digest_size=16)
    for index in range(len(source)):
        example = source[index]
        labels.append(_lookup(example, label))
        encoded = _lookup(example, image)
        digest.update(f" {len(encoded)} ".encode())
        digest.update(encoded)
        if isinstance(builder, tfds_builders.PublishedBuilder):
            names.append(example["name"].decode())
            positions.append(example["position"])
    identity = f"{builder.info.full_name}-{digest.hexdigest()}"
    images = TfdsImages(source, image, max_megapixels, identity)
    whole = ImageSet(images, read_labels(labels), names or None)
    return whole.take(np.argsort(positions)) if positions else whole


def _lookup(example: Any, path: str) -> Any:
    for key in path.split("/"):
        example = [inner[key] for inner in example] if isinstance(example, list) else example[key]
    return example


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """The images of a TFDS data source, which are stored encoded, and decoded as they are accessed."""

    source: Sequence[dict[str, Any]]
    feature: str
    max_megapixels: int
    identity: str  # from the encoded images

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        return self.resized(index, 0)

    def resized(self, index: int, size: int) -> UInt8[np.ndarray, "height width 3"]:
        """Returns image `index` as a square; size 0 leaves it as it is."""
        try:
            encoded = _lookup(self.source[int(index)], self.feature)
            return photos.decode(encoded, size, max_megapixels=self.max_megapixels)
        except photos.BadPhotoError as error:
            problem = f"image {index} of {self.identity.rpartition('-')[0]} cannot be decoded ({error})"
            remedy = "remove the prepared data set to have it prepared again"
            raise config_error("dir", f"{problem}; {remedy}") from None

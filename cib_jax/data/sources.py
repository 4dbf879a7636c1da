"""Data sets by name: images one by one, and their labels, from tensorflow-datasets or from scikit-learn."""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cib_jax.data.builders import cifar
from cib_jax.data.images import DataError, ImageSet, Source


def load(name: str, directory: str = "") -> Source:
    """Returns the data set `name`: "digits", or a tensorflow-datasets name whose images have one label each.

    Args:
      name: the data set.
      directory: the TFDS data_dir; "" takes TFDS's usual place. Unused for "digits".

    Raises:
      DataError: there is no such set, it cannot be had, or it is not one of labelled images.
    """
    return _digits() if name == "digits" else _tfds(name, directory)


def _digits() -> Source:
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return Source(ImageSet(np.repeat(grey[..., None], 3, axis=-1), digits.target.astype(np.int64)), None)


def _tfds(name: str, directory: str) -> Source:
    import tensorflow_datasets as tfds

    directory = os.path.expanduser(directory)
    where = directory or str(tfds.core.constants.DATA_DIR)
    if directory and not os.path.isdir(directory):
        raise DataError(
            f"config.data.dir: there is no folder {directory}; give a TFDS data_dir, or make it if {name} is to be "
            "downloaded there"
        )
    if name not in (known := tfds.list_builders(with_community_datasets=False)):
        near = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(near)}" if near else "see https://www.tensorflow.org/datasets/catalog"
        raise DataError(f"config.data.name: {name!r} is neither 'digits' nor a data set of tensorflow-datasets; {hint}")
    try:
        # array_record: the one format TFDS reads at random and without TensorFlow.
        builder = tfds.builder(name, data_dir=directory or None, file_format="array_record")
    except Exception as error:  # of many kinds; a folder prepared as tfrecord is the most likely one
        raise DataError(
            f"config.data.dir: {name} under {where} cannot be opened ({_first_line(error)}); if it was prepared in "
            "another format than array_record, give another --config.data.dir to have it prepared there"
        ) from error
    if not builder.info.splits:
        _prepare(builder, name, where)
    features = dict(builder.info.features) if isinstance(builder.info.features, tfds.features.FeaturesDict) else {}
    if (
        not isinstance(features.get("image"), tfds.features.Image)
        or not isinstance(features.get("label"), tfds.features.ClassLabel)
        or features["image"].shape[-1] not in (1, 3)
        or not {"train", "test"} <= set(builder.info.splits)
    ):
        raise DataError(
            f"config.data.name: {name} has features {sorted(features)} and splits {sorted(builder.info.splits)}, but "
            "an 'image' in grey or RGB, a class 'label', 'train' and 'test' are needed; choose another data set"
        )
    try:
        return Source(_split(builder, "train"), _split(builder, "test"))
    except Exception as error:  # TFDS and array_record raise many kinds; each means that the files are unusable
        raise DataError(
            f"config.data.dir: {name} under {where} cannot be read ({_first_line(error)}); if its files are damaged, "
            "remove that folder to have it prepared again"
        ) from error


def _prepare(builder: Any, name: str, where: str) -> None:
    try:
        with cifar.without_tensorflow():
            builder.download_and_prepare()
    except Exception as error:  # whatever went wrong, the way out is the same
        raise DataError(
            f"config.data.dir: {name} is not prepared under {where}, and downloading it failed ({_first_line(error)}); "
            "start the same command on a machine with network and --config.data.dir=DIR, then copy DIR here and pass it"
        ) from error


def _split(builder: Any, split: str) -> ImageSet:
    import tensorflow_datasets as tfds

    # Labels first, all of them, with the images left undecoded: the protocol draws by label.
    undecoded = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    labels = np.fromiter((example["label"] for example in undecoded), np.int64, len(undecoded))
    return ImageSet(TfdsImages(builder.as_data_source(split=split)), labels)


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """The images of a TFDS data source, grey ones repeated to three channels."""

    source: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        image = self.source[index]["image"]
        return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"

"""What builders share that prepare a data set from files as they were published: finding, checking and copying them."""

import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from cib_jax.data import photos
from cib_jax.data.all_cores import in_order
from cib_jax.data.images import DataError, Unreadable


class Published(tfds.core.GeneratorBasedBuilder):
    """What such builders have in common; `download_config.manual_dir` is the folder of the published files."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "See docs/data.md."
    CLASSES: ClassVar[int]
    """How many there are."""
    HOMEPAGE: ClassVar[str]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "labels": tfds.features.Tensor(shape=(self.CLASSES,), dtype=np.bool_),
                    "name": tfds.features.Text(),
                    # In the published order, in which splits are drawn: TFDS stores examples in another, since keeping
                    # this one would take all of them in memory at once.
                    "position": tfds.features.Scalar(np.int64),
                }
            ),
            homepage=self.HOMEPAGE,
            # "classes" names them; "left_out" lists images that were not there or not readable.
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {"train": self._generate_examples(pathlib.Path(dl_manager.manual_dir))}


def find(root: pathlib.Path, *places: str) -> pathlib.Path:
    """Returns the first of `places`, relative paths of one thing in several layouts, that there is under `root`.

    Archives unpack with and without a folder of their own, so each is looked for one folder down, too.

    Raises:
      DataError: there is none.
    """
    down = sorted(path for path in root.iterdir() if path.is_dir())
    for place in places:
        for base in (root, *down):
            if (base / place).exists():
                return base / place
    raise DataError(
        f"config.data.raw_dir: there is no {' or '.join(places)} in {root} or a folder right in it; download and "
        "unpack what docs/data.md names, and give the folder by --config.data.raw_dir=DIR"
    )


def examples(
    files: Iterable[tuple[str, pathlib.Path, dict[str, Any]]], left_out: list[Unreadable]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields TFDS examples, in order: the bytes of each file as `image`, its name, and what belongs to it.

    All cores check that the images can be decoded. Files that are missing or cannot be are added to `left_out` instead.
    """
    for number, ((name, _, fields), content) in enumerate(in_order(_read, files)):
        if isinstance(content, str):
            left_out.append(Unreadable(name, content))
        else:
            yield number, {"image": content, "name": name, "position": number, **fields}


def _read(file: tuple[str, pathlib.Path, dict[str, Any]]) -> bytes | str:
    """Returns a file's bytes, or the reason why not."""
    try:
        content = file[1].read_bytes()
        photos.decode(content, 32)  # small: JPEGs are then decoded at an eighth, but read to their end
    except OSError as error:
        return (error.strerror or str(error)).lower()
    except photos.BadPhotoError as error:
        return str(error)
    return content

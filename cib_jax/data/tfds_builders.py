"""TFDS's own builders without TensorFlow, which most of them ask only to open files and to write images."""

import contextlib
import glob
import importlib.util
import io
import json
import os
import pathlib
import shutil
import types
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Bool, Int, Shaped

from cib_jax.data import photos
from cib_jax.data.dataset import Unreadable
from cib_jax.errors import DataError
from cib_jax.files import map_in_order

# data.builders.without_tensorflow: TFDS's own builders without TensorFlow, which most of them ask only to open files and to write images.


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """While it lasts, gives TFDS a stand-in for the parts of TensorFlow that unpack archives and read files.

    Does nothing where TensorFlow is installed. A builder that asks for more gets an AttributeError that names it.
    """
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    from tensorflow_datasets.core.features.image_feature import _ImageEncoder
    from tensorflow_datasets.core.utils import lazy_imports_utils

    original = _ImageEncoder._encode_image
    # TFDS imports TensorFlow late, through this one object, which remembers it under this name. A module in sys.modules
    # would be seen by every other library, too.
    late = vars(lazy_imports_utils.tensorflow)
    late["_module"] = _stand_in()
    _ImageEncoder._encode_image = _encode_image
    try:
        yield
    finally:
        del late["_module"]
        _ImageEncoder._encode_image = original


def _encode_image(encoder: Any, image: Shaped[np.ndarray, "height width channels"]) -> bytes:
    """Writes an image with Pillow, in the format that TFDS's feature names."""
    file = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, encoder.encoding_format.upper())
    return file.getvalue()


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"TensorFlow itself is needed for {self.__name__}.{name}")


def _stand_in() -> types.ModuleType:
    return _part(
        "tensorflow",
        io=_part("tensorflow.io", gfile=_part("tensorflow.io.gfile", **_FILES)),
        compat=_part("tensorflow.compat", as_text=_as_text, as_bytes=_as_bytes, as_str=_as_text),
        errors=_part("tensorflow.errors", UnimplementedError=NotImplementedError, NotFoundError=OSError),
    )


def _part(name: str, **members: Any) -> types.ModuleType:
    part = _StandIn(name)
    vars(part).update(members)
    return part


def _open(path: Any, mode: str = "r") -> Any:
    return epath.Path(path).open(mode)


def _as_text(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text


def _as_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


_FILES = {
    "GFile": _open,
    "Open": _open,
    "copy": lambda source, target, overwrite=False: epath.Path(source).copy(target, overwrite=overwrite),
    "exists": os.path.exists,
    "glob": lambda pattern: sorted(glob.glob(os.fspath(pattern))),
    "isdir": os.path.isdir,
    "listdir": lambda path: sorted(os.listdir(path)),
    "makedirs": lambda path: os.makedirs(path, exist_ok=True),
    "remove": os.remove,
    "rename": lambda source, target, overwrite=False: os.replace(source, target),
    "rmtree": shutil.rmtree,
    "stat": os.stat,
    "walk": os.walk,
}


# data.builders.published: What builders share that prepare a data set from files as they were published: finding, checking and copying them.


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
    for number, ((name, _, fields), content) in enumerate(map_in_order(_read, files)):
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


# data.builders.nuswide: NUS-WIDE in the hashing papers' form: the images that have one of the 21 most frequent of its 81 concepts.
#
# Chua et al., NUS-WIDE: a real-world web image database from National University of Singapore, CIVR 2009.


FREQUENT = 21


class Nuswide(Published):
    """The builder."""

    CLASSES = FREQUENT
    HOMEPAGE = "https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html"

    def _generate_examples(self, root: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
        names, labels, concepts = read_nuswide(root)
        chosen = most_frequent(labels)
        self.info.metadata["classes"] = [concepts[number] for number in chosen]
        hot = labels[:, chosen]
        images = find(root, "Flickr", "images", "Images", "image")
        missing: list[Unreadable] = []
        listed = ((names[row], images / names[row], {"labels": hot[row]}) for row in np.flatnonzero(hot.any(axis=1)))
        count = 0
        for number, example in examples(listed, missing):
            count += 1
            yield number, example
        if not count:
            raise DataError(
                f"config.data.raw_dir: none of the {len(missing):,} images that are listed is in {images} (the first: "
                f"{missing[0].path}: {missing[0].reason}); unpack the images so that this path is right"
            )
        self.info.metadata["left_out"] = [[file.path, file.reason] for file in missing]


def excluded_images(builder: Nuswide) -> list[Unreadable]:
    """Returns the listed images that were missing or unreadable when the set was prepared."""
    return [Unreadable(*file) for file in builder.info.metadata.get("left_out", ())]


def read_nuswide(root: pathlib.Path) -> tuple[list[str], Bool[np.ndarray, "images concepts"], list[str]]:
    """Returns the images' relative paths, which concepts each has, and the concepts' names, as published.

    Raises:
      DataError: a file is missing, or they do not belong together.
    """
    listing = find(root, "ImageList/Imagelist.txt", "Imagelist.txt")
    names = [
        line.strip().replace("\\", "/") for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    folder = find(root, "Groundtruth/AllLabels", "AllLabels")
    files = sorted(folder.glob("Labels_*.txt"))
    concepts = [file.stem.removeprefix("Labels_") for file in files]
    if len(files) < FREQUENT:
        raise DataError(
            f"config.data.raw_dir: {folder} holds {len(files)} files Labels_*.txt, where 81 are published and "
            f"{FREQUENT} needed; unpack Groundtruth.zip again"
        )
    columns = [_column(file, len(names), listing) for file in files]
    return names, np.stack(columns, axis=1), concepts


def _column(file: pathlib.Path, count: int, listing: pathlib.Path) -> Bool[np.ndarray, " images"]:
    try:
        values = np.array(file.read_text(encoding="ascii").split(), np.int64)
    except ValueError as error:
        raise DataError(f"config.data.raw_dir: {file} holds something else than 0 and 1; unpack it again") from error
    if len(values) != count:
        raise DataError(
            f"config.data.raw_dir: {file} has {len(values):,} lines, but {listing} has {count:,}; unpack both again"
        )
    if not np.isin(values, (0, 1)).all():
        raise DataError(f"config.data.raw_dir: {file} holds something else than 0 and 1; unpack it again")
    return values.astype(bool)


def most_frequent(labels: Bool[np.ndarray, "images concepts"]) -> Int[np.ndarray, " chosen"]:
    """Returns the 21 concepts that most images have, in the concepts' order; of equals the first."""
    return np.sort(np.argsort(-labels.sum(axis=0), kind="stable")[:FREQUENT])


# data.builders.mscoco: MSCOCO in the hashing papers' form: training and validation images together, with the set of categories in each.
#
# Lin et al., Microsoft COCO: common objects in context, ECCV 2014, https://cocodataset.org.


CATEGORIES = 80
WHOLE, LABELLED = 123_287, 122_218
"""Images of both parts as they are published, and those of them in which an object is marked; of 2014 as of 2017."""


class Mscoco(Published):
    """The builder."""

    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=year, description=f"Images and instances of {year}.") for year in ("2014", "2017")
    ]
    CLASSES = CATEGORIES
    HOMEPAGE = "https://cocodataset.org"

    def _generate_examples(self, root: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
        year, listed, total = self.builder_config.name, [], 0
        for part in ("train", "val"):
            name = f"{part}{year}"
            path = find(root, f"annotations/instances_{name}.json", f"instances_{name}.json")
            images, labels, categories = read_mscoco(path)
            total += len(images)
            folder = find(root, name, f"images/{name}")
            listed += [
                (f"{name}/{file}", folder / file, {"labels": hot})
                for file, hot in zip(images, labels, strict=True)
                if hot.any()
            ]
        if total == WHOLE and len(listed) != LABELLED:
            raise DataError(
                f"config.data.raw_dir: {len(listed):,} of the {total:,} images in {root} have an object marked, where "
                f"{LABELLED:,} are published; download the annotations again"
            )
        self.info.metadata["classes"] = categories
        missing: list[Unreadable] = []
        yield from examples(listed, missing)
        if missing:
            raise DataError(
                f"config.data.raw_dir: {len(missing):,} of {len(listed):,} images are missing or unreadable (the "
                f"first: {missing[0].path}: {missing[0].reason}); COCO comes whole, so unpack its archives again"
            )


def read_mscoco(path: pathlib.Path) -> tuple[list[str], Bool[np.ndarray, "images categories"], list[str]]:
    """Returns the file names of an instances file by image id, which categories each image has, and their names.

    Raises:
      DataError: the file is not what is published.
    """
    try:
        content = json.loads(path.read_bytes())
        images = sorted((image["id"], image["file_name"]) for image in content["images"])
        categories = sorted((category["id"], category["name"]) for category in content["categories"])
        marks = [(mark["image_id"], mark["category_id"]) for mark in content["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"config.data.raw_dir: {path} is no file of COCO instances ({type(error).__name__}: {error}); unpack it "
            "again"
        ) from error
    if len(categories) != CATEGORIES:
        raise DataError(
            f"config.data.raw_dir: {path} has {len(categories)} categories, where {CATEGORIES} are published; unpack "
            "it again"
        )
    rows = {number: row for row, (number, _) in enumerate(images)}
    columns = {number: column for column, (number, _) in enumerate(categories)}
    labels = np.zeros((len(images), CATEGORIES), bool)
    for image, category in marks:
        if image not in rows or category not in columns:
            raise DataError(
                f"config.data.raw_dir: {path} marks category {category} in image {image}, which it does not list; "
                "download it again"
            )
        labels[rows[image], columns[category]] = True
    return [name for _, name in images], labels, [name for _, name in categories]

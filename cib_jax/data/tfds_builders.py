"""TFDS builders of NUS-WIDE and MSCOCO in the form of the hashing papers, and preparing without TensorFlow."""

import contextlib
import functools
import glob
import importlib.util
import io
import itertools
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
from cib_jax.data.dataset import Unreadable, config_error
from cib_jax.files import first_line, map_in_order, open_regular, short_reason

_error = functools.partial(config_error, "raw_dir")

Examples = Iterator[tuple[int, dict[str, Any]]]
"""TFDS examples with their keys."""


class PublishedBuilder(tfds.core.GeneratorBasedBuilder):
    """Base of the builders for published files, which are in `download_config.manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "See docs/data.md."
    CLASSES: ClassVar[int]  # number of classes
    HOMEPAGE: ClassVar[str]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "labels": tfds.features.Tensor(shape=(self.CLASSES,), dtype=np.bool_),
            "name": tfds.features.Text(),
            # Position in the published order, in which splits are drawn. TFDS shuffles examples, since keeping their
            # order would hold all of them in memory.
            "position": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            homepage=self.HOMEPAGE,
            # "classes": class names; "left_out": missing and unreadable images.
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        return {"train": self._generate_examples(pathlib.Path(dl_manager.manual_dir))}


def _find(root: pathlib.Path, *places: str) -> pathlib.Path:
    """Returns the first of `places`, relative paths of one thing in several layouts, that exists under `root`.

    Archives may be unpacked with or without a folder of their own, so the sub-folders of `root` are searched, too.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    for place, base in itertools.product(places, (root, *folders)):
        if (base / place).exists():
            return base / place
    remedy = (
        "download and unpack the files that docs/data.md lists, and give their folder with --config.data.raw_dir=DIR"
    )
    raise _error(f"{root} and its sub-folders hold no {' or '.join(places)}; {remedy}")


def _read_images(files: Iterable[tuple[str, pathlib.Path, dict[str, Any]]], left_out: list[Unreadable]) -> Examples:
    """Yields TFDS examples from (name, path, other fields) in order, with the content of each file as `image`.

    Images are decoded on all cores to check them; missing and unreadable ones are added to `left_out` instead.
    """
    for number, ((name, _, fields), content) in enumerate(map_in_order(_read_image, files)):
        if isinstance(content, str):
            left_out.append(Unreadable(name, content))
        else:
            yield number, {"image": content, "name": name, "position": number, **fields}


def _read_image(file: tuple[str, pathlib.Path, dict[str, Any]]) -> bytes | str:
    """Returns the content of an image file, or the reason why it is unreadable."""
    try:
        content = file[1].read_bytes()
        photos.decode(content, 32)  # at an eighth of their size, JPEGs are decoded fast, but still read to the end
    except OSError as error:
        return short_reason(error)
    except photos.BadPhotoError as error:
        return str(error)
    return content


# NUS-WIDE: images with at least one of the 21 most frequent of 81 concepts


FREQUENT = 21


class Nuswide(PublishedBuilder):
    """NUS-WIDE (Chua et al., A real-world web image database from National University of Singapore, CIVR 2009)."""

    CLASSES = FREQUENT
    HOMEPAGE = "https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html"

    def _generate_examples(self, root: pathlib.Path) -> Examples:
        names, labels, concepts = read_nuswide(root)
        chosen = most_frequent(labels)
        self.info.metadata["classes"] = [concepts[number] for number in chosen]
        hot = labels[:, chosen]
        images = _find(root, "Flickr", "images", "Images", "image")
        missing: list[Unreadable] = []
        listed = ((names[row], images / names[row], {"labels": hot[row]}) for row in np.flatnonzero(hot.any(axis=1)))
        yield from _read_images(listed, missing)
        if len(missing) == hot.any(axis=1).sum():
            problem = f"none of the {len(missing):,} listed images is in {images} (the first: {missing[0]})"
            raise _error(f"{problem}; unpack the images so that this path is right")
        self.info.metadata["left_out"] = list(map(list, missing))


def read_nuswide(root: pathlib.Path) -> tuple[list[str], Bool[np.ndarray, "images concepts"], list[str]]:
    """Returns the relative paths of the images, their concepts, and the names of the concepts, as published."""
    listing = _find(root, "ImageList/Imagelist.txt", "Imagelist.txt")
    lines = listing.read_text(encoding="utf-8").splitlines()
    names = [line.strip().replace("\\", "/") for line in lines if line.strip()]
    folder = _find(root, "Groundtruth/AllLabels", "AllLabels")
    files = sorted(folder.glob("Labels_*.txt"))
    if len(files) < FREQUENT:
        problem = f"{folder} must hold the 81 published files Labels_*.txt, got {len(files)}"
        raise _error(f"{problem}; unpack Groundtruth.zip again")
    labels = np.zeros((len(names), len(files)), bool)
    for column, file in enumerate(files):
        values = file.read_text(encoding="ascii", errors="replace").split()
        if len(values) != len(names):
            raise _error(f"{file} has {len(values):,} lines, but {listing} has {len(names):,}; unpack both again")
        if not set(values) <= {"0", "1"}:
            raise _error(f"{file} must hold only 0 and 1; unpack it again")
        labels[:, column] = np.array(values) == "1"
    return names, labels, [file.stem.removeprefix("Labels_") for file in files]


def most_frequent(labels: Bool[np.ndarray, "images concepts"]) -> Int[np.ndarray, " chosen"]:
    """Returns the 21 most frequent concepts, in the order of the concepts; of equally frequent ones the first."""
    return np.sort(np.argsort(-labels.sum(axis=0), kind="stable")[:FREQUENT])


# MSCOCO: training and validation images together, with the set of categories in each


CATEGORIES = 80
WHOLE, LABELED = 123_287, 122_218
"""Published images of both parts, and those with at least one object; 2014 and 2017 hold the same images."""


class Mscoco(PublishedBuilder):
    """MSCOCO (Lin et al., Common objects in context, ECCV 2014)."""

    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=year, description=f"Images and instances of {year}.") for year in ("2014", "2017")
    ]
    CLASSES = CATEGORIES
    HOMEPAGE = "https://cocodataset.org"

    def _generate_examples(self, root: pathlib.Path) -> Examples:
        year, listed, total = self.builder_config.name, [], 0
        for part in ("train", "val"):
            name = f"{part}{year}"
            path = _find(root, f"annotations/instances_{name}.json", f"instances_{name}.json")
            images, labels, categories = read_mscoco(path)
            total += len(images)
            folder = _find(root, name, f"images/{name}")
            files = (
                (f"{name}/{file}", folder / file, {"labels": hot}) for file, hot in zip(images, labels, strict=True)
            )
            listed += [file for file in files if file[2]["labels"].any()]
        if total == WHOLE and len(listed) != LABELED:
            problem = f"{LABELED:,} of the {total:,} images in {root} must have an object, as published"
            raise _error(f"{problem}, got {len(listed):,}; download the annotations again")
        self.info.metadata["classes"] = categories
        missing: list[Unreadable] = []
        yield from _read_images(listed, missing)
        if missing:
            problem = f"{len(missing):,} of {len(listed):,} images are missing or unreadable (the first: {missing[0]})"
            raise _error(f"{problem}; COCO is published completely, so unpack its archives again")


def read_mscoco(path: pathlib.Path) -> tuple[list[str], Bool[np.ndarray, "images categories"], list[str]]:
    """Returns the file names of an instances file by image id, their categories, and the names of the categories."""
    try:
        with open_regular(path) as file:  # a pipe would wait for its writer
            content = json.load(file)
        images = sorted((image["id"], image["file_name"]) for image in content["images"])
        categories = sorted((category["id"], category["name"]) for category in content["categories"])
        marks = [(mark["image_id"], mark["category_id"]) for mark in content["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise _error(f"{path} must be a file of COCO instances ({reason}); unpack it again") from error
    if len(categories) != CATEGORIES:
        raise _error(f"{path} must have {CATEGORIES} categories, got {len(categories)}; unpack it again")
    rows = {number: row for row, (number, _) in enumerate(images)}
    columns = {number: column for column, (number, _) in enumerate(categories)}
    labels = np.zeros((len(images), CATEGORIES), bool)
    for image, category in marks:
        if image not in rows or category not in columns:
            problem = f"{path} marks category {category} in image {image}, which it does not list"
            raise _error(f"{problem}; download it again")
        labels[rows[image], columns[category]] = True
    return [name for _, name in images], labels, [name for _, name in categories]


# Preparing without TensorFlow


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Gives TFDS, during the block, a stand-in for the parts of TensorFlow that unpack archives and read files.

    Most builders use nothing else; one that does gets an AttributeError with the name. Does nothing if TensorFlow is
    installed. This patches two private members of TFDS, last checked with version 4.9.10.
    """
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    try:
        from tensorflow_datasets.core.features.image_feature import _ImageEncoder
        from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as lazy_module

        original = _ImageEncoder._encode_image
    except (ImportError, AttributeError) as error:
        problem = f"preparing data sets without TensorFlow needs tensorflow-datasets 4.9.10, got {tfds.__version__}"
        remedy = "install that version, or TensorFlow"
        raise config_error("name", f"{problem} ({first_line(error)}); {remedy}") from error
    # TFDS imports TensorFlow lazily, through this one object, which stores the module under this name. A module in
    # sys.modules would be visible to every other library, too.
    vars(lazy_module)["_module"] = _stand_in()
    _ImageEncoder._encode_image = _encode_image
    try:
        yield
    finally:
        del vars(lazy_module)["_module"]
        _ImageEncoder._encode_image = original


def _encode_image(encoder: Any, image: Shaped[np.ndarray, "height width channels"]) -> bytes:
    """Encodes an image with Pillow, in the format of the TFDS feature."""
    file = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, encoder.encoding_format.upper())
    return file.getvalue()


class _StandIn(types.ModuleType):
    def __init__(self, name: str, **members: Any):
        super().__init__(name)
        vars(self).update(members)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"TensorFlow itself is needed for {self.__name__}.{name}")


def _stand_in() -> types.ModuleType:
    files = _StandIn(
        "tensorflow.io.gfile",
        GFile=lambda path, mode="r": epath.Path(path).open(mode),
        Open=lambda path, mode="r": epath.Path(path).open(mode),
        copy=lambda source, target, overwrite=False: epath.Path(source).copy(target, overwrite=overwrite),
        glob=lambda pattern: sorted(glob.glob(os.fspath(pattern))),
        listdir=lambda path: sorted(os.listdir(path)),
        makedirs=lambda path: os.makedirs(path, exist_ok=True),
        rename=lambda source, target, overwrite=False: os.replace(source, target),
        rmtree=shutil.rmtree,
        **{name: getattr(os, name) for name in ("remove", "stat", "walk")},
        **{name: getattr(os.path, name) for name in ("exists", "isdir")},
    )
    texts = _StandIn(
        "tensorflow.compat",
        as_text=lambda text: text.decode() if isinstance(text, bytes) else text,
        as_str=lambda text: text.decode() if isinstance(text, bytes) else text,
        as_bytes=lambda text: text.encode() if isinstance(text, str) else text,
    )
    return _StandIn(
        "tensorflow",
        io=_StandIn("tensorflow.io", gfile=files),
        compat=texts,
        errors=_StandIn("tensorflow.errors", UnimplementedError=NotImplementedError, NotFoundError=OSError),
    )

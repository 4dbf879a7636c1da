"""MSCOCO in the hashing papers' form: training and validation images together, with the set of categories in each.

Lin et al., Microsoft COCO: common objects in context, ECCV 2014, https://cocodataset.org.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool

from cib_jax.data.builders import published
from cib_jax.data.images import DataError, Unreadable

CATEGORIES = 80
WHOLE, LABELLED = 123_287, 122_218
"""Images of both parts as they are published, and those of them in which an object is marked; of 2014 as of 2017."""


class Mscoco(published.Published):
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
            path = published.find(root, f"annotations/instances_{name}.json", f"instances_{name}.json")
            images, labels, categories = read(path)
            total += len(images)
            folder = published.find(root, name, f"images/{name}")
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
        yield from published.examples(listed, missing)
        if missing:
            raise DataError(
                f"config.data.raw_dir: {len(missing):,} of {len(listed):,} images are missing or unreadable (the "
                f"first: {missing[0].path}: {missing[0].reason}); COCO comes whole, so unpack its archives again"
            )


def read(path: pathlib.Path) -> tuple[list[str], Bool[np.ndarray, "images categories"], list[str]]:
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

"""NUS-WIDE in the hashing papers' form: the images that have one of the 21 most frequent of its 81 concepts.

Chua et al., NUS-WIDE: a real-world web image database from National University of Singapore, CIVR 2009.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from cib_jax.data.builders import published
from cib_jax.data.images import DataError, Unreadable

FREQUENT = 21


class Nuswide(published.Published):
    """The builder."""

    CLASSES = FREQUENT
    HOMEPAGE = "https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html"

    def _generate_examples(self, root: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
        names, labels, concepts = read(root)
        chosen = most_frequent(labels)
        self.info.metadata["classes"] = [concepts[number] for number in chosen]
        hot = labels[:, chosen]
        images = published.find(root, "Flickr", "images", "Images", "image")
        missing: list[Unreadable] = []
        listed = ((names[row], images / names[row], {"labels": hot[row]}) for row in np.flatnonzero(hot.any(axis=1)))
        count = 0
        for number, example in published.examples(listed, missing):
            count += 1
            yield number, example
        if not count:
            raise DataError(
                f"config.data.raw_dir: none of the {len(missing):,} images that are listed is in {images} (the first: "
                f"{missing[0].path}: {missing[0].reason}); unpack the images so that this path is right"
            )
        self.info.metadata["left_out"] = [[file.path, file.reason] for file in missing]


def left_out(builder: Nuswide) -> list[Unreadable]:
    """Returns the listed images that were missing or unreadable when the set was prepared."""
    return [Unreadable(*file) for file in builder.info.metadata.get("left_out", ())]


def read(root: pathlib.Path) -> tuple[list[str], Bool[np.ndarray, "images concepts"], list[str]]:
    """Returns the images' relative paths, which concepts each has, and the concepts' names, as published.

    Raises:
      DataError: a file is missing, or they do not belong together.
    """
    listing = published.find(root, "ImageList/Imagelist.txt", "Imagelist.txt")
    names = [
        line.strip().replace("\\", "/") for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    folder = published.find(root, "Groundtruth/AllLabels", "AllLabels")
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

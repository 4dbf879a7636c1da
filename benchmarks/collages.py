"""Collages of photos: pictures with several labels, where NUS-WIDE and COCO cannot be had.

`python -m benchmarks.collages PHOTOS COLLAGES` draws two to four photos of a folder with a subfolder for each class,
composes them on one canvas, halves or quarters in a random arrangement, and gives each collage the classes of its
parts. It writes JPEGs and `collages.csv`, for `--config.data.name=list`; the same flags write the same files. The
photos of queries are in no collage of the database. Collages are no photos: their parts have straight borders, one
scale and no common scene, so that figures compare methods, not with published tables.
"""

import csv
import itertools
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.Image import Image

from benchmarks import measuring

SIDE = 256  # of a canvas, in pixels
LIST = "collages.csv"

# Left, top, width and height of the parts, in halves of the side.
LAYOUTS = {
    2: ((0, 0, 1, 2), (1, 0, 1, 2)),
    3: ((0, 0, 1, 2), (1, 0, 1, 1), (1, 1, 1, 1)),
    4: ((0, 0, 1, 1), (0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 1, 1)),
}


class Part(NamedTuple):
    """A photo and its place on the canvas in pixels."""

    photo: pathlib.Path
    left: int
    top: int
    width: int
    height: int


class Collage(NamedTuple):
    """Two to four photos on one canvas, and the split that the canvas belongs to: "train" or "query"."""

    name: str
    split: str
    parts: tuple[Part, ...]

    @property
    def labels(self) -> list[str]:
        """Classes of the parts, each once."""
        return sorted({part.photo.parent.name for part in self.parts})


def draw(folder: pathlib.Path, database: int, queries: int, seed: int) -> list[Collage]:
    """Returns the collages of the database, then the queries, each split from photos of its own.

    Photos are divided in the proportion of the collages, so that those of both splits are shown about equally often.
    """
    generator = np.random.default_rng(seed)
    photos = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    order = generator.permutation(len(photos))
    first = round(len(photos) * database / (database + queries))
    splits = {"train": (order[:first], database), "query": (order[first:], queries)}
    fewest = min(len(own) for own, _ in splits.values())
    if fewest < max(LAYOUTS):
        raise ValueError(f"each split needs {max(LAYOUTS)} photos, got {fewest} of {len(photos)} in {folder}")
    return [
        Collage(f"{split}/{number:05}.jpg", split, arrange([photos[index] for index in chosen], generator))
        for split, (own, count) in splits.items()
        for number in range(count)
        for chosen in [generator.choice(own, generator.integers(min(LAYOUTS), max(LAYOUTS) + 1), replace=False)]
    ]


def arrange(photos: list[pathlib.Path], generator: np.random.Generator) -> tuple[Part, ...]:
    """Returns the parts of a collage of so many photos, in their layout, mirrored or transposed at random."""
    mirrored, transposed = generator.random(2) < 0.5
    boxes = np.array(LAYOUTS[len(photos)])
    if mirrored:
        boxes[:, 0] = 2 - boxes[:, 0] - boxes[:, 2]
    if transposed:
        boxes = boxes[:, [1, 0, 3, 2]]
    return tuple(Part(photo, *box) for photo, box in zip(photos, (boxes * SIDE // 2).tolist(), strict=True))


def compose(collage: Collage) -> Image:
    """Returns the canvas, each photo cut to the shape of its place, around its center."""
    canvas = PIL.Image.new("RGB", (SIDE, SIDE))
    for photo, left, top, width, height in collage.parts:
        with PIL.Image.open(photo) as opened:
            upright = PIL.ImageOps.exif_transpose(opened).convert("RGB")
        canvas.paste(PIL.ImageOps.fit(upright, (width, height), PIL.Image.Resampling.BICUBIC), (left, top))
    return canvas


def write(folder: pathlib.Path, collages: list[Collage]) -> None:
    """Writes the JPEGs of collages, and the list of their labels and splits."""
    for collage in collages:
        path = folder / collage.name
        path.parent.mkdir(parents=True, exist_ok=True)
        compose(collage).save(path, quality=90)
    with (folder / LIST).open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "labels", "split"))
        rows.writerows((collage.name, "|".join(collage.labels), collage.split) for collage in collages)


def main() -> None:
    """Composes and writes the collages that the flags describe, and prints how many labels they have."""
    parser = measuring.parser(__doc__ or "")
    parser.add_argument("photos", type=pathlib.Path, help="folder of photos, with a subfolder for each class")
    parser.add_argument("folder", type=pathlib.Path, help="folder that is written")
    parser.add_argument("--database", type=int, default=4000, help="collages that train and are searched")
    parser.add_argument("--queries", type=int, default=500, help="collages that are queries")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    try:
        collages = draw(flags.photos, flags.database, flags.queries, flags.seed)
    except ValueError as error:
        sys.exit(str(error))
    write(flags.folder, collages)
    classes = set(itertools.chain.from_iterable(collage.labels for collage in collages))
    mean = np.mean([len(collage.labels) for collage in collages])
    print(f"{len(collages):,} collages of {len(classes)} classes, {mean:.2f} labels each, in {flags.folder / LIST}")


if __name__ == "__main__":
    main()

"""Miniature copies of NUS-WIDE and MSCOCO in the layouts of their published archives, with generated photos."""

import json
import pathlib

import numpy as np

from tests.data import pictures

# 81 names; the published ones are in ConceptsList/Concepts81.txt.
CONCEPTS = [f"concept{number:02}" for number in range(81)]


def nuswide(root: pathlib.Path, images: int, *, seed: int = 0):
    """Writes the image list, the label files and the photos; returns the names and the labels [images, 81].

    Each photo has one of 24 frequent concepts, which determines its color, sometimes a second one, or no concept.
    """
    generator = np.random.default_rng(seed)
    labels = np.zeros((images, 81), bool)
    # Spread over the alphabet, so that the most frequent must be counted; the last three are rarer.
    frequent = np.arange(24) * 3 + 5
    names = []
    for row in range(images):
        main = row % 24 if row % 24 < 21 or row < images // 2 else row % 21
        if row % 10 != 9:
            labels[row, frequent[main]] = True
            if row % 4 == 0:
                labels[row, frequent[(main + 1) % 21]] = True
        names.append(f"{'actor' if row % 2 else 'zoo'}/{row:04}_{generator.integers(10**9)}.jpg")
        pictures.write(root / "Flickr" / names[-1], pictures.colored(main, 24))
    (root / "ImageList").mkdir()
    (root / "ImageList" / "Imagelist.txt").write_text("".join(name.replace("/", "\\") + "\r\n" for name in names))
    (root / "ConceptsList").mkdir()
    (root / "ConceptsList" / "Concepts81.txt").write_text("\n".join(CONCEPTS) + "\n")
    folder = root / "Groundtruth" / "AllLabels"
    folder.mkdir(parents=True)
    for concept, column in zip(CONCEPTS, labels.T, strict=True):
        (folder / f"Labels_{concept}.txt").write_text("".join(f"{int(value)}\n" for value in column))
    return names, labels


# As published: 80 of the numbers from 1 to 90.
CATEGORY_IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def coco(root: pathlib.Path, images: int, *, year: str = "2014", classes: int = 6):
    """Writes annotations and photos of both parts; returns {name: set of columns}, unlabeled images with none."""
    labels = {}
    (root / "annotations").mkdir(parents=True)
    for part, count in (("train", images - images // 3), ("val", images // 3)):
        entries, marks = [], []
        for number in range(count):
            identity = 9 + 7 * number + (part == "val")
            name = f"COCO_{part}2014_{identity:012}.jpg" if year == "2014" else f"{identity:012}.jpg"
            columns = {number % classes, (number * 5 + 1) % classes} if number % 8 != 7 else set()
            image = pictures.colored(number % classes, classes)
            pictures.write(root / f"{part}{year}" / name, image)
            entries.append({"id": identity, "file_name": name, "height": image.height, "width": image.width})
            for column in columns:
                for _ in range(2):  # two objects of a kind
                    mark = {"image_id": identity, "category_id": CATEGORY_IDS[column], "segmentation": [[1, 2, 3, 4]]}
                    marks.append({"id": len(marks), "bbox": [0, 0, 1, 1], "area": 1.0, "iscrowd": 0, **mark})
            labels[f"{part}{year}/{name}"] = columns
        content = {
            "info": {},
            "images": entries[::-1],  # in no order, as published
            "annotations": marks,
            "categories": [{"id": number, "name": f"thing{number}", "supercategory": ""} for number in CATEGORY_IDS],
        }
        (root / "annotations" / f"instances_{part}{year}.json").write_text(json.dumps(content))
    return labels

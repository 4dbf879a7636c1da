"""What a run's codes find, as a picture: some queries, drawn at random, with their nearest images."""

import io
import pathlib

import numpy as np
from jaxtyping import UInt8

from cib_jax import contact_sheet
from cib_jax.contact_sheet import Tile
from cib_jax.data.images import ImageSet, resized
from cib_jax.jobs import workdir as workdir_lib
from cib_jax.jobs.setting import Setting
from cib_jax.retrieval import ranking

QUERIES, NEAREST = 8, 10


def draw(
    setting: Setting, query: UInt8[np.ndarray, "queries bytes"], database: UInt8[np.ndarray, "database bytes"]
) -> pathlib.Path | None:
    """Writes neighbours.png in the run's folder and returns its path; None where the data are no images.

    The queries are drawn from `data.seed`. With labels, what shares none with its query is framed as a miss.
    """
    splits = setting.splits
    if np.ndim(splits.query.images[0]) != 3:
        return None
    some = np.random.default_rng((setting.config.data.seed, 4)).permutation(len(query))[:QUERIES]
    found = ranking.rank(query[some], database, min(NEAREST, len(database)))
    rows = []
    for index, nearest in zip(some.tolist(), found, strict=True):
        distances = np.bitwise_count(query[index] ^ database[nearest]).sum(axis=1)
        tiles = [
            Tile(
                _image(splits.database, place),
                "1 bit" if distance == 1 else f"{distance} bits",
                _relevant(splits.query, index, splits.database, place),
            )
            for place, distance in zip(nearest.tolist(), distances.tolist(), strict=True)
        ]
        rows.append((Tile(_image(splits.query, index), "query"), tiles))
    known = splits.query.labels is not None
    title = f"{len(rows)} random queries and their nearest by Hamming distance, of {8 * query.shape[1]} bits" + (
        "; blue: shares a label, orange with a notch: does not" if known else ""
    )
    file = io.BytesIO()
    contact_sheet.draw(title, rows).save(file, "PNG")
    path = setting.workdir / "neighbours.png"
    workdir_lib.write_bytes(path, file.getvalue())
    return path


def _image(images: ImageSet, index: int) -> UInt8[np.ndarray, "height width 3"]:
    image = images.images[index]
    return image if max(image.shape[:2]) <= contact_sheet.SIDE else resized(images.images, index, contact_sheet.SIDE)


def _relevant(query: ImageSet, index: int, database: ImageSet, place: int) -> bool | None:
    if query.labels is None or database.labels is None:
        return None
    mine, theirs = query.labels[index], database.labels[place]
    return bool((mine & theirs).any()) if query.labels.ndim == 2 else bool(mine == theirs)

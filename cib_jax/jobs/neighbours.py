"""What a run's codes find, as a picture: queries with the images nearest to them."""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from cib_jax.data.images import ImageSet, resized
from cib_jax.jobs.setting import Setting
from cib_jax.report import contact_sheet
from cib_jax.report.contact_sheet import Tile
from cib_jax.retrieval import ranking

NEAREST = 10


def draw(
    setting: Setting,
    query: UInt8[np.ndarray, "queries bytes"],
    database: UInt8[np.ndarray, "database bytes"],
    some: Sequence[int],
    title: str,
    captions: Sequence[str] = (),
) -> bytes:
    """Returns a PNG of the queries `some` with their ten nearest images.

    With labels, what shares none with its query is framed as a miss.

    Args:
      setting: of the run; its data are images.
      query: packed codes of all queries.
      database: packed codes of what is searched.
      some: which queries to show.
      title: of the picture.
      captions: a few words under each query.
    """
    splits = setting.splits
    found = ranking.rank(query[list(some)], database, min(NEAREST, len(database)))
    rows = []
    for number, (index, nearest) in enumerate(zip(some, found, strict=True)):
        distances = np.bitwise_count(query[index] ^ database[nearest]).sum(axis=1)
        tiles = [
            Tile(
                _image(splits.database, place),
                "1 bit" if distance == 1 else f"{distance} bits",
                _relevant(splits.query, index, splits.database, place),
            )
            for place, distance in zip(nearest.tolist(), distances.tolist(), strict=True)
        ]
        rows.append((Tile(_image(splits.query, index), captions[number] if captions else "query"), tiles))
    known = splits.query.labels is not None
    legend = "; blue: shares a label, orange with a notch: does not" if known else ""
    file = io.BytesIO()
    contact_sheet.draw(title + legend, rows).save(file, "PNG")
    return file.getvalue()


def _image(images: ImageSet, index: int) -> UInt8[np.ndarray, "height width 3"]:
    image = images.images[index]
    return image if max(image.shape[:2]) <= contact_sheet.SIDE else resized(images.images, index, contact_sheet.SIDE)


def _relevant(query: ImageSet, index: int, database: ImageSet, place: int) -> bool | None:
    if query.labels is None or database.labels is None:
        return None
    mine, theirs = query.labels[index], database.labels[place]
    return bool((mine & theirs).any()) if query.labels.ndim == 2 else bool(mine == theirs)

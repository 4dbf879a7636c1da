"""Whether an encoder, fields and photos that a user names agree with those that an index was made with."""

import os
import pathlib
from typing import Any

import ml_collections
import numpy as np
import rich.console
from jaxtyping import Int64

from cib_jax.collection import collection
from cib_jax.collection.lance import TableError
from cib_jax.collection.photo_rows import key_of
from cib_jax.collection.photo_table import PhotoTable
from cib_jax.config.field_values import ConfigError
from cib_jax.data.items import Photos
from cib_jax.hashing.hasher import Hasher
from cib_jax.jobs.presenting import say

OF_ENCODING = ("encode_batch", "data.max_megapixels", "devices", "backbone_weights")
"""Fields that can be set where the encoder is trained already."""


def given(workdir: pathlib.Path | str, config: ml_collections.ConfigDict, overrides: dict[str, Any]) -> Hasher:
    """Returns the encoder that a user gives.

    Raises:
      TableError: it takes features.
      ConfigError: a field would shape another one.
      CheckpointError, SavedError, WeightsError: there is none in `workdir`.
    """
    workdir = pathlib.Path(workdir).expanduser()
    check_overrides(overrides, f"the encoder in {workdir}")
    # Of one saved without its run, all weights lie beside it.
    hasher = Hasher.load(workdir, backbone_weights=config.backbone_weights)
    if hasher.encoder.backbone.takes != "images":
        raise TableError(
            f"--workdir: {workdir} was trained on features, and an index holds photos; give a run on images, or search "
            "features by cib_jax.Index"
        )
    return hasher


def check_overrides(overrides: dict[str, Any], whose: str, learnt: dict[str, Any] | None = None) -> None:
    """Refuses fields that would shape another encoder; the command that had it learnt may be given again.

    Raises:
      ConfigError: there is one.
    """
    for name, value in overrides.items():
        if learnt and name not in OF_ENCODING and learnt.get(name, value) != value:
            raise ConfigError(
                f"config.{name}: {whose} was learnt with {learnt[name]!r}, not {value!r}; leave it out to go on with "
                "that, or give another --index"
            )
        if not learnt and name not in OF_ENCODING:
            raise ConfigError(
                f"config.{name}: {whose} is trained already; leave it out (what can be set: {', '.join(OF_ENCODING)})"
            )


def check_same(table: PhotoTable, hasher: Hasher, workdir: pathlib.Path | str | None) -> None:
    """Refuses an encoder whose codes cannot be compared with those of the index.

    Raises:
      TableError: it is such a one.
    """
    ours, theirs = collection.known_by(hasher), table.about.encoder
    other = [f"{name}: {theirs.get(name)} → {value}" for name, value in ours.items() if theirs.get(name) != value]
    if other:
        raise TableError(
            f"--workdir: {workdir} holds another encoder than the one that made {table.uri} ({'; '.join(other)}), so "
            "codes cannot be compared; leave it out to go on with the index's own, or give another --index"
        )


def check_images(
    table: PhotoTable, found: Photos, known: Int64[np.ndarray, " known"], console: rich.console.Console
) -> None:
    """Takes up photos that were moved; refuses others.

    Args:
      table: the index.
      found: the photos that are to be indexed.
      known: keys of those that are.
      console: where to report.

    Raises:
      TableError: they are others.
    """
    before = table.about.images
    if before == found.place:
        return
    if os.path.exists(before):
        raise TableError(
            f"--images: {table.uri} is the index of {before}, which is still there; leave --images out to go on with "
            f"it, or give another --index for {found.place}"
        )
    # Its disk may only be away: taken for moved, all that is known of its photos would be lost.
    if len(known) and not np.isin(known, [key_of(name) for name in found.names]).any():
        raise TableError(
            f"--images: {table.uri} is the index of {before}, and none of its photos is in {found.place}; give the "
            "place where they lie now, or another --index"
        )
    say(console, f"The photos of {before} are taken to lie in {found.place} now, under the same names")
    table.move(found.place)

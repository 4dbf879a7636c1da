"""The scores of a trained run that need no labels."""

import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from jaxtyping import Array, UInt8

from cib_jax import binary
from cib_jax.config import from_config
from cib_jax.data.images import ImageSet
from cib_jax.devices import encoding
from cib_jax.encoder import Params
from cib_jax.hashing.restoring import read_config, read_standard, restore_best
from cib_jax.jobs import features, setting
from cib_jax.jobs.setting import Setting
from cib_jax.retrieval import health, label_free


def label_free_scores(workdir: pathlib.Path, images: int) -> dict[str, float]:
    """Returns every score of `label_free.SCORES` of a trained run, on `images` random images of its database.

    Raises:
      CheckpointError, DataError, WeightsError: as in evaluation.
    """
    config = read_config(workdir)
    quiet = rich.console.Console(quiet=True)
    run = setting.prepare(config, workdir, quiet, trained=True, standard=read_standard(workdir, config))
    params, _, _ = restore_best(workdir, run.initial, config)
    database = run.splits.database
    draws = np.random.default_rng((config.data.seed, 6))
    some = database.take(np.sort(draws.permutation(len(database))[:images]))
    packed = features.codes(run, params, some, "Encoding")
    before = np.concatenate(list(features.before_hashing(run, some, "Features")))
    codes_health = health.code_health(packed)
    last = json.loads((workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {
        "separation": label_free.separation(packed),
        "neighbour_agreement": label_free.neighbour_agreement(
            packed, before, neighbours=min(label_free.NEIGHBOURS, len(packed) - 2)
        ),
        "view_agreement": label_free.view_agreement(*_views(run, params, some)),
        "entropy": codes_health["entropy"],
        "decorrelation": 1 - codes_health["mean_abs_correlation"],
        "contrast": -last["contrast"],
    }


def _views(run: Setting, params: Params, images: ImageSet) -> Iterator[UInt8[np.ndarray, "n bytes"]]:
    """Yields the codes of a first and of a second augmented view of every image."""
    if run.features_stay:
        for of_view in features.of_views(run, images, 2, "Views"):
            yield features.codes_of_features(run, params, np.asarray(of_view, np.float32))
        return
    key = from_config.key(run.config, "view bank")
    size = min(run.config.encode_batch, len(images))

    @jax.jit
    def packed(params: Params, frozen: Params, batch: Array, first: Array) -> UInt8[Array, "batch 2 bytes"]:
        # Both views by one key: of stored ones, two different.
        views = run.encoder.two_views(jax.random.fold_in(key, first), batch, family=run.config.augment)
        return jnp.stack([binary.pack_bits(run.encoder.logits(params, frozen, view)) for view in views], axis=1)

    # Parameters are arguments, so that the next trial finds the program compiled.
    rows = encoding.map_batches(
        lambda batch, first: packed(params, run.frozen, jnp.asarray(batch), first), run.batches(images), size=size
    )
    both = np.concatenate([np.asarray(row) for row in rows])
    yield from (both[:, 0], both[:, 1])

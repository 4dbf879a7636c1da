"""Validation while training: the MAP of a held-out part, under parameters that keep changing."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from cib_jax import encoding
from cib_jax.data.sources import ImageSet
from cib_jax.encoder import Params
from cib_jax.hasher import Hasher, packed_of_features, plain_features
from cib_jax.jobs.setting import Setting
from cib_jax.retrieval import metrics
from cib_jax.training.state import TrainState

HEAD_BATCH = 1024
"""Features per batch of the head, which alone is computed anew."""


def validator(setting: Setting) -> Callable[[TrainState], float] | None:
    """Returns a function of a state that gives its validation MAP@k, or None where nothing is held out.

    A frozen backbone's features are computed at the first validation and kept on the host: the head alone changes.
    """
    if setting.splits.validation is None:
        return None
    query, database = setting.splits.validation
    kept: dict[str, Float[np.ndarray, "n features"]] = {}

    def codes(params: Params, images: ImageSet, name: str) -> UInt8[np.ndarray, "n bytes"]:
        if not setting.frozen:
            return Hasher(setting.encoder, params, setting.frozen).encode_batches(setting.batches(images))
        if name not in kept:
            rows = encoding.map_batches(
                lambda batch, first: plain_features(setting.encoder, {}, setting.frozen, batch),
                setting.batches(images),
            )
            kept[name] = np.concatenate([np.asarray(row) for row in rows])
        features = kept[name]
        packed = [
            packed_of_features(setting.encoder, params, jnp.asarray(features[start : start + HEAD_BATCH]))
            for start in range(0, len(features), HEAD_BATCH)
        ]
        return np.concatenate([np.asarray(rows) for rows in packed])

    def validate(state: TrainState) -> float:
        return metrics.mean_average_precision(
            codes(state.params, query, "query"),
            codes(state.params, database, "database"),
            query.labels,
            database.labels,
            setting.config.k,
        )

    return validate

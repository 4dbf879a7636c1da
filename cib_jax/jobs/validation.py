"""Validation while training: the MAP of a held-out part, under parameters that keep changing."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from cib_jax.data.images import ImageSet
from cib_jax.devices import parallel
from cib_jax.encoder import Params
from cib_jax.jobs import features, over_processes
from cib_jax.jobs.setting import Setting
from cib_jax.retrieval import metrics
from cib_jax.training.state import TrainState


def validator(setting: Setting) -> Callable[[TrainState], float] | None:
    """Returns a function of a state that gives its validation MAP@k, or None where nothing is held out.

    A frozen backbone's features are computed at the first validation and kept on the host: the head alone changes.
    """
    if setting.splits.validation is None:
        return None
    query, database = setting.splits.validation
    if query.labels is None or database.labels is None:
        raise AssertionError("splits.draw lets nothing validate without labels")
    labels = query.labels, database.labels
    kept: dict[str, list[Float[np.ndarray, "part features"]]] = {}

    def codes(params: Params, images: ImageSet, name: str) -> UInt8[np.ndarray, "n bytes"]:
        if not setting.features_stay:
            return features.codes(setting, params, images, f"Validation, {name}")
        if name not in kept:
            kept[name] = list(features.plain(setting, images, f"Validation, {name}", shared=True))
        mine = [features.codes_of_features(setting, params, part) for part in kept[name]]
        return features.joined(setting, len(images), mine)

    def validate(state: TrainState) -> float:
        params = parallel.here(state.params)
        found, searched = codes(params, query, "query"), codes(params, database, "database")
        k = setting.protocol.k or len(database)

        def of_queries(mine: slice) -> float:
            return metrics.mean_average_precision(found[mine], searched, labels[0][mine], labels[1], k)

        return over_processes.mean(of_queries, len(found))

    return validate

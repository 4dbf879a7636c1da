"""One cell of a comparison that is not trained by this project's objectives: a baseline, fitted and measured."""

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.console
from jaxtyping import Array, Float, UInt8

from cib_jax import binary
from cib_jax.baselines import BASELINES, Encoder
from cib_jax.config import checking, from_config
from cib_jax.data.images import ImageSet
from cib_jax.errors import Refusal
from cib_jax.jobs import evaluate, features, setting
from cib_jax.jobs import workdir as workdir_lib
from cib_jax.jobs.setting import Setting


class BaselineError(Refusal):
    """A baseline cannot be fitted to these features; the message says why."""


def measure(
    config: ml_collections.ConfigDict, method: str, workdir: pathlib.Path, *, console: rich.console.Console
) -> dict[str, Any]:
    """Fits the baseline `method` on the training images' features, measures its codes, returns what results.json holds.

    Features are those that this config's own objectives would hash; see `features.before_hashing`.

    Raises:
      ConfigError, DataError, WeightsError, WorkdirError: as in training.
      BaselineError: the method gives no such codes of such features.
    """
    checking.check(config)
    chosen = BASELINES[method]
    with workdir_lib.claim(workdir, baseline=True):
        if (workdir / "results.json").exists():
            return workdir_lib.read_json(workdir / "results.json")
        run = setting.prepare(config, workdir, console)
        workdir_lib.write_json(workdir / workdir_lib.BASELINE, {"method": method, "source": chosen.source})
        workdir_lib.write_json(workdir / "config.json", config.to_dict())
        train = np.concatenate(list(features.before_hashing(run, run.splits.train, "Features, training")))
        begun = time.perf_counter()
        try:
            encoder = chosen.fit(train, config.bits, from_config.key(config, "baseline"))
        except ValueError as error:
            raise BaselineError(f"config.compare.methods: {method}: {error}") from None
        jax.block_until_ready(jax.tree.leaves(encoder))
        fit_seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        query = _codes(run, encoder, run.splits.query, "Encoding queries")
        database = _codes(run, encoder, run.splits.database, "Encoding database")
        seconds = {"train": fit_seconds, "encode": time.perf_counter() - begun}
        about = {"objective": method, "source": chosen.source}
        return evaluate.judge(run, query, database, about, seconds)


@jax.jit
def _packed(encoder: Encoder, rows: Float[Array, "batch features"]) -> UInt8[Array, "batch bytes"]:
    return binary.pack_bits(encoder(rows))


def _codes(run: Setting, encoder: Encoder, images: ImageSet, what: str) -> UInt8[np.ndarray, "n bytes"]:
    size = min(features.PART, len(images))
    packed = []
    for rows in features.before_hashing(run, images, what):
        whole = np.pad(rows, ((0, size - len(rows)), (0, 0)))  # one shape, compiled once
        packed.append(np.asarray(_packed(encoder, jnp.asarray(whole)))[: len(rows)])
    return np.concatenate(packed)

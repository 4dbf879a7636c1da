"""A small run, seconds long: digits, few images, a narrow head; and the figures that its codes give."""

import ml_collections
import numpy as np

from cib_jax.data import sources
from cib_jax.data.dataset import Source
from configs import digits
from tests.retrieval import reference

FLAGS = {
    "bits": 16,
    "backbone_dtype": "float32",  # the "auto" of a run is settled only when it begins
    "k": 100,
    "image_size": 8,
    "hidden": 32,
    "batch_size": 32,
    "epochs": 3,
    "data.train_per_class": 13,
    "encode_batch": 64,
    "cache.dir": "none",
    "report.write": False,
    "log.writers": "",
}

FEW_DIGITS = {"data__name": "few digits", "data__queries": 60}
"""Fields for the data set of the fixture `few_digits`, of 400 digits in all."""


def load_few_digits(directory: str) -> Source:
    """Returns the first of scikit-learn's digits: most of the time of a small run is that of encoding all of them."""
    whole = sources.DATA_SETS["digits"](directory)
    return Source(whole.train.take(np.arange(400)), None, whole.classes)


def config(**fields) -> ml_collections.ConfigDict:
    """Returns the config, with other fields by dotted name (`data__name` for `data.name`)."""
    made = digits.get_config()
    made.update_from_flattened_dict(FLAGS | {name.replace("__", "."): value for name, value in fields.items()})
    return made


def unchecked(**fields) -> ml_collections.ConfigDict:
    """Returns a config whose fields may be of any type, as in a user's own file."""
    made = config()
    for name, value in fields.items():
        *groups, last = name.split("__")
        group = made
        for inner in groups:
            group = group[inner]
        with group.ignore_type():
            group[last] = value
    return made


def flags(**fields) -> list[str]:
    """Returns the same as arguments of run.py."""
    named = FLAGS | {name.replace("__", "."): value for name, value in fields.items()}
    return [f"--config.{name}={value}" for name, value in named.items()]


def codes_of(workdir):
    """Returns what a run has written to codes/, by name."""
    return {path.stem: np.load(path) for path in (workdir / "codes").glob("*.npy")}


def reference_map(workdir, k):
    """Returns the MAP@k of a run's codes by a loop over the definition."""
    of = codes_of(workdir)
    data = [of[f"{side}_{kind}"] for kind in ("codes", "labels") for side in ("query", "database")]
    return reference.reference_map(data, k)

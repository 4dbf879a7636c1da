"""What the value of each field must be, how to say so, and which fields may change when a run is taken up again."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from cib_jax.backbones import registry
from cib_jax.backbones.fine_tuning import FineTune
from cib_jax.data import photos
from cib_jax.data.protocols import AS_NAMED, PROTOCOLS
from cib_jax.encoder import DTYPES
from cib_jax.errors import Refusal
from cib_jax.objective import OBJECTIVES
from cib_jax.retrieval.label_free import SCORES
from cib_jax.teacher import Teacher
from cib_jax.training import place, writers
from cib_jax.views import augment, feature_views


class ConfigError(Refusal):
    """A field of the configuration has a value that cannot work; the message names it and what to do."""


Check = tuple[Callable[[Any], bool], str]


def _one_of(*choices: str) -> Check:
    return lambda value: value in choices, f"is not one of {', '.join(choices)}"


def _at_least(least: float) -> Check:
    return lambda value: math.isfinite(value) and value >= least, f"must be {least} or more"


_POSITIVE: Check = (lambda value: math.isfinite(value) and value > 0, "must be greater than 0")

_SEED: Check = (lambda seed: 0 <= seed < 2**32, "must be from 0 to 4294967295")

_FRACTION: Check = (lambda part: 0 <= part <= 1, "must be from 0 to 1")

_COUNT: Check = (lambda count: count >= AS_NAMED, "must be 0 or more, or -1 for what the protocol says")

_NUMBERS: Check = (
    lambda text: bool(re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text)),
    "must be whole numbers with commas between them, such as '16, 32, 64'",
)

_ANYTHING: Check = (lambda value: True, "")

FIELDS: dict[str, tuple[type, Check]] = {
    "seed": (int, _SEED),
    "bits": (
        int,
        (
            lambda bits: 8 <= bits <= 4096 and bits % 8 == 0,
            "must be a multiple of 8 from 8 to 4096, since codes are stored in whole bytes; try 16, 32 or 64",
        ),
    ),
    "k": (int, _COUNT),
    "backbone": (
        str,
        (
            lambda name: name in registry.BACKBONES,
            f"is not one of {', '.join(registry.BACKBONES)}; docs/backbones.md tells of each",
        ),
    ),
    "backbone_weights": (str, _ANYTHING),
    "backbone_dtype": (str, _one_of(*DTYPES)),
    "frozen": (bool, _ANYTHING),
    "image_size": (
        int,
        (lambda size: 0 <= size <= 2048, "must be 0 (the backbone's usual size) or up to 2048 pixels"),
    ),
    "hidden": (int, _at_least(1)),
    "objective": (str, _one_of(*OBJECTIVES)),
    "binary": (str, _one_of("stochastic", "deterministic")),
    "temperature": (float, _POSITIVE),
    "beta": (float, _at_least(0)),
    "sharpness": (float, _POSITIVE),
    "teacher.bits": (int, (lambda bits: bits >= 8 and bits % 8 == 0, "must be a multiple of 8, such as 128")),
    "teacher.temperature": (float, _POSITIVE),
    "teacher.epochs": (int, _at_least(0)),
    "teacher.neighbours": (int, _at_least(1)),
    "teacher.dimensions": (int, _at_least(2)),
    "teacher.steps": (int, _at_least(1)),
    "augment": (str, _one_of(*augment.FAMILIES, *feature_views.FAMILIES)),
    "feature_noise": (float, _at_least(0)),
    "feature_dropout": (float, (lambda part: 0 <= part < 1, "must be from 0 to below 1")),
    "batch_size": (
        int,
        (lambda size: size >= 2, "must be 2 or more, since the contrast needs another image as a negative"),
    ),
    "micro_batch": (int, _at_least(0)),
    "devices": (int, _at_least(0)),
    "epochs": (int, _at_least(1)),
    "learning_rate": (float, _POSITIVE),
    "fine_tune.blocks": (int, _at_least(0)),
    "fine_tune.learning_rate": (float, _at_least(0)),
    "fine_tune.checkpointing": (bool, _ANYTHING),
    "fine_tune.lora_rank": (int, _at_least(0)),
    "fine_tune.lora_alpha": (float, _POSITIVE),
    "data.seed": (int, _SEED),
    "data.name": (str, (bool, "must name a data set, such as cifar10")),
    "data.dir": (str, _ANYTHING),
    "data.raw_dir": (str, _ANYTHING),
    "data.labelled": (bool, _ANYTHING),
    "data.protocol": (str, _one_of(*PROTOCOLS)),
    "data.queries": (int, _COUNT),
    "data.queries_per_class": (int, _COUNT),
    "data.train_images": (int, _COUNT),
    "data.train_per_class": (int, _COUNT),
    "data.validation": (str, _one_of("protocol", "none", "query_half", "database")),
    "data.validation_queries": (int, _at_least(1)),
    "data.image_feature": (str, _ANYTHING),
    "data.label_feature": (str, _ANYTHING),
    "data.database_split": (str, _ANYTHING),
    "data.query_split": (str, _ANYTHING),
    "data.stored_size": (
        int,
        (lambda size: 0 <= size <= 2048, "must be 0 (as the images are) or up to 2048 pixels"),
    ),
    "data.resident_mb": (int, _at_least(0)),
    "data.max_bad_fraction": (float, _FRACTION),
    "data.max_megapixels": (
        int,
        (
            lambda limit: 1 <= limit <= photos.MAX_MEGAPIXELS,
            f"must be from 1 to {photos.MAX_MEGAPIXELS}, Pillow's own limit against decompression bombs",
        ),
    ),
    "train.views": (
        int,
        (
            lambda views: views == 0 or views >= 2,
            "must be 0 (fresh views at every step) or at least 2, since a pair needs two views",
        ),
    ),
    "train.bank_mb": (int, _at_least(0)),
    "train.validate_every": (int, _at_least(1)),
    "train.patience": (int, _at_least(1)),
    "train.checkpoint_every": (int, _at_least(1)),
    "train.checkpoint_dir": (str, (place.fits, place.CHOICES)),
    "encode_batch": (int, _at_least(1)),
    "cache.dir": (str, _ANYTHING),
    "cache.mb": (int, _at_least(0)),
    "log.writers": (str, (writers.fits, writers.CHOICES)),
    "report.write": (bool, _ANYTHING),
    "report.embedded": (int, _at_least(0)),
    "compare.methods": (str, (lambda text: bool(text.strip()), "must name a method or more, such as 'itq, cibhash'")),
    "compare.bits": (str, _NUMBERS),
    "compare.seeds": (str, _NUMBERS),
    "compare.workers": (int, _at_least(0)),
    "tune.space": (str, (lambda text: bool(text.strip()), "must name a field or more, such as 'temperature=0.2|0.3'")),
    "tune.trials": (int, _at_least(1)),
    "tune.sampler": (str, _one_of("tpe", "random", "grid")),
    "tune.score": (str, _one_of("validation_map", *SCORES)),
    "tune.images": (int, _at_least(50)),
    "tune.workers": (int, _at_least(0)),
}
"""Every field's type, what its value must be, and how to say so."""

AROUND = frozenset(name for name in FIELDS if name.partition(".")[0] in ("compare", "tune"))
"""Fields of what is done with many runs, which make no difference to any one; a run's config may lack them."""

WHERE = frozenset({"data.dir", "data.raw_dir", "backbone_weights", "cache.dir"})
"""Fields that say where something lies on a machine, which may be elsewhere on the next."""

MAY_CHANGE = (
    AROUND
    | WHERE
    | frozenset(
        {
            "data.resident_mb",
            "data.max_bad_fraction",
            "train.bank_mb",
            "train.checkpoint_dir",
            "fine_tune.checkpointing",
            "micro_batch",
            "devices",
            "log.writers",
            "report.write",
            "report.embedded",
            "cache.mb",
        }
    )
)
"""Fields that say where and how data are held, not what is learnt: they may differ when a run is taken up again.

Weights are compared by their fingerprint, wherever they lie.
"""


ADDED: dict[str, Any] = {
    "micro_batch": 0,
    "devices": 0,
    "log.writers": "tensorboard",
    "report.write": True,
    "report.embedded": 2000,
    "train.checkpoint_dir": "",
    "sharpness": 6.0,
    **{f"teacher.{name}": value for name, value in dataclasses.asdict(Teacher()).items()},
    **{f"fine_tune.{name}": value for name, value in dataclasses.asdict(FineTune()).items()},
}
"""Fields that runs of earlier versions lack, with values under which those runs stay what they were."""

MEASURING = frozenset({"k", "encode_batch", "report.write", "report.embedded"})
"""Fields that a trained run may be measured with other values of."""


def parsed(name: str, text: str, where: str) -> Any:
    """Returns the value that `text` gives a field.

    Args:
      name: of the field, one of `FIELDS`.
      text: its value, as on a command line.
      where: what an error names.

    Raises:
      ConfigError: it is of another type, or out of range.
    """
    kind, (good, message) = FIELDS[name]
    try:
        value = {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{where}: {text!r} is no {kind.__name__}") from None
    if not good(value):
        raise ConfigError(f"{where}: {value!r} {message}")
    return value

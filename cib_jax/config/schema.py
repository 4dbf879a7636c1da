"""A configuration's fields by their dotted names; without JAX, so that a mistake in a flag is told at once."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from typing import Any

import ml_collections

from cib_jax.augment import augment, features
from cib_jax.data import photos
from cib_jax.data.splits import AS_NAMED, PROTOCOLS
from cib_jax.diffusion import Teacher
from cib_jax.errors import ConfigError
from cib_jax.losses import OBJECTIVES
from cib_jax.models import registry
from cib_jax.models.encoder import DTYPES
from cib_jax.models.finetune import FineTune
from cib_jax.models.finetune import validate_fine_tune as check_fine_tune
from cib_jax.retrieval.code_quality import SCORES
from cib_jax.training import checkpoint, metric_writers

# config.flat: A configuration's fields by their dotted names; without JAX, so that a mistake in a flag is told at once.


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the fields of a config by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f"{name}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat


# config.field_values: What the value of each field must be, how to say so, and which fields may change when a run is taken up again.


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
    "augment": (str, _one_of(*augment.FAMILIES, *features.FAMILIES)),
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
    "train.checkpoint_dir": (str, (checkpoint.is_valid_checkpoint_dir, checkpoint.CHOICES)),
    "encode_batch": (int, _at_least(1)),
    "cache.dir": (str, _ANYTHING),
    "cache.mb": (int, _at_least(0)),
    "log.writers": (str, (metric_writers.are_known_writers, metric_writers.CHOICES)),
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


# config.checking: Whether a configuration makes sense, told before anything heavy starts. configs/default.py documents the fields.


def fine_tune(config: ml_collections.ConfigDict) -> FineTune:
    """Returns how a backbone that is not frozen learns."""
    return FineTune(**config.fine_tune.to_dict())


def validate(config: ml_collections.ConfigDict, *, around: bool = False) -> None:
    """Checks every field by itself and those that depend on each other.

    Args:
      config: to be checked.
      around: whether the fields of `AROUND` must be there too.

    Raises:
      ConfigError: a value cannot work; one sentence names the field, the value and the choices.
    """
    flat = flatten(config)
    for name in flat.keys() - FIELDS.keys():
        near = difflib.get_close_matches(name, FIELDS, 1)
        hint = f"did you mean {near[0]}" if near else "see configs/default.py"
        raise ConfigError(f"config.{name}: there is no such field; {hint}")
    for name, (kind, (good, message)) in FIELDS.items():
        if name not in flat:
            if name in AROUND and not around:
                continue
            raise ConfigError(f"config.{name}: the field is missing; start from configs/default.py, which lists them")
        value = flat[name]
        if not (type(value) is kind or (kind is float and type(value) is int)):
            raise ConfigError(f"config.{name}: {value!r} is of type {type(value).__name__}, not {kind.__name__}")
        if not good(value):
            raise ConfigError(f"config.{name}: {value!r} {message}")
    if (config.data.name == "features") != (config.backbone == "none"):
        raise ConfigError(
            f"config.backbone: {config.backbone} does not go with config.data.name={config.data.name}; 'none' is for "
            "'features', which need no network, and for nothing else"
        )
    family = features.FAMILIES if config.backbone == "none" else augment.FAMILIES
    if config.augment not in family:
        raise ConfigError(
            f"config.augment: {config.augment} makes no views of "
            f"{'features' if config.backbone == 'none' else 'images'}; choose {' or '.join(family)}"
        )
    if config.backbone == "none":
        _check_without_network(config)
    else:
        _check_network(config)


def _check_without_network(config: ml_collections.ConfigDict) -> None:
    for name, neutral in (("image_size", 0), ("backbone_weights", ""), ("frozen", True)):
        if config[name] != neutral:
            raise ConfigError(f"config.{name}: features go through no network; leave it at {neutral!r}")
    of_images = ["train.views", "data.stored_size", "micro_batch"]
    for name in of_images + [f"fine_tune.{name}" for name in fine_tune(config).asked]:
        if value := flatten(config)[name]:
            raise ConfigError(f"config.{name}: it is for images; set it to {type(value)(0)} for features")


def _check_network(config: ml_collections.ConfigDict) -> None:
    backbone = registry.get(config.backbone)
    if config.image_size and config.image_size < backbone.smallest:
        raise ConfigError(
            f"config.image_size: {config.image_size} is too small for {backbone.name}, which takes {backbone.smallest} "
            "pixels or more"
        )
    if config.image_size % backbone.multiple:
        near = round(config.image_size / backbone.multiple) * backbone.multiple
        raise ConfigError(
            f"config.image_size: {config.image_size} is not a multiple of {backbone.multiple}, the side of the patches "
            f"that {backbone.name} cuts images into; try {near}"
        )
    if backbone.convert is None and config.backbone_weights:
        raise ConfigError(f"config.backbone_weights: {backbone.name} is trained from scratch; leave the field empty")
    if backbone.convert is None and config.frozen:
        raise ConfigError(
            f"config.frozen: {backbone.name} starts from random weights and would learn nothing; set it to False"
        )
    try:
        check_fine_tune(
            fine_tune(config), backbone, config.image_size, frozen=config.frozen, from_scratch=backbone.convert is None
        )
    except ConfigError as error:
        raise ConfigError(f"config.{error}") from None
    if config.train.views and not config.frozen:
        raise ConfigError(
            "config.train.views: features can be computed once only while the backbone is frozen; set it to 0, or "
            "config.frozen to True"
        )
    if config.train.views and config.micro_batch:
        raise ConfigError(
            "config.micro_batch: features of config.train.views go through no backbone while training, so parts save "
            "nothing; set it to 0"
        )


def differences(mine: dict[str, Any], theirs: dict[str, Any], ignored: frozenset[str] = MAY_CHANGE) -> list[str]:
    """Returns "field: theirs → mine" for each field in which two flat configs differ, but for the ignored ones."""
    mine, theirs = ADDED | mine, ADDED | theirs
    names = sorted((mine.keys() | theirs.keys()) - ignored)
    missing = object()
    return [
        f"{name}: {theirs.get(name, 'absent')!r} → {mine.get(name, 'absent')!r}"
        for name in names
        if mine.get(name, missing) != theirs.get(name, missing)
    ]

"""Allowed values of the config fields, and which of them may differ when a run is resumed."""

import collections
import dataclasses
import importlib
import math
import os
import pathlib
import re
from collections.abc import Callable, Collection
from typing import Any

import ml_collections

from cib_jax.augment import augment, features
from cib_jax.config import flatten, loaded_files, own_fields
from cib_jax.data import photos
from cib_jax.data.splits import AS_NAMED, PROTOCOLS
from cib_jax.diffusion import TEACHERS, Teacher
from cib_jax.errors import ConfigError
from cib_jax.files import did_you_mean
from cib_jax.losses import OBJECTIVES, default_temperature, is_taught
from cib_jax.models import registry
from cib_jax.models.encoder import AUTO, DTYPES
from cib_jax.models.finetune import FineTune, validate_fine_tune
from cib_jax.retrieval.code_quality import SCORES
from cib_jax.training import metric_writers, train_step

Rule = tuple[Callable[[Any], bool], str | Collection[str]]
"""Whether a value is allowed, and what is: the second part of "config.bits must be from 1 to 4096, got 0", or names."""


def _one_of(*choices: str) -> Rule:
    return lambda value: value in choices, choices


def _name_in(*tables: Any) -> Rule:
    names = collections.ChainMap(*tables)  # a view, since users add rows
    return lambda value: value in names, names


def _at_least(least: float) -> Rule:
    return lambda value: math.isfinite(value) and value >= least, f"must be {least} or more"


def _is_checkpoint_dir(value: str) -> bool:
    """Returns whether `train.checkpoint_dir` may have this value.

    Relative folders are not valid, since a resumed run may start in another current folder. Nor is s3://: Orbax 0.12
    writes arrays to Google's buckets alone, and takes other URIs for relative folders.
    """
    if scheme := re.match(r"(\w[\w+.-]*):/", value):
        return bool(re.fullmatch(r"file:///.+|gs://[^/]+/+[^/].*", value)) and scheme[1] in ("file", "gs")
    return not value or pathlib.Path(value).expanduser().is_absolute()


def _pixels_or_zero(meaning: str) -> Rule:
    return lambda size: 0 <= size <= 2048, f"must be 0 ({meaning}) or up to 2048 pixels"


_POSITIVE: Rule = (lambda value: math.isfinite(value) and value > 0, "must be greater than 0")
_PROBABILITY: Rule = (lambda part: 0 <= part < 1, "must be at least 0 and below 1")
_SEED: Rule = (lambda seed: 0 <= seed < 2**32, "must be from 0 to 4294967295")
_COUNT: Rule = (lambda count: count >= AS_NAMED, "must be 0 or more, or -1 to take the protocol's number")
_NUMBERS: Rule = (
    lambda text: bool(re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text)),
    "must be whole numbers separated by commas, such as '16, 32, 64'",
)

RULES: dict[str, Rule] = {
    "seed": _SEED,
    "bits": (lambda bits: 1 <= bits <= 4096, "must be from 1 to 4096; try 16, 32 or 64"),
    "k": _COUNT,
    "backbone": _name_in(registry.BACKBONES),
    "backbone_dtype": _one_of(AUTO, *DTYPES),
    "image_size": _pixels_or_zero("the backbone's usual size"),
    "hidden": _at_least(1),
    "objective": _name_in(OBJECTIVES),
    "optimizer": _name_in(train_step.OPTIMIZERS, {"adam": None}),
    "binary": _one_of("stochastic", "deterministic"),
    "temperature": _at_least(0),
    "beta": _at_least(0),
    "sharpness": _POSITIVE,
    "head_dropout": _PROBABILITY,
    "teacher.objective": _one_of(*TEACHERS),
    "teacher.bits": _at_least(1),
    "teacher.temperature": _POSITIVE,
    "teacher.epochs": _at_least(0),
    "teacher.neighbours": _at_least(1),
    "teacher.dimensions": _at_least(2),
    "teacher.steps": _at_least(1),
    "augment": _name_in(features.FAMILIES, augment.FAMILIES),
    "feature_noise": _at_least(0),
    "feature_dropout": _PROBABILITY,
    "batch_size": (
        lambda size: size == 0 or size >= 2,
        "must be 0 or at least 2, since the contrast needs another image as a negative",
    ),
    "micro_batch": _at_least(0),
    "devices": _at_least(0),
    "epochs": _at_least(0),
    "learning_rate": _POSITIVE,
    "learning_rate_schedule": _one_of("constant", "cosine"),
    "warmup_steps": _at_least(0),
    "weight_decay": _at_least(0),
    "clip_norm": _at_least(0),
    "fine_tune.blocks": _at_least(0),
    "fine_tune.learning_rate": _at_least(0),
    "fine_tune.lora_rank": _at_least(0),
    "fine_tune.lora_alpha": _POSITIVE,
    "data.seed": _SEED,
    "data.name": (bool, "must be the name of a data set, such as cifar10"),
    "data.protocol": _one_of(*PROTOCOLS),
    "data.queries": _COUNT,
    "data.queries_per_class": _COUNT,
    "data.train_images": _COUNT,
    "data.train_per_class": _COUNT,
    "data.validation": _one_of("protocol", "none", "query_half", "database"),
    "data.validation_queries": _at_least(1),
    "data.stored_size": _pixels_or_zero("the images' own size"),
    "data.resident_mb": _at_least(0),
    "data.max_bad_fraction": (lambda part: 0 <= part <= 1, "must be from 0 to 1"),
    "data.max_megapixels": (
        lambda limit: 1 <= limit <= photos.MAX_MEGAPIXELS,
        f"must be from 1 to {photos.MAX_MEGAPIXELS}, Pillow's own limit against decompression bombs",
    ),
    "train.views": (
        lambda views: views == 0 or views >= 2,
        "must be 0 (new views at every step) or at least 2, since a pair needs two views",
    ),
    "train.bank_mb": _at_least(0),
    "train.validate_by": _one_of("map", "separation"),
    "train.validate_every": _at_least(1),
    "train.patience": _at_least(1),
    "train.checkpoint_every": _at_least(1),
    "train.checkpoint_dir": (
        _is_checkpoint_dir,
        "must be an absolute folder, file:///FOLDER or gs://BUCKET/FOLDER, or empty (checkpoints/ in the workdir)",
    ),
    "encode_batch": _at_least(1),
    "cache.mb": _at_least(0),
    "log.writers": (metric_writers.are_known_writers, metric_writers.CHOICES),
    "report.embedded": _at_least(0),
    "compare.methods": (lambda text: bool(text.strip()), "must name at least one method, such as 'itq, cibhash'"),
    "compare.bits": _NUMBERS,
    "compare.seeds": _NUMBERS,
    "compare.workers": _at_least(0),
    "tune.space": (lambda text: bool(text.strip()), "must name at least one field, such as 'temperature=0.2|0.3'"),
    "tune.trials": _at_least(1),
    "tune.sampler": _one_of("tpe", "random", "grid"),
    "tune.score": _one_of("validation_map", *SCORES),
    "tune.images": _at_least(50),
    "tune.workers": _at_least(0),
}
"""Allowed values of the fields; a field without a rule may have any value of its type."""

# The folder of `cib_jax.configs` is found at run time, so that type checkers do not know its modules.
_DEFAULT = importlib.import_module("cib_jax.configs.default").get_config()

FIELDS: dict[str, type] = {name: type(value) for name, value in flatten(_DEFAULT).items()}
"""The type of every field, which is that of its default in configs/default.py."""

AROUND = frozenset(name for name in FIELDS if name.partition(".")[0] in ("compare", "tune"))
"""Fields used only by compare and tune; the config of a single run may lack them."""

WHERE = frozenset({"data.dir", "data.raw_dir", "backbone_weights", "cache.dir", "extensions"})
"""Paths, which may differ from one machine to the next."""

MAY_CHANGE = AROUND.union(
    WHERE,
    (
        "data.resident_mb",
        "data.max_bad_fraction",
        "data.truncated",
        "train.bank_mb",
        "train.checkpoint_dir",
        "fine_tune.checkpointing",
    ),
    ("micro_batch", "devices", "log.writers", "report.write", "report.embedded", "cache.mb"),
)
"""Fields that do not affect what is learned, so that they may differ when a run is resumed.

Paths are included: weights are compared by their fingerprint, data by their digest.
"""

ADDED: dict[str, Any] = {
    "extensions": "",
    "optimizer": "adam",
    "init_from": "",
    "micro_batch": 0,
    "devices": 0,
    "log.writers": "tensorboard",
    "report.write": True,
    "report.embedded": 2000,
    "train.checkpoint_dir": "",
    "train.validate_by": "map",
    "sharpness": 6.0,
    "head_dropout": 0.0,
    "nested": False,
    "learning_rate_schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "partial_batch": False,
    "data.truncated": False,
    **{f"teacher.{name}": value for name, value in dataclasses.asdict(Teacher()).items()},
    "teacher.neighbours": 20,
    "teacher.dimensions": 50,
    **{f"fine_tune.{name}": value for name, value in dataclasses.asdict(FineTune()).items()},
}
"""Fields that runs of earlier versions lack, with the values that those runs had in effect."""

MEASURING = frozenset({"k", "encode_batch", "report.write", "report.embedded"})
"""Fields that may differ when a trained run is evaluated again."""


def parsed(name: str, text: str, where: str) -> Any:
    """Returns the value of the field `name`, one of `FIELDS`, that is given as text; an error names `where`."""
    kind = FIELDS[name]
    try:
        value = {"True": True, "False": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{where}: {name} must be of type {kind.__name__}, got {text!r}", where) from None
    _validate_value(name, value, f"{where}: {name}", where)
    return value


def fine_tune(config: ml_collections.ConfigDict) -> FineTune:
    """Returns the fine-tuning that a config describes."""
    return FineTune(**config.fine_tune.to_dict())


def absent_extensions(config: ml_collections.ConfigDict) -> str:
    """Returns the file that has registered parts of a run, if it has not been run in this process; "" otherwise."""
    files = str(config.get("extensions", "")).split(os.pathsep)
    return next((file for file in files if file not in loaded_files()), "")


def validate(config: ml_collections.ConfigDict, *, around: bool = False, trained: bool = False) -> None:
    """Checks every field, and the fields that depend on each other; with `around`, those of `AROUND` are required.

    A run that is `trained` may have an objective, an optimizer, an augmentation and fields of a file that has not been
    run.
    """
    flat, absent = flatten(config), absent_extensions(config)
    unknown = set() if not (absent and trained) else {"objective", "optimizer", "augment"} | flat.keys() - FIELDS.keys()
    for name in flat.keys() - FIELDS.keys() - unknown:
        if absent:
            raise _error(name, f"this is a field of {absent}, which is not loaded; {load_remedy(absent)}")
        hint = did_you_mean(name, FIELDS) or "see configs/default.py "
        raise _error(name, f"there is no such field; {hint.rstrip('? ')}")
    for name, kind in FIELDS.items():
        if name not in flat:
            if (name in AROUND and not around) or name in own_fields:
                continue
            raise _error(name, "the field is missing; start from configs/default.py, which has all of them")
        value = flat[name]
        if not (type(value) is kind or (kind is float and type(value) is int)):
            raise _error(name, f"must be of type {kind.__name__}, got {value!r} of type {type(value).__name__}")
        if name in unknown:
            continue
        if absent and name in ("objective", "optimizer", "augment", "backbone") and not RULES[name][0](value):
            raise _error(name, f"{value!r} is a part of {absent}, which is not loaded; {load_remedy(absent)}")
        _validate_value(name, value, f"config.{name}", f"config.{name}")
    if (config.data.name == "features") != (config.backbone == "none"):
        raise _error(
            "backbone",
            "must be 'none' for features, which need no network, and for nothing else, got "
            f"{config.backbone!r} with config.data.name={config.data.name}",
        )
    families = features.FAMILIES if config.backbone == "none" else augment.FAMILIES
    if config.augment not in families and "augment" not in unknown:
        inputs = "features" if config.backbone == "none" else "images"
        raise _error("augment", f"must be one of {', '.join(families)} for {inputs}, got {config.augment!r}")
    if config.backbone == "none":
        _validate_without_network(config)
    else:
        _validate_network(config)


def _validate_value(name: str, value: Any, subject: str, field: str) -> None:
    allowed, requirement = RULES.get(name, (lambda value: True, ""))
    if not allowed(value):
        requirement = requirement if isinstance(requirement, str) else f"must be one of {', '.join(requirement)}"
        raise ConfigError(f"{subject} {requirement}, got {value!r}", field)


def _error(name: str, problem: str) -> ConfigError:
    separator = " " if problem.startswith("must ") else ": "
    return ConfigError(f"config.{name}{separator}{problem}", f"config.{name}")


def load_remedy(file: str) -> str:
    """Returns how a user has a file of registered parts run, which is never run because a run names it."""
    return f"add --config={file}, or import it, if you trust it"


def _validate_without_network(config: ml_collections.ConfigDict) -> None:
    for name, neutral in (("image_size", 0), ("backbone_weights", ""), ("frozen", True)):
        if config[name] != neutral:
            raise _error(name, f"must be {neutral!r} for features, which pass through no network, got {config[name]!r}")
    for_images = ["train.views", "data.stored_size", "micro_batch"]
    for name in for_images + [f"fine_tune.{name}" for name in fine_tune(config).asked]:
        if value := flatten(config)[name]:
            raise _error(name, f"must be {type(value)(0)} for features, since it is for images only, got {value!r}")


def _validate_network(config: ml_collections.ConfigDict) -> None:
    backbone, size, frozen = registry.get(config.backbone), config.image_size, config.frozen
    from_scratch = backbone.convert is None
    if size and size < backbone.smallest:
        raise _error("image_size", f"must be {backbone.smallest} pixels or more for {backbone.name}, got {size}")
    if size % backbone.multiple:
        nearest = round(size / backbone.multiple) * backbone.multiple
        raise _error(
            "image_size",
            f"must be a multiple of {backbone.multiple}, the side of the patches of {backbone.name}, got {size}; try "
            f"{nearest}",
        )
    if from_scratch and config.backbone_weights:
        problem = f"must be empty, since {backbone.name} is trained from scratch, got {config.backbone_weights!r}"
        raise _error("backbone_weights", problem)
    if backbone.networks and config.backbone_weights:
        problem = f"must be empty for {backbone.name}, whose networks have a file each, got {config.backbone_weights!r}"
        raise _error("backbone_weights", problem)
    if from_scratch and frozen:
        raise _error(
            "frozen", f"must be False for {backbone.name}, which would keep its random initial weights, got True"
        )
    if fine_tune(config) != FineTune():
        try:
            validate_fine_tune(fine_tune(config), backbone, size, frozen=frozen, from_scratch=from_scratch)
        except ConfigError as error:
            raise ConfigError(f"config.{error}", f"config.{error.field}") from None
    if config.train.views and not frozen:
        raise _error(
            "train.views",
            f"must be 0 unless the backbone is frozen, got {config.train.views}; set it to 0, or config.frozen to True",
        )
    if config.train.views and config.micro_batch:
        raise _error(
            "micro_batch",
            "must be 0 with config.train.views, since cached features do not pass through the backbone in training, "
            f"got {config.micro_batch}",
        )


def differences(mine: dict[str, Any], theirs: dict[str, Any], ignored: frozenset[str] = MAY_CHANGE) -> list[str]:
    """Returns "field: theirs → mine" for each field in which two flat configs differ, except for the ignored ones."""
    mine, theirs = _in_effect(ADDED | own_fields | mine), _in_effect(ADDED | own_fields | theirs)
    names = sorted((mine.keys() | theirs.keys()) - ignored)
    if not any(is_taught(config["objective"]) for config in (mine, theirs) if "objective" in config):
        names = [name for name in names if not name.startswith("teacher.")]  # which have no effect
    pairs = [(name, theirs.get(name, "absent"), mine.get(name, "absent")) for name in names]
    return [f"{name}: {before!r} → {now!r}" for name, before, now in pairs if before != now]


def _in_effect(flat: dict[str, Any]) -> dict[str, Any]:
    """Returns a flat config with the temperature that its objective takes for 0, as earlier configs name it."""
    if flat.get("temperature") == 0 and flat.get("objective") in OBJECTIVES:
        return flat | {"temperature": default_temperature(flat["objective"])}
    return flat

"""Whether a configuration makes sense, told before anything heavy starts. configs/default.py documents the fields."""

import difflib
from typing import Any

import ml_collections

from cib_jax.backbones import registry
from cib_jax.backbones.fine_tuning import FineTune, FineTuneError
from cib_jax.backbones.fine_tuning import check as check_fine_tune
from cib_jax.config.field_values import ADDED, AROUND, FIELDS, MAY_CHANGE, ConfigError
from cib_jax.config.flat import flatten
from cib_jax.views import augment, feature_views


def fine_tune(config: ml_collections.ConfigDict) -> FineTune:
    """Returns how a backbone that is not frozen learns."""
    return FineTune(**config.fine_tune.to_dict())


def check(config: ml_collections.ConfigDict, *, around: bool = False) -> None:
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
    family = feature_views.FAMILIES if config.backbone == "none" else augment.FAMILIES
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
    except FineTuneError as error:
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

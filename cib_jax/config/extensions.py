"""Registration of a user's own parts as values of config fields, and the files that they come from."""

import inspect
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jaxtyping import Array

from cib_jax.augment import augment, features
from cib_jax.config import loaded_files, own_fields, schema
from cib_jax.data import sources
from cib_jax.errors import ConfigError
from cib_jax.losses import OBJECTIVES, Objective
from cib_jax.models import registry
from cib_jax.training import train_step

Part = TypeVar("Part")

TABLES: dict[str, dict[str, Any]] = {
    "objective": OBJECTIVES,
    "optimizer": train_step.OPTIMIZERS,
    "augment": augment.FAMILIES,
    "backbone": registry.BACKBONES,
    "data.name": sources.DATA_SETS,
}
"""The table of each field that can have a part of a user's own as its value."""

BUILT_IN = {field: {*table, *features.FAMILIES, "adam"} for field, table in TABLES.items()}
"""Names of the package's own parts, by field."""
_NOT_FIELDS = {"objective": {"stochastic"}}  # keyword arguments of losses that are not config fields


def register(field: str, part: Part) -> Part:
    """Makes a part of your own a value of a config field, by its name, and returns it.

    Call it in the file that is given as --config=mine.py. The file is remembered in the field `extensions` of the
    config; nothing but --config or your own import ever runs it.

    Args:
      field: "objective", "optimizer", "augment", "backbone" or "data.name".
      part: Part for the field. Keyword-only parameters of an objective and an optimizer are fields of the config; one
        that no config has yet becomes a new field, with its default.
        objective: function (key, logits1, logits2, *, temperature, weight=1.0) → (loss, terms).
        optimizer: function (steps, *, learning_rate) → optimizer of optax.
        augment: function (key, image, *, image_size) → view of one image, [height, width, 3] from 0 to 1; or, of
          features, (key, features) → view of one standardized vector.
        backbone: `cib_jax.models.registry.Backbone`.
        data.name: function of `config.data.dir` → `cib_jax.data.dataset.Source`.

    Raises:
      ConfigError: The field or the name cannot be used, or a new field has no default.

    Examples:
      >>> import cib_jax as cib
      >>> def spread(key, logits1, logits2, *, temperature, spread_weight=0.1):
      ...     loss = cib.nt_xent(logits1, logits2, temperature=temperature)
      ...     return loss - spread_weight * logits1.std(), {"contrast": loss}
      >>> cib.register("objective", spread).__name__  # --config.objective=spread --config.spread_weight=0.2
      'spread'
    """
    if field not in TABLES:
        raise ConfigError(f"field must be one of {', '.join(TABLES)}, got {field!r}", "field")
    entry: Any = part
    fits, needed = callable(part), "a function"
    if field == "backbone":
        fits, needed = isinstance(part, registry.Backbone), "a Backbone"
    name = getattr(part, "name" if field == "backbone" else "__name__", "")
    if not fits or not name.isidentifier() or name in BUILT_IN[field]:
        raise ConfigError(f"part must be {needed} with a name of its own for the field {field}, got {part!r}", "part")
    if field in ("objective", "optimizer"):
        _add_fields(field, part)
    if field == "objective":
        entry = Objective(binary=False, bottleneck=False, loss=entry)
    if field == "augment" and "image_size" in inspect.signature(entry).parameters:
        entry = (_keep_key, _of_each(entry))
    (features.FAMILIES if field == "augment" and callable(entry) else TABLES[field])[name] = entry
    jax.clear_caches()  # programs compiled with an earlier part of this name
    if file := sys._getframe(1).f_globals.get("__file__"):
        own_fields["extensions"] = os.pathsep.join(dict.fromkeys([*loaded_files(), os.path.abspath(file)]))
    return part


def _add_fields(field: str, function: Any) -> None:
    for one in inspect.signature(function).parameters.values():
        known = one.name in schema.FIELDS and one.name not in own_fields
        if one.kind is not one.KEYWORD_ONLY or known or one.name in _NOT_FIELDS.get(field, ()):
            continue
        if type(one.default) not in (bool, int, float, str):
            problem = f"{one.name} is not a field of the config; give it a number, a text, True or False as its default"
            raise ConfigError(f"part: {function.__name__}: {problem}", "part")
        own_fields[one.name], schema.FIELDS[one.name] = one.default, type(one.default)


def _keep_key(key: Array, *, height: int, width: int) -> Array:
    del height, width
    return key


def _of_each(view: Callable[..., Array]) -> Callable[..., Array]:
    return lambda keys, images, *, image_size: jax.vmap(lambda *one: view(*one, image_size=image_size))(keys, images)


def load(files: list[str]) -> None:
    """Runs files that register parts, in a process that was started by one that has run them."""
    for file in files:
        runpy.run_path(file)

"""Configuration: the allowed values of each field, and the objects that a config describes."""

import os
from typing import Any

import ml_collections

own_fields: dict[str, Any] = {}
"""Config fields of parts that `cib_jax.register` has entered, with their defaults: each is a field of every config."""


def loaded_files() -> list[str]:
    """Returns the files that have registered parts in this process."""
    return [file for file in own_fields.get("extensions", "").split(os.pathsep) if file]


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the fields of a config by their dotted names.

    Here and not in `schema`, which imports JAX: mistakes in flags are reported before JAX is loaded.
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f"{name}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat

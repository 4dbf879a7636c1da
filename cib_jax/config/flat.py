"""A configuration's fields by their dotted names; without JAX, so that a mistake in a flag is told at once."""

from typing import Any

import ml_collections


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the fields of a config by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f"{name}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat

"""Random streams: one table of the named folds of a seed, for JAX keys and for NumPy generators.

All randomness of a run follows from its seeds. Every use has a name here, and no key is used for two purposes:

    key(seed) ─┬─ "initial weights", "teacher weights" ─── "backbone", "head", "lora"
               ├─ "view bank", "score views" ─── number of the view ─── number of the image
               ├─ "steps", "teacher steps" ─── number of the step ─── "views", "code bits", "view pairs",
               │                                               "head dropout"
               └─ "baseline"

A key is either folded (here, and by number) or split (inside one augmentation), never both: `fold_in(key, 1)` equals
`split(key)[1]`. Importing this file does not import JAX, since data are read without it.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import PRNGKeyArray
else:
    PRNGKeyArray = Any  # the real one would import JAX

# A number that was published is never changed or used again: the splits, the order of images and the cached features of
# earlier runs follow from it.

KEY_STREAMS = {
    # Folds of key(seed).
    "initial weights": 0,
    "view bank": 1,
    "steps": 2,
    "baseline": 3,
    "teacher weights": 4,
    "teacher steps": 5,
    "score views": 6,
    # Folds of a key of initial weights.
    "backbone": 7,
    "head": 8,
    "lora": 9,
    # Folds of the key of one step.
    "views": 10,
    "code bits": 11,
    "view pairs": 12,
    "head dropout": 13,
}
"""Numbers by which JAX keys are folded."""

RNG_STREAMS = {
    "queries": 0,
    "training images": 1,
    "validation queries": 2,
    "epoch order": 3,
    "retrieval examples": 4,
    "t-SNE images": 5,
    "scored images": 6,
    "index sample": 7,
    "recall sample": 8,
    "diffusion start": 9,
    "validated images": 10,
    "neighbor sample": 11,
}
"""Numbers of NumPy generators; they are independent of the keys above, so that numbers may be equal."""


def stream_key(seed: int, name: str) -> PRNGKeyArray:
    """Returns the JAX key of the stream `name` of a seed, one of the first names in `KEY_STREAMS`."""
    import jax

    return fold_by_name(jax.random.key(seed), name)


def fold_by_name(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """Returns the part of a key that is reserved for the purpose `name`, one of `KEY_STREAMS`."""
    import jax

    return jax.random.fold_in(key, KEY_STREAMS[name])


def stream_rng(seed: int, name: str, *more: int) -> np.random.Generator:
    """Returns the NumPy generator of the stream `name` of a seed, one of `RNG_STREAMS`.

    The numbers `more`, such as the epoch, distinguish several generators of one stream.
    """
    return np.random.default_rng((seed, RNG_STREAMS[name], *more))

"""cib_jax: unsupervised hashing with a contrastive information bottleneck, in JAX.

The functional API, in the order in which an image meets it. Everything from `two_views` to `train_step` is a pure
function, for use under `jax.jit`, `jax.vmap` and `jax.grad`; codes are ±1 floats in training and packed uint8
[n, bits / 8] everywhere else.

    import cib_jax as cib
    hasher = cib.fit(images, bits=32, backbone="convnet", image_size=16, augment="digits")
    codes = hasher.encode(images)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cib_jax.backbones.fine_tuning import FineTune
    from cib_jax.backbones.weights import load_pretrained
    from cib_jax.binary import binarize, pack_bits, sample_codes, unpack_bits
    from cib_jax.collection.collection import Collection
    from cib_jax.corpus.corpus import read_corpus
    from cib_jax.encoder import Encoder, create_encoder
    from cib_jax.errors import Refusal
    from cib_jax.fitting import fit
    from cib_jax.hashing.hasher import Hasher
    from cib_jax.hashing.photo_codes import encode_photos
    from cib_jax.objective import bernoulli_kl, cib_loss, diffusion_match, nt_xent
    from cib_jax.retrieval.health import code_health
    from cib_jax.retrieval.index import Index
    from cib_jax.retrieval.metrics import (
        evaluate,
        mean_average_precision,
        precision_at_k,
        precision_recall_curve,
        precision_within_radius,
        recall_at_k,
        tie_aware_map,
    )
    from cib_jax.retrieval.ranking import hamming_distances, rank
    from cib_jax.teacher import Teacher
    from cib_jax.training.state import TrainState, create_train_state
    from cib_jax.training.step import train_step, train_step_on_features
    from cib_jax.views.augment import resize_and_normalise, two_views

__version__ = "0.1.0"

__all__ = [
    "Collection",
    "Encoder",
    "FineTune",
    "Hasher",
    "Index",
    "Refusal",
    "Teacher",
    "TrainState",
    "bernoulli_kl",
    "binarize",
    "cib_loss",
    "code_health",
    "create_encoder",
    "create_train_state",
    "diffusion_match",
    "encode_photos",
    "evaluate",
    "fit",
    "hamming_distances",
    "load_pretrained",
    "mean_average_precision",
    "nt_xent",
    "pack_bits",
    "precision_at_k",
    "precision_recall_curve",
    "precision_within_radius",
    "rank",
    "read_corpus",
    "recall_at_k",
    "resize_and_normalise",
    "sample_codes",
    "tie_aware_map",
    "train_step",
    "train_step_on_features",
    "two_views",
    "unpack_bits",
]

# Imported when they are asked for: `cib_jax.exported` runs where nothing of training is installed.
_HOMES = {
    "Collection": "collection.collection",
    "Encoder": "encoder",
    "FineTune": "backbones.fine_tuning",
    "Hasher": "hashing.hasher",
    "Index": "retrieval.index",
    "Refusal": "errors",
    "Teacher": "teacher",
    "TrainState": "training.state",
    "bernoulli_kl": "objective",
    "binarize": "binary",
    "cib_loss": "objective",
    "code_health": "retrieval.health",
    "create_encoder": "encoder",
    "create_train_state": "training.state",
    "diffusion_match": "objective",
    "encode_photos": "hashing.photo_codes",
    "evaluate": "retrieval.metrics",
    "fit": "fitting",
    "hamming_distances": "retrieval.ranking",
    "load_pretrained": "backbones.weights",
    "mean_average_precision": "retrieval.metrics",
    "nt_xent": "objective",
    "pack_bits": "binary",
    "precision_at_k": "retrieval.metrics",
    "precision_recall_curve": "retrieval.metrics",
    "precision_within_radius": "retrieval.metrics",
    "rank": "retrieval.ranking",
    "read_corpus": "corpus.corpus",
    "recall_at_k": "retrieval.metrics",
    "resize_and_normalise": "views.augment",
    "sample_codes": "binary",
    "tie_aware_map": "retrieval.metrics",
    "train_step": "training.step",
    "train_step_on_features": "training.step",
    "two_views": "views.augment",
    "unpack_bits": "binary",
}


if not TYPE_CHECKING:  # a checker would take any name at all for one that is found here

    def __getattr__(name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _HOMES:
            found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
            globals()[name] = found
            return found
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> "list[str]":  # as a string, which a Python that is too old reads, too: it is told by the door
    return sorted({*globals(), *__all__})

"""cib_jax: unsupervised hashing with a contrastive information bottleneck, in JAX.

The functional API, in the order in which an image meets it. Everything from `two_views` to `train_step` is a pure
function, for use under `jax.jit`, `jax.vmap` and `jax.grad`; codes are ±1 floats in training and packed uint8
[n, bits / 8] everywhere else.

    import cib_jax as cib
    hasher = cib.fit(images, bits=32, backbone="convnet", image_size=16, augment="digits")
    codes = hasher.encode(images)
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cib_jax.augment.augment import resize_and_normalize, two_views
    from cib_jax.codes import binarize, pack_bits, sample_codes, unpack_bits
    from cib_jax.diffusion import Teacher
    from cib_jax.errors import Refusal, UserError
    from cib_jax.fitting import fit
    from cib_jax.inference.hasher import Hasher, encode_photos
    from cib_jax.losses import bernoulli_kl, cib_loss, diffusion_match, nt_xent
    from cib_jax.models.encoder import Encoder, create_encoder
    from cib_jax.models.finetune import FineTune
    from cib_jax.models.weights import load_pretrained
    from cib_jax.retrieval.code_quality import code_health
    from cib_jax.retrieval.hamming import hamming_distances, rank
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
    from cib_jax.storage.code_store import read_corpus
    from cib_jax.storage.collection import Collection
    from cib_jax.training.train_step import TrainState, create_train_state, train_step, train_step_on_features

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
    "UserError",
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
    "resize_and_normalize",
    "sample_codes",
    "tie_aware_map",
    "train_step",
    "train_step_on_features",
    "two_views",
    "unpack_bits",
]

# Imported when they are asked for: `cib_jax.exported` runs where nothing of training is installed.
_HOMES = {
    "Collection": "storage.collection",
    "Encoder": "models.encoder",
    "FineTune": "models.finetune",
    "Hasher": "inference.hasher",
    "Index": "retrieval.index",
    "Refusal": "errors",
    "Teacher": "diffusion",
    "TrainState": "training.train_step",
    "UserError": "errors",
    "bernoulli_kl": "losses",
    "binarize": "codes",
    "cib_loss": "losses",
    "code_health": "retrieval.code_quality",
    "create_encoder": "models.encoder",
    "create_train_state": "training.train_step",
    "diffusion_match": "losses",
    "encode_photos": "inference.hasher",
    "evaluate": "retrieval.metrics",
    "fit": "fitting",
    "hamming_distances": "retrieval.hamming",
    "load_pretrained": "models.weights",
    "mean_average_precision": "retrieval.metrics",
    "nt_xent": "losses",
    "pack_bits": "codes",
    "precision_at_k": "retrieval.metrics",
    "precision_recall_curve": "retrieval.metrics",
    "precision_within_radius": "retrieval.metrics",
    "rank": "retrieval.hamming",
    "read_corpus": "storage.code_store",
    "recall_at_k": "retrieval.metrics",
    "resize_and_normalize": "augment.augment",
    "sample_codes": "codes",
    "tie_aware_map": "retrieval.metrics",
    "train_step": "training.train_step",
    "train_step_on_features": "training.train_step",
    "two_views": "augment.augment",
    "unpack_bits": "codes",
}


if not TYPE_CHECKING:  # a checker would take any name at all for one that is found here

    def __getattr__(name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "resize_and_normalise":
            warnings.warn("resize_and_normalise is now resize_and_normalize", DeprecationWarning, stacklevel=2)
            name = "resize_and_normalize"
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

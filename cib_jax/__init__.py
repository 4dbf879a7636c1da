"""cib_jax: unsupervised hashing with a contrastive information bottleneck, in JAX.

    import cib_jax as cib
    hasher = cib.fit(images, bits=32, backbone="convnet", image_size=16, augment="digits")
    codes = hasher.encode(images)

The functions from `two_views` to `train_step` are pure, for `jax.jit`, `jax.vmap` and `jax.grad`. Codes are ±1
floats in training and packed uint8 [n, bytes] everywhere else.
"""

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

from cib_jax.version import __version__ as __version__

if sys.platform == "win32":
    raise ImportError("cib_jax runs on Linux and macOS; on Windows, use it inside WSL (wsl --install)")

if TYPE_CHECKING:
    from cib_jax.augment.augment import resize_and_normalize, two_views
    from cib_jax.codes import binarize, pack_bits, sample_codes, unpack_bits
    from cib_jax.commands.collection import Collection
    from cib_jax.commands.duplicates import duplicates as find_duplicates
    from cib_jax.commands.evaluate import evaluate as evaluate_run
    from cib_jax.commands.index import index as index_photos
    from cib_jax.commands.search import search as search_photos
    from cib_jax.commands.serve import serve_notebook
    from cib_jax.commands.train import train
    from cib_jax.config.extensions import register
    from cib_jax.data.zip_archive import unzip as unzip_photos
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
    from cib_jax.training.train_step import TrainState, create_train_state, train_step, train_step_on_features

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
    "evaluate_run",
    "find_duplicates",
    "fit",
    "hamming_distances",
    "index_photos",
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
    "register",
    "resize_and_normalize",
    "sample_codes",
    "search_photos",
    "serve_notebook",
    "tie_aware_map",
    "train",
    "train_step",
    "train_step_on_features",
    "two_views",
    "unpack_bits",
    "unzip_photos",
]

# Imported on first use: `cib_jax.exported` works where the libraries for training are not installed.
_NAMES = {
    "augment.augment": "resize_and_normalize two_views",
    "codes": "binarize pack_bits sample_codes unpack_bits",
    "commands.evaluate": "evaluate_run=evaluate",
    "commands.index": "index_photos=index",
    "commands.duplicates": "find_duplicates=duplicates",
    "commands.collection": "Collection",
    "commands.search": "search_photos=search",
    "commands.serve": "serve_notebook",
    "commands.train": "train",
    "config.extensions": "register",
    "data.zip_archive": "unzip_photos=unzip",
    "diffusion": "Teacher",
    "errors": "Refusal UserError",
    "fitting": "fit",
    "inference.hasher": "Hasher encode_photos",
    "losses": "bernoulli_kl cib_loss diffusion_match nt_xent",
    "models.encoder": "Encoder create_encoder",
    "models.finetune": "FineTune",
    "models.weights": "load_pretrained",
    "retrieval.code_quality": "code_health",
    "retrieval.hamming": "hamming_distances rank",
    "retrieval.index": "Index",
    "retrieval.metrics": "evaluate mean_average_precision precision_at_k "
    "precision_recall_curve precision_within_radius recall_at_k tie_aware_map",
    "storage.code_store": "read_corpus",
    "training.train_step": "TrainState create_train_state train_step train_step_on_features",
}
_HOMES = {entry.split("=")[0]: (module, entry.split("=")[-1]) for module in _NAMES for entry in _NAMES[module].split()}

_RENAMED = {"resize_and_normalise": "resize_and_normalize"}  # old names, which work for one more release

if not TYPE_CHECKING:  # a type checker would accept any name if it saw this function

    def __getattr__(name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _RENAMED:
            warnings.warn(f"cib_jax.{name} has been renamed to {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
            name = _RENAMED[name]
        if name in _HOMES:
            from cib_jax.hint import HINT, LOADING

            module, attribute = _HOMES[name]
            HINT.show(LOADING)
            try:
                found = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
            finally:
                HINT.clear()
            globals()[name] = found
            return found
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> "list[str]":  # a string, since old versions of Python parse this file before they are refused
    return sorted(__all__)

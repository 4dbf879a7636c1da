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
    from cib_jax.commands.evaluate import evaluate as evaluate_run
    from cib_jax.commands.index import index as index_photos
    from cib_jax.commands.search import Collection
    from cib_jax.commands.search import duplicates as find_duplicates
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
_HOMES = {
    "Collection": "commands.search:Collection",
    "Encoder": "models.encoder:Encoder",
    "FineTune": "models.finetune:FineTune",
    "Hasher": "inference.hasher:Hasher",
    "Index": "retrieval.index:Index",
    "Refusal": "errors:Refusal",
    "Teacher": "diffusion:Teacher",
    "TrainState": "training.train_step:TrainState",
    "UserError": "errors:UserError",
    "bernoulli_kl": "losses:bernoulli_kl",
    "binarize": "codes:binarize",
    "cib_loss": "losses:cib_loss",
    "code_health": "retrieval.code_quality:code_health",
    "create_encoder": "models.encoder:create_encoder",
    "create_train_state": "training.train_step:create_train_state",
    "diffusion_match": "losses:diffusion_match",
    "encode_photos": "inference.hasher:encode_photos",
    "evaluate": "retrieval.metrics:evaluate",
    "evaluate_run": "commands.evaluate:evaluate",
    "find_duplicates": "commands.search:duplicates",
    "fit": "fitting:fit",
    "hamming_distances": "retrieval.hamming:hamming_distances",
    "index_photos": "commands.index:index",
    "load_pretrained": "models.weights:load_pretrained",
    "mean_average_precision": "retrieval.metrics:mean_average_precision",
    "nt_xent": "losses:nt_xent",
    "pack_bits": "codes:pack_bits",
    "precision_at_k": "retrieval.metrics:precision_at_k",
    "precision_recall_curve": "retrieval.metrics:precision_recall_curve",
    "precision_within_radius": "retrieval.metrics:precision_within_radius",
    "rank": "retrieval.hamming:rank",
    "read_corpus": "storage.code_store:read_corpus",
    "recall_at_k": "retrieval.metrics:recall_at_k",
    "register": "config.extensions:register",
    "resize_and_normalize": "augment.augment:resize_and_normalize",
    "sample_codes": "codes:sample_codes",
    "search_photos": "commands.search:search",
    "serve_notebook": "commands.serve:serve_notebook",
    "tie_aware_map": "retrieval.metrics:tie_aware_map",
    "train": "commands.train:train",
    "train_step": "training.train_step:train_step",
    "train_step_on_features": "training.train_step:train_step_on_features",
    "two_views": "augment.augment:two_views",
    "unpack_bits": "codes:unpack_bits",
    "unzip_photos": "data.zip_archive:unzip",
}

_RENAMED = {"resize_and_normalise": "resize_and_normalize"}  # old names, which work for one more release

if not TYPE_CHECKING:  # a type checker would accept any name if it saw this function

    def __getattr__(name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _RENAMED:
            warnings.warn(f"cib_jax.{name} has been renamed to {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
            name = _RENAMED[name]
        if name in _HOMES:
            module, attribute = _HOMES[name].split(":")
            found = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
            globals()[name] = found
            return found
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> "list[str]":  # a string, since old versions of Python parse this file before they are refused
    return sorted({*globals(), *__all__})

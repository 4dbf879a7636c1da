"""What the words of a config stand for: the encoder, the optimizer, the splits, the streams of random numbers."""

import pathlib

import jax
import ml_collections
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from cib_jax.augment.features import Standard
from cib_jax.config.schema import fine_tune
from cib_jax.data import dataset, sources, splits
from cib_jax.data.dataset import Bar, DataConfig, no_bar
from cib_jax.data.splits import Protocol
from cib_jax.diffusion import Teacher
from cib_jax.errors import ConfigError
from cib_jax.losses import OBJECTIVES
from cib_jax.models import registry, weights
from cib_jax.models.encoder import Encoder, Params, create_encoder
from cib_jax.training import input_pipeline, train_step

STREAMS = {"initial weights": 0, "view bank": 1, "steps": 2, "baseline": 3}


def key(config: ml_collections.ConfigDict, stream: str) -> PRNGKeyArray:
    """Returns the key of one of `STREAMS`, a fold of the one root key that the seed gives.

    The view bank's comes from the seed of the data, so that runs with other seeds can share it.
    """
    seed = config.data.seed if stream == "view bank" else config.seed
    return jax.random.fold_in(jax.random.key(seed), STREAMS[stream])


def encoder(
    config: ml_collections.ConfigDict, *, trained: bool = False, standard: Standard | None = None
) -> tuple[Encoder, Params, Params, str]:
    """Returns the encoder, its parameters to train, its frozen ones, and the fingerprint of the frozen ones ("": none).

    Args:
      config: of the run.
      trained: a checkpoint will replace the parameters to train, so weights are loaded for the frozen ones only.
      standard: for the backbone "none", mean and deviation of the features that it takes.

    Raises:
      WeightsError: the backbone's weights are missing or unusable.
    """
    how = fine_tune(config)
    pretrained = registry.get(config.backbone).convert is not None and (config.frozen or how.keeps or not trained)
    loaded = weights.load_pretrained(config.backbone, config.backbone_weights) if pretrained else None
    made, params, frozen = create_encoder(
        key(config, "initial weights"),
        backbone=config.backbone,
        bits=config.bits,
        image_size=config.image_size,
        frozen=config.frozen and standard is None,
        hidden=config.hidden,
        backbone_params=loaded,
        pretrained=pretrained,
        backbone_dtype=config.backbone_dtype,
        standard=standard,
        feature_noise=config.feature_noise,
        feature_dropout=config.feature_dropout,
        fine_tune=how,
    )
    return made, params, frozen, weights.fingerprint(loaded) if frozen and loaded else ""


def optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Returns Adam with the config's learning rates."""
    return train_step.adam(config.learning_rate, config.fine_tune.learning_rate)


def teacher(config: ml_collections.ConfigDict) -> Teacher:
    """Returns how the teacher of a run is trained and used."""
    return Teacher(**config.teacher.to_dict())


def protocol(config: ml_collections.ConfigDict) -> Protocol:
    """Returns the protocol that the config names, with the fields that it sets otherwise.

    Raises:
      DataError: the protocol is another data set's.
    """
    data = config.data
    names = ("queries", "queries_per_class", "train_images", "train_per_class", "validation")
    return splits.get_protocol(data.protocol, data.name, {"k": config.k} | {name: data[name] for name in names})


def source(
    config: ml_collections.ConfigDict, prepared: pathlib.Path | None = None, bar: Bar = no_bar
) -> dataset.Source:
    """Returns the data set.

    Args:
      config: of the run.
      prepared: where a folder's or a list's photos are kept, decoded and resized; wanted for those alone.
      bar: shows the progress of preparing and checking.

    Raises:
      DataError: it cannot be had.
    """
    data = config.data
    which = DataConfig(
        name=data.name,
        directory=data.dir,
        labeled=data.labelled,
        stored_size=data.stored_size,
        max_megapixels=data.max_megapixels,
        raw_directory=data.raw_dir,
        image_feature=data.image_feature,
        label_feature=data.label_feature,
        database_split=data.database_split,
        query_split=data.query_split,
    )
    return sources.load(which, prepared, bar)


def draw_splits(config: ml_collections.ConfigDict, drawn_from: dataset.Source | None = None) -> splits.Splits:
    """Returns the data set's splits, checked against the fields that depend on their sizes.

    Args:
      config: of the run.
      drawn_from: the data set, where it was loaded already.

    Raises:
      DataError: the data set cannot be had or is too small.
      ConfigError: `k` or `batch_size` is larger than the images there are.
    """
    wanted = protocol(config)
    drawn = splits.draw_splits(
        source(config) if drawn_from is None else drawn_from,
        wanted,
        seed=config.data.seed,
        validation_queries=config.data.validation_queries,
    )
    searched = min(len(drawn.database), len(drawn.validation[1]) if drawn.validation else len(drawn.database))
    if drawn.database.labels is not None and wanted.k > searched:
        raise ConfigError(
            f"config.k: {wanted.k} is larger than the database, which has {searched} images; lower it, or 0 takes all"
        )
    if config.train.views:
        bank = (
            config.train.views
            * len(drawn.train)
            * registry.get(config.backbone).features
            * input_pipeline.BYTES
            / 2**20
        )
        if bank > config.train.bank_mb:
            raise ConfigError(
                f"config.train.views: a bank of {config.train.views} views of {len(drawn.train)} images takes "
                f"{bank:,.0f} MiB, more than config.train.bank_mb; lower the views or raise that limit"
            )
    if config.augment == "stored" and (np.ndim(first := drawn.train.images[0]) != 2 or len(first) < 2):
        raise ConfigError(
            "config.augment: 'stored' draws two of several vectors per item, [items, views, features], but the file "
            "holds one for each; set it to 'noise'"
        )
    if OBJECTIVES[config.objective].taught:
        try:
            teacher(config).check(len(drawn.train))
        except ValueError as error:
            raise ConfigError(f"config.{error}") from None
    if config.batch_size > len(drawn.train):
        raise ConfigError(
            f"config.batch_size: {config.batch_size} is larger than the training set of {len(drawn.train)}; lower it"
        )
    return drawn

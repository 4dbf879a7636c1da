"""Objects that a config describes: encoder, method, training run, data set, splits."""

import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from cib_jax import diffusion
from cib_jax.augment.features import Standard
from cib_jax.config.schema import FIELDS, absent_extensions, fine_tune, load_remedy
from cib_jax.data import dataset, sources, splits
from cib_jax.data.dataset import Bar, DataConfig, no_bar
from cib_jax.data.splits import Protocol
from cib_jax.diffusion import Teacher
from cib_jax.errors import ConfigError, DataError
from cib_jax.losses import OBJECTIVES, is_taught
from cib_jax.models import registry, weights
from cib_jax.models.encoder import Encoder, Params, create_encoder
from cib_jax.random_streams import stream_key
from cib_jax.training import input_pipeline, train_step
from cib_jax.training.loop import Schedule
from cib_jax.training.train_step import Method
from cib_jax.training.trainer import TrainingData, TrainingRun


def key(config: ml_collections.ConfigDict, stream: str) -> PRNGKeyArray:
    """Returns the key of a stream of `random_streams.KEY_STREAMS`.

    Views that are drawn once come from the seed of the data, so that runs with other seeds can share their features.
    """
    return stream_key(config.data.seed if stream in ("view bank", "score views") else config.seed, stream)


def encoder(
    config: ml_collections.ConfigDict,
    *,
    trained: bool = False,
    standard: Standard | None = None,
    stream: str = "initial weights",
) -> tuple[Encoder, Params, Params, str]:
    """Returns the encoder, its parameters to train, its frozen ones, and the fingerprint of the frozen ones ("": none).

    If it is `trained`, a checkpoint will replace the parameters to train, and only frozen weights are loaded.
    """
    how = fine_tune(config)
    pretrained = registry.get(config.backbone).convert is not None and (config.frozen or how.keeps or not trained)
    loaded = weights.load_pretrained(config.backbone, config.backbone_weights) if pretrained else None
    made, params, frozen = create_encoder(
        key(config, stream),
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


def schedule(config: ml_collections.ConfigDict, images: int) -> Schedule:
    """Returns how long a run on so many training images trains, and in which portions.

    Where `epochs` or `batch_size` is 0, it follows from the number of images if a teacher is trained first; otherwise
    it is the paper's: 80 epochs for 16 bits, 60 for other lengths, of batches of 64.
    """
    if is_taught(config.objective):
        batch_size, epochs, _ = diffusion.batches_and_epochs(images, config.batch_size, config.epochs)
    else:
        batch_size, epochs = config.batch_size or min(64, images), config.epochs or (80 if config.bits == 16 else 60)
    often, patience = config.train.validate_every, config.train.patience
    return Schedule(epochs, batch_size, often, patience, config.partial_batch)


def validate_partial_batch(config: ml_collections.ConfigDict, images: int, devices: int) -> None:
    """Raises ConfigError if the training images that are left over from whole batches cannot be a batch."""
    try:
        schedule(config, images).validate(images, devices, config.micro_batch)
    except ConfigError as error:
        raise ConfigError(f"config.{error}", field=f"config.{error.field}") from None


def optimizer(config: ml_collections.ConfigDict, steps: int = 1) -> optax.GradientTransformation:
    """Returns the config's optimizer for a run of `steps` steps, a number that the structure of its state ignores."""
    if config.optimizer != "adam":
        own = train_step.OPTIMIZERS[config.optimizer]
        return own(steps, **_fields_of(config, own))
    warmup = config.warmup_steps

    def rate(peak: float) -> optax.ScalarOrSchedule:
        if config.learning_rate_schedule == "cosine":
            return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
        return optax.linear_schedule(0.0, peak, warmup) if warmup else peak

    backbone = config.fine_tune.learning_rate
    another = backbone not in (0, config.learning_rate)
    made = train_step.adam(
        rate(config.learning_rate), rate(backbone) if another else 0.0, weight_decay=config.weight_decay
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), made) if config.clip_norm else made


def method(config: ml_collections.ConfigDict, encoder: Encoder, steps: int = 1) -> Method:
    """Returns what training minimizes, and how: each field of `Method` from the config's field of the same name."""
    named = {field.name: config[field.name] for field in dataclasses.fields(Method) if field.name in config}
    if loss := OBJECTIVES[config.objective].loss:
        named["objective"] = functools.partial(loss, **_fields_of(config, loss))
    named |= {"optimizer": optimizer(config, steps), "stochastic": config.binary == "stochastic"}
    named["temperature"] = config.temperature or None  # the objective's
    return Method(encoder, **named)


def _fields_of(config: ml_collections.ConfigDict, function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the config's values for the keyword-only parameters of a function that are named after fields."""
    named = [one for one in inspect.signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY]
    return {one.name: config.get(one.name, one.default) for one in named if one.name in FIELDS}


def training_run(
    config: ml_collections.ConfigDict,
    network: tuple[Encoder, Params, Params],
    data: TrainingData,
    mesh: Mesh | None,
    *,
    stream: str = "steps",
) -> TrainingRun:
    """Returns everything that decides the trained parameters; `network` holds those to train, then the frozen ones."""
    made, params, frozen = network
    data = dataclasses.replace(data, seed=config.seed)
    planned = schedule(config, len(data.images))
    steps = planned.epochs * planned.steps_per_epoch(len(data.images))
    return TrainingRun(method(config, made, steps), params, frozen, data, planned, key(config, stream), mesh)


def teacher(config: ml_collections.ConfigDict) -> Teacher:
    """Returns how the teacher of a run is trained and used."""
    return Teacher(**config.teacher.to_dict())


def teacher_config(config: ml_collections.ConfigDict, images: int) -> ml_collections.ConfigDict:
    """Returns the config of the teacher of a run on so many images: another head of the same network and objective."""
    own, config = teacher(config), config.copy_and_resolve_references()
    with config.unlocked():
        config.batch_size, _, epochs = diffusion.batches_and_epochs(images, config.batch_size, config.epochs)
        config.epochs = own.epochs or epochs
        config.objective = own.objective_for(config.augment)
        config.temperature, config.bits = own.temperature, own.bits
        config.nested = False  # its embeddings are used whole
        config.train.validate_by = "map"  # of no images, since a teacher is not validated
    return config


def protocol(config: ml_collections.ConfigDict) -> Protocol:
    """Returns the protocol that the config names, with the fields that the config sets itself."""
    data = config.data
    names = ("queries", "queries_per_class", "train_images", "train_per_class", "validation")
    return splits.get_protocol(data.protocol, data.name, {"k": config.k} | {name: data[name] for name in names})


def source(
    config: ml_collections.ConfigDict, prepared: pathlib.Path | None = None, bar: Bar = no_bar
) -> dataset.Source:
    """Returns the data set; only photos in a folder or a list need the folder `prepared`, of resized ones."""
    data = config.data
    # The other fields of `DataConfig` have the same names in the config.
    named = {field.name: data[field.name] for field in dataclasses.fields(DataConfig) if field.name in data}
    which = DataConfig(directory=data.dir, labeled=data.labelled, raw_directory=data.raw_dir, **named)
    try:
        return sources.load(which, prepared, bar)
    except DataError as error:
        if (file := absent_extensions(config)) and error.field == "config.data.name":
            raise DataError(f"{error}; or, if {file} registers it, {load_remedy(file)}", error.field) from None
        raise


def draw_splits(config: ml_collections.ConfigDict, drawn_from: dataset.Source | None = None) -> splits.Splits:
    """Returns the data set's splits, after checks of the fields that depend on their sizes."""
    wanted = protocol(config)
    drawn = splits.draw_splits(
        source(config) if drawn_from is None else drawn_from,
        wanted,
        seed=config.data.seed,
        validation_queries=config.data.validation_queries,
    )
    if config.train.validate_by == "separation" and drawn.validation is not None:
        raise ConfigError(
            "config.train.validate_by must be 'map' where images are held out for validation, got 'separation'; set "
            "config.data.validation to 'none', or remove the rows of a list with the split 'validation'",
            field="config.train.validate_by",
        )
    searched = min(len(drawn.database), len(drawn.validation[1]) if drawn.validation else len(drawn.database))
    if drawn.database.labels is not None and wanted.k > searched:
        raise ConfigError(
            f"config.k must be at most the number of images in the database, {searched}, got {wanted.k}; 0 takes all",
            field="config.k",
        )
    size = config.train.views * len(drawn.train) * registry.get(config.backbone).features * input_pipeline.BYTES / 2**20
    if size > config.train.bank_mb:
        raise ConfigError(
            f"config.train.views must be lower, got {config.train.views}: a bank of {config.train.views} views of "
            f"{len(drawn.train)} images takes {size:,.0f} MiB, more than config.train.bank_mb; or raise that limit",
            field="config.train.views",
        )
    if config.augment == "stored" and (np.ndim(first := drawn.train.images[0]) != 2 or len(first) < 2):
        problem = "must be 'noise' for features with one vector per item, got 'stored', which draws two of several"
        raise ConfigError(f"config.augment {problem}, [items, views, features]", field="config.augment")
    if config.batch_size > len(drawn.train):
        allowed = f"at most the number of training images, {len(drawn.train)}"
        raise ConfigError(f"config.batch_size must be {allowed}, got {config.batch_size}", field="config.batch_size")
    return drawn

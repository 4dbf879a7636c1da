"""What the words of a config stand for: the encoder, the optimiser, the splits, the streams of random numbers."""

import jax
import ml_collections
import optax
from jaxtyping import PRNGKeyArray

from cib_jax.backbones import registry, weights
from cib_jax.config import ConfigError
from cib_jax.data import sources, splits
from cib_jax.encoder import Encoder, Params, create_encoder
from cib_jax.training import view_bank

STREAMS = {"initial weights": 0, "view bank": 1, "steps": 2}


def key(config: ml_collections.ConfigDict, stream: str) -> PRNGKeyArray:
    """Returns the key of one of `STREAMS`, a fold of the one root key that the seed gives.

    The view bank's comes from the seed of the data, so that runs with other seeds can share it.
    """
    seed = config.data.seed if stream == "view bank" else config.seed
    return jax.random.fold_in(jax.random.key(seed), STREAMS[stream])


def encoder(config: ml_collections.ConfigDict, *, trained: bool = False) -> tuple[Encoder, Params, Params, str]:
    """Returns the encoder, its parameters to train, its frozen ones, and the fingerprint of the frozen ones ("": none).

    Args:
      config: of the run.
      trained: a checkpoint will replace the parameters to train, so weights are loaded for the frozen ones only.

    Raises:
      WeightsError: the backbone's weights are missing or unusable.
    """
    pretrained = registry.get(config.backbone).convert is not None and (config.frozen or not trained)
    loaded = weights.load_pretrained(config.backbone, config.backbone_weights) if pretrained else None
    made, params, frozen = create_encoder(
        key(config, "initial weights"),
        backbone=config.backbone,
        bits=config.bits,
        image_size=config.image_size,
        frozen=config.frozen,
        hidden=config.hidden,
        backbone_params=loaded,
        pretrained=pretrained,
        backbone_dtype=config.backbone_dtype,
    )
    return made, params, frozen, weights.fingerprint(loaded) if frozen and loaded else ""


def optimiser(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Returns Adam with the config's learning rate."""
    return optax.adam(config.learning_rate)


def draw_splits(config: ml_collections.ConfigDict) -> splits.Splits:
    """Returns the data set's splits, checked against the fields that depend on their sizes.

    Raises:
      DataError: the data set cannot be had or is too small.
      ConfigError: `k` or `batch_size` is larger than the images there are.
    """
    data = config.data
    drawn = splits.draw(
        sources.load(data.name, data.dir),
        seed=data.seed,
        train_per_class=data.train_per_class,
        queries=data.queries,
        validation=data.validation,
        validation_queries=data.validation_queries,
    )
    searched = min(len(drawn.database), len(drawn.validation[1]) if drawn.validation else len(drawn.database))
    if config.k > searched:
        raise ConfigError(f"config.k: {config.k} is larger than the database, which has {searched} images; lower it")
    if config.train.views:
        bank = config.train.views * len(drawn.train) * registry.get(config.backbone).features * view_bank.BYTES / 2**20
        if bank > config.train.bank_mb:
            raise ConfigError(
                f"config.train.views: a bank of {config.train.views} views of {len(drawn.train)} images takes "
                f"{bank:,.0f} MiB, more than config.train.bank_mb; lower the views or raise that limit"
            )
    if config.batch_size > len(drawn.train):
        raise ConfigError(
            f"config.batch_size: {config.batch_size} is larger than the training set of {len(drawn.train)}; lower it"
        )
    return drawn

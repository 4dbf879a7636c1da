"""One training step: the method, the state, and the update of CIBHash (https://arxiv.org/abs/2105.06138).

`update` is the paper's algorithm, as a pure function; jit it with the state donated. docs/method.md has the equations.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from cib_jax.deprecation import renamed_keywords
from cib_jax.distributed import sharding
from cib_jax.distributed.sharding import Axis
from cib_jax.errors import ConfigError
from cib_jax.losses import OBJECTIVES, cib_loss, default_temperature
from cib_jax.models.encoder import Encoder, Params
from cib_jax.random_streams import fold_by_name
from cib_jax.training import grad_cache

Number = float | int | Float[Array, ""]  # traced where steps take it as an argument
Terms = dict[str, Float[Array, ""]]  # the loss and its parts, in nats, and the norm of the gradient


@dataclasses.dataclass(frozen=True)
class Method:
    """What training minimizes, and how: everything that a step needs besides its state, batch and key.

    A new field goes into this class and into configs/default.py, under the same name; `cib_loss` receives it as soon
    as it has a parameter of that name.

    Raises:
      ConfigError: A value is out of range.
    """

    encoder: Encoder
    """Network from views to logits."""
    optimizer: optax.GradientTransformation = dataclasses.field(repr=False)
    objective: str | Callable[..., Any] = "cibhash"
    """Loss: "naive_cl", "cl_hash" or "cibhash" of the paper, "diffusion", with a teacher, or a function."""
    temperature: Number | None = None
    """Temperature τ of the contrast; None becomes the objective's, 0.3, or 0 for "diffusion": from the data."""
    beta: Number = 0.001
    """Weight β of the bottleneck term."""
    stochastic: bool = True
    """Whether bits are drawn, as in the paper, or thresholded, as in its published code."""
    sharpness: Number = 6.0
    """Power of the ratio by which a walk links two images more often than chance; for "diffusion" only."""
    nested: bool = False
    """Whether the first 16, 32, 64, … bits are to be codes, too."""
    augment: str = "photo"
    """Family of views: "photo" or "digits" of images, "noise" or "stored" of features."""
    micro_batch: int = 0
    """Images of one device that go through the backbone at a time, for less memory; 0 takes all at once."""
    head_dropout: float = 0.0
    """Probability that the hash head's input lacks a feature of a view, in training; 0 keeps all."""

    def __post_init__(self) -> None:
        if not callable(self.objective) and self.objective not in OBJECTIVES:
            raise ConfigError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}", field="objective"
            )
        if self.temperature is None:
            object.__setattr__(self, "temperature", default_temperature(self.objective))
        for name in ("temperature", "sharpness", "beta"):
            value = getattr(self, name)
            if not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
                raise ConfigError(f"{name} must be a number, got {value!r}", field=name)
        for name in ("temperature", "sharpness"):
            value = getattr(self, name)
            # A traced value, such as a temperature that follows a schedule, is known only when the step runs.
            if not isinstance(value, int | float) or value > 0:
                continue
            if not (name == "temperature" and value == 0 and default_temperature(self.objective) == 0):
                raise ConfigError(f"{name} must be greater than 0, got {value}", field=name)
        for name in ("beta", "micro_batch"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value >= 0:
                raise ConfigError(f"{name} must be 0 or more, got {value}", field=name)
        if not 0 <= self.head_dropout < 1:
            problem = (
                f"head_dropout must be at least 0 and below 1, got {self.head_dropout}; 0.5 is the published code's"
            )
            raise ConfigError(problem, field="head_dropout")

    @property
    def loss_fields(self) -> dict[str, Any]:
        """The fields that are parameters of `cib_loss`."""
        return {name: getattr(self, name) for name in _LOSS_FIELDS}


_LOSS_FIELDS = [name for name in inspect.signature(cib_loss).parameters if name in Method.__dataclass_fields__]


class Batch(NamedTuple):
    """Input of one step."""

    inputs: (
        UInt8[Array, "batch height width 3"]
        | Float[Array, "batch *views features"]
        | tuple[Float[Array, "batch features"], Float[Array, "batch features"]]
    )
    """Images, or items that are features, of which two views are drawn; or a pair: the features of two drawn views."""
    coordinates: Float[Array, "batch dimensions"] | None = None
    """Diffusion coordinates of the images, for the objective "diffusion"."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. Frozen parameters are passed beside it, and are never saved twice.

    Examples:
      >>> import cib_jax as cib
      >>> import jax, optax
      >>> encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
      >>> state = cib.create_train_state(params, optax.adam(1e-3))
      >>> int(state.step), sorted(state.params)
      (0, ['backbone', 'head'])
    """

    step: Int[Array, ""] | Any  # JAX makes states of shapes and shardings, too
    """Steps taken so far."""
    params: Params
    opt_state: optax.OptState

    def __repr__(self) -> str:
        count = sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(self.params))
        return f"TrainState({count:,} parameters, step={self.step!r})"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come between two chunks of steps. Config, state and this determine the rest of the run."""

    epoch: int = 0
    """Epochs finished. Order and views follow from seed, epoch and step, so that no other data position is kept."""
    step: int = 0  # steps done in all
    steps_of_epoch: int = 0  # steps done of the unfinished epoch
    sums: dict[str, float] = dataclasses.field(default_factory=dict)  # sum of each loss term over those steps
    best_step: int = 0  # step of the best validation so far; 0 before the first
    best_score: float = -1.0  # the largest score of a validation so far
    bad_validations: int = 0  # validations since the best one
    finished: bool = False
    seconds: float = 0.0  # training time so far, over all sessions


@renamed_keywords(optimiser="optimizer")
def create_train_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step.

    Args:
      params: Parameters to train; they are copied, since a step donates its state.
      optimizer: Optimizer of the steps.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp, optax
      >>> state = cib.create_train_state({"head": jnp.ones(3)}, optax.adam(1e-3))
      >>> int(state.step), state.params["head"].tolist()
      (0, [1.0, 1.0, 1.0])
    """
    return initial_state(params, optimizer)


def initial_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh | None = None) -> TrainState:
    """Returns the state before the first step, with a copy of the parameters, on all devices of a mesh."""
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))
    # Every array is copied: some optimizers keep the parameters themselves, and no buffer can be donated twice.
    return sharding.replicate(jax.tree.map(jnp.array, state), mesh)


@functools.lru_cache(maxsize=64)
def adam(
    learning_rate: optax.ScalarOrSchedule,
    backbone_learning_rate: optax.ScalarOrSchedule = 0.0,
    *,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Returns Adam, or AdamW, with another learning rate for the backbone unless that is 0 or the same.

    The same arguments give the same object, so that runs with it can share their compiled step.
    """
    rule = functools.partial(optax.adamw, weight_decay=weight_decay) if weight_decay else optax.adam
    if backbone_learning_rate in (0, learning_rate):
        return rule(learning_rate)
    rates = {"head": rule(learning_rate), "backbone": rule(backbone_learning_rate)}

    def labels(params: Params) -> dict[str, str]:
        return {name: "head" if name == "head" else "backbone" for name in params}

    return optax.partition(rates, labels)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {}
"""Optimizers besides "adam" for the config field of this name: functions of the number of steps and of fields."""


def update(
    state: TrainState, frozen: Params, batch: Batch, key: PRNGKeyArray, method: Method, axis: Axis = None
) -> tuple[TrainState, Terms]:
    """Returns the state after one step, and the loss terms: views → logits → codes → loss → gradient → update.

    Args:
      state: State before the step.
      frozen: Parameters that are not trained.
      batch: This device's rows of the batch.
      key: Random key of this step, a fold of the run's key by the number of the step.
      method: Network, loss and optimizer.
      axis: Mesh axis that shards the batch, inside `jax.shard_map`; every device gets the same result.
    """
    encoder = method.encoder
    # Under shard_map's own checks, JAX would sum the gradient of replicated parameters, which `sum_over_devices` does.
    params, frozen = sharding.vary_like((state.params, frozen), jax.tree.leaves(batch.inputs)[0])
    view_key, bit_key = fold_by_name(key, "views"), fold_by_name(key, "code bits")
    dropout_key = fold_by_name(key, "head dropout")

    def loss(params: Params) -> tuple[Array, Terms]:
        # v₁ = t₁(x), v₂ = t₂(x): two random views of every image. All first views come before all second ones, so that
        # one pass through the backbone reads its weights once.
        if isinstance(batch.inputs, tuple):
            features = jnp.concatenate(batch.inputs)
        elif method.micro_batch in (0, len(batch.inputs)):
            views = jnp.concatenate(encoder.two_views(view_key, batch.inputs, family=method.augment, axis=axis))
            features = encoder.features(params, frozen, views)
        else:  # the same features and gradients in less memory
            features = grad_cache.features_of_two_views(
                params,
                frozen,
                batch.inputs,
                view_key,
                encoder=encoder,
                micro_batch=method.micro_batch,
                family=method.augment,
                axis=axis,
            )
        if method.head_dropout:
            features = drop_features(dropout_key, features, method.head_dropout, axis)
        # f(v): the logits, with p = σ(f(v)) the probability that a bit is 1.
        logits1, logits2 = jnp.split(encoder.head(params, features), 2)
        # b ~ Bernoulli(p) with ∂b/∂p = 1, and L = L_contrast(b₁, b₂) + β · L_KL(p₁, p₂).
        return cib_loss(bit_key, logits1, logits2, coordinates=batch.coordinates, axis=axis, **method.loss_fields)

    # Each device differentiates its share of the loss. Codes are gathered from all devices, so that the gradient also
    # holds what these rows do to the other shares; the sum over devices is the gradient of the whole batch's loss.
    gradient, terms = sharding.sum_over_devices(jax.grad(loss, has_aux=True)(params), axis)
    with jax.numpy_dtype_promotion("standard"):  # optimizers count their steps in integers
        updates, opt_state = method.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    terms = terms | {"gradient_norm": optax.tree.norm(gradient)}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), terms


def drop_features(
    key: PRNGKeyArray, features: Float[Array, "views features"], rate: float, axis: Axis = None
) -> Float[Array, "views features"]:
    """Returns features of all first views, then of all second ones, with each set to 0 with probability `rate`.

    The others are divided by 1 − `rate`, so that the mean stays. Views lose features independently of each other.
    """
    shape = (len(features) // 2, 2, features.shape[1])  # by image, since devices share a batch by image
    kept = sharding.draw_sharded(lambda shape: jax.random.bernoulli(key, 1 - rate, shape), shape, axis)
    return jnp.where(kept.swapaxes(0, 1).reshape(features.shape), features / (1 - rate), 0.0)


@renamed_keywords(optimiser="optimizer")
@sharding.on_explicit_mesh(rows=False)
def train_step(
    state: TrainState,
    frozen: Params,
    images: UInt8[Array | np.ndarray, "batch height width 3"] | Float[Array | np.ndarray, "batch *views features"],
    key: PRNGKeyArray,
    *,
    coordinates: Float[Array, "batch dimensions"] | None = None,
    axis: Axis = None,
    **method: Any,
) -> tuple[TrainState, Terms]:
    """Returns the state after one batch of images, two fresh views of each, and the loss terms.

    The algorithm of CIBHash (https://arxiv.org/abs/2105.06138, section 3): views, logits, codes, contrast plus
    bottleneck, and a gradient that passes straight through the codes.

    Args:
      state: State before the step.
      frozen: Parameters that are not trained.
      images: RGB images, or features for the backbone "none".
      key: Random key of this step; it alone decides views and bits. Fold a root key with the number of the step.
      coordinates: Coordinates of the images on a diffusion map; for the objective "diffusion" only.
      axis: Mesh axis that shards the batch, inside `jax.shard_map`. `images` are then this device's rows; the result
        is that of the whole batch, on every device.
      **method: Fields of `Method`: `encoder` and `optimizer`, and where they differ from the defaults `objective`,
        `temperature` (the objective's), `beta` (0.001), `stochastic` (True), `sharpness` (6.0), `nested` (False),
        `augment` ("photo"), `micro_batch` (0) and `head_dropout` (0.0).

    Raises:
      ConfigError: A value is out of range, or `micro_batch` does not divide the images of a device.

    Examples:
      >>> import cib_jax as cib
      >>> import functools, jax, numpy as np, optax
      >>> encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
      >>> optimizer = optax.adam(1e-3)
      >>> step = jax.jit(functools.partial(cib.train_step, encoder=encoder, optimizer=optimizer, augment="digits"))
      >>> images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
      >>> state, terms = step(cib.create_train_state(params, optimizer), frozen, images, jax.random.key(1))
      >>> int(state.step), sorted(terms)
      (1, ['contrast', 'gradient_norm', 'kl', 'loss'])
    """
    batch = Batch(jnp.asarray(images), coordinates)
    return update(state, frozen, batch, key, Method(**method), axis)


@renamed_keywords(optimiser="optimizer")
@sharding.on_explicit_mesh(rows=False)
def train_step_on_features(
    state: TrainState,
    features1: Float[Array, "batch features"],
    features2: Float[Array, "batch features"],
    key: PRNGKeyArray,
    *,
    coordinates: Float[Array, "batch dimensions"] | None = None,
    axis: Axis = None,
    **method: Any,
) -> tuple[TrainState, Terms]:
    """Returns the state after one batch of features of two views, for a frozen backbone, and the loss terms.

    With the same key it draws the same bits as `train_step`, and drops the same features.

    Args:
      state: State before the step.
      features1: Features of the first views.
      features2: Features of the second views, in the same order of images.
      key: Random key of this step.
      coordinates: Coordinates of the images on a diffusion map; for the objective "diffusion" only.
      axis: Mesh axis that shards the batch, inside `jax.shard_map`.
      **method: Fields of `Method`, as for `train_step`; `augment` and `micro_batch` have no effect.

    Raises:
      ConfigError: A value is out of range.

    Examples:
      >>> import cib_jax as cib
      >>> import functools, jax, jax.numpy as jnp, numpy as np, optax
      >>> from cib_jax.augment.features import standard
      >>> features = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
      >>> made = {"backbone": "none", "bits": 16, "hidden": 32, "standard": standard([np.asarray(features)])}
      >>> encoder, params, _ = cib.create_encoder(jax.random.key(0), **made)
      >>> method = {"encoder": encoder, "optimizer": optax.adam(1e-3)}
      >>> step = jax.jit(functools.partial(cib.train_step_on_features, **method))
      >>> state = cib.create_train_state(params, method["optimizer"])
      >>> state, terms = step(state, features, features + 0.1, jax.random.key(1))
      >>> int(state.step), sorted(terms)
      (1, ['contrast', 'gradient_norm', 'kl', 'loss'])
    """
    batch = Batch((features1, features2), coordinates)
    return update(state, {}, batch, key, Method(**method), axis)

"""The state of a training run, an explicit pytree."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from cib_jax.distributed import sharding
from cib_jax.distributed.sharding import Axis
from cib_jax.losses import cib_loss
from cib_jax.models.encoder import Encoder, Params
from cib_jax.training import grad_cache


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands between two chunks of steps. With the config and the state, the rest of the run follows."""

    epoch: int = 0
    """Epochs finished; with the steps since, the data position, since order and views follow from seed, epoch, step."""
    step: int = 0
    """Steps done in all."""
    steps_of_epoch: int = 0
    """Steps done of the epoch that is not finished."""
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of each loss term over those steps."""
    best_step: int = 0
    """Step of the best validation so far; 0 before the first."""
    best_map: float = -1.0
    bad_validations: int = 0
    """Validations since the best one."""
    finished: bool = False
    seconds: float = 0.0
    """Training time so far, over all sessions."""


# training.state: The state of a training run, an explicit pytree.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. The frozen backbone is not in it: it is passed beside it and never saved twice.

    Examples:
      >>> import cib_jax as cib
      >>> import jax, optax
      >>> encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
      >>> state = cib.create_train_state(params, optax.adam(1e-3))
      >>> int(state.step), sorted(state.params)
      (0, ['backbone', 'head'])
    """

    step: Int[Array, ""]
    """Steps taken so far."""
    params: Params
    opt_state: optax.OptState


def create_train_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step.

    Examples:
      >>> import cib_jax as cib
      >>> import jax.numpy as jnp, optax
      >>> state = cib.create_train_state({"head": jnp.ones(3)}, optax.adam(1e-3))
      >>> int(state.step), state.params["head"].tolist()
      (0, [1.0, 1.0, 1.0])
    """
    # Copied, since a step donates its state: the caller's own parameters must outlive it.
    params = jax.tree.map(jnp.array, params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


# training.optimizer: The optimizer: Adam, with a learning rate for the head and one for the backbone.


def adam(learning_rate: float, backbone_learning_rate: float = 0.0) -> optax.GradientTransformation:
    """Returns Adam with a constant learning rate; the backbone's own, where it is given and another than the head's."""
    if backbone_learning_rate in (0, learning_rate):
        return optax.adam(learning_rate)
    rates = {"head": optax.adam(learning_rate), "backbone": optax.adam(backbone_learning_rate)}

    def labels(params: Params) -> dict[str, str]:
        return {name: "head" if name == "head" else "backbone" for name in params}

    return optax.partition(rates, labels)


# training.step: One step of training, as a pure function; `jax.jit` it with the state donated.


Terms = dict[str, Float[Array, ""]]
"""The loss and its parts, in nats, and the norm of the gradient."""


def train_step(
    state: TrainState,
    frozen: Params,
    images: UInt8[Array | np.ndarray, "batch height width 3"],
    key: PRNGKeyArray,
    *,
    encoder: Encoder,
    optimizer: optax.GradientTransformation,
    objective: str = "cibhash",
    temperature: float = 0.3,
    beta: float = 0.001,
    stochastic: bool = True,
    augment: str = "photo",
    micro_batch: int = 0,
    coordinates: Float[Array, "batch dimensions"] | None = None,
    sharpness: float = 6.0,
    axis: Axis = None,
) -> tuple[TrainState, Terms]:
    """Returns the state after one batch of images, two fresh views of each, and the loss terms.

    Algorithm of CIBHash (https://arxiv.org/abs/2105.06138, section 3): views, logits, codes, contrast plus bottleneck,
    gradient straight through the codes. `key` alone decides views and bits: fold the root key with the step's number.
    Inside `jax.shard_map`, `axis` names the mesh axis over which the batch is spread; the result is that of the whole
    batch on every device. With a `micro_batch`, that many of a device's images go through the backbone at a time, which
    takes less memory and a second pass, and comes to the same up to rounding; see `accumulation`. The objective
    "diffusion" needs the images' `coordinates` (`diffusion.coordinates`).

    Raises:
      PartsError: `micro_batch` is no divisor of the device's images, or the encoder takes features.

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
    view_key, code_key = jax.random.split(key)
    images = jnp.asarray(images)
    if micro_batch not in (0, len(images)):
        in_parts = functools.partial(
            grad_cache.features_of_two_views, encoder=encoder, micro_batch=micro_batch, family=augment, axis=axis
        )

        def logits(params: Params) -> Array:
            return encoder.head(params, in_parts(params, frozen, images, view_key))

    else:
        both = jnp.concatenate(encoder.two_views(view_key, images, family=augment, axis=axis))

        def logits(params: Params) -> Array:
            return encoder.logits(params, frozen, both)

    loss = functools.partial(
        cib_loss,
        code_key,
        objective=objective,
        temperature=temperature,
        beta=beta,
        stochastic=stochastic,
        coordinates=coordinates,
        sharpness=sharpness,
        axis=axis,
    )
    return _update(state, logits, loss, optimizer, axis)


def train_step_on_features(
    state: TrainState,
    features1: Float[Array, "batch features"],
    features2: Float[Array, "batch features"],
    key: PRNGKeyArray,
    *,
    encoder: Encoder,
    optimizer: optax.GradientTransformation,
    objective: str = "cibhash",
    temperature: float = 0.3,
    beta: float = 0.001,
    stochastic: bool = True,
    coordinates: Float[Array, "batch dimensions"] | None = None,
    sharpness: float = 6.0,
    axis: Axis = None,
) -> tuple[TrainState, Terms]:
    """Returns the state after one batch of two views' features, for a frozen backbone, and the loss terms.

    `key` and `axis` are those of `train_step`, and bits are drawn from the same part of the key.

    Examples:
      >>> import cib_jax as cib
      >>> import functools, jax, jax.numpy as jnp, numpy as np, optax
      >>> from cib_jax.augment import features as feature_views
      >>> features = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
      >>> made = {"backbone": "none", "bits": 16, "hidden": 32, "standard": feature_views.standard([features])}
      >>> encoder, params, _ = cib.create_encoder(jax.random.key(0), **made)
      >>> method = {"encoder": encoder, "optimizer": optax.adam(1e-3)}
      >>> step = jax.jit(functools.partial(cib.train_step_on_features, **method))
      >>> state = cib.create_train_state(params, method["optimizer"])
      >>> state, terms = step(state, features, features + 0.1, jax.random.key(1))
      >>> int(state.step), sorted(terms)
      (1, ['contrast', 'gradient_norm', 'kl', 'loss'])
    """
    _, code_key = jax.random.split(key)
    both = jnp.concatenate((features1, features2))

    def logits(params: Params) -> Array:
        return encoder.head(params, both)

    loss = functools.partial(
        cib_loss,
        code_key,
        objective=objective,
        temperature=temperature,
        beta=beta,
        stochastic=stochastic,
        coordinates=coordinates,
        sharpness=sharpness,
        axis=axis,
    )
    return _update(state, logits, loss, optimizer, axis)


def _update(
    state: TrainState,
    logits: Callable[[Params], Float[Array, "views bits"]],
    loss_of_logits: Callable[[Array, Array], tuple[Array, Terms]],
    optimizer: optax.GradientTransformation,
    axis: Axis,
) -> tuple[TrainState, Terms]:
    def loss(params: Params) -> tuple[Array, Terms]:
        # The first views, then the second: one pass reads the weights once.
        return loss_of_logits(*jnp.split(logits(params), 2))

    # Of this device's share of the loss; through the gathered codes, also of what they do to other devices' shares.
    gradients, terms = jax.grad(loss, has_aux=True)(state.params)
    gradients, terms = sharding.sum_over_devices((gradients, terms), axis)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    terms = terms | {"gradient_norm": optax.tree.norm(gradients)}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), terms

"""The state of a training run, an explicit pytree."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from cib_jax.encoder import Params


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


def create_train_state(params: Params, optimiser: optax.GradientTransformation) -> TrainState:
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
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimiser.init(params))

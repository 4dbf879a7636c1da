"""A small binary auto-encoder: codes from which the features can be told again, what CIBHash argues against."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from cib_jax.baselines import descent, fitting
from cib_jax.codes import sample_codes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    """Linear(features → hidden), ReLU, Linear(hidden → bits): the shape of CIBHash's own head."""

    mean: Float[Array, " features"]
    deviation: Float[Array, " features"]
    layers: dict[str, Array]

    def __call__(self, features: Float[Array, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns the logits of features."""
        return _two_layers(self.layers, "encode", (features - self.mean) / self.deviation)


def fit(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    *,
    hidden: int = 1024,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> Network:
    """Returns the encoder of an auto-encoder whose middle is a code.

    Standardised features → CIBHash's head → CIBHash's binary layer (bits drawn, gradient straight through) → a mirrored
    decoder; the loss is the mean squared error. The idea: Carreira-Perpiñán and Raziperchikolaei, Hashing with binary
    autoencoders, CVPR 2015; with drawn bits: Dai et al., Stochastic generative hashing, ICML 2017. Same width,
    optimiser, batch and epochs as CIBHash: they differ in what is asked of the code alone.

    Raises:
      ValueError: features or bits are malformed.
    """
    fitting.check(features, bits)
    start_key, descent_key = jax.random.split(key)
    mean = np.mean(features, axis=0, dtype=np.float64)
    deviation = np.std(features, axis=0, dtype=np.float64)
    deviation = np.where(deviation > 1e-6 * np.abs(mean), deviation, 1)
    centre, spread = jnp.asarray(mean, jnp.float32), jnp.asarray(deviation, jnp.float32)
    wide = features.shape[1]
    shapes = {
        "encode 1": (wide, hidden),
        "encode 2": (hidden, bits),
        "decode 1": (bits, hidden),
        "decode 2": (hidden, wide),
    }
    params = {}
    for number, (name, (inputs, outputs)) in enumerate(shapes.items()):
        bound = inputs**-0.5
        draw = jax.random.fold_in(start_key, number)
        params[name] = jax.random.uniform(draw, (inputs, outputs), jnp.float32, -bound, bound)
        params[f"{name} bias"] = jnp.zeros(outputs)

    def loss(params, batch, key):
        standardised = (batch - centre) / spread
        return reconstruction_loss(params, standardised, key)

    found = descent.minimise(
        params,
        loss,
        jnp.asarray(features, jnp.float32),
        descent_key,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    return Network(centre, spread, {name: array for name, array in found.items() if name.startswith("encode")})


def reconstruction_loss(
    params: dict[str, Array], standardised: Float[Array, "batch features"], key: PRNGKeyArray
) -> Float[Array, ""]:
    """Returns the mean squared error of features told from codes drawn with `key`."""
    codes = sample_codes(key, _two_layers(params, "encode", standardised))
    return jnp.mean(jnp.square(_two_layers(params, "decode", codes) - standardised))


def _two_layers(
    params: dict[str, Array], name: str, inputs: Float[Array, "batch inputs"]
) -> Float[Array, "batch outputs"]:
    middle = jax.nn.relu(inputs @ params[f"{name} 1"] + params[f"{name} 1 bias"])
    return middle @ params[f"{name} 2"] + params[f"{name} 2 bias"]

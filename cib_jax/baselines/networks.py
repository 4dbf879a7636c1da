"""Networks of the trained baselines: a linear head or two layers, and how they are optimized."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from cib_jax.baselines.linear import Hyperplanes, validate_features

Params = TypeVar("Params")
Items = TypeVar("Items")
Memory = TypeVar("Memory")

NORMALIZATION_EPSILON = 1e-5  # added to variances by a batch normalization, as in PyTorch


class Schedule(NamedTuple):
    """Settings of the optimization."""

    epochs: int
    batch_size: int
    learning_rate: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    """Encoder of two layers: Linear(features → hidden), ReLU, Linear(hidden → bits), as CIBHash's own head."""

    mean: Float[Array, " features"]
    deviation: Float[Array, " features"]
    layers: dict[str, Array]

    def __call__(self, features: Float[Array | np.ndarray, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns the logits of features."""
        return two_layers(self.layers, "encode", (features - self.mean) / self.deviation)


def two_layers(
    params: dict[str, Array], name: str, inputs: Float[Array | np.ndarray, "batch inputs"]
) -> Float[Array, "batch outputs"]:
    """Returns the outputs of the layers `name` 1 and `name` 2, with a ReLU between them."""
    middle = jax.nn.relu(inputs @ params[f"{name} 1"] + params[f"{name} 1 bias"])
    return middle @ params[f"{name} 2"] + params[f"{name} 2 bias"]


def fit_head(
    features: Float[np.ndarray, "n features"],
    bits: int,
    key: PRNGKeyArray,
    loss: Callable[[Float[Array, "batch bits"], Float[Array, "batch features"]], Float[Array, ""]],
    schedule: Schedule,
) -> Hyperplanes:
    """Returns a linear head trained by a loss of (logits, features).

    Features are centered and divided by their overall standard deviation, so that one learning rate suits every
    network. Cosines are those of centered features as well. The published code takes them from the origin, where the
    outputs of a ReLU all form acute angles, and codes that keep those angles share most bits. On CIFAR-10 with 32 bits,
    the MAP@1000 of GreedyHash's first term alone is 0.290 from the origin and 0.431 from the mean.
    """
    validate_features(features, bits)
    init_key, train_key = jax.random.split(key)
    mean = np.mean(features, axis=0, dtype=np.float64)
    # In float32, as in training: a float64 copy of all features could exceed the memory.
    centered = np.asarray(features, np.float32) - mean.astype(np.float32)
    scale = max(float(np.sqrt(np.mean([np.square(row).mean(dtype=np.float64) for row in centered]))), 1e-12)
    params = minimize(
        {"kernel": uniform(init_key, (features.shape[1], bits)), "bias": jnp.zeros(bits)},
        lambda params, batch, _: loss(batch @ params["kernel"] + params["bias"], batch),
        jnp.asarray(centered / np.float32(scale)),
        train_key,
        schedule,
    )
    return Hyperplanes(jnp.asarray(mean, jnp.float32), params["kernel"] / scale, params["bias"])


def fit_normalized(
    views: Float[np.ndarray, "views n features"],
    bits: int,
    key: PRNGKeyArray,
    loss: Callable[[Array, Array], Float[Array, ""]],
    schedule: Schedule,
) -> Network:
    """Returns a network of two layers and a batch normalization, which is made part of the last layer at the end.

    With several views, each step draws two of them, and the loss is one of their logits; with one, it is one of the
    logits and of the features, which are centered and divided by their overall standard deviation.
    """
    init_key, train_key = jax.random.split(key)
    count, width = len(views), views.shape[2]
    mean, scale = center_and_scale(views)
    shapes = {"encode 1": (width, width), "encode 2": (width, bits)}
    params = {"scale": jnp.ones(bits), "shift": jnp.zeros(bits)} | initial_layers(init_key, shapes, first=1)

    def normalized(params: dict[str, Array], rows: Array) -> Array:
        logits = two_layers(params, "encode", rows)
        deviation = jnp.sqrt(jnp.var(logits, axis=0) + NORMALIZATION_EPSILON)
        return params["scale"] * (logits - jnp.mean(logits, axis=0)) / deviation + params["shift"]

    def loss_of(params: dict[str, Array], rows: Float[Array, "batch views features"], key: PRNGKeyArray) -> Array:
        rows = (rows - mean) / scale
        if count == 1:
            return loss(normalized(params, rows[:, 0]), rows[:, 0])
        first, second = jax.random.choice(key, count, (2,), replace=False)
        return loss(normalized(params, rows[:, first]), normalized(params, rows[:, second]))

    items = jnp.asarray(np.swapaxes(views, 0, 1))
    params = minimize(params, loss_of, items, train_key, schedule)
    sums = [two_layers(params, "encode", (jnp.asarray(view, jnp.float32) - mean) / scale) for view in views]
    center = sum(jnp.mean(logits, axis=0) for logits in sums) / count
    variance = sum(jnp.mean(jnp.square(logits - center), axis=0) for logits in sums) / count
    factor = params.pop("scale") / jnp.sqrt(variance + NORMALIZATION_EPSILON)
    params["encode 2 bias"] = (params["encode 2 bias"] - center) * factor + params.pop("shift")
    params["encode 2"] = params["encode 2"] * factor
    return Network(mean, scale, params)


def center_and_scale(
    views: Float[np.ndarray, "views n features"],
) -> tuple[Float[Array, " features"], Float[Array, " features"]]:
    """Returns the mean of all rows, and their overall standard deviation once for each feature."""
    mean = np.asarray(np.mean(views, axis=(0, 1), dtype=np.float64), np.float32)
    square = [np.square(row.astype(np.float32) - mean).mean(dtype=np.float64) for view in views for row in view]
    return jnp.asarray(mean), jnp.full(views.shape[2], max(float(np.sqrt(np.mean(square))), 1e-12), jnp.float32)


def initial_layers(key: PRNGKeyArray, shapes: dict[str, tuple[int, int]], *, first: int = 0) -> dict[str, Array]:
    """Returns weights and a bias of zeros for each linear layer of `shapes`, whose keys are numbered from `first`."""
    params = {}
    for number, (name, shape) in enumerate(shapes.items(), first):
        params[name] = uniform(jax.random.fold_in(key, number), shape)
        params[f"{name} bias"] = jnp.zeros(shape[1])
    return params


def uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "inputs outputs"]:
    """Returns initial weights of a linear layer, uniform within ±1/√inputs."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def unit_rows(rows: Float[Array, "*rows numbers"]) -> Float[Array, "*rows numbers"]:
    """Returns rows of length 1; zeros stay."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def minimize(
    params: Params,
    loss: Callable[[Params, Items, PRNGKeyArray], Float[Array, ""]],
    items: Items,
    key: PRNGKeyArray,
    schedule: Schedule,
) -> Params:
    """Returns the parameters after `schedule.epochs` passes of Adam over the items, in an order that `key` decides.

    `items` is an array, or several, with a row for each item; the loss gets a batch of these rows. Rows that do not
    fill a batch are left out of an epoch. Fewer rows than `batch_size` make one batch.
    """

    def without_memory(params: Params, memory: None, rows: Items, key: PRNGKeyArray) -> tuple[Float[Array, ""], None]:
        return loss(params, rows, key), memory

    return minimize_with_memory(params, None, without_memory, items, key, schedule)


def minimize_with_memory(
    params: Params,
    memory: Memory,
    loss: Callable[[Params, Memory, Items, PRNGKeyArray], tuple[Float[Array, ""], Memory]],
    items: Items,
    key: PRNGKeyArray,
    schedule: Schedule,
) -> Params:
    """Returns parameters as `minimize` does, by a loss that also gets a memory, and returns it for the next step."""
    count = len(jax.tree.leaves(items)[0])
    batch = min(schedule.batch_size, count)
    steps = count // batch
    optimizer = optax.adam(schedule.learning_rate)

    @jax.jit
    def epoch(carry: Any, items: Items, number: int | Array) -> Any:
        order_key, noise_key = jax.random.split(jax.random.fold_in(key, number))
        order = jax.random.permutation(order_key, count)[: steps * batch].reshape(steps, batch)

        def step(carry: Any, inputs: tuple[Array, Array]) -> tuple[Any, None]:
            params, state, memory = carry
            rows, number = inputs
            chosen = jax.tree.map(lambda array: array[rows], items)
            noise = jax.random.fold_in(noise_key, number)
            gradient, memory = jax.grad(loss, has_aux=True)(params, memory, chosen, noise)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state, memory), None

        return jax.lax.scan(step, carry, (order, jnp.arange(steps)))[0]

    start = (params, optimizer.init(params), memory)
    return functools.reduce(lambda carry, number: epoch(carry, items, number), range(schedule.epochs), start)[0]

"""The trainer of `cib_jax.fit`, of `--mode=train` and of the encoder that an index learns.

A `TrainingRun` holds everything that decides the trained parameters. `train` has three stages: a teacher, if the
objective learns from one; the feed that suits the data; the loop of `train_step.update` over all epochs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float16, Float32, PRNGKeyArray, UInt8

from cib_jax.data import dataset
from cib_jax.data.dataset import Images
from cib_jax.losses import is_taught
from cib_jax.models.encoder import Params
from cib_jax.training import input_pipeline, loop
from cib_jax.training.input_pipeline import BatchOrder
from cib_jax.training.loop import Hooks, Schedule
from cib_jax.training.train_step import Method, Progress, TrainState, initial_state

Coordinates = Float32[np.ndarray, "images dimensions"]
"""Coordinates of the training images on the diffusion map of a teacher's embeddings."""


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Training images, or features, and how they reach the device."""

    images: UInt8[Array, "images height width 3"] | Float[Array, "items *views features"] | Images
    """Arrays of JAX stay on the device; anything else is streamed from the host, unless there is a view bank."""
    bank: Float16[Array, "views images features"] | None = None
    """Features of a few views of every image, computed once by a frozen backbone; None draws fresh views."""
    stored_size: int = 0  # side in pixels to which streamed images are resized on the host; 0 leaves them as they are
    seed: int = 0  # seed of the order in which the images are seen


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """Everything that decides the trained parameters."""

    method: Method
    params: Params  # parameters to train, before the first step
    frozen: Params
    data: TrainingData
    schedule: Schedule
    key: PRNGKeyArray  # root key of all steps
    mesh: Mesh | None = None  # devices that share each batch; None is one device

    @property
    def images_seen(self) -> int:
        """Number of images that all steps take, each counted in every epoch."""
        planned = self.schedule
        return planned.epochs * planned.steps_per_epoch(len(self.data.images)) * planned.batch_size


def train(
    run: TrainingRun,
    start: tuple[TrainState, Progress] | None = None,
    *,
    hooks: Hooks = Hooks(),  # noqa: B008 - it is immutable
    learn_coordinates: Callable[[], Coordinates] | None = None,
) -> tuple[TrainState, Progress]:
    """Trains to the end of the schedule, or until `hooks.stop`, and returns the last state.

    It continues from the state and progress `start`, if given; the state is donated. `learn_coordinates` trains a
    teacher and returns what it has learned, for an objective that needs one.
    """
    state, progress = start or (initial_state(run.params, run.method.optimizer, run.mesh), Progress())
    # 1. "diffusion" learns which images belong together from a teacher, which is trained before.
    coordinates = None
    if is_taught(run.method.objective):
        if learn_coordinates is None:
            raise ValueError(f"learn_coordinates must be given for the objective {run.method.objective!r}")
        coordinates = learn_coordinates()
    # 2. The data, as the steps take them: from a view bank, from images on the device, or streamed.
    data = run.data
    order = BatchOrder(data.seed, run.schedule.batch_size, coordinates, run.mesh, run.schedule.partial_batch)
    if data.bank is not None:
        feed = input_pipeline.from_bank(data.bank, run.method, order)
    elif isinstance(data.images, jax.Array):
        feed = input_pipeline.from_device(data.images, run.frozen, run.method, order)
    else:
        feed = input_pipeline.from_stream(data.images, run.frozen, run.method, order, stored_size=data.stored_size)
    # 3. All steps of all epochs.
    with hooks.during_steps():
        return loop.run(state, progress, feed=feed, key=run.key, schedule=run.schedule, hooks=hooks)


def load_if_small(images: Images, stored_size: int, max_bytes: int) -> Array | Images:
    """Returns the images as one array on the device if they take at most `max_bytes`, else as they are."""
    if dataset.size_in_bytes(images, stored_size=stored_size) > max_bytes:
        return images
    return jnp.asarray(dataset.materialize(images, stored_size=stored_size))

"""Training in memory, without files or a config: `cib_jax.fit`, and what an index learns its encoder with."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, PRNGKeyArray, UInt8

from cib_jax import diffusion
from cib_jax.augment import features as features_lib
from cib_jax.augment.features import Standard
from cib_jax.console import library_bar
from cib_jax.data import feature_files
from cib_jax.diffusion import Teacher
from cib_jax.distributed import sharding
from cib_jax.errors import ConfigError, DataError, whole_number
from cib_jax.inference.hasher import Hasher, as_array, initial_params
from cib_jax.losses import is_taught
from cib_jax.models.encoder import Params, create_encoder
from cib_jax.models.finetune import FineTune
from cib_jax.random_streams import stream_key
from cib_jax.training import grad_cache, input_pipeline, trainer
from cib_jax.training.input_pipeline import ImageBatches
from cib_jax.training.loop import EpochReport, Hooks, Schedule
from cib_jax.training.train_step import Method, adam
from cib_jax.training.trainer import Coordinates, TrainingData, TrainingRun

ENCODE_BATCH = 100  # images that a device encodes at once, as `encode_batch` in configs/default.py


def fit(
    images: UInt8[np.ndarray, "images height width 3"]
    | Sequence[UInt8[np.ndarray, "height width 3"]]
    | Float[np.ndarray, "items *views features"],
    *,
    bits: int = 32,
    backbone: str | None = None,
    backbone_params: Params | None = None,
    frozen: bool | None = None,
    fine_tune: FineTune = FineTune(),  # noqa: B008 - it is immutable
    image_size: int = 0,
    hidden: int = 1024,
    feature_noise: float = 0.7,
    feature_dropout: float = 0.3,
    teacher: Teacher = Teacher(),  # noqa: B008 - it is immutable
    epochs: int | None = None,
    batch_size: int | None = None,
    partial_batch: bool = False,
    learning_rate: float = 1e-3,
    optimizer: optax.GradientTransformation | None = None,
    views: int = 0,
    init_from: Hasher | None = None,
    devices: int = 0,
    seed: int = 0,
    on_views: Callable[[int], None] = lambda views: None,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
    progress: bool = True,
    **method: Any,
) -> Hasher:
    """Returns a hasher trained on `images`, without labels.

    It trains as `run.py` does: the same images, settings and seeds end with the same parameters, bit for bit. For
    checkpoints, logs and resuming use `run.py`, or `cib_jax.commands.train.train`.

    Args:
      images: RGB images of one size; or features of any model, one vector or several views per item.
      bits: Length of a code, from 1; packed codes are stored in whole bytes.
      backbone: "convnet" (trained from scratch), "none" for features, or a pretrained network of docs/backbones.md;
        None takes "none" for features [items, features] and "convnet" for images.
      backbone_params: Weights of a pretrained network: `cib_jax.load_pretrained(backbone)`.
      frozen: Whether the backbone is not trained; None freezes a pretrained one unless `fine_tune` asks for something.
      fine_tune: Part of the backbone that is trained, and its learning rate.
      image_size: Side of the network's input in pixels; 0 takes the backbone's usual one.
      hidden: Width of the hash head's hidden layer.
      feature_noise: Standard deviation of the noise in views of features, for `augment="noise"`.
      feature_dropout: Probability that a view of features lacks a feature, for `augment="noise"`.
      teacher: Settings of the teacher, for `objective="diffusion"`.
      epochs: Passes over the images; None takes 60, and for "diffusion" what follows from the number of images.
      batch_size: Images per step; None takes 64, or all where there are fewer, and for "diffusion" more of many images.
      partial_batch: Whether an epoch ends with a smaller batch of the images that are left over.
      learning_rate: Learning rate of Adam.
      optimizer: Optimizer in place of Adam: any of optax, with its own learning rate.
      views: Number of views per image of which a frozen backbone computes the features once; 0 draws fresh views at
        every step.
      init_from: Hasher of the same shapes, with whose weights training begins.
      devices: Number of devices of this machine that share each batch; 0 takes all.
      seed: Seed of everything random.
      on_views: Function that is called with the number of views computed since the last call.
      on_epoch: Function that is called after every epoch, those of a teacher included.
      progress: Whether to show progress bars in terminals and notebooks.
      **method: Settings of the objective and of the steps:
        objective: "naive_cl", "cl_hash", "cibhash" (the default) or "diffusion", which trains a teacher first; or a
          function, as for `cib_loss`.
        temperature: Temperature τ of the contrast; by default 0.3; that of "diffusion" follows from the data.
        beta: Weight β of the bottleneck; 0.001 by default.
        stochastic: Whether bits are drawn in training (the default) or thresholded.
        sharpness: Power of the ratio by which a walk links two images more often than chance, for "diffusion"; 6.0 by
          default.
        nested: Whether the first 16, 32, 64, … bits are to be codes, too, which `Hasher.cut` and `encode(bits=…)` give;
          False by default.
        augment: Family of views: "photo" (the default) or "digits" of images; "noise" (the default) or "stored" of
          features.
        micro_batch: Images of one device that go through the backbone at a time, for less memory; 0, the default,
          takes all at once.
        head_dropout: Probability that the head's input lacks a feature in training; by default 0.5 if a frozen backbone
          takes images, and 0 otherwise.

    Raises:
      ConfigError: A setting is out of range or does not go together with another one.
      DataError: The images or features cannot be used.
      NonFiniteLossError: The loss became NaN or infinite.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> features = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)  # of any model
      >>> hasher = cib.fit(features, bits=16, hidden=32, epochs=1)
      >>> hasher.encode(features).shape
      (64, 2)
    """
    if backbone is None:
        vectors = hasattr(images, "dtype") and np.ndim(as_array(images)) == 2
        backbone = "none" if vectors and jnp.issubdtype(as_array(images).dtype, jnp.floating) else "convnet"
    array, standard = _validate_images(images, on_features=backbone == "none")
    taught = is_taught(method.get("objective", ""))
    if taught:
        diffusion.validate_item_count(len(array))
    if standard is not None:
        method = {"augment": "noise"} | method
    _validate_schedule(len(array), epochs, batch_size, learning_rate, views)
    if taught:
        batch_size, epochs, teacher_epochs = diffusion.batches_and_epochs(len(array), batch_size or 0, epochs or 0)
    else:
        batch_size, epochs, teacher_epochs = batch_size or min(64, len(array)), epochs or 60, 0
    mesh = sharding.make_mesh(devices, batch_size)
    create = functools.partial(
        create_encoder,
        backbone=backbone,
        image_size=image_size,
        frozen=frozen,
        hidden=hidden,
        backbone_params=backbone_params,
        standard=standard,
        feature_noise=feature_noise,
        feature_dropout=feature_dropout,
        fine_tune=fine_tune,
    )
    encoder, params, unchanging = create(stream_key(seed, "initial weights"), bits=bits)
    if init_from is not None:
        params = initial_params(init_from, params, unchanging)
    if standard is None and params.keys() == {"head"}:
        method = {"head_dropout": 0.5} | method  # as in configs/_photos.py
    chosen = Method(encoder, optimizer or adam(float(learning_rate), float(fine_tune.learning_rate)), **method)
    grad_cache.validate_micro_batch(chosen.micro_batch, batch_size // sharding.mesh_size(mesh))
    if chosen.micro_batch and (views or standard is not None):
        problem = f"must be 0 where features are computed before training, got {chosen.micro_batch}"
        raise ConfigError(f"micro_batch {problem}", field="micro_batch")
    schedule = Schedule(epochs, batch_size, partial_batch=partial_batch)
    schedule.validate(len(array), sharding.mesh_size(mesh), chosen.micro_batch)
    if views and (params.keys() != {"head"} or standard is not None):
        raise ConfigError(f"views must be 0 unless a frozen backbone takes images, got {views}", field="views")
    with library_bar("Views", views * len(array), show=progress and views > 0) as advance:

        def after_views(count: int) -> None:
            advance(count)
            on_views(count)

        key = stream_key(seed, "view bank")
        data = load_data(array, chosen, unchanging, views, key, devices, after_views)
    data = dataclasses.replace(data, seed=seed)
    run = TrainingRun(chosen, params, unchanging, data, schedule, stream_key(seed, "steps"), mesh)
    teacher_run = None
    if taught:
        encoder, params, unchanging = create(stream_key(seed, "teacher weights"), bits=teacher.bits)
        objective, temperature = teacher.objective_for(chosen.augment), teacher.temperature
        # Its embeddings are used whole, so that they are not nested.
        own: dict[str, Any] = {"objective": objective, "temperature": temperature, "nested": False}
        theirs = dataclasses.replace(chosen, encoder=encoder, **own)
        schedule = dataclasses.replace(schedule, epochs=teacher.epochs or teacher_epochs)
        key = stream_key(seed, "teacher steps")
        teacher_run = TrainingRun(theirs, params, unchanging, data, schedule, key, mesh)
    total = run.images_seen + (teacher_run.images_seen if teacher_run else 0)
    with library_bar("Training", total, progress, "images" if standard is None else "items") as advance:
        return train_hasher(run, array, devices, on_epoch, advance, teacher, teacher_run)


def _validate_images(images: Any, *, on_features: bool) -> tuple[np.ndarray, Standard | None]:
    """Returns images, or features with their mean and deviation, as one array."""
    if not hasattr(images, "dtype") and len({np.shape(image) for image in images}) > 1:
        problem = "images must all have one size; resize them first, for example with PIL.Image.resize"
        raise DataError(problem, field="images")
    images = as_array(images)
    got = f"got {images.dtype} {list(images.shape)}"
    if not on_features:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
            problem = f"images must be uint8 [images, height, width, 3], {got}"
            remedy = "features of a model need floating point, and backbone='none' where a backbone is named"
            raise DataError(f"{problem}; {remedy}", field="images")
        return images, None
    if not jnp.issubdtype(images.dtype, jnp.floating) or images.ndim not in (2, 3) or 0 in images.shape:
        allowed = "floating point [items, features] or [items, views, features] for the backbone 'none'"
        raise DataError(f"images must be {allowed}, {got}", field="images")
    blocks = [images[start : start + 8192] for start in range(0, len(images), 8192)]
    if not all(np.isfinite(feature_files.as_float32(block)).all() for block in blocks):
        problem = "images must be finite, but some are NaN, infinite or beyond the range of float32"
        raise DataError(f"{problem}; remove those rows", field="images")
    return images, features_lib.standard(blocks)


def _validate_schedule(
    count: int, epochs: int | None, batch_size: int | None, learning_rate: float, views: int
) -> None:
    """Raises ConfigError if a number is not allowed; None stands for the default."""
    for name, number, least in (("epochs", epochs, 1), ("batch_size", batch_size, 2), ("views", views, 0)):
        if number is not None:
            whole_number(name, number, least, ConfigError)
    for valid, name, value, allowed in (
        (
            batch_size is None or batch_size <= count,
            "batch_size",
            batch_size,
            f"from 2 to the number of images, {count}",
        ),
        (views != 1, "views", views, "0 (fresh views at every step) or at least 2"),
        (learning_rate > 0, "learning_rate", learning_rate, "greater than 0"),
    ):
        if not valid:
            raise ConfigError(f"{name} must be {allowed}, got {value}", field=name)


def load_data(
    images: np.ndarray,
    method: Method,
    frozen: Params,
    views: int,
    key: PRNGKeyArray,
    devices: int,
    on_views: Callable[[int], None],
) -> TrainingData:
    """Returns images as a view bank of `views` views each, or on the device if `views` is 0."""
    if not views:
        return TrainingData(jnp.asarray(images))
    size = min(ENCODE_BATCH, len(images))
    batches = ImageBatches(
        lambda start, stop: (images[at : min(at + size, stop)] for at in range(start, stop, size)),
        len(images),
        size,
        sharding.local_mesh(devices),
    )
    bank = input_pipeline.build_view_bank(
        key, method.encoder, frozen, batches, views=views, family=method.augment, on_images=on_views
    )
    return TrainingData(images, bank)


def train_hasher(
    run: TrainingRun,
    images: np.ndarray,
    devices: int,
    on_epoch: Callable[[EpochReport], None],
    advance: Callable[[int, str], None],
    teacher: Teacher,
    teacher_run: TrainingRun | None = None,
) -> Hasher:
    """Returns the hasher of a run on images in memory; `teacher_run` is trained first if the objective needs it.

    `advance` is called with the number of images of the steps done since the last call, and with words about them.
    """

    def learn_coordinates() -> Coordinates:
        assert teacher_run is not None, "an objective that needs a teacher comes with its run"
        learned = train_hasher(teacher_run, images, devices, on_epoch, advance, teacher)
        if learned.params.keys() == {"head"}:
            size = 80 * ENCODE_BATCH
            blocks = (images[start : start + size] for start in range(0, len(images), size))
            both = (learned.logits_and_features(block, progress=False) for block in blocks)
            embeddings = diffusion.join_features(len(images), both)
        else:
            embeddings = learned.logits(images, progress=False)
        neighbors, cosines = teacher.neighbors(embeddings, lambda count: advance(0, "neighbors"))
        del embeddings  # gigabytes, of a million images
        return teacher.coordinates(neighbors, cosines, lambda: advance(0, "modes of the walk"))

    @contextlib.contextmanager
    def during_steps() -> Iterator[None]:
        advance(0, "compiling the first step")
        yield

    def on_steps(steps: int, terms: dict[str, float]) -> None:
        advance(steps * run.schedule.batch_size, f"loss {terms['loss']:.4f}")

    hooks = Hooks(on_steps=on_steps, on_epoch=lambda state, report: on_epoch(report), during_steps=during_steps)
    state, _ = trainer.train(run, hooks=hooks, learn_coordinates=learn_coordinates)
    return Hasher(run.method.encoder, sharding.to_local(state.params), run.frozen, ENCODE_BATCH, devices=devices)

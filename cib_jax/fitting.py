"""Training in one call, on images in memory: no files, no config."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray, UInt8

from cib_jax import diffusion
from cib_jax.augment import features as features_lib
from cib_jax.augment.augment import FAMILIES
from cib_jax.augment.features import Standard
from cib_jax.diffusion import Teacher
from cib_jax.distributed import sharding
from cib_jax.inference.hasher import Hasher
from cib_jax.losses import OBJECTIVES
from cib_jax.models import finetune
from cib_jax.models.encoder import Encoder, Params, create_encoder
from cib_jax.models.finetune import FineTune
from cib_jax.training import grad_cache, input_pipeline, loop, train_step
from cib_jax.training.train_step import Progress, create_train_state

ENCODE_BATCH = 100


def fit(
    images: UInt8[np.ndarray, "images height width 3"]
    | Sequence[UInt8[np.ndarray, "height width 3"]]
    | Float[np.ndarray, "items *views features"],
    *,
    bits: int = 32,
    backbone: str = "convnet",
    backbone_params: Params | None = None,
    frozen: bool | None = None,
    fine_tune: FineTune = FineTune(),  # noqa: B008 - it cannot be changed
    image_size: int = 0,
    hidden: int = 1024,
    objective: str = "cibhash",
    temperature: float = 0.3,
    beta: float = 0.001,
    stochastic: bool = True,
    sharpness: float = 6.0,
    teacher: Teacher = Teacher(),  # noqa: B008 - it cannot be changed
    augment: str = "photo",
    feature_noise: float = 0.7,
    feature_dropout: float = 0.3,
    epochs: int = 60,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    views: int = 0,
    micro_batch: int = 0,
    devices: int = 0,
    seed: int = 0,
    on_views: Callable[[int], None] = lambda views: None,
    on_epoch: Callable[[loop.EpochReport], None] = lambda report: None,
) -> Hasher:
    """Returns a hasher trained on `images`, without labels.

    The same steps as `run.py` takes; the same seed gives the same bits. For checkpoints, logs and resuming use
    `cib_jax.commands.train.train`.

    Args:
      images: in RGB, all of one size; or, with the backbone "none", features of any model, a vector or several views of
        one per item.
      bits: the length of a code, a multiple of 8.
      backbone: "convnet" (from scratch), "none" for features, or a network of docs/backbones.md with weights.
      backbone_params: for the last, `cib_jax.load_pretrained(backbone)`.
      frozen: see `create_encoder`.
      fine_tune: which part of a backbone that is not frozen learns, and how.
      image_size: side of the network's input in pixels; 0 takes the backbone's usual one.
      hidden: width of the hash head's hidden layer.
      objective: "naive_cl", "cl_hash", "cibhash" or "diffusion", for which a teacher is trained first.
      temperature: τ of the contrast.
      beta: β, the weight of the bottleneck.
      stochastic: whether bits are drawn in training.
      sharpness: for "diffusion", see `diffusion_match`.
      teacher: for "diffusion", see `Teacher`.
      augment: the family of views, "photo" or "digits"; of features "noise" or "stored".
      feature_noise: see `feature_views.two_views`.
      feature_dropout: the same.
      epochs: passes over the images.
      batch_size: images per step.
      learning_rate: of Adam; the backbone's own is in `fine_tune`.
      views: computes the features of this many views per image once, for a frozen backbone; 0 draws fresh ones.
      micro_batch: images of one device that go through the backbone at a time, for less memory; 0: all of them.
      devices: of this machine that share each batch; 0: all.
      seed: of everything random.
      on_views: told how many more of the `views` are done.
      on_epoch: told of each epoch's end, of the teacher's first.

    Raises:
      ValueError: a value is out of range, there are fewer images than `batch_size`, or a batch cannot be spread evenly
        over the devices or cut evenly into parts.
      FineTuneError: `fine_tune` does not go with the backbone.
      NonFiniteLossError: the loss became NaN or infinite.

    Examples:
      >>> import cib_jax as cib
      >>> import numpy as np
      >>> features = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)  # of any model
      >>> hasher = cib.fit(features, backbone="none", augment="noise", bits=16, hidden=32, epochs=1)
      >>> hasher.encode(features).shape
      (64, 2)
    """
    if not hasattr(images, "dtype") and len({np.shape(image) for image in images}) > 1:
        raise ValueError("images: they are of several sizes; resize them to one first, for example with PIL")
    images = np.asarray(images)
    standard = _standard(images) if backbone == "none" else None
    if standard is None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3):
        raise ValueError(f"images: wanted uint8 [images, height, width, 3], got {images.dtype} {list(images.shape)}")
    if not 2 <= batch_size <= len(images):
        raise ValueError(f"batch_size: {batch_size} must be from 2 to the number of images, {len(images)}")
    if views == 1 or views < 0:
        raise ValueError(f"views: {views} must be 0 (fresh views at every step) or at least 2")
    for name, value in (("temperature", temperature), ("learning_rate", learning_rate), ("sharpness", sharpness)):
        if not value > 0:
            raise ValueError(f"{name}: {value} must be greater than 0")
    if epochs < 1:
        raise ValueError(f"epochs: {epochs} must be 1 or more")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: {objective!r} is not one of {', '.join(OBJECTIVES)}")
    if OBJECTIVES[objective].taught:
        teacher.check(len(images))
    families = FAMILIES if standard is None else features_lib.FAMILIES
    if augment not in families:
        raise ValueError(f"augment: {augment!r} is not one of {', '.join(families)}")
    mesh = sharding.make_mesh(devices, batch_size)
    grad_cache.validate_micro_batch(micro_batch, batch_size // sharding.mesh_size(mesh))
    if micro_batch and (views or standard is not None):
        raise ValueError(f"micro_batch: {micro_batch} images at a time save nothing where features train; set it to 0")
    init_key, bank_key, step_key = jax.random.split(jax.random.key(seed), 3)
    bank = resident = None

    def train(
        init_key: PRNGKeyArray, bits: int, epochs: int, coordinates: np.ndarray | None, **method: Any
    ) -> tuple[Encoder, Params, Params]:
        """Trains a head of so many bits, and a backbone that learns; the view bank is made once for all."""
        nonlocal bank, resident
        encoder, params, unchanging = create_encoder(
            init_key,
            backbone=backbone,
            bits=bits,
            image_size=image_size,
            frozen=frozen,
            hidden=hidden,
            backbone_params=backbone_params,
            standard=standard,
            feature_noise=feature_noise,
            feature_dropout=feature_dropout,
            fine_tune=fine_tune,
        )
        adam = train_step.adam(learning_rate, fine_tune.learning_rate)
        method |= {"encoder": encoder, "optimizer": adam, "beta": beta, "stochastic": stochastic}
        order: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "mesh": mesh, "coordinates": coordinates}
        if views:
            if finetune.features_learn(params) or standard is not None:
                raise ValueError(f"views: {views} views are computed once only of a frozen backbone; set it to 0")
            size = min(ENCODE_BATCH, len(images))
            if bank is None:
                bank = input_pipeline.build_view_bank(
                    bank_key,
                    encoder,
                    unchanging,
                    lambda start, stop: (images[at : min(at + size, stop)] for at in range(start, stop, size)),
                    count=len(images),
                    batch_size=size,
                    views=views,
                    family=augment,
                    on_images=on_views,
                    over=sharding.local_mesh(devices),
                )
            fed = input_pipeline.from_bank(bank, method=method, **order)
        else:
            resident = jnp.asarray(images) if resident is None else resident
            method |= {"augment": augment, "micro_batch": micro_batch}
            fed = input_pipeline.from_device(resident, unchanging, method=method, **order)
        state, _ = loop.run(
            create_train_state(params, adam),
            Progress(),
            steps=fed.steps,
            epoch_chunks=fed.epoch_chunks,
            key=step_key,
            epochs=epochs,
            batch_size=batch_size,
            on_epoch=lambda state, report: on_epoch(report),
        )
        return encoder, sharding.to_local(state.params), unchanging

    coordinates = None
    if OBJECTIVES[objective].taught:
        own_key, passes = jax.random.fold_in(init_key, 1), teacher.epochs or epochs
        taught_by = train(own_key, teacher.bits, passes, None, **teacher.method)
        embeddings = Hasher(*taught_by, ENCODE_BATCH, devices=devices).logits(images)
        coordinates = diffusion.coordinates(embeddings, **teacher.walk)
    trained = train(
        init_key, bits, epochs, coordinates, objective=objective, temperature=temperature, sharpness=sharpness
    )
    return Hasher(*trained, ENCODE_BATCH, devices=devices)


def _standard(features: np.ndarray) -> Standard:
    """Returns mean and deviation of features, which it checks."""
    if features.dtype.kind != "f" or features.ndim not in (2, 3) or 0 in features.shape:
        raise ValueError(
            f"images: with the backbone 'none' wanted features [items, features] or [items, views, features] in "
            f"floating point, got {features.dtype} {list(features.shape)}"
        )
    blocks = [features[start : start + 8192] for start in range(0, len(features), 8192)]
    if not all(np.isfinite(block).all() for block in blocks):
        raise ValueError("images: the features hold values that are not finite; remove those rows")
    return features_lib.standard(blocks)

"""The encoder, images → logits: a backbone and the hash head as pure functions, and the compiled encoding programs."""

import dataclasses
import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int8, PRNGKeyArray, Shaped, UInt8

from cib_jax import codes
from cib_jax.augment import augment
from cib_jax.augment.features import Features, Standard, plain, two_views
from cib_jax.distributed import sharding
from cib_jax.distributed.sharding import Axis
from cib_jax.errors import ConfigError, WeightsError
from cib_jax.models import finetune, registry
from cib_jax.models.conv import ShapesOnly
from cib_jax.models.finetune import FineTune
from cib_jax.random_streams import fold_by_name

Params = dict[str, Any]
"""A pytree of arrays. Parameters to train have the part "head" and, if the backbone is trained, "backbone" (its trained
blocks) or "lora" (their low-rank corrections). Frozen ones have the part "backbone": the rest of it."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
AUTO = "auto"
"""In place of a dtype: bfloat16 for a frozen backbone on a device with units for it, float32 otherwise."""


class HashHead(nnx.Module):
    """Linear(features → hidden), ReLU, Linear(hidden → bits): the hash head of CIBHash (section 4.2)."""

    def __init__(self, features: int, hidden: int, bits: int, *, rngs: nnx.Rngs):
        self.hidden = _linear(features, hidden, rngs)
        self.out = _linear(hidden, bits, rngs)

    def __call__(self, features: Float[Array, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns one logit per bit."""
        return self.out(nnx.relu(self.hidden(features)))


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    # Weights and bias from U(−1/√inputs, 1/√inputs), as in the published code (the default of torch.nn.Linear):
    # with larger ones, the first codes would be nearly deterministic.
    bound = inputs**-0.5

    def uniform(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(inputs, outputs, kernel_init=uniform, bias_init=uniform, rngs=rngs)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Pure functions of a network. It holds no parameters, so that it can be closed over or be a static argument.

    Encoders are compared by identity: hashing the graph of a deep network at every call would take milliseconds.
    `create_encoder` returns the same object for the same network, so that both share their compiled programs.

    Examples:
      >>> import cib_jax as cib
      >>> import jax, numpy as np
      >>> encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
      >>> views = cib.resize_and_normalize(np.zeros((2, 16, 16, 3), np.uint8), image_size=16)
      >>> jax.jit(encoder.logits)(params, frozen, views).shape
      (2, 16)
    """

    backbone: registry.Backbone
    bits: int
    image_size: int
    backbone_graph: nnx.GraphDef[Any]
    head_graph: nnx.GraphDef[Any]
    backbone_dtype: str = "float32"
    """Type in which the backbone computes. Trained parameters and features are always float32."""
    feature_noise: float = 0.0
    """Standard deviation of the noise in views of features."""
    feature_dropout: float = 0.0
    """Probability that a view of features lacks a feature."""
    lora_scale: float = 0.0
    """Factor of the low-rank corrections of the backbone's kernels, if there are any."""
    checkpointing: bool = False
    """Whether a block is recomputed for its gradient, for less memory."""

    def __repr__(self) -> str:
        """Returns one line: the graph of a deep network would fill pages."""
        taken = f"{self.backbone.features} features" if self.backbone.takes == "features" else f"{self.image_size} px"
        return f"Encoder({self.backbone.name}, {taken} → {self.bits} bits)"

    def preprocess(self, images: augment.Images | Features) -> Float[Array, "batch ..."]:
        """Returns the images as at test time, resized and normalized for the backbone; features are standardized."""
        if self.backbone.takes == "features":
            return plain(images, self.backbone.mean, self.backbone.deviation)
        return augment.resize_and_normalize(images, **self._size_and_scale)

    @property
    def _size_and_scale(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "mean": self.backbone.mean, "deviation": self.backbone.deviation}

    def two_views(
        self,
        key: PRNGKeyArray,
        images: augment.Images | Features,
        *,
        family: str = "photo",
        axis: Axis = None,
    ) -> tuple[Float[Array, "batch ..."], Float[Array, "batch ..."]]:
        """Returns two random views of every image, or item, resized and normalized for the backbone.

        Args:
          key: Random key of the views.
          images: Images, or features; with an `axis`, this device's rows of the batch.
          family: Family of the views.
          axis: Mesh axis that shards the batch; None if it is not sharded.
        """
        if self.backbone.takes == "features":
            return two_views(
                key,
                images,
                self.backbone.mean,
                self.backbone.deviation,
                family=family,
                noise=self.feature_noise,
                dropout=self.feature_dropout,
                axis=axis,
            )
        return augment.two_views(key, images, family=family, axis=axis, **self._size_and_scale)

    def view_each(
        self, keys: augment.ImageKeys, images: UInt8[Array, "batch height width 3"], *, family: str = "photo"
    ) -> Float[Array, "batch image_size image_size 3"]:
        """Returns one random view of every image, each drawn by its own key of `keys`."""
        return augment.view_each(keys, images, family=family, **self._size_and_scale)

    def features(
        self, params: Params, frozen: Params, views: Float[Array, "batch ..."]
    ) -> Float[Array, "batch features"]:
        """Returns the backbone's features of normalized views."""
        if self.backbone.takes == "features":
            return views
        dtype = DTYPES[self.backbone_dtype]
        if params.keys() <= {"head"}:
            state = frozen["backbone"]
        else:  # some or all of the backbone is trained, or low-rank corrections of it
            state = finetune.backbone_state(params, frozen, self.lora_scale)
        network = nnx.merge(self.backbone_graph, _cast(state, dtype))
        if self.checkpointing:
            finetune.checkpoint_blocks(network)
        # The head, the loss and the optimizer compute in float32, whatever the backbone's type.
        return network(views.astype(dtype)).astype(jnp.float32)

    def head(self, params: Params, features: Float[Array, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns the hash head's logits of features."""
        return nnx.merge(self.head_graph, params["head"])(features)

    def logits(self, params: Params, frozen: Params, views: Float[Array, "batch ..."]) -> Float[Array, "batch bits"]:
        """Returns one logit per bit of normalized views."""
        return self.head(params, self.features(params, frozen, views))


_ENCODERS: "weakref.WeakValueDictionary[tuple[Any, ...], Encoder]" = weakref.WeakValueDictionary()
"""The encoders in use by what they are made of: the registered backbone, the statistics of features, the numbers."""


def _cast(state: Params, dtype: jax.typing.DTypeLike) -> Params:
    return jax.tree.map(lambda array: array.astype(dtype), state)


def create_encoder(
    key: PRNGKeyArray,
    *,
    backbone: str,
    bits: int,
    image_size: int = 0,
    frozen: bool | None = None,
    hidden: int = 1024,
    backbone_params: Params | None = None,
    pretrained: bool = True,
    backbone_dtype: str = AUTO,
    standard: Standard | None = None,
    feature_noise: float = 0.0,
    feature_dropout: float = 0.0,
    fine_tune: FineTune = FineTune(),  # noqa: B008 - it is immutable
) -> tuple[Encoder, Params, Params]:
    """Returns an encoder, its parameters to train, and its frozen ones.

    Args:
      key: Random key of the initial weights.
      backbone: Name of a network in `cib_jax.models.registry.BACKBONES`.
      bits: Length of a code, from 1; packed codes are stored in whole bytes.
      image_size: Side of the square input in pixels; 0 takes the backbone's usual one.
      frozen: Whether the backbone is not trained; None freezes one with pretrained weights, unless `fine_tune` asks for
        something.
      hidden: Width of the hash head's hidden layer.
      backbone_params: Weights of the backbone: `cib_jax.load_pretrained(backbone)`.
      pretrained: Whether a backbone that has pretrained weights starts from these; False starts from random ones.
      backbone_dtype: "float32", or "bfloat16" for less memory and, on accelerators, less time; "auto" takes bfloat16
        for a frozen backbone on a device with units for it (TPUs, and NVIDIA's GPUs from Ampere on).
      standard: Mean and deviation of the features (`cib_jax.augment.features.standard`), for the backbone "none".
      feature_noise: Standard deviation of the noise in views of features.
      feature_dropout: Probability that a view of features lacks a feature.
      fine_tune: Part of the backbone that is trained; its learning rate is a matter of the optimizer.

    Raises:
      ConfigError: A value is out of range, or does not go together with the backbone.
      WeightsError: `backbone_params` are missing, or do not fit the network.

    Examples:
      >>> import cib_jax as cib
      >>> import jax
      >>> encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
      >>> encoder.bits, sorted(params), frozen  # a network from scratch learns whole
      (16, ['backbone', 'head'], {})
    """
    chosen = registered = registry.get(backbone)
    on_features = chosen.takes == "features"
    if on_features != (standard is not None):
        problem = f"must be given for the backbone 'none', and for no other, got the backbone {backbone!r}"
        raise _error("standard", f"{problem}; cib_jax.augment.features.standard computes it")
    if standard is not None:
        mean, deviation = tuple(standard.mean.tolist()), tuple(standard.deviation.tolist())
        chosen = dataclasses.replace(chosen, features=len(mean), mean=mean, deviation=deviation)
    size = image_size or chosen.image_size
    has_pretrained = chosen.convert is not None
    for name, value in (("bits", bits), ("hidden", hidden)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise _error(name, f"must be a whole number, 1 or more, got {value!r}")
    if size < chosen.smallest or size % chosen.multiple:
        allowed = f"at least {chosen.smallest} and a multiple of {chosen.multiple} for {backbone}"
        raise _error("image_size", f"must be {allowed}, got {size}")
    if backbone_dtype not in (AUTO, *DTYPES):
        raise _error("backbone_dtype", f"must be one of {', '.join((AUTO, *DTYPES))}, got {backbone_dtype!r}")
    if frozen and backbone_params is None and not has_pretrained and not on_features:
        raise _error("frozen", f"must be False for {backbone}, which starts from random weights, got True")
    if has_pretrained and pretrained and backbone_params is None:
        raise WeightsError(
            f"backbone_params must be cib_jax.load_pretrained({backbone!r}) for {backbone}; or give pretrained=False "
            "to start from random weights",
            field="backbone_params",
        )
    if frozen is None:
        frozen = on_features or (has_pretrained and not fine_tune.asked)
    if backbone_dtype == AUTO:
        backbone_dtype = default_dtype(frozen and not on_features)
    if fine_tune != FineTune():
        finetune.validate_fine_tune(fine_tune, chosen, size, frozen=frozen, from_scratch=backbone_params is None)
    backbone_key, head_key, lora_key = (fold_by_name(key, part) for part in ("backbone", "head", "lora"))
    graph, state = _split_backbone(chosen, size, backbone_key, backbone_params)
    head_graph, head = nnx.split(HashHead(chosen.features, hidden, bits, rngs=nnx.Rngs(head_key)))
    numbers: dict[str, Any] = {
        "bits": bits,
        "image_size": size,
        "backbone_dtype": backbone_dtype,
        "feature_noise": feature_noise,
        "feature_dropout": feature_dropout,
        "lora_scale": fine_tune.lora_alpha / fine_tune.lora_rank if fine_tune.lora_rank else 0.0,
        "checkpointing": fine_tune.checkpointing,
    }
    # The registered backbone is known by its id: an entry lives no longer than its encoder, which holds the backbone.
    made_of = (id(registered), standard and (chosen.mean, chosen.deviation), hidden, *numbers.values())
    if (encoder := _ENCODERS.get(made_of)) is None:
        encoder = _ENCODERS[made_of] = Encoder(chosen, backbone_graph=graph, head_graph=head_graph, **numbers)
    head_params = {"head": nnx.to_pure_dict(head)}
    if on_features:
        return encoder, head_params, {}
    trained: Params = {}
    unchanging: Params = {"backbone": state}
    if not frozen:
        trained, unchanging = finetune.create_parts(lora_key, fine_tune, chosen, size, state)
    # Frozen parameters are cast here, once, so that no float32 copy of them is kept.
    return encoder, head_params | trained, _cast(unchanging, DTYPES[backbone_dtype])


def cut_encoder(encoder: Encoder, params: Params, bits: int) -> tuple[Encoder, Params]:
    """Returns the encoder, and the parameters, of the first `bits` bits of an encoder's codes."""
    head = params["head"]
    width, features = head["hidden"]["kernel"].shape[1], encoder.backbone.features
    graph, _ = nnx.split(nnx.eval_shape(lambda: HashHead(features, width, bits, rngs=nnx.Rngs(0))))
    out = {name: array[..., :bits] for name, array in head["out"].items()}
    return dataclasses.replace(encoder, bits=bits, head_graph=graph), params | {"head": head | {"out": out}}


def default_dtype(frozen: bool, device: Any = None) -> str:
    """Returns the dtype for which "auto" stands, by default on the first device.

    Devices without units for bfloat16 convert it to float32 and back at every operation.
    """
    device = device or jax.devices()[0]
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]  # "8" for 8.6; NVIDIA's GPUs only
    has_units = device.platform == "tpu" or (generation.isdigit() and int(generation) >= 8)
    return "bfloat16" if frozen and has_units else "float32"


def _error(field: str, problem: str) -> ConfigError:
    return ConfigError(f"{field} {problem}", field=field)


def _split_backbone(
    chosen: registry.Backbone, size: int, key: PRNGKeyArray, loaded: Params | None
) -> tuple[nnx.GraphDef[Any], Params]:
    if loaded is None:
        graph, state = nnx.split(chosen.build(nnx.Rngs(key), size))
        return graph, nnx.to_pure_dict(state)
    # Shapes only: drawing VGG's 134 million random weights, to discard them, would take seconds.
    graph, state = nnx.split(nnx.eval_shape(lambda: chosen.build(ShapesOnly(key), size)))
    expected, given = jax.tree.map(jnp.shape, nnx.to_pure_dict(state)), jax.tree.map(jnp.shape, loaded)
    if expected != given:
        raise WeightsError(
            f"backbone_params must have the shapes {expected} for {chosen.name}, got {given}; give "
            f"cib_jax.load_pretrained({chosen.name!r})",
            field="backbone_params",
        )
    return graph, jax.tree.map(jnp.asarray, loaded)


# Encoding at test time. Features and codes are two programs and not one, so that codes are the same to the last bit
# whether the features were computed just now or read from a cache.


@functools.partial(jax.jit, static_argnums=(0, 4))
def plain_features(
    encoder: Encoder, params: Params, frozen: Params, images: Shaped[Array, "batch ..."], over: Mesh | None = None
) -> Float[Array, "batch features"]:
    """Returns the backbone's features of unaugmented images, computed in parallel on the devices of the mesh `over`."""

    def features(both: tuple[Params, Params], images: Array) -> Array:
        return encoder.features(*both, encoder.preprocess(images))

    return sharding.shard_rows(features, over)((params, frozen), images)


@functools.partial(jax.jit, static_argnums=(0, 3))
def packed_of_features(
    encoder: Encoder, params: Params, features: Float[Array, "batch features"], over: Mesh | None = None
) -> UInt8[Array, "batch bytes"]:
    """Returns the packed codes of features, computed in parallel on the devices of the mesh `over`."""
    return sharding.shard_rows(lambda params, rows: codes.pack_bits(encoder.head(params, rows)), over)(params, features)


@functools.partial(jax.jit, static_argnums=(0, 3))
def logits_of_features(
    encoder: Encoder, params: Params, features: Float[Array, "batch features"], over: Mesh | None = None
) -> Float[Array, "batch bits"]:
    """Returns the logits of features, computed in parallel on the devices of the mesh `over`."""
    return sharding.shard_rows(encoder.head, over)(params, features)


@jax.jit
def quantize(features: Float[Array, "batch features"]) -> Int8[Array, "batch features"]:
    """Returns features as whole numbers from −127 to 127, scaled by the largest of each row.

    The cosine of two rows stays within about 0.01: the rounding errors of many numbers cancel.
    """
    largest = jnp.abs(features).max(axis=1, keepdims=True)
    return jnp.round(features * (127 / jnp.where(largest > 0, largest, 1))).astype(jnp.int8)

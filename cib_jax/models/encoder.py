"""An encoder, images → logits: a backbone and the hash head, split once into pure functions and their parameters."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, Shaped, UInt8

from cib_jax import codes
from cib_jax.augment import augment
from cib_jax.augment.features import Standard, plain, two_views
from cib_jax.distributed import sharding
from cib_jax.distributed.sharding import Axis
from cib_jax.models import finetune, registry
from cib_jax.models.finetune import FineTune

# encoder: An encoder, images → logits: a backbone and the hash head, split once into pure functions and their parameters.


Params = dict[str, Any]
"""A pytree of arrays. Of what training changes: "head" and, where the backbone learns too, "backbone" (its blocks that
learn) or "lora" (their corrections). Of the rest: "backbone", what stays of it."""


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
    # a larger start makes the first codes nearly deterministic.
    bound = inputs**-0.5

    def uniform(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(inputs, outputs, kernel_init=uniform, bias_init=uniform, rngs=rngs)


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Pure functions of a network; it holds no parameters, so it can be closed over or passed as a static argument.

    Two encoders are equal only if they are one: hashing a deep network's graph at every call would cost milliseconds.

    Examples:
      >>> import cib_jax as cib
      >>> import jax, numpy as np
      >>> encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
      >>> views = cib.resize_and_normalize(np.zeros((2, 16, 16, 3), np.uint8), image_size=16)
      >>> encoder.logits(params, frozen, views).shape
      (2, 16)
    """

    backbone: registry.Backbone
    bits: int
    image_size: int
    backbone_graph: nnx.GraphDef[Any]
    head_graph: nnx.GraphDef[Any]
    backbone_dtype: str = "float32"
    """In what the backbone computes; its parameters, where they are trained, and its features stay float32."""
    feature_noise: float = 0.0
    """Of the views of features, see `feature_views.two_views`; unused where the backbone takes images."""
    feature_dropout: float = 0.0
    lora_scale: float = 0.0
    """By which corrections of the backbone's kernels are multiplied, where there are any."""
    checkpointing: bool = False
    """See `FineTune`."""

    def preprocess(
        self, images: UInt8[Array, "batch height width 3"] | Float[Array, "batch *views features"]
    ) -> Float[Array, "batch ..."]:
        """Returns the images as at test time: resized to the input size and normalized for the backbone.

        Where the backbone takes features: standardised.
        """
        if self.backbone.takes == "features":
            return plain(images, self.backbone.mean, self.backbone.deviation)
        return augment.resize_and_normalize(
            images, image_size=self.image_size, mean=self.backbone.mean, deviation=self.backbone.deviation
        )

    def two_views(
        self,
        key: PRNGKeyArray,
        images: UInt8[Array, "batch height width 3"] | Float[Array, "batch *views features"],
        *,
        family: str = "photo",
        axis: Axis = None,
    ) -> tuple[Float[Array, "batch ..."], Float[Array, "batch ..."]]:
        """Returns two augmented views of every image, or item, of this encoder's size and normalization.

        With an `axis` (see `spread`), of this device's rows of the batch.
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
        return augment.two_views(
            key,
            images,
            image_size=self.image_size,
            family=family,
            mean=self.backbone.mean,
            deviation=self.backbone.deviation,
            axis=axis,
        )

    def view_each(
        self, keys: PRNGKeyArray, images: UInt8[Array, "batch height width 3"], *, family: str = "photo"
    ) -> Float[Array, "batch image_size image_size 3"]:
        """Returns one augmented view of every image, each drawn by its own key of `keys`."""
        return augment.view_each(
            keys,
            images,
            image_size=self.image_size,
            family=family,
            mean=self.backbone.mean,
            deviation=self.backbone.deviation,
        )

    def features(
        self, params: Params, frozen: Params, views: Float[Array, "batch ..."]
    ) -> Float[Array, "batch features"]:
        """Returns the backbone's features of normalized views."""
        if self.backbone.takes == "features":
            return views
        dtype = DTYPES[self.backbone_dtype]
        state = _cast(finetune.backbone_state(params, frozen, self.lora_scale), dtype)
        network = nnx.merge(self.backbone_graph, state)
        if self.checkpointing:
            finetune.checkpoint_blocks(network)
        return network(views.astype(dtype)).astype(jnp.float32)

    def head(self, params: Params, features: Float[Array, "batch features"]) -> Float[Array, "batch bits"]:
        """Returns the hash head's logits of features."""
        return nnx.merge(self.head_graph, params["head"])(features)

    def logits(self, params: Params, frozen: Params, views: Float[Array, "batch ..."]) -> Float[Array, "batch bits"]:
        """Returns one logit per bit of normalized views."""
        return self.head(params, self.features(params, frozen, views))


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
    backbone_dtype: str = "float32",
    standard: Standard | None = None,
    feature_noise: float = 0.0,
    feature_dropout: float = 0.0,
    fine_tune: FineTune = FineTune(),  # noqa: B008 - it cannot be changed
) -> tuple[Encoder, Params, Params]:
    """Returns an encoder, the parameters that training changes, and those that it leaves alone.

    Args:
      key: a random key, for what is not loaded.
      backbone: a name out of `cib_jax.models.registry.BACKBONES`.
      bits: the length of a code, a multiple of 8.
      image_size: side of the square input in pixels; 0 takes the backbone's usual size.
      frozen: whether the backbone stays as it is; by default it does if it comes with pretrained weights and
        `fine_tune` asks for nothing.
      hidden: width of the hash head's hidden layer.
      backbone_params: the backbone's weights, as `cib_jax.load_pretrained(backbone)` returns them.
      pretrained: False starts a backbone that has pretrained weights from random ones.
      backbone_dtype: "float32", or "bfloat16" for less memory and, on accelerators, time.
      standard: for the backbone "none", which takes features: their `feature_views.standard`.
      feature_noise: the same, of their views; see `feature_views.two_views`.
      feature_dropout: the same.
      fine_tune: which part of a backbone that is not frozen learns, and how; its learning rate is the optimizer's.

    Raises:
      FineTuneError: `fine_tune` does not go with the backbone.
      ValueError: a value is out of range, or `backbone_params` are missing or do not fit the network.

    Examples:
      >>> import cib_jax as cib
      >>> import jax
      >>> encoder, params, frozen = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=16, image_size=16)
      >>> encoder.bits, sorted(params), frozen  # a network from scratch learns whole
      (16, ['backbone', 'head'], {})
    """
    chosen = registry.get(backbone)
    if (chosen.takes == "features") != (standard is not None):
        raise ValueError(
            f"standard: {backbone} takes {chosen.takes}; give the features' views.feature_views.standard for the "
            "backbone 'none', and for no other"
        )
    if standard is not None:
        chosen = dataclasses.replace(
            chosen,
            features=len(standard.mean),
            mean=tuple(standard.mean.tolist()),
            deviation=tuple(standard.deviation.tolist()),
        )
    size = image_size or chosen.image_size
    if bits < 8 or bits % 8:
        raise ValueError(
            f"bits: {bits} is not a positive multiple of 8; codes are stored in whole bytes, try 16, 32 or 64"
        )
    if size < chosen.smallest:
        raise ValueError(
            f"image_size: {size} is too small for {backbone}, which takes {chosen.smallest} pixels or more"
        )
    if size % chosen.multiple:
        raise ValueError(
            f"image_size: {size} is not a multiple of {chosen.multiple}, the side of the patches that {backbone} cuts "
            "images into"
        )
    has_pretrained = chosen.convert is not None
    if backbone_dtype not in DTYPES:
        raise ValueError(f"backbone_dtype: {backbone_dtype!r} is not one of {', '.join(DTYPES)}")
    from_scratch = backbone_params is None
    if frozen and from_scratch and not has_pretrained and standard is None:
        raise ValueError(f"frozen: {backbone} starts from random weights and would learn nothing; leave it trainable")
    if has_pretrained and pretrained and backbone_params is None:
        raise ValueError(
            f"backbone_params: {backbone} comes with pretrained weights; pass cib_jax.load_pretrained({backbone!r}), "
            "or pretrained=False to start from random ones"
        )
    if frozen is None:
        frozen = standard is not None or (has_pretrained and not fine_tune.asked)
    finetune.validate_fine_tune(fine_tune, chosen, size, frozen=frozen, from_scratch=from_scratch)
    backbone_key, head_key = jax.random.split(key)
    graph, state = _split_backbone(chosen, size, backbone_key, backbone_params)
    head_graph, head = nnx.split(HashHead(chosen.features, hidden, bits, rngs=nnx.Rngs(head_key)))
    encoder = Encoder(
        chosen,
        bits,
        size,
        graph,
        head_graph,
        backbone_dtype,
        feature_noise,
        feature_dropout,
        fine_tune.lora_alpha / fine_tune.lora_rank if fine_tune.lora_rank else 0.0,
        fine_tune.checkpointing,
    )
    head_params = nnx.to_pure_dict(head)
    if standard is not None:
        return encoder, {"head": head_params}, {}
    learns: Params = {}
    stays: Params = {"backbone": state}
    if not frozen:
        learns, stays = finetune.create_parts(jax.random.fold_in(key, 2), fine_tune, chosen, size, state)
    # Cast once, here: what is frozen needs no float32 copy beside it.
    return encoder, {"head": head_params} | learns, _cast(stays, DTYPES[backbone_dtype])


def _split_backbone(
    chosen: registry.Backbone, size: int, key: PRNGKeyArray, loaded: Params | None
) -> tuple[nnx.GraphDef[Any], Params]:
    if loaded is None:
        graph, state = nnx.split(chosen.build(nnx.Rngs(key), size))
        return graph, nnx.to_pure_dict(state)
    # Only shapes are worked out here: drawing VGG's 134 million random weights to throw them away takes seconds.
    graph, state = nnx.split(nnx.eval_shape(lambda: chosen.build(nnx.Rngs(key), size)))
    wanted = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    given = jax.tree.map(jnp.shape, loaded)
    if wanted != given:
        raise ValueError(
            f"backbone_params: they do not fit {chosen.name} (wanted {wanted}, got {given}); "
            f"pass cib_jax.load_pretrained({chosen.name!r})"
        )
    return graph, jax.tree.map(jnp.asarray, loaded)


# hashing.coding: From images to packed codes as at test time: two programs, pure and compiled, one device or many.
#
# Two and not one: where features are computed once and kept, the codes must be the same to the last bit.


@functools.partial(jax.jit, static_argnums=(0, 4))
def plain_features(
    encoder: Encoder, params: Params, frozen: Params, images: Shaped[Array, "batch ..."], over: Mesh | None = None
) -> Float[Array, "batch features"]:
    """Returns the backbone's features of images as at test time, unaugmented; the rows spread `over` devices."""

    def features(held: tuple[Params, Params], images: Array) -> Array:
        return encoder.features(*held, encoder.preprocess(images))

    return sharding.shard_rows(features, over)((params, frozen), images)


@functools.partial(jax.jit, static_argnums=(0, 3))
def packed_of_features(
    encoder: Encoder, params: Params, features: Float[Array, "batch features"], over: Mesh | None = None
) -> UInt8[Array, "batch bytes"]:
    """Returns the packed codes of features; the rows spread `over` devices."""
    return sharding.shard_rows(lambda params, rows: codes.pack_bits(encoder.head(params, rows)), over)(params, features)


@functools.partial(jax.jit, static_argnums=(0, 3))
def logits_of_features(
    encoder: Encoder, params: Params, features: Float[Array, "batch features"], over: Mesh | None = None
) -> Float[Array, "batch bits"]:
    """Returns the logits of features; the rows spread `over` devices."""
    return sharding.shard_rows(encoder.head, over)(params, features)

"""The backbones by name: how to build each one, prepare its input and load its weights."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.errors import ConfigError
from cib_jax.models import clip, convnet, dinov2, efficientnet, resnet, vgg
from cib_jax.models.state_dict import Tree
from cib_jax.models.vit import Design

Numbers = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network from images [batch, h, w, 3] to features [batch, `features`]."""

    name: str
    features: int
    mean: Numbers  # subtracted from pixels in [0, 1], by channel; if `takes` is "features", from each feature
    deviation: Numbers  # by which the differences are divided
    image_size: int  # usual side of the input in pixels
    smallest: int  # smallest side of the input in pixels
    build: Callable[[nnx.Rngs, int], nnx.Module]  # (rngs, image size) → network with random weights
    convert: Callable[[Mapping[str, np.ndarray]], Tree] | None  # named tensors → state; None: no published weights
    reads: tuple[str, ...] = ("",)  # beginnings of its tensors' names, if weight files contain other networks too
    multiple: int = 1  # divisor of every possible side of the input
    takes: str = "images"  # or "features", which go through no network and are only standardized
    networks: tuple[str, ...] = ()  # names of those whose features it joins; `convert` reads none of its files


class _Identity(nnx.Module):
    """The network of features that come from the data."""

    def __call__(self, features: Float[Array, "batch features"]) -> Float[Array, "batch features"]:
        return features


class SideBySide(nnx.Module):
    """Several networks on the same images; their features are joined in this order."""

    def __init__(self, rngs: nnx.Rngs, image_size: int, networks: Sequence[Backbone]):
        self._names = tuple(network.name for network in networks)
        for network in networks:
            setattr(self, network.name, network.build(rngs, image_size))

    def __call__(self, images: Float[Array, "batch h w 3"]) -> Float[Array, "batch features"]:
        """Returns the joined features."""
        return jnp.concatenate([getattr(self, name)(images) for name in self._names], axis=1)


# Means and deviations of the channels.
HALF = (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _efficientnet_lite(number: int, scaling: efficientnet.Scaling, image_size: int) -> Backbone:
    return Backbone(
        f"efficientnet_lite{number}",
        efficientnet.FEATURES,
        mean=HALF,
        deviation=HALF,
        image_size=image_size,
        smallest=32,
        build=lambda rngs, _: efficientnet.EfficientNetLite(rngs, scaling),
        convert=functools.partial(efficientnet.convert, scaling=scaling),
    )


def _side_by_side(name: str, *networks: Backbone) -> Backbone:
    """Returns a backbone with the features of several ones that take the same input."""
    return dataclasses.replace(
        networks[0],
        name=name,
        features=sum(network.features for network in networks),
        build=lambda rngs, image_size: SideBySide(rngs, image_size, networks),
        networks=tuple(network.name for network in networks),
    )


def _vit(
    name: str,
    design: Design,
    network: Callable[[nnx.Rngs, Design], nnx.Module],
    convert: Callable[..., Tree],
    statistics: tuple[Numbers, Numbers],
    features: int = 0,
    reads: tuple[str, ...] = ("",),
) -> Backbone:
    """Returns a vision transformer; it has `features` or, by default, as many as a token has channels."""
    return Backbone(
        name,
        features or design.width,
        *statistics,
        image_size=224,
        smallest=design.patch,
        build=lambda rngs, image_size: network(rngs, design),
        convert=functools.partial(convert, design=design),
        reads=reads,
        multiple=design.patch,
    )


def _dinov2(name: str, design: Design) -> Backbone:
    return _vit(name, design, dinov2.DINOv2, dinov2.convert, IMAGENET)


def _clip(name: str, design: Design) -> Backbone:
    return _vit(name, design, clip.CLIP, clip.convert_clip, CLIP, clip.FEATURES, clip.CLIP_READS)


_LITES = (
    _efficientnet_lite(0, efficientnet.LITE0, 224),
    _efficientnet_lite(1, efficientnet.LITE1, 240),
    _efficientnet_lite(2, efficientnet.LITE2, 260),
)

BACKBONES: dict[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        Backbone("convnet", convnet.FEATURES, HALF, HALF, 32, 8, build=convnet.ConvNet, convert=None),
        *_LITES,
        _side_by_side("efficientnet_lite1+2", _LITES[1], _LITES[2]),
        _side_by_side("efficientnet_lite0+1+2", *_LITES),
        Backbone(
            "resnet50", resnet.FEATURES, *IMAGENET, 224, 32, lambda rngs, _: resnet.ResNet50(rngs), resnet.convert
        ),
        Backbone("vgg16", vgg.FEATURES, *IMAGENET, 224, 32, lambda rngs, _: vgg.VGG16(rngs), vgg.convert),
        _dinov2("dinov2_small", dinov2.SMALL),
        _dinov2("dinov2_base", dinov2.BASE),
        _dinov2("dinov2_small_registers", dinov2.SMALL_REGISTERS),
        _dinov2("dinov2_base_registers", dinov2.BASE_REGISTERS),
        _clip("clip_vit_b32", clip.B32),
        _clip("clip_vit_b16", clip.B16),
        _vit("siglip_base", clip.SIGLIP_B16, clip.SigLIP, clip.convert_siglip, (HALF, HALF), reads=clip.SIGLIP_READS),
        # The number of features, their means and deviations come from the data; `create_encoder` fills them in.
        Backbone("none", 0, (), (), 0, 0, build=lambda rngs, size: _Identity(), convert=None, takes="features"),
    )
}


def get(name: str) -> Backbone:
    """Returns the backbone called `name`; raises `ConfigError` if there is none."""
    if name not in BACKBONES:
        raise ConfigError(f"backbone must be one of {', '.join(sorted(BACKBONES))}, got {name!r}", field="backbone")
    return BACKBONES[name]

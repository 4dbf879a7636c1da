"""The backbones by name, each with what its input must look like."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cib_jax.models import clip, convnet, dinov2, efficientnet, resnet, vgg
from cib_jax.models.state_dict import Tree
from cib_jax.models.vit import Design

Numbers = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network from images [batch, h, w, 3] to features [batch, `features`], and how to feed and load it."""

    name: str
    features: int
    mean: Numbers  # of the channels of pixels scaled to [0, 1]; where features are taken, of each feature
    deviation: Numbers
    image_size: int  # its usual input size, in pixels
    smallest: int  # the smallest input size that it takes
    build: Callable[[nnx.Rngs, int], nnx.Module]  # (rngs, image size) to the network, randomly initialized
    convert: Callable[[Mapping[str, np.ndarray]], Tree] | None  # named tensors to its state; None: from scratch
    reads: tuple[str, ...] = ("",)  # how the names of its tensors begin, where a file of weights holds more than them
    multiple: int = 1  # what an input size must be a multiple of, in pixels
    takes: str = "images"  # or "features": there is no network, and they are standardised alone


class _Nothing(nnx.Module):
    """Hands on what it gets."""

    def __call__(self, features: Float[Array, "batch features"]) -> Float[Array, "batch features"]:
        return features


HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _efficientnet_lite(number: int, scaling: efficientnet.Scaling, image_size: int) -> Backbone:
    return Backbone(
        name=f"efficientnet_lite{number}",
        features=efficientnet.FEATURES,
        mean=HALF,
        deviation=HALF,
        image_size=image_size,
        smallest=32,
        build=lambda rngs, image_size: efficientnet.EfficientNetLite(rngs, scaling),
        convert=functools.partial(efficientnet.convert, scaling=scaling),
    )


def _dinov2(name: str, design: Design) -> Backbone:
    return Backbone(
        name=name,
        features=design.width,
        mean=IMAGENET_MEAN,
        deviation=IMAGENET_DEVIATION,
        image_size=224,
        smallest=design.patch,
        build=lambda rngs, image_size: dinov2.DINOv2(rngs, design),
        convert=functools.partial(dinov2.convert, design=design),
        multiple=design.patch,
    )


def _clip(name: str, design: Design) -> Backbone:
    return Backbone(
        name=name,
        features=clip.FEATURES,
        mean=CLIP_MEAN,
        deviation=CLIP_DEVIATION,
        image_size=224,
        smallest=design.patch,
        build=lambda rngs, image_size: clip.CLIP(rngs, design),
        convert=functools.partial(clip.convert_clip, design=design),
        reads=clip.CLIP_READS,
        multiple=design.patch,
    )


BACKBONES: dict[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            name="convnet",
            features=convnet.FEATURES,
            mean=HALF,
            deviation=HALF,
            image_size=32,
            smallest=8,
            build=convnet.ConvNet,
            convert=None,
        ),
        _efficientnet_lite(0, efficientnet.LITE0, 224),
        _efficientnet_lite(1, efficientnet.LITE1, 240),
        _efficientnet_lite(2, efficientnet.LITE2, 260),
        Backbone(
            name="resnet50",
            features=resnet.FEATURES,
            mean=IMAGENET_MEAN,
            deviation=IMAGENET_DEVIATION,
            image_size=224,
            smallest=32,
            build=lambda rngs, image_size: resnet.ResNet50(rngs),
            convert=resnet.convert,
        ),
        Backbone(
            name="vgg16",
            features=vgg.FEATURES,
            mean=IMAGENET_MEAN,
            deviation=IMAGENET_DEVIATION,
            image_size=224,
            smallest=32,
            build=lambda rngs, image_size: vgg.VGG16(rngs),
            convert=vgg.convert,
        ),
        _dinov2("dinov2_small", dinov2.SMALL),
        _dinov2("dinov2_base", dinov2.BASE),
        _dinov2("dinov2_small_registers", dinov2.SMALL_REGISTERS),
        _dinov2("dinov2_base_registers", dinov2.BASE_REGISTERS),
        _clip("clip_vit_b32", clip.B32),
        _clip("clip_vit_b16", clip.B16),
        Backbone(
            name="siglip_base",
            features=clip.BASE.width,
            mean=HALF,
            deviation=HALF,
            image_size=224,
            smallest=clip.BASE.patch,
            build=lambda rngs, image_size: clip.SigLIP(rngs, clip.BASE),
            convert=functools.partial(clip.convert_siglip, design=clip.BASE),
            reads=clip.SIGLIP_READS,
            multiple=clip.BASE.patch,
        ),
        # How many features there are, their mean and deviation come from the data: `encoder.create_encoder` fills in.
        Backbone(
            name="none",
            features=0,
            mean=(),
            deviation=(),
            image_size=0,
            smallest=0,
            build=lambda rngs, image_size: _Nothing(),
            convert=None,
            takes="features",
        ),
    )
}


def get(name: str) -> Backbone:
    """Returns the backbone called `name`.

    Raises:
        ValueError: if there is none.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone is {name!r}: choose one of {', '.join(sorted(BACKBONES))}.")
    return BACKBONES[name]

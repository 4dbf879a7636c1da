"""Speed of the frozen backbones against PyTorch, channels last, with the same weights and images.

`python -m benchmarks.backbones` times the forward pass of the networks of `SIDES`; `--layers` times each form of VGG's
convolutions, `--bfloat16` the networks in half precision, and `--usual` all backbones at their usual sizes, without
PyTorch and with random weights, for the table of docs/backbones.md.
"""

import argparse
import functools
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import cib_jax
from benchmarks import measuring
from cib_jax.models import registry, resnet, vgg, weights
from cib_jax.models.conv import conv_plain, winograd

# Image side, input and output channels of the layers of VGG-16 at 224 pixels, each once.
VGG_LAYERS = (
    (224, 64, 64),
    (112, 64, 128),
    (112, 128, 128),
    (56, 128, 256),
    (56, 256, 256),
    (28, 256, 512),
    (28, 512, 512),
    (14, 512, 512),
)
TRANSFORMERS = (
    *("dinov2_small", "dinov2_base", "dinov2_small_registers", "dinov2_base_registers"),
    *("clip_vit_b32", "clip_vit_b16", "siglip_base"),
)
BATCHES = {"efficientnet_lite0": (4, 8, 32)} | dict.fromkeys(TRANSFORMERS, (8,))
OTHER_BATCHES = (8, 32)
# Names of PyTorch's convolutions and of the batch norms after them, in the network and in its blocks.
NORMS = (
    ("_conv_stem", "_bn0"),
    ("_conv_head", "_bn1"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
)
Run = Callable[[np.ndarray], np.ndarray]


def efficientnet_sides(name: str, size: int) -> tuple[dict[str, Run], Any]:
    """Returns PyTorch's EfficientNet-Lite with and without separate batch norms, and the weights for our side."""
    import efficientnet_lite_pytorch
    import torch

    def network() -> torch.nn.Module:
        model = efficientnet_lite_pytorch.EfficientNet.from_name(name.replace("_", "-"), image_size=size)
        model.load_state_dict(torch.load(weights.locate(name).path, weights_only=True))
        return model.eval()

    def features(model: torch.nn.Module) -> Run:
        model.to(memory_format=torch.channels_last)
        return torch_side(lambda images: model.extract_features(images).mean((2, 3)))

    folded = network()
    for block in (folded, *folded._blocks):
        for conv, norm in NORMS:
            if hasattr(block, conv):
                fused = torch.nn.utils.fusion.fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm))
                setattr(block, conv, fused)
                setattr(block, norm, torch.nn.Identity())
    sides = {"PyTorch": features(network()), "PyTorch, norms folded": features(folded)}
    return sides, cib_jax.load_pretrained(name)


def resnet_sides(size: int) -> tuple[dict[str, Run], Any]:
    """Returns torchvision's ResNet-50 with random weights, its norms fused or not, and the weights for our side."""
    import torch.fx.experimental.optimization
    import torchvision

    del size
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    state = resnet.convert({name: tensor.numpy() for name, tensor in model.state_dict().items()})
    model.fc = torch.nn.Identity()
    model.to(memory_format=torch.channels_last)
    fused = torch.fx.experimental.optimization.fuse(model).to(memory_format=torch.channels_last)
    return {"PyTorch": torch_side(model), "PyTorch, norms folded": torch_side(fused)}, state


def vgg_sides(size: int) -> tuple[dict[str, Run], Any]:
    """Returns fc7 of torchvision's VGG-16 with random weights, and the weights for our side."""
    import torch
    import torchvision

    del size
    torch.manual_seed(0)
    model = torchvision.models.vgg16(weights=None).eval()
    state = vgg.convert({name: tensor.numpy() for name, tensor in model.state_dict().items()})
    model.classifier = model.classifier[:6]
    model.to(memory_format=torch.channels_last)
    return {"PyTorch": torch_side(model)}, state


def transformer_sides(name: str, size: int) -> tuple[dict[str, Run], Any]:
    """Returns a vision transformer of `transformers` with random weights, and the weights for our side."""
    from tests.golden import make_transformers

    del size
    build, reader = make_transformers.NETWORKS[name]
    with tempfile.TemporaryDirectory() as folder:
        build().save_pretrained(folder)
        model = reader.from_pretrained(folder).eval()
        state = cib_jax.load_pretrained(name, str(pathlib.Path(folder) / "model.safetensors"))
    return {"PyTorch": lambda images: make_transformers.features(name, model, images)}, state


LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
SIDES = {
    **{name: functools.partial(efficientnet_sides, name) for name in LITE},
    "resnet50": resnet_sides,
    "vgg16": vgg_sides,
    **{name: functools.partial(transformer_sides, name) for name in TRANSFORMERS},
}


def torch_side(function: Callable[[Any], Any]) -> Run:
    """Returns the function on NumPy images [batch, h, w, 3], passed to PyTorch as channels-last without a copy."""
    import torch

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return function(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()

    return run


def our_side(name: str, state: Any, dtype: Any = jnp.float32, size: int = 224) -> Run:
    """Returns the backbone called `name` with `state`, as one jitted program that computes in `dtype`."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: registry.get(name).build(nnx.Rngs(0), size)))
    weights_in_dtype = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), state)
    program = jax.jit(lambda state, images: nnx.merge(graph, state)(images.astype(dtype)))
    return lambda images: np.asarray(program(weights_in_dtype, images).block_until_ready())


def networks(names: Sequence[str], arguments: argparse.Namespace) -> None:
    """Prints images per second of each network, size and batch: PyTorch, ours and their ratio."""
    rows = []
    for name, size in cases(names, arguments):
        others, state = SIDES[name](size)
        sides = {**others, "ours": our_side(name, state)}
        for batch in arguments.batches or BATCHES.get(name, OTHER_BATCHES):
            images = noise(batch, size, size, 3)
            expected, ours = others["PyTorch"](images), sides["ours"](images)
            difference = np.abs(ours - expected).max() / np.abs(expected).max()
            seconds = measuring.in_turns(
                {side: functools.partial(run, images) for side, run in sides.items()}, rounds=arguments.rounds
            )
            rows.append(
                [
                    name,
                    size,
                    batch,
                    *(format_rate(batch, seconds.get(side)) for side in ("PyTorch", "PyTorch, norms folded", "ours")),
                    measuring.format_ratio(seconds["PyTorch"], seconds["ours"]),
                    f"{difference:.0e}",
                ]
            )
    header = ["network", "pixels", "batch", "PyTorch, images/s", "with norms folded", "cib_jax", "ratio", "difference"]
    measuring.print_table(header, rows)


def half_precision(names: Sequence[str], arguments: argparse.Namespace) -> None:
    """Prints images per second in float32 and in bfloat16, and the distance between the two features."""
    rows = []
    for name, size in cases(names, arguments):
        _, state = SIDES[name](size)
        sides = {dtype: our_side(name, state, dtype) for dtype in ("float32", "bfloat16")}
        batch = (arguments.batches or BATCHES.get(name, OTHER_BATCHES))[0]
        images = noise(batch, size, size, 3)
        single, half = (run(images).astype(np.float32) for run in sides.values())
        seconds = measuring.in_turns(
            {dtype: functools.partial(run, images) for dtype, run in sides.items()}, rounds=arguments.rounds
        )
        distance = np.linalg.norm(half - single) / np.linalg.norm(single)
        rates = [format_rate(batch, seconds[dtype]) for dtype in sides]
        rows.append([name, size, batch, *rates, measuring.format_ratio(*seconds.values()), f"{distance:.3f}"])
    measuring.print_table(
        ["network", "pixels", "batch", "float32, images/s", "bfloat16, images/s", "ratio", "relative distance"], rows
    )


def usual_sizes(arguments: argparse.Namespace) -> None:
    """Prints images per second of each backbone at its usual size, by wall time and by processor time.

    The rate by processor time assumes that the process has all cores to itself; use it on a busy machine.
    """
    rows = []
    for name, backbone in registry.BACKBONES.items():
        if backbone.takes != "images":
            continue
        state = nnx.to_pure_dict(nnx.state(backbone.build(nnx.Rngs(0), backbone.image_size)))
        count = sum(leaf.size for leaf in jax.tree.leaves(state))
        batch = (arguments.batches or OTHER_BATCHES)[0]
        images = noise(batch, backbone.image_size, backbone.image_size, 3)
        run = functools.partial(our_side(name, state, size=backbone.image_size), images)
        run()
        begun = time.process_time()
        seconds = measuring.in_turns({name: run}, rounds=arguments.rounds, warm_up=0)[name]
        own = (time.process_time() - begun) / measuring.cores() / arguments.rounds
        rates = [format_rate(batch, seconds), f"{batch / own:.1f}"]
        rows.append([name, backbone.image_size, f"{count / 1e6:.2f}", batch, *rates])
    header = ["network", "pixels", "parameters, M", "batch", "images/s", "images/s by processor time"]
    measuring.print_table(header, rows)


def layers(arguments: argparse.Namespace) -> None:
    """Prints the speed of each form of VGG's convolutions, in GFLOP/s of the plain convolution's arithmetic."""
    pads = ((1, 1), (1, 1))
    forms = {
        "plain": functools.partial(conv_plain, stride=1, pads=pads),
        "F(2×2)": functools.partial(winograd, pads=pads),
    }
    rows = []
    for size, inputs, outputs in VGG_LAYERS:
        kernel = jnp.asarray(noise(3, 3, inputs, outputs))
        for batch in arguments.batches or (2, 16):
            images = jnp.asarray(noise(batch, size, size, inputs))
            seconds = measuring.in_turns(
                {name: compiled(form, images, kernel) for name, form in forms.items()}, rounds=arguments.rounds
            )
            work = 18e-9 * batch * size**2 * inputs * outputs
            rates = [f"{work / seconds[name].median:.0f}" for name in forms]
            rows.append([size, f"{inputs} → {outputs}", batch, *rates])
    measuring.print_table(["pixels", "channels", "batch", *(f"{name}, GFLOP/s" for name in forms)], rows)


def compiled(form: Callable[..., jax.Array], *inputs: jax.Array) -> Callable[[], Any]:
    """Returns a function that runs `form` as one jitted program."""
    program = jax.jit(form)
    return lambda: program(*inputs).block_until_ready()


def cases(names: Sequence[str], arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """Returns the pairs of network and size to time."""
    usual = {name: [registry.get(name).image_size] for name in names}
    return [(n, size) for n in names for size in (arguments.sizes if n == "efficientnet_lite0" else usual[n])]


def format_rate(batch: int, seconds: measuring.Seconds | None) -> str:
    """Returns images per second, or "" for a side that was not run."""
    return "" if seconds is None else f"{batch / seconds.median:.1f}"


def noise(*shape: int) -> np.ndarray:
    """Returns standard normal noise in float32."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def main() -> None:
    """Reads the flags and prints the tables."""
    others = () if "--usual" in sys.argv else ("torch", "torchvision", "transformers", "efficientnet_lite_pytorch")
    parser = measuring.parser("the frozen backbones against PyTorch, channels last, forward only", *others)
    parser.add_argument("--usual", action="store_true", help="time all backbones at their usual sizes, without PyTorch")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 224], help="for EfficientNet-Lite0")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes, instead of the default of each table")
    parser.add_argument("--networks", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, each side in turn")
    parser.add_argument("--layers", action="store_true", help="time the forms of VGG's convolutions instead")
    parser.add_argument("--bfloat16", action="store_true", help="time float32 against bfloat16 instead")
    arguments = parser.parse_args()
    if arguments.usual:
        print(measuring.machine("jax"), end="\n\n")
        usual_sizes(arguments)
        return
    import torch

    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    torch.set_num_threads(measuring.cores())
    print(measuring.machine("jax", "torch"), end="\n\n")
    if arguments.layers:
        layers(arguments)
    elif arguments.bfloat16:
        half_precision(arguments.networks, arguments)
    else:
        networks(arguments.networks, arguments)


if __name__ == "__main__":
    main()

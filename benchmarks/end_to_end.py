"""Time of a complete run on CIFAR-10, from TFDS files to the final MAP, against the sum of the original's parts.

`python -m benchmarks.end_to_end --data-dir=DIR` runs `run.py --config=configs/cifar.py` in a new process with an empty
cache, then measures a sample of each part of the original on the same images and network and extrapolates, since the
whole original would take more than an hour.
"""

import functools
import json
import multiprocessing
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import measuring
from cib_jax.data import dataset, sources, splits
from cib_jax.data.dataset import DataConfig
from cib_jax.data.splits import PROTOCOLS
from configs import cifar

ROOT = pathlib.Path(__file__).parent.parent


def ours(data_dir: str, bits: int, folder: pathlib.Path, *, cached: bool) -> tuple[dict[str, Any], float]:
    """Returns results.json and the wall seconds of the whole command; `cached` means after a run with other bits."""
    command = [
        *(sys.executable, "run.py", "--config=configs/cifar.py", f"--config.data.dir={data_dir}"),
        *(f"--config.bits={bits}", f"--config.cache.dir={folder / 'cache'}", f"--workdir={folder / f'run{bits}'}"),
        *(["--config.seed=1"] if cached else []),
    ]
    begun = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - begun
    return json.loads((folder / f"run{bits}" / "results.json").read_text(encoding="utf-8")), wall


def rate(work: Callable[[], Any], units: int, least_seconds: float) -> float:
    """Returns units of work per second, after a first call that does not count."""
    work()
    done, begun = 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < least_seconds:
        work()
        done += units
    return done / passed


def _transform(images: Sequence[np.ndarray], image_size: int, train: bool, seed: int) -> None:
    import PIL.Image
    import torch
    from torchvision import transforms

    from benchmarks import original

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    np.random.seed(seed)
    plain = [transforms.Resize((image_size, image_size)), transforms.ToTensor()]
    normalize = transforms.Normalize([0.5] * 3, [0.5] * 3)
    transform = original.two_view_transform(image_size) if train else transforms.Compose([*plain, normalize])
    for image in images:
        transform(PIL.Image.fromarray(image))


def theirs(drawn: splits.Splits, bits: int, seconds: float) -> dict[str, float]:
    """Returns the seconds of each part of the original's training and test, extrapolated from samples."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    from benchmarks import original
    from benchmarks.head import make_bank

    config = cifar.get_config()
    size, epochs, batch = config.image_size, config.epochs, config.batch_size
    views = 2 * epochs * (len(drawn.train) // batch) * batch
    plain = len(drawn.query) + len(drawn.database)
    sample = dataset.materialize(drawn.train.take(np.arange(2000)).images)
    cores = measuring.cores()
    parts = np.array_split(sample, cores)
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        rates = {}
        for train in (True, False):
            tasks = [(part, size, train, index) for index, part in enumerate(parts)]
            rates[train] = rate(functools.partial(pool.starmap, _transform, tasks), len(sample), seconds)
    network = EfficientNet.from_name("efficientnet-lite0").eval().to(memory_format=torch.channels_last)
    # One batch of views at a time, the second after the first, as in the published code.
    inputs = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)

    def forward() -> None:
        with torch.inference_mode():
            network.extract_features(inputs).mean((2, 3))

    forwards = rate(forward, len(inputs), seconds)
    bank = make_bank(2, len(drawn.train), 1280)
    original.train_head(bank, bits=bits, epochs=1)
    begun = time.perf_counter()
    original.train_head(bank, bits=bits, epochs=3)
    head = (time.perf_counter() - begun) * epochs / 3
    generator = np.random.default_rng(0)
    codes = [np.sign(generator.normal(size=(n, bits))).astype(np.float32) for n in (1000, len(drawn.database))]
    hot = [np.eye(10)[labels] for labels in (drawn.query.labels[:1000], drawn.database.labels)]
    begun = time.perf_counter()
    original.mean_average_precision(codes[0], codes[1], hot[0], hot[1], config.k)
    ranking = (time.perf_counter() - begun) * len(drawn.query) / 1000
    return {
        f"augmenting {views:,} views": views / rates[True],
        f"features of {views:,} views": views / forwards,
        f"{epochs} epochs of the head": head,
        f"resizing {plain:,} images": plain / rates[False],
        f"features of {plain:,} images": plain / forwards,
        f"MAP@{config.k} of {len(drawn.query):,} queries": ranking,
    }


def main() -> None:
    """Reads the flags and prints a table for each side and their ratio."""
    parser = measuring.parser("Time of a complete run.", "torch", "torchvision", "cv2", "efficientnet_lite_pytorch")
    parser.add_argument("--data-dir", required=True, help="a TFDS data_dir with CIFAR-10")
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each sample of the original, in seconds")
    parser.add_argument("--original-alone", action="store_true", help="measure the original alone")
    flags = parser.parse_args()
    print(f"{measuring.machine('jax', 'torch')}; CIFAR-10, EfficientNet-Lite0, 128 px, {flags.bits} bits\n", flush=True)
    drawn = splits.draw_splits(
        sources.load(DataConfig("cifar10", flags.data_dir)), PROTOCOLS["cifar10-10k-50k"], seed=0
    )
    before = theirs(drawn, flags.bits, flags.seconds)
    total = sum(before.values())
    print("The original, each part from a sample, summed\n")
    rows = [[part, f"{seconds:.0f}", f"{seconds / total:.0%}"] for part, seconds in before.items()]
    measuring.print_table(["stage", "s", "share"], [*rows, ["sum", f"{total:.0f}", "100%"]])
    if flags.original_alone:
        return
    with tempfile.TemporaryDirectory() as folder:
        results, wall = ours(flags.data_dir, flags.bits, pathlib.Path(folder), cached=False)
        again, again_wall = ours(flags.data_dir, 2 * flags.bits, pathlib.Path(folder), cached=True)
    for title, one, seconds in (
        ("cib_jax", results, wall),
        ("cib_jax, a second run, other bits and seed", again, again_wall),
    ):
        stages = dict(one["seconds"])
        stages["rest: imports, data, weights, compiling, checkpoints"] = seconds - sum(stages.values())
        rows = [[stage, f"{value:.1f}", f"{value / seconds:.0%}"] for stage, value in stages.items()]
        print(f"{title}: MAP {one['map']:.4f}, whole command\n")
        measuring.print_table(["stage", "s", "share"], [*rows, ["wall", f"{seconds:.1f}", "100%"]])
    print(f"{total / wall:.1f} times faster; the second run {total / again_wall:.0f} times")


if __name__ == "__main__":
    main()

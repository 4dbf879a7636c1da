"""Speed of the paper's augmentation: torchvision, PIL and OpenCV in two processes against one program over the batch.

`python -m benchmarks.augmentation` makes the same number of views with each in turn. The images are smooth noise unless
`--data-dir` names a TFDS data_dir with CIFAR-10; the speed of the published pipeline does not depend on the content.
"""

import functools
import multiprocessing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import measuring
from cib_jax.augment import augment, color, geometry
from cib_jax.data import sources
from cib_jax.data.dataset import DataConfig

PROCESSES = 2  # for the other side: the number of workers in the published code's loader
PASSES = 4  # over the batch in each round, so that the time of distributing work to processes is negligible


def make_images(count: int, side: int, directory: str | None) -> np.ndarray:
    """Returns uint8 images [count, side, side, 3]: the first of CIFAR-10 if a directory is given, else smooth noise."""
    import PIL.Image

    if directory is not None:
        images = sources.load(DataConfig("cifar10", directory)).train.images
        pictures = [PIL.Image.fromarray(images[i]) for i in range(count)]
    else:
        noise = np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3), np.uint8)
        pictures = [PIL.Image.fromarray(image) for image in noise]
    return np.stack([np.asarray(picture.resize((side, side), PIL.Image.Resampling.BICUBIC)) for picture in pictures])


class TwoViews:
    """The published data set: two new views of an image for each index that a loader requests."""

    def __init__(self, images: np.ndarray, image_size: int, passes: int):
        import PIL.Image

        from benchmarks import original

        self.pictures = [PIL.Image.fromarray(image) for image in images] * passes
        self.transform = original.two_view_transform(image_size)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.transform(self.pictures[index]), self.transform(self.pictures[index])


def transform_all(share: TwoViews) -> None:
    """Makes the views of a share and discards them, so that no view is sent between processes."""
    import torch

    torch.set_num_threads(1)
    for index in range(len(share)):
        share[index]


def loader(images: np.ndarray, image_size: int) -> Callable[[], None]:
    """Returns a function that draws the same number of views through a `DataLoader` with persistent workers."""
    import torch.utils.data

    # Each image gives two views, so half as many passes make the same number of views.
    feed = torch.utils.data.DataLoader(
        TwoViews(images, image_size, PASSES // 2),  # type: ignore[arg-type]
        batch_size=64,
        num_workers=PROCESSES,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )

    def draw() -> None:
        for _ in feed:
            pass

    return draw


def view(key: jax.Array, images: jax.Array, image_size: int) -> jax.Array:
    """Returns one view of every image."""
    return augment.view_each(augment.image_keys(key, len(images)), images, image_size=image_size)


def ours(images: np.ndarray, image_size: int) -> Callable[[], None]:
    """Returns a function that makes the views in one compiled program, once per pass."""
    program = jax.jit(lambda key, images: view(key, images, image_size))
    keys = list(jax.random.split(jax.random.key(0), PASSES))

    def draw() -> None:
        for key in keys:
            jax.block_until_ready(program(key, images))

    return draw


def stages(images: np.ndarray, image_size: int) -> dict[str, Callable[[], None]]:
    """Returns programs that each end one stage later, composed as `augment.view_each` does on a CPU."""
    batch, height, width, _ = images.shape
    sample = functools.partial(augment.sample_photo, height=height, width=width)

    def drawn(key: jax.Array) -> augment.PhotoDraws:
        return jax.vmap(sample)(augment.image_keys(key, batch))

    def crop(draws: augment.PhotoDraws, images: jax.Array) -> jax.Array:
        return geometry.resized_crop_rows(images / 255, draws.crop, image_size=image_size, flip=draws.flip, margin=1)

    def jitter(draws: augment.PhotoDraws, images: jax.Array) -> jax.Array:
        form = color.jitter_one if augment.chunk_of(image_size) == 1 else color.jitter_rows
        return form(crop(draws, images), draws.jitter, draws.grayscale, margin=1)

    def blur(draws: augment.PhotoDraws, images: jax.Array) -> jax.Array:
        return color.blur_rows(jitter(draws, images), draws.sigma)

    def so_far(step: Callable[..., jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda key, images: augment.by_chunks(step, drawn(key), images, chunk=augment.chunk_of(image_size))

    programs: dict[str, Callable[..., Any]] = {
        "draws": lambda key, images: drawn(key),
        "crop, flip": so_far(crop),
        "jitter, grayscale": so_far(jitter),
        "blur": so_far(blur),
        "normalize, channels last": lambda key, images: view(key, images, image_size),
    }
    key = jax.random.key(0)
    compiled = {name: jax.jit(program) for name, program in programs.items()}
    return {
        name: functools.partial(lambda program: jax.block_until_ready(program(key, images)), program)
        for name, program in compiled.items()
    }


def main() -> None:
    """Reads the flags and prints the tables."""
    parser = measuring.parser("Views of the family photo.", "torch", "torchvision", "cv2")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 224], help="sides of the views, in pixels")
    # 48 views of 224 pixels are 29 MB. The GNU C library returns blocks above 32 MB to the system when they are freed;
    # getting them back page by page would take a considerable part of the measured time.
    parser.add_argument("--batch", type=int, nargs="+", default=[48], help="images per program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=32, help="side of the images, in pixels")
    parser.add_argument("--data-dir", help="a TFDS data_dir with CIFAR-10")
    flags = parser.parse_args()
    rows, shares = [], []
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        for image_size in flags.sizes:
            for batch in flags.batch:
                images = make_images(batch, flags.side, flags.data_dir)
                halves = [TwoViews(half, image_size, PASSES // 2) for half in np.array_split(images, PROCESSES)]
                taken = measuring.in_turns(
                    {
                        "original": functools.partial(pool.map, transform_all, halves, chunksize=1),
                        "loader": loader(images, image_size),
                        "cib_jax": ours(images, image_size),
                    },
                    rounds=flags.rounds,
                )
                speeds = [f"{PASSES * batch / seconds.median:,.0f}" for seconds in taken.values()]
                ratios = [measuring.format_ratio(taken[other], taken["cib_jax"]) for other in ("original", "loader")]
                rows.append([image_size, batch, *speeds, *ratios])
                shares += _shares(images, image_size, rounds=2 * flags.rounds)
    print(f"\n{measuring.machine('jax', 'torch', 'torchvision', 'opencv-python-headless')}")
    print(f"{flags.side} px {'of CIFAR-10' if flags.data_dir is not None else 'of smooth noise'}; views/s\n")
    measuring.print_table(
        ["px", "batch", f"original, {PROCESSES} processes", "its DataLoader", "cib_jax", "ratio", "ratio to loader"],
        rows,
    )
    print("The time of a stage is the difference from the program that ends one stage earlier\n")
    measuring.print_table(["px", "batch", "stage", "µs/view", "share"], shares)


def _shares(images: np.ndarray, image_size: int, *, rounds: int) -> list[list[object]]:
    taken = measuring.in_turns(stages(images, image_size), rounds=rounds)
    medians = [seconds.median for seconds in taken.values()]
    each = np.diff([0.0, *medians])
    return [
        [image_size, len(images), name, f"{1e6 * seconds / len(images):.0f}", f"{seconds / medians[-1]:.0%}"]
        for name, seconds in zip(taken, each, strict=True)
    ]


if __name__ == "__main__":
    main()

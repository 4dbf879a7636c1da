"""Speed of reading photos: decoding against a plain Pillow loop, preparing a folder, and waiting in training.

`python -m benchmarks.decoding` generates its photos. The plain loop does what a typical PyTorch data set does: open,
rotate upright, convert to RGB, resize. With `--trace=FOLDER`, an epoch is traced instead, and the time that each device
was idle between two steps is read from the trace: set `XLA_FLAGS=--xla_force_host_platform_device_count=2` to simulate
devices.
"""

import collections
import concurrent.futures
import functools
import gzip
import io
import itertools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import optax
import PIL.Image
import PIL.ImageOps

import cib_jax as cib
from benchmarks import measuring
from cib_jax.data import dataset, photo_folder
from cib_jax.data.photo_cache import PhotoCache
from cib_jax.data.photos import decode
from cib_jax.distributed import sharding
from cib_jax.training import input_pipeline, loop, train_step
from cib_jax.training.train_step import Method, Progress

KINDS = {
    "JPEG, 640 × 480": ("JPEG", 640, 480),
    "JPEG, 4000 × 3000": ("JPEG", 4000, 3000),
    "PNG, 640 × 480": ("PNG", 640, 480),
}
BATCH = 64


def make_photo(form: str, width: int, height: int, seed: int) -> bytes:
    """Returns the file of a photo-like image: smooth shapes under a little noise."""
    generator = np.random.default_rng(seed)
    small = PIL.Image.fromarray(generator.integers(0, 256, (9, 12, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), PIL.Image.Resampling.BICUBIC)).astype(np.float32)
    grain = PIL.Image.fromarray((smooth + generator.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    grain.save(file, form, **({"quality": 90} if form == "JPEG" else {}))
    return file.getvalue()


def plainly(content: bytes, size: int) -> np.ndarray:
    """Decodes a photo with Pillow alone."""
    with PIL.Image.open(io.BytesIO(content)) as image:
        upright = PIL.ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(upright.resize((size, size), PIL.Image.Resampling.BILINEAR))


def for_each(function: Callable[[bytes], Any], contents: Sequence[bytes], threads: int) -> None:
    """Calls a function on every file's content, on the given number of threads."""
    if threads == 1:
        for content in contents:
            function(content)
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(function, contents):
            pass


def measure_decoding(sizes: Sequence[int], rounds: int) -> None:
    """Prints photos per second and core for both sides, on one core and on all."""
    rows = []
    for kind, (form, width, height) in KINDS.items():
        contents = [make_photo(form, width, height, seed) for seed in range(4)] * (2 if width > 1000 else 16)
        for size in sizes:
            plain, ours = functools.partial(plainly, size=size), functools.partial(decode, size=size)
            sides = {
                "plain": functools.partial(for_each, plain, contents, 1),
                "ours": functools.partial(for_each, ours, contents, 1),
                "plain on all": functools.partial(for_each, plain, contents, measuring.cores()),
                "ours on all": functools.partial(for_each, ours, contents, measuring.cores()),
            }
            seconds = measuring.in_turns(sides, rounds=rounds)
            rates = {name: len(contents) / taken.median for name, taken in seconds.items()}
            difference = np.abs(plainly(contents[0], size).astype(int) - decode(contents[0], size)).mean()
            rows.append(
                (
                    kind,
                    size,
                    f"{rates['plain']:.0f}",
                    f"{rates['ours']:.0f}",
                    measuring.format_ratio(seconds["plain"], seconds["ours"]),
                    f"{rates['plain on all'] / measuring.cores():.0f}",
                    f"{rates['ours on all'] / measuring.cores():.0f}",
                    measuring.format_ratio(seconds["plain on all"], seconds["ours on all"]),
                    f"{difference:.2f}",
                )
            )
    print(f"Photos/s per core, decoded and resized, on one core and on all {measuring.cores()}, median of {rounds}")
    header = "photo | px | plain Pillow | cib_jax | faster | plain, on all | cib_jax, on all | faster | mean difference"
    measuring.print_table(header.split(" | "), rows)


def make_folder(root: pathlib.Path, count: int) -> None:
    """Writes a folder of JPEGs of 640 × 480."""
    root.mkdir()
    contents = [make_photo("JPEG", 640, 480, seed) for seed in range(20)]
    for number in range(count):
        (root / f"{number:06}.jpg").write_bytes(contents[number % 20])


def measure_folder(count: int, size: int) -> None:
    """Prints the time of preparing a folder, and of a second start from the cache."""
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name, "photos")
        make_folder(root, count)
        load = functools.partial(photo_folder.load_folder, str(root), PhotoCache(pathlib.Path(name, "cache"), size))
        taken = []
        for _ in range(2):
            begun = time.perf_counter()
            source = load()
            taken.append(time.perf_counter() - begun)
        stored = sum(file.stat().st_size for file in pathlib.Path(name, "cache").rglob("*") if file.is_file())
        begun = time.perf_counter()
        some = min(count, 200)
        for number in range(some):
            plainly((root / f"{number:06}.jpg").read_bytes(), size)
        plain = (time.perf_counter() - begun) / some * count
        print(f"A folder of {count:,} JPEGs of 640 × 480, prepared at {size} px")
        rows = [
            ("first start", f"{taken[0]:.1f} s", f"{count / taken[0]:.0f} photos/s on {measuring.cores()} cores"),
            ("plain loop, extrapolated from its first photos", f"{plain:.1f} s", f"{count / plain:.0f} photos/s"),
            ("second start", f"{taken[1]:.2f} s", f"{count / taken[1]:,.0f} photos/s"),
            ("stored on disk", f"{stored / 2**20:.0f} MiB", f"{stored / count / 1024:.0f} KiB a photo"),
        ]
        order = np.random.default_rng(0).permutation(count)
        begun = time.perf_counter()
        collections.deque(dataset.stream(source.train.images, order, BATCH, stored_size=size), maxlen=0)
        rows.append(("reading an epoch in random order", f"{time.perf_counter() - begun:.2f} s", ""))
        measuring.print_table(("", "time", ""), rows)


class Files:
    """Photos that are decoded on access, as those of a large TFDS data set."""

    def __init__(self, contents: Sequence[bytes]):
        """Keeps the contents of the files."""
        self.contents = contents

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.resized(index, 0)

    def resized(self, index: int, size: int) -> np.ndarray:
        """Decodes a photo directly to the given size."""
        return decode(self.contents[index], size)


def nothing(batch: Any) -> None:
    """Does no work on a batch."""


def waits(batches: Callable[[], Iterable[Any]], work: Callable[[Any], Any], shares: list[float]) -> None:
    """Works on one batch after another and appends the share of time spent waiting, without the first batch."""
    steps = iter(batches())
    batch = next(steps, None)
    waited, begun = 0.0, time.perf_counter()
    while batch is not None:
        work(batch)
        asked = time.perf_counter()
        batch = next(steps, None)
        waited += time.perf_counter() - asked
    shares.append(waited / (time.perf_counter() - begun))


def measure_waiting(size: int, count: int) -> None:
    """Prints the share of time that steps wait for the loader, for steps that take several shares of its rate."""
    files = Files([make_photo("JPEG", 640, 480, seed) for seed in range(20)] * (count // 20))
    order = np.random.default_rng(0).permutation(len(files))[: len(files) // BATCH * BATCH]
    stream = functools.partial(dataset.stream, files, order, BATCH, stored_size=size)
    begun = time.perf_counter()
    collections.deque(stream(), maxlen=0)
    rate = len(order) / (time.perf_counter() - begun)
    print(f"A step on a separate device, fed with JPEGs of 640 × 480 at {size} px; the loader alone: {rate:.0f}/s")
    rows = []
    for share in (0.5, 0.8, 0.95, 1.2):
        step = BATCH / (share * rate)
        shares: list[float] = []
        waits(stream, lambda batch, step=step: time.sleep(step), shares)  # type: ignore[misc]
        rows.append((f"{share * rate:.0f}", f"{share:.0%}", f"{1000 * step:.0f} ms", f"{shares[0]:.1%}"))
    measuring.print_table(
        ("photos/s of the step", "share of the loader's rate", "time of a step", "share of time waiting"), rows
    )


def make_work(image_size: int) -> dict[str, tuple[int, int, Callable[[np.ndarray], Any]]]:
    """Returns, by name, the photos in a batch, the number of batches, and blocking work on one batch."""
    key = jax.random.key(0)
    encoder, params, frozen = cib.create_encoder(
        key, backbone="efficientnet_lite0", bits=32, image_size=image_size, pretrained=False
    )
    optimizer = optax.adam(1e-3)
    state = cib.create_train_state(params, optimizer)
    pair = jax.random.uniform(key, (2, BATCH, encoder.backbone.features))
    method: dict[str, Any] = {"encoder": encoder, "optimizer": optimizer}
    head = jax.jit(functools.partial(cib.train_step_on_features, **method))
    step = jax.jit(functools.partial(cib.train_step, **method, augment="photo"))

    def view_of(frozen: Any, keys: jax.Array, photos: jax.Array) -> jax.Array:
        return encoder.features({}, frozen, encoder.view_each(keys, photos, family="photo")).astype(
            input_pipeline.STORED
        )

    # Compiled once here: `build_view_bank` compiles at each call, which is negligible for a bank of many batches.
    view, keys = jax.jit(view_of), jax.random.split(key, 100)
    return {
        "step of the head, on features": (BATCH, 400, lambda photos: jax.block_until_ready(head(state, *pair, key))),
        "step with fresh views": (BATCH, 40, lambda photos: jax.block_until_ready(step(state, frozen, photos, key))),
        "one view for the bank": (100, 40, lambda photos: jax.block_until_ready(view(frozen, keys, photos))),
    }


def measure_prepared(size: int, image_size: int, count: int, rounds: int) -> None:
    """Prints whether work on this machine waits for prepared photos, read in random order."""
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name, "photos")
        make_folder(root, count)
        images = photo_folder.load_folder(str(root), PhotoCache(pathlib.Path(name, "cache"), size)).train.images
        rows = []
        for what, (batch, batches, work) in make_work(image_size).items():
            # Many times the 8 batches that the loader reads ahead; fewer batches would hide a loader that is too slow.
            order = np.random.default_rng(0).integers(count, size=batches * batch)
            stream = functools.partial(dataset.stream, images, order, batch, stored_size=size)
            same = functools.partial(itertools.repeat, next(stream()), batches)
            shares: list[float] = []
            sides = {
                "read": functools.partial(waits, stream, nothing, []),
                "work": functools.partial(waits, same, work, []),
                "both": functools.partial(waits, stream, work, shares),
            }
            taken = measuring.in_turns(sides, rounds=rounds)
            each = [f"{1000 * seconds.median / batches:.1f} ms" for seconds in taken.values()]
            slower = measuring.format_ratio(taken["both"], taken["work"])
            rows.append((what, batch, *each, slower, f"{np.median(shares[-rounds:]):.1%}"))
    print(f"A batch of photos prepared at {size} px, EfficientNet-Lite0 at {image_size} px, on the same cores")
    header = "work | photos | read alone | work alone | together | slower than alone | share of time waiting"
    measuring.print_table(header.split(" | "), rows)


class Training:
    """Epochs of EfficientNet-Lite0 with fresh views, on all devices, fed from files or from memory."""

    def __init__(self, size: int, image_size: int, count: int):
        """Generates the photos, and draws the network's weights."""
        self.files = Files([make_photo("JPEG", 640, 480, seed) for seed in range(20)] * (count // 20))
        encoder, self.params, self.frozen = cib.create_encoder(
            jax.random.key(0), backbone="efficientnet_lite0", bits=32, image_size=image_size, pretrained=False
        )
        self.size, self.method = size, Method(encoder, optax.adam(1e-3))
        self.mesh = sharding.make_mesh(0, BATCH)
        self.order = input_pipeline.BatchOrder(0, BATCH, mesh=self.mesh)
        self.frozen = sharding.replicate(self.frozen, self.mesh)

    def from_files(self) -> loop.Feed:
        """Returns the feed that decodes each photo when it is needed."""
        return input_pipeline.from_stream(self.files, self.frozen, self.method, self.order, stored_size=self.size)

    def from_memory(self) -> loop.Feed:
        """Returns the feed of photos that stay on the device."""
        resident = jax.numpy.asarray(dataset.materialize(self.files, stored_size=self.size))
        return input_pipeline.from_device(resident, self.frozen, self.method, self.order)

    def epoch(self, feed: loop.Feed) -> None:
        """Trains for an epoch."""
        state = train_step.initial_state(self.params, self.method.optimizer, self.mesh)
        state, _ = loop.run(state, Progress(), feed, key=jax.random.key(1), schedule=loop.Schedule(1, BATCH))
        jax.block_until_ready(state.params)


def measure_training(size: int, image_size: int, count: int, rounds: int) -> None:
    """Prints the time of an epoch of training on this machine, fed from files and fed from memory."""
    training = Training(size, image_size, count)
    feeds = {"memory": training.from_memory(), "files": training.from_files()}
    epochs = {name: functools.partial(training.epoch, feed) for name, feed in feeds.items()}
    seconds = measuring.in_turns(epochs, rounds=rounds)
    begun = time.perf_counter()
    for_each(functools.partial(decode, size=size), training.files.contents, measuring.cores())
    decoding = time.perf_counter() - begun
    print(f"EfficientNet-Lite0 at {image_size} px, {count} photos per epoch; the step and decoding share the cores")
    rows = [(name, f"{taken.median:.2f} s", f"{count / taken.median:.0f} photos/s") for name, taken in seconds.items()]
    rows.append(("decoding alone", f"{decoding:.2f} s", f"{count / decoding:.0f} photos/s"))
    measuring.print_table(("fed from", "epoch", ""), rows)


def measure_trace(size: int, image_size: int, count: int, folder: pathlib.Path) -> None:
    """Prints how long each device was idle between two steps of an epoch that is fed from files, by JAX's profiler."""
    training = Training(size, image_size, count)
    feed = training.from_files()
    training.epoch(feed)  # compiles
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        training.epoch(feed)
    newest = max(folder.rglob("*.trace.json.gz"), key=lambda file: file.stat().st_mtime)
    rows = []
    for number, steps in enumerate(steps_of(json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"])):
        idle = [max(0.0, later[0] - earlier[1]) for earlier, later in itertools.pairwise(steps)]
        whole = steps[-1][1] - steps[0][0]
        rows.append((number, len(steps), f"{whole:.2f} s", f"{1000 * max(idle):.1f} ms", f"{sum(idle) / whole:.2%}"))
    print(f"EfficientNet-Lite0 at {image_size} px, {BATCH} photos a step, JPEGs of 640 × 480 decoded at {size} px")
    measuring.print_table(("device", "steps", "first to last", "longest wait", "share of time idle"), rows)


def steps_of(events: Iterable[dict[str, Any]]) -> list[list[tuple[float, float]]]:
    """Returns, for each simulated device of a trace, the begin and end of each execution of a program, in seconds."""
    found: dict[Any, list[tuple[float, float]]] = {}
    events = list(events)
    names = {event["tid"]: event["args"]["name"] for event in events if event.get("name") == "thread_name"}
    for event in events:
        device = names.get(event.get("tid"), "").startswith("tf_XLAPjRtCpuClient")
        if device and event["name"].startswith("ThunkExecutor::Execute (wait"):
            begin = event["ts"] / 1e6
            found.setdefault(event["tid"], []).append((begin, begin + event["dur"] / 1e6))
    return [sorted(steps) for steps in found.values()]


def main() -> None:
    """Reads the flags and prints the tables."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 160, 256], help="stored sizes, pixels")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--photos", type=int, default=4000, help="photos in the folder")
    parser.add_argument("--epoch", type=int, default=640, help="photos per epoch of training")
    parser.add_argument("--trace", type=pathlib.Path, help="folder for the trace of an epoch; nothing else is measured")
    flags = parser.parse_args()
    print(measuring.machine("pillow", "jax"), end="\n\n")
    if flags.trace:
        measure_trace(160, 128, flags.epoch, flags.trace)
        return
    measure_decoding(flags.sizes, flags.rounds)
    measure_folder(flags.photos, 160)
    measure_prepared(160, 128, flags.epoch, flags.rounds)
    measure_waiting(160, 6000)
    measure_training(160, 128, flags.epoch, 3)


if __name__ == "__main__":
    main()

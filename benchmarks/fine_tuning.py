"""Benefit of fine-tuning: MAP@1000 of digits or CIFAR-10, by the part of the backbone that is trained.

`python -m benchmarks.fine_tuning` uses scikit-learn's digits; `--data-dir=DIR`, a TFDS data_dir with CIFAR-10, uses
that in the paper's splits. Rows: `pixels` (signs of random projections of the pixels, without a network), `frozen`,
`last:N` (the last N blocks), `all`, `lora:R` (corrections of rank R of all kernels). `--memory` trains nothing: it
prints the memory that the compiled training step of each row allocates in addition to its arguments, without and with
checkpointing of activations.
"""

import argparse
import functools
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import sklearn.datasets

import cib_jax as cib
from benchmarks import measuring
from cib_jax.baselines import BASELINES
from cib_jax.data import dataset, sources, splits
from cib_jax.data.dataset import DataConfig
from cib_jax.data.splits import PROTOCOLS
from cib_jax.models import registry
from cib_jax.random_streams import stream_key
from cib_jax.training import train_step

Part = tuple[np.ndarray, np.ndarray]
"""Images and their labels."""


class Task(NamedTuple):
    """Images for training, queries and database."""

    name: str
    train: np.ndarray
    query: Part
    database: Part
    augment: str
    temperature: float


def digits() -> Task:
    """Returns digits: 297 queries on a database of 1,500, all of which train."""
    loaded = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.images))
    images = np.round(loaded.images[order] * 15.9375).astype(np.uint8)[..., None].repeat(3, axis=-1)
    labels = loaded.target[order]
    database = images[297:], labels[297:]
    return Task("digits", images[297:], (images[:297], labels[:297]), database, "digits", 0.5)


def cifar(directory: str, train: int, queries: int, database: int) -> Task:
    """Returns the given numbers of CIFAR-10's images, drawn from the paper's splits."""
    drawn = splits.draw_splits(sources.load(DataConfig("cifar10", directory)), PROTOCOLS["cifar10-10k-50k"], seed=0)

    def some(part: splits.ImageSet, count: int) -> Part:
        taken = part.take(np.sort(np.random.default_rng(1).permutation(len(part))[:count]))
        assert taken.labels is not None
        return dataset.materialize(taken.images), taken.labels

    return Task(
        "CIFAR-10",
        some(drawn.train, train)[0],
        some(drawn.query, queries),
        some(drawn.database, database),
        "photo",
        0.3,
    )


def pixels(task: Task, bits: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes of queries and database from random projections of pixels."""
    flat = [(images / 255).reshape(len(images), -1).astype(np.float32) for images in (task.train, task.query[0])]
    encode = BASELINES["lsh"].fit(flat[0], bits, jax.random.key(seed))
    searched = (task.database[0] / 255).reshape(len(task.database[0]), -1).astype(np.float32)
    query, database = (np.asarray(cib.pack_bits(encode(part))) for part in (flat[1], searched))
    return query, database


def options_of(row: str, flags: argparse.Namespace, *, checkpointing: bool = False) -> dict[str, Any]:
    """Returns the encoder options that a row stands for, with published weights if the backbone has them."""
    kind, _, number = row.partition(":")
    options: dict[str, Any] = {"frozen": kind == "frozen"}
    if kind != "frozen":
        amount = {"last": "blocks", "lora": "lora_rank"}.get(kind)
        given = {amount: int(number)} if amount else {}
        options["fine_tune"] = cib.FineTune(
            learning_rate=flags.backbone_learning_rate, checkpointing=checkpointing, **given
        )
    if registry.get(flags.backbone).convert is not None:
        options["backbone_params"] = cib.load_pretrained(flags.backbone)
    return options


def fit_row(task: Task, row: str, seed: int, flags: argparse.Namespace) -> cib.Hasher:
    """Returns a hasher trained with the options of a row."""
    options = options_of(row, flags)
    if options["frozen"] and "backbone_params" not in options:
        # The initial weights that training with this seed starts from.
        init_key = stream_key(seed, "initial weights")
        made = cib.create_encoder(init_key, backbone=flags.backbone, bits=flags.bits, image_size=flags.image_size)
        options["backbone_params"] = made[1]["backbone"]
    return cib.fit(
        task.train,
        bits=flags.bits,
        backbone=flags.backbone,
        image_size=flags.image_size,
        augment=task.augment,
        temperature=task.temperature,
        stochastic=not flags.deterministic,
        epochs=flags.epochs,
        seed=seed,
        on_epoch=lambda report: print(f"  loss {report.terms['loss']:.3f}", flush=True) if flags.losses else None,
        **options,
    )


def memory(row: str, flags: argparse.Namespace, *, checkpointing: bool) -> float:
    """Returns the MiB that a training step of `flags.batch` images allocates in addition to its arguments."""
    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0),
        backbone=flags.backbone,
        bits=flags.bits,
        image_size=flags.image_size,
        **options_of(row, flags, checkpointing=checkpointing),
    )
    adam = train_step.adam(1e-3, flags.backbone_learning_rate)
    step = functools.partial(cib.train_step, encoder=encoder, optimizer=adam)
    images = jax.ShapeDtypeStruct((flags.batch, flags.image_size, flags.image_size, 3), np.uint8)
    arguments = cib.create_train_state(params, adam), frozen, images, jax.random.key(1)
    return jax.jit(step).lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 2**20


def print_memory(flags: argparse.Namespace) -> None:
    """Prints the table of `--memory`."""
    print(measuring.machine("jax"))
    print(f"{flags.backbone} at {flags.image_size} px, {flags.batch} images per step\n", flush=True)
    rows = []
    for row in flags.rows:
        cells = []
        for checkpointing in (False, True):
            cells.append(f"{memory(row, flags, checkpointing=checkpointing):,.0f} MiB")
            print(f"{row}{', checkpointing' * checkpointing}: {cells[-1]}", flush=True)
        rows.append((row, *cells))
    print()
    measuring.print_table(("trained besides the head", "plain", "checkpointing"), rows)


def main() -> None:
    """Reads the flags and prints the table."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--data-dir", help="TFDS data_dir with CIFAR-10")
    parser.add_argument("--train", type=int, default=5000, help="training images of CIFAR-10")
    parser.add_argument("--queries", type=int, default=10000)
    parser.add_argument("--database", type=int, default=50000)
    parser.add_argument(
        "--backbone", default="efficientnet_lite0", choices=sorted(registry.BACKBONES.keys() - {"none"})
    )
    parser.add_argument("--image-size", type=int, default=32, help="pixels")
    parser.add_argument("--rows", nargs="+", default=["frozen", "last:1", "last:3", "all", "lora:4"])
    parser.add_argument("--backbone-learning-rate", type=float, default=1e-4, help="0: that of the head, 1e-3")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--deterministic", action="store_true", help="threshold bits in training instead of sampling them"
    )
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--losses", action="store_true", help="print the loss of each epoch")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--memory", action="store_true", help="print the memory of a step and train nothing")
    parser.add_argument("--batch", type=int, default=64, help="images per step with --memory")
    flags = parser.parse_args()
    if flags.memory:
        if not {"frozen", "pixels"}.isdisjoint(flags.rows):
            parser.error("--memory needs rows that train the backbone, got frozen or pixels in --rows; leave them out")
        print_memory(flags)
        return
    task = cifar(flags.data_dir, flags.train, flags.queries, flags.database) if flags.data_dir else digits()
    print(measuring.machine("jax"))
    print(
        f"{task.name}: {len(task.train):,} training images, {len(task.query[0]):,} queries on "
        f"{len(task.database[0]):,}; {flags.backbone} at {flags.image_size} px, {flags.bits} bits, {flags.epochs} "
        f"epochs, seeds 0 to {flags.seeds - 1}\n",
        flush=True,
    )
    rows = []
    for row in flags.rows:
        found, seconds = [], []
        for seed in range(flags.seeds):
            begun = time.perf_counter()
            if row == "pixels":
                codes = pixels(task, flags.bits, seed)
            else:
                hasher = fit_row(task, row, seed, flags)
            seconds.append(time.perf_counter() - begun)
            if row != "pixels":
                codes = hasher.encode(task.query[0]), hasher.encode(task.database[0])
            found.append(cib.mean_average_precision(*codes, task.query[1], task.database[1], k=1000))
            print(f"{row}, seed {seed}: {found[-1]:.4f} after {seconds[-1]:.0f} s", flush=True)
        rows.append((row, measuring.mean_and_deviation(found), f"{np.median(seconds):.0f} s"))
    print()
    measuring.print_table(("trained besides the head", "MAP@1000", "median training time"), rows)


if __name__ == "__main__":
    main()

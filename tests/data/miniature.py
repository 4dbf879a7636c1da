"""A miniature CIFAR-10 in the layout of the published archive, prepared by TFDS as the real one is."""

import pathlib
import unittest.mock

import numpy as np
import tensorflow_datasets as tfds

from cib_jax.data import sources
from cib_jax.data.dataset import DataConfig

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_archive(folder: pathlib.Path, per_file: int, seed: int = 0) -> pathlib.Path:
    """Writes cifar-10-batches-bin with `per_file` images in each of its six files; returns the folder."""
    inside = folder / "cifar-10-batches-bin"
    inside.mkdir(parents=True)
    (inside / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n")
    generator = np.random.default_rng(seed)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = np.arange(per_file) % 10
        # Each class has a color of its own, so that there is something to learn.
        colors = np.random.default_rng(1).integers(0, 256, (10, 3, 1))
        pixels = colors[labels] + generator.normal(0, 30, (per_file, 3, 1024))
        rows = np.concatenate([labels[:, None], pixels.clip(0, 255).reshape(per_file, -1)], axis=1)
        rows.astype(np.uint8).tofile(inside / f"{name}.bin")
    return folder


def prepare(data_dir: pathlib.Path, per_file: int = 20, seed: int = 0) -> pathlib.Path:
    """Prepares the miniature as `cifar10` under `data_dir`, as if it had been downloaded; returns `data_dir`."""
    archive = write_archive(data_dir / "archive", per_file, seed)
    with unittest.mock.patch.object(
        tfds.download.DownloadManager, "download_and_extract", lambda manager, url: archive
    ):
        sources.load(DataConfig("cifar10", str(data_dir)))
    return data_dir

"""CIFAR by TFDS's own builders, which ask TensorFlow to open files and to encode PNGs, without TensorFlow."""

import contextlib
import importlib.util
import io
from collections.abc import Iterator

import numpy as np
import PIL.Image
from etils import epath
from jaxtyping import UInt8

SIDE = 32


def read_binary(path: str, labels_number: int = 1) -> Iterator[tuple[UInt8[np.ndarray, " labels"], io.BytesIO]]:
    """Yields the labels and the image, as a PNG file, of each record of a published CIFAR binary.

    A record is `labels_number` bytes of labels and then the red, green and blue planes, row by row
    (https://www.cs.toronto.edu/~kriz/cifar.html).

    Raises:
      ValueError: the file does not consist of whole records.
    """
    length = labels_number + 3 * SIDE * SIDE
    content = np.frombuffer(epath.Path(path).read_bytes(), np.uint8)
    if len(content) == 0 or len(content) % length:
        raise ValueError(f"{path}: {len(content)} bytes are not whole records of {length}; download it again")
    for record in content.reshape(-1, length):
        image = record[labels_number:].reshape(3, SIDE, SIDE).transpose(1, 2, 0)
        file = io.BytesIO()
        PIL.Image.fromarray(np.ascontiguousarray(image)).save(file, "PNG")
        file.seek(0)
        yield record[:labels_number], file


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Lets TFDS's CIFAR builders read by `read_binary` while it lasts, where TensorFlow is not installed."""
    from tensorflow_datasets.image_classification import cifar

    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    original = cifar._load_data
    cifar._load_data = read_binary
    try:
        yield
    finally:
        cifar._load_data = original

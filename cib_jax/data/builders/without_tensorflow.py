"""TFDS's own builders without TensorFlow, which most of them ask only to open files and to write images."""

import contextlib
import glob
import importlib.util
import io
import os
import shutil
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
from etils import epath
from jaxtyping import Shaped


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """While it lasts, gives TFDS a stand-in for the parts of TensorFlow that unpack archives and read files.

    Does nothing where TensorFlow is installed. A builder that asks for more gets an AttributeError that names it.
    """
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    from tensorflow_datasets.core.features.image_feature import _ImageEncoder
    from tensorflow_datasets.core.utils import lazy_imports_utils

    original = _ImageEncoder._encode_image
    # TFDS imports TensorFlow late, through this one object, which remembers it under this name. A module in sys.modules
    # would be seen by every other library, too.
    late = vars(lazy_imports_utils.tensorflow)
    late["_module"] = _stand_in()
    _ImageEncoder._encode_image = _encode_image
    try:
        yield
    finally:
        del late["_module"]
        _ImageEncoder._encode_image = original


def _encode_image(encoder: Any, image: Shaped[np.ndarray, "height width channels"]) -> bytes:
    """Writes an image with Pillow, in the format that TFDS's feature names."""
    file = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, encoder.encoding_format.upper())
    return file.getvalue()


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"TensorFlow itself is needed for {self.__name__}.{name}")


def _stand_in() -> types.ModuleType:
    return _part(
        "tensorflow",
        io=_part("tensorflow.io", gfile=_part("tensorflow.io.gfile", **_FILES)),
        compat=_part("tensorflow.compat", as_text=_as_text, as_bytes=_as_bytes, as_str=_as_text),
        errors=_part("tensorflow.errors", UnimplementedError=NotImplementedError, NotFoundError=OSError),
    )


def _part(name: str, **members: Any) -> types.ModuleType:
    part = _StandIn(name)
    vars(part).update(members)
    return part


def _open(path: Any, mode: str = "r") -> Any:
    return epath.Path(path).open(mode)


def _as_text(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text


def _as_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


_FILES = {
    "GFile": _open,
    "Open": _open,
    "copy": lambda source, target, overwrite=False: epath.Path(source).copy(target, overwrite=overwrite),
    "exists": os.path.exists,
    "glob": lambda pattern: sorted(glob.glob(os.fspath(pattern))),
    "isdir": os.path.isdir,
    "listdir": lambda path: sorted(os.listdir(path)),
    "makedirs": lambda path: os.makedirs(path, exist_ok=True),
    "remove": os.remove,
    "rename": lambda source, target, overwrite=False: os.replace(source, target),
    "rmtree": shutil.rmtree,
    "stat": os.stat,
    "walk": os.walk,
}

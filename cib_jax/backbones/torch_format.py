"""PyTorch's two file formats without PyTorch: a zip archive (since 1.6) and, before it, pickles in a row.

Source: the layout that `torch/serialization.py` writes. The pickles are interpreted by `torch_pickle`.
"""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

from cib_jax.backbones.torch_pickle import FormatError, Storage, Tensor, interpret, shown

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little") + b"."
ZIP_START = b"PK\x03\x04"
LARGEST_PICKLE = 4 << 20  # bytes; that of a network with 300 tensors has 30 KB


def read_zip(file: BinaryIO, prefixes: Sequence[str] = ("",)) -> dict[str, np.ndarray]:
    """Returns the tensors of a file written by PyTorch 1.6 or later whose names begin with one of `prefixes`.

    Raises:
        FormatError: if it is cut short, corrupt, or holds anything but tensors.
    """
    length = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            # PyTorch stores without compression. Held to that, no file can grow when it is read.
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries.values()):
                raise FormatError("holds compressed entries, which PyTorch never writes")
            if sum(e.file_size for e in archive.infolist()) > length:
                raise FormatError("claims to hold more bytes than it has")
            roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
            if len(roots) != 1:
                raise FormatError("is a zip archive but not one of PyTorch: it has no data.pkl")
            root = roots[0]
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise FormatError("was written on a big-endian machine, which is not supported")
            if entries[f"{root}data.pkl"].file_size > LARGEST_PICKLE:
                raise FormatError(f"has a pickle of more than {LARGEST_PICKLE} bytes")
            content, _ = interpret(archive.read(f"{root}data.pkl"))

            def read_storage(storage: Storage) -> bytes:
                name = f"{root}data/{storage.key}"
                if name not in entries:
                    raise FormatError(f"lacks the numbers of storage {shown(storage.key)}")
                return archive.read(name)

            return _materialise(_chosen(_state_dict(content), prefixes), read_storage)
    except FormatError:
        raise
    # What zipfile raises on damaged archives, depending on which of their fields is damaged.
    except (
        zipfile.BadZipFile,
        EOFError,
        OSError,
        RuntimeError,
        ValueError,
        struct.error,
        zlib.error,
    ) as error:
        raise FormatError(f"is cut short or corrupt ({shown(error)})") from error


def read_legacy(file: BinaryIO, prefixes: Sequence[str] = ("",)) -> dict[str, np.ndarray]:
    """Returns the same of a file in the format before PyTorch 1.6: five pickles, then all the numbers.

    Raises:
        FormatError: if it is cut short, corrupt, or holds anything but tensors.
    """
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    parts = []
    for _ in range(5):
        start = file.tell()
        part, used = interpret(file.read(LARGEST_PICKLE))
        file.seek(start + used)
        parts.append(part)
    magic, version, system, content, keys = parts
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION or not isinstance(system, dict):
        raise FormatError("does not begin as PyTorch's files do")
    if system.get("little_endian") is not True:
        raise FormatError("was written on a big-endian machine, which is not supported")
    if not isinstance(keys, list):
        raise FormatError("lists no storages")
    tensors = _state_dict(content)
    declared = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    chosen = _chosen(tensors, prefixes)
    wanted = {tensor.storage.key for tensor in chosen.values()}
    numbers: dict[str, bytes] = {}
    for key in keys:
        if not isinstance(key, str) or key not in declared or key in numbers:
            raise FormatError("is corrupt (it lists a storage that no tensor uses)")
        size = int.from_bytes(file.read(8), "little", signed=True) * declared[key].dtype.itemsize
        if not 0 <= size <= length - file.tell():
            raise FormatError(f"is cut short or corrupt (storage {shown(key)} would end after the file)")
        numbers[key] = file.read(size) if key in wanted else b""
        if key not in wanted:
            file.seek(size, io.SEEK_CUR)
    missing = declared.keys() - numbers.keys()
    if missing:
        raise FormatError(f"lacks the numbers of storage {shown(min(missing))}")
    return _materialise(chosen, lambda storage: numbers[storage.key])


def _chosen(tensors: dict[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(tuple(prefixes))}


def _state_dict(content: Any) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise FormatError("holds no state-dict of named tensors")
    strangers = [n for n, t in content.items() if not isinstance(n, str) or not isinstance(t, Tensor)]
    if strangers:
        raise FormatError(f"holds more than named tensors: {shown(strangers[0])} is not one")
    return content


def _materialise(tensors: dict[str, Tensor], read: Callable[[Storage], bytes]) -> dict[str, np.ndarray]:
    """Views of the storages; a view takes no memory of its own, whatever sizes the file claims."""
    numbers: dict[Storage, np.ndarray] = {}
    arrays = {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        if storage not in numbers:
            data = read(storage)
            if len(data) != storage.count * storage.dtype.itemsize:
                raise FormatError(f"is cut short or corrupt (storage {shown(storage.key)} has another size)")
            numbers[storage] = np.frombuffer(data, storage.dtype)
        arrays[name] = _view(name, tensor, numbers[storage])
    return arrays


def _view(name: str, tensor: Tensor, numbers: np.ndarray) -> np.ndarray:
    count = math.prod(tensor.shape)
    steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)]
    last = tensor.offset + sum(steps) if count else tensor.offset - 1
    if last >= len(numbers) or count > len(numbers):
        raise FormatError(f"is corrupt or malicious (tensor {shown(name)} reaches beyond its storage)")
    byte_strides = [stride * numbers.itemsize for stride in tensor.strides]
    start = numbers[tensor.offset :] if count else numbers[:0]
    return np.lib.stride_tricks.as_strided(start, tensor.shape, byte_strides, writeable=False)

"""PyTorch's state-dicts without PyTorch: their tensors in a network of ours, and the reader of checkpoint files.

The reader imports nothing that a file names. Both formats are read: zip archives (since PyTorch 1.6) and, before them,
five pickles in a row followed by the numbers (`torch/serialization.py`). A pickle is a program, so it runs in an
unpickler that knows nothing but what a state-dict of tensors needs.
"""

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]
Tree = dict[Any, Any]
"""Nested dicts of arrays, keyed by names and, for blocks, by numbers."""
NORM = ("weight", "bias", "running_mean", "running_var")  # tensors of a batch norm


class MismatchError(ValueError):
    """The tensors belong to another network: some are missing, unknown or of another shape."""


class NormedConvolution(NamedTuple):
    """A convolution without bias and the batch norm after it, by their names in the state-dict."""

    conv: str
    norm: str
    shape: Shape  # of PyTorch's weight: [outputs, inputs, height, width]

    @property
    def torch_shapes(self) -> dict[str, Shape]:
        """The names and shapes of the tensors of both."""
        return {f"{self.conv}.weight": self.shape} | {f"{self.norm}.{part}": self.shape[:1] for part in NORM}


def validate_shapes(tensors: Mapping[str, np.ndarray], needed: Mapping[str, Shape], extra: set[str]) -> None:
    """Raises `MismatchError` unless all `needed` tensors are there, in these shapes, and no others but `extra` ones."""
    present = {name: tensors[name] for name in needed if name in tensors}
    faults = {
        "missing": [name for name in needed if name not in tensors],
        "unknown": [name for name in tensors if name not in needed and name not in extra],
        "of another shape": [
            f"{name} {list(tensor.shape)} (needed {list(needed[name])})"
            for name, tensor in present.items()
            if tensor.shape != needed[name]
        ],
        "not of floats": [f"{name} ({tensor.dtype})" for name, tensor in present.items() if not _is_float(tensor)],
    }
    listed = [f"{fault}: {_first(names)}" for fault, names in faults.items() if names]
    if listed:
        raise MismatchError("; ".join(listed))


def fold_batch_norms(
    tensors: Mapping[str, np.ndarray], layers: Sequence[NormedConvolution], epsilon: float
) -> dict[str, Tree]:
    """Returns a `kernel` [height, width, inputs, outputs] and a `bias` [outputs], float32, for each convolution.

    A batch norm with fixed statistics scales and shifts each output, so it can become a part of the convolution. The
    result is computed in float64 and rounded once. `epsilon` is what the batch norms add to the variance.
    """
    folded = {}
    for layer in layers:
        weight = tensors[f"{layer.conv}.weight"].astype(np.float64)
        gain, offset, mean, variance = (tensors[f"{layer.norm}.{part}"].astype(np.float64) for part in NORM)
        scale = gain / np.sqrt(variance + epsilon)
        kernel = weight.transpose(2, 3, 1, 0) * scale
        folded[layer.conv] = {"kernel": as_float32(kernel), "bias": as_float32(offset - mean * scale)}
    return folded


def gather_blocks(folded: Mapping[str, Tree], blocks: Sequence[str], parts: Mapping[str, str]) -> Tree:
    """Returns the layers of each block; `parts` maps their names to those in the file, which some blocks lack."""
    return {
        i: {part: folded[f"{block}.{name}"] for part, name in parts.items() if f"{block}.{name}" in folded}
        for i, block in enumerate(blocks)
    }


def counters(layers: Sequence[NormedConvolution]) -> set[str]:
    """Returns the names of the batch norms' step counters, which PyTorch's files may contain."""
    return {f"{layer.norm}.num_batches_tracked" for layer in layers}


def as_float32(tensor: np.ndarray) -> np.ndarray:
    """Returns the tensor in float32, contiguous."""
    return np.ascontiguousarray(tensor, dtype=np.float32)


def _is_float(tensor: np.ndarray) -> bool:
    # NumPy itself does not count the extension type bfloat16 as a float.
    return np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == "bfloat16"


def _first(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Reading checkpoint files.


DTYPES = {
    f"torch.{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Float": "<f4", "Double": "<f8", "Half": "<f2", "BFloat16": ml_dtypes.bfloat16, "Long": "<i8", "Int": "<i4",
        "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?",
    }.items()
}  # fmt: skip
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little") + b"."
ZIP_START = b"PK\x03\x04"
LARGEST_PICKLE = 4 << 20  # bytes; a network with 300 tensors has a pickle of 30 KB


class FormatError(ValueError):
    """The bytes are not a PyTorch file of plain tensors; the message completes a sentence that begins with the path."""


class Storage(NamedTuple):
    """An array of numbers in the file, of which tensors are views."""

    dtype: np.dtype
    key: str
    size: int


class Tensor(NamedTuple):
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def printable(value: object, longest: int = 80) -> str:
    """Returns text from an untrusted file in plain ASCII, without control characters and not too long."""
    text = ascii(str(value)[: longest + 1])[1:-1]
    return text if len(text) <= longest else f"{text[:longest]}…"


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise FormatError("is corrupt or malicious (a size, stride or offset is not a number from 0 to 2⁴⁸)")
    return value


class _Dict(dict[Any, Any]):
    """A dict of a pickle; its keys are text or small integers.

    Hashing nested tuples can exhaust time or the stack. Multiples of 2⁶¹ − 1 all have the hash 0, so that the time of a
    dict of many of them grows with the square of their number.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 1 << 48):
            raise FormatError("is corrupt or malicious (a key of a dict is neither text nor a number below 2⁴⁸)")
        super().__setitem__(key, value)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_unused: Any) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise FormatError("is corrupt (a tensor without storage, shape or strides)")
    if len(shape) != len(strides) or len(shape) > 8:
        raise FormatError(f"is corrupt (a tensor of {len(shape)} sizes with {len(strides)} strides)")
    return Tensor(storage, _natural(offset), tuple(map(_natural, shape)), tuple(map(_natural, strides)))


def _parameter(tensor: Any, *_unused: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise FormatError("is corrupt (a parameter that is not a tensor)")
    return tensor


# The only functions that a pickle can call. Each replaces the function of this name and validates its arguments.
CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: _Dict(),  # noqa: PLW0108 - it takes no arguments
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}
# Operations that a state-dict needs, in the protocols 2 to 5.
OPERATIONS = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE,
    pickle.SHORT_BINUNICODE, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.MARK, pickle.TUPLE, pickle.SETITEM, pickle.SETITEMS, pickle.APPEND, pickle.APPENDS, pickle.BINPUT,
    pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.STACK_GLOBAL,
    pickle.REDUCE, pickle.BINPERSID,
)  # fmt: skip


class _Unpickler(pickle._Unpickler):
    """Unpickles dicts, lists, tuples, numbers, text and descriptions of tensors; refuses every other operation.

    It extends the Python implementation, not the one in C: only here operations can be left out, and the one in C
    allocates as much memory for its memo as a file of ten bytes asks for.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Returns one of `CONSTRUCTORS`, or the name of a type of storage, which is not callable."""
        path = f"{module}.{name}"
        if path not in CONSTRUCTORS and path not in DTYPES:
            raise FormatError(f"asks for the Python object {printable(path)}: not a plain state-dict, maybe malicious")
        return CONSTRUCTORS.get(path, path)

    def persistent_load(self, identity: Any) -> Storage:
        """Returns the description of a storage."""
        kind, name, key, _location, count, *view = identity
        if kind != "storage" or not isinstance(name, str) or name not in DTYPES or not isinstance(key, str):
            raise FormatError("is corrupt (it refers to a storage of unknown type)")
        if view and view[0] is not None:
            raise FormatError("holds views of storages, which PyTorch stopped writing in 2017")
        return Storage(DTYPES[name], key, _natural(count))

    def _empty_dict(self) -> None:
        self.stack.append(_Dict())

    def _build(self) -> None:
        """Drops the attributes of a state-dict (its layers' versions); pickle's own BUILD would set any attribute."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _Dict):
            raise FormatError("is corrupt (its pickle sets attributes of something other than a dict)")

    def _refuse(self) -> None:
        raise FormatError("holds a pickle operation that a state-dict does not need")

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict.fromkeys(range(256), _refuse)
    dispatch.update({code[0]: pickle._Unpickler.dispatch[code[0]] for code in OPERATIONS})
    dispatch.update({pickle.EMPTY_DICT[0]: _empty_dict, pickle.BUILD[0]: _build})


def _unpickle(data: bytes) -> tuple[Any, int]:
    """Returns the content of the first pickle in `data` and its length in bytes."""
    file = io.BytesIO(data)
    try:
        return _Unpickler(file).load(), file.tell()
    except FormatError:
        raise
    # Everything that damaged pickles raise: they pop from an empty stack, call a number, end too early …
    except (
        pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
        struct.error,
    ) as error:  # fmt: skip
        raise FormatError(f"is cut short or corrupt ({printable(error) or type(error).__name__})") from error


def read_zip(file: io.BufferedIOBase, prefixes: Sequence[str] = ("",)) -> dict[str, np.ndarray]:
    """Returns the tensors of a file of PyTorch 1.6 or later with names that begin with one of `prefixes`."""
    length = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            # PyTorch stores without compression; with this rule, no file can expand when it is read.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
                raise FormatError("holds compressed entries, which PyTorch never writes")
            if sum(entry.file_size for entry in archive.infolist()) > length:
                raise FormatError("claims to hold more bytes than it has")
            roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
            if len(roots) != 1:
                raise FormatError("is a zip archive but not a PyTorch file: it has no data.pkl")
            (root,) = roots
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise FormatError("was written on a big-endian machine, which is not supported")
            if entries[f"{root}data.pkl"].file_size > LARGEST_PICKLE:
                raise FormatError(f"has a pickle of more than {LARGEST_PICKLE} bytes")
            content, _ = _unpickle(archive.read(f"{root}data.pkl"))

            def read_storage(key: str) -> bytes:
                if f"{root}data/{key}" not in entries:
                    raise FormatError(f"lacks the numbers of storage {printable(key)}")
                return archive.read(f"{root}data/{key}")

            return _arrays(_select(_state_dict(content), prefixes), read_storage)
    except FormatError:
        raise
    # Everything that zipfile raises on damaged archives, depending on which field is damaged.
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error, zlib.error) as error:
        raise FormatError(f"is cut short or corrupt ({printable(error)})") from error


def read_legacy(file: io.BufferedIOBase, prefixes: Sequence[str] = ("",)) -> dict[str, np.ndarray]:
    """Returns such tensors of a file in the format before PyTorch 1.6: five pickles, then all numbers."""
    length, position, parts = file.seek(0, io.SEEK_END), 0, []
    for _ in range(5):
        file.seek(position)
        part, used = _unpickle(file.read(LARGEST_PICKLE))
        position += used
        parts.append(part)
    file.seek(position)
    magic, version, system, content, keys = parts
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION or not isinstance(system, dict):
        raise FormatError("does not begin like a PyTorch file")
    if system.get("little_endian") is not True:
        raise FormatError("was written on a big-endian machine, which is not supported")
    if not isinstance(keys, list):
        raise FormatError("lists no storages")
    tensors = _state_dict(content)
    declared = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    selected = _select(tensors, prefixes)
    needed = {tensor.storage.key for tensor in selected.values()}
    numbers: dict[str, bytes] = {}
    for key in keys:
        if not isinstance(key, str) or key not in declared or key in numbers:
            raise FormatError("is corrupt (it lists a storage that no tensor uses)")
        size = int.from_bytes(file.read(8), "little", signed=True) * declared[key].dtype.itemsize
        if not 0 <= size <= length - file.tell():
            raise FormatError(f"is cut short or corrupt (storage {printable(key)} would end after the file)")
        numbers[key] = file.read(size) if key in needed else b""
        if key not in needed:
            file.seek(size, io.SEEK_CUR)
    if missing := declared.keys() - numbers.keys():
        raise FormatError(f"lacks the numbers of storage {printable(min(missing))}")
    return _arrays(selected, numbers.__getitem__)


READERS = {ZIP_START: read_zip, LEGACY_START: read_legacy}
"""Readers by the first bytes of the file."""


def _select(tensors: dict[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(tuple(prefixes))}


def _state_dict(content: Any) -> dict[str, Tensor]:
    # A training checkpoint holds the state-dict under this name, beside an epoch and the like.
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise FormatError("holds no state-dict of named tensors")
    others = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if others:
        raise FormatError(f"holds more than named tensors: {printable(others[0])} is not one")
    return content


def _arrays(tensors: dict[str, Tensor], read: Callable[[str], bytes]) -> dict[str, np.ndarray]:
    """Returns views of the storages; a view takes no memory of its own, whatever sizes the file claims."""
    numbers: dict[Storage, np.ndarray] = {}
    for storage in dict.fromkeys(tensor.storage for tensor in tensors.values()):
        data = read(storage.key)
        if len(data) != storage.size * storage.dtype.itemsize:
            raise FormatError(f"is cut short or corrupt (storage {printable(storage.key)} has another size)")
        numbers[storage] = np.frombuffer(data, storage.dtype)
    return {name: _view(name, tensor, numbers[tensor.storage]) for name, tensor in tensors.items()}


def _view(name: str, tensor: Tensor, numbers: np.ndarray) -> np.ndarray:
    count = math.prod(tensor.shape)
    steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)]
    last = tensor.offset + sum(steps) if count else tensor.offset - 1
    # The second condition refuses strides of 0, by which a few numbers would become an array of any size.
    if last >= len(numbers) or count > len(numbers):
        raise FormatError(f"is corrupt or malicious (tensor {printable(name)} reaches beyond its storage)")
    byte_strides = [stride * numbers.itemsize for stride in tensor.strides]
    start = numbers[tensor.offset :] if count else numbers[:0]
    return np.lib.stride_tricks.as_strided(start, tensor.shape, byte_strides, writeable=False)

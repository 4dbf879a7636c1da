"""A torch file's pickle, read as data: nothing that it names is ever imported or called.

A pickle is a program. `pickle` is therefore not used to run it: `pickletools` splits it into operations, and
the few that a saved state-dict needs are interpreted here, over dicts, tuples, lists and descriptions of
tensors. Any other operation, and any other name, is refused.
Source: the standard library's `pickletools`, which documents every operation."""

import dataclasses
import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

# backbones.torch_pickle: A torch file's pickle, read as data: nothing that it names is ever imported or called.
#
# A pickle is a program. `pickle` is therefore not used to run it: `pickletools` splits it into operations, and
# the few that a saved state-dict needs are interpreted here, over dicts, tuples, lists and descriptions of
# tensors. Any other operation, and any other name, is refused.
# Source: the standard library's `pickletools`, which documents every operation.

DTYPES = {
    ("torch", f"{name}Storage"): np.dtype(dtype)
    for name, dtype in {
        "Float": "<f4",
        "Double": "<f8",
        "Half": "<f2",
        "BFloat16": ml_dtypes.bfloat16,
        "Long": "<i8",
        "Int": "<i4",
        "Short": "<i2",
        "Char": "i1",
        "Byte": "u1",
        "Bool": "?",
    }.items()
}
ORDERED_DICT = ("collections", "OrderedDict")
TENSOR = ("torch._utils", "_rebuild_tensor_v2")
PARAMETER = ("torch._utils", "_rebuild_parameter")
KNOWN = {ORDERED_DICT, TENSOR, PARAMETER, *DTYPES}


class FormatError(ValueError):
    """The bytes are not a torch file that holds plain tensors; the message says why, in half a sentence."""


@dataclasses.dataclass(frozen=True)
class Name:
    """What a pickle refers to as module and name: a label here, never looked up."""

    path: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of numbers in the file, that tensors are views of."""

    dtype: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def interpret(data: bytes) -> tuple[Any, int]:
    """Returns what the first pickle in `data` describes, and its length in bytes. Runs nothing that it names.

    Raises:
        FormatError: if the pickle is cut short or asks for more than dicts, tuples, lists, numbers, tensors.
    """
    machine = _Machine()
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop(), (position or 0) + 1
            if opcode.name not in OPERATIONS:
                raise FormatError(f"holds the pickle operation {opcode.name}, which no file of weights needs")
            OPERATIONS[opcode.name](machine, argument)
    except FormatError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise FormatError(f"is cut short or corrupt ({shown(error)})") from error
    raise FormatError("is cut short: its pickle does not end")


def shown(value: object, longest: int = 80) -> str:
    """Returns text from an untrusted file such that a terminal can show it: plain ASCII, not too long."""
    text = ascii(str(value)[: longest + 1])[1:-1]
    return text if len(text) <= longest else f"{text[:longest]}…"


class _Machine:
    """The stack, the marks and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise FormatError("is corrupt (its pickle takes more than it gave)")
        taken = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return taken

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> tuple[Any, ...]:
        taken, self.stack = tuple(self.stack), self.marks.pop()
        return taken

    def set_items(self, pairs: tuple[Any, ...]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, str | int) for key in pairs[::2]):
            raise FormatError("is corrupt (its pickle fills what is not a dict of names)")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def extend(self, items: tuple[Any, ...]) -> None:
        if not isinstance(self.stack[-1], list):
            raise FormatError("is corrupt (its pickle extends what is not a list)")
        self.stack[-1].extend(items)


def _push(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _constant(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make())


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(machine.pop(count))


def _name(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    _push_name(machine, (module, name))


def _stack_name(machine: _Machine, _: None) -> None:
    module, name = machine.pop(2)
    _push_name(machine, (module, name))


def _push_name(machine: _Machine, path: tuple[str, str]) -> None:
    if not all(isinstance(part, str) for part in path):
        raise FormatError("is corrupt (a name that is no text)")
    if path not in KNOWN:
        raise FormatError(
            f"asks for the Python object {shown('.'.join(path))}: not a plain state-dict, perhaps malicious"
        )
    machine.push(Name(path))


def _reduce(machine: _Machine, _: None) -> None:
    """What would be a call: each of the three known makers is carried out here, by hand."""
    maker, arguments = machine.pop(2)
    if maker == Name(ORDERED_DICT) and arguments == ():
        machine.push({})
    elif maker == Name(TENSOR) and isinstance(arguments, tuple) and len(arguments) in (6, 7):
        machine.push(_describe(*arguments[:4]))
    elif maker == Name(PARAMETER) and isinstance(arguments, tuple) and isinstance(arguments[0], Tensor):
        machine.push(arguments[0])
    else:
        raise FormatError("is corrupt (its pickle calls what cannot be called)")


def _build(machine: _Machine, _: None) -> None:
    """A state-dict carries its layers' versions as an attribute, which is of no use here: it is dropped."""
    target, _state = machine.pop(2)
    if not isinstance(target, dict):
        raise FormatError("is corrupt (its pickle sets attributes of what is not a dict)")
    machine.push(target)


def _persistent(machine: _Machine, _: None) -> None:
    (identity,) = machine.pop(1)
    kind, name, key, _location, count = identity[:5]
    if kind != "storage" or not isinstance(name, Name) or name.path not in DTYPES or not isinstance(key, str):
        raise FormatError("is corrupt (it refers to a storage of no known type)")
    if len(identity) > 5 and identity[5] is not None:
        raise FormatError("holds views of storages, which PyTorch stopped writing in 2017")
    machine.push(Storage(DTYPES[name.path], key, _natural(count)))


def _describe(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise FormatError("is corrupt (a tensor without storage, shape or strides)")
    if len(shape) != len(strides) or len(shape) > 8:
        raise FormatError(f"is corrupt (a tensor of {len(shape)} sizes with {len(strides)} strides)")
    return Tensor(storage, _natural(offset), tuple(map(_natural, shape)), tuple(map(_natural, strides)))


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise FormatError("is corrupt or malicious (a size, stride or offset that is negative or absurd)")
    return value


OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), _push),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: machine.push(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, i: machine.memo.__setitem__(i, machine.stack[-1])),
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, i: machine.push(machine.memo[i])),
    "GLOBAL": _name,
    "STACK_GLOBAL": _stack_name,
    "REDUCE": _reduce,
    "BUILD": _build,
    "BINPERSID": _persistent,
}


# backbones.torch_format: PyTorch's two file formats without PyTorch: a zip archive (since 1.6) and, before it, pickles in a row.
#
# Source: the layout that `torch/serialization.py` writes. The pickles are interpreted by `torch_pickle`.


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

            return _materialize(_chosen(_state_dict(content), prefixes), read_storage)
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
    return _materialize(chosen, lambda storage: numbers[storage.key])


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


def _materialize(tensors: dict[str, Tensor], read: Callable[[Storage], bytes]) -> dict[str, np.ndarray]:
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

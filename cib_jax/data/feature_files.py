"""Feature vectors of any model in .npy, .npz, .safetensors or .parquet files: validated, and mapped where possible."""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Float, Float32, Int, Shaped

from cib_jax.data import cache
from cib_jax.data.dataset import Bar, ImageSet, Labels, Source, config_error, is_missing, no_bar, parse_labels
from cib_jax.errors import DataError
from cib_jax.files import count, decode_text, first_line, replacing

FEWEST = 3
BLOCK = 8192
"""Rows that are read and checked together."""

_error = functools.partial(config_error, "dir")
_SAFETENSORS = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": ml_dtypes.bfloat16, "I64": np.int64}
_SAFETENSORS |= {"I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Rows of an array, which may be a memory map; each row is one vector or several views."""

    array: Shaped[np.ndarray, "items ..."]

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Shaped[np.ndarray, "..."]:
        return np.asarray(self.array[index])

    def gather(self, indices: Int[np.ndarray, " items"]) -> Shaped[np.ndarray, "items ..."]:
        """Returns the rows at `indices` as one array."""
        return np.asarray(self.array[indices])


def as_float32(rows: Any) -> Float32[np.ndarray, "..."]:
    """Returns numbers as networks compute with them; those beyond the range of float32, 3.4e38, become infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(rows, np.float32)


class _Content(NamedTuple):
    """Content of a file: features, and labels (an array, or table columns) and ids if it has them."""

    features: Shaped[np.ndarray, "items ..."]
    labels: Any = None
    ids: Sequence[Any] | None = None


def load(path: str, *, labeled: bool = True, cache_root: pathlib.Path | None = None, bar: Bar = no_bar) -> Source:
    """Returns the feature vectors of a file, [items, features] or [items, views, features] in float16, 32 or 64.

    A .npy or .safetensors file is mapped and may be larger than memory, a .npz file is read completely, and a .parquet
    file is copied once, row group by row group, into a .npy file under `cache_root`, or read if that is None.

    The features are the array of a .npy file, and called `features` in the others. Optional labels are `labels`
    (numbers [items] or multi-hot [items, classes]) or, in a .parquet file, the columns of `dataset.parse_labels`;
    optional names of the items are `ids`, or the column `id`. The files NAME.labels.npy and NAME.ids.txt beside any of
    them serve as well.
    """
    path = os.path.expanduser(path)
    content = _read(path, cache_root)
    _validate_type(path, content.features)
    _validate_values(path, content.features, bar)
    ids = _ids(path, content)
    labels, classes = _labels(path, content) if labeled else (None, [])
    return Source(ImageSet(Vectors(content.features), labels, ids), None, classes)


def map_features(path: str) -> tuple[Shaped[np.ndarray, "items ..."], Sequence[str] | None]:
    """Returns the features of a .npy or .safetensors file as a memory map, and the ids of its items, if any."""
    path = os.path.expanduser(path)
    if (extension := os.path.splitext(path)[1].lower()) not in (".npy", ".safetensors"):
        problem = f"{path} must be a .npy or .safetensors file, which can be mapped, got {extension or 'no extension'}"
        raise _error(f"{problem}; save the features in one of these formats")
    content = _read(path, None)
    _validate_type(path, content.features)
    return content.features, _ids(path, content)


# Readers


def _read(path: str, cache_root: pathlib.Path | None) -> _Content:
    formats = ", ".join(_READERS)
    if not os.path.isfile(path):
        raise _error(f"the file {path!r} does not exist; give a file of features ({formats})")
    extension = os.path.splitext(path)[1].lower()
    if extension not in _READERS:
        raise _error(f"{path} must be one of {formats}; save the features in one of these formats")
    try:
        return _READERS[extension](path, cache_root)
    except DataError:
        raise
    except Exception as error:  # each reader has its own classes; all mean that the content does not fit the name
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise _error(f"{path} cannot be read as {extension} ({reason}); save it again") from error


def _read_npz(path: str, cache_root: pathlib.Path | None) -> _Content:
    with np.load(path) as file:
        _validate_names(path, list(file.files))
        labels, ids = (file[name] if name in file.files else None for name in ("labels", "ids"))
        return _Content(file["features"], labels, ids)


def _read_safetensors(path: str, cache_root: pathlib.Path | None) -> _Content:
    # Format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header, a JSON header, and the
    # tensors. The library cannot map, hence the reader here.
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.path.getsize(path):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    _validate_names(path, [name for name in header if name != "__metadata__"])

    def map_tensor(name: str) -> Any:
        if name not in header:
            return None
        entry = header[name]
        if entry["dtype"] not in _SAFETENSORS:
            raise ValueError(f"{name} has the unsupported type {entry['dtype']}")
        start, stop = entry["data_offsets"]
        dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
        fits = 0 <= start <= stop <= os.path.getsize(path) - 8 - length
        if not fits or stop - start != dtype.itemsize * math.prod(entry["shape"]):
            raise ValueError(f"{name} does not fit into the file")
        return np.memmap(path, dtype, "r", 8 + length + start, tuple(entry["shape"]))

    return _Content(map_tensor("features"), map_tensor("labels"))


def _read_parquet(path: str, cache_root: pathlib.Path | None) -> _Content:
    file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    _validate_names(path, names)
    columns = file.read([name for name in ("label", "labels", "id") if name in names]).to_pydict()
    labels = {name: columns[name] for name in ("label", "labels") if name in names}
    if not file.metadata.num_rows:
        raise _error(f"{path} holds no row; give one for each item")
    if cache_root is None:
        features = np.concatenate(list(_row_groups(path, file)))
    else:
        features = np.load(_copy_parquet(path, file, cache_root), mmap_mode="r")
    return _Content(features, labels or None, columns.get("id"))


_READERS: dict[str, Callable[[str, pathlib.Path | None], _Content]] = {
    ".npy": lambda path, _: _Content(np.load(path, mmap_mode="r")),
    ".npz": _read_npz,
    ".parquet": _read_parquet,
    ".safetensors": _read_safetensors,
}


def _row_groups(path: str, file: pyarrow.parquet.ParquetFile) -> Iterator[Float[np.ndarray, "rows features"]]:
    """Yields the features of each row group."""
    width = before = 0
    for group in range(file.num_row_groups):
        column = file.read_row_group(group, columns=["features"]).column("features").combine_chunks()
        types = pyarrow.types
        if not any(kind(column.type) for kind in (types.is_list, types.is_large_list, types.is_fixed_size_list)):
            raise _error(f"{path}: the column 'features' must hold lists, got {column.type}; save a list in each row")
        if column.null_count:
            empty = before + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise _error(f"{path}, row {empty}: features must be a list, got null; correct or remove the row")
        values = column.flatten().to_numpy(zero_copy_only=False)
        width = width or len(values) // max(len(column), 1)
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
        if not np.array_equal(lengths, [width]):
            raise _error(f"{path}: all rows must have equally many features, got {lengths.min()} to {lengths.max()}")
        before += len(column)
        yield values.reshape(len(column), width)


def _copy_parquet(path: str, file: pyarrow.parquet.ParquetFile, cache_root: pathlib.Path) -> pathlib.Path:
    """Returns the .npy copy of the features, which is written unless the cache has it."""
    status = os.stat(path)
    key = {"features": os.path.abspath(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    folder = cache.key_folder(cache_root, key)
    copy = folder / "features.npy"
    if not copy.exists():
        with cache.write_errors(folder, f"the copy of {path} that can be mapped"):
            cache.create_folder(cache_root, key)
            # Written rather than mapped: on a full disk, writing to a map would kill the process.
            with replacing(copy) as part, part.open("wb") as out:
                for rows in _row_groups(path, file):
                    if not out.tell():
                        shape = (file.metadata.num_rows, rows.shape[1])
                        size = int(np.prod(shape)) * rows.itemsize
                        cache.validate_free_space(folder, size, "prepared features", "free some space")
                        header = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(out, header)
                    out.write(np.ascontiguousarray(rows).data)
    cache.mark_used(folder)
    return copy


# Validation


def _validate_names(path: str, names: Sequence[str]) -> None:
    if "features" not in names:
        held = reprlib.repr(list(names))
        raise _error(f"{path} must hold 'features', got {held}; rename the features")
    for name in ("features", "label", "labels", "id"):
        if names.count(name) > 1:
            raise _error(f"{path} must have one column {name!r}, got several; rename or remove the others")


def _validate_type(path: str, features: Any) -> None:
    if features.ndim not in (2, 3) or 0 in features.shape[1:]:
        shape = list(features.shape)
        raise _error(f"{path} must hold an array [items, features] or [items, views, features], got {shape}")
    if features.dtype not in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):  # not in another byte order
        problem = f"{path} must hold little-endian numbers in float16, 32 or 64, got {features.dtype}"
        raise _error(f"{problem}; apply .astype('float32')")


def _validate_values(path: str, features: Any, bar: Bar) -> None:
    """Checks that there are enough vectors, all finite and not all the same."""
    if len(features) < FEWEST:
        raise _error(f"{path} must hold at least {FEWEST} items, and some hundred to be useful, got {len(features)}")
    bad_values, first, varies = 0, None, False
    reference = np.asarray(features[0]).reshape(-1, features.shape[-1])[0]
    with bar("Checking features", len(features)) as advance:
        for start in range(0, len(features), BLOCK):
            block = np.asarray(features[start : start + BLOCK])
            if len(bad := np.argwhere(~np.isfinite(as_float32(block)))):
                first = first or (start + int(bad[0][0]), int(bad[0][-1]))
                bad_values += len(bad)
            varies = varies or bool((block != reference).any())
            advance(len(block))
    if first is not None:
        others = count(bad_values, "other value")
        problem = f"got {others}, the first in row {first[0]}, column {first[1]}"
        raise _error(f"{path} must hold finite values within the range of float32, {problem}; correct or remove them")
    if not varies:
        raise _error(f"{path} holds the same vector in every row, from which nothing can be learned")


# Ids and labels


def _decoded(path: str, names: Any) -> Any:
    """Returns names, as text where they are NumPy's bytes."""
    if np.asarray(names).dtype.kind != "S":
        return names
    try:
        return np.char.decode(names, "utf-8")
    except UnicodeDecodeError as error:
        raise _error(f"{path} must have ids and labels in UTF-8 ({first_line(error)}); save them as text") from error


def _ids(path: str, content: _Content) -> Sequence[str] | None:
    text_file = f"{os.path.splitext(path)[0]}.ids.txt"
    ids = None
    if content.ids is not None:
        ids = ["" if is_missing(name) else str(name) for name in _decoded(path, content.ids)]
    if ids is None and os.path.isfile(text_file):
        try:
            # Not splitlines, which also splits at characters that are part of an id, such as U+2028.
            lines = decode_text(pathlib.Path(text_file).read_bytes(), "surrogateescape").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError) as error:
            raise _error(f"{text_file} cannot be read ({first_line(error)}); save it again in UTF-8") from error
        ids = lines.removesuffix("\n").split("\n")
    if ids is not None and len(ids) != len(content.features):
        raise _error(
            f"{path} must have one id per row, got {len(ids):,} for {len(content.features):,} rows; correct them"
        )
    if ids is not None and "" in ids:
        raise _error(f"{path}, row {ids.index('')}: the id is empty; give each row one")
    if ids is not None and len(set(ids)) < len(ids):
        repeated = collections.Counter(ids).most_common(1)[0][0]
        raise _error(f"{path} must have distinct ids, got {repeated!r} more than once; rename one of them")
    return ids


def _labels(path: str, content: _Content) -> tuple[Labels | None, Sequence[str]]:
    labels = content.labels
    array_file, ignore = f"{os.path.splitext(path)[0]}.labels.npy", "or ignore labels with --config.data.labelled=False"
    if labels is None and os.path.isfile(array_file):
        try:
            labels = np.atleast_1d(np.load(array_file))
        except (OSError, ValueError, EOFError) as error:
            problem = f"{array_file} cannot be read as .npy ({first_line(error)})"
            raise _error(f"{problem}; save it again, {ignore}") from error
    if labels is None:
        return None, []
    if isinstance(labels, dict):
        return parse_labels(path, labels)
    labels = np.asarray(_decoded(path, labels))
    if len(labels) != len(content.features):
        counts = f"{len(labels):,} for {len(content.features):,} rows"
        raise _error(f"{path} must have one label per row, got {counts}; correct them, {ignore}")
    if labels.ndim == 2 and np.isin(labels, (0, 1)).all():
        return labels.astype(bool), []
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        problem = f"{path} must have labels that are integers or names [items], or zeros and ones [items, classes]"
        raise _error(f"{problem}, got {labels.dtype} {list(labels.shape)}; correct them, {ignore}")
    texts = labels.tolist() if labels.dtype.kind == "U" else []
    empty = [row for row, label in enumerate(texts) if is_missing(label)]
    if empty:
        raise _error(f"{path}, row {empty[0]}: label is empty; correct it, {ignore}")
    names, numbers = np.unique(labels, return_inverse=True)
    return numbers.astype(np.int64), [str(name) for name in names.tolist()]

"""Features in a Parquet file: read row group by row group, and copied once into a file that can be mapped."""

import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, Shaped

from cib_jax.data import photo_cache
from cib_jax.data.dataset import Bar, ImageSet, Labels, Source, no_bar
from cib_jax.errors import DataError

# data.parquet: Features in a Parquet file: read row group by row group, and copied once into a file that can be mapped.


def row_groups(path: str, file: Any) -> Iterator[Float[np.ndarray, "rows features"]]:
    """Yields the features of each row group of an open file.

    Raises:
      DataError: the column is no list of numbers in each row, or rows are of several lengths.
    """
    import pyarrow

    width = 0
    for group in range(file.num_row_groups):
        column = file.read_row_group(group, columns=["features"]).column("features").combine_chunks()
        if isinstance(column, pyarrow.ChunkedArray):
            column = column.chunk(0)
        if (
            not (pyarrow.types.is_list(column.type) or pyarrow.types.is_fixed_size_list(column.type))
            or column.null_count
        ):
            raise DataError(
                f"config.data.dir: {path}: the column 'features' holds {column.type}, not a list in each row"
            )
        values = column.flatten().to_numpy(zero_copy_only=False)
        width = width or len(values) // max(len(column), 1)
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
        if not np.array_equal(lengths, [width]):
            raise DataError(
                f"config.data.dir: {path}: rows have {lengths.min()} to {lengths.max()} features; all need as many"
            )
        yield values.reshape(len(column), width)


def copied(path: str, file: Any, cache: pathlib.Path) -> pathlib.Path:
    """Returns the .npy file with the features, which is written where it is not in `cache` yet.

    Raises:
      DataError: it cannot be kept there, or what `row_groups` raises.
    """
    found = os.stat(path)
    known = repr((os.path.abspath(path), found.st_size, found.st_mtime_ns)).encode()
    folder = cache / hashlib.sha256(known).hexdigest()[:24]
    copy = folder / "features.npy"
    if not copy.exists():
        try:
            _copy(path, file, folder)
        except OSError as error:
            raise DataError(
                f"config.cache.dir: the copy of {path} that can be mapped cannot be kept in {folder} "
                f"({error.strerror or error}); make room or name another place by --config.cache.dir=DIR"
            ) from error
    os.utime(folder)  # what was not used for longest is deleted first
    return copy


def _copy(path: str, file: Any, folder: pathlib.Path) -> None:
    """Writes the features of a .parquet as features.npy: by no map, in which a full disk would end the process."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"features.{secrets.token_hex(4)}.part"
    begun = False
    try:
        with part.open("wb") as out:
            for rows in row_groups(path, file):
                if not begun:
                    shape = (file.metadata.num_rows, rows.shape[1])
                    photo_cache.validate_free_space(
                        folder, int(np.prod(shape)) * rows.itemsize, "features take", "name"
                    )
                    header = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(out, header)
                    begun = True
                out.write(np.ascontiguousarray(rows).data)
        if not begun:
            raise DataError(f"config.data.dir: {path} holds no row; give one for each item")
        # What makes it one of the caches that are pruned.
        (folder / "made_of.json").write_text(json.dumps({"features": os.path.abspath(path)}), encoding="utf-8")
        os.replace(part, folder / "features.npy")
    finally:
        part.unlink(missing_ok=True)


# data.vectors: Features of any model, in a file of one's own: checked, and mapped rather than loaded.


FEWEST = 3
BLOCK = 8192
"""Rows that are looked at together."""

_SAFETENSORS = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": ml_dtypes.bfloat16, "I64": np.int64}
_SAFETENSORS |= {"I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


class Vectors:
    """Rows of an array, which may be a memory map."""

    def __init__(self, array: Shaped[np.ndarray, "items ..."], identity: str):
        """Shows the rows of `array`, a vector or several views of one each."""
        self.array, self.identity = array, identity

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Shaped[np.ndarray, "..."]:
        return np.asarray(self.array[index])

    def gather(self, indices: Int[np.ndarray, " items"]) -> Shaped[np.ndarray, "items ..."]:
        """Returns the rows at `indices` as one array."""
        return np.asarray(self.array[indices])


class _Read(NamedTuple):
    """What a file holds."""

    features: Shaped[np.ndarray, "items ..."]
    labels: Any = None
    ids: Sequence[Any] | None = None


def load(path: str, *, labeled: bool = True, cache: pathlib.Path | None = None, bar: Bar = no_bar) -> Source:
    """Returns the vectors of a file, [items, features] or [items, views, features] in float16, 32 or 64.

    A .npy or .safetensors file is mapped and may be larger than memory, a .npz file is read whole, a .parquet file is
    copied once, row group by row group, into a file that can be mapped.

    The features are the array of a .npy, `features` in the others. Labels, if there are any, are `labels` (numbers
    [items] or multi-hot [items, classes]) or, in a .parquet, `label` (a number or name) or `labels` (lists of them);
    names of the items are `ids`, or the column `id`. Beside any of them, NAME.labels.npy and NAME.ids.txt serve, too.

    Args:
      path: of the file.
      labeled: False leaves labels aside.
      cache: where a .parquet's copy is kept.
      bar: shows the progress of checking.

    Raises:
      DataError: the file cannot be read, or a value in it cannot be.
    """
    path = os.path.expanduser(path)
    read = _read(path, cache)
    _check_kind(path, read.features)
    _check(path, read.features, bar)
    ids = _ids(path, read)
    labels, classes = _labels(path, read) if labeled else (None, [])
    found = os.stat(path)
    known = repr((found.st_size, found.st_mtime_ns, read.features.shape, str(read.features.dtype)))
    identity = f"vectors-{hashlib.blake2b(known.encode(), digest_size=16).hexdigest()}"
    return Source(ImageSet(Vectors(read.features, identity), labels, ids), None, classes)


def mapped(path: str) -> tuple[Shaped[np.ndarray, "items ..."], Sequence[str] | None]:
    """Returns the features of a file without reading them, and the names of its items, where they have any.

    Raises:
      DataError: it is neither .npy nor .safetensors, which alone can be mapped, or holds no features.
    """
    path = os.path.expanduser(path)
    if (extension := os.path.splitext(path)[1].lower()) not in (".npy", ".safetensors"):
        raise DataError(
            f"config.data.dir: {path} is {extension or 'of no known kind'}; features are read from .npy or "
            ".safetensors, which can be mapped; write them as one of these"
        )
    read = _read(path, None)
    _check_kind(path, read.features)
    return read.features, _ids(path, read)


def _read(path: str, cache: pathlib.Path | None) -> _Read:
    if not os.path.isfile(path):
        raise DataError(f"config.data.dir: there is no file {path or 'named'}; give one of {', '.join(_READERS)}")
    extension = os.path.splitext(path)[1].lower()
    if extension not in _READERS:
        raise DataError(f"config.data.dir: {path} is none of {', '.join(_READERS)}; write the features as one of them")
    try:
        return _READERS[extension](path, cache)
    except DataError:
        raise
    except Exception as error:  # each reader's own kinds; all mean that the file is not what its name says
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise DataError(
            f"config.data.dir: {path} cannot be read as {extension} ({type(error).__name__}: {first}); write it again"
        ) from error


def _npy(path: str, cache: pathlib.Path | None) -> _Read:
    return _Read(np.load(path, mmap_mode="r"))


def _npz(path: str, cache: pathlib.Path | None) -> _Read:
    with np.load(path) as file:
        _need(path, list(file.files))
        labels, ids = (file[name] if name in file.files else None for name in ("labels", "ids"))
        return _Read(file["features"], labels, ids)


def _safetensors(path: str, cache: pathlib.Path | None) -> _Read:
    # https://huggingface.co/docs/safetensors: 8 bytes of length, a JSON header, and the tensors one after the other.
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.path.getsize(path):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    _need(path, [name for name in header if name != "__metadata__"])

    def mapped(name: str) -> Any:
        if name not in header:
            return None
        entry = header[name]
        if entry["dtype"] not in _SAFETENSORS:
            raise ValueError(f"{name} is of type {entry['dtype']}")
        start, stop = entry["data_offsets"]
        dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
        if stop - start != dtype.itemsize * int(np.prod(entry["shape"])) or 8 + length + stop > os.path.getsize(path):
            raise ValueError(f"{name} does not fit into the file")
        return np.memmap(path, dtype, "r", 8 + length + start, tuple(entry["shape"]))

    return _Read(mapped("features"), mapped("labels"))


def _parquet(path: str, cache: pathlib.Path | None) -> _Read:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    _need(path, names)
    others = file.read([name for name in ("label", "labels", "id") if name in names]).to_pydict()
    labels: Any = others.get("label", others.get("labels"))
    if cache is None:
        features = np.concatenate(list(row_groups(path, file)))
    else:
        features = np.load(copied(path, file, cache), mmap_mode="r")
    return _Read(features, labels, others.get("id"))


_READERS: dict[str, Callable[[str, pathlib.Path | None], _Read]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".parquet": _parquet,
    ".safetensors": _safetensors,
}


def _need(path: str, names: Sequence[str]) -> None:
    if "features" not in names:
        raise DataError(f"config.data.dir: {path} has no 'features', but {', '.join(names) or 'nothing'}; name them so")


def _check_kind(path: str, features: Any) -> None:
    """Refuses features of another shape or type."""
    if features.ndim not in (2, 3) or 0 in features.shape[1:]:
        raise DataError(
            f"config.data.dir: {path} holds an array {list(features.shape)}; [items, features] or [items, views, "
            "features] is needed"
        )
    if features.dtype != ml_dtypes.bfloat16 and features.dtype.kind != "f":
        raise DataError(
            f"config.data.dir: {path} holds {features.dtype}, not floating-point numbers; convert them, for example "
            "with .astype('float32')"
        )


def _check(path: str, features: Any, bar: Bar) -> None:
    """Refuses too few features, and those that are not finite or all the same."""
    if len(features) < FEWEST:
        raise DataError(
            f"config.data.dir: {path} holds {len(features)} items; at least {FEWEST} are needed, and some hundred to "
            "learn anything from"
        )
    bad, first, varies = 0, None, False
    with bar("Checking features", len(features)) as moved:
        for start in range(0, len(features), BLOCK):
            block = np.asarray(features[start : start + BLOCK]).reshape(-1, features.shape[-1])
            finite = np.isfinite(block)
            if not finite.all():
                if first is None:
                    row, column = np.argwhere(~finite)[0]
                    first = (start + int(row) * len(features[start : start + BLOCK]) // len(block), int(column))
                bad += int((~finite).sum())
            varies = varies or bool((block != np.asarray(features[0]).reshape(-1, features.shape[-1])[0]).any())
            moved(min(BLOCK, len(features) - start))
    if first is not None:
        raise DataError(
            f"config.data.dir: {path} holds {bad:,} values that are not finite, the first in row {first[0]}, column "
            f"{first[1]}; mend or remove those rows"
        )
    if not varies:
        raise DataError(f"config.data.dir: {path} holds the same vector in every row, from which nothing can be learnt")


def _ids(path: str, read: _Read) -> Sequence[str] | None:
    beside = f"{os.path.splitext(path)[0]}.ids.txt"
    ids = None if read.ids is None else [str(name) for name in read.ids]
    if ids is None and os.path.isfile(beside):
        with open(beside, encoding="utf-8", errors="surrogateescape") as file:
            ids = file.read().splitlines()
    if ids is None:
        return None
    if len(ids) != len(read.features):
        raise DataError(
            f"config.data.dir: {path} has {len(read.features):,} rows but {len(ids):,} ids; give one for each"
        )
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(name for name in ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise DataError(f"config.data.dir: {path} has the id {twice!r} more than once; give each row one of its own")
    return ids


def _labels(path: str, read: _Read) -> tuple[Labels | None, Sequence[str]]:
    labels = read.labels
    beside = f"{os.path.splitext(path)[0]}.labels.npy"
    if labels is None and os.path.isfile(beside):
        try:
            labels = np.atleast_1d(np.load(beside))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"config.data.dir: {beside} cannot be read as .npy ({error}); write it again, or leave labels aside by "
                "--config.data.labelled=False"
            ) from error
    if labels is None:
        return None, []
    if len(labels) != len(read.features):
        raise DataError(
            f"config.data.dir: {path} has {len(read.features):,} rows but {len(labels):,} labels; give one for each, "
            "or leave them aside by --config.data.labelled=False"
        )
    if isinstance(labels, list):  # of a .parquet: names or numbers, or lists of them
        many = any(isinstance(label, list) for label in labels)
        if any(label is None for label in labels) and not many:
            raise DataError(f"config.data.dir: {path} has rows without a label; give each one, or lists of them")
        sets = [set(label or ()) if many else {label} for label in labels]
        classes = sorted(set().union(*sets), key=lambda name: (isinstance(name, str), name))
        hot = np.array([[name in labels for name in classes] for labels in sets], bool)
        return (hot if many else hot.argmax(axis=1)), [str(name) for name in classes]
    labels = np.asarray(labels)
    if labels.ndim == 2 and np.isin(labels, (0, 1)).all():
        return labels.astype(bool), []
    if labels.ndim != 1 or labels.dtype.kind not in "iuUS":
        raise DataError(
            f"config.data.dir: {path} has labels of type {labels.dtype} {list(labels.shape)}; whole numbers or names "
            "[items], or zeros and ones [items, classes], are needed"
        )
    names, numbers = np.unique(labels, return_inverse=True)
    return numbers.astype(np.int64), [str(name) for name in names.tolist()]

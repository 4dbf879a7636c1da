"""Features in a Parquet file: read row group by row group, and copied once into a file that can be mapped."""

import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from cib_jax.data import prepared
from cib_jax.data.images import DataError


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
                    prepared.check_room(folder, int(np.prod(shape)) * rows.itemsize, "features take", "name")
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

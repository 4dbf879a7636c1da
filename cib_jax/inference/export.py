"""Writes an encoder as one file that `exported.load` runs: programs for every kind of device, and their weights."""

import contextlib
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cib_jax import files
from cib_jax.errors import ExportedError
from cib_jax.exported import FORMAT, FORMS, SIGNATURE, STAGES, VERSION, checksum, part_of
from cib_jax.models.encoder import Encoder, Params, packed_of_features, plain_features
from cib_jax.models.weights import fingerprint
from cib_jax.version import __version__

TIME = (1980, 1, 1, 0, 0, 0)  # of every part: the same encoder gives the same file
LIMIT = "jax_traceback_in_locations_limit"


def write(
    path: pathlib.Path, encoder: Encoder, params: Params, frozen: Params, *, side: int, batch_sizes: Sequence[int]
) -> None:
    """Writes the file, atomically.

    Args:
      path: of the file; its folder must be there.
      encoder: of `create_encoder`.
      params: its trained parameters.
      frozen: its others.
      side: of the images that it shall take, in pixels; unused where it takes features.
      batch_sizes: in rising order. Not any size: a CPU goes through a batch in parts, whose number follows from it.

    Raises:
      ExportedError: the file cannot be written, or flatbuffers is missing.
    """
    weights = {"params": params, "frozen": frozen}
    leaves, tree = jax.tree.flatten(weights)
    places = [place for place, _ in jax.tree.leaves_with_path(weights)]
    names = [f"weights/{jax.tree_util.keystr(place, simple=True, separator='/')}.npy" for place in places]
    about = {
        "format": FORMAT,
        "version": VERSION,
        **_about(encoder, side),
        "batch_sizes": list(batch_sizes),
        "platforms": FORMS,
        "fingerprints": {
            part: fingerprint(jax.tree.map(_storable, whole[part]))
            for whole in weights.values()
            for part in sorted(whole)
        },
        "made_with": {"cib_jax": __version__, "jax": jax.__version__},
        "weights": [{"part": name, "dtype": leaf.dtype.name} for name, leaf in zip(names, leaves, strict=True)],
    }
    parts: dict[str, dict[str, Any]] = {}
    try:
        with files.replacing(path) as own, zipfile.ZipFile(own, "w") as archive:

            def add(name: str, content: bytes | memoryview, how: int = zipfile.ZIP_STORED) -> None:
                archive.writestr(zipfile.ZipInfo(name, TIME), content, how)
                parts[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

            for name, leaf in zip(names, leaves, strict=True):
                add(name, _npy(leaf))
            held = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
            for size in batch_sizes:
                rows = jax.ShapeDtypeStruct((size, *about["input"]["shape"][1:]), about["input"]["dtype"])
                for stage, program in zip(STAGES, _programs(encoder, tree), strict=True):
                    for form, platforms in FORMS.items():
                        content = _exported(program, platforms, held, rows)
                        add(part_of(stage, form, size), content, zipfile.ZIP_DEFLATED)
                    rows = jax.eval_shape(program, held, rows)
            signature = about | {"parts": parts}
            signature["checksum"] = checksum(signature)
            add(SIGNATURE, (json.dumps(signature, indent=1) + "\n").encode(), zipfile.ZIP_DEFLATED)
    except ImportError as error:
        raise ExportedError(
            f"{path}: jax.export writes it with flatbuffers, which is missing; pip install flatbuffers"
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ExportedError(f"{path}: it cannot be written ({reason}); make room, or name another file") from error


def _about(encoder: Encoder, side: int) -> dict[str, Any]:
    backbone = encoder.backbone
    if backbone.takes == "features":
        taken = {"dtype": "float32", "shape": ["n", backbone.features]}
        inside = "standardised by the mean and deviation of the features of training"
    else:
        taken = {"dtype": "uint8", "shape": ["n", side, side, 3]}
        inside = (
            f"RGB, resized to {encoder.image_size} pixels where the side is another, scaled to [0, 1], less the mean "
            f"{list(backbone.mean)}, by the deviation {list(backbone.deviation)}"
        )
    return {
        "backbone": backbone.name,
        "bits": encoder.bits,
        "takes": backbone.takes,
        "input": taken,
        "output": {"dtype": "uint8", "shape": ["n", encoder.bits // 8]},
        "preprocessing": inside,
    }


def _programs(encoder: Encoder, tree: Any) -> list[Callable[[list[Array], Array], Array]]:
    """Returns a function of the weights' leaves and of rows for each of `STAGES`."""

    def features(leaves: list[Array], images: Array) -> Array:
        held = jax.tree.unflatten(tree, leaves)
        return plain_features(encoder, held["params"], held["frozen"], images)

    def codes(leaves: list[Array], rows: Array) -> Array:
        return packed_of_features(encoder, jax.tree.unflatten(tree, leaves)["params"], rows)

    return [features, codes]


def _exported(
    program: Callable[..., Array],
    platforms: Sequence[str],
    held: Sequence[jax.ShapeDtypeStruct],
    rows: jax.ShapeDtypeStruct,
) -> bytes:
    with _without_places():
        return bytes(jax.export.export(jax.jit(program), platforms=platforms)(held, rows).serialize())


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Leaves the places of source lines, which are paths of this machine, out of programs."""
    limit = getattr(jax.config, LIMIT)
    jax.config.update(LIMIT, 0)
    try:
        yield
    finally:
        jax.config.update(LIMIT, limit)


def _npy(leaf: Array) -> memoryview:
    content = io.BytesIO()
    np.save(content, _storable(leaf), allow_pickle=False)
    return content.getbuffer()


def _storable(leaf: Array) -> np.ndarray:
    """Returns the array; bfloat16, for which .npy has no name, as uint16."""
    array = np.ascontiguousarray(leaf)
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array

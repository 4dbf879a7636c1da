"""Export of an encoder to one file that `exported.load` runs: its weights, and programs for every kind of device."""

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
from cib_jax.codes import byte_count
from cib_jax.errors import ExportedError
from cib_jax.exported import (
    FORMAT,
    FORMS,
    SIGNATURE,
    STAGES,
    VERSION,
    checksum,
    program_name,
    validate_program,
    validate_signature,
)
from cib_jax.hint import HINT
from cib_jax.models.encoder import Encoder, Params, packed_of_features, plain_features
from cib_jax.models.weights import fingerprint
from cib_jax.version import __version__

TIME = (1980, 1, 1, 0, 0, 0)  # of every part, so that the same encoder always gives the same file


def write(
    path: pathlib.Path, encoder: Encoder, params: Params, frozen: Params, *, side: int, batch_sizes: Sequence[int]
) -> None:
    """Writes an encoder of images of this side, or of features, to a file, in one step.

    The batch sizes, in ascending order, must be known here: a CPU goes through a batch in chunks, and their number is
    part of the program.
    """
    weights = {"params": params, "frozen": frozen}
    leaves, tree = jax.tree.flatten(weights)
    paths = [path for path, _ in jax.tree.leaves_with_path(weights)]
    names = [f"weights/{jax.tree_util.keystr(path, simple=True, separator='/')}.npy" for path in paths]
    about = {
        "format": FORMAT,
        "version": VERSION,
        **_describe(encoder, side),
        "batch_sizes": list(batch_sizes),
        "platforms": FORMS,
        "fingerprints": {
            part: fingerprint(jax.tree.map(_storable, group[part]))
            for group in weights.values()
            for part in sorted(group)
        },
        "made_with": {"cib_jax": __version__, "jax": jax.__version__},
        "weights": [{"part": name, "dtype": leaf.dtype.name} for name, leaf in zip(names, leaves, strict=True)],
    }
    parts: dict[str, dict[str, Any]] = {}
    try:
        validate_signature(json.loads(json.dumps(about)))
        with files.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:

            def add(name: str, content: bytes | memoryview, compression: int = zipfile.ZIP_STORED) -> None:
                archive.writestr(zipfile.ZipInfo(name, TIME), content, compression)
                parts[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

            for name, leaf in zip(names, leaves, strict=True):
                content = io.BytesIO()
                np.save(content, _storable(leaf), allow_pickle=False)
                add(name, content.getbuffer())
            weight_shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
            for size in batch_sizes:
                most = f", of up to {batch_sizes[-1]}" if len(batch_sizes) > 1 else ""
                HINT.show(f"Exporting programs for batches of {size}{most}")
                rows = jax.ShapeDtypeStruct((size, *about["input"]["shape"][1:]), about["input"]["dtype"])
                for stage, program in zip(STAGES, programs(encoder, tree), strict=True):
                    for form, platforms in FORMS.items():
                        with _without_source_paths():
                            exported = jax.export.export(jax.jit(program), platforms=platforms)(weight_shapes, rows)
                        validate_program(exported, weight_shapes, rows)  # `exported.load` refuses others
                        add(program_name(stage, form, size), bytes(exported.serialize()), zipfile.ZIP_DEFLATED)
                    rows = jax.eval_shape(program, weight_shapes, rows)
            signature = about | {"parts": parts}
            signature["checksum"] = checksum(signature)
            add(SIGNATURE, (json.dumps(signature, indent=1) + "\n").encode(), zipfile.ZIP_DEFLATED)
    except ValueError as error:
        raise ExportedError(
            f"batch_size and image_size must be such that a program is of moderate size ({error}); lower them",
            field="batch_size",
        ) from error
    except ImportError as error:
        raise ExportedError(f"jax.export needs flatbuffers ({error}); pip install flatbuffers") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ExportedError(
            f"path must be a file that can be written, got {path} ({reason}); free some space, or name another file",
            field="path",
        ) from error
    finally:
        HINT.clear()


def _describe(encoder: Encoder, side: int) -> dict[str, Any]:
    backbone = encoder.backbone
    if backbone.takes == "features":
        taken = {"dtype": "float32", "shape": ["n", backbone.features]}
        inside = "standardized by the mean and deviation of the features of training"
    else:
        taken = {"dtype": "uint8", "shape": ["n", side, side, 3]}
        inside = (
            f"RGB, resized to {encoder.image_size} pixels if the side differs, scaled to [0, 1], minus the mean "
            f"{list(backbone.mean)}, divided by the deviation {list(backbone.deviation)}"
        )
    return {
        "backbone": backbone.name,
        "bits": encoder.bits,
        "takes": backbone.takes,
        "input": taken,
        "output": {"dtype": "uint8", "shape": ["n", byte_count(encoder.bits)]},
        "preprocessing": inside,
    }


def programs(encoder: Encoder, tree: Any) -> list[Callable[[list[Array], Array], Array]]:
    """Returns a function of the weights' leaves and of rows for each of `STAGES`."""

    def features(leaves: list[Array], images: Array) -> Array:
        weights = jax.tree.unflatten(tree, leaves)
        return plain_features(encoder, weights["params"], weights["frozen"], images)

    def codes(leaves: list[Array], rows: Array) -> Array:
        return packed_of_features(encoder, jax.tree.unflatten(tree, leaves)["params"], rows)

    return [features, codes]


@contextlib.contextmanager
def _without_source_paths() -> Iterator[None]:
    """Keeps the locations of source lines, which are paths of this machine, out of programs."""
    name = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, limit)


def _storable(leaf: Array) -> np.ndarray:
    """Returns the array; bfloat16, which the .npy format lacks, as uint16."""
    array = np.ascontiguousarray(leaf)
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array

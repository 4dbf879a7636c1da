"""Runs an encoder that `Hasher.export` wrote: images in, packed codes out, by JAX and NumPy alone.

The file is a zip of parts: `signature.json`, the weights as `.npy`, and programs in StableHLO as `jax.export` writes
them, two for each batch size and kind of device, since networks are computed in other forms on a CPU than elsewhere.
The weights are the programs' arguments, not constants in them: they are there once, not once per program, and half a
gigabyte of them is neither printed into a program nor parsed nor folded by the compiler.

    from cib_jax import exported
    encoder = exported.load("encoder.zip")
    codes = encoder.encode(images)"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from cib_jax.errors import ExportedError

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8

FORMAT = "cib_jax.exported"
VERSION = 1
SIGNATURE = "signature.json"
MOST_SIGNATURE_BYTES = 2**24
STAGES = ("features", "codes")
"""Images → features → packed codes; two programs, as in `Hasher.encode`: the same codes to the last bit."""
FORMS = {"cpu": ("cpu",), "accelerator": ("cuda", "tpu")}
"""Programs by name, each with the platforms that it is for."""


def part_of(stage: str, form: str, size: int) -> str:
    """Returns the name of a program's part."""
    return f"programs/{stage}-{form}-{size}.stablehlo"


def checksum(signature: dict[str, Any]) -> str:
    """Returns the SHA-256 of a signature, which holds that of every part, without its own entry "checksum"."""
    rest = {name: value for name, value in signature.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedEncoder:
    """An encoder with its weights, as it was exported."""

    signature: dict[str, Any]
    """What it takes and gives, as JSON: "takes" ("images" or "features"), "input" and "output" (dtype and shape, "n"
    being any number), "bits", "preprocessing" (what is done inside), "batch_sizes", "platforms", "fingerprints",
    "made_with"."""
    weights: list[Array]
    programs: dict[str, bytes]

    def encode(
        self, images: UInt8[np.ndarray, "n size size 3"] | Float[np.ndarray, "n *views features"]
    ) -> UInt8[np.ndarray, "n bytes"]:
        """Returns the packed codes of RGB images, or of features, `bits` / 8 bytes each, as `Hasher.encode` does.

        They are computed on JAX's default device. Of stored views, the first is encoded.

        Raises:
          ValueError: the input is not of the signature's type and shape.
          ExportedError: this kind of device is none of those it was exported for.
        """
        if not len(images):
            return np.zeros((0, self.signature["bits"] // 8), np.uint8)
        items = self._checked(images)
        sizes = self.signature["batch_sizes"]
        size = next((size for size in sizes if size >= len(items)), sizes[-1])
        of_images, of_features = (self._program(stage, self._form(), size) for stage in STAGES)
        codes: list[np.ndarray] = []
        pending: Array | None = None
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            batch = np.pad(batch, ((0, size - len(batch)), *[(0, 0)] * (batch.ndim - 1)))
            # Dispatched before the one before is waited for.
            following = of_features(self.weights, of_images(self.weights, batch))
            if pending is not None:
                codes.append(np.asarray(pending))
            pending = following
        return np.concatenate([*codes, np.asarray(pending)])[: len(items)]

    def _checked(self, images: Any) -> np.ndarray:
        items, wanted = np.asarray(images), self.signature["input"]
        is_features = self.signature["takes"] == "features"
        if is_features and jnp.issubdtype(items.dtype, jnp.floating):
            items = items[:, 0] if items.ndim == 3 and items.shape[1] else items
            items = items.astype(np.float32)
        if items.dtype != wanted["dtype"] or list(items.shape[1:]) != wanted["shape"][1:]:
            shape = ", ".join(map(str, wanted["shape"]))
            remedy = (
                "compute them by the model that gave those of training" if is_features else "resize or convert them"
            )
            raise ValueError(
                f"images: wanted {'features in floating point' if is_features else wanted['dtype']} [{shape}], "
                f"got {items.dtype} {list(np.shape(images))}; {remedy} first"
            )
        return items

    def _form(self) -> str:
        (device,) = jnp.zeros(()).devices()
        platform = "cuda" if device.platform == "gpu" else device.platform
        forms = [form for form, platforms in self.signature["platforms"].items() if platform in platforms]
        if not forms:
            told = ", ".join(name for platforms in self.signature["platforms"].values() for name in platforms)
            raise ExportedError(f"platforms: it was exported for {told}, not for {platform}; set JAX_PLATFORMS=cpu")
        return forms[0]

    @functools.cached_property
    def _compiled(self) -> dict[str, Callable[..., Array]]:
        return {}

    def _program(self, stage: str, form: str, size: int) -> Callable[..., Array]:
        name = part_of(stage, form, size)
        if name not in self._compiled:
            self._compiled[name] = jax.jit(_deserialized(name, self.programs[name], self.signature).call)
        return self._compiled[name]


def load(path: str | os.PathLike[str]) -> ExportedEncoder:
    """Returns the encoder that `Hasher.export` wrote to `path`, its weights on JAX's default device.

    Programs are compiled when a batch size is first needed.

    Raises:
      ExportedError: the file cannot be read, is damaged, of another version, or no exported encoder.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            signature = _signature(archive)
            weights = [
                jax.device_put(_array(_part(archive, signature, weight["part"]), weight["dtype"]))
                for weight in signature["weights"]
            ]
            programs = {
                part: _part(archive, signature, part) for part in signature["parts"] if part.startswith("programs/")
            }
        wanted = {
            part_of(stage, form, size)
            for stage in STAGES
            for form in signature["platforms"]
            for size in signature["batch_sizes"]
        }
        if wanted != set(programs):
            raise _DamagedError("programs are missing")
        encoder = ExportedEncoder(signature, weights, programs)
        _deserialized("its program", programs[min(wanted)], signature)
        return encoder
    except ExportedError as error:
        raise ExportedError(f"{path}: {error}") from error
    except OSError as error:
        raise ExportedError(
            f"{path}: it cannot be read ({error.strerror or error}); give a file of Hasher.export"
        ) from error
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    # Whatever else damaged bytes make the readers of zips, of JSON and of arrays raise.
    except Exception as error:
        raise ExportedError(
            f"{path}: the file is damaged, or none that Hasher.export wrote ({error}); copy or export it again"
        ) from error


class _DamagedError(ValueError):
    """What was read is not what was written."""


def _signature(archive: zipfile.ZipFile) -> dict[str, Any]:
    if SIGNATURE not in archive.namelist():
        raise _DamagedError(f"it has no {SIGNATURE}")
    if archive.getinfo(SIGNATURE).file_size > MOST_SIGNATURE_BYTES:
        raise _DamagedError(f"its {SIGNATURE} is too large")
    signature = json.loads(archive.read(SIGNATURE))
    if not isinstance(signature, dict) or signature.get("format") != FORMAT:
        raise _DamagedError(f"its {SIGNATURE} is another format's")
    if signature.get("version") != VERSION:
        raise ExportedError(
            f"it is of version {signature.get('version')}, this package reads version {VERSION}; export it again with "
            "this package, or read it with the one that wrote it"
        )
    if signature["checksum"] != checksum(signature):
        raise _DamagedError(f"the checksum of its {SIGNATURE} is wrong")
    return signature


def _part(archive: zipfile.ZipFile, signature: dict[str, Any], name: str) -> bytes:
    about = signature["parts"][name]
    # Before it is unpacked, so that a crafted part cannot fill the memory.
    if archive.getinfo(name).file_size != about["bytes"]:
        raise _DamagedError(f"the size of {name} is wrong")
    content = archive.read(name)
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise _DamagedError(f"the checksum of {name} is wrong")
    return content


def _array(content: bytes, dtype: str) -> np.ndarray:
    """Returns the array of a .npy without copying it; bfloat16, which the format lacks, lies there as uint16."""
    head = io.BytesIO(content)
    if np.lib.format.read_magic(head) != (1, 0):
        raise _DamagedError("a weight is of another .npy version")
    shape, _, stored = np.lib.format.read_array_header_1_0(head)
    flat = np.frombuffer(content, stored, math.prod(shape), head.tell())
    return flat.reshape(shape).view(jnp.dtype(dtype))


def _deserialized(name: str, program: bytes, signature: dict[str, Any]) -> jax.export.Exported:
    try:
        return jax.export.deserialize(bytearray(program))
    except ImportError as error:
        raise ExportedError(f"{name} is read by flatbuffers, which is missing; pip install flatbuffers") from error
    except ValueError as error:
        made_by = signature["made_with"]["jax"]
        raise ExportedError(
            f"{name} was made with JAX {made_by} and cannot be read by {jax.__version__} ({error}); install JAX "
            f"{made_by}, or export it again"
        ) from error

"""Exported encoders: loads a file from `Hasher.export` and runs it, with only JAX and NumPy installed.

The file is a zip archive of `signature.json`, the weights as `.npy`, and programs in StableHLO from `jax.export`. There
are two programs for each batch size and kind of device, since networks are computed in other ways on a CPU. The weights
are arguments of the programs rather than constants in them, so that they are stored once, and half a gigabyte of them
is not printed into every program, parsed and folded by the compiler.

    from cib_jax import exported
    encoder = exported.load("encoder.zip")
    codes = encoder.encode(images)
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
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

from cib_jax.errors import ExportedError, UserError

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8

FORMAT = "cib_jax.exported"
VERSION = 1
SIGNATURE = "signature.json"
MAX_SIGNATURE_BYTES = 2**24
STAGES = ("features", "codes")
"""Images → features → packed codes; two programs, as in `Hasher.encode`, so that the codes are the same bit for bit."""
FORMS = {"cpu": ("cpu",), "accelerator": ("cuda", "tpu")}  # forms of the programs, each with its platforms


def program_name(stage: str, form: str, size: int) -> str:
    """Returns the name of a program in the archive."""
    return f"programs/{stage}-{form}-{size}.stablehlo"


def checksum(signature: dict[str, Any]) -> str:
    """Returns the SHA-256 of a signature, with the hashes of all parts, but without its own entry "checksum"."""
    rest = {name: value for name, value in signature.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedEncoder:
    """An exported encoder with its weights."""

    signature: dict[str, Any]
    """Description of the encoder, in JSON: "takes" ("images" or "features"), "input" and "output" (dtype and shape,
    where "n" is any number), "bits", "preprocessing" (done inside), "batch_sizes", "platforms", "fingerprints",
    "made_with"."""
    weights: list[Array]
    programs: dict[str, bytes]
    _compiled: dict[str, Callable[..., Array]] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def encode(
        self, images: UInt8[np.ndarray, "n size size 3"] | Float[np.ndarray, "n *views features"]
    ) -> UInt8[np.ndarray, "n bytes"]:
        """Returns packed codes of ⌈`bits` / 8⌉ bytes each, as `Hasher.encode` does, computed on JAX's default device.

        Args:
          images: RGB images, or features for an encoder of features; if there are several views, the first is encoded.

        Raises:
          ValueError: The images do not have the type and shape of the signature.
          ExportedError: The encoder was not exported for this kind of device.
        """
        if not len(images):
            return np.zeros((0, -(-self.signature["bits"] // 8)), np.uint8)
        items = self._validated(images)
        sizes = self.signature["batch_sizes"]
        size = next((size for size in sizes if size >= len(items)), sizes[-1])
        to_features, to_codes = (self._program(stage, size) for stage in STAGES)
        codes: list[Array | np.ndarray] = []
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            batch = np.pad(batch, ((0, size - len(batch)), *[(0, 0)] * (batch.ndim - 1)))
            codes.append(to_codes(self.weights, to_features(self.weights, batch)))
            if start:  # awaited after the next batch is dispatched, and before another is
                codes[-2] = np.asarray(codes[-2])
        return np.concatenate(codes)[: len(items)]

    def _validated(self, images: Any) -> np.ndarray:
        items, expected = np.asarray(images), self.signature["input"]
        takes, dtype = self.signature["takes"], expected["dtype"]
        if takes == "features":
            dtype = "floating-point"
            if jnp.issubdtype(items.dtype, jnp.floating):
                items = (items[:, 0] if items.ndim == 3 and items.shape[1] else items).astype(np.float32)
        if items.dtype != expected["dtype"] or list(items.shape[1:]) != expected["shape"][1:]:
            shape = ", ".join(map(str, expected["shape"]))
            remedy = "compute them with the model of training" if takes == "features" else "resize or convert them"
            raise UserError(
                f"images must be {dtype} {takes} [{shape}], got {np.asarray(images).dtype} {list(np.shape(images))}; "
                f"{remedy} first",
                field="images",
            )
        return items

    def _program(self, stage: str, size: int) -> Callable[..., Array]:
        (device,) = jnp.zeros(()).devices()
        platform = "cuda" if device.platform == "gpu" else device.platform
        form = next((form for form, names in self.signature["platforms"].items() if platform in names), None)
        if form is None:
            exported_for = ", ".join(name for names in self.signature["platforms"].values() for name in names)
            raise ExportedError(
                f"JAX_PLATFORMS must be one of those for which the encoder was exported, {exported_for}, got "
                f"{platform}; try JAX_PLATFORMS=cpu",
                field="JAX_PLATFORMS",
            )
        name = program_name(stage, form, size)
        if name not in self._compiled:
            self._compiled[name] = jax.jit(_deserialize(name, self.programs[name], self.signature).call)
        return self._compiled[name]


def load(path: str | os.PathLike[str]) -> ExportedEncoder:
    """Returns the encoder that `Hasher.export` wrote to `path`, with its weights on JAX's default device.

    A program is compiled when its batch size is first needed. Nothing in the file is unpickled.

    Raises:
      ExportedError: The file cannot be read, is damaged, is of another version, or is not an exported encoder.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            signature = _read_signature(archive)
            weights = [
                jax.device_put(_array(_read_part(archive, signature, weight["part"]), weight["dtype"]))
                for weight in signature["weights"]
            ]
            names = [part for part in signature["parts"] if part.startswith("programs/")]
            programs = {name: _read_part(archive, signature, name) for name in names}
        keys = itertools.product(STAGES, signature["platforms"], signature["batch_sizes"])
        expected = {program_name(*key) for key in keys}
        if expected != programs.keys():
            raise ValueError("programs are missing")
        _deserialize("its program", programs[min(expected)], signature)  # fails early if JAX cannot read it
        return ExportedEncoder(signature, weights, programs)
    except ExportedError as error:
        raise ExportedError(f"{path}: {error}", field=str(path)) from error
    except OSError as error:
        raise ExportedError(
            f"{path} cannot be read ({error.strerror or error}); pass a file of Hasher.export", field=str(path)
        ) from error
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    # Besides the ValueErrors below, damaged bytes make the readers of zip, JSON and .npy raise errors of many types.
    except Exception as error:
        raise ExportedError(
            f"{path} is damaged, or was not written by Hasher.export ({error}); copy or export it again",
            field=str(path),
        ) from error


def _read_signature(archive: zipfile.ZipFile) -> dict[str, Any]:
    if SIGNATURE not in archive.namelist():
        raise ValueError(f"it has no {SIGNATURE}")
    if archive.getinfo(SIGNATURE).file_size > MAX_SIGNATURE_BYTES:
        raise ValueError(f"its {SIGNATURE} is too large")
    signature = json.loads(archive.read(SIGNATURE))
    if not isinstance(signature, dict) or signature.get("format") != FORMAT:
        raise ValueError(f"its {SIGNATURE} is of another format")
    if signature.get("version") != VERSION:
        raise ExportedError(
            f"the version must be {VERSION}, got {signature.get('version')}; export the encoder again with this "
            "version of cib_jax, or load it with the version that exported it"
        )
    if signature["checksum"] != checksum(signature):
        raise ValueError(f"the checksum of its {SIGNATURE} is wrong")
    return signature


def _read_part(archive: zipfile.ZipFile, signature: dict[str, Any], name: str) -> bytes:
    about = signature["parts"][name]
    # Before unpacking, so that a crafted part cannot fill the memory.
    if archive.getinfo(name).file_size != about["bytes"]:
        raise ValueError(f"the size of {name} is wrong")
    content = archive.read(name)
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise ValueError(f"the checksum of {name} is wrong")
    return content


def _array(content: bytes, dtype: str) -> np.ndarray:
    """Returns the array of a .npy file without a copy; bfloat16, which the format lacks, is stored as uint16."""
    head = io.BytesIO(content)
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError("a weight is of another .npy version")
    shape, _, stored = np.lib.format.read_array_header_1_0(head)
    flat = np.frombuffer(content, stored, math.prod(shape), head.tell())
    return flat.reshape(shape).view(jnp.dtype(dtype))


def _deserialize(name: str, program: bytes, signature: dict[str, Any]) -> jax.export.Exported:
    try:
        return jax.export.deserialize(bytearray(program))
    except ImportError as error:
        raise ExportedError(f"reading {name} needs flatbuffers; pip install flatbuffers") from error
    except ValueError as error:
        made_by = signature["made_with"]["jax"]
        raise ExportedError(
            f"{name} was made with JAX {made_by} and cannot be read by {jax.__version__} ({error}); install JAX "
            f"{made_by}, or export it again"
        ) from error

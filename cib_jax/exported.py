"""Exported encoders: loads a file from `Hasher.export` and runs it, with only JAX, NumPy and flatbuffers installed.

The file is a zip archive of `signature.json`, the weights as `.npy`, and programs in StableHLO from `jax.export`. There
are two programs for each batch size and kind of device, since networks are computed in other ways on a CPU. The weights
are arguments of the programs rather than constants in them, so that they are stored once, and half a gigabyte of them
is not printed into every program, parsed and folded by the compiler.

    from cib_jax import exported
    encoder = exported.load("encoder.zip")
    codes = encoder.encode(images)

A file may come from anyone, and JAX trusts what it deserializes: a custom call of LAPACK with short buffers overwrites
memory. So before a program is compiled, everything in it must be of a kind that `Hasher.export` writes: its operations,
types, arguments, results, and loops, which count to a constant. Sizes of arrays and the number of steps are bounded.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

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

MAX_PROGRAM_BYTES = 2**28  # of all programs together
MAX_SIZE = 2**20  # of a batch, a side of images, features, bits
MAX_BATCH_ELEMENTS = 2**31
MAX_ROW_ELEMENTS = 2**28
"""Largest number of elements of an array for each row of a batch; attention at 896 pixels needs 2^27.6."""
MAX_ROW_STEPS = 2**16
"""Largest number of operations for each row of a batch, counted in each call and each pass of a loop."""

# What programs may contain; `Hasher.export` refuses to write anything else.
_STABLEHLO = (
    "abs add and broadcast_in_dim case clamp compare composite concatenate constant convert convolution divide "
    "dot_general dynamic_slice dynamic_update_slice exponential floor gather iota maximum minimum multiply negate "
    "optimization_barrier pad reduce reduce_window reshape return reverse rsqrt select shift_left slice subtract "
    "tanh transpose while"
)
_ATTRIBUTES = (
    "sym_name sym_visibility function_type arg_attrs res_attrs callee decomposition name version value dimension "
    "dimensions broadcast_dimensions iota_dimension permutation start_indices limit_indices strides slice_sizes "
    "dimension_numbers dot_dimension_numbers precision_config batch_group_count feature_group_count padding "
    "window_strides window_dimensions edge_padding_low edge_padding_high interior_padding compare_type "
    "comparison_direction jax.global_constant jax.result_info"
)
OPERATIONS = {"func.func", "func.call", "func.return", *(f"stablehlo.{name}" for name in _STABLEHLO.split())}
ATTRIBUTES = set(_ATTRIBUTES.split())
COMPOSITES = {"chlo.erf"}
ELEMENTS = {"float32": "f32", "bfloat16": "bf16", "int32": "i32", "bool": "i1", "uint8": "ui8", "uint32": "ui32"}
"""Types of elements by their names in NumPy."""


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
    checksums: dict[str, str]
    """SHA-256 of each part of the file, by name."""
    _compiled: dict[int, list[Callable[..., Array]]] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __repr__(self) -> str:
        size, bits = self.signature["input"]["shape"][1], self.signature["bits"]
        taken = f"{size} features" if self.signature["takes"] == "features" else f"images of {size} px"
        return f"ExportedEncoder({taken} → {bits} bits)"

    def encode(
        self, images: UInt8[np.ndarray, "n size size 3"] | Float[np.ndarray, "n *views features"]
    ) -> UInt8[np.ndarray, "n bytes"]:
        """Returns packed codes of ⌈`bits` / 8⌉ bytes each, as `Hasher.encode` does, computed on JAX's default device.

        Args:
          images: RGB images, or features for an encoder of features; if there are several views, the first is encoded.

        Raises:
          ValueError: The images do not have the type and shape of the signature.
          ExportedError: The encoder was not exported for this kind of device, or a program is not one of an encoder.
        """
        if not len(images):
            return np.zeros((0, -(-self.signature["bits"] // 8)), np.uint8)
        return self._apply(images, STAGES)

    def features(
        self, images: UInt8[np.ndarray, "n size size 3"] | Float[np.ndarray, "n *views features"]
    ) -> Float[np.ndarray, "n features"]:
        """Returns the backbone's features of one or more images, from which `encode` computes their codes.

        Raises what `encode` does.
        """
        return self._apply(images, STAGES[:1])

    def _apply(self, images: Any, stages: Sequence[str]) -> np.ndarray:
        """Returns what the first programs, one for each of `stages`, make of images, batch by batch."""
        items = self._validated(images)
        sizes = self.signature["batch_sizes"]
        size = next((size for size in sizes if size >= len(items)), sizes[-1])
        results: list[Array | np.ndarray] = []
        for start in range(0, len(items), size):
            rows: Array | np.ndarray = items[start : start + size]
            rows = np.pad(rows, ((0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)))
            for _, program in zip(stages, self._programs_of(size), strict=False):
                rows = program(self.weights, rows)
            results.append(rows)
            if start:  # awaited after the next batch is dispatched, and before another is
                results[-2] = np.asarray(results[-2])
        return np.concatenate(results)[: len(items)]

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
        if takes == "features" and not np.isfinite(items).all():
            raise UserError("images must be finite, but some have a NaN or an infinity; remove them", field="images")
        return items

    def _programs_of(self, size: int) -> list[Callable[..., Array]]:
        """Returns the compiled programs for batches of this size, one for each of `STAGES`."""
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
        if size not in self._compiled:
            self._compiled[size] = [jax.jit(program.call) for program in self._deserialize(form, size)]
        return self._compiled[size]

    def _deserialize(self, form: str, size: int) -> list[jax.export.Exported]:
        """Returns the validated programs of a form and size, one for each of `STAGES`."""
        programs: list[jax.export.Exported] = []
        rows: Any = jax.ShapeDtypeStruct(
            (size, *self.signature["input"]["shape"][1:]), self.signature["input"]["dtype"]
        )
        for stage in STAGES:
            name = program_name(stage, form, size)
            try:
                program = jax.export.deserialize(bytearray(self.programs[name]))
                if list(program.platforms) != self.signature["platforms"][form]:
                    raise ValueError("it is for other platforms")
                validate_program(program, self.weights, rows)
                (rows,) = program.out_avals
                if stage == STAGES[-1] and (rows.shape, rows.dtype) != (
                    (size, -(-self.signature["bits"] // 8)),
                    np.uint8,
                ):
                    raise ValueError("its results are not codes")
            except ImportError as error:
                problem = f"reading {name} needs flatbuffers ({error}); pip install flatbuffers"
                raise ExportedError(problem, field=name) from error
            # Malformed programs make the readers of flatbuffers and MLIR raise errors of many types, even MemoryError.
            except Exception as error:
                made_by = self.signature["made_with"]["jax"]
                raise ExportedError(
                    f"{name} is damaged, is not the program of an encoder, or cannot be read by JAX {jax.__version__} "
                    f"({_first_line(error)}); export it again, or install JAX {made_by}, with which it was made",
                    field=name,
                ) from error
            programs.append(program)
        return programs


def load(path: str | os.PathLike[str]) -> ExportedEncoder:
    """Returns the encoder that `Hasher.export` wrote to `path`, with its weights on JAX's default device.

    A program is validated and compiled when its batch size is first needed. Nothing in the file is unpickled.

    Raises:
      ExportedError: The file cannot be read, is damaged, is of another version, or is not an exported encoder.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for its writer
            raise OSError(errno.EINVAL, "it is not a regular file")
        with zipfile.ZipFile(path) as archive:
            signature = _read_signature(archive)
            _validate_sizes(archive, signature, os.path.getsize(path))
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
        checksums = {name: part["sha256"] for name, part in signature["parts"].items()}
        described = {name: value for name, value in signature.items() if name not in ("parts", "weights", "checksum")}
        encoder = ExportedEncoder(described, weights, programs, checksums)
        for form in signature["platforms"]:
            encoder._deserialize(form, signature["batch_sizes"][0])  # fails early if JAX cannot read it
        return encoder
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
            f"{path} is damaged, or was not written by Hasher.export ({_first_line(error)}); copy or export it again",
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
            f"the version must be {VERSION}, got {signature.get('version')!r:.20}; export the encoder again with this "
            "version of cib_jax, or load it with the version that exported it"
        )
    if signature["checksum"] != checksum(signature):
        raise ValueError(f"the checksum of its {SIGNATURE} is wrong")
    validate_signature(signature)
    return signature


def validate_signature(signature: dict[str, Any]) -> None:
    """Raises a ValueError, or a KeyError or TypeError, unless a signature is that of an encoder."""
    dtype, dimensions = {"images": ("uint8", 4), "features": ("float32", 2)}[signature["takes"]]
    rows, *shape = signature["input"]["shape"]
    bits, sizes = signature["bits"], signature["batch_sizes"]
    weights = [(weight["part"], weight["dtype"]) for weight in signature["weights"]]
    names = [name for form in signature["platforms"].values() for name in form]
    if (
        signature["input"] != {"dtype": dtype, "shape": ["n", *shape]}
        or len([rows, *shape]) != dimensions
        or signature["output"] != {"dtype": "uint8", "shape": ["n", -(-bits // 8)]}
        or not all(type(size) is int and 0 < size <= MAX_SIZE for size in [bits, *shape, *sizes])
        or not sizes
        or sizes != sorted(set(sizes))
        or sizes[-1] * math.prod(shape) > MAX_BATCH_ELEMENTS
        or len({part for part, _ in weights}) != len(weights)
        or not {dtype for _, dtype in weights} <= {"float32", "bfloat16"}
        or not all(
            re.fullmatch(r"[\w.+-]{1,40}", name)
            for name in (*names, *signature["platforms"], signature["made_with"]["jax"])
        )
    ):
        raise ValueError("its batches, bits or input are not those of an encoder, or too large")


def _validate_sizes(archive: zipfile.ZipFile, signature: dict[str, Any], size: int) -> None:
    """Raises a ValueError if parts would take more memory than the file's size, and a bound for compressed programs."""
    weights = [archive.getinfo(weight["part"]) for weight in signature["weights"]]
    if any(part.compress_type != zipfile.ZIP_STORED for part in weights) or sum(p.file_size for p in weights) > size:
        raise ValueError("its weights would take more bytes than it has")
    if sum(part.file_size for part in archive.infolist() if part not in weights) > MAX_PROGRAM_BYTES:
        raise ValueError(f"its programs take more than {MAX_PROGRAM_BYTES} bytes")


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


def _first_line(error: Exception) -> str:
    line = str(error).partition("\n")[0][:200] or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in line)


# Validation of programs.


def validate_program(program: jax.export.Exported, weights: Sequence[Any], rows: Any) -> None:
    """Raises a ValueError unless a program takes these weights and rows, and contains nothing but what is exported.

    Args:
      program: A program that is not compiled yet.
      weights: Arrays, or anything with a shape and a dtype.
      rows: Rows of a batch, or anything with a shape and a dtype.
    """
    arguments: list[Any] = [*weights, rows]
    trees: tuple[Any, Any] = program.in_tree, program.out_tree
    if trees != (jax.tree.structure(((list(weights), rows), {})), jax.tree.structure(0)):
        raise ValueError("it takes other arguments")
    if [_tensor(aval) for aval in program.in_avals] != [_tensor(argument) for argument in arguments]:
        raise ValueError("it takes arguments of other shapes")
    if program.nr_devices != 1 or program.ordered_effects or program.unordered_effects:
        raise ValueError("it has effects, or is for several devices")
    kept = program.module_kept_var_idx
    if list(kept) != sorted(set(kept)) or not all(0 <= place < len(arguments) for place in kept):
        raise ValueError("it lists other arguments")
    platform_index = ["tensor<i32>"] if len(program.platforms) > 1 else []
    inputs = platform_index + [_tensor(arguments[place]) for place in kept]
    with ir.Context() as context:
        module = stablehlo.deserialize_portable_artifact(context, program.mlir_module_serialized)
        functions = {ir.StringAttr(function.attributes["sym_name"]).value: function for function in module.body}
        kind = ir.FunctionType(ir.TypeAttr(functions["main"].attributes["function_type"]).value)
        if [str(one) for one in kind.inputs] != inputs:
            raise ValueError("its function takes other arguments")
        if [str(one) for one in kind.results] != [_tensor(aval) for aval in program.out_avals]:
            raise ValueError("its function returns other results")
        elements = MAX_ROW_ELEMENTS * rows.shape[0] + sum(math.prod(weight.shape) for weight in weights)
        counted: dict[str, int] = {}
        for name in functions:  # called or not
            _count_steps(name, functions, counted, elements)
        if counted["main"] > MAX_ROW_STEPS * rows.shape[0]:
            raise ValueError(f"it takes {counted['main']} steps, more than {MAX_ROW_STEPS} for each row")


def _tensor(array: Any) -> str:
    """Returns an array's type as MLIR writes it, such as "tensor<4x32xf32>"."""
    return f"tensor<{'x'.join(map(str, [*array.shape, ELEMENTS[array.dtype.name]]))}>"


def _count_steps(name: str, functions: dict[str, Any], counted: dict[str, int], elements: int) -> int:
    """Returns the number of operations of a function, those of its calls and passes of loops included."""
    if name not in counted:
        counted[name] = MAX_ROW_STEPS * MAX_SIZE  # for the time of the recursion: a function that calls itself
        counted[name] = _validate_operation(functions[name].operation, functions, counted, elements)
    return counted[name]


def _validate_operation(operation: Any, functions: dict[str, Any], counted: dict[str, int], elements: int) -> int:
    """Returns the number of steps of an operation; raises a ValueError unless it is one that is exported."""
    name, attributes = operation.name, operation.attributes
    lists = [attributes[key] for key in ("arg_attrs", "res_attrs") if key in attributes]
    # An iterator over attributes gives names or pairs with a name.
    keys = {getattr(key, "name", key) for some in (attributes, *itertools.chain(*lists)) for key in some}
    if name not in OPERATIONS or not keys <= ATTRIBUTES:
        raise ValueError(f"it contains the operation {name} with the attributes {', '.join(sorted(keys))}")
    if any(len(region.blocks) != 1 for region in operation.regions):
        raise ValueError(f"it contains {name} with branches")
    blocks = [region.blocks[0] for region in operation.regions]
    for value in itertools.chain(operation.results, *(block.arguments for block in blocks)):
        shape = re.fullmatch(rf"tensor<((?:\d+x)*)(?:{'|'.join(ELEMENTS.values())})>", str(value.type))
        if shape is None or math.prod(int(size) for size in shape[1].split("x")[:-1]) > elements:
            raise ValueError(f"it contains {name} of the type {value.type}; arrays of at most {elements} are allowed")
    steps = sum(
        _validate_operation(inner.operation, functions, counted, elements) for block in blocks for inner in block
    )
    if name == "stablehlo.while":
        steps *= _count_passes(operation)
    if name == "stablehlo.reduce_window":
        # Padding could hide a window that is far larger than the array.
        window, operand = attributes["window_dimensions"], ir.RankedTensorType(operation.operands[0].type)
        if any(size > side for size, side in zip(window, operand.shape, strict=True)):
            raise ValueError("it contains a window larger than its array")
    if name == "stablehlo.composite":
        (operand,), (result,) = operation.operands, operation.results
        if ir.StringAttr(attributes["name"]).value not in COMPOSITES or operand.type != result.type:
            raise ValueError(f"it contains the composite {attributes['name']}")
    if name in ("func.call", "stablehlo.composite"):
        called = attributes["callee" if name == "func.call" else "decomposition"]
        steps += _count_steps(ir.FlatSymbolRefAttr(called).value, functions, counted, elements)
    return steps + 1


def _count_passes(loop: Any) -> int:
    """Returns the number of passes of a loop; raises a ValueError unless it counts in ones from a constant to another.

    That is what `lax.map` becomes: `while counter < end`, where a pass ends with `counter + 1`.
    """
    (condition,), (body,) = loop.regions[0].blocks, loop.regions[1].blocks
    (tested,) = condition.operations[len(condition.operations) - 1].operands
    compare = tested.owner
    counter: Any = ir.BlockArgument(compare.operands[0])
    place = counter.arg_number
    added = body.operations[len(body.operations) - 1].operands[place].owner
    if (
        compare.name != "stablehlo.compare"
        or "LT" not in str(compare.attributes["comparison_direction"])
        or counter.owner != condition
        or added.name != "stablehlo.add"
        or added.operands[0] != body.arguments[place]
        or _constant(added.operands[1]) != 1
    ):
        raise ValueError("it contains a loop that does not count to a constant")
    return max(_constant(compare.operands[1]) - _constant(loop.operands[place]), 0)


def _constant(value: Any) -> int:
    if value.owner.name != "stablehlo.constant" or str(value.type) != "tensor<i32>":
        raise ValueError("it contains a loop that does not count to a constant")
    return int(ir.DenseIntElementsAttr(value.owner.attributes["value"])[0])

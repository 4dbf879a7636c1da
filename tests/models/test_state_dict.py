"""State-dicts: shapes, batch norms in convolutions; files that PyTorch wrote, damaged files and malicious files."""

import collections
import io
import pathlib
import pickle
import struct
import zipfile
from typing import ClassVar

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from cib_jax.errors import WeightsError
from cib_jax.models import state_dict, weights
from cib_jax.models.state_dict import MismatchError, NormedConvolution

FILES = ("torch_zip.pth", "torch_zip_protocol_4.pth", "torch_legacy.pth", "torch_checkpoint.pth")


class Global:
    """Pickles as the name of an object, without being the object."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """Pickles as a call of a named object."""

    def __init__(self, module: str, name: str, *arguments):
        self.target, self.arguments = Global(module, name), arguments


class State:
    """Pickles as a named object with attributes to be set on it."""

    def __init__(self, target: object, state: object):
        self.target, self.state = target, state


class Storage:
    """Pickles as a reference to numbers elsewhere in the file."""

    def __init__(self, key: str = "0", count: object = 6, kind: str = "FloatStorage"):
        self.identity = ("storage", Global("torch", kind), key, "cpu", count)


class Writer(pickle._Pickler):
    """Writes the classes above; the Python version of Pickler, because only its parts can be replaced."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def persistent_id(self, obj):
        return obj.identity if isinstance(obj, Storage) else None

    def save_global_label(self, obj):
        self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj):
        self.save(obj.target)
        self.save(obj.arguments)
        self.write(pickle.REDUCE)

    def save_state(self, obj):
        self.save(obj.target)
        self.save(obj.state)
        self.write(pickle.BUILD)

    dispatch[Global], dispatch[Call], dispatch[State] = save_global_label, save_call, save_state


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    Writer(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def tensor(shape=(2, 3), strides=(3, 1), offset=0, storage=None) -> Call:
    hooks = collections.OrderedDict()
    arguments = (storage or Storage(), offset, shape, strides, False, hooks)
    return Call("torch._utils", "_rebuild_tensor_v2", *arguments)


NUMBERS = np.arange(6, dtype="<f4").tobytes()


def write_zip(path: pathlib.Path, content: bytes, numbers: bytes = NUMBERS, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", numbers)
    return path


def write_legacy(path: pathlib.Path, content: bytes, numbers: bytes = NUMBERS, count: int = 6, keys=("0",)):
    system = {"protocol_version": 1001, "little_endian": True}
    parts = [pickled(part) for part in (state_dict.LEGACY_MAGIC, 1001, system)]
    parts += [content, pickled(list(keys)), struct.pack("<q", count), numbers]
    path.write_bytes(b"".join(parts))
    return path


WRITERS = {"zip": write_zip, "legacy": write_legacy}


@pytest.mark.parametrize("name", FILES)
def test_files_that_pytorch_wrote(golden_folder, golden, name):
    """Both formats and two pickle protocols; all dtypes, shared and transposed storages, a parameter."""
    tensors = weights.read_tensors(golden_folder / name)
    expected = {n.removeprefix("file_"): t for n, t in golden.items() if n.startswith("file_")}
    assert tensors.keys() == expected.keys()
    for key, array in tensors.items():
        assert array.dtype.name == ("bfloat16" if key == "bfloat16" else expected[key].dtype.name)
        np.testing.assert_array_equal(array.astype(expected[key].dtype), expected[key])


def test_whole_modules_are_refused(golden_folder):
    """PyTorch's file of an `nn.Linear` itself, not of its state-dict."""
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.linear\.Linear"):
        weights.read_tensors(golden_folder / "torch_module.pth")


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth"])
def test_selected_tensors_equal_those_of_the_whole_file(tmp_path, golden_folder, name):
    """The numbers of the others are not read: one is damaged here, which the checksum of a zip archive detects."""
    whole = weights.read_tensors(golden_folder / name)
    data = (golden_folder / name).read_bytes()
    damaged = bytearray(data)
    damaged[data.index(np.float64(whole["double"][0, 0]).tobytes())] ^= 1
    (tmp_path / name).write_bytes(damaged)
    part = weights.read_tensors(tmp_path / name, prefixes=("shared.", "integers"))
    assert part.keys() == {"shared.whole", "shared.part", "integers"}
    for key, array in part.items():
        np.testing.assert_array_equal(array, whole[key])
    if name == "torch_zip.pth":
        with pytest.raises(WeightsError, match="Bad CRC"):
            weights.read_tensors(tmp_path / name)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_the_files_of_these_tests_are_sound(tmp_path, write):
    content = collections.OrderedDict(a=tensor(), b=tensor((3, 2), (1, 3)))
    made = State(Call("collections", "OrderedDict"), {"_metadata": {"": {"version": 1}}})
    for pickle_of in (pickled(content), pickled({"state_dict": content, "epoch": 3, "optimizer": made})):
        tensors = weights.read_tensors(write(tmp_path / "file.pth", pickle_of))
        np.testing.assert_array_equal(tensors["a"], [[0, 1, 2], [3, 4, 5]])
        np.testing.assert_array_equal(tensors["b"], [[0, 3], [1, 4], [2, 5]])


MAKER = Global("torch._utils", "_rebuild_tensor_v2")
# What a malicious or damaged file holds, and the name in the error where there is one.
HARMFUL = {
    "os.system": (Call("os", "system", "touch ran"), r"os\.system"),
    "posix.system": ({"a": Call("posix", "system", "touch ran")}, r"posix\.system"),
    "eval": (Call("builtins", "eval", "open('ran', 'w')"), r"builtins\.eval"),
    "exec of Python 2": (Call("__builtin__", "exec", "open('ran', 'w')"), r"__builtin__\.exec"),
    "getattr": (Call("builtins", "getattr", "a", "b"), r"builtins\.getattr"),
    "dotted": (Call("collections", "OrderedDict.fromkeys", "ab"), r"collections\.OrderedDict\.fromkeys"),
    "torch": (Call("torch.hub", "load", "a"), r"torch\.hub\.load"),
    "nested": ({"state_dict": {"a": tensor(), "b": (Call("os", "system", "touch ran"),)}}, r"os\.system"),
    "in the hooks": (
        {"a": Call("torch._utils", "_rebuild_tensor_v2", Storage(), 0, (1,), (1,), False, Call("os", "getcwd"))},
        r"os\.getcwd",
    ),
    "terminal codes": (Call("os", "\x1b[2J"), r"os.\\x1b"),
    "calling a dtype": ({"a": Call("torch", "FloatStorage", 1 << 40)}, ""),
    "calling a dict": ({"a": Call("collections", "OrderedDict", [("a", 1)])}, ""),
    "attributes of a function": ([State(MAKER, {"b": 1}), {"a": tensor()}], ""),
    "defaults of a function": ([State(MAKER, (None, {"__defaults__": ()})), {"a": tensor()}], ""),
    "attributes of a tensor": ({"a": State(tensor(), {"shape": (1 << 40,)})}, ""),
    "a parameter of text": ({"a": Call("torch._utils", "_rebuild_parameter", "b", False, None)}, ""),
    "huge size": ({"a": tensor((1 << 40, 1), (1, 1))}, "tensor a"),
    "size that overflows": ({"a": tensor((1 << 40, 1 << 40), (1, 1))}, "tensor a"),
    "absurd size": ({"a": tensor((1 << 70,), (1,))}, ""),
    "huge by repetition": ({"a": tensor((1 << 40,), (0,))}, "tensor a"),
    "negative size": ({"a": tensor((-1, 3))}, ""),
    "negative stride": ({"a": tensor((2, 3), (-3, 1))}, ""),
    "negative offset": ({"a": tensor(offset=-4)}, ""),
    "offset beyond": ({"a": tensor(offset=1)}, "tensor a"),
    "stride beyond": ({"a": tensor((2, 3), (4, 1))}, "tensor a"),
    "size that is not a number": ({"a": tensor((2.0, 3))}, ""),
    "shape without strides": ({"a": tensor((2, 3), (1,))}, "2 sizes with 1 strides"),
    "larger storage": ({"a": tensor(storage=Storage("0", 1 << 40))}, "storage 0"),
    "smaller storage": ({"a": tensor((1,), (1,), storage=Storage("0", 1))}, "storage 0"),
    "other dtype": ({"a": tensor(storage=Storage(kind="DoubleStorage"))}, "storage 0|cut short"),
    "unknown dtype": ({"a": tensor(storage=Storage(kind="ComplexFloatStorage"))}, r"torch\.ComplexFloatStorage"),
    "missing storage": ({"a": tensor(storage=Storage("7"))}, "storage"),
    "not a dict": ([tensor()], ""),
    "empty": ({}, ""),
    "not only tensors": ({"a": tensor(), "b": "text"}, "b is not"),
    "names that are numbers": ({1: tensor()}, "1 is not"),
    "keys that are tuples": ({(1, 2): tensor()}, ""),
    "keys that all have the hash 0": ({"state_dict": {"a": tensor()}, "b": {2**61 - 1: 0, 2**62 - 2: 0}}, ""),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_files_are_refused_before_anything_runs(tmp_path, monkeypatch, write, name):
    monkeypatch.chdir(tmp_path)
    content, reason = HARMFUL[name]
    path = write(tmp_path / "file.pth", pickled(content))
    with pytest.raises(WeightsError, match=reason or None) as caught:
        weights.read_tensors(path, "fetch it again")
    assert caught.value.field == str(path)
    assert str(caught.value).startswith(f"{path} ")
    assert str(caught.value).endswith("; fetch it again")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "ran").exists()
    assert weights.read_tensors(write(path, pickled({"a": tensor()})))["a"].shape == (2, 3)


# Hashing the deep key would overflow the stack, and hashing the key of repeated tuples takes 2⁶⁴ steps.
RAW = {
    "an object": b"(S'touch ran'\nios\nsystem\n.",
    "an instance": b"(ios\nsystem\n.",
    "a name from the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "a new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "an extension": b"\x80\x02\x82\x01.",
    "a set": b"\x80\x04\x8f(K\x01\x90.",
    "a state for a name": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "a name of numbers": b"\x80\x04K\x01K\x02\x93.",
    "a far memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "an empty memo": b"\x80\x02j\xff\xff\xff\x7f.",
    "an endless text": b"\x80\x02X\xff\xff\xff\x7fa.",
    "a frame of many bytes": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
    "an empty stack": b"\x80\x02R.",
    "nothing": b"\x80\x02.",
    "no mark": b"\x80\x02t.",
    "no end": b"\x80\x02}",
    "a deep nest": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "a deep key": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "a key of repeated tuples": b"\x80\x02})" + b"q\x00h\x00\x86" * 64 + b"Ns.",
    "a nest of references": b"\x80\x02)" + b"q\x00h\x00\x86" * 100_000 + b".",
    "an odd number of items": b"\x80\x02}(K\x01u.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("name", RAW)
def test_hand_written_pickles_are_refused(tmp_path, monkeypatch, write, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError) as caught:
        weights.read_tensors(write(tmp_path / "file.pth", RAW[name]))
    assert str(caught.value).isprintable()
    assert not (tmp_path / "ran").exists()


def test_a_pickle_as_long_as_a_file_of_numbers_is_refused(tmp_path):
    content = pickled({"state_dict": {"a": tensor()}, "notes": "a" * state_dict.LARGEST_PICKLE})
    for write in WRITERS.values():
        with pytest.raises(WeightsError):
            weights.read_tensors(write(tmp_path / "file.pth", content))


def test_compressed_archives_are_refused(tmp_path):
    """A zip bomb is one."""
    path = write_zip(tmp_path / "file.pth", pickled({"a": tensor()}), bytes(1 << 20), zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="compressed"):
        weights.read_tensors(path)


def test_archives_that_claim_more_than_they_hold_are_refused(tmp_path):
    """The size of the storage's entry, in the archive's directory, is raised to 3 GiB."""
    path = write_zip(tmp_path / "file.pth", pickled({"a": tensor(storage=Storage("0", 3 << 28))}))
    data = path.read_bytes()
    entry = data.rindex(b"PK\x01\x02")
    path.write_bytes(data[: entry + 20] + struct.pack("<II", 3 << 30, 3 << 30) + data[entry + 28 :])
    with pytest.raises(WeightsError, match="claims"):
        weights.read_tensors(path)


def test_other_archives_and_big_endian_files_are_refused(tmp_path):
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "text")
    with pytest.raises(WeightsError, match=r"data\.pkl"):
        weights.read_tensors(path)
    with zipfile.ZipFile(write_zip(path, pickled({"a": tensor()})), "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(WeightsError, match="big-endian"):
        weights.read_tensors(path)


@pytest.mark.parametrize("name", FILES)
def test_files_cut_short_are_refused(tmp_path, golden_folder, name):
    data = (golden_folder / name).read_bytes()
    path = tmp_path / name
    for length in [*range(0, len(data), 61), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(WeightsError):
            weights.read_tensors(path)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    name=st.sampled_from(FILES),
    changes=st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_files_give_tensors_or_one_clear_error(name, changes, golden_folder, tmp_path_factory):
    data = bytearray((golden_folder / name).read_bytes())
    for position, value in changes:
        data[position % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(data)
    try:
        tensors = weights.read_tensors(path)
    except WeightsError as error:
        assert error.field == str(path)
    else:
        assert sum(array.nbytes for array in tensors.values()) < 100 * len(data)
        assert all(np.array(array).shape == array.shape for array in tensors.values())


NEEDED = {"a.weight": (2, 3), "a.bias": (2,), "b": (4,)}


def arrays(**changes):
    made = {name: np.zeros(shape, np.float32) for name, shape in NEEDED.items()} | changes
    return {name: array for name, array in made.items() if array is not None}


def test_needed_and_extra_tensors_are_accepted():
    state_dict.validate_shapes(arrays(b=np.zeros(4, ml_dtypes.bfloat16), c=np.int64(3)), NEEDED, {"c", "d"})


def test_every_fault_is_named():
    with pytest.raises(MismatchError) as caught:
        state_dict.validate_shapes(
            arrays(**{"a.weight": None, "a.bias": np.zeros(3, np.float32), "b": np.zeros(4, int), "stray": np.ones(1)}),
            NEEDED,
            set(),
        )
    for part in ("missing: a.weight", "unknown: stray", "a.bias [3] (needed [2])", "b (int64)"):
        assert part in str(caught.value)


def test_long_lists_are_cut():
    with pytest.raises(MismatchError, match=r"s0, s1, s2 and 6 more"):
        state_dict.validate_shapes(arrays(**{f"s{i}": np.ones(1) for i in range(9)}), NEEDED, set())


def test_a_folded_layer_is_the_convolution_and_its_batch_norm():
    """At one pixel, where a 1×1 convolution is a matrix product."""
    layer = NormedConvolution("conv", "norm", (5, 4, 1, 1))
    rng = np.random.default_rng(0)
    tensors = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in layer.torch_shapes.items()}
    assert tensors.keys() == {"conv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
    folded = state_dict.fold_batch_norms(tensors, [layer], 1e-3)["conv"]
    exact = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = rng.normal(size=4)
    y = exact["conv.weight"][:, :, 0, 0] @ x
    normal = (y - exact["norm.running_mean"]) / np.sqrt(exact["norm.running_var"] + 1e-3)
    expected = normal * exact["norm.weight"] + exact["norm.bias"]
    np.testing.assert_allclose(x @ folded["kernel"][0, 0] + folded["bias"], expected, rtol=1e-5)
    assert {folded[part].dtype for part in folded} == {np.dtype(np.float32)}
    assert folded["kernel"].shape == (1, 1, 4, 5)
    assert state_dict.counters([layer]) == {"norm.num_batches_tracked"}

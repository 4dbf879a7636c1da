"""Exported encoders: the codes of the hasher, in a process without anything of training; damaged files."""

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import cib_jax as cib
from cib_jax import errors, exported
from cib_jax.augment.features import standard
from cib_jax.inference import export
from cib_jax.models.encoder import plain_features

pytestmark = pytest.mark.usefixtures("compiled_to_run")

RNG = np.random.default_rng(0)
BATCH = 4
COUNTS = (1, 3, 4, 11)


def images(size: int, count: int = max(COUNTS)) -> np.ndarray:
    return RNG.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def hasher(backbone: str, size: int = 0, batch_size: int = BATCH, **options) -> cib.Hasher:
    encoder, params, frozen = cib.create_encoder(
        jax.random.key(0), backbone=backbone, bits=12, image_size=size, hidden=32, **options
    )
    return cib.Hasher(encoder, params, frozen, batch_size=batch_size, devices=1)


@pytest.fixture(scope="module")
def convnet(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "encoder.zip"
    made = hasher("convnet", 16)
    made.export(path)
    return made, path


def test_codes_are_those_of_the_hasher(convnet):
    made, path = convnet
    loaded, given = exported.load(path), images(16)
    for count in (0, *COUNTS):
        assert np.array_equal(loaded.encode(given[:count]), made.encode(given[:count]))


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    """With random weights, whose spread is that of the pretrained ones."""
    pretrained = cib.load_pretrained("efficientnet_lite0")
    weights = jax.tree.map(lambda w: RNG.normal(0, w.std(), w.shape).astype(np.float32), pretrained)
    path = tmp_path_factory.mktemp("lite0") / "encoder.zip"
    made = hasher("efficientnet_lite0", 32, 1, frozen=True, backbone_params=weights)
    made.export(path)
    return made, path


def check_codes_and_features(made, path, size):
    loaded, given = exported.load(path), images(size)
    assert np.array_equal(loaded.encode(given), made.encode(given))
    program = jax.export.deserialize(
        bytearray(loaded.programs[exported.program_name("features", "cpu", made.batch_size)])
    )
    some = given[: made.batch_size]
    features = plain_features(made.encoder, made.params, made.frozen, some)
    assert np.array_equal(jax.jit(program.call)(loaded.weights, some), features)


def test_codes_of_a_frozen_network_are_those_of_the_hasher(lite0):
    check_codes_and_features(*lite0, 32)


def test_codes_of_a_network_in_bfloat16_are_those_of_the_hasher(tmp_path, convnet):
    """The .npy format has no name for this type."""
    weights = convnet[0].params["backbone"]
    made = hasher("convnet", 16, 2, frozen=True, backbone_dtype="bfloat16", backbone_params=weights)
    made.export(tmp_path / "encoder.zip")
    assert (
        json.loads(zipfile.ZipFile(tmp_path / "encoder.zip").read(exported.SIGNATURE))["weights"][0]["dtype"]
        == "bfloat16"
    )
    check_codes_and_features(made, tmp_path / "encoder.zip", 16)


def test_codes_of_features_are_those_of_the_hasher(tmp_path):
    features = RNG.normal(3, 2, (11, 2, 24)).astype(np.float32)
    made = hasher("none", standard=standard([features]))
    made.export(tmp_path / "encoder.zip")
    loaded = exported.load(tmp_path / "encoder.zip")
    assert loaded.signature["input"] == {"dtype": "float32", "shape": ["n", 24]}
    for given in (features, features[:, 0], features[:3].astype(np.float64), features[:2, 1].astype(np.float16)):
        assert np.array_equal(loaded.encode(given), made.encode(given))
    for wrong in (features[..., 1:], np.where(np.arange(24) == 3, np.nan, features)):
        with pytest.raises(errors.UserError) as error:
            loaded.encode(wrong)
        assert error.value.field == "images"


def test_images_of_the_stored_size_are_taken_and_resized_inside(tmp_path, convnet):
    small = convnet[0]
    made = cib.Hasher(small.encoder, small.params, small.frozen, batch_size=2, stored_size=20, devices=1)
    made.export(tmp_path / "encoder.zip")
    loaded, given = exported.load(tmp_path / "encoder.zip"), images(20, 3)
    assert loaded.signature["input"]["shape"] == ["n", 20, 20, 3]
    assert np.array_equal(loaded.encode(given), made.encode(given))


def test_the_signature_says_what_goes_in_and_out(convnet):
    loaded = exported.load(convnet[1])
    signature = loaded.signature
    assert signature["bits"] == 12
    assert signature["input"] == {"dtype": "uint8", "shape": ["n", 16, 16, 3]}
    assert signature["output"] == {"dtype": "uint8", "shape": ["n", 2]}
    assert signature["batch_sizes"] == [1, 2, 4]
    assert signature["made_with"] == {"cib_jax": cib.__version__, "jax": jax.__version__}
    assert set(signature["fingerprints"]) == {"backbone", "head"}
    assert "mean [0.5, 0.5, 0.5]" in signature["preprocessing"]
    assert len(str(signature)) < 2000 and str(loaded) == "ExportedEncoder(images of 16 px → 12 bits)"
    assert all(len(bytes.fromhex(checksum)) == 32 for checksum in loaded.checksums.values())


def test_each_platform_has_its_own_forms(lite0):
    """EfficientNet on a CPU is products and sums, elsewhere 49 convolutions: a stem, 16 blocks of 3 less 1, a head."""
    programs = exported.load(lite0[1]).programs
    found = {}
    for form, platforms in exported.FORMS.items():
        program = jax.export.deserialize(bytearray(programs[exported.program_name("features", form, 1)]))
        assert program.platforms == platforms
        convolutions = re.findall(r"stablehlo\.convolution.*feature_group_count = (\d+)", program.mlir_module())
        # A program for two platforms may say the same form once for each.
        found[form] = (len(convolutions) % 49, len(convolutions) > 0, any(int(groups) > 1 for groups in convolutions))
    assert found == {"cpu": (0, False, False), "accelerator": (0, True, True)}


def test_the_file_is_the_same_each_time_and_names_no_place_of_this_machine(tmp_path, convnet):
    made, path = convnet
    made.export(tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert not any(
            b".py\0" in archive.read(name) or b"cib_jax/" in archive.read(name) for name in archive.namelist()
        )


def test_it_runs_without_anything_of_training(tmp_path, convnet):
    """In a fresh process, which then says what it imported."""
    made, path = convnet
    given = images(16, 3)
    np.save(tmp_path / "images.npy", given)
    program = (
        "import sys, numpy\n"
        "from cib_jax import exported\n"
        f"codes = exported.load({str(path)!r}).encode(numpy.load({str(tmp_path / 'images.npy')!r}))\n"
        "print(codes.tolist())\n"
        "print(' '.join(sys.modules))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    codes, modules = ran.stdout.splitlines()
    assert json.loads(codes) == made.encode(given).tolist()
    assert {name for name in modules.split() if name.startswith("cib_jax")} == {
        "cib_jax",
        "cib_jax.errors",
        "cib_jax.exported",
        "cib_jax.version",
    }
    training = "flax optax orbax grain tensorflow_datasets ml_collections safetensors jaxtyping PIL sklearn pyarrow"
    assert not {name.partition(".")[0] for name in modules.split()} & set(training.split())


@pytest.mark.parametrize(
    "given",
    [np.zeros((2, 17, 16, 3), np.uint8), np.zeros((2, 16, 16, 3), np.float32), np.zeros((16, 16, 3), np.uint8)],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_other_images_are_rejected(convnet, given):
    with pytest.raises(errors.UserError) as error:
        exported.load(convnet[1]).encode(given)
    assert error.value.field == "images"


def test_every_damage_is_rejected(tmp_path, convnet):
    whole = convnet[1].read_bytes()
    path = tmp_path / "damaged.zip"
    places = np.linspace(0, len(whole) - 1, 40).astype(int)
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 0x10
        path.write_bytes(altered)
        try:
            loaded = exported.load(path)
        except errors.ExportedError as error:
            assert "damaged" in str(error)
        else:  # a byte that zip does not read, such as a part's time
            assert loaded.signature == exported.load(convnet[1]).signature
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(errors.ExportedError, match="damaged") as error:
            exported.load(path)
        assert error.value.field == str(path)


def rewritten(path, target, change):
    """Writes the file again with another signature, whose checksum holds."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == exported.SIGNATURE:
                signature = json.loads(content)
                change(signature)
                signature["checksum"] = exported.checksum(signature)
                content = json.dumps(signature).encode()
            new.writestr(name, content)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"version": 2}, "2"),
        ({"format": "other"}, "format"),
        ({"batch_sizes": [1, 2, 4, 8]}, "programs"),
        ({"parts": {}}, "damaged"),
    ],
)
def test_other_contents_are_rejected(tmp_path, convnet, change, word):
    path = tmp_path / "other.zip"
    rewritten(convnet[1], path, lambda signature: signature.update(change))
    with pytest.raises(errors.ExportedError, match=word) as error:
        exported.load(path)
    assert error.value.field == str(path)


def test_an_encoder_runs_only_on_platforms_it_was_exported_for(tmp_path, convnet):
    def without_cpu(signature):
        del signature["platforms"]["cpu"]
        signature["parts"] = {name: about for name, about in signature["parts"].items() if "-cpu-" not in name}

    rewritten(convnet[1], tmp_path / "other.zip", without_cpu)
    with pytest.raises(errors.ExportedError) as error:
        exported.load(tmp_path / "other.zip").encode(images(16, 1))
    assert error.value.field == "JAX_PLATFORMS"


def test_files_that_cannot_be_read_or_written_are_named(tmp_path, convnet):
    (tmp_path / "folder").mkdir()
    for call, field in (
        (lambda: exported.load(tmp_path / "nothing"), str(tmp_path / "nothing")),
        (lambda: convnet[0].export(tmp_path / "nowhere" / "encoder.zip"), "path"),
        (lambda: convnet[0].export(tmp_path / "folder"), "path"),
    ):
        with pytest.raises(errors.ExportedError) as error:
            call()
        assert error.value.field == field
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# Hostile files, whose checksums hold.


def replaced(path, target, programs):
    """Writes the file again with other programs, by stage, in place of those of the smallest batch on a CPU."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        contents = {name: old.read(name) for name in old.namelist()}
        signature = json.loads(contents.pop(exported.SIGNATURE))
        contents |= {exported.program_name(stage, "cpu", 1): content for stage, content in programs.items()}
        for name, content in contents.items():
            signature["parts"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            new.writestr(name, content, None if name.startswith("weights/") else zipfile.ZIP_DEFLATED)
        signature["checksum"] = exported.checksum(signature)
        new.writestr(exported.SIGNATURE, json.dumps(signature))
    return target


@pytest.fixture(scope="module")
def of_features(tmp_path_factory):
    """An encoder of 16 features, and the file of its export."""
    path = tmp_path_factory.mktemp("exported") / "encoder.zip"
    made = hasher("none", standard=standard([RNG.normal(size=(5, 16)).astype(np.float32)]))
    made.export(path)
    return made, path


def exported_program(function, made, rows=(1, 16)):
    """Returns a serialized program of the weights of an encoder and of rows, as `Hasher.export` serializes it."""
    leaves = jax.tree.leaves({"params": made.params, "frozen": made.frozen})
    arguments = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    program = jax.export.export(jax.jit(function), platforms=("cpu",))(
        arguments, jax.ShapeDtypeStruct(rows, np.float32)
    )
    return bytes(program.serialize())


def test_compressed_weights_are_refused_before_they_are_unpacked(of_features, tmp_path):
    """As such a file of 4.9 MB, an encoder took 5.9 GB."""
    target = tmp_path / "encoder.zip"
    with zipfile.ZipFile(of_features[1]) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(errors.ExportedError, match="weights") as error:
        exported.load(target)
    assert error.value.field == str(target)


def doubled(times):
    """Returns a function of 2^times additions in a few bytes."""
    return functools.reduce(lambda f, _: jax.jit(lambda x: f(x) + f(x)), range(times), lambda x: x + 1)


HOSTILE = {
    "custom call": lambda x: jnp.linalg.cholesky(x.reshape(4, 4)).reshape(1, 16),
    "operation that no encoder needs": jnp.sin,
    "endless loop": lambda x: lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y * 1, x),
    "long loop": lambda x: lax.fori_loop(0, 2**30, lambda _, y: y + 1, x),
    "loop that stands still": lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] * 2, c[1] + 1), (0, x))[1],
    "loop from a number of the input": lambda x: lax.fori_loop(x[0, 0].astype(int), 3, lambda _, y: y + 1, x),
    "giant array": lambda x: x + jnp.broadcast_to(x[0, 0], (2**20, 2**20)).max(),
    "giant window": lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2**30), (1, 1), ((0, 0), (2**30 - 16, 2**30 - 1)))[
        :, :16
    ],
    "exponentially many operations": doubled(15),
    "other results": lambda x: x[:, :8],
    "results of another type": lambda x: x.astype(jnp.bfloat16),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_program_with_anything_that_is_never_exported_is_rejected(tmp_path, of_features, kind):
    made, path = of_features
    program = exported_program(lambda leaves, rows: HOSTILE[kind](rows), made)
    with pytest.raises(errors.ExportedError) as error:
        exported.load(replaced(path, tmp_path / "hostile.zip", {"features": program}))
    assert error.value.field == str(tmp_path / "hostile.zip")


def test_a_harmless_program_is_accepted(tmp_path, of_features):
    """Guards the tests of hostile ones, which would hold for any program if it were built in a wrong way."""
    made, path = of_features
    program = exported_program(lambda leaves, rows: lax.fori_loop(0, 16, lambda _, y: y + 1, rows), made)
    assert exported.load(replaced(path, tmp_path / "other.zip", {"features": program})).encode(
        np.zeros((1, 16), np.float32)
    ).shape == (1, 2)


def test_malformed_programs_are_rejected(tmp_path, of_features):
    made, path = of_features
    other_rows = exported_program(lambda leaves, rows: rows[:1], made, (2, 16))
    whole = exported_program(lambda leaves, rows: rows, made)
    for program in (b"", b"\0" * 100, b"\xff" * 100, whole[:200], whole[200:], whole[::-1], other_rows):
        with pytest.raises(errors.ExportedError) as error:
            exported.load(replaced(path, tmp_path / "hostile.zip", {"features": program}))
        assert error.value.field == str(tmp_path / "hostile.zip") and str(error.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        {"takes": "sounds"},
        {"input": {"dtype": "uint8", "shape": ["n", 16]}},
        {"input": {"dtype": "float32", "shape": ["n", -16]}},
        {"input": {"dtype": "float32", "shape": 16}},
        {"output": None},
        {"bits": 8},
        {"bits": "16"},
        {"batch_sizes": []},
        {"batch_sizes": [1, 2, 2**60]},
        {"batch_sizes": [1, 2, 2**20 + 1]},
        {"batch_sizes": [4, 2, 1]},
        {"batch_sizes": {}},
        {"platforms": []},
        {"platforms": {"cpu": ["\x1b[2J"]}},
        {"platforms": {"\x1b[2J": ["cpu"]}},
        {"version": "\x1b[2J\n"},
        {"made_with": {"jax": "1\n2"}},
        {"made_with": None},
        {"weights": None},
        {"weights": [{}]},
        {"weights": [{"part": "programs/codes-cpu-1.stablehlo", "dtype": "float32"}]},
        {"weights": []},
    ],
)
def test_malformed_signatures_are_rejected(tmp_path, of_features, change):
    path = tmp_path / "other.zip"
    rewritten(of_features[1], path, lambda signature: signature.update(change))
    with pytest.raises(errors.ExportedError) as error:
        exported.load(path)
    assert error.value.field == str(path) and str(error.value).isprintable()


def test_weights_of_other_shapes_or_listed_twice_are_rejected(tmp_path, of_features):
    def twice(signature):
        signature["weights"][1] = signature["weights"][0]

    def swapped(signature):
        signature["weights"].reverse()

    def another_type(signature):
        signature["weights"][0]["dtype"] = "bfloat16"

    for change in (twice, swapped, another_type):
        rewritten(of_features[1], tmp_path / "other.zip", change)
        with pytest.raises(errors.ExportedError):
            exported.load(tmp_path / "other.zip")


def test_deeply_nested_json_and_pipes_are_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "nested.zip", "w") as archive:
        archive.writestr(exported.SIGNATURE, "[" * 100_000)
    os.mkfifo(tmp_path / "pipe.zip")
    for name in ("nested.zip", "pipe.zip"):
        with pytest.raises(errors.ExportedError) as error:
            exported.load(tmp_path / name)
        assert error.value.field == str(tmp_path / name)


@pytest.mark.parametrize("backbone", ["resnet50", "vgg16", "dinov2_small_registers", "clip_vit_b32", "siglip_base"])
def test_programs_of_every_family_are_accepted(backbone):
    """Lowered for all platforms at once, from the shapes of the weights alone."""
    made = []

    def params():
        encoder, *params = cib.create_encoder(
            jax.random.key(0), backbone=backbone, bits=16, hidden=8, image_size=224, pretrained=False
        )
        made.append(encoder)
        return dict(zip(("params", "frozen"), params, strict=True))

    leaves, tree = jax.tree.flatten(jax.eval_shape(params))
    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    rows = jax.ShapeDtypeStruct((3, 256, 256, 3), np.uint8)
    to_features, _ = export.programs(made[0], tree)
    program = jax.export.export(jax.jit(to_features), platforms=("cpu", "cuda", "tpu"))(weights, rows)
    exported.validate_program(program, weights, rows)

"""Parts of a user's own file, registered as values of config fields: those of docs/extending.md, in one run."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
import rich.console
import safetensors.numpy

import cib_jax as cib
from cib_jax.commands import compare, tune
from cib_jax.config import build, extensions, loaded_files, schema
from cib_jax.errors import ConfigError
from cib_jax.storage import collection
from cib_jax.storage.photo_table import IndexMetadata, PhotoTable
from tests import small
from tests.docs import pages

GET_CONFIG = """

def get_config():
    from tests import small

    config = small.config()
    config.objective, config.optimizer, config.augment, config.backbone = "balanced", "momentum", "mirrored", "patches"
    config.frozen, config.image_size, config.k, config.epochs, config.data.queries = True, 0, 10, 1, 10
    config.data.name, config.data.train_per_class, config.learning_rate_schedule = "arrays", -1, "constant"
    return config
"""


def own_file(folder, parts, more=""):
    """Writes a config file with the code of sections of docs/extending.md, and returns its path."""
    code = "\n".join(block for part in parts for block in pages.code(pages.section("extending.md", part))[:1])
    (folder / "mine.py").write_text(code + more)
    return folder / "mine.py"


def test_a_run_of_own_parts_alone(tmp_path, run_cli, own_parts):
    """Trains, evaluates and loads; without the file, says which one is needed, and never runs it."""
    parts = ["An objective", "An optimizer and an augmentation", "A backbone", "A data set"]
    mine = own_file(tmp_path, parts, GET_CONFIG)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    weights = {"layer.weight": rng.normal(size=(64, 3, 8, 8)), "layer.bias": rng.normal(size=64)}
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    safetensors.numpy.save_file(weights, tmp_path / "patches.safetensors")
    where = [f"--config.data.dir={tmp_path}/set.npz", f"--config.backbone_weights={tmp_path}/patches.safetensors"]
    run = tmp_path / "run"
    ended = run_cli(f"--config={mine}", f"--workdir={run}", "--config.balance_weight=0.5", *where)
    assert ended.code == 0, ended.error
    saved = json.loads((run / "config.json").read_text())
    assert (saved["extensions"], saved["balance_weight"], saved["decay"]) == (str(mine), 0.5, 1e-4)
    assert "balance" in json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert cib.Hasher.load(run).encode(images).shape == (60, 2)
    hasher = cib.Hasher.load(run)
    hasher.save(tmp_path / "saved")
    index = IndexMetadata(str(tmp_path), collection.encoder_identity(hasher))
    table = PhotoTable.create(str(tmp_path / "index"), index, collection.hasher_bytes(hasher))
    own_parts()  # as in a new process, in which somebody loads the run
    for load in (run, tmp_path / "saved"):
        with pytest.raises(cib.UserError, match=f"'patches'.* {mine}, .*--config={mine}"):
            cib.Hasher.load(load)
    with pytest.raises(cib.UserError, match=f"--index: .*'patches'.* {mine}, .*--config={mine}"):
        collection.load_hasher(table)
    ended = run_cli("--mode=evaluate", f"--workdir={run}")
    assert ended.code == 2 and f"--config={mine}" in ended.error
    assert "patches" not in schema.RULES["backbone"][1]
    assert run_cli("--mode=evaluate", f"--workdir={run}", f"--config={mine}").code == 0
    ended = run_cli("--mode=search", f"--index={tmp_path}/none", "--query=x.png", f"--config={mine}")
    assert ended.code == 2 and "there is no index" in ended.error


@pytest.mark.slow
@pytest.mark.usefixtures("few_digits")
def test_encoding_needs_neither_objective_nor_optimizer_nor_augmentation(tmp_path, run_cli, own_parts):
    """Encodes without the file, in Python and by a command, as the run did with it.

    Of the config alone: the test below.
    """
    mine = own_file(tmp_path, ["An objective", "An optimizer and an augmentation"])
    extensions.load([str(mine)])
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)
    own = {"objective": "balanced", "optimizer": "momentum", "augment": "mirrored", "epochs": 1} | small.FEW_DIGITS
    config, run = small.config(learning_rate_schedule="constant", **own), tmp_path / "run"
    cib.train(config, run, console=rich.console.Console(quiet=True))
    codes = cib.Hasher.load(run).encode(images)
    (tmp_path / "photos").mkdir()
    PIL.Image.fromarray(images[0]).save(tmp_path / "photos" / "one.png")
    own_parts()  # as in a new process
    np.testing.assert_array_equal(cib.Hasher.load(run).encode(images), codes)
    ended = run_cli("--mode=encode", f"--workdir={run}", f"--images={tmp_path}/photos", f"--codes={tmp_path}/codes")
    assert ended.code == 0, ended.error
    np.testing.assert_array_equal(cib.read_corpus(tmp_path / "codes")[1], codes[:1])


def test_a_trained_config_may_have_parts_of_an_absent_file(own_parts):
    """A trained config with an objective, a view and fields of an absent file is valid; a config to train is not."""
    config = small.unchecked(objective="balanced", augment="mirrored")
    with config.unlocked():
        config.extensions, config.balance_weight = "/nowhere/mine.py", 0.5
    schema.validate(config, trained=True)
    with pytest.raises(ConfigError, match="mine"):
        schema.validate(config)
    config.backbone = "patches"
    with pytest.raises(ConfigError, match="mine") as caught:
        schema.validate(config, trained=True)
    assert caught.value.field == "config.backbone"


def test_started_processes_load_the_same_files(tmp_path, own_parts):
    extensions.load([str(own_file(tmp_path, ["An objective"]))])
    assert loaded_files() == [str(tmp_path / "mine.py")]
    config = small.config(objective="balanced", balance_weight=3.0)
    method = build.method(config, build.encoder(config)[0])
    assert method.objective.keywords["balance_weight"] == 3.0
    # Its fields are those of compare and tune, too.
    (row,) = compare.parse_methods("balanced balance_weight=2")
    assert (row.title, row.fields) == ("balanced balance_weight=2.0", (("balance_weight", 2.0),))
    assert compare.make_cell(config, row, 16, 0, tmp_path).config.balance_weight == 2.0
    assert tune.parse_space("balance_weight=0.1..2")["balance_weight"].high == 2.0


def test_fit_takes_a_loss_and_an_optimizer(own_parts):
    """Compares with one step by hand: the gradient of the logits' mean, by SGD."""
    features = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)

    def mean(key, logits1, logits2):
        return jnp.mean(logits1), {}

    def same(key, vector):
        return vector

    cib.register("augment", same)
    made = {"backbone": "none", "augment": "same", "bits": 8, "hidden": 4, "batch_size": 8, "epochs": 1, "devices": 1}
    still, moved = (
        cib.fit(features, objective=mean, optimizer=optax.sgd(rate), **made).params["head"] for rate in (0.0, 1.0)
    )
    # d mean / d bias is 1/8 for each bit.
    np.testing.assert_allclose(still["out"]["bias"] - moved["out"]["bias"], np.full(8, 1 / 8), rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "part"), [("bits", print), ("objective", 3), ("objective", "cibhash"), ("backbone", print)]
)
def test_what_cannot_be_registered_is_refused(field, part, own_parts):
    if part == "cibhash":

        def part(key, logits1, logits2):
            return 0.0, {}

        part.__name__ = "cibhash"
    with pytest.raises(ConfigError):
        cib.register(field, part)


def test_a_new_field_needs_a_default(own_parts):
    def margin_loss(key, logits1, logits2, *, margin):
        return margin, {}

    with pytest.raises(ConfigError, match="margin"):
        cib.register("objective", margin_loss)

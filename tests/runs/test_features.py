"""What a job keeps of a frozen backbone's features: used by the next run, made again when damaged, never in the way."""

import io

import jax
import numpy as np
import pytest
import rich.console

import cib_jax as cib
from cib_jax.commands.train import train
from cib_jax.runs import context, features
from tests import small


def config(cache, **fields):
    frozen = {"backbone": "efficientnet_lite0", "frozen": True, "image_size": 32, "train__views": 2, "epochs": 1}
    return small.config(**frozen | {"cache__dir": str(cache), "data__queries": 1497, "k": 20} | fields)


@pytest.fixture
def console():
    return rich.console.Console(file=io.StringIO(), record=True, width=120)


@pytest.fixture
def computed(monkeypatch):
    """Names what is computed from here on: "views" or "plain", once for each batch."""
    calls = []

    def counted(name, real):
        def call(*arguments, **named):
            calls.append(name)
            return real(*arguments, **named)

        return call

    monkeypatch.setattr(features, "plain_features", counted("plain", features.plain_features))
    real_jit = jax.jit

    def jit(function, **named):
        made = real_jit(function, **named)
        return counted("views", made) if getattr(function, "func", None) is features.view_bank._features else made

    monkeypatch.setattr(features.view_bank.jax, "jit", jit)
    return calls


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run that filled a cache: the cache, the run's folder and what it said."""
    root = tmp_path_factory.mktemp("first")
    console = rich.console.Console(file=io.StringIO(), record=True, width=120)
    results = train(config(root / "cache"), root / "run", console=console)
    return root / "cache", root / "run", console.export_text(), results


def test_a_second_run_with_other_bits_and_seed_computes_no_features(first, tmp_path, console, computed):
    cache, _, told, results = first
    assert "read from" not in told
    other = train(config(cache, bits=24, seed=5), tmp_path, console=console)
    assert computed == []
    assert console.export_text().count(f"read from {cache}") == 3  # bank, queries, database
    assert other["map"] != results["map"]


def test_the_same_run_from_the_cache_gives_the_same_bits(first, tmp_path, console):
    cache, run, _, results = first
    again = train(config(cache), tmp_path, console=console)
    assert again["map"] == results["map"]
    for name in ("query_codes", "database_codes"):
        assert np.array_equal(np.load(tmp_path / "codes" / f"{name}.npy"), np.load(run / "codes" / f"{name}.npy"))


def test_without_a_cache_the_bits_are_the_same_and_nothing_is_kept(first, tmp_path, console):
    _, _, _, results = first
    assert train(config("none"), tmp_path / "run", console=console)["map"] == results["map"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_codes_are_those_of_the_hasher(first):
    _, run, _, _ = first
    splits = context.prepare_run(config("none"), run, rich.console.Console()).splits
    images = np.stack([splits.query.images[index] for index in range(300)])
    assert np.array_equal(cib.Hasher.load(run).encode(images), np.load(run / "codes" / "query_codes.npy")[:300])


@pytest.mark.parametrize(
    "field",
    [
        {"data__seed": 1},
        {"image_size": 40},
        {"augment": "photo"},
        {"backbone_dtype": "bfloat16"},
        {"encode_batch": 50},
        {"data__stored_size": 16},
    ],
    ids=str,
)
def test_what_shapes_features_makes_another_bank(first, tmp_path, console, field):
    cache, run, _, _ = first
    names = []
    for fields in ({}, field):
        setting = context.prepare_run(config(cache, **fields), run, console)
        batches = setting.repeatable_batches(setting.splits.train)
        names.append(
            features._Kept(setting, {"views": setting.config.augment}, setting.splits.train, batches).cache.folder.name
        )
    assert names[0] != names[1]


def test_a_changed_source_makes_another_bank(monkeypatch, tmp_path):
    package = tmp_path / "cib_jax"
    (package / "backbones").mkdir(parents=True)
    for name in (*features._CODE, "models/vgg.py"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text("one")
    monkeypatch.setattr(features.importlib.resources, "files", lambda name: tmp_path / name)
    digests = set()
    for text in ("one", "two"):
        (package / "backbones" / "vgg.py").write_text(text)
        digests.add(features._digest_of_code.__wrapped__())
    assert len(digests) == 2


def test_a_damaged_part_is_told_of_and_made_again(first, tmp_path, console, computed):
    cache, _, _, results = first
    (part,) = cache.glob("*/view-0001.safetensors")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert train(config(cache), tmp_path, console=console)["map"] == results["map"]
    assert set(computed) == {"views"}
    assert "view-0001.safetensors is damaged" in console.export_text().replace("\n", "")


def test_a_cache_that_cannot_be_written_does_not_end_the_run(first, tmp_path, console):
    (tmp_path / "file").write_text("")
    results = train(config(tmp_path / "file"), tmp_path / "run", console=console)
    assert results["map"] == first[3]["map"]
    assert "Features are not kept for later runs" in console.export_text()

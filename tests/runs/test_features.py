"""Cached features of a run: used by the next run, computed again if damaged, and never the end of a run."""

import contextlib
import dataclasses
import io
import pathlib
import shutil
import threading
import time

import jax
import numpy as np
import pytest
import rich.console

import cib_jax as cib
from cib_jax import files
from cib_jax.commands.train import train
from cib_jax.config import build
from cib_jax.distributed import multihost, sharding
from cib_jax.models import registry, weights
from cib_jax.runs import context, features
from cib_jax.training import input_pipeline
from cib_jax.training.input_pipeline import ImageBatches
from tests import pretrained, small
from tests.commands import many

pytestmark = pytest.mark.usefixtures("compiled_to_run")

NETWORK = {}


@pytest.fixture(scope="module", autouse=True)
def network(tmp_path_factory):
    """A small network that counts as pretrained, for all runs."""
    with pytest.MonkeyPatch.context() as patched:
        NETWORK.update(pretrained.convnet(patched, tmp_path_factory.mktemp("network"), 8))
        yield


def config(cache, **fields):
    frozen = NETWORK | {"train__views": 2, "epochs": 1}
    return small.config(**frozen | {"cache__dir": str(cache), "data__queries": 1497, "k": 20} | fields)


@pytest.fixture
def console():
    return rich.console.Console(file=io.StringIO(), record=True, width=120)


@pytest.fixture
def computed(monkeypatch):
    """Lists the batches of images whose features are computed from here on: "views" or "plain"."""
    calls = []
    map_batches = sharding.map_batches

    def counted(function, *arguments, **options):
        def call(batch, first):
            if batch.ndim == 4:  # images, not features that were read from the cache
                calls.append("views" if "first" in options else "plain")  # a bank needs the numbers of its images
            return function(batch, first)

        return map_batches(call, *arguments, **options)

    monkeypatch.setattr(sharding, "map_batches", counted)
    return calls


@pytest.fixture(scope="module")
def first(tmp_path_factory, network):
    """A run that filled a cache: the cache, the run's folder and what it said."""
    root = tmp_path_factory.mktemp("first")
    console = rich.console.Console(file=io.StringIO(), record=True, width=120)
    results = train(config(root / "cache"), root / "run", console=console)
    return root / "cache", root / "run", console.export_text(), results


def test_a_second_run_with_other_bits_and_seed_computes_no_features(first, tmp_path, console, computed):
    cache, _, printed, results = first
    assert "read from" not in printed
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


def test_a_view_that_another_run_computes_is_read_from_it(first, tmp_path, console, computed):
    (kept,) = first[0].glob("*/view-0000.safetensors")
    folder = tmp_path / "cache" / kept.parent.name
    shutil.copytree(kept.parent, folder, ignore=shutil.ignore_patterns("view-*"))

    def other_run():
        with files.locked(folder / "view-0000.lock"):
            held.set()
            while not (folder / "view-0001.safetensors").exists():
                time.sleep(0.01)
            shutil.copy(kept, folder / "part")
            (folder / "part").rename(folder / kept.name)

    held, other = threading.Event(), threading.Thread(target=other_run, daemon=True)
    other.start()
    assert held.wait(30)
    results = train(config(tmp_path / "cache"), tmp_path / "run", console=console)
    assert results["map"] == first[3]["map"]
    run = context.prepare_run(config("none"), tmp_path / "run", console)
    batches = sum(1 for _ in run.repeatable_batches(run.splits.train)())
    assert computed.count("views") == batches  # of the two views, one


def test_networks_side_by_side_read_the_features_of_each(first, tmp_path, console, computed, monkeypatch):
    """Of two copies of the network, by name and seed of the weights, the cache has the features of one."""
    cache = shutil.copytree(first[0], tmp_path / "cache")
    own = registry.get("convnet")
    files_of = {"convnet": NETWORK["backbone_weights"]}
    files_of["other"] = pretrained.convnet(monkeypatch, tmp_path, 8, seed=4)["backbone_weights"]
    networks = own, dataclasses.replace(own, name="other")
    both = dataclasses.replace(
        own,
        name="both",
        features=2 * own.features,
        build=lambda rngs, size: registry.SideBySide(rngs, size, networks),
        networks=("convnet", "other"),
    )
    monkeypatch.setitem(registry.BACKBONES, "other", networks[1])
    monkeypatch.setitem(registry.BACKBONES, "both", both)
    monkeypatch.setattr(weights, "locate", lambda name: weights.Source(pathlib.Path(files_of[name]), "", ""))

    joined = config(cache, backbone="both", backbone_weights="")
    run = context.prepare_run(joined, tmp_path, console)
    views, plain = features.of_views(run, run.splits.train, 2, "Views"), features.plain(run, run.splits.query, "Query")
    plain = np.concatenate(list(plain))
    batches = {name: sum(1 for _ in run.batches(getattr(run.splits, name))) for name in ("train", "query")}
    assert computed == ["views"] * 2 * batches["train"] + ["plain"] * batches["query"]  # of the other network
    assert np.ptp(plain[:, : own.features] - plain[:, own.features :]) > 0.1

    train_images = run.splits.train
    batches = ImageBatches(run.repeatable_batches(train_images), len(train_images), joined.encode_batch, run.mesh)
    key = build.key(joined, "view bank")  # all features by one program, as `cib.fit` computes them
    whole = input_pipeline.build_view_bank(key, run.encoder, run.frozen, batches, views=2, family=joined.augment)
    assert np.array_equal(views, whole)
    images = np.stack([run.splits.query.images[index] for index in range(len(run.splits.query))])
    hasher = cib.Hasher(run.encoder, run.initial, run.frozen)
    assert np.array_equal(features.codes(run, run.initial, run.splits.query, "Codes"), hasher.encode(images))


def test_the_seconds_of_views_are_those_of_all_sessions(first, tmp_path, console, monkeypatch):
    """A stopped run, evaluated, and its second session, which reads the views that the first one computed."""
    fields, asked = config(tmp_path / "cache", epochs=2), iter([True])
    with monkeypatch.context() as patched:
        patched.setattr(multihost, "sigterm_flag", lambda: contextlib.nullcontext(lambda: next(asked)))
        with pytest.raises(multihost.Preempted):
            train(fields, tmp_path / "run", console=console)
    before = cib.evaluate_run(tmp_path / "run", console=console)["seconds"]["bank"]
    assert train(fields, tmp_path / "run", console=console)["seconds"]["bank"] > before > 0


def test_codes_are_those_of_the_hasher(first):
    _, run, _, _ = first
    splits = context.prepare_run(config("none"), run, rich.console.Console()).splits
    images = np.stack([splits.query.images[index] for index in range(300)])
    assert np.array_equal(cib.Hasher.load(run).encode(images), np.load(run / "codes" / "query_codes.npy")[:300])


@pytest.mark.parametrize(
    "field",
    [
        {"data__seed": 1},
        {"image_size": 12},
        {"augment": "photo"},
        {"backbone_dtype": "bfloat16"},
        {"encode_batch": 50},
        {"data__stored_size": 16},
    ],
    ids=str,
)
def test_what_shapes_features_makes_another_bank(first, tmp_path, console, field):
    cache, workdir, _, _ = first
    keys = []
    for fields in ({}, field):
        run = context.prepare_run(config(cache, **fields), workdir, console)
        images = run.splits.train
        key = features.cache_key(run, images, run.repeatable_batches(images))
        views = [jax.random.key_data(build.key(run.config, "view bank")).tolist(), run.config.augment]
        keys.append((key, views))
    assert keys[0] != keys[1]


@pytest.mark.parametrize("takes", ["pixels", "features"])
def test_views_of_a_baseline_without_a_bank_differ_and_do_not_depend_on_batches(takes, tmp_path, console, monkeypatch):
    monkeypatch.setattr("cib_jax.runs.features.PART", 70)
    banks = []
    for size in (64, 100):
        fields = {"encode_batch": size, "train__views": 0}
        made = many.config(tmp_path, **fields) if takes == "features" else config("none", frozen=False, **fields)
        run = context.prepare_run(made, tmp_path / "run", console)
        banks.append(features.views_before_hashing(run, run.splits.train, "Views"))
    [plain] = features.before_hashing(run, run.splits.train.take(np.arange(70)), "Features")
    assert banks[0].shape == (10, len(run.splits.train), plain.shape[1])
    np.testing.assert_array_equal(*banks)
    for image in (0, 99):
        assert len({view.tobytes() for view in banks[0][:, image]}) == 10
    # Views of an item are nearer to it than to others, on average.
    distance = np.linalg.norm(banks[0][:, :70, None].astype(np.float32) - plain, axis=3).mean(axis=0)
    assert np.mean(np.diag(distance)) < np.mean(distance)


def test_views_of_features_without_noise_are_the_features(tmp_path, console):
    run = context.prepare_run(many.config(tmp_path, feature_noise=0.0, feature_dropout=0.0), tmp_path / "run", console)
    [plain] = features.before_hashing(run, run.splits.train, "Features")
    for view in features.views_before_hashing(run, run.splits.train, "Views"):
        np.testing.assert_allclose(view, plain, rtol=1e-3, atol=1e-3)


def test_a_changed_source_makes_another_bank(tmp_path):
    for name in (*features.CODE, "models/vgg.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    digests = [features.digest_of_code(tmp_path)]
    for name in ("augment/color.py", "models/vgg.py"):
        (tmp_path / name).write_text("two")
        features.digest_of_code.cache_clear()
        digests.append(features.digest_of_code(tmp_path))
    features.digest_of_code.cache_clear()
    assert len(set(digests)) == 3


def test_a_damaged_part_is_reported_and_computed_again(first, tmp_path, console, computed):
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

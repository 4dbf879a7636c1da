"""Runs on folders, lists, features, NUS-WIDE and MSCOCO, to the figures on disk; and on data that changed."""

import gc
import json
import types

import numpy as np
import PIL.Image
import pytest
import rich.console

import cib_jax as cib
from cib_jax.commands.evaluate import evaluate
from cib_jax.commands.train import train
from cib_jax.config import build
from cib_jax.data.splits import PROTOCOLS, dataclasses
from cib_jax.errors import DataError
from cib_jax.runs import context
from cib_jax.training.train_step import Progress
from tests import small
from tests.data import pictures, published
from tests.retrieval import reference
from tests.small import codes_of, reference_map

QUIET = rich.console.Console(quiet=True)


@pytest.fixture
def console():
    return rich.console.Console(record=True, width=100)


PHOTOS = {
    "data__name": "folder",
    "data__stored_size": 20,
    "data__queries": 10,
    "data__train_per_class": -1,
    "augment": "photo",
    "k": 0,
    "epochs": 2,
}


def photos(folder, classes=3, count=72):
    for number in range(count):
        name = f"class {number % classes}/{number:03}.png" if classes else f"{number:03}.png"
        pictures.write(folder / name, pictures.colored(number, max(classes, 1)))
    return folder


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """A run on a folder with classes and a cut photo, what it printed, and the rows of its report's sheets by title."""
    folder, drawn = tmp_path_factory.mktemp("labeled"), {}
    photos(folder / "my photos")
    (folder / "my photos" / "class 1" / "cut.png").write_bytes(b"\x89PNG")
    config = small.config(**PHOTOS, data__dir=str(folder / "my photos"), report__write=True, report__embedded=0)
    console = rich.console.Console(record=True, width=100)

    def keep(title, rows):
        drawn[title.split()[1]] = rows
        return PIL.Image.new("RGB", (1, 1))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cib_jax.runs.report.contact_sheet.draw", keep)
        results = train(config, folder / "run", console=console)
    return types.SimpleNamespace(
        photos=folder / "my photos",
        workdir=folder / "run",
        config=config,
        results=results,
        drawn=drawn,
        printed=" ".join(console.export_text().split()),
    )


def test_a_folder_with_classes_is_measured_by_them(labeled):
    results, workdir = labeled.results, labeled.workdir
    assert results["counts"] == {"train": 62, "query": 10, "database": 62, "validation": 0, "unreadable": 1}
    assert (results["k"], results["classes"]) == (62, ["class 0", "class 1", "class 2"])
    assert results["protocol"]["name"] == "own" and results["protocol"]["published_tables"] in labeled.printed
    np.testing.assert_allclose(results["map"], reference_map(workdir, 62), rtol=1e-12)
    names = json.loads((workdir / "codes" / "database_names.json").read_text())
    labels = codes_of(workdir)["database_labels"]
    assert [f"class {label}" for label in labels] == [name.split("/")[0] for name in names]
    rows = (workdir / "unreadable.csv").read_text().splitlines()
    assert rows[0] == '"path","reason"' and rows[1].startswith('"class 1/cut.png",')
    assert "1 of 73 images" in labeled.printed
    # The codes are those of the photos as they are prepared.
    found = [np.asarray(PIL.Image.open(labeled.photos / name).convert("RGB")) for name in names[:9]]
    assert np.array_equal(cib.Hasher.load(workdir).encode(found), codes_of(workdir)["database_codes"][:9])


def test_neighbors_are_the_nearest_and_framed_by_their_labels(labeled):
    of, drawn = codes_of(labeled.workdir), labeled.drawn
    run = context.prepare_run(labeled.config, labeled.workdir, QUIET)
    queries = {np.asarray(run.splits.query.images[index]).tobytes(): index for index in range(10)}
    assert [len(rows) for rows in drawn.values()] == [8, 8]
    average = {}
    for query, results in [*drawn["random"], *drawn["8"]]:
        index = queries[query.image.tobytes()]
        distances = [reference.distance(of["query_codes"][index], code) for code in of["database_codes"]]
        nearest = sorted(range(len(distances)), key=distances.__getitem__)[:10]
        assert [tile.caption for tile in results] == [
            {1: "1 bit"}.get(distances[place], f"{distances[place]} bits") for place in nearest
        ]
        assert [tile.hit for tile in results] == [
            of["query_labels"][index] == of["database_labels"][place] for place in nearest
        ]
        of_query = (of["query_codes"][[index]], of["database_codes"], of["query_labels"][[index]])
        average[index] = reference.reference_map((*of_query, of["database_labels"]), len(of["database_codes"]))
        assert query.caption == f"class {of['query_labels'][index]}, AP {average[index]:.2f}"
    worst = [average[queries[query.image.tobytes()]] for query, _ in drawn["8"]]
    assert worst == sorted(worst) and len(worst) == 8


def test_labels_touch_neither_training_nor_codes(labeled, tmp_path):
    """And without labels, codes are judged by their own statistics."""
    config = small.config(**PHOTOS, data__dir=str(labeled.photos), data__labelled=False, report__write=True)
    results = train(config, tmp_path / "run", console=QUIET)
    for name in ("query_codes", "database_codes"):
        assert np.array_equal(codes_of(labeled.workdir)[name], codes_of(tmp_path / "run")[name])
    assert (results["map"], results["map_tie_aware"]) == (None, None)
    assert set(results["metrics"]) == {"code_health"}
    assert not (tmp_path / "run" / "codes" / "query_labels.npy").exists()
    drawn = {path.stem for path in (tmp_path / "run" / "report").iterdir()}
    assert drawn == {"training", "bit_balance", "bit_correlation", "occupancy", "tsne", "random_queries", "index"}


def test_without_classes_a_folder_is_read_and_evaluated(tmp_path, console):
    folder = photos(tmp_path / "photos", classes=0)
    config = small.config(**PHOTOS, data__dir=str(folder))
    results = train(config, tmp_path / "run", console=console)
    assert (results["map"], results["classes"]) == (None, [])
    assert evaluate(tmp_path / "run", console=console)["metrics"] == results["metrics"]


def test_too_many_unreadable_photos_end_the_run_with_a_list(tmp_path, console):
    folder = photos(tmp_path / "photos")
    for number in range(10):
        (folder / "class 0" / f"bad {number}.jpg").write_bytes(b"")
    config = small.config(**PHOTOS, data__dir=str(folder))
    with pytest.raises(DataError, match=r"10 of 82 .*unreadable.csv.*class 0/bad 0.*config.data.max_bad_fraction"):
        train(config, tmp_path / "run", console=console)
    assert len((tmp_path / "run" / "unreadable.csv").read_text().splitlines()) == 11
    config.data.max_bad_fraction = 0.3
    assert len(context.prepare_run(config, tmp_path / "run", console).source.unreadable) == 10


def test_a_run_on_a_folder_that_changed_is_not_gone_on_with(tmp_path, console, monkeypatch):
    folder = photos(tmp_path / "photos")
    config = small.config(**PHOTOS, data__dir=str(folder))

    class Interrupted(BaseException):
        pass

    def stop(*_, **__):
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr("cib_jax.training.loop.run", stop)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run", console=console)
    pictures.write(folder / "class 0" / "new.png", pictures.colored(0, 3))
    with pytest.raises(DataError, match=r"62 \+ 62 .* 63 \+ 63 "):
        train(config, tmp_path / "run", console=console)
    (folder / "class 0" / "new.png").unlink()
    assert train(config, tmp_path / "run", console=console)["epochs"] == 2
    pictures.write(folder / "class 0" / "new.png", pictures.colored(0, 3))
    assert evaluate(tmp_path / "run", console=console)["counts"]["database"] == 63
    assert "63 + 63" in console.export_text().replace("\n", " ")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["counts"]["database"] == 62


def test_a_list_with_splits_and_several_labels_streams_to_a_run(tmp_path, console):
    photos(tmp_path / "photos")
    roles = ["train"] * 40 + ["database"] * 20 + ["query"] * 8 + ["validation"] * 4
    rows = [f"photos/class {n % 3}/{n:03}.png,{n % 3}{'|odd' if n % 2 else ''},{roles[n]}" for n in range(72)]
    (tmp_path / "list.csv").write_text("path,labels,split\n" + "\n".join(rows) + "\n")
    fields = PHOTOS | {"data__name": "list", "data__queries": -1, "k": 5, "batch_size": 16, "image_size": 16}
    fields |= {"train__validate_every": 1, "report__write": True, "report__embedded": 40}
    config = small.config(**fields, data__dir=str(tmp_path / "list.csv"), data__resident_mb=0)
    results = train(config, tmp_path / "run", console=console)
    assert results["counts"] == {"train": 40, "query": 8, "database": 60, "validation": 4, "unreadable": 0}
    np.testing.assert_allclose(results["map"], reference_map(tmp_path / "run", 5), rtol=1e-12)
    assert results["best_validation_map"] is not None
    assert "the split of the list" in console.export_text().replace("\n", " ")
    assert "shows the rarest of those" in (tmp_path / "run" / "report" / "index.html").read_text()


FEATURES = {
    "data__name": "features",
    "data__queries": 30,
    "data__train_images": 120,  # as in tests/commands/many.py, whose program then is the same
    "data__train_per_class": -1,
    "backbone": "none",
    "frozen": True,
    "image_size": 0,
    "augment": "noise",
    "epochs": 5,
    "k": 0,
}


def clusters(views=0, dtype=np.float32):
    """Three well separated clusters in 24 dimensions, far from the origin."""
    generator = np.random.default_rng(0)
    labels = np.arange(240) % 3
    centers = 50 + 4 * generator.normal(size=(3, 24))
    shape = (240, views, 24) if views else (240, 24)
    centered = centers[labels][:, None] if views else centers[labels]
    return (centered + generator.normal(size=shape)).astype(dtype), labels


def of_features(path, views=0, dtype=np.float32, **fields):
    """Returns the config of a run on features, which are written to `path`."""
    features, labels = clusters(views, dtype)
    np.save(path, features)
    np.save(path.with_suffix(".labels.npy"), labels)
    return small.config(**FEATURES | fields, data__dir=str(path))


@pytest.fixture(scope="module")
def resident(tmp_path_factory):
    """A run on features that are held in memory, with a report."""
    folder = tmp_path_factory.mktemp("resident")
    config = of_features(folder / "mine.npy", report__write=True, report__embedded=0)
    return folder, config, train(config, folder / "run", console=QUIET)


def test_features_are_hashed_by_the_same_job(resident):
    folder, config, results = resident
    assert results["map"] > 0.8  # 0.33 by chance
    np.testing.assert_allclose(results["map"], reference_map(folder / "run", 210), rtol=1e-12)
    drawn = {path.stem for path in (folder / "run").glob("report/*.png")}
    assert "distances" in drawn and "random_queries" not in drawn  # there is no image to draw
    again = evaluate(folder / "run", overrides={"report.write": False}, console=QUIET)
    assert again["map"] == results["map"]
    query = build.draw_splits(config, build.source(config)).query
    (folder / "mine.npy").rename(folder / "gone.npy")
    hasher = cib.Hasher.load(folder / "run")  # without the features it was trained on
    (folder / "gone.npy").rename(folder / "mine.npy")
    found = hasher.encode(np.stack([query.images[index] for index in range(30)]))
    assert np.array_equal(found, codes_of(folder / "run")["query_codes"])


def test_stored_views_in_half_precision_are_hashed_too(tmp_path):
    config = of_features(tmp_path / "mine.npy", 3, np.float16, augment="stored")
    results = train(config, tmp_path / "run", console=QUIET)
    assert results["map"] > 0.8
    np.testing.assert_allclose(results["map"], reference_map(tmp_path / "run", 210), rtol=1e-12)


def test_streamed_features_train_to_the_same_bits_as_resident_ones(resident, tmp_path):
    config = of_features(tmp_path / "mine.npy", data__resident_mb=0)
    train(config, tmp_path / "run", console=QUIET)
    params = [cib.Hasher.load(workdir).params for workdir in (resident[0] / "run", tmp_path / "run")]
    for one, other in zip(params[0]["head"].values(), params[1]["head"].values(), strict=True):
        for name in one:
            # One program scans, the other takes step by step: sums may round in another order.
            np.testing.assert_allclose(one[name], other[name], atol=2e-5)


def test_changed_features_are_not_gone_on_with(tmp_path, console, monkeypatch):
    config = of_features(tmp_path / "mine.npy")
    monkeypatch.setattr("cib_jax.training.loop.run", lambda state, now, **_: (state, Progress(finished=True)))
    monkeypatch.setattr("cib_jax.commands.evaluate.evaluate_run", lambda *_: {})
    train(config, tmp_path / "run", console=console)
    np.save(tmp_path / "mine.npy", clusters()[0] + 1)
    with pytest.raises(DataError, match=r"config.data.dir"):
        train(config, tmp_path / "run", console=console)


MINIATURES = {
    "nuswide": (
        published.nuswide,
        {"queries_per_class": 2, "train_per_class": 3, "k": 60},
        {"data__name": "nuswide", "data__protocol": "nuswide-2100", "data__max_bad_fraction": 0.5},
    ),
    "mscoco": (
        published.coco,
        {"queries": 20, "train_images": 64, "k": 60},
        {"data__name": "mscoco/2014", "data__protocol": "coco-5000"},
    ),
}


# Both alone: tests/data/test_tfds_builders.py, test_splits.py; streamed photos with several labels: the list above;
# a run on files of TensorFlow Datasets: tests/commands/test_train.py.
@pytest.mark.slow
@pytest.mark.parametrize("name", MINIATURES)
def test_the_papers_other_data_sets_to_a_trained_run(tmp_path, console, monkeypatch, name):
    """In the protocol of the paper, with its numbers made smaller: MAP@5000 of a ranking as long as the database."""
    write, smaller, fields = MINIATURES[name]
    write(tmp_path / "raw", 180)
    (tmp_path / "tfds").mkdir()
    if name == "nuswide":
        next((tmp_path / "raw" / "Flickr" / "zoo").iterdir()).unlink()
    protocol = fields["data__protocol"]
    published_protocol = PROTOCOLS[protocol]
    assert published_protocol.k == 5000
    made = dataclasses.replace(published_protocol, **smaller)
    monkeypatch.setitem(PROTOCOLS, protocol, made)
    config = small.config(
        **PHOTOS
        # Streamed, since that program does not depend on the number of images: both data sets share it.
        | {"data__queries": -1, "k": -1, "batch_size": 16, "image_size": 16, "data__resident_mb": 0}
        | fields
        | {"data__raw_dir": str(tmp_path / "raw"), "data__dir": str(tmp_path / "tfds")}
    )
    results = train(config, tmp_path / "run", console=console)
    counts = results["counts"]
    assert counts["query"] == (42 if name == "nuswide" else 20)
    assert counts["train"] == (63 if name == "nuswide" else 64)
    assert counts["unreadable"] <= 1
    labels = codes_of(tmp_path / "run")["database_labels"]
    assert labels.shape == (counts["database"], 21 if name == "nuswide" else 80)
    np.testing.assert_allclose(results["map"], reference_map(tmp_path / "run", 60), rtol=1e-12)
    assert results["protocol"]["name"] == protocol


def test_a_protocol_of_another_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"config.data.protocol.*coco-5000.*digits"):
        train(small.config(data__protocol="coco-5000"), tmp_path / "other", console=QUIET)


def test_photos_that_were_not_used_for_longest_are_deleted(tmp_path):
    fields = PHOTOS | {"cache__dir": str(tmp_path / "cache"), "batch_size": 8}
    for mb, name in ((100, "one"), (0, "other")):
        config = small.config(**fields, cache__mb=mb, data__dir=str(photos(tmp_path / name, count=20)))
        context.prepare_run(config, tmp_path / f"run {name}", QUIET)
        gc.collect()  # a run that ended in this process looks at its photos until then
    kept = [json.loads(path.read_text())["owner"] for path in (tmp_path / "cache" / "photos").glob("*/made_of.json")]
    assert kept == [str(tmp_path / "other")]


def test_stored_views_must_be_there(tmp_path, console):
    config = small.config(**FEATURES | {"augment": "stored"}, data__dir=str(tmp_path / "mine.npy"))
    for features in (clusters()[0], clusters(1)[0]):
        np.save(tmp_path / "mine.npy", features)
        with pytest.raises(cib.UserError, match=r"config.augment.*'stored'"):
            train(config, tmp_path / "run", console=console)

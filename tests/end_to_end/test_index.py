"""An index as a user makes and asks it by run.py: interrupted, misled; slow: killed hard, by two, in a bucket."""

import json
import pathlib
import signal
import subprocess

import numpy as np
import PIL.Image
import pytest

from cib_jax.cli.flags import MODES
from cib_jax.data import photos
from cib_jax.inference.hasher import Hasher
from cib_jax.storage.photo_table import PhotoTable
from tests.command_line import signal_once
from tests.commands import indexing
from tests.data import pictures
from tests.end_to_end.processes import free_port, wait_until
from tests.end_to_end.test_run import finish, start

PHOTOS = 1700
"""More than three commits."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    indexing.save_hasher(folder / "encoder")
    for number in range(PHOTOS):
        pictures.write(folder / "photos" / f"{number % 9} ü" / f"{number:04}.png", pictures.smooth(20, 16, seed=number))
    return folder


@pytest.fixture(scope="module")
def codes(place):
    """The code of each photo by its path."""
    hasher = Hasher.load(place / "encoder")
    paths = sorted((place / "photos").rglob("*.png"))
    squares = np.stack([photos.decode(path, hasher.side) for path in paths])
    names = [str(path.relative_to(place / "photos")) for path in paths]
    return dict(zip(names, map(bytes, hasher.encode(squares)), strict=True))


def arguments(place, uri):
    return ["--mode=index", f"--workdir={place / 'encoder'}", f"--images={place / 'photos'}", f"--index={uri}"]


def begin(place, uri):
    return start(*arguments(place, uri))


def commits(uri):
    return len(list((pathlib.Path(uri) / "photos.lance" / "_versions").glob("*.manifest")))


def codes_in(uri):
    return {path: values[2] for path, values in indexing.held(uri).items()}


@pytest.mark.slow
def test_killed_in_the_middle_with_another_beside_it_the_next_goes_on(place, codes, tmp_path, run_cli):
    """In one process, by an error at a commit and by two threads: tests/commands/test_index.py."""
    uri = tmp_path / "i"
    processes = [begin(place, uri) for _ in range(2)]
    wait_until(processes, lambda: commits(uri) >= 2)
    processes[0].send_signal(signal.SIGKILL)
    finish(processes[0])
    there = commits(uri)
    wait_until(processes[1:], lambda: commits(uri) > there)  # the other one is not disturbed
    processes[1].send_signal(signal.SIGKILL)
    finish(processes[1])
    left = PHOTOS - len(PhotoTable.open(str(uri)))
    code, out, error = run_cli(*arguments(place, uri))
    assert code == 0, error
    assert left and f"{PHOTOS:,} photos in {uri}: {left:,} files new" in out and "Traceback" not in error
    assert codes_in(uri) == codes


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(12))
def test_killed_at_any_moment_the_same_command_goes_on(place, codes, tmp_path, moment):
    """During start-up, the making of the tables, decoding, encoding, committing and tidying."""
    process = begin(place, tmp_path / "i")
    wait = np.random.default_rng(moment).uniform(2, 8)
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    finish(process)
    code, _, error = finish(begin(place, tmp_path / "i"))
    assert code == 0, error
    assert codes_in(tmp_path / "i") == codes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_interrupted_it_says_what_goes_on(place, tmp_path, run_cli, number, code):
    with signal_once(number, lambda: commits(tmp_path / "i") >= 2):
        ended, out, error = run_cli(*arguments(place, tmp_path / "i"))
    assert ended == code and "photos in" not in out
    assert error.strip().endswith(f"; {MODES['index'].after_interrupt}.")
    assert len(error.strip().splitlines()) == 1


MISTAKES = [
    (["--mode=index"], ["--index", "--mode=index"]),
    (["--mode", "search", "--query=x"], ["--index", "--mode=search"]),
    (["--mode=duplicates", "--index="], ["--index", "--mode=duplicates"]),
    (["--mode=index", "--index=INDEX"], ["--images", "INDEX"]),
    (["--mode=index", "--index=README.md", "--images=docs"], ["README.md"]),
    (["--mode=index", "--index=docs", "--images=docs"], ["docs"]),
    (["--mode=index", "--index=INDEX", "--images=nowhere"], ["--images", "nowhere"]),
    (["--mode=index", "--index=INDEX", "--images=configs"], ["--images", "configs"]),
    (["--mode=index", "--index=INDEX", "--images=docs", "--workdir=docs"], ["docs"]),
    (
        ["--mode=index", "--index=INDEX", "--images=docs", "--workdir=x", "--config=configs/index.py"],
        ["--config", "--workdir"],
    ),
    (["--mode=index", "--index=INDEX", "--images=docs", "--workdir=ENCODER", "--config.bits=32"], ["config.bits"]),
    (["--mode=index", "--index=INDEX", "--images=docs", "--config.bits=0"], ["config.bits", "0"]),
    (["--mode=index", "--index=INDEX", "--images=docs", "--config.x=1"], ["--config.x"]),
    (["--mode=index", "--index=INDEX", "--k=3"], ["--k", "--mode=search"]),
    (["--mode=search", "--index=INDEX"], ["--query", "--mode=search"]),
    (["--mode=search", "--index=INDEX", "--query=run.py"], ["--index", "INDEX", "--mode=index"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--k=0"], ["--k", "0"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--k=many"], ["--k ", "'many'"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--radius=-1"], ["--radius", "-1"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--kind=ivf x"], ["--kind", "'x'"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--kind="], ["--kind", "exact, hnsw"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--kind=hsnw"], ["--kind", "'hsnw'"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--format=xml"], ["--format ", "'xml'"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--show=x.jpg"], ["--show", "x.jpg", ".png"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--config.bits=8"], ["--config"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--config=configs/index.py"], ["--config"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--images=y"], ["--images", "--mode=encode", "--mode=index"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--workdir=y"], ["--workdir", "--mode=train"]),
    (["--mode=search", "--index=INDEX", "--query=run.py", "--noconfirm"], ["--confirm", "--mode=duplicates"]),
    (["--mode=duplicates", "--index=INDEX", "--query=x"], ["--query", "--mode=search"]),
    (["--mode=duplicates", "--index=INDEX", "--show", "/nowhere/x.png"], ["--show", "/nowhere"]),
    (["--mode=duplicates", "--show", "--index=INDEX"], ["--index", "INDEX"]),
    (["--mode=train", "--index=INDEX"], ["--index", "--mode=index", "--mode=search"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_a_mistake_is_told_in_one_sentence(place, tmp_path, refusal, arguments, words):
    def named(text):
        return text.replace("INDEX", str(tmp_path / "no index")).replace("ENCODER", str(place / "encoder"))

    sentence = refusal(*map(named, arguments))
    assert all(named(word) in sentence for word in words)
    assert not (tmp_path / "no index").exists()


@pytest.fixture(scope="module")
def bucket():
    """A bucket on loopback; returns its name, and the environment by which it is found."""
    server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    running.start()
    url = "http://{}:{}".format(*running.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    named = {name.lower(): value for name, value in keys.items()}
    boto3.client("s3", endpoint_url=url, region_name="us-east-1", **named).create_bucket(Bucket="photos")
    yield keys | {"AWS_ENDPOINT": url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    running.stop()


@pytest.mark.slow
def test_in_a_bucket(place, codes, tmp_path, bucket, monkeypatch):
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    uri = "s3://photos/an index"
    process = begin(place, uri)

    def some():
        return PhotoTable.exists(uri) and len(PhotoTable.open(uri)) > 0

    wait_until([process], some)
    process.send_signal(signal.SIGKILL)
    finish(process)
    code, out, error = finish(begin(place, uri))
    assert code == 0 and f"{PHOTOS:,} photos in {uri}" in out, error
    assert codes_in(uri) == codes
    query = next((place / "photos").rglob("0007.png"))
    code, out, error = finish(
        start(
            "--mode=search", f"--index={uri}", f"--query={query}", "--k=3", "--format=json", f"--show={tmp_path}/s.png"
        )
    )
    assert code == 0, error
    assert json.loads(out)["hits"][0]["distance"] == 0 and PIL.Image.open(tmp_path / "s.png").format == "PNG"
    code, out, error = finish(begin(place, "s3://no-such-bucket/index"))
    assert code == 2 and "--index: s3://no-such-bucket/index cannot be" in error and "Traceback" not in error, error
    assert len(error.strip().splitlines()) == 1


def test_search_and_duplicates_as_a_user_asks(place, tmp_path, run_cli):
    some = tmp_path / "some ü"
    for number in range(20):
        pictures.write(some / f"{number}.jpg", pictures.smooth(60, 40, seed=number))
    pictures.write(some / "copy.jpg", pictures.smooth(60, 40, seed=3), quality=50)
    uri = f"--index={tmp_path / 'i x'}"
    code, _, error = run_cli("--mode=index", f"--workdir={place / 'encoder'}", f"--images={some}", uri)
    assert code == 0, error
    query = f"--query={some / '3.jpg'}"
    code, out, error = run_cli("--mode", "search", uri, query, "--k=2", f"--show={tmp_path / 's.png'}")
    assert code == 0 and "copy.jpg" in out and "60 × 40" in out and (tmp_path / "s.png").exists(), error
    code, out, error = run_cli("--mode=search", uri, query, "--kind=mih b=8", "--k=2", "--rerank", "--format=json")
    assert code == 0 and json.loads(out)["hits"][0]["distance"] == 0, error
    code, out, error = run_cli("--mode=duplicates", uri, "--radius=4", "--format=json")
    assert code == 0, error
    assert sorted(json.loads(line)["path"] for line in out.splitlines()) == ["3.jpg", "copy.jpg"]

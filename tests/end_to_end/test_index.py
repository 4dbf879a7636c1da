"""An index as a user makes and asks it by run.py: killed hard, by two at once, interrupted, misled; and in a bucket."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from cib_jax.data import photos
from cib_jax.inference.hasher import Hasher
from cib_jax.storage.photo_table import PhotoTable
from tests.commands import indexing
from tests.data import pictures
from tests.end_to_end.processes import wait_until
from tests.end_to_end.test_run import ROOT, environment, finish, start

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


def begin(place, uri):
    return start("--mode=index", f"--workdir={place / 'encoder'}", f"--images={place / 'photos'}", f"--index={uri}")


def commits(uri):
    return len(list((pathlib.Path(uri) / "photos.lance" / "_versions").glob("*.manifest")))


def codes_in(uri):
    return {path: values[2] for path, values in indexing.held(uri).items()}


def test_killed_in_the_middle_with_another_beside_it_the_next_goes_on(place, codes, tmp_path):
    processes = [begin(place, tmp_path / "i") for _ in range(2)]
    wait_until(processes, lambda: commits(tmp_path / "i") >= 3)
    processes[0].send_signal(signal.SIGKILL)
    finish(processes[0])
    code, out, error = finish(processes[1])
    assert code == 0, error
    assert codes_in(tmp_path / "i") == codes

    process = begin(place, tmp_path / "j")
    wait_until([process], lambda: commits(tmp_path / "j") >= 2)
    process.send_signal(signal.SIGKILL)
    finish(process)
    left = PHOTOS - len(PhotoTable.open(str(tmp_path / "j")))
    code, out, error = finish(begin(place, tmp_path / "j"))
    assert code == 0, error
    assert left and f"{PHOTOS:,} photos in {tmp_path / 'j'}: {left:,} files new" in out and "Traceback" not in error
    assert codes_in(tmp_path / "j") == codes


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


@pytest.mark.parametrize(("number", "code", "words"), [(signal.SIGINT, 130, "\nInterrupted"), (signal.SIGTERM, 75, "")])
def test_interrupted_it_says_what_goes_on(place, tmp_path, number, code, words):
    listening = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    given = ["--mode=index", f"--workdir={place / 'encoder'}", f"--images={place / 'photos'}"]
    command = [sys.executable, "-c", listening, "run.py", *given, f"--index={tmp_path / 'i'}"]
    options = {"cwd": ROOT, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **options)
    wait_until([process], lambda: commits(tmp_path / "i") >= 2)
    os.killpg(process.pid, number)
    ended, _, error = finish(process)
    assert ended == code and error.startswith(words), error
    assert error.strip().endswith("; the same command goes on with what is not indexed.")
    assert len(error.strip().splitlines()) == 1


# Each mistake ends before anything is computed, so that one process can be misled many times.
MISLED = """
import json, os, sys
from cib_jax.distributed import initialize, multihost
from cib_jax.cli import main, parsing
from cib_jax.commands import compare, index, search, train, tune
from cib_jax.runs import processes
for number, arguments in enumerate(json.load(sys.stdin)):
    if not os.fork():
        told = os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_WRONLY)
        os.dup2(told, 1)
        os.dup2(told, 2)
        try:
            main.main(parsing.parse(["run.py", *arguments]))
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""

MISTAKES = [
    (["--mode=index"], "--index: --mode=index wants the index; give its folder, --index=DIR"),
    (["--mode", "search", "--query=x"], "--index: --mode=search wants the index"),
    (["--mode=duplicates", "--index="], "--index: --mode=duplicates wants the index"),
    (["--mode=index", "--index=INDEX"], "--images: there is no index at INDEX yet; give the folder of photos"),
    (["--mode=index", "--index=README.md", "--images=docs"], "README.md is a file; give a folder"),
    (["--mode=index", "--index=docs", "--images=docs"], "docs holds files, but no index ("),
    (["--mode=index", "--index=INDEX", "--images=nowhere"], "--images: there is no "),
    (["--mode=index", "--index=INDEX", "--images=configs"], "configs holds no photos"),
    (
        ["--mode=index", "--index=INDEX", "--images=docs", "--workdir=docs"],
        "--workdir must be the folder of a training run",
    ),
    (
        ["--mode=index", "--index=INDEX", "--images=docs", "--workdir=x", "--config=configs/index.py"],
        "--config: the encoder in x is trained already; leave --config or --workdir out",
    ),
    (
        ["--mode=index", "--index=INDEX", "--images=docs", "--workdir=ENCODER", "--config.bits=32"],
        "config.bits: the encoder in ENCODER is trained already; leave it out",
    ),
    (["--mode=index", "--index=INDEX", "--images=docs", "--config.bits=12"], "config.bits: 12 must be a multiple of 8"),
    (["--mode=index", "--index=INDEX", "--images=docs", "--config.x=1"], "--config.x: there is no such field"),
    (["--mode=index", "--index=INDEX", "--k=3"], "--k: it is for --mode=search; leave it out of --mode=index"),
    (["--mode=search", "--index=INDEX"], "--query: --mode=search wants a photo or a folder of photos"),
    (["--mode=search", "--index=INDEX", "--query=x"], "--index: there is no index at INDEX; make one by --mode=index"),
    (["--mode=search", "--index=INDEX", "--query=x", "--k=0"], "--k: wanted 1 photo or more, got 0"),
    (["--mode=search", "--index=INDEX", "--query=x", "--k=many"], "flag --k=many: invalid literal"),
    (["--mode=search", "--index=INDEX", "--query=x", "--radius=-1"], "--radius: wanted 0 bits or more, got -1"),
    (["--mode=search", "--index=INDEX", "--query=x", "--kind=ivf x"], "--kind: 'x' is no setting; write them as in"),
    (["--mode=search", "--index=INDEX", "--query=x", "--kind="], "--kind: '' is not one of exact, hnsw"),
    (["--mode=search", "--index=INDEX", "--query=x", "--kind=hsnw"], "--kind: 'hsnw' is not one of exact, hnsw"),
    (["--mode=search", "--index=INDEX", "--query=x", "--format=xml"], "flag --format=xml: value should be one of"),
    (["--mode=search", "--index=INDEX", "--query=x", "--show=x.jpg"], "--show: x.jpg is no name of a PNG"),
    (["--mode=search", "--index=INDEX", "--query=x", "--config.bits=8"], "--config: an index has its own encoder"),
    (["--mode=search", "--index=INDEX", "--query=x", "--config=configs/index.py"], "--config: an index has its own"),
    (
        ["--mode=search", "--index=INDEX", "--query=x", "--images=y"],
        "--images: it is for --mode=encode and --mode=ind",
    ),
    (
        ["--mode=search", "--index=INDEX", "--query=x", "--workdir=y"],
        "--workdir: it is for --mode=train, --mode=eval",
    ),
    (["--mode=search", "--index=INDEX", "--query=x", "--noconfirm"], "--confirm: it is for --mode=duplicates"),
    (["--mode=duplicates", "--index=INDEX", "--query=x"], "--query: it is for --mode=search; leave it out"),
    (["--mode=duplicates", "--index=INDEX", "--show", "/nowhere/x.png"], "--show: there is no folder /nowhere"),
    (["--mode=duplicates", "--show", "--index=INDEX"], "--index: there is no index at INDEX"),
    (["--mode=train", "--index=INDEX"], "--index: it is for --mode=index, --mode=search, --mode="),
]


def test_a_mistake_is_told_in_one_sentence(place, tmp_path):
    names = {"INDEX": str(tmp_path / "no index"), "ENCODER": str(place / "encoder")}

    def named(text):
        return text.replace("INDEX", names["INDEX"]).replace("ENCODER", names["ENCODER"])

    given = json.dumps([[named(one) for one in arguments] for arguments, _ in MISTAKES])
    options = {"cwd": ROOT, "env": environment() | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", MISLED, tmp_path], input=given, **options, check=False)
    assert done.returncode == 0, done.stderr
    for number, ((arguments, message), code) in enumerate(zip(MISTAKES, done.stdout.split(), strict=True)):
        told = (tmp_path / str(number)).read_text()
        lines = [line for line in told.splitlines() if not line.startswith("Looking through ")]
        assert named(message) in told and len(lines) == 1 and "Traceback" not in told, (arguments, told)
        assert code == "2" and lines[0].startswith("run.py: "), (arguments, told)
    assert not (tmp_path / "no index").exists()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


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


def test_search_and_duplicates_as_a_user_asks(place, codes, tmp_path):
    some = tmp_path / "some ü"
    for number in range(20):
        pictures.write(some / f"{number}.jpg", pictures.smooth(60, 40, seed=number))
    pictures.write(some / "copy.jpg", pictures.smooth(60, 40, seed=3), quality=50)
    workdir, uri = f"--workdir={place / 'encoder'}", f"--index={tmp_path / 'i x'}"
    code, _, error = finish(start("--mode=index", workdir, f"--images={some}", uri))
    assert code == 0, error
    code, out, error = finish(
        start("--mode", "search", uri, f"--query={some / '3.jpg'}", "--k=2", f"--show={tmp_path / 's.png'}")
    )
    assert code == 0 and "copy.jpg" in out and "60 × 40" in out and (tmp_path / "s.png").exists(), error
    code, out, error = finish(start("--mode=duplicates", uri, "--radius=4", "--format=json"))
    assert code == 0, error
    groups = [json.loads(line) for line in out.splitlines()]
    # Two other waves may run alike by chance.
    assert ["3.jpg", "copy.jpg"] in [sorted(photo["path"] for photo in group["photos"]) for group in groups]

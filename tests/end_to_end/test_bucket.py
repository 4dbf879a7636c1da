"""A run with its checkpoints in a bucket, killed, gone on with and measured, against an emulator on loopback.

Wants `pip install gcsfs gcp-storage-emulator`, which is too much for every test run.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests import small

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment():
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def move(request, response, storage, **unused):
        """Google's move of an object, which the emulator lacks: gcsfs would ask for it many times before it copies."""
        del unused
        request.params["dest_bucket_name"] = request.params["bucket_name"]
        objects.copy(request, response, storage)
        storage.delete_file(request.params["bucket_name"], request.params["object_id"])

    objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
    route = r"^/storage/v1/b/(?P<bucket_name>[^/]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"
    emulator.HANDLERS = ((route, {"POST": move}), *emulator.HANDLERS)
    without_header = objects.download

    def download(request, response, storage, **unused):
        """With the header by which tensorstore knows an object's state, and which the emulator leaves out."""
        without_header(request, response, storage, **unused)
        if response.status < 300:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    objects.download = download
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    url = f"http://127.0.0.1:{port}"
    yield os.environ | {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GOOGLE_CLOUD_PROJECT": "none",
        "EPATH_USE_TF": "false",
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "120",
    }
    server.stop()


def start(environment, *arguments):
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(process):
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def in_bucket(environment, under):
    url = f"{environment['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o?prefix={under}"
    with urllib.request.urlopen(url) as answer:
        return [item["name"].removeprefix(under) for item in json.load(answer).get("items", [])]


def steps(environment, under):
    """The checkpoints that are whole."""
    marks = [name.split("/") for name in in_bucket(environment, under)]
    return sorted(int(mark[0]) for mark in marks if mark[0].isdigit() and mark[1:] == ["commit_success.txt"])


def run(environment, workdir, where, *more, epochs=8):
    flags = small.flags(epochs=epochs, train__checkpoint_dir=where)
    return start(environment, "run.py", *flags, f"--workdir={workdir}", *more)


def codes(workdir):
    return (workdir / "codes" / "database_codes.npy").read_bytes()


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "r"
    code, _, error = finish(run(environment, workdir, ""))
    assert code == 0, error
    return workdir


def test_a_run_killed_goes_on_from_the_bucket_to_the_same_codes(environment, whole, tmp_path):
    where, workdir = "gs://bucket/killed/run", tmp_path / "r"
    process = run(environment, workdir, where)
    deadline = time.monotonic() + 200
    while not [step for step in steps(environment, "killed/run/") if step > 4]:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert not (workdir / "results.json").exists()
    # As where a machine is lost with its disk: the same command on another.
    workdir.rename(tmp_path / "lost")
    code, out, error = finish(run(environment, workdir, where))
    assert code == 0, error
    assert "Going on after epoch" in out
    assert not (workdir / "checkpoints").exists() and steps(environment, "killed/run/")[-2:] == [28, 32]
    assert codes(workdir) == codes(whole)

    code, _, error = finish(start(environment, "run.py", "--mode=evaluate", f"--workdir={workdir}"))
    assert code == 0, error
    assert codes(workdir) == codes(whole)
    loads = f"import cib_jax; print(cib_jax.Hasher.load({str(workdir)!r}).encoder.bits)"
    code, out, error = finish(start(environment, "-c", loads))
    assert (code, out) == (0, "16\n"), error

    code, _, error = finish(run(environment, tmp_path / "other", where))
    assert code == 2 and f"the checkpoints in {where} belong to the run in {workdir}" in error


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(environment, whole, tmp_path):
    where, workdir = "gs://bucket/damaged", tmp_path / "r"
    code, _, error = finish(run(environment, workdir, where))
    assert code == 0, error
    for path in workdir.glob("results.json"):
        path.unlink()
    name = next(name for name in in_bucket(environment, "damaged/") if name.startswith("32/state/d/"))
    url = f"{environment['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/bucket/o?uploadType=media&name=damaged/{name}"
    urllib.request.urlopen(urllib.request.Request(url, b"\0" * 50, method="POST")).close()
    code, out, error = finish(run(environment, workdir, where))
    assert code == 0, error
    assert "it is renamed to damaged-32, and the one before, of step 28, is taken" in " ".join(out.split())
    assert any(name.startswith("damaged-32/") for name in in_bucket(environment, "damaged/"))
    assert steps(environment, "damaged/")[-2:] == [28, 32] and codes(workdir) == codes(whole)


def test_a_bucket_that_is_not_there_is_refused(environment, tmp_path):
    code, _, error = finish(run(environment, tmp_path / "r", "gs://nowhere/run"))
    assert code == 2 and "gs://nowhere/run cannot be" in error and "Traceback" not in error

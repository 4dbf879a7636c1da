"""A corpus encoded by several processes, as a user starts them: killed hard and started again, interrupted, misled."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rich.console

from cib_jax.commands.encode import encode
from cib_jax.commands.train import train
from cib_jax.storage.code_store import read_corpus
from tests import small
from tests.data import pictures
from tests.end_to_end.processes import wait_until
from tests.end_to_end.test_run import ROOT, environment, finish, start

PHOTOS = 240


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run, and a folder of photos it has not seen, some of them broken."""
    folder = tmp_path_factory.mktemp("corpus")
    train(small.config(epochs=1), folder / "run")
    contents = [pictures.content(pictures.smooth(640, 480, seed=number), "JPEG") for number in range(25)]
    for number in range(PHOTOS):
        path = folder / "photos" / f"{number % 7}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[number % 25][: 2000 if number % 50 == 3 else None])
    return folder


def arguments(run, codes, *others, part=8):
    return [
        "--mode=encode",
        f"--workdir={run / 'run'}",
        f"--images={run / 'photos'}",
        f"--codes={codes}",
        f"--part={part}",
        *others,
    ]


def shared(run, codes, process, processes=3, part=8):
    return start(*arguments(run, codes, f"--processes={processes}", f"--process={process}", part=part))


def parts(codes):
    return len(list(codes.glob("part-*.parquet")))


@pytest.fixture(scope="module")
def undisturbed(run):
    codes, console = run / "undisturbed", rich.console.Console(record=True)
    encode(run / "run", run / "photos", codes, part=8, console=console)
    said = console.export_text().replace("\n", "")
    assert f"{PHOTOS} photos in 30 parts, 5 unreadable; the corpus in {codes} is whole" in said
    return read_corpus(codes)


def same(codes, undisturbed):
    paths, packed = read_corpus(codes)
    assert paths == undisturbed[0]
    assert np.array_equal(packed, undisturbed[1])
    assert not list(codes.glob(".*"))


def test_of_three_processes_one_is_killed_and_started_again(run, undisturbed, tmp_path):
    codes = tmp_path / "codes"
    processes = [shared(run, codes, process) for process in range(3)]
    mine = [codes / f"part-{number:08}.parquet" for number in range(0, 30, 3)]
    wait_until(processes[:1], mine[1].exists)
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    told = [finish(process) for process in processes[1:]]
    assert [code for code, _, _ in told] == [0, 0], told
    left = [path for path in mine if not path.exists()]
    assert left, "it was killed too late"
    assert all(" of 30 parts " in out and "is whole" not in out for _, out, _ in told)
    stays = {path: path.stat().st_mtime_ns for path in codes.glob("part-*")}
    code, out, error = finish(shared(run, codes, 0))
    assert code == 0, error
    assert f"{PHOTOS} photos in 30 parts, 5 unreadable" in out and "is whole" in out
    assert all(path.stat().st_mtime_ns == when for path, when in stays.items())
    same(codes, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_killed_at_any_moment_the_same_command_goes_on(run, undisturbed, tmp_path, moment):
    """Two processes with the very same share, one killed during start-up, decoding, encoding and writing, twice."""
    generator = np.random.default_rng(moment)
    codes = tmp_path / "codes"
    beside = start(*arguments(run, codes)) if moment % 2 else None
    for _ in range(2):
        process = start(*arguments(run, codes))
        wanted = int(generator.integers(0, 29))
        pause = generator.uniform(0, 0.1)
        begun = time.monotonic()
        while parts(codes) < wanted and process.poll() is None and time.monotonic() - begun < 100:
            time.sleep(0.001)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        finish(process)
    if beside:
        code, _, error = finish(beside)
        assert code == 0, error
    code, out, error = finish(start(*arguments(run, codes)))
    assert code == 0 and "is whole" in out, error
    same(codes, undisturbed)


def test_interrupted_by_its_user_it_ends_quietly(run, tmp_path):
    listening = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", listening, "run.py", *arguments(run, tmp_path / "codes", part=1)]
    options = {"cwd": ROOT, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **options)
    wait_until([process], lambda: parts(tmp_path / "codes") > 2)
    os.killpg(process.pid, signal.SIGINT)
    code, _, error = finish(process)
    assert (code, error.strip()) == (130, "Interrupted; the same command goes on after the parts that are there.")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--workdir=nowhere", "--images=x", "--codes=y"], "--workdir must be the folder of a training run"),
        (["--images=x", "--codes=y"], "--workdir: --mode=encode wants the folder of a trained run"),
        (["--workdir=RUN", "--images=x"], "--codes: --mode=encode wants a folder for the codes"),
        (["--workdir=RUN", "--codes=y"], "--images: it is missing; give the folder of photos"),
        (["--workdir=RUN", "--images=nowhere", "--codes=y"], "--images: there is no "),
        (["--workdir=RUN", "--images=x", "--codes=y", "--part=some"], "flag --part=some: invalid literal"),
        (["--workdir=RUN", "--images=x", "--codes=y", "--part=0"], "--part: 0 must be 1 or more files"),
        (["--workdir=RUN", "--images=x", "--codes=y", "--process=1"], "--processes: it is missing beside --process=1"),
        (["--workdir=RUN", "--images=x", "--codes=y", "--config.bits=32"], "config.bits: the run was trained with 16"),
        (["--mode=evaluate", "--workdir=RUN", "--codes=y"], "--codes: it is for --mode=encode; leave it out"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(run, refusal, others, message):
    given = [argument.replace("RUN", str(run / "run")) for argument in others]
    assert message in refusal(*(["--mode=encode"] if "--mode=evaluate" not in given else []), *given)
    assert not (ROOT / "y").exists()

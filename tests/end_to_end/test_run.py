"""run.py as a user starts it: one job from start to end, kill -9 and resume, and every mistake told in one sentence."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import rich.console

from cib_jax.cli.flags import MODES
from cib_jax.commands.compare import compare
from cib_jax.commands.train import train
from cib_jax.inference.hasher import Hasher
from tests.command_line import signal_once
from tests.commands import many
from tests.end_to_end.processes import children, gone, wait_until

pytestmark = pytest.mark.usefixtures("compiled_to_run")

ROOT = pathlib.Path(__file__).parents[2]
QUIET = rich.console.Console(quiet=True)
MANY = 24
"""Epochs of a run that is stopped before its end."""


def environment():
    """Returns the tests' own, in which a process comes to their bits."""
    return os.environ | {"COLUMNS": "120"}


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "run.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def trained(workdir):
    """Returns the parameters of a run."""
    return jax.tree.leaves(Hasher.load(workdir).params)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of many epochs that was left alone, beside the features that it was trained on."""
    folder = tmp_path_factory.mktemp("whole")
    train(many.config(folder, epochs=MANY), folder / "run", console=QUIET)
    return folder / "run"


def same_parameters(workdir, other):
    pairs = zip(trained(workdir), trained(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def killed_and_resumed(tmp_path, whole, run_cli, after):
    """Kills a run when `after(workdir)` holds, resumes it, and compares it with one that was left alone."""
    arguments = many.flags(whole.parent, epochs=MANY)
    process = start(*arguments, f"--workdir={tmp_path / 'killed'}")
    wait_until([process], lambda: after(tmp_path / "killed"))
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert not (tmp_path / "killed" / "results.json").exists()
    code, out, error = run_cli(*arguments, f"--workdir={tmp_path / 'killed'}")
    assert code == 0, error
    assert same_parameters(tmp_path / "killed", whole)
    results = [json.loads((workdir / "results.json").read_text()) for workdir in (tmp_path / "killed", whole)]
    assert results[0]["map"] == results[1]["map"]
    return out


def epochs_logged(workdir):
    log = workdir / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_a_run_killed_in_the_middle_resumes_to_the_same_parameters(tmp_path, whole, run_cli):
    resumed = killed_and_resumed(tmp_path, whole, run_cli, lambda workdir: epochs_logged(workdir) >= 3)
    assert "Going on after epoch" in resumed and "MAP@50" in resumed
    assert "Traceback" not in resumed


@pytest.mark.slow
def test_a_comparison_killed_in_the_middle_goes_on_to_the_same(tmp_path, run_cli):
    """Killed hard with another process beside it, which must end too and leave its cell to the next."""
    rows = {"compare__methods": "lsh, itq, pca_sign, cibhash", "compare__bits": "8", "compare__seeds": "0"}
    arguments = many.flags(tmp_path, **rows)
    process = start("--mode=compare", *arguments, "--config.compare.workers=2", f"--workdir={tmp_path / 'killed'}")
    wait_until([process], lambda: len(list((tmp_path / "killed").glob("cells/*/*/results.json"))) >= 1)
    beside = children(process)
    assert beside
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until([], lambda: all(map(gone, beside)))  # the process beside it sees that it is alone
    left = 4 - len(list((tmp_path / "killed").glob("cells/*/*/results.json")))
    alone = "--config.compare.workers=1"
    code, out, error = run_cli("--mode=compare", *arguments, alone, f"--workdir={tmp_path / 'killed'}")
    assert code == 0, error
    assert left and f"4 cells, {4 - left} complete" in out and "other processes" not in out
    compare(many.config(tmp_path, **rows, compare__workers=1), tmp_path / "whole", console=QUIET)
    tables = [(tmp_path / name / "comparison.md").read_text() for name in ("killed", "whole")]
    assert tables[0] == tables[1] and "–" not in tables[0]


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(12))
def test_a_run_killed_at_any_moment_resumes_to_the_same_parameters(tmp_path, whole, run_cli, moment):
    """At moments spread over start-up, steps and saves."""
    begun = time.monotonic()
    wait = np.random.default_rng(moment).uniform(0.0, 6.0)
    if moment % 2:
        epochs = int(np.random.default_rng(moment).integers(0, 18))
        killed_and_resumed(tmp_path, whole, run_cli, lambda workdir: epochs_logged(workdir) >= epochs)
    else:
        killed_and_resumed(tmp_path, whole, run_cli, lambda workdir: time.monotonic() - begun > wait)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(8))
def test_a_run_killed_during_a_save_resumes_to_the_same_parameters(tmp_path, whole, run_cli, moment):
    """Some milliseconds after the folder of a save has appeared that is not whole yet."""
    draws = np.random.default_rng(moment)
    epoch, wait = int(draws.integers(0, 20)), draws.uniform(0, 0.02)

    def saving(workdir):
        if epochs_logged(workdir) < epoch or not list(workdir.glob("checkpoints/*tmp*")):
            return False
        time.sleep(wait)
        return True

    killed_and_resumed(tmp_path, whole, run_cli, saving)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.bitz=32"], ["--config.bitz", "did you mean bits?"]),
        (["--config.views=4"], ["--config.views", "did you mean train.views?"]),
        (["--config.data=x"], ["--config.data: "]),
        (["--config.bits=many"], ["--config.bits ", "'many'"]),
        (["--config=configs/nothing.py"], ["--config", "'configs/nothing.py'", "beyond, "]),
        (["--config=cifra"], ["--config", "did you mean cifar?", "./cifra.py"]),
        (["--config="], ["--config", "beyond, "]),
        (["--config=README.md"], ["--config", "README.md"]),
        (["--config.bits=16", "--config"], ["--config", "--config=cifar"]),
        (["--config.data.dir=/nope", "--config=configs/cifar.py"], ["config.data.dir", "/nope"]),
        (["--workdir="], ["--workdir"]),
        (["--mode=fly"], ["--mode", "'fly'", "train, evaluate, compare, tune, encode, "]),
        (["--mode=evaluate"], ["--workdir", "--mode=evaluate"]),
        (["--mode=evaluate", "--workdir=nowhere"], ["nowhere"]),
        (["--mode=compare", "--config.compare.methods=itqq"], ["config.compare.methods", "did you mean itq?"]),
        (["--mode=tune", "--config.tune.score=validation_map"], ["config.tune.score", "'validation_map'"]),
        (["--mode=compare", "--config=configs/cifar.py", "--config.data.dir=/nope"], ["config.data.dir", "/nope"]),
        (["--config.bits=0"], ["config.bits", "0"]),
        (["--bits=32"], ["--config.bits"]),
        (["bits=32"], ["'bits=32'"]),
    ],
)
def test_a_mistake_is_told_in_one_sentence(refusal, arguments, words, tmp_path):
    workdir = [f"--workdir={tmp_path / 'run'}"]
    if arguments[-1] in ("--config", "--mode=evaluate") or "workdir" in arguments[-1]:
        workdir = []
    sentence = refusal(*arguments, *workdir)
    assert all(word in sentence for word in words)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_mistake_ends_the_program_without_a_traceback(tmp_path):
    code, out, error = finish(start("--config.bitz=32", f"--workdir={tmp_path / 'run'}"))
    assert (code, out) == (2, "")
    assert error.startswith("run.py: ") and len(error.strip().splitlines()) == 1


def test_a_missing_gpu_is_an_error_of_one_sentence(tmp_path):
    """Of CUDA without its plugin, JAX itself tells by a failed assertion."""
    given = environment() | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "run.py", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("run.py: JAX_PLATFORMS") and "'cuda'" in done.stderr


def test_a_comparison_interrupted_by_its_user_ends_quietly(tmp_path):
    """As by Ctrl-C on a terminal: every process of the group is told at once.

    The tests themselves may run where Ctrl-C is ignored, which processes inherit: it is set back as a terminal has it.
    """
    listening = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    rows = {"compare__methods": "lsh, cibhash, cl_hash", "compare__bits": "8", "compare__seeds": "0, 1"}
    arguments = many.flags(tmp_path, **rows, epochs=300)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            listening,
            "run.py",
            "--mode=compare",
            *arguments,
            "--config.compare.workers=2",
            f"--workdir={tmp_path / 't'}",
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until([process], lambda: list((tmp_path / "t").glob("cells/c*/*/metrics.jsonl")))
    os.killpg(process.pid, signal.SIGINT)
    code, _, error = finish(process)
    goes_on = MODES["compare"].after_interrupt.format(mode="compare", workdir=tmp_path / "t")
    assert (code, error.strip()) == (130, f"Interrupted; {goes_on}.")


def test_a_run_told_to_end_in_the_middle_of_an_epoch_saves_there_and_goes_on_to_the_same(tmp_path, run_cli):
    """First as by a scheduler that takes the machine back, then as by a terminal that is closed."""
    # No checkpoint but the first and the last, so that only what a signal saved can be gone on with; 30 steps an epoch.
    fields = {"epochs": 300, "train__checkpoint_every": 1000, "batch_size": 4}
    arguments = many.flags(tmp_path, **fields)
    stopped = None
    for number in (signal.SIGTERM, signal.SIGHUP):
        logged = epochs_logged(tmp_path / "ended")
        with signal_once(number, lambda logged=logged: epochs_logged(tmp_path / "ended") >= logged + 2):
            code, out, error = run_cli(*arguments, f"--workdir={tmp_path / 'ended'}")
        assert code == 75
        assert stopped is None or f"Going on after {stopped.group(1)}" in out
        stopped = re.search(
            r"Stopped by SIGTERM: ((?:step \d+, in )?epoch \d+ of 300(?:, step \d+)?),? is saved in ", error
        )
        assert stopped and len(error.strip().splitlines()) == 1, error
    code, out, error = run_cli(*arguments, f"--workdir={tmp_path / 'ended'}")
    assert code == 0, error
    assert f"Going on after {stopped.group(1)}" in out
    train(many.config(tmp_path, **fields), tmp_path / "whole", console=QUIET)
    assert same_parameters(tmp_path / "ended", tmp_path / "whole")
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("ended", "whole")
    ]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], abs=1e-12)


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="only root can make a small disk")
def test_a_full_disk_is_told_in_one_sentence_and_loses_nothing(tmp_path, whole, run_cli):
    """On a disk of 48 MiB, filled up while training."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        arguments = many.flags(whole.parent, epochs=MANY)

        def fill():
            wait_until([], lambda: epochs_logged(disk / "run") >= 2)
            with contextlib.suppress(OSError), (disk / "filling").open("wb", buffering=0) as filling:
                while True:
                    filling.write(b"\1" * (1 << 16))  # at last a part of it

        filler = threading.Thread(target=fill)
        filler.start()
        code, out, error = run_cli(*arguments, f"--workdir={disk / 'run'}")
        filler.join()
        assert code == 2 and "Traceback" not in error, error
        assert re.search(r"the disk (is full|has no room)|No space left", error.strip().splitlines()[-1]), error
        (disk / "filling").unlink()
        code, out, error = run_cli(*arguments, f"--workdir={disk / 'run'}")
        assert code == 0, error
        assert "Going on " in out
        assert same_parameters(disk / "run", whole)
    finally:
        subprocess.run(["umount", "-l", disk], check=False)

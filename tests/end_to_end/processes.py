"""Several processes of run.py on this machine, as a cluster would start them."""

import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"COLUMNS": "120"}
OPTIMIZED = ENVIRONMENT | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
"""Programs compiled as by the fixture `compiled_to_run`."""


def with_devices(count, environment=ENVIRONMENT):
    """Returns an environment in which a process has so many simulated devices."""
    return environment | {"JAX_NUM_CPU_DEVICES": str(count)}


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start(count, *arguments, environment=ENVIRONMENT, slurm=False):
    """Starts `count` processes that work together, as by hand or as SLURM's srun does; one of them alone."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    joined = [
        [address, f"--processes={count}", f"--process={number}"] if count > 1 and not slurm else []
        for number in range(count)
    ]
    # By the job's number, SLURM's processes choose their port.
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
    job["SLURM_STEP_NUM_TASKS"] = str(count)
    return [
        subprocess.Popen(
            [sys.executable, "run.py", *more, *map(str, arguments)],
            cwd=ROOT,
            env=environment | (job | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} if slurm else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for number, more in enumerate(joined)
    ]


def finish(processes, timeout=300):
    """Waits for all; returns each one's exit code, output and errors."""
    told = []
    for process in processes:
        out, error = process.communicate(timeout=timeout)
        told.append((process.returncode, out, error))
    return told


def run(count, *arguments, **started):
    """Starts processes that must all end well; returns what the first one printed."""
    told = finish(start(count, *arguments, **started))
    assert [code for code, _, _ in told] == [0] * count, told
    return told[0][1]


def wait_until(processes, holds, timeout=200):
    """Returns when `holds()`, unless a process ends before."""
    deadline = time.monotonic() + timeout
    while not holds():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children(process):
    """Returns the processes that one has started and that are there."""
    tasks = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(number) for task in tasks for number in task.read_text().split()]


def gone(number):
    """Returns whether a process has ended, though nobody may have waited for it."""
    try:
        return pathlib.Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True

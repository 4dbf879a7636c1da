"""Which process this is, by flags or by what started it; and who is waited for in vain."""

import socket
import subprocess
import sys

import pytest

from cib_jax import errors
from cib_jax.distributed import initialize
from tests.end_to_end.processes import ROOT, free_port

SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, (0, 1)),
        (SLURM, (3, 8)),
        (OPEN_MPI, (1, 2)),
        (OPEN_MPI | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, (1, 2)),  # mpirun's own step, one task a node
        ({"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}, (2, 4)),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, (0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script itself, outside srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 1)),  # a shell
    ],
)
def test_a_launcher_says_which_process_this_is(environment, wanted):
    assert initialize.process_place(None, None, environment) == wanted
    assert initialize.told_by_environment(environment) == (None if wanted == (0, 1) else wanted)
    assert initialize.process_place(4, 5, environment) == (4, 5)


@pytest.mark.parametrize(
    ("count", "process", "message"),
    [
        (None, 1, "--processes: it is missing beside --process=1"),
        (3, None, "--process: it is missing beside --processes=3; give each its number, from 0 to 2"),
        (0, 0, "--processes: 0 must be 1 or more"),
        (3, 3, "--process: 3 must be from 0 to 2"),
        (3, -1, "--process: -1 must be from 0 to 2"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(count, process, message):
    with pytest.raises(errors.DistributedError, match=message):
        initialize.process_place(process, count, {})


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (("", 1, 2), "--coordinator: it is missing"),
        (("localhost", 0, 2), "'localhost' has no host or no port"),
        (("localhost:abc", 0, 2), "'localhost:abc' has no host or no port"),
        (("localhost:70000", 0, 2), "has no host or no port"),
        (("no.such.host.invalid:1234", 1, 2), "no.such.host.invalid is no machine that is known here"),
        (("localhost:1", 2, 2), "--process: 2 must be from 0 to 1"),
        (("localhost:1", None, None), "--process=I, which one this is, are missing beside it"),
    ],
)
def test_joining_nobody_is_refused(given_, message):
    with pytest.raises(errors.DistributedError, match=message):
        initialize.initialize(*given_)


def test_who_does_not_come_is_told_of_and_ends_the_program():
    """With the others waited for for a second, not five minutes."""
    program = (
        "from cib_jax.distributed import initialize as r; r.NOTICE_SECONDS, r.JOINING_SECONDS = 0.2, 1; "
        f"r.join('127.0.0.1:{free_port()}', 1, 3, tell=print)"
    )
    done = subprocess.run([sys.executable, "-uc", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    waiting, in_vain = done.stdout.splitlines()
    assert waiting.startswith("Waiting for the first of 3 processes at 127.0.0.1:") and waiting.endswith("at most 1 s")
    assert "the first of 3 processes did not come at 127.0.0.1:" in in_vain and "that no other has" in in_vain


def test_a_port_that_is_taken_is_told_of():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(errors.DistributedError, match=r"cannot be had on this machine .*address already in use"):
            initialize.initialize(f"127.0.0.1:{other.getsockname()[1]}", 0, 2)


def test_without_word_of_others_distributed_refuses_to_run_alone():
    program = "from cib_jax.distributed import initialize as r; r.initialize(detect=True)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ProcessesError: --distributed: neither a TPU pod nor srun nor mpirun tells" in done.stderr


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, None),  # JAX takes the task's own
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, [0, 1, 2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "3", "SLURM_STEP_TASKS_PER_NODE": "4"}, [0]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, [0, 1]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "OMPI_COMM_WORLD_LOCAL_SIZE": "16"}, None),
    ],
)
def test_a_task_takes_all_gpus_that_no_other_task_of_its_machine_takes(environment, devices):
    assert initialize.local_devices(environment) == devices

"""Which process this is, by flags or by its launcher; processes that wait in vain; missing and idle devices."""

import logging
import socket
import subprocess
import sys

import jax
import pytest

from cib_jax.distributed import initialize
from cib_jax.errors import DevicesError, DistributedError
from tests.end_to_end.processes import ROOT, free_port

SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "index"),
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
def test_a_launcher_numbers_the_processes(environment, index):
    assert initialize.process_index(None, None, environment) == index
    assert initialize.detect_process(environment) == (None if index == (0, 1) else index)
    assert initialize.process_index(4, 5, environment) == (4, 5)


@pytest.mark.parametrize(
    ("process", "processes", "field"),
    [
        (1, None, "--processes"),
        (None, 3, "--process"),
        (0, 0, "--processes"),
        (3, 3, "--process"),
        (-1, 3, "--process"),
    ],
)
def test_numbers_that_do_not_go_together_are_rejected(process, processes, field):
    with pytest.raises(DistributedError) as error:
        initialize.process_index(process, processes, {})
    assert error.value.field == field


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("", 1, 2), "--coordinator"),
        (("localhost", 0, 2), "--coordinator"),
        (("localhost:abc", 0, 2), "--coordinator"),
        (("localhost:70000", 0, 2), "--coordinator"),
        (("no.such.host.invalid:1234", 1, 2), "--coordinator"),
        (("localhost:1", 2, 2), "--process"),
        (("localhost:1", None, None), "--processes"),
    ],
)
def test_incomplete_or_wrong_addresses_are_rejected(arguments, field):
    with pytest.raises(DistributedError) as error:
        initialize.initialize(*arguments)
    assert error.value.field == field


def test_a_port_in_use_is_rejected():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(DistributedError) as error:
            initialize.initialize(f"127.0.0.1:{other.getsockname()[1]}", 0, 2)
    assert error.value.field == "--coordinator" and "in use" in str(error.value)


def test_a_process_does_not_wait_forever_for_the_others():
    """Without a launcher there is an error; with an address where nobody answers, the program ends after a second."""
    address = f"127.0.0.1:{free_port()}"
    program = f"""
from cib_jax.distributed import initialize as module
module.NOTICE_SECONDS, module.JOINING_SECONDS = 0.2, 1
try:
    module.initialize(detect=True)
except module.DistributedError as error:
    print(error.field)
module.initialize({address!r}, 1, 3, report=print)
"""
    done = subprocess.run([sys.executable, "-uc", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    field, waiting, in_vain = done.stdout.splitlines()
    assert field == "--distributed"
    assert address in waiting and waiting.endswith("1 s")
    assert in_vain.startswith("--coordinator") and address in in_vain


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


def test_an_idle_gpu_is_reported_whatever_the_level_of_logs(monkeypatch):
    """JAX only logs it, and the program silences logs."""
    devices = jax.devices()

    def devices_of_jax():
        logging.getLogger("jax._src.xla_bridge").warning("An NVIDIA GPU may be present. Falling back to %s.", "cpu")
        return devices

    monkeypatch.setattr(jax, "devices", devices_of_jax)
    monkeypatch.setattr(logging.root, "level", logging.CRITICAL)
    log, messages = logging.getLogger("jax"), []
    before = (log.level, log.propagate, list(log.handlers))
    initialize.set_up_devices(messages.append)
    assert len(messages) == 1 and "(An NVIDIA GPU may be present. Falling back to cpu)" in messages[0]
    assert (log.level, log.propagate, log.handlers) == before


@pytest.mark.parametrize("platforms", ["", "tpu"])
def test_only_a_missing_device_that_was_requested_is_a_users_error(monkeypatch, request, platforms):
    def broken():
        raise RuntimeError("all is lost (set JAX_PLATFORMS='' to choose)")

    request.addfinalizer(lambda kept=jax.config.values["jax_platforms"]: jax.config.update("jax_platforms", kept))
    jax.config.update("jax_platforms", platforms)
    monkeypatch.setattr(jax, "devices", broken)
    with pytest.raises(DevicesError if platforms else RuntimeError) as error:
        initialize.set_up_devices(print)
    assert "all is lost" in str(error.value)
    assert getattr(error.value, "field", "JAX_PLATFORMS") == "JAX_PLATFORMS"

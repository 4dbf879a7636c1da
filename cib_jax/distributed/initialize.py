"""The devices that JAX works on: those that were asked for, or a sentence; and what it says of those it passes by."""

import contextlib
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import jax

from cib_jax.distributed.multihost import Place
from cib_jax.errors import DevicesError, DistributedError

# devices.available: The devices that JAX works on: those that were asked for, or a sentence; and what it says of those it passes by.


def set_up_devices(tell: Callable[[str], None]) -> None:
    """Has JAX set up its devices, after the processes of a run have joined and before anything is computed.

    Args:
      tell: told what JAX says of an accelerator that is there and that it cannot use.

    Raises:
      DevicesError: JAX_PLATFORMS names a kind of which there is none.
    """
    with _heard() as said:
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:  # the latter for a kind whose plugin is not installed
            wanted = jax.config.values["jax_platforms"]
            if not wanted:
                raise
            reason = str(error).partition(" (set JAX_PLATFORMS")[0].splitlines() or ["none is installed for it"]
            raise DevicesError(
                f"JAX_PLATFORMS: {wanted!r} is asked for, and JAX finds no such device ({reason[0]}); pip install "
                "'jax[cuda13]' has it find NVIDIA GPUs, and without the variable it takes what there is"
            ) from error
    for words in said:
        kind = jax.devices()[0].platform
        tell(
            f"JAX leaves an accelerator unused ({words.rstrip('.')}); this run goes on, on {kind}: pip install "
            "'jax[cuda13]' has it use NVIDIA GPUs, JAX_PLATFORMS=cuda refuses to go on without, JAX_PLATFORMS=cpu says "
            "that a CPU is meant"
        )


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """Yields a list of what JAX warns of meanwhile, whatever the level of other logs."""
    said: list[str] = []
    log, handler = logging.getLogger("jax"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level, propagates = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        yield said
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagates


# devices.rendezvous: How the processes of a run find each other: by flags, or by what started them.


HEARTBEAT_SECONDS = 60
"""After which silence a process counts as dead where no exchange shows it at once."""

NOTICE_SECONDS = 5
"""After which it is told that the others are waited for."""

JOINING_SECONDS = 300
"""How long they are."""

# Variables of a process's number and of how many there are, in the order in which they are believed: under Slurm,
# mpirun itself runs as a step. A step of one task, such as a shell in an allocation, is alone.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def told_by_environment(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Returns this process's place where Open MPI's mpirun, Slurm's srun or a TPU pod tell of several, else None."""
    for process, processes in _LAUNCHERS:
        if environment.get(processes, "1").isdigit() and int(environment.get(processes, "1")) > 1:
            return Place(int(environment[process]), int(environment[processes]))
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) > 1 and "TPU_WORKER_ID" in environment:
        return Place(int(environment["TPU_WORKER_ID"]), len(hosts))
    return None


def process_place(process: int | None, processes: int | None, environment: Mapping[str, str] = os.environ) -> Place:
    """Returns this process's place among those that share work without a word between them.

    Args:
      process: which it is, from 0, as the user says; None where nothing is said.
      processes: how many there are, the same.
      environment: see `told_by_environment`; believed where the user says nothing. Without a word, it is alone.

    Raises:
      ProcessesError: one of the two is missing, or out of range.
    """
    if processes is None and process is None:
        return told_by_environment(environment) or Place(0, 1)
    if processes is None:
        raise DistributedError(f"--processes: it is missing beside --process={process}; give how many there are in all")
    if process is None:
        raise DistributedError(
            f"--process: it is missing beside --processes={processes}; give each its number, from 0 to {processes - 1}"
        )
    if processes < 1:
        raise DistributedError(f"--processes: {processes} must be 1 or more")
    if not 0 <= process < processes:
        raise DistributedError(
            f"--process: {process} must be from 0 to {processes - 1}, one of --processes={processes}"
        )
    return Place(process, processes)


def initialize(
    coordinator: str = "",
    process: int | None = None,
    processes: int | None = None,
    *,
    detect: bool = False,
    tell: Callable[[str], None] = lambda words: None,
) -> None:
    """Has this process work together with others, before JAX is used for anything else.

    Args:
      coordinator: "HOST:PORT" where the first process can be reached by all; "": as the environment says.
      process: which one this is, from 0; None: as the environment says.
      processes: how many there are; None: as the environment says.
      detect: whether there must be several. Without, and without a `coordinator`, a process that no environment
        tells of others stays alone.

      tell: told when the others are waited for, and when they did not come; the program then ends with exit code 2,
        since JAX would abort it.

    Raises:
      ProcessesError: they do not fit, or the others could not be found.
    """
    mine = process_place(process, processes)
    if not coordinator and process is not None:
        raise DistributedError("--coordinator: it is missing; give HOST:PORT of the first process to all of them")
    if coordinator and mine.processes == 1:
        raise DistributedError(
            "--coordinator: --processes=N, how many there are, and --process=I, which one this is, are missing beside "
            "it; give both, or leave it out"
        )
    if coordinator:
        _check_address(coordinator, mine)
    if not coordinator and not detect and mine.processes == 1:
        return
    first = mine.process == 0 or mine.processes == 1
    others = f"the others of {mine.processes} processes" if first else f"the first of {mine.processes} processes"
    at = f" at {coordinator}" if coordinator else ""
    alike = "every one must be started with the same --coordinator and --processes and a --process that no other has"
    waiting = f"Waiting for {others}{at}, at most {JOINING_SECONDS} s"
    with (
        _after(NOTICE_SECONDS, lambda: tell(waiting)),
        _after(JOINING_SECONDS, lambda: _give_up(tell, f"--coordinator: {others} did not come{at}; {alike}")),
    ):
        try:
            jax.distributed.initialize(
                coordinator or None,
                mine.processes if coordinator else None,
                mine.process if coordinator else None,
                local_device_ids=local_devices(),
                initialization_timeout=JOINING_SECONDS + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except Exception as error:
            if not coordinator and mine.processes == 1:
                raise DistributedError(
                    "--distributed: neither a TPU pod nor srun nor mpirun tells of other processes here; give "
                    "--coordinator, --processes and --process, or leave it out"
                ) from error
            raise DistributedError(
                f"--coordinator: the processes did not find each other ({str(error).splitlines()[0]}); {alike}"
            ) from error

    if jax.process_count() == 1:
        raise DistributedError("--distributed: nothing tells of other processes here; start several, or leave it out")


def _check_address(coordinator: str, mine: Place) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise DistributedError(
            f"--coordinator: {coordinator!r} has no host or no port; give HOST:PORT of the first process, such as "
            "10.0.0.1:9876"
        )
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise DistributedError(f"--coordinator: {host} is no machine that is known here ({error.strerror})") from None
    if mine.process:
        return
    # JAX would share the port with a program that is at it, and wait for processes that go there.
    with socket.socket() as trial:
        try:
            trial.bind(("", int(port)))
        except OSError as error:
            raise DistributedError(
                f"--coordinator: port {port} cannot be had on this machine ({(error.strerror or '').lower()}), perhaps "
                "because another --process=0 is at it; choose another port for all"
            ) from None


def validate_single_process() -> None:
    """Checks that JAX counts no other processes for a job that works by itself, as it does on a TPU pod.

    Raises:
      ProcessesError: it does.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise DistributedError(
            f"--distributed: JAX counts {jax.process_count()} hosts here; give --distributed to --mode=train and "
            "--mode=evaluate, and set TPU_PROCESS_BOUNDS=1,1,1 and TPU_VISIBLE_CHIPS for other modes, each of whose "
            "processes works by itself"
        )


def local_devices(environment: Mapping[str, str] = os.environ) -> list[int] | None:
    """Returns which of the GPUs that this process may see are its own, None where JAX knows.

    JAX takes, under Slurm and Open MPI, the one of the task's number on its machine. That is wrong where each task sees
    only its own (`srun --gpus-per-task=1`), and leaves all but one idle where a machine has one task.
    """
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    tasks = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    alone = re.match(r"1(?!\d)", tasks) is not None
    return list(range(len(visible))) if visible and (alone or len(visible) == 1) else None


@contextlib.contextmanager
def _after(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Acts where the context lasts longer than some seconds."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(tell: Callable[[str], None], words: str) -> NoReturn:
    tell(words)
    os._exit(2)

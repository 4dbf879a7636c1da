"""How the processes of a run find each other: by flags, or by what started them."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import jax

from cib_jax.processes import Place, ProcessesError

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


def place(process: int | None, processes: int | None, environment: Mapping[str, str] = os.environ) -> Place:
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
        raise ProcessesError(f"--processes: it is missing beside --process={process}; give how many there are in all")
    if process is None:
        raise ProcessesError(
            f"--process: it is missing beside --processes={processes}; give each its number, from 0 to {processes - 1}"
        )
    if processes < 1:
        raise ProcessesError(f"--processes: {processes} must be 1 or more")
    if not 0 <= process < processes:
        raise ProcessesError(f"--process: {process} must be from 0 to {processes - 1}, one of --processes={processes}")
    return Place(process, processes)


def join(
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
    mine = place(process, processes)
    if not coordinator and process is not None:
        raise ProcessesError("--coordinator: it is missing; give HOST:PORT of the first process to all of them")
    if coordinator and ":" not in coordinator:
        raise ProcessesError(f"--coordinator: {coordinator!r} has no port; give HOST:PORT of the first process")
    if coordinator and mine.processes == 1:
        raise ProcessesError(
            "--coordinator: there is nobody to share with; --processes=N says how many there are and --process=I which "
            "one each is"
        )
    if not coordinator and not detect and mine.processes == 1:
        return
    others = f"{mine.processes - 1} of {mine.processes} processes" if mine.processes > 1 else "the others"
    at = f" at {coordinator}" if coordinator else ""
    alike = "every one must be started with the same --coordinator and --processes and a --process of its own"
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
                initialization_timeout=JOINING_SECONDS + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except Exception as error:
            raise ProcessesError(
                f"--coordinator: the processes did not find each other ({str(error).splitlines()[0]}); {alike}"
            ) from error


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

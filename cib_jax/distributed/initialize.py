"""Start of JAX: the processes of a run find each other, and the requested devices exist."""

import contextlib
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import jax

from cib_jax.distributed.multihost import ProcessIndex
from cib_jax.errors import DevicesError, DistributedError
from cib_jax.files import install_command

HEARTBEAT_SECONDS = 60  # silence after which a process counts as dead, where no exchange shows it earlier
NOTICE_SECONDS = 5  # time after which a message says that the other processes are awaited
JOINING_SECONDS = 300  # time after which the program ends if the other processes have not come

# Variables of a process's number and of the number of processes, in order of priority: under Slurm, mpirun itself runs
# as a step. A step of one task, such as a shell in an allocation, is alone.
_LAUNCHERS = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))


def detect_process(environment: Mapping[str, str] = os.environ) -> ProcessIndex | None:
    """Returns this process's index from the variables of Open MPI's mpirun, Slurm's srun or a TPU pod; else None."""
    for process, processes in _LAUNCHERS:
        if environment.get(processes, "1").isdigit() and int(environment.get(processes, "1")) > 1:
            return ProcessIndex(int(environment[process]), int(environment[processes]))
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) > 1 and "TPU_WORKER_ID" in environment:
        return ProcessIndex(int(environment["TPU_WORKER_ID"]), len(hosts))
    return None


def process_index(
    process: int | None, processes: int | None, environment: Mapping[str, str] = os.environ
) -> ProcessIndex:
    """Returns this process's index among those that share work, which need not communicate.

    Without numbers from the user, it comes from the environment (JAX's own detection would connect the processes with
    each other), or else the process is alone. `DistributedError` is raised if a number is missing or out of range.
    """
    if processes is None and process is None:
        return detect_process(environment) or ProcessIndex(0, 1)
    if processes is None:
        raise _flag_error("--processes", f"must be given together with --process={process}")
    if process is None:
        raise _flag_error("--process", f"must be given with --processes={processes}, from 0 to {processes - 1} each")
    if processes < 1:
        raise _flag_error("--processes", f"must be 1 or more, got {processes}")
    if not 0 <= process < processes:
        raise _flag_error("--process", f"must be from 0 to {processes - 1}, below --processes, got {process}")
    return ProcessIndex(process, processes)


def initialize(
    coordinator: str = "",
    process: int | None = None,
    processes: int | None = None,
    *,
    detect: bool = False,
    report: Callable[[str], None] = lambda message: None,
) -> None:
    """Connects this process with the others of its run, before JAX is used for anything else.

    Args:
      coordinator: "HOST:PORT" at which all can reach the first process; "" takes it from the environment.
      process: Number of this process, from 0; None takes it from the environment.
      processes: Number of processes; None takes it from the environment.
      detect: Whether there must be several processes, even if no other argument says so.
      report: Function that is called with a message when the others are awaited, and when they did not come. The
        program then ends with exit code 2, since JAX would abort it.
    """
    mine = process_index(process, processes)
    if not coordinator and process is not None:
        raise _coordinator_error("must be given together with --process; give HOST:PORT of the first process to all")
    if coordinator and mine.processes == 1:
        raise _flag_error("--processes", "and --process must be given with --coordinator; give all three or none")
    if coordinator:
        _validate_address(coordinator, is_mine=mine.process == 0)
    elif not detect and mine.processes == 1:
        return
    awaited = "the first" if mine.process else "the others"
    awaited += f" of {mine.processes} processes" + (f" at {coordinator}" if coordinator else "")
    remedy = "start all with the same --coordinator and --processes, and each with its own --process"
    try:
        with (
            _after(NOTICE_SECONDS, lambda: report(f"Waiting for {awaited}, at most {JOINING_SECONDS} s")),
            _after(JOINING_SECONDS, lambda: _exit(report, f"--coordinator: {awaited} did not come; {remedy}")),
        ):
            jax.distributed.initialize(
                # Without a coordinator, JAX detects the launcher by itself.
                coordinator or None,
                mine.processes if coordinator else None,
                mine.process if coordinator else None,
                local_device_ids=local_devices(),
                initialization_timeout=JOINING_SECONDS + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except Exception as error:
        if coordinator or mine.processes > 1:
            reason = str(error).splitlines()[0]
            raise _coordinator_error(f"did not connect the processes with each other ({reason}); {remedy}") from error
        raise _no_launcher() from error
    if jax.process_count() == 1:
        raise _no_launcher()


def _flag_error(flag: str, message: str) -> DistributedError:
    return DistributedError(f"{flag} {message}", field=flag)


def _coordinator_error(message: str) -> DistributedError:
    return _flag_error("--coordinator", message)


def _no_launcher() -> DistributedError:
    return _flag_error(
        "--distributed",
        "needs several processes, but no TPU pod, srun or mpirun was found; give --coordinator, --processes and "
        "--process, or leave it out",
    )


def _validate_address(coordinator: str, *, is_mine: bool) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise _coordinator_error(f"must be HOST:PORT of the first process, such as 10.0.0.1:9876, got {coordinator!r}")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise _coordinator_error(f"must name a host known here, got {host} ({error.strerror})") from None
    if not is_mine:
        return
    # JAX would share the port with another program that uses it, and wait for processes that connect to that one.
    with socket.socket() as trial:
        try:
            trial.bind(("", int(port)))
        except OSError as error:
            reason = (error.strerror or "").lower()
            raise _coordinator_error(
                f"must have a free port on this machine, got {port} ({reason}), perhaps used by another --process=0; "
                "choose another port for all"
            ) from None


def local_devices(environment: Mapping[str, str] = os.environ) -> list[int] | None:
    """Returns the numbers of the visible GPUs that belong to this process, or None to leave the choice to JAX.

    Under Slurm and Open MPI, JAX takes the GPU with the number of the task on its machine. That is wrong if each task
    sees only its own GPU (`srun --gpus-per-task=1`), and leaves all but one idle if a machine has one task.
    """
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    tasks = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    alone = re.match(r"1(?!\d)", tasks) is not None
    return list(range(len(visible))) if visible and (alone or len(visible) == 1) else None


def validate_single_process() -> None:
    """Raises `DistributedError` if JAX counts other processes for a command that works by itself, as on a TPU pod."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise _flag_error(
            "--distributed",
            f"must be given on {jax.process_count()} hosts, for --mode=train and --mode=evaluate; for other modes, set "
            "TPU_PROCESS_BOUNDS=1,1,1 and TPU_VISIBLE_CHIPS, so that each process works by itself",
        )


@contextlib.contextmanager
def _after(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` if the context lasts longer than `seconds`."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _exit(report: Callable[[str], None], message: str) -> NoReturn:
    report(message)
    os._exit(2)  # from the timer's thread, while JAX blocks the main thread


def set_up_devices(report: Callable[[str], None]) -> None:
    """Lets JAX set up its devices, after the processes of a run have joined and before anything is computed.

    `report` is called with a message if JAX sees an accelerator that it cannot use. `DevicesError` is raised if
    JAX_PLATFORMS names a kind of device that JAX does not find.
    """
    with _jax_warnings() as warnings:
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:  # the latter for a kind without an installed plugin
            platforms = jax.config.values["jax_platforms"]
            if not platforms:
                raise
            reason = str(error).partition(" (set JAX_PLATFORMS")[0].splitlines() or ["no plugin is installed"]
            raise DevicesError(
                f"JAX_PLATFORMS must name devices that JAX finds, got {platforms!r} ({reason[0]}); "
                f"{install_command('cuda')} for NVIDIA GPUs, or unset the variable to use the devices that are found",
                field="JAX_PLATFORMS",
            ) from error
    for warning in warnings:
        report(
            f"JAX leaves an accelerator unused ({warning.rstrip('.')}) and runs on {jax.devices()[0].platform}: "
            f"{install_command('cuda')} to use NVIDIA GPUs, set JAX_PLATFORMS=cuda to fail without one, or "
            "JAX_PLATFORMS=cpu to use the CPU without this message"
        )


@contextlib.contextmanager
def _jax_warnings() -> Iterator[list[str]]:
    """Yields a list that collects JAX's warnings inside the context, whatever the level of other logs."""
    messages: list[str] = []
    log, handler = logging.getLogger("jax"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level, propagates = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagates

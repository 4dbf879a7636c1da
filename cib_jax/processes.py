"""The processes that work at one run together: how they find each other, who writes, what they agree on.

Alone, a process is the first of one, and everything here costs nothing.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped
from orbax.checkpoint import multihost

from cib_jax.errors import Refusal

Result = TypeVar("Result")

HEARTBEAT_SECONDS = 60
"""After which silence a process counts as dead where no exchange shows it at once."""

JOINING_SECONDS = 300
"""How long the others are waited for."""

LONGEST_WAIT_SECONDS = 7 * 24 * 3600
"""After which a process that waits for the others gives up."""

_WAITS = itertools.count()


class ProcessesError(Refusal):
    """Several processes cannot work together; the message says why."""


class SharedRefusal(Refusal):
    """What one process refused, raised in all of them."""


class Place(NamedTuple):
    """Which process this is, of how many."""

    process: int
    processes: int


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
    coordinator: str = "", process: int | None = None, processes: int | None = None, *, detect: bool = False
) -> None:
    """Has this process work together with others, before JAX is used for anything else.

    Args:
      coordinator: "HOST:PORT" where the first process can be reached by all; "": as the environment says.
      process: which one this is, from 0; None: as the environment says.
      processes: how many there are; None: as the environment says.
      detect: whether there must be several. Without, and without a `coordinator`, a process that no environment
        tells of others stays alone.

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
    try:
        jax.distributed.initialize(
            coordinator or None,
            mine.processes if coordinator else None,
            mine.process if coordinator else None,
            initialization_timeout=JOINING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:
        raise ProcessesError(
            f"--coordinator: the processes did not find each other ({str(error).splitlines()[0]}); every one must be "
            "started with the same --coordinator and --processes and a --process of its own"
        ) from error


def parts_of(parts: int, place: Place) -> range:
    """Returns which of `parts` are a process's: every one whose number leaves its own when divided by their count."""
    return range(place.process, parts, place.processes)


def several() -> bool:
    """Returns whether other processes work at the same run."""
    return jax.process_count() > 1


def first() -> bool:
    """Returns whether this is the process that writes, reports and decides."""
    return jax.process_index() == 0


def share(count: int) -> slice:
    """Returns the part of `count` things that is this process's; the parts are contiguous and differ by 1 at most."""
    return share_of(count, Place(jax.process_index(), jax.process_count()))


def share_of_batches(count: int, batch_size: int) -> slice:
    """Returns this process's part of `count` things, in whole batches but for the last one's end."""
    mine = share(-(-count // batch_size))
    return slice(min(mine.start * batch_size, count), min(mine.stop * batch_size, count))


def share_of(count: int, place: Place) -> slice:
    """Returns the part of `count` things that is a process's."""
    return slice(count * place.process // place.processes, count * (place.process + 1) // place.processes)


def gather(rows: Shaped[np.ndarray, "rows ..."]) -> list[Shaped[np.ndarray, "rows ..."]]:
    """Returns every process's rows, of any number each, in the order of the processes."""
    if not several():
        return [rows]
    parts = _gather_bytes(np.ascontiguousarray(rows).tobytes())
    return [np.frombuffer(part, rows.dtype).reshape(-1, *rows.shape[1:]) for part in parts]


def gather_texts(text: str) -> list[str]:
    """Returns every process's text, in the order of the processes."""
    return [part.decode() for part in _gather_bytes(text.encode())] if several() else [text]


def from_first(text: str) -> str:
    """Returns what the first process says here, in all of them."""
    return gather_texts(text)[0]


def all_of(flag: bool) -> bool:
    """Returns whether something is so in every process."""
    return bool(np.concatenate(gather(np.array([flag]))).all())


def _gather_bytes(content: bytes) -> list[bytes]:
    wait()
    # As bytes, since JAX would make 32 bits of 64; all of one length, since that is what can be exchanged.
    sizes = multihost_utils.process_allgather(np.frombuffer(np.int64(len(content)).tobytes(), np.uint8))
    lengths = np.ascontiguousarray(sizes).view(np.int64)[:, 0]
    if not lengths.max():
        return [b""] * len(lengths)
    padded = np.frombuffer(content.ljust(int(lengths.max()), b"\0"), np.uint8)
    return [
        part[:length].tobytes() for part, length in zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    ]


def is_loss_of_another(error: Exception) -> bool:
    """Returns whether an error is what an exchange with other processes ends in when one of them is gone."""
    # Of several types; by the words of Gloo, NCCL and JAX's coordination service.
    return any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED"))


def wait() -> None:
    """Returns when every process has come here, however long one of them downloads or decodes."""
    if several():
        # Not by an exchange between devices, which gives up after half an hour.
        multihost.get_barrier_sync_fn()(key=f"cib_jax-{next(_WAITS)}", timeout_ms=LONGEST_WAIT_SECONDS * 1000)


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Has what one process refuses in this step end the step in all of them, with its words.

    Raises:
      SharedRefusal: one of several processes refused.
    """
    if not several():
        yield
        return
    refused = ""
    try:
        yield
    except Refusal as error:
        refused = str(error)
    words = gather_texts(refused)
    if any(words):
        raise SharedRefusal(next(filter(None, words)))


def first_then_others(work: Callable[[], Result]) -> Result:
    """Returns what `work` does, in the first process and then in the others, which find what that one left.

    Raises:
      SharedRefusal: one of several processes refused.
    """
    done: list[Result] = []
    for turn in (True, False):
        with agreed():
            if first() is turn:
                done.append(work())
    return done[0]

"""Several processes that work at one run: shares of the work, exchange of data, shared errors and preemption.

A single process counts as the first of one, and all functions here then cost nothing.
"""

import contextlib
import itertools
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped

from cib_jax.errors import DistributedError, SharedRefusal, UserError

Result = TypeVar("Result")

BARRIER_TIMEOUT_SECONDS = 7 * 24 * 3600  # after which a process that waits for the others gives up
_barriers = itertools.count()
_preemption_checks = itertools.count()  # of all loops, since a signal between two of them stops the next one


# Shares of the work.


class ProcessIndex(NamedTuple):
    """The number of a process, from 0, and the number of processes."""

    process: int
    processes: int


def is_distributed() -> bool:
    """Returns whether other processes work at the same run."""
    return jax.process_count() > 1


def is_first_process() -> bool:
    """Returns whether this is the process that writes, reports and decides."""
    return jax.process_index() == 0


def share(count: int, index: ProcessIndex | None = None) -> slice:
    """Returns the contiguous share of `count` items of a process, by default of this one; sizes differ by at most 1."""
    process, processes = index or (jax.process_index(), jax.process_count())
    return slice(count * process // processes, count * (process + 1) // processes)


def share_of_batches(count: int, batch_size: int) -> slice:
    """Returns this process's share of `count` items in whole batches; only the last batch may be smaller."""
    mine = share(-(-count // batch_size))
    return slice(min(mine.start * batch_size, count), min(mine.stop * batch_size, count))


def strided_share(count: int, index: ProcessIndex) -> range:
    """Returns the indices of one process's share of `count` items: every `index.processes`-th one."""
    return range(index.process, count, index.processes)


# Exchange of data.


def gather(rows: Shaped[np.ndarray, "rows ..."]) -> list[Shaped[np.ndarray, "_ ..."]]:
    """Returns the rows of every process, in the order of the processes; their numbers of rows may differ."""
    if not is_distributed():
        return [rows]
    parts = _gather_bytes(np.ascontiguousarray(rows).tobytes())
    return [np.frombuffer(part, rows.dtype).reshape(-1, *rows.shape[1:]) for part in parts]


def gather_texts(text: str) -> list[str]:
    """Returns the text of every process, in the order of the processes."""
    return [part.decode() for part in _gather_bytes(text.encode())] if is_distributed() else [text]


def broadcast_text(text: str) -> str:
    """Returns the text of the first process, in all processes."""
    return gather_texts(text)[0]


def all_processes(flag: bool) -> bool:
    """Returns whether `flag` is True in every process."""
    return bool(np.concatenate(gather(np.array([flag]))).all())


def _gather_bytes(content: bytes) -> list[bytes]:
    barrier()
    # As bytes, since JAX would convert 64-bit numbers to 32 bits; padded to one length, since only arrays of the same
    # shape can be gathered.
    sizes = multihost_utils.process_allgather(np.frombuffer(np.int64(len(content)).tobytes(), np.uint8))
    lengths = np.ascontiguousarray(sizes).view(np.int64)[:, 0]
    if not lengths.max():
        return [b""] * len(lengths)
    padded = np.frombuffer(content.ljust(int(lengths.max()), b"\0"), np.uint8)
    gathered = multihost_utils.process_allgather(padded)
    return [part[:length].tobytes() for part, length in zip(gathered, lengths, strict=True)]


def barrier() -> None:
    """Returns when every process has called it, however long one of them downloads or decodes."""
    if is_distributed():
        from orbax.checkpoint import multihost  # takes half a second

        # An exchange between devices would give up after half an hour.
        wait = multihost.get_barrier_sync_fn()
        wait(key=f"cib_jax-{next(_barriers)}", timeout_ms=BARRIER_TIMEOUT_SECONDS * 1000)


def run_first_then_others(work: Callable[[], Result]) -> Result:
    """Returns the result of `work`, called in the first process and then in the others, which find what it wrote."""
    results: list[Result] = []
    for turn_of_first in (True, False):
        with shared_errors():
            if is_first_process() is turn_of_first:
                results.append(work())
    return results[0]


def mean_over_processes(compute: Callable[[slice], Result], count: int) -> Result:
    """Returns `compute(slice(0, count))`, with the work shared by the processes.

    `compute` takes a slice of the `count` queries and returns means over them: numbers in dicts and lists of any depth.
    """
    if not is_distributed():
        return compute(slice(0, count))
    mine = share(count)
    figures = compute(mine) if mine.stop > mine.start else None
    gathered = [json.loads(text) for text in gather_texts(json.dumps([mine.stop - mine.start, figures]))]
    return _weighted_mean([(weight / count, part) for weight, part in gathered if weight])


def _weighted_mean(parts: list[tuple[float, Any]]) -> Any:
    """Returns the mean of nested figures of the same structure, given as (weight, figures)."""
    _, like = parts[0]
    if isinstance(like, dict):
        return {name: _weighted_mean([(weight, part[name]) for weight, part in parts]) for name in like}
    if isinstance(like, list):
        return [_weighted_mean([(weight, part[i]) for weight, part in parts]) for i in range(len(like))]
    if isinstance(like, int):  # a setting, or the size of the database that all processes searched
        if any(part != like for _, part in parts):
            raise AssertionError(f"a count that differs between processes has no mean: {[part for _, part in parts]}")
        return like
    return sum(weight * part for weight, part in parts)


# Errors.


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """Raises `SharedRefusal` in every process if the block raised a `UserError` in any of them."""
    if not is_distributed():
        yield
        return
    message = ""
    try:
        yield
    except UserError as error:
        message = str(error)
    if first := next(filter(None, gather_texts(message)), ""):
        raise SharedRefusal(first)


def validate_alike(values: dict[str, Any]) -> None:
    """Raises `SharedRefusal` unless all processes have the same values by name, as JSON can represent them."""
    first_values = json.loads(broadcast_text(json.dumps(values)))
    with shared_errors():
        for name in first_values | values:
            if values.get(name) != first_values.get(name):
                raise DistributedError(
                    f"{name} must be the same in all processes, got {values.get(name)!r} in process "
                    f"{jax.process_index()} and {first_values.get(name)!r} in the first; start all with the same "
                    "flags, except for --process",
                    field=name,
                )


def is_peer_failure(error: Exception) -> bool:
    """Returns whether an error is one in which an exchange ends when another process has died."""
    # The errors have several types; these are words of Gloo, NCCL and JAX's coordination service.
    return any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED"))


# Preemption: a scheduler takes a machine back with SIGTERM.


PREEMPTED_CODE = 75
"""Exit code after preemption, EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command continues the work."""


class Preempted(SystemExit):
    """The program was asked to end, and its work so far is saved, as `message` describes."""

    def __init__(self, message: str):
        super().__init__(PREEMPTED_CODE)
        self.message = message


def install_sigterm_handler() -> None:
    """Lets SIGTERM end this program by an exception, which leaves written files whole; only for the main thread.

    In a run of several processes, JAX handles the signal: a scheduler may signal only one of them, and all must stop at
    the same step.
    """

    def stop(*_: object) -> NoReturn:
        raise Preempted("nothing was left half done")

    if not is_distributed():
        signal.signal(signal.SIGTERM, stop)
    treat_hangup_as_sigterm()


def treat_hangup_as_sigterm() -> None:
    """Lets SIGHUP, by which a closed terminal or a lost ssh connection ends programs, act as SIGTERM does."""

    def hang_up(*_: object) -> None:
        replace_closed_terminal((1, 2))
        signal.raise_signal(signal.SIGTERM)

    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # otherwise nohup lets the program go on
        signal.signal(signal.SIGHUP, hang_up)


def replace_closed_terminal(descriptors: Sequence[int]) -> None:
    """Lets descriptors of a closed terminal, writing to which is an error, write to nowhere."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


@contextlib.contextmanager
def sigterm_flag() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGTERM came, for a loop that can stop between two of its steps.

    Inside the context, SIGTERM interrupts nothing. In a run of several processes, all must call the function equally
    often, and it becomes True in all of them at the same call.
    """
    if is_distributed():
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_preemption_checks))
        return
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set  # Python delivers signals only to the main thread
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if came.is_set():  # after the last call of the function
        raise Preempted("the loop had come to its end, which is saved")

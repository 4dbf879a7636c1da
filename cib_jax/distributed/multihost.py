"""The processes that work at one run together: their shares, what they exchange, and refusing together.

Alone, a process is the first of one, and everything here costs nothing."""

import contextlib
import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped
from orbax.checkpoint import multihost

from cib_jax.errors import DistributedError, SharedRefusal, UserError

# devices.processes: The processes that work at one run together: their shares, what they exchange, and refusing together.
#
# Alone, a process is the first of one, and everything here costs nothing.


Result = TypeVar("Result")

LONGEST_WAIT_SECONDS = 7 * 24 * 3600
"""After which a process that waits for the others gives up."""

_WAITS = itertools.count()


class Place(NamedTuple):
    """Which process this is, of how many."""

    process: int
    processes: int


def parts_of(parts: int, place: Place) -> range:
    """Returns which of `parts` are a process's: every one whose number leaves its own when divided by their count."""
    return range(place.process, parts, place.processes)


def is_distributed() -> bool:
    """Returns whether other processes work at the same run."""
    return jax.process_count() > 1


def is_first_process() -> bool:
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
    if not is_distributed():
        return [rows]
    parts = _gather_bytes(np.ascontiguousarray(rows).tobytes())
    return [np.frombuffer(part, rows.dtype).reshape(-1, *rows.shape[1:]) for part in parts]


def gather_texts(text: str) -> list[str]:
    """Returns every process's text, in the order of the processes."""
    return [part.decode() for part in _gather_bytes(text.encode())] if is_distributed() else [text]


def broadcast_text(text: str) -> str:
    """Returns what the first process says here, in all of them."""
    return gather_texts(text)[0]


def all_processes(flag: bool) -> bool:
    """Returns whether something is so in every process."""
    return bool(np.concatenate(gather(np.array([flag]))).all())


def _gather_bytes(content: bytes) -> list[bytes]:
    barrier()
    # As bytes, since JAX would make 32 bits of 64; all of one length, since that is what can be exchanged.
    sizes = multihost_utils.process_allgather(np.frombuffer(np.int64(len(content)).tobytes(), np.uint8))
    lengths = np.ascontiguousarray(sizes).view(np.int64)[:, 0]
    if not lengths.max():
        return [b""] * len(lengths)
    padded = np.frombuffer(content.ljust(int(lengths.max()), b"\0"), np.uint8)
    return [
        part[:length].tobytes() for part, length in zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    ]


def is_peer_failure(error: Exception) -> bool:
    """Returns whether an error is what an exchange with other processes ends in when one of them is gone."""
    # Of several types; by the words of Gloo, NCCL and JAX's coordination service.
    return any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED"))


def barrier() -> None:
    """Returns when every process has come here, however long one of them downloads or decodes."""
    if is_distributed():
        # Not by an exchange between devices, which gives up after half an hour.
        multihost.get_barrier_sync_fn()(key=f"cib_jax-{next(_WAITS)}", timeout_ms=LONGEST_WAIT_SECONDS * 1000)


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """Has what one process refuses in this step end the step in all of them, with its words.

    Raises:
      SharedRefusal: one of several processes refused.
    """
    if not is_distributed():
        yield
        return
    refused = ""
    try:
        yield
    except UserError as error:
        refused = str(error)
    words = gather_texts(refused)
    if any(words):
        raise SharedRefusal(next(filter(None, words)))


def validate_alike(words: dict[str, Any]) -> None:
    """Checks that all processes were told the same.

    Args:
      words: what this one was told, by name, in values that JSON has.

    Raises:
      SharedRefusal: one was told something else than the first.
    """
    firsts = json.loads(broadcast_text(json.dumps(words)))
    with shared_errors():
        for name in firsts | words:
            if words.get(name) != firsts.get(name):
                raise DistributedError(
                    f"{name}: process {jax.process_index()} was started with {words.get(name)!r}, the first one with "
                    f"{firsts.get(name)!r}; give all the same, but for --process"
                )


def run_first_then_others(work: Callable[[], Result]) -> Result:
    """Returns what `work` does, in the first process and then in the others, which find what that one left.

    Raises:
      SharedRefusal: one of several processes refused.
    """
    done: list[Result] = []
    for turn in (True, False):
        with shared_errors():
            if is_first_process() is turn:
                done.append(work())
    return done[0]


# jobs.over_processes: Figures of many queries, each process taking its share of them.


Figures = TypeVar("Figures")


def mean_over_processes(of_queries: Callable[[slice], Figures], count: int) -> Figures:
    """Returns what `of_queries` gives for all of `count` queries, of which it is asked for this process's share.

    Args:
      of_queries: gives figures that are means over the queries of a slice, numbers in dicts and lists of any depth.
      count: of all queries.
    """
    if not is_distributed():
        return of_queries(slice(0, count))
    mine = share(count)
    figures = of_queries(mine) if mine.stop > mine.start else None
    told = [json.loads(text) for text in gather_texts(json.dumps([mine.stop - mine.start, figures]))]
    return _mean([(weight / count, theirs) for weight, theirs in told if weight])


def _mean(parts: list[tuple[float, Any]]) -> Any:
    """Returns the mean of what several processes found, each with the weight that its part has in the whole."""
    _, like = parts[0]
    if isinstance(like, dict):
        return {name: _mean([(weight, theirs[name]) for weight, theirs in parts]) for name in like}
    if isinstance(like, list):
        return [_mean([(weight, theirs[at]) for weight, theirs in parts]) for at in range(len(like))]
    if isinstance(like, int):  # of what all of them searched, or a setting
        if any(theirs != like for _, theirs in parts):
            raise AssertionError(f"a count that differs between processes has no mean: {[found for _, found in parts]}")
        return like
    return sum(weight * theirs for weight, theirs in parts)


# jobs.preemption: SIGTERM, by which schedulers take a machine back: what is under way is saved, and the exit code says so.


CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on."""


class Preempted(SystemExit):
    """The job was asked to end and what it had done is on disk; the message says how far it came."""

    def __init__(self, message: str):
        super().__init__(CODE)
        self.message = message


def install_sigterm_handler() -> None:
    """Has SIGTERM end this program as an exception that leaves what is written whole; for the main thread.

    Of several processes, JAX listens: one may be told alone, and they must stop at the same step.
    """
    if not is_distributed():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    raise Preempted("nothing was left half done")


@contextlib.contextmanager
def sigterm_flag() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether to stop, for a loop that can do so between two of its steps.

    While the context lasts, SIGTERM interrupts nothing. Of several processes, all must ask equally often, and are told
    at the same time.
    """
    if is_distributed():
        asked = itertools.count()
        yield lambda: multihost_utils.reached_preemption_sync_point(next(asked))
        return
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set  # only the main thread hears signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if told.is_set():  # too late for the loop to hear
        raise Preempted("the loop had come to its end, which is saved")

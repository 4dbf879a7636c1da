"""The processes that work at one run together: their shares, what they exchange, and refusing together.

Alone, a process is the first of one, and everything here costs nothing.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped
from orbax.checkpoint import multihost

from cib_jax.errors import Refusal

Result = TypeVar("Result")

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


def check_alike(words: dict[str, Any]) -> None:
    """Checks that all processes were told the same.

    Args:
      words: what this one was told, by name, in values that JSON has.

    Raises:
      SharedRefusal: one was told something else than the first.
    """
    firsts = json.loads(from_first(json.dumps(words)))
    with agreed():
        for name in firsts | words:
            if words.get(name) != firsts.get(name):
                raise ProcessesError(
                    f"{name}: process {jax.process_index()} was started with {words.get(name)!r}, the first one with "
                    f"{firsts.get(name)!r}; give all the same, but for --process"
                )


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

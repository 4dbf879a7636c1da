"""Photos of strangers, decoded in processes of their own, where a crafted one can do little harm."""

import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from cib_jax.data.photos import BadPhotoError, DecodedPhoto
from cib_jax.web import frames

_STARTING = 60.0
_MOST_THUMBNAIL = 1 << 20
_NONSENSE = "The photo cannot be decoded; try another, or save it again as JPEG or PNG."


class BusyError(Exception):
    """More photos wait than are worth waiting for; the message says so."""


class DecoderError(Exception):
    """No process that decodes can be started, which is no photo's fault."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What decoding may take."""

    processes: int = dataclasses.field(default_factory=lambda: min(4, max(2, os.cpu_count() or 1)))
    """That decode at the same time."""
    seconds: float = 10.0
    """For one photo."""
    memory_mib: int = 2048
    """For one process, beside what it has at its start."""
    megapixels: int = 50
    """Of a photo of a stranger."""
    waiting: int = 100
    """Photos that may wait for a process."""
    patience: float = 20.0
    """Seconds that one waits."""


class Decoders:
    """A few processes that decode; any number of threads may ask. Close it, or use it in a `with`."""

    def __init__(self, decoding: Decoding, work: str = "") -> None:
        """Starts the processes.

        Args:
          decoding: what they may take.
          work: "module:function" that they call in place of `decoder.work`.

        Raises:
          DecoderError: they cannot be started.
        """
        self._decoding, self._work = decoding, work
        self._free: list[_Process] = []
        self._all: set[_Process] = set()
        self._change = threading.Condition()
        self._waiting, self._closed = 0, False
        try:
            for _ in range(decoding.processes):
                self._free.append(self._started())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def see(self, content: bytes, side: int) -> DecodedPhoto:
        """Returns a stranger's photo as `photos.decode_with_thumbnail`.

        Raises:
          BadPhotoError: it cannot be used; the message is a sentence.
          BusyError: too many wait.
          DecoderError: the processes are gone and cannot be started again.
        """
        head, found = self._ask({"kind": "see", "size": side, "max_megapixels": self._decoding.megapixels}, content)
        pixels = side * side * 3
        width, height, thumbnail = head.get("width"), head.get("height"), found[pixels:]
        # A process that a photo took over could answer anything; this is all that it can make others see.
        if not isinstance(width, int) or not isinstance(height, int) or not 0 < len(thumbnail) <= _MOST_THUMBNAIL:
            raise BadPhotoError(_NONSENSE)
        if not _is_jpeg(thumbnail):
            raise BadPhotoError(_NONSENSE)
        return DecodedPhoto(np.frombuffer(found, np.uint8, pixels).reshape(side, side, 3), thumbnail, width, height)

    def reduced(self, content: bytes, longest: int, *, max_megapixels: int) -> bytes:
        """Returns a photo as a JPEG as `photos.reduced`.

        Raises:
          BadPhotoError, BusyError, DecoderError: as `see`.
        """
        _, found = self._ask({"kind": "reduced", "size": longest, "max_megapixels": max_megapixels}, content)
        if not _is_jpeg(found):
            raise BadPhotoError(_NONSENSE)
        return found

    def close(self) -> None:
        """Ends all processes, also those at work, whose callers are told that the photo cannot be decoded."""
        with self._change:
            self._closed = True
            for process in self._all:
                process.kill()  # whoever waits for its answer hears that it is gone
            for process in self._free:
                process.end()
            self._change.notify_all()

    def _ask(self, wanted: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        process = self._taken()
        try:
            if not process.alive():
                process = self._replaced(process)
            head, found = process.ask(wanted, content, self._decoding.seconds)
            if head.get("memory"):
                process.end()
                raise BadPhotoError(f"Decoding the photo takes more than {self._decoding.memory_mib:,} MiB of memory.")
        except BadPhotoError:
            raise
        except TimeoutError:
            process.end()
            raise BadPhotoError(f"The photo was not decoded within {self._decoding.seconds:g} seconds.") from None
        except frames.BrokenError:
            process.end()
            raise BadPhotoError("The photo broke the program that decodes it, so it is damaged or crafted.") from None
        except BaseException:
            process.end()
            raise
        finally:
            self._give_back(process)
        if reason := head.get("reason"):
            raise BadPhotoError(_sentence(str(reason)[:300], wanted["max_megapixels"]))
        return head, found

    def _taken(self) -> "_Process":
        until = time.monotonic() + self._decoding.patience
        with self._change:
            if not self._free and self._waiting >= self._decoding.waiting:
                raise BusyError("Too many photos are waiting; try again in a moment.")
            self._waiting += 1
            try:
                while not self._free and not self._closed:
                    if not self._change.wait(until - time.monotonic()) and not self._free:
                        raise BusyError("Too many photos are waiting; try again in a moment.")
            finally:
                self._waiting -= 1
            if self._closed:
                raise BusyError("The server is stopping.")
            return self._free.pop()

    def _give_back(self, process: "_Process") -> None:
        with self._change:
            self._free.append(process)
            self._change.notify()

    def _replaced(self, old: "_Process") -> "_Process":
        with self._change:
            self._all.discard(old)
        old.end()
        return self._started()

    def _started(self) -> "_Process":
        process = _Process(self._decoding.memory_mib, self._work)
        with self._change:
            self._all.add(process)
            closed = self._closed
        if closed:
            process.end()
            raise BusyError("The server is stopping.")
        try:
            process.wait_until_ready()
        except DecoderError:
            with self._change:
                self._all.discard(process)
            raise
        return process


class _Process:
    """One process, and the wire to it."""

    def __init__(self, memory_mib: int, work: str) -> None:
        self._wire, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "cib_jax.web.decoder", str(theirs.fileno()), str(memory_mib)]
            try:
                self._process = subprocess.Popen(
                    command + [work] * bool(work),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=_environment(),
                )
            except OSError as error:
                self._wire.close()
                raise DecoderError(f"no process for decoding can be started: {error.strerror}") from None

    def wait_until_ready(self) -> None:
        try:
            frames.receive(self._wire, most=0, until=time.monotonic() + _STARTING)
        except (TimeoutError, frames.BrokenError):
            self.end()
            raise DecoderError("a process for decoding ended, or hung, before it was ready") from None

    def ask(self, wanted: dict[str, Any], content: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        until = time.monotonic() + seconds
        frames.send(self._wire, wanted, content, until=until)
        return frames.receive(self._wire, until=until)

    def alive(self) -> bool:
        return self._process.poll() is None and self._wire.fileno() >= 0

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Kills it; for whom alone it answers."""
        self.kill()
        self._wire.close()


def _environment() -> dict[str, str]:
    """Returns what a process needs to know: where Python's modules are, and no token of the server's."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _is_jpeg(content: bytes) -> bool:
    return content.startswith(b"\xff\xd8\xff")


def _sentence(reason: str, megapixels: int) -> str:
    """Returns why a photo cannot be used as a sentence for whoever sent it, who knows no config."""
    size, much, _ = reason.partition(f", more than data.max_megapixels={megapixels}")
    if much:
        return f"The photo has {size}, more than {megapixels} megapixels: make it smaller."
    return f"The photo cannot be used: {reason}."

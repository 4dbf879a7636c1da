"""A pool of processes that decode photos sent by clients, where a crafted photo can do little harm.

Server and process exchange messages of two lengths, a line of JSON and bytes. Nothing that a process sends is unpickled
or executed, so that a process which a photo has taken over cannot take over the server.
"""

import contextlib
import json
import os
import queue
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from cib_jax.data.photos import BadPhotoError, DecodedPhoto
from cib_jax.web.settings import Settings

WORKER = (sys.executable, "-P", "-m", "cib_jax.web.decode_worker")
"""Command of a decode process, to which the number of its socket and its memory limit are appended."""

_LENGTHS = struct.Struct("!II")
_MOST_HEAD = 1 << 16
_MOST_BYTES = 1 << 29
_MOST_THUMBNAIL = 1 << 20
_START_SECONDS = 60.0
_INVALID_REPLY = "The photo cannot be decoded; try another, or save it again as JPEG or PNG."


class DecoderError(Exception):
    """No decode process is available: one could not be started, or the pool is closed."""


class WireError(Exception):
    """The other side of a connection is gone, or what it sent is not a message."""


class DecodePool:
    """A fixed number of decode processes, shared by any number of threads. Close it, or use it in a `with`.

    A photo that crashes or delays its process, or exceeds its memory, is refused, and the process is replaced.
    """

    def __init__(self, settings: Settings, *, worker: Sequence[str] = WORKER) -> None:
        """Starts the processes.

        Args:
          settings: Limits of decoding.
          worker: Command of a process.

        Raises:
          DecoderError: A process cannot be started.
        """
        self._settings, self._worker = settings, worker
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._processes: set[_Process] = set()
        self._lock, self._closed = threading.Lock(), False
        try:
            for _ in range(settings.decode_processes):
                self._idle.put(self._start())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def see(self, content: bytes, side: int) -> DecodedPhoto:
        """Returns the result of `photos.decode_with_thumbnail` for the content of a file that a client sent.

        Raises:
          BadPhotoError: The photo cannot be used; the message is a sentence for the client.
          DecoderError: No process is available.
        """
        request = {"kind": "see", "size": side, "max_megapixels": self._settings.megapixels}
        head, result = self._ask(request, content)
        pixels = side * side * 3
        width, height, thumbnail = head.get("width"), head.get("height"), result[pixels:]
        # A process that a photo has taken over may send anything. After these checks, clients see at most a JPEG.
        if not isinstance(width, int) or not isinstance(height, int) or len(thumbnail) > _MOST_THUMBNAIL:
            raise BadPhotoError(_INVALID_REPLY)
        _validate_jpeg(thumbnail)
        return DecodedPhoto(np.frombuffer(result, np.uint8, pixels).reshape(side, side, 3), thumbnail, width, height)

    def reduced(self, content: bytes, longest: int, *, max_megapixels: int) -> bytes:
        """Returns the result of `photos.reduced`, a JPEG.

        Raises:
          BadPhotoError: The photo cannot be used; the message is a sentence for the client.
          DecoderError: No process is available.
        """
        request = {"kind": "reduced", "size": longest, "max_megapixels": max_megapixels}
        _, result = self._ask(request, content)
        _validate_jpeg(result)
        return result

    def close(self) -> None:
        """Ends all processes, also those that are decoding."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        # Only the sockets of idle processes are closed here; a thread may be reading from the others.
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for process in idle:
            process.end()
            self._idle.put(process)  # for threads that still ask: they find that the pool is closed

    def _ask(self, request: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        process = self._idle.get()
        try:
            if not process.alive():
                process.end()
                with self._lock:
                    self._processes.discard(process)
                process = self._start()
            head, result = process.ask(request, content, self._settings.decode_seconds)
            if head.get("out_of_memory"):
                process.end()
                memory = self._settings.decode_memory_mib
                raise BadPhotoError(f"Decoding the photo takes more than {memory:,} MiB of memory.")
        except BadPhotoError:
            raise
        except TimeoutError:
            process.end()
            seconds = self._settings.decode_seconds
            raise BadPhotoError(f"The photo was not decoded within {seconds:g} seconds.") from None
        except WireError:
            process.end()
            raise BadPhotoError("The photo crashed its decoder, so it is damaged or crafted.") from None
        except BaseException:
            process.end()
            raise
        finally:
            self._idle.put(process)
        if reason := head.get("reason"):
            raise BadPhotoError(_sentence(str(reason)[:300], bool(head.get("too_large")), request["max_megapixels"]))
        return head, result

    def _start(self) -> "_Process":
        process = _Process(self._worker, self._settings.decode_memory_mib)
        with self._lock:
            self._processes.add(process)
            closed = self._closed
        try:
            if closed:
                raise DecoderError("the pool of decode processes is closed")
            process.wait_until_ready()
        except DecoderError:
            process.end()
            with self._lock:
                self._processes.discard(process)
            raise
        return process


class _Process:
    """A decode process and the connection to it."""

    def __init__(self, worker: Sequence[str], memory_mib: int) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*worker, str(theirs.fileno()), str(memory_mib)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=_environment(),
                )
            except OSError as error:
                self._connection.close()
                raise DecoderError(f"a decode process cannot be started: {error.strerror}") from None

    def wait_until_ready(self) -> None:
        try:
            receive_message(self._connection, most=0, deadline=time.monotonic() + _START_SECONDS)
        except (TimeoutError, WireError):
            raise DecoderError("a decode process ended or hung before it was ready") from None

    def ask(self, request: dict[str, Any], content: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        deadline = time.monotonic() + seconds
        send_message(self._connection, request, content, deadline=deadline)
        return receive_message(self._connection, deadline=deadline)

    def alive(self) -> bool:
        return self._process.poll() is None and self._connection.fileno() >= 0

    def kill(self) -> None:
        """Kills the process. A thread that reads from it gets a WireError."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Kills the process and closes the connection, which no other thread may be using."""
        self.kill()
        self._connection.close()


def _environment() -> dict[str, str]:
    """Returns the environment of a decode process: the module path, and none of the server's secrets."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _validate_jpeg(content: bytes) -> None:
    if not content.startswith(b"\xff\xd8\xff"):
        raise BadPhotoError(_INVALID_REPLY)


def _sentence(reason: str, too_large: bool, megapixels: int) -> str:
    """Returns why a photo is refused, for a client who does not know this program's configuration."""
    if too_large:
        size = re.search(r"\d+ × \d+", reason)
        pixels = f"{size[0]} pixels, " if size else ""
        return f"The photo has {pixels}more than {megapixels} megapixels; make it smaller."
    return f"The photo cannot be used: {reason.rstrip('.')}."


def send_message(
    connection: socket.socket, head: dict[str, Any], content: bytes, *, deadline: float | None = None
) -> None:
    """Sends a message, until a deadline on the clock `time.monotonic` if there is one.

    Raises:
      TimeoutError: The message was not taken in time.
      WireError: The other side is gone.
    """
    line = json.dumps(head).encode()
    try:
        for part in (_LENGTHS.pack(len(line), len(content)) + line, content):
            connection.settimeout(_seconds_until(deadline))
            connection.sendall(part)
    except TimeoutError:
        raise
    except OSError as error:
        raise WireError(str(error)) from None


def receive_message(
    connection: socket.socket, *, most: int = _MOST_BYTES, deadline: float | None = None
) -> tuple[dict[str, Any], bytes]:
    """Returns the head and the content, of at most `most` bytes, of the next message.

    Raises:
      TimeoutError: The message did not arrive in time.
      WireError: The other side is gone, or what it sent is not a message.
    """
    head_size, content_size = _LENGTHS.unpack(_receive_exactly(connection, _LENGTHS.size, deadline))
    if head_size > _MOST_HEAD or content_size > most:
        raise WireError(f"a message of {head_size} and {content_size} bytes")
    try:
        head = json.loads(bytes(_receive_exactly(connection, head_size, deadline)))
    except (ValueError, RecursionError):
        raise WireError("the head is not JSON") from None
    if not isinstance(head, dict):
        raise WireError("the head is not an object")
    return head, bytes(_receive_exactly(connection, content_size, deadline))


def _receive_exactly(connection: socket.socket, count: int, deadline: float | None) -> bytearray:
    received = bytearray(count)
    view, done = memoryview(received), 0
    while done < count:
        try:
            connection.settimeout(_seconds_until(deadline))
            size = connection.recv_into(view[done:], min(count - done, 1 << 20))
        except TimeoutError:
            raise
        except OSError as error:
            raise WireError(str(error)) from None
        if not size:
            raise WireError("the connection was closed")
        done += size
    return received


def _seconds_until(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds

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

from cib_jax.data.photos import BadPhotoError, DecodedPhoto, MissingReaderError, TooLargeError, TruncatedPhotoError
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


class DecodePool:
    """A fixed number of decode processes, shared by any number of threads. Close it, or use it in a `with`.

    A photo that crashes or delays its process, or exceeds its memory, is refused, and the process is replaced. Both
    methods that decode raise BadPhotoError, with a sentence for the client, or DecoderError.
    """

    def __init__(self, settings: Settings, *, worker: Sequence[str] = WORKER) -> None:
        """Starts the processes by the command `worker`, or raises a DecoderError."""
        self._settings, self._closed = settings, threading.Event()
        self._processes = [_Process(worker, settings, self._closed) for _ in range(settings.decode_processes)]
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        try:
            for process in self._processes:
                process.start()
                self._idle.put(process)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, content: bytes, side: int) -> DecodedPhoto:
        """Returns the result of `photos.decode_with_thumbnail` for the content of a file that a client sent."""
        head, result = self._ask("decode", content, side, self._settings.megapixels)
        pixels = side * side * 3
        width, height, thumbnail = head.get("width"), head.get("height"), result[pixels:]
        # A process that a photo has taken over may send anything. After these checks, clients see at most a JPEG.
        if not isinstance(width, int) or not isinstance(height, int) or len(thumbnail) > _MOST_THUMBNAIL:
            raise BadPhotoError(_INVALID_REPLY)
        _validate_jpeg(thumbnail)
        return DecodedPhoto(np.frombuffer(result, np.uint8, pixels).reshape(side, side, 3), thumbnail, width, height)

    def reduced(self, content: bytes, longest: int, *, max_megapixels: int) -> bytes:
        """Returns the result of `photos.reduced`, a JPEG."""
        _, result = self._ask("reduced", content, longest, max_megapixels)
        _validate_jpeg(result)
        return result

    def close(self) -> None:
        """Ends all processes, also those that are decoding."""
        self._closed.set()
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

    def _ask(self, kind: str, content: bytes, size: int, megapixels: int) -> tuple[dict[str, Any], bytes]:
        process = self._idle.get()
        try:
            head, result = process.ask({"kind": kind, "size": size, "max_megapixels": megapixels}, content)
        finally:
            self._idle.put(process)
        if reason := str(head.get("reason") or "")[:300]:
            # The reasons of these three name fields and commands for whoever runs the server.
            if head.get("error") == TooLargeError.__name__:
                found = re.search(r"\d+ × \d+", reason)
                pixels = f"{found[0]} pixels, " if found else ""
                raise BadPhotoError(f"The photo has {pixels}more than {megapixels} megapixels; make it smaller.")
            if head.get("error") == TruncatedPhotoError.__name__:
                raise BadPhotoError("The photo is truncated; send it whole.")
            if head.get("error") == MissingReaderError.__name__:
                raise BadPhotoError("The photo is in a format that this server does not read; save it as JPEG or PNG.")
            raise BadPhotoError(f"The photo cannot be used: {reason.rstrip('.')}.")
        return head, result


def _validate_jpeg(content: bytes) -> None:
    if not content.startswith(b"\xff\xd8\xff"):
        raise BadPhotoError(_INVALID_REPLY)


class _Process:
    """A decode process, which can be started again, and the connection to it. One thread at a time may use it."""

    def __init__(self, worker: Sequence[str], settings: Settings, closed: threading.Event) -> None:
        self._worker, self._settings, self._closed = worker, settings, closed
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once the process is ready; raises a DecoderError if it cannot be started or the pool is closed."""
        self._connection, theirs = socket.socketpair()
        # The module path, and none of the server's secrets.
        kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*self._worker, str(theirs.fileno()), str(self._settings.decode_memory_mib)],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                )
            # After the process is there for `DecodePool.close` to kill: one of the two sees what the other has done.
            if self._closed.is_set():
                raise DecoderError("the pool of decode processes is closed")
            receive_message(self._connection, deadline=time.monotonic() + _START_SECONDS)
        except OSError as error:
            self.end()
            raise DecoderError(f"a decode process cannot be started: {error}") from None
        except BaseException:
            self.end()
            raise

    def ask(self, request: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        """Returns the reply to a request; if there is none, ends the process, which the next request starts again."""
        settings = self._settings
        if self._process is None or self._process.poll() is not None:
            self.end()
            self.start()
        deadline = time.monotonic() + settings.decode_seconds
        try:
            send_message(self._connection, request, content, deadline=deadline)
            head, result = receive_message(self._connection, deadline=deadline)
            if head.get("out_of_memory"):
                raise BadPhotoError(f"Decoding the photo takes more than {settings.decode_memory_mib:,} MiB of memory.")
            return head, result
        except BaseException as error:
            self.end()
            if isinstance(error, TimeoutError):
                raise BadPhotoError(f"The photo was not decoded within {settings.decode_seconds:g} seconds.") from None
            if isinstance(error, OSError):
                raise BadPhotoError("The photo crashed its decoder, so it is damaged or crafted.") from None
            raise

    def kill(self) -> None:
        """Kills the process. A thread that reads from it gets a ConnectionError."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def end(self) -> None:
        """Kills the process and closes the connection, which no other thread may be using."""
        self.kill()
        self._connection.close()


def send_message(
    connection: socket.socket, head: dict[str, Any], content: bytes, *, deadline: float | None = None
) -> None:
    """Sends a message, until a deadline on the clock `time.monotonic` if there is one.

    Raises:
      OSError: The other side is gone; a TimeoutError if the message was not taken in time.
    """
    line = json.dumps(head).encode()
    for part in (_LENGTHS.pack(len(line), len(content)) + line, content):
        _set_timeout(connection, deadline)
        connection.sendall(part)


def receive_message(connection: socket.socket, *, deadline: float | None = None) -> tuple[dict[str, Any], bytes]:
    """Returns the head and the content of the next message.

    Raises:
      OSError: The other side is gone, or what it sent is not a message; a TimeoutError if it did not arrive in time.
    """
    head_size, content_size = _LENGTHS.unpack(_receive_exactly(connection, _LENGTHS.size, deadline))
    if head_size > _MOST_HEAD or content_size > _MOST_BYTES:
        raise ConnectionError(f"a message of {head_size} and {content_size} bytes")
    try:
        head = json.loads(bytes(_receive_exactly(connection, head_size, deadline)))
    except (ValueError, RecursionError):
        raise ConnectionError("the head is not JSON") from None
    if not isinstance(head, dict):
        raise ConnectionError("the head is not an object")
    return head, bytes(_receive_exactly(connection, content_size, deadline))


def _receive_exactly(connection: socket.socket, count: int, deadline: float | None) -> bytearray:
    received = bytearray(count)
    view, done = memoryview(received), 0
    while done < count:
        _set_timeout(connection, deadline)
        size = connection.recv_into(view[done:], min(count - done, 1 << 20))
        if not size:
            raise ConnectionError("the connection was closed")
        done += size
    return received


def _set_timeout(connection: socket.socket, deadline: float | None) -> None:
    seconds = None if deadline is None else deadline - time.monotonic()
    if seconds is not None and seconds <= 0:
        raise TimeoutError("timed out")
    connection.settimeout(seconds)

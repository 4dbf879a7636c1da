"""A process with few privileges that decodes photos sent by clients, one after another.

`decode_pool` starts it as `python -m cib_jax.web.decode_worker DESCRIPTOR MEMORY_MIB`. It holds no secret, cannot start
a process or write a file, and ends rather than exceed its memory limit.
"""

import os
import pathlib
import resource
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any

import PIL.Image

from cib_jax.data import photos
from cib_jax.web.decode_pool import WireError, receive_message, send_message

Decode = Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]
"""Function of a request and the content of a photo file that returns a reply and its bytes."""

_MIB = 1 << 20
_FILES = 32  # the files that are open already, and some for Pillow's readers


def decode(request: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns the result of `photos.decode_with_thumbnail` or `photos.reduced`.

    Raises:
      BadPhotoError: The photo cannot be used.
    """
    megapixels = request["max_megapixels"]
    if request["kind"] == "reduced":
        return {}, photos.reduced(content, request["size"], max_megapixels=megapixels)
    seen = photos.decode_with_thumbnail(content, request["size"], max_megapixels=megapixels)
    return {"width": seen.width, "height": seen.height}, seen.square.tobytes() + seen.thumbnail


def main(descriptor: int, memory_mib: int, decode: Decode = decode) -> None:
    """Answers requests until the server closes the connection or memory runs out.

    Args:
      descriptor: Socket to the server.
      memory_mib: Memory that decoding may take.
      decode: Function that answers a request.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal signals the whole group, but the server ends this process
    warnings.simplefilter("ignore")
    PIL.Image.init()  # imports all readers now, while files can still be opened
    _drop_privileges(memory_mib)
    with socket.socket(fileno=descriptor) as connection:
        send_message(connection, {"ready": os.getpid()}, b"")
        while True:
            try:
                request, content = receive_message(connection)
            except WireError:
                return
            try:
                head, result = decode(request, content)
            except (photos.BadPhotoError, MemoryError) as error:
                if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
                    send_message(connection, {"out_of_memory": True}, b"")
                    return
                too_large = isinstance(error, photos.TooLargeError)
                head, result = {"reason": str(error)[:1000], "too_large": too_large}, b""
            send_message(connection, head, result)


def _drop_privileges(memory_mib: int) -> None:
    """Limits memory, open files, subprocesses and core dumps of this process."""
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        present = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, present + memory_mib * _MIB)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, _FILES)
    if hasattr(resource, "RLIMIT_NPROC"):
        _limit(resource.RLIMIT_NPROC, 0)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

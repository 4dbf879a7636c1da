"""A process with few privileges that decodes photos sent by clients, one after another.

`decode_pool` starts it as `python -m cib_jax.web.decode_worker DESCRIPTOR MEMORY_MIB`. It holds no secret, cannot start
a process (unless HEIC is read, which takes a thread) or write a file, and ends rather than exceed its memory limit.
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

from cib_jax.data import photos
from cib_jax.web.decode_pool import receive_message, send_message


def decode(request: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns the reply to a request, and the result of `photos.decode_with_thumbnail` or `photos.reduced` as bytes."""
    megapixels = request["max_megapixels"]
    if request["kind"] == "reduced":
        return {}, photos.reduced(content, request["size"], max_megapixels=megapixels)
    photo = photos.decode_with_thumbnail(content, request["size"], max_megapixels=megapixels)
    return {"width": photo.width, "height": photo.height}, photo.square.tobytes() + photo.thumbnail


def main(
    descriptor: int,
    memory_mib: int,
    decode: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]] = decode,
) -> None:
    """Answers requests at a socket until the server closes it or decoding takes more than `memory_mib`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal signals the whole group, but the server ends this process
    warnings.simplefilter("ignore")
    photos.load_readers(threads=0)  # now, while files can still be opened
    _drop_privileges(memory_mib)
    with socket.socket(fileno=descriptor) as connection:
        send_message(connection, {"ready": os.getpid()}, b"")
        while True:
            try:
                request, content = receive_message(connection)
            except OSError:
                return
            try:
                head, result = decode(request, content)
            except (photos.BadPhotoError, MemoryError) as error:
                if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
                    send_message(connection, {"out_of_memory": True}, b"")
                    return
                head, result = {"reason": str(error)[:1000], "error": type(error).__name__}, b""
            send_message(connection, head, result)


def _drop_privileges(memory_mib: int) -> None:
    """Limits memory, open files, subprocesses and core dumps of this process."""
    # 32 files: those that are open already, and some for Pillow's readers.
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: 32}
    # To the system, threads are processes, and HEIC's decoder always starts one.
    if hasattr(resource, "RLIMIT_NPROC") and not photos.heif_version():
        limits[resource.RLIMIT_NPROC] = 0
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        present = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = present + (memory_mib << 20)
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (lowest, lowest))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

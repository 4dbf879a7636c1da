"""A process that decodes photos of strangers, one after another, with little left that it may do.

`python -m cib_jax.web.decoder DESCRIPTOR MEMORY_MIB [MODULE:FUNCTION]`, started by `decoding`. It holds no secret,
starts no process, writes no file, and ends rather than take more memory than it may.
"""

import importlib
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
from cib_jax.web import frames

Work = Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]
"""Of what is wanted and a photo's bytes: what was found, and bytes."""

_MIB = 1 << 20
_FILES = 32  # those open by now, and some that Pillow's readers may open


def work(wanted: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns a photo as `photos.decode_with_thumbnail` or `photos.reduced` gives it.

    Raises:
      BadPhotoError: it cannot be used.
    """
    megapixels = wanted["max_megapixels"]
    if wanted["kind"] == "reduced":
        return {}, photos.reduced(content, wanted["size"], max_megapixels=megapixels)
    seen = photos.decode_with_thumbnail(content, wanted["size"], max_megapixels=megapixels)
    return {"width": seen.width, "height": seen.height}, seen.square.tobytes() + seen.thumbnail


def limit(memory_mib: int) -> None:
    """Takes from this process what decoding needs not: memory without end, files, other processes, a core on disk."""
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        had = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        _at_most(resource.RLIMIT_AS, had + memory_mib * _MIB)
    _at_most(resource.RLIMIT_CORE, 0)
    _at_most(resource.RLIMIT_FSIZE, 0)
    _at_most(resource.RLIMIT_NOFILE, _FILES)
    if hasattr(resource, "RLIMIT_NPROC"):
        _at_most(resource.RLIMIT_NPROC, 0)


def _at_most(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def main(descriptor: int, memory_mib: int, function: Work = work) -> None:
    """Answers until the other side is gone, or memory was too little."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)  # of a terminal, they go to the whole group: the server ends this process
    warnings.simplefilter("ignore")
    PIL.Image.init()  # all readers now: later, they would be looked for on disk
    limit(memory_mib)
    with socket.socket(fileno=descriptor) as connection:
        frames.send(connection, {"ready": os.getpid()}, b"")
        while True:
            try:
                wanted, content = frames.receive(connection)
            except frames.BrokenError:
                return
            try:
                head, found = function(wanted, content)
            except photos.BadPhotoError as error:
                if isinstance(error.__cause__, MemoryError):
                    frames.send(connection, {"memory": True}, b"")
                    return
                head, found = {"reason": str(error)[:1000]}, b""
            except MemoryError:
                frames.send(connection, {"memory": True}, b"")
                return
            frames.send(connection, head, found)


if __name__ == "__main__":
    chosen = work
    if len(sys.argv) > 3:
        module, name = sys.argv[3].split(":")
        chosen = getattr(importlib.import_module(module), name)
    main(int(sys.argv[1]), int(sys.argv[2]), chosen)

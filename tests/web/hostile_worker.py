"""A decode process that does what a photo's first word says, as if the photo had taken it over."""

import os
import pathlib
import signal
import sys
import time

import numpy as np

from cib_jax.data.photos import MissingReaderError
from cib_jax.web import decode_worker


def by_content(request: dict, content: bytes) -> tuple[dict, bytes]:
    word, *rest = content[:1000].split() or [b""]
    square = bytes(16 * 16 * 3)
    if word == b"hang":
        if rest:
            open(rest[0], "x").close()
        time.sleep(60)
    if word == b"slow":
        while not os.path.exists(rest[0]):
            time.sleep(0.01)
        return {"reason": "slow"}, b""
    if word == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == b"memory":
        np.ones(3 << 27)  # 3 GiB
    if word == b"exit":
        os._exit(0)
    if word == b"file":
        with open(rest[0], "wb") as file:
            file.write(b"0" * 100)
    if word == b"files":
        for _ in range(100):
            os.open("/dev/null", os.O_RDONLY)
        return {"reason": "opened"}, b""
    if word == b"width":
        return {"width": "wide", "height": 2}, square + b"\xff\xd8\xff"
    if word == b"script":
        return {"width": 1, "height": 2}, square + b"<script>"
    if word == b"short":
        return {"width": 1, "height": 2}, b"\xff\xd8\xff"
    if word == b"nested":  # deeper than Python's JSON parser can read
        os.write(int(sys.argv[-2]), b"\0\0\xff\xf0\0\0\0\0" + b"[" * 0xFFF0)
        time.sleep(60)
    if word == b"reader":
        raise MissingReaderError("a HEIC photo; pip install -e '/srv/app[heic]'")
    if word == b"environment":
        return {"reason": " ".join(sorted(os.environ))}, b""
    return decode_worker.decode(request, content)


if __name__ == "__main__":
    if len(sys.argv) > 3 and pathlib.Path(sys.argv[1]).exists():
        sys.exit("the file exists")
    decode_worker.main(int(sys.argv[-2]), int(sys.argv[-1]), by_content)

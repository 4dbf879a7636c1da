"""Searches of a server by well-behaved clients, beside attacks on it.

`python -m benchmarks.attacks`. An index of crops of the two photos in scikit-learn, by a small network of random
weights, is served by `--mode=serve` with its default limits. Each client has an address of its own and searches about
once a second, in turn with a photo and by id. The attacks come one after another, from a separate process, which
connects again whenever it is refused. Server, clients and attack share the cores.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

import numpy as np

from benchmarks import measuring
from benchmarks.serving import crops, resources

ROOT = pathlib.Path(__file__).parents[1]
BOUNDARY = b"boundary"
PROXY = "127.0.2.1"
"""Address of the one trusted proxy."""
NONE, MISSING = "none", "index gone for 2 s of 4"


def make_index(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Creates an index of `count` photos and returns its folder."""
    import jax

    import cib_jax as cib
    from cib_jax.commands.index import index
    from configs import default

    (folder / "photos").mkdir()
    for number, content in enumerate(crops(count, 480, 320, 0)):
        (folder / "photos" / f"{number}.jpg").write_bytes(content)
    made = cib.create_encoder(jax.random.key(0), backbone="convnet", bits=64, image_size=32)
    cib.Hasher(*made).save(folder / "hasher")
    index(folder / "index", folder / "photos", workdir=folder / "hasher", config=default.get_config())
    return folder / "index"


# Clients.


class Answer(NamedTuple):
    """An answer to a client; status 0 for a connection that broke."""

    status: int
    seconds: float


@contextlib.asynccontextmanager
async def connected(port: int, address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yields a connection from a loopback address."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def receive(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Returns the status and the body of the next answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return int(head.split(b" ", 2)[1]), await reader.readexactly(int(length[1]) if length else 0)


def request(path: str, body: bytes = b"", headers: str = "") -> bytes:
    """Returns a request, POST if it has a body."""
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    method = "POST" if body else "GET"
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{length}{headers}\r\n".encode() + body


class Client:
    """A client that searches about once a second until it is stopped; it connects again if its connection breaks."""

    def __init__(self, port: int, number: int, photos: list[bytes], ids: list[str]) -> None:
        self._port, self._photos, self._ids = port, photos, ids
        self._address, self._random = f"127.0.1.{number + 1}", random.Random(number)
        self.stopped, self.answers = False, list[Answer]()

    async def run(self) -> None:
        """Searches, in turn by id and with a photo."""
        await asyncio.sleep(self._random.random())
        while not self.stopped:
            begun = time.perf_counter()
            try:
                async with connected(self._port, self._address) as (reader, writer):
                    while not self.stopped:
                        body = self._random.choice(self._photos) if len(self.answers) % 2 else b""
                        id = "" if body else f"&id={self._random.choice(self._ids)}"
                        begun = time.perf_counter()
                        writer.write(request(f"/search?k=20{id}", body))
                        status, _ = await receive(reader)
                        self.answers.append(Answer(status, time.perf_counter() - begun))
                        await asyncio.sleep(self._random.uniform(0.5, 1.5))
            except (OSError, asyncio.IncompleteReadError):
                self.answers.append(Answer(0, time.perf_counter() - begun))
                await asyncio.sleep(1)


# Attacks. Each is a function of a port and the number of a connection; it is called again when it returns.


async def tiny_chunks(port: int, number: int) -> None:
    """Sends a body in chunks of one byte."""
    async with connected(port, "127.0.2.2") as (_, writer):
        writer.write(b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1\r\na\r\n" * 10_000)
            await writer.drain()


FORM = (b'--%s\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' % BOUNDARY) * 330_000


async def tiny_parts(port: int, number: int) -> None:
    """Sends a form of 20 MB in parts without content."""
    async with connected(port, "127.0.2.2") as (reader, writer):
        kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY.decode()}\r\n"
        writer.write(request("/search", FORM[:20_000_000], kind))
        await receive(reader)


async def slow_bodies(port: int, number: int) -> None:
    """Sends a body of 20 MB by a byte a second, from one of two addresses."""
    async with connected(port, f"127.0.2.{2 + number % 2}") as (_, writer):
        writer.write(request("/search", headers="Content-Length: 20000000\r\n").replace(b"GET", b"POST", 1))
        while True:
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(1)


async def foreign_names(port: int, number: int) -> None:
    """Requests the page under a foreign name, as a trusted proxy that passes on what clients send."""
    name = ("X-Forwarded-Host", "X-Gradio-Server")[number % 2]
    headers = f"X-Forwarded-For: 198.51.100.{number}\r\n{name}: evil.example\r\n"
    async with connected(port, PROXY) as (reader, writer):
        writer.write(request("/", headers=headers))
        status, _ = await receive(reader)
        assert status != 200


# 16,383 × 16,383 pixels, in a lossless WebP of 34 bytes.
WEBP = b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + (16_382 | 16_382 << 14).to_bytes(4, "little") + bytes(9)


async def large_webp(port: int, number: int) -> None:
    """Sends a WebP of 34 bytes that declares 268 megapixels."""
    async with connected(port, f"127.0.2.{2 + number}") as (reader, writer):
        writer.write(request("/search", WEBP))
        status, _ = await receive(reader)
        assert status != 200


ATTACKS: dict[str, tuple[Callable[[int, int], Awaitable[None]], int]] = {
    "chunks of one byte": (tiny_chunks, 64),
    "forms of tiny parts, 20 MB": (tiny_parts, 2),
    "slow bodies, 2 addresses": (slow_bodies, 128),
    "foreign names by a proxy": (foreign_names, 8),
    "WebP of 34 bytes": (large_webp, 8),
}
"""Functions and numbers of connections."""


async def attack(port: int, name: str) -> None:
    """Attacks until the process ends."""
    once, connections = ATTACKS[name]

    async def again(number: int) -> None:
        while True:
            try:
                await once(port, number)
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.01)  # refused

    await asyncio.gather(*map(again, range(connections)))


async def come_and_go(port: int, index: pathlib.Path) -> None:
    """Moves an index away and back until it is canceled; searches go on from memory as far as they can."""
    away = index.with_name("away")
    try:
        while True:
            for source, target, expected in ((index, away, 503), (away, index, 200)):
                source.rename(target)
                await asyncio.sleep(2)
                async with connected(port, "127.0.2.2") as (reader, writer):
                    writer.write(request("/health"))
                    status, _ = await receive(reader)
                    assert status == expected, status
    finally:
        if away.exists():
            away.rename(index)


# Measurement.


async def measure(name: str, count: int, seconds: float, *, pid: int, port: int, index: pathlib.Path) -> list[str]:
    """Returns the row of an attack."""
    photos = list(crops(40, 480, 320, 1))
    async with connected(port, "127.0.0.1") as (reader, writer):
        writer.write(request("/search?k=1000"))
        ids = [result["id"] for result in json.loads((await receive(reader))[1])["results"]]
    clients, most, begun = [Client(port, number, photos, ids) for number in range(count)], 0.0, time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.attacks", "--attack", name, "--port", str(port)]
    attacker = subprocess.Popen(command, cwd=ROOT) if name in ATTACKS else None
    mover = asyncio.create_task(come_and_go(port, index)) if name == MISSING else None
    tasks = [asyncio.create_task(client.run()) for client in clients]
    try:
        while time.perf_counter() < begun + seconds:
            await asyncio.sleep(0.5)
            used = resources(pid)
            most = max(most, used.megabytes + used.decoders)
        for client in clients:
            client.stopped = True
        await asyncio.gather(*tasks)
        assert attacker is None or attacker.poll() is None, "the attack has ended"
        assert mover is None or not mover.done(), mover
    finally:
        if attacker is not None:
            attacker.kill()
            attacker.wait()
        if mover is not None:
            mover.cancel()
            await asyncio.wait([mover])
    return row(name, count, [answer for client in clients for answer in client.answers], most)


def row(name: str, clients: int, answers: list[Answer], megabytes: float) -> list[str]:
    """Returns the cells of a row."""
    milliseconds = np.array([1000 * answer.seconds for answer in answers])
    median, most = np.percentile(milliseconds, (50, 99))
    cells = [median, most, milliseconds.max(), sum(answer.status != 200 for answer in answers), megabytes]
    return [name, str(clients), f"{len(answers):,}", *(f"{cell:,.0f}" for cell in cells), f"{os.getloadavg()[0]:.1f}"]


def main() -> None:
    """Reads the flags and prints the table."""
    parser = measuring.parser("Searches beside attacks.", "gradio", "lancedb", "faiss")
    parser.add_argument("--clients", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--attacks", nargs="+", default=[NONE, *ATTACKS, MISSING])
    parser.add_argument("--seconds", type=float, default=15, help="seconds of each row")
    parser.add_argument("--photos", type=int, default=300, help="photos in the index")
    parser.add_argument("--attack", default="", help=argparse.SUPPRESS)  # the process of an attack
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.attack:
        asyncio.run(attack(flags.port, flags.attack))
    print(measuring.machine("jax", "gradio", "uvicorn", "python-multipart", "pillow"))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        index = make_index(folder, flags.photos)
        command = [sys.executable, "run.py", "--mode=serve", f"--index={index}", "--port=0", f"--proxies={PROXY}"]
        with (folder / "log").open("w+") as log:
            server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            try:
                while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/", (folder / "log").read_text())):
                    assert server.poll() is None, (folder / "log").read_text()
                    time.sleep(0.2)
                for clients, attacked in itertools.product(flags.clients, flags.attacks):
                    one = measure(attacked, clients, flags.seconds, pid=server.pid, port=int(found[1]), index=index)
                    rows.append(asyncio.run(one))
                    time.sleep(2)
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait(30)
                lines = (folder / "log").read_text().splitlines()
    header = ["attack", "clients", "searches", "median, ms", "99 %, ms", "slowest, ms", "errors", "MiB", "load"]
    measuring.print_table(header, rows)
    print(f"exit code of the server {server.returncode}; the last of its {len(lines)} lines: {lines[-1]}")


if __name__ == "__main__":
    main()

"""Load of a search server by many clients, which send photos, search by id and load images.

`python -m benchmarks.serving --seconds 60 --clients 50`. Without `--index`, an index is made of crops of the two photos
in scikit-learn, by a pretrained EfficientNet-Lite0 with a hash head of random weights, which takes the same time as a
trained one. The server runs in a separate process with its default limits, except for the rate limits, since all
clients have one address.
"""

import argparse
import http.client
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks import measuring

BITS = 64
POST, BY_ID, THUMBNAIL, IMAGE = "photo sent", "by id", "thumbnail", "whole photo"
# Requests of one turn of a client: it sends a photo, looks at images, and searches by one of the results.
TURN = (POST, THUMBNAIL, THUMBNAIL, THUMBNAIL, THUMBNAIL, IMAGE, BY_ID, THUMBNAIL, THUMBNAIL, THUMBNAIL)


class Resources(NamedTuple):
    """Resources of the server and its processes."""

    megabytes: float
    """Resident memory of the server, in MiB."""
    decoders: float
    """Resident memory of all decoding processes, in MiB."""
    files: int
    threads: int


def crops(count: int, width: int, height: int, seed: int) -> Iterator[bytes]:
    """Yields JPEGs of different parts and scales of real photos."""
    import io

    import PIL.Image
    import sklearn.datasets

    originals = [PIL.Image.fromarray(image) for image in sklearn.datasets.load_sample_images().images]
    generator = random.Random(seed)
    for number in range(count):
        original = originals[number % len(originals)]
        part = generator.uniform(0.3, 1.0)
        x, y = (generator.uniform(0, (1 - part) * side) for side in original.size)
        box = (x, y, x + part * original.width, y + part * original.height)
        file = io.BytesIO()
        original.resize((width, height), box=box).save(file, "JPEG", quality=88)
        yield file.getvalue()


def make_index(folder: pathlib.Path, count: int) -> str:
    """Creates an index of `count` photos and returns its folder."""
    import jax

    import cib_jax as cib
    from cib_jax.commands.index import index
    from configs import default

    (folder / "photos").mkdir()
    for number, content in enumerate(crops(count, 1200, 800, 0)):
        (folder / "photos" / f"{number}.jpg").write_bytes(content)
    weights = cib.load_pretrained("efficientnet_lite0")
    made = cib.create_encoder(
        jax.random.key(0), backbone="efficientnet_lite0", bits=BITS, image_size=128, backbone_params=weights
    )
    cib.Hasher(*made).save(folder / "hasher")
    index(folder / "index", folder / "photos", workdir=folder / "hasher", config=default.get_config())
    return str(folder / "index")


def serve(uri: str, at_once: int) -> None:
    """Serves an index in this process without rate limits."""
    from cib_jax.storage.collection import Collection
    from cib_jax.web import server
    from cib_jax.web.settings import Settings

    settings = Settings(searches=10**9, images=10**9, others=10**9, at_once=at_once, bodies_each=at_once)
    server.serve(Collection.open(uri), port=0, settings=settings, print_line=lambda line: print(line, flush=True))


class Client(threading.Thread):
    """One client that repeats its turn until `stop` is set."""

    def __init__(self, port: int, number: int, photos: list[bytes], ids: list[str], stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._port, self._photos, self._ids, self._stop_it = port, photos, ids, stop
        self._random = random.Random(number)
        self.seconds: dict[str, list[float]] = {kind: [] for kind in TURN}
        self.errors: list[str] = []

    def run(self) -> None:
        """Sends one request after another over one connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        while not self._stop_it.is_set():
            for kind in TURN:
                if self._stop_it.is_set():
                    break
                self._request(connection, kind)
        connection.close()

    def _request(self, connection: http.client.HTTPConnection, kind: str) -> None:
        id = self._random.choice(self._ids)
        photo = self._random.choice(self._photos) if kind == POST else None
        path = {POST: "/search?k=20", BY_ID: f"/search?id={id}&k=20", THUMBNAIL: f"/thumbnail/{id}"}
        begun = time.perf_counter()
        try:
            connection.request("POST" if photo else "GET", path.get(kind, f"/image/{id}"), photo)
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                self.errors.append(f"{kind}: {response.status} {content[:100]!r}")
            elif photo and len(json.loads(content)["results"]) != 20:
                self.errors.append(f"{kind}: {len(json.loads(content)['results'])} results")
        except (OSError, http.client.HTTPException) as error:
            self.errors.append(f"{kind}: {type(error).__name__}: {error}")
            connection.close()
        self.seconds[kind].append(time.perf_counter() - begun)


def resources(pid: int) -> Resources:
    """Returns the present resources of a server."""
    processes = [pid, *map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    megabytes = []
    for one in processes:
        status = pathlib.Path(f"/proc/{one}/status").read_text(encoding="utf-8")
        megabytes.append(int(status.partition("VmRSS:")[2].split()[0]) / 1024)
    files, threads = (len(os.listdir(f"/proc/{pid}/{what}")) for what in ("fd", "task"))
    return Resources(megabytes[0], sum(megabytes[1:]), files, threads)


def ids_of(port: int) -> list[str]:
    """Returns the ids of up to 1,000 photos."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/search?k=1000")
    return [result["id"] for result in json.loads(connection.getresponse().read())["results"]]


def measure(pid: int, port: int, flags: argparse.Namespace) -> tuple[list[Client], list[tuple[str, Resources]], float]:
    """Runs the clients; returns them, the server's resources at several times, and the elapsed seconds."""
    width, height = (int(side) for side in flags.size.split("x"))
    photos = list(crops(40, width, height, 1))
    print(f"photos in requests: {width} × {height}, {np.mean([len(photo) for photo in photos]) / 1000:.0f} kB each\n")
    stop, ids, samples = threading.Event(), ids_of(port), [("before", resources(pid))]
    clients = [Client(port, number, photos, ids, stop) for number in range(flags.clients)]
    begun = time.perf_counter()
    for client in clients:
        client.start()
    for part in range(1, 6):
        time.sleep(max(0.0, begun + flags.seconds * part / 6 - time.perf_counter()))
        samples.append((f"after {flags.seconds * part / 6:.0f} s", resources(pid)))
    time.sleep(max(0.0, begun + flags.seconds - time.perf_counter()))
    stop.set()
    for client in clients:
        client.join()
    taken = time.perf_counter() - begun
    time.sleep(2)
    samples.append(("2 s after the end", resources(pid)))
    return clients, samples, taken


def row(kind: str, clients: list[Client], taken: float) -> list[Any]:
    """Returns the row for one kind of request in the table of times."""
    seconds = np.array([second for client in clients for second in client.seconds[kind]])
    times = [*np.percentile(seconds, (50, 90, 99)), seconds.max()] if len(seconds) else [0.0] * 4
    return [kind, f"{len(seconds):,}", f"{len(seconds) / taken:.1f}", *(f"{time * 1000:,.0f}" for time in times)]


def main() -> None:
    """Reads the flags and prints the tables."""
    parser = measuring.parser("Load of a search server by many clients.", "gradio", "lancedb", "faiss")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--index", default="", help="folder of an index; if left out, one is made")
    parser.add_argument("--photos", type=int, default=500, help="photos in the index that is made")
    parser.add_argument("--size", default="1200x800", help="size of the photos in requests, in pixels")
    parser.add_argument("--serve", action="store_true", help="run as the server (used internally)")
    flags = parser.parse_args()
    at_once = max(100, 2 * flags.clients)
    if flags.serve:
        serve(flags.index, at_once)
        return
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{measuring.machine('jax', 'gradio', 'uvicorn', 'pillow')}; load before: {load}")
    with tempfile.TemporaryDirectory() as folder:
        uri = flags.index or make_index(pathlib.Path(folder), flags.photos)
        command = [
            sys.executable,
            "-m",
            "benchmarks.serving",
            "--serve",
            "--index",
            uri,
            "--clients",
            str(flags.clients),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first_line = process.stdout.readline()
        print(first_line.strip())
        try:
            clients, samples, taken = measure(process.pid, int(first_line.rpartition(":")[2].partition("/")[0]), flags)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    header = ["request", "count", "per second", "median, ms", "90 %, ms", "99 %, ms", "slowest, ms"]
    measuring.print_table(header, [row(kind, clients, taken) for kind in dict.fromkeys(TURN)])
    rows = [[when, f"{h.megabytes:,.0f}", f"{h.decoders:,.0f}", h.files, h.threads] for when, h in samples]
    measuring.print_table(["when", "server, MiB", "decoders, MiB", "open files", "threads"], rows)
    errors = [error for client in clients for error in client.errors]
    print(f"{flags.clients} clients, {taken:.0f} s, {len(errors)} errors; exit code of the server {process.returncode}")
    for error in errors[:10]:
        print(f"  {error}")


if __name__ == "__main__":
    main()

"""The server as a process: where it listens, what it says, how it ends."""

import http.client
import importlib.util
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from cib_jax import web
from cib_jax.web import server
from cib_jax.web.clients import ProxyError
from cib_jax.web.limits import Limits
from cib_jax.web.server import BindError
from tests.web import fake

PROGRAM = """
import pathlib, sys
from cib_jax.web import server
from tests.web.fake import FakeCollection
server.serve(FakeCollection(pathlib.Path(sys.argv[1])), port=0, tell=lambda line: print(line, flush=True))
print("ended", flush=True)
"""


@pytest.fixture
def started(photos):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(photos)], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    line = process.stdout.readline()
    yield process, line
    process.kill()
    process.wait()


def children(pid: int) -> list[int]:
    found = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in found]


def gone(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_its_processes(started, how):
    process, line = started
    assert line.startswith("20 photos at http://127.0.0.1:")
    port = int(line.rpartition(":")[2].partition("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"status": "ok", "photos": 20, "bits": 64}'
    waiting = socket.create_connection(("127.0.0.1", port))
    waiting.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx")
    decoders = [pid for pid in children(process.pid) if b"cib_jax.web.decoder" in command(pid)]
    assert len(decoders) == 2
    process.send_signal(how)
    assert process.wait(timeout=30) == 0
    assert process.stdout.read() == "ended\n"
    assert process.stderr.read() == ""
    assert all(gone(pid) for pid in decoders)


def command(pid: int) -> bytes:
    return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()


def test_killed_it_leaves_no_process(started):
    process, _ = started
    decoders = children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while not all(gone(pid) for pid in decoders) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(gone(pid) for pid in decoders)


def test_where_it_cannot_listen_is_told_in_a_sentence(photos):
    collection = fake.FakeCollection(photos)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BindError, match=f"^--port: {port} is in use by another program; give another port"):
            server.serve(collection, port=port)
    with pytest.raises(BindError, match=r"^--host: '192\.0\.2\.1' is no address of this machine"):
        server.serve(collection, host="192.0.2.1", port=0)
    for port in (-1, 65_536):
        with pytest.raises(BindError, match=f"^--port: {port} is none; give one from 1 to 65535"):
            server.serve(collection, port=port)
    with pytest.raises(BindError, match=r"^--host: 'a\.\.b' is not known"):
        server.serve(collection, host="a..b", port=0)
    with pytest.raises(ProxyError):
        server.serve(collection, port=0, limits=Limits(proxies=("x",)))


@pytest.mark.parametrize(("host", "name", "loopback"), [("127.0.0.1", "127.0.0.1", True), ("::1", "[::1]", True),
                                                        ("0.0.0.0", None, False)])  # fmt: skip
def test_it_says_where_it_is_and_what_that_means(photos, host, name, loopback):
    try:
        with server.listening(host, 0) as listener:
            assert server._is_loopback(listener) == loopback
            lines = server.told(listener, fake.FakeCollection(photos), loopback=loopback)
            port = listener.getsockname()[1]
            told = re.fullmatch(rf"20 photos at http://(.+):{port}/ ; Ctrl-C ends\.", lines[0])[1]
            assert name in (told, None)
            socket.create_connection((told.strip("[]"), port), timeout=5).close()  # one that leads here
    except BindError:
        pytest.skip("this machine has no IPv6")
    assert len(lines) == 1 + (not loopback)
    if not loopback:
        assert "reverse proxy with TLS" in lines[1]


def test_what_is_not_installed_is_named(monkeypatch):
    web.check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else name)
    with pytest.raises(web.WebError, match=r"the package gradio is not installed; pip install 'cib-jax\[web\]'"):
        web.check_installed()

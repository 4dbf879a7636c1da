"""The server: where it listens, what a connection may do, how it ends, and how its collection is renewed."""

import contextlib
import dataclasses
import gc
import http.client
import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading

import pytest
from starlette.responses import StreamingResponse

from cib_jax import web
from cib_jax.errors import UserError, WebError
from cib_jax.web import server
from tests.web import fake
from tests.web.conftest import raw, status_of, until

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"

# Connections


def test_a_connection_without_a_whole_request_is_closed(running, collection, few):
    with running(collection, dataclasses.replace(few, head_seconds=0.5)) as served:
        assert raw(served) == b""
        assert raw(served, *[b"G"] * 30, wait=0.05) == b""
        answer = raw(served, GET, *[b"G"] * 60, wait=0.05)  # also after an answer
        assert status_of(answer) == 200
        answer = raw(served, GET * 2, b"GET / HT")  # also after two requests that arrived together
        assert answer.count(b'{"status":') == 2


def test_what_is_not_http_is_refused(served):
    huge = b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 100_000
    assert status_of(raw(served, huge)) in (400, 431)
    assert status_of(raw(served, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n")) == 400


def test_the_connections_of_a_client_are_bounded(running, collection, few):
    with running(collection, dataclasses.replace(few, at_once=5)) as served:
        idle = [served.socket() for _ in range(5)]
        until(lambda: len(served.server.server_state.connections) == 5)
        assert raw(served, GET) == b""
        for connection in idle:
            connection.close()
        until(lambda: not served.server.server_state.connections)
        assert served.ask("/health")[0] == 200


def test_the_connections_that_a_client_makes_in_a_second_are_bounded(running, collection, few):
    with running(collection, dataclasses.replace(few, at_once=2, others=60)) as served:
        last = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        until(lambda: raw(served, last) == b"")
        until(lambda: raw(served, last) != b"")


def test_a_client_that_does_not_read_its_answer_is_disconnected(running, collection, few):
    size = 20_000_000

    def page(app, collection):
        app.add_route("/config", lambda request: StreamingResponse(bytes(size // 20) for _ in range(20)))

    with running(collection, dataclasses.replace(few, taking_seconds=0.3), page=page) as served:
        with served.socket() as connection:
            connection.sendall(b"GET /config HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until(lambda: served.server.server_state.connections)
            until(lambda: not served.server.server_state.connections)
            received = 0
            try:
                while more := connection.recv(1 << 20):
                    received += len(more)
            except ConnectionResetError:
                pass
        assert received < size
        assert len(served.ask("/config")[2]) == size  # a client that reads gets it all


def bad_request(number: int, generator: random.Random) -> tuple[str, str, bytes | None, dict[str, str]]:
    noise = "".join(generator.choices("abc/.%:;?&=", k=20))
    return [
        ("GET", "/" + noise.replace("%", "%25"), None, {}),
        ("GET", "/thumbnail/%2e%2e%2f" + str(number), None, {}),
        ("POST", "/search", generator.randbytes(200), {}),
        ("POST", "/search", b"\x89PNG\r\n\x1a\n" + generator.randbytes(100), {"Content-Type": "image/png"}),
        ("POST", "/search", b"--x\r\n" + generator.randbytes(50), {"Content-Type": "multipart/form-data; boundary=x"}),
        ("GET", f"/search?k={noise.replace('%', '').replace('&', '')}", None, {}),
        ("PUT", "/gradio_api/upload", b"x" * 1000, {"X-Forwarded-For": f"10.0.{number % 250}.1"}),
        ("GET", f"/image/{number:016x}", None, {"Host": "evil.example"}),
    ][number % 8]


def resources() -> tuple[float, int, int]:
    """Returns this process's memory in MB, open files and threads."""
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6, len(os.listdir("/proc/self/fd")), threading.active_count()


def test_many_bad_requests_leave_nothing_behind(running, collection, few, tmp_path, monkeypatch):
    """All are answered, then a good one as before; neither memory, files, threads nor the disk grow."""
    generator = random.Random(0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # With so low bounds, a body or a request that is still counted after its answer would soon refuse all others.
    settings = dataclasses.replace(few, bodies=2, at_once=4, body_seconds=15)
    with running(collection, settings) as served:
        connection = served.connection()

        def ask(number: int) -> int:
            method, path, body, headers = bad_request(number, generator)
            for _ in range(2):
                try:
                    connection.request(method, path, body, headers)
                    response = connection.getresponse()
                    assert list(json.loads(response.read())) == ["error"]
                    return response.status
                except (OSError, http.client.HTTPException):  # the server closed the connection after a refusal
                    connection.close()
            raise AssertionError(path)

        for number in range(400):
            ask(number)
        memory, files, threads = resources()
        statuses = {ask(number) for number in range(400, 2000)}
        assert statuses == {400, 404, 421, 422}
        after = resources()
        assert after[0] - memory < 20
        assert after[1] - files < 10
        assert after[2] - threads < 10
        connection.close()
        assert served.json("/search", method="POST", body=fake.encoded(fake.picture(1)))[0] == 200
    assert list(tmp_path.iterdir()) == []


# The process

PROGRAM = """
import pathlib, sys
from cib_jax.web import server
from tests.web.fake import FakeCollection
server.serve(FakeCollection(pathlib.Path(sys.argv[1])), port=0, print_line=lambda line: print(line, flush=True))
print("ended", flush=True)
"""


@pytest.fixture
def started(tmp_path):
    fake.fill(tmp_path, 1)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:  # closes its pipes
        line = process.stdout.readline()
        yield process, line
        process.kill()


def decoders_of(pid: int) -> list[int]:
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(pid) for pid in children if b"decode_worker" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]


def gone(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_its_processes(started, number):
    process, line = started
    assert line.startswith("1 photo at http://127.0.0.1:")
    port = int(line.rpartition(":")[2].partition("/")[0])
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET", "/health")
        assert json.load(connection.getresponse()) == {"status": "ok", "photos": 1, "bits": 64}
    with socket.create_connection(("127.0.0.1", port)) as waiting:
        waiting.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx")
        decoders = decoders_of(process.pid)
        assert len(decoders) >= 2
        process.send_signal(number)
        assert process.wait(timeout=60) == 0
        assert status_of(waiting.recv(1000)) == 503
    assert process.stdout.read() == "ended\n"
    assert process.stderr.read() == ""
    assert all(gone(pid) for pid in decoders)


def test_a_killed_server_leaves_no_process(started):
    process, _ = started
    decoders = decoders_of(process.pid)
    assert decoders
    process.kill()
    process.wait()
    until(lambda: all(gone(pid) for pid in decoders))


def refused(**address):
    with pytest.raises(WebError) as error, server.listening(**{"host": "127.0.0.1", "port": 0} | address):
        pass
    return error.value


def test_an_address_that_cannot_be_used_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = refused(port=port)
        assert (error.field, str(port) in str(error)) == ("--port", True)
    for port in (-1, 65_536):
        error = refused(port=port)
        assert (error.field, str(port) in str(error)) == ("--port", True)
    for host in ("192.0.2.1", "a..b"):
        error = refused(host=host)
        assert (error.field, repr(host) in str(error)) == ("--host", True)


@pytest.mark.parametrize(("host", "name", "loopback"), [("127.0.0.1", "127.0.0.1", True), ("::1", "[::1]", True),
                                                        ("0.0.0.0", None, False)])  # fmt: skip
def test_the_startup_lines_have_the_address_and_a_warning(collection, host, name, loopback):
    try:
        with server.listening(host, 0) as listener:
            assert server.is_loopback(listener) == loopback
            lines = server.format_startup(listener, collection)
            port = listener.getsockname()[1]
            printed = re.fullmatch(rf"20 photos at http://(.+):{port}/ .*", lines[0])[1]
            assert name in (printed, None)
            socket.create_connection((printed.strip("[]"), port), timeout=5).close()
    except WebError:
        pytest.skip("this machine has no IPv6")
    assert len(lines) == 1 + (not loopback)
    if not loopback:
        assert "TLS" in lines[1]


def test_a_missing_package_is_named(monkeypatch):
    web.check_installed()
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(WebError, match=r"gradio.*pip install .*\[web\]"):
        web.check_installed()


# Renewal


def test_errors_do_not_end_the_renewal(running, photos, capfd):
    before, after = fake.FakeCollection(photos), fake.FakeCollection(photos)
    results = [before, RuntimeError("unexpected"), UserError("--index: the share is away"), after]
    lines = []

    def renew(current):
        result = results.pop(0) if results else current
        if isinstance(result, Exception):
            raise result
        return result

    with running(before) as served:
        with server.renewing(served.api, renew, lines.append, seconds=0.01):
            until(lambda: len(lines) == 2)
        assert served.api.collection is after
        assert served.json("/health")[0] == 200
    assert "--index: the share is away" in lines[0]
    assert lines[1] == "20 photos now"
    assert "RuntimeError: unexpected" in capfd.readouterr().err

"""What gets past the guard and what does not: attacks over a real connection."""

import dataclasses
import gc
import json
import os
import pathlib
import random
import resource
import socket
import tempfile
import threading
import time

import pytest
from starlette.responses import FileResponse, PlainTextResponse

from cib_jax.web import clients, guard, routes
from cib_jax.web.clients import Clients, ProxyError, Rates
from tests.web import fake
from tests.web.conftest import MANY, running

ID = "0123456789abcdef"


def raw(served, *parts: bytes, wait: float = 0.0, timeout: float = 20) -> bytes:
    """Returns all that the server says to bytes, sent with pauses, until it closes the connection."""
    said = b""
    with socket.create_connection(("127.0.0.1", served.port), timeout) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(wait)
            while more := connection.recv(1 << 16):
                said += more
        except (ConnectionResetError, BrokenPipeError):
            pass
    return said


def status_of(said: bytes) -> int:
    return int(said.split(b" ", 2)[1]) if said else 0


HEAD = b"Host: localhost\r\nConnection: close\r\n"

NOT_THERE = [
    "/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/%252e%252e/etc/passwd",
    "//etc/passwd",
    "/thumbnail/../../etc/passwd",
    "/thumbnail/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/thumbnail/..%252f..%252fetc%252fpasswd",
    "/thumbnail//etc/passwd",
    "/thumbnail/0123456789abcdef/../../../etc/passwd",
    "/thumbnail/0123456789abcdef%00.jpg",
    "/thumbnail/0123456789ABCDEF",
    "/thumbnail/0123456789abcde",
    "/thumbnail/0123456789abcdef%0a",
    "/image/f0/0.jpg",
    "/image/f0%2f0.jpg",
    "/image/C:%5cWindows",
    "/image/file:%2f%2f%2fetc%2fpasswd",
    "/image/%EF%BC%8F%EF%BC%8Fetc",
    "/assets/../../etc/passwd",
    "/assets/%2e%2e/%2e%2e/etc/passwd",
    "/assets/..%5c..%5cetc",
    "/assets/.git/config",
    "/assets//etc/passwd",
    "/static/%00",
    "/svelte/a%2f..%2fb",
    "/docs",
    "/openapi.json",
    "/redoc",
    "/metrics",
    "/.env",
    "/gradio_api/upload",
    "/gradio_api/upload_progress",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=http://169.254.169.254/latest/meta-data",
    "/gradio_api/file/etc/passwd",
    "/gradio_api/proxy=http://localhost:22",
    "/gradio_api/stream/a/b/c/playlist.m3u8",
    "/gradio_api/component_server",
    "/gradio_api/queue/join",
    "/gradio_api/queue/data",
    "/gradio_api/run/predict",
    "/gradio_api/call/predict",
    "/gradio_api/heartbeat/x",
    "/gradio_api/custom_component/a/client/b/c",
    "/gradio_api/dev/reload",
    "/gradio_api/openapi.json",
    "/gradio_api/mcp",
    "/gradio_api/runs",
    "/gradio_api/vibe-edit",
    "/gradio_api/process_recording",
    "/gradio_api/token",
    "/monitoring",
    "/monitoring/summary",
    "/login",
    "/logout",
    "/pwa_icon/4000",
    "/gradio_api/deep_link",
]


@pytest.mark.parametrize("path", NOT_THERE)
def test_nothing_but_what_is_named_is_there(served, path):
    said = raw(served, b"GET " + path.encode() + b" HTTP/1.1\r\n" + HEAD + b"\r\n")
    assert status_of(said) == 404
    assert json.loads(said.partition(b"\r\n\r\n")[2]) == {"error": "There is nothing here."}


def test_every_route_of_gradio_that_calls_keeps_or_fetches_is_closed():
    """Against Gradio's own list: of what it offers, only files of the page are open, and only to be read."""
    gradio = pytest.importorskip("gradio")
    with gradio.Blocks(analytics_enabled=False) as blocks:
        gradio.HTML("x")
    app = gradio.routes.App.create_app(blocks)
    open_ones = set()
    for route in app.routes:
        for path in getattr(route, "path", ""), getattr(route, "path", "").replace("{path:path}", "index.js"):
            found = routes.find(path)
            if found is not None and getattr(route, "methods", None):
                open_ones.add(path)
                assert found.methods == ("GET", "HEAD")
    assert open_ones <= {
        "/", "/config", "/config/", "/favicon.ico", "/manifest.json", "/robots.txt", "/theme.css",
        "/gradio_api/theme.css", "/gradio_api/startup-events", "/gradio_api/app_id",
        "/assets/index.js", "/static/index.js", "/svelte/index.js",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PROPFIND"])
def test_other_methods_are_refused(served, method):
    status, headers, content = served.ask("/search", method=method)
    assert (status, headers["allow"]) == (405, "GET, HEAD, POST")
    assert "error" in json.loads(content)
    assert served.ask("/health", method="POST", body=b"x")[0] == 405


def test_answers_carry_what_browsers_need_to_be_careful(served):
    for path in ("/health", "/nothing", "/search?k=no", f"/thumbnail/{served.collection._photos[0].id}"):
        _, headers, _ = served.ask(path)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'self'" in headers["content-security-policy"]
        assert "server" not in headers
        assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://localhost:{port}", "Host": "localhost:{port}"}, 200),
        ({"Origin": "https://localhost:{port}", "Host": "localhost:{port}", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost:{port}.evil.example", "Host": "localhost:{port}"}, 403),
        ({"Origin": "http://localhost:1", "Host": "localhost:{port}"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_a_page_of_another_origin_can_post_nothing(served, headers, status):
    headers = {name: value.format(port=served.port) for name, value in headers.items()}
    assert served.ask("/search", method="POST", body=fake.encoded(fake.picture(1)), headers=headers)[0] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("127.0.0.1:7860", 200), ("[::1]:7860", 200), ("LocalHost:1", 200),
        ("evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.nip.io", 421), ("", 421), ("[::", 421),
        ("localhost@evil.example", 421),
    ],
)  # fmt: skip
def test_on_loopback_another_name_is_refused(served, host, status):
    said = raw(served, b"GET /health HTTP/1.1\r\nConnection: close\r\nHost: " + host.encode() + b"\r\n\r\n")
    assert status_of(said) == status


def test_names_can_be_given(photos):
    limits = dataclasses.replace(MANY, hosts=("photos.example",))
    with running(fake.FakeCollection(photos), limits, loopback=False) as served:
        assert served.ask("/health", headers={"Host": "Photos.example"})[0] == 200
        assert served.ask("/health", headers={"Host": "evil.example"})[0] == 421
    with running(fake.FakeCollection(photos), loopback=False) as served:
        assert served.ask("/health", headers={"Host": "anything.example"})[0] == 200


def post(length: str, *more: str) -> bytes:
    lines = ["POST /search HTTP/1.1", "Host: localhost", *([f"Content-Length: {length}"] * bool(length)), *more]
    return "\r\n".join([*lines, "", ""]).encode()


def test_bodies_are_bounded(photos, few):
    with running(fake.FakeCollection(photos), few) as served:
        said = raw(served, post("20000000"))
        assert status_of(said) == 413  # before any of it came
        assert b"larger than 1 MB: make it smaller" in said
        assert b"connection: close" in said.lower()
        chunk = b"10000\r\n" + bytes(65_536) + b"\r\n"
        assert status_of(raw(served, post("", "Transfer-Encoding: chunked"), *[chunk] * 40)) in (413, 0)
        assert status_of(raw(served, post("1000"), b"x" * 10)) == 408  # and no more comes
        assert status_of(raw(served, post("1000"), *[b"x"] * 30, wait=0.1)) in (408, 0)
        endless = [b"1\r\nx\r\n"] * 30
        assert status_of(raw(served, post("", "Transfer-Encoding: chunked"), *endless, wait=0.1)) in (408, 0)
        for length in ("-1", "1e3", "0x10", "9" * 400, "1, 2", "１"):
            assert status_of(raw(served, post(length.encode().decode("latin-1")), b"x")) in (400, 413)
        both = post("5", "Transfer-Encoding: chunked") + b"0\r\n\r\n"
        assert status_of(raw(served, both)) == 400
        with_body = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello"
        assert status_of(raw(served, with_body)) == 400
        assert served.json("/search", method="POST", body=fake.encoded(fake.picture(1)))[0] == 200


def test_too_many_bodies_at_once_are_sent_away(photos, few):
    limits = dataclasses.replace(few, body_seconds=3)
    with running(fake.FakeCollection(photos), limits) as served:
        slow = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(4)]
        for connection in slow:
            connection.sendall(post("1000"))
        while status_of(raw(served, post("5", "Connection: close"), b"hello")) != 503:
            time.sleep(0.05)
        for connection in slow:
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
            connection.close()
        full = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(3)]
        for connection in full[:2]:
            connection.sendall(post("1000000") + bytes(900_000))
        time.sleep(0.5)
        full[2].sendall(post("1000000") + bytes(900_000))
        assert full[2].recv(100).startswith(b"HTTP/1.1 503")
        for connection in full:
            connection.close()
        time.sleep(0.3)
        assert served.ask("/search", method="POST", body=fake.encoded(fake.picture(1)))[0] == 200


def test_a_connection_that_says_nothing_whole_is_closed(photos, few):
    limits = dataclasses.replace(few, head_seconds=1)
    with running(fake.FakeCollection(photos), limits) as served:
        assert raw(served) == b""
        assert raw(served, *[b"G", b"E", b"T"] * 10, wait=0.1) == b""
        whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        said = raw(served, whole, *[b"G"] * 30, wait=0.1)  # after an answer, too
        assert status_of(said) in (0, 200)
        said = raw(served, whole * 2, b"GET / HT")  # after two that came together, too
        assert said.count(b'{"status": "ok"') == 2
        huge = b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"a" * 100_000
        assert status_of(raw(served, huge)) in (400, 431)
        assert status_of(raw(served, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n")) == 400


def test_one_client_has_so_many_connections(photos, few):
    limits = dataclasses.replace(few, at_once=5)
    with running(fake.FakeCollection(photos), limits) as served:
        idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(5)]
        time.sleep(0.3)
        assert raw(served, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
        for connection in idle:
            connection.close()
        time.sleep(0.3)
        assert served.ask("/health")[0] == 200


def test_the_rate_of_a_client_is_bounded(photos):
    limits = dataclasses.replace(MANY, searches=5, images=3, others=20)
    with running(fake.FakeCollection(photos), limits) as served:
        id = served.collection._photos[0].id
        assert [served.ask("/search?k=1")[0] for _ in range(7)] == [200] * 5 + [429] * 2
        status, headers, content = served.ask("/search", method="POST", body=b"x")
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 60
        assert json.loads(content)["error"].startswith("Too many requests; try again in ")
        assert [served.ask(f"/image/{id}")[0] for _ in range(4)] == [200] * 3 + [429]
        assert [served.ask("/nothing")[0] for _ in range(15)] == [404] * 15
        assert [served.ask(f"/thumbnail/{id}")[0] for _ in range(6)] == [200] * 5 + [429]
        # An address that anybody can write into a header makes nobody another client.
        for forged in ("1.2.3.4", "127.0.0.2, 9.9.9.9", "::1", "x" * 500):
            headers = {"X-Forwarded-For": forged, "X-Real-IP": forged, "Forwarded": f"for={forged}"}
            assert served.ask("/search?k=1", headers=headers)[0] == 429


def test_behind_a_proxy_clients_are_told_apart(photos):
    limits = dataclasses.replace(MANY, searches=2, proxies=("127.0.0.1", "10.0.0.0/8"))
    with running(fake.FakeCollection(photos), limits) as served:

        def search(forwarded):
            return served.ask("/search?k=1", headers={"X-Forwarded-For": forwarded})[0]

        assert [search("192.0.2.1") for _ in range(3)] == [200, 200, 429]
        assert [search("6.6.6.6, 192.0.2.1, 10.1.1.1") for _ in range(2)] == [
            429,
            429,
        ]  # what it wrote itself is nothing
        assert [search("192.0.2.2") for _ in range(3)] == [200, 200, 429]
        assert [search(f"2001:db8:1:2::{n}") for n in range(3)] == [200, 200, 429]
        assert search("2001:db8:1:3::1") == 200


@pytest.mark.parametrize(
    ("peer", "forwarded", "name"),
    [
        ("192.0.2.1", ["1.1.1.1"], "192.0.2.1"),
        ("10.0.0.1", ["1.1.1.1"], "1.1.1.1"),
        ("10.0.0.1", ["2.2.2.2, 1.1.1.1"], "1.1.1.1"),
        ("10.0.0.1", ["2.2.2.2", "1.1.1.1, 10.0.0.9"], "1.1.1.1"),
        ("10.0.0.1", ["1.1.1.1:4711"], "1.1.1.1"),
        ("10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::/64"),
        ("10.0.0.1", ["2.2.2.2, nonsense"], "10.0.0.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("::ffff:10.0.0.1", ["1.1.1.1"], "1.1.1.1"),
        ("::ffff:192.0.2.1", [], "192.0.2.1"),
        ("fe80::1%eth0", [], "fe80::/64"),
        ("", [], "unknown"),
    ],
)
def test_who_a_client_is(peer, forwarded, name):
    assert Clients(["10.0.0.0/8"]).name(peer, forwarded) == name


def test_a_proxy_that_is_no_address_is_refused():
    with pytest.raises(ProxyError, match="proxies: 'nginx' is neither an address nor a network"):
        Clients(["nginx"])


def test_the_window_moves(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    rates = Rates({"a": 3, "b": 1}, at_once=2)
    assert [rates.seconds_to_wait("a", "x") for _ in range(4)] == [0, 0, 0, 60]
    assert rates.seconds_to_wait("b", "x") == rates.seconds_to_wait("a", "y") == 0
    now[0] += 59.5
    assert rates.seconds_to_wait("a", "x") == 1
    now[0] += 1
    assert rates.seconds_to_wait("a", "x") == 0
    assert [rates.enter("x"), rates.enter("x"), rates.enter("x"), rates.enter("y")] == [True, True, False, True]
    rates.leave("x")
    assert rates.enter("x")
    assert clients.Rates({}, 1)._now == {}


def test_errors_of_the_page_say_nothing(photos):
    def page(app, collection):
        app.add_route("/config", lambda request: PlainTextResponse("Traceback: /root/.ssh", 500))
        app.add_route("/robots.txt", lambda request: FileResponse("/not/there"))
        app.add_route(
            "/theme.css", lambda request: PlainTextResponse("x", headers={"Access-Control-Allow-Origin": "*"})
        )

    with running(fake.FakeCollection(photos), page=page) as served:
        assert served.json("/config") == (500, {"error": "The server could not answer."})
        assert "/not" not in str(served.ask("/robots.txt")[2])
        status, headers, content = served.ask("/theme.css")
        assert (status, content) == (200, b"x")
        assert "access-control-allow-origin" not in headers
        assert "'unsafe-inline'" in headers["content-security-policy"]


def test_what_a_proxy_says_is_kept_from_the_page_unless_it_is_one(photos):
    def page(app, collection):
        app.add_route("/config", lambda request: PlainTextResponse(request.headers.get("x-forwarded-host", "none")))

    with running(fake.FakeCollection(photos), page=page) as served:
        assert served.ask("/config", headers={"X-Forwarded-Host": "evil.example"})[2] == b"none"
    with running(fake.FakeCollection(photos), dataclasses.replace(MANY, proxies=("127.0.0.1",)), page=page) as served:
        assert served.ask("/config", headers={"X-Forwarded-Host": "a.example"})[2] == b"a.example"


def bad_request(number: int, generator: random.Random) -> tuple[str, str, bytes | None, dict[str, str]]:
    kind = number % 8
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
    ][kind]


def test_ten_thousand_bad_requests_leave_nothing_behind(photos):
    """The server answers them all, then a good one as before; neither memory, files, threads nor the disk grow."""
    generator = random.Random(0)
    before = set(os.listdir(tempfile.gettempdir()))
    with running(fake.FakeCollection(photos)) as served:
        connection = served.connection()

        def ask(number: int) -> int:
            nonlocal connection
            method, path, body, headers = bad_request(number, generator)
            for _ in range(2):
                try:
                    connection.request(method, path, body, headers)
                    response = connection.getresponse()
                    assert "error" in json.loads(response.read())
                    return response.status
                except (ConnectionError, OSError):  # those that may not go on were closed
                    connection.close()
            raise AssertionError(path)

        for number in range(1000):
            ask(number)
        gc.collect()
        memory, files, threads = held()
        statuses = {ask(number) for number in range(1000, 10_000)}
        assert min(statuses) >= 400
        assert max(statuses) < 500
        gc.collect()
        after = held()
        assert after[0] - memory < 20
        assert after[1] - files < 10
        assert after[2] - threads < 10
        connection.close()
        assert served.json("/search", method="POST", body=fake.encoded(fake.picture(1)))[0] == 200
        rates, bodies = served_guard(served)
        deadline = time.monotonic() + 5
        while rates._now and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not rates._now
        assert (bodies._count, bodies._bytes) == (0, 0)
    new = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in new if not name.startswith("pytest-")]


def held() -> tuple[float, int, int]:
    """Returns this process's memory in MB, open files and threads."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6, len(os.listdir("/proc/self/fd")), threading.active_count()


def served_guard(served):
    (found,) = [thing for thing in gc.get_objects() if type(thing) is guard.Guard and thing._app is served.app]
    return found._rates, found._bodies

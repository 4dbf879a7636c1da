"""Middleware: which requests pass, from whom, and with which headers the answers leave."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import re
import select
import socket
import time

import pytest
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse

from cib_jax.web.middleware import RateLimits, TrustedProxies, find_route
from cib_jax.web.settings import Settings
from tests.web import fake
from tests.web.conftest import OPEN, raw, status_of, until

PHOTO = fake.encoded(fake.picture(1))
GET = b"GET /health HTTP/1.1\r\nConnection: close\r\nHost: "

CLOSED = [
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


def post(length: str, *more: str, path: str = "/search") -> bytes:
    """Returns the head of a POST request."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *([f"Content-Length: {length}"] * bool(length)), *more]
    return "\r\n".join([*lines, "", ""]).encode()


# Routes


@pytest.mark.parametrize("path", CLOSED)
def test_an_address_that_is_not_listed_does_not_exist(served, path):
    answer = raw(served, b"GET " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert status_of(answer) == 404
    assert list(json.loads(answer.partition(b"\r\n\r\n")[2])) == ["error"]


def test_of_gradios_routes_only_files_of_the_page_are_open():
    """Goes through the list of routes of an app that Gradio makes."""
    import gradio  # takes seconds, which the worker that does not run this file is spared

    with gradio.Blocks(analytics_enabled=False) as blocks:
        gradio.HTML("x")
    offered, opened = set(), set()
    for route in gradio.routes.App.create_app(blocks).routes:
        # Newer versions of FastAPI keep an included router as one route.
        for each in getattr(getattr(route, "original_router", None), "routes", [route]):
            offered.add(path := re.sub(r"\{.*?\}", "x", each.path))
            if found := find_route(path):
                opened.add(path)
                assert found.methods == ("GET", "HEAD")
    assert {"/gradio_api/upload", "/gradio_api/queue/join", "/login"} <= offered
    assert opened == {
        "/", "/config", "/config/", "/favicon.ico", "/manifest.json", "/robots.txt", "/theme.css",
        "/gradio_api/startup-events", "/gradio_api/app_id", "/gradio_api/theme.css", "/assets/x", "/static/x",
        "/svelte/x",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PROPFIND"])
def test_other_methods_are_refused(served, method):
    status, headers, content = served.ask("/search", method=method)
    assert (status, headers["allow"]) == (405, "GET, HEAD, POST")
    assert "error" in json.loads(content)


def test_post_is_refused_where_only_get_is_allowed(served):
    assert served.ask("/health", method="POST", body=b"x")[0] == 405


def test_a_websocket_is_refused(served):
    upgrade = b"Host: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    assert status_of(raw(served, b"GET /gradio_api/queue/data HTTP/1.1\r\n" + upgrade + key)) == 404


# Headers


def test_answers_carry_the_headers_that_isolate_them(served):
    for path in ("/health", "/nothing", "/search?k=no", f"/thumbnail/{served.collection.indexed[0].id}"):
        _, headers, _ = served.ask(path)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-frame-options"] == "SAMEORIGIN"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'self'" in headers["content-security-policy"]
        assert "server" not in headers
        assert not [name for name in headers if name.startswith("access-control")]


def page(app, collection):
    """Adds some answers to the app in place of Gradio's page."""
    app.add_route("/config", lambda request: PlainTextResponse("Traceback: /root/.ssh", 500))
    app.add_route("/robots.txt", lambda request: FileResponse("/not/there"))
    app.add_route("/favicon.ico", lambda request: PlainTextResponse(request.headers.get("x-forwarded-host", "none")))
    own = {"Access-Control-Allow-Origin": "*", "X-Frame-Options": "ALLOWALL", "Server": "gradio"}
    app.add_route("/theme.css", lambda request: PlainTextResponse("x", headers=own))


@pytest.fixture(scope="module")
def with_page(running, collection):
    with running(collection, page=page) as served:
        yield served


FRAMES = ("https://notebook.example", "https://*.frames.example", "http://localhost:*")


@pytest.fixture(scope="module")
def named(running, collection):
    """A server behind a proxy, with a name and with pages that may frame it."""
    settings = dataclasses.replace(OPEN, hosts=("photos.example",), frames=FRAMES, proxies=("127.0.0.1",))
    with running(collection, settings, page=page, loopback=False) as served:
        yield served


def test_errors_of_the_page_disclose_nothing(with_page):
    for path in ("/config", "/robots.txt"):
        status, answer = with_page.json(path)
        assert (status, list(answer)) == (500, ["error"])
        assert "/" not in answer["error"]


def test_headers_of_the_page_are_replaced(with_page):
    status, headers, content = with_page.ask("/theme.css")
    assert (status, content) == (200, b"x")
    assert not {"access-control-allow-origin", "server"} & set(headers)
    assert headers["x-frame-options"] == "SAMEORIGIN"
    assert "'unsafe-inline'" in headers["content-security-policy"]
    assert headers["content-security-policy"].endswith("; frame-ancestors 'self'")


def test_only_pages_that_are_named_may_frame_the_page(named):
    headers = named.ask("/theme.css")[1]
    assert headers["content-security-policy"].endswith(f"; frame-ancestors 'self' {' '.join(FRAMES)}")
    assert "x-frame-options" not in headers
    # Answers other than the page may not be framed.
    for path in ("/health", "/nothing", "/config", f"/image/{named.collection.indexed[0].id}"):
        headers = named.ask(path)[1]
        assert headers["x-frame-options"] == "SAMEORIGIN"
        assert "frame-ancestors 'self';" in headers["content-security-policy"]


# Origins and hosts


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
def test_a_page_of_another_origin_cannot_post(served, headers, status):
    headers = {name: value.format(port=served.port) for name, value in headers.items()}
    assert served.ask("/search", method="POST", body=PHOTO, headers=headers)[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:{port}", "Origin": "https://photos.example"}, 200),
        ({"Host": "localhost:{port}", "Origin": "https://Photos.example", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "photos.example", "Origin": "https://photos.example"}, 200),
        ({"Host": "localhost:{port}", "Origin": "https://photos.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "localhost:{port}", "Origin": "https://photos.example:8443"}, 403),
        ({"Host": "localhost:{port}", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:{port}", "Origin": "https://photos.example.evil.example"}, 403),
        ({"Host": "evil.example", "Origin": "https://photos.example"}, 421),
    ],
)
def test_a_page_under_a_given_name_can_post_through_a_proxy_that_uses_another(named, headers, status):
    headers = {name: value.format(port=named.port) for name, value in headers.items()}
    assert named.ask("/search", method="POST", body=PHOTO, headers=headers)[0] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("127.0.0.1:7860", 200), ("[::1]:7860", 200), ("LocalHost:1", 200),
        ("evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.nip.io", 421), ("", 421), ("[::", 421),
        ("localhost@evil.example", 421), ("192.0.2.1", 421),
    ],
)  # fmt: skip
def test_on_loopback_another_host_name_is_refused(served, host, status):
    assert status_of(raw(served, GET + host.encode() + b"\r\n\r\n")) == status


def test_two_hosts_are_refused(served):
    assert status_of(raw(served, GET + b"localhost\r\nHost: localhost\r\n\r\n")) in (400, 421)


def test_a_given_name_is_known_and_an_address_is_not(named):
    assert named.ask("/health", headers={"Host": "Photos.example"})[0] == 200
    for host in ("evil.example", "192.0.2.1"):
        assert named.ask("/health", headers={"Host": host})[0] == 421


def test_a_star_allows_any_name(running, collection):
    with running(collection, dataclasses.replace(OPEN, hosts=("*",)), loopback=False) as served:
        assert served.ask("/health", headers={"Host": "anything.example"})[0] == 200


def test_on_a_network_addresses_and_the_own_name_are_known(running, collection):
    with running(collection, loopback=False) as served:
        for host in ("192.0.2.1:7860", "[2001:db8::1]:7860", socket.gethostname(), "localhost"):
            assert served.ask("/health", headers={"Host": host})[0] == 200
        for host in ("evil.example", "192.0.2.1.nip.io", "1.2.3", "0x7f.1", ""):
            assert served.ask("/health", headers={"Host": host})[0] == 421


# Clients and rates


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
def test_the_name_of_a_client(peer, forwarded, name):
    assert TrustedProxies(["10.0.0.0/8"]).client_of(peer, forwarded) == name


def test_forwarding_headers_are_kept_from_a_trusted_proxy_only(with_page, named):
    headers = {"X-Forwarded-Host": "photos.example"}
    assert with_page.ask("/favicon.ico", headers=headers)[2] == b"none"
    assert named.ask("/favicon.ico", headers=headers)[2] == b"photos.example"


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("X-Forwarded-Host", "Photos.example:8443", 200),
        ("X-Forwarded-Host", "localhost, photos.example", 200),
        ("X-Forwarded-Host", "evil.example", 421),
        ("X-Forwarded-Host", "evil.example, photos.example", 421),
        ("X-Forwarded-Host", "photos.example@evil.example", 421),
        ("X-Gradio-Server", "https://photos.example/", 200),
        ("X-Gradio-Server", "https://evil.example/", 421),
        ("X-Gradio-Server", "https://photos.example@evil.example", 421),
        ("X-Forwarded-Host", "evil.example//photos.example", 421),
        ("X-Forwarded-Host", "evil.example\\@photos.example", 421),
    ],
)
def test_names_that_a_proxy_forwards_are_the_servers(named, name, value, status):
    assert named.ask("/favicon.ico", headers={name: value})[0] == status


def test_the_rates_of_a_client_are_bounded(running, collection):
    settings = dataclasses.replace(OPEN, searches=5, images=3, others=20)
    with running(collection, settings) as served:
        id = collection.indexed[0].id
        assert [served.ask("/search?k=1")[0] for _ in range(7)] == [200] * 5 + [429] * 2
        status, headers, content = served.ask("/search", method="POST", body=b"x")
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 60
        assert headers["retry-after"] in json.loads(content)["error"]
        assert [served.ask(f"/image/{id}")[0] for _ in range(4)] == [200] * 3 + [429]
        assert [served.ask("/nothing")[0] for _ in range(15)] == [404] * 15
        assert [served.ask(f"/thumbnail/{id}")[0] for _ in range(6)] == [200] * 5 + [429]
        # Any client can write any address into a header.
        for forged in ("1.2.3.4", "127.0.0.2, 9.9.9.9", "::1", "x" * 500):
            headers = {"X-Forwarded-For": forged, "X-Real-IP": forged, "Forwarded": f"for={forged}"}
            assert served.ask("/search?k=1", headers=headers)[0] == 429


def test_behind_a_proxy_each_client_has_its_own_rate(running, collection):
    settings = dataclasses.replace(OPEN, searches=2, proxies=("127.0.0.1", "10.0.0.0/8"))
    with running(collection, settings) as served:

        def search(forwarded):
            return served.ask("/search?k=1", headers={"X-Forwarded-For": forwarded})[0]

        assert [search("192.0.2.1") for _ in range(3)] == [200, 200, 429]
        assert search("6.6.6.6, 192.0.2.1, 10.1.1.1") == 429  # the first address was sent by the client itself
        assert [search("192.0.2.2") for _ in range(3)] == [200, 200, 429]
        assert [search(f"2001:db8:1:2::{n}") for n in range(3)] == [200, 200, 429]
        assert search("2001:db8:1:3::1") == 200


class Clock:
    """A request counter, at a time that a test sets."""

    def __init__(self, **limits):
        self.now = 1000.0
        self.limits = RateLimits(self.nothing, Settings(**limits), lambda: self.now)

    async def nothing(self, scope, receive, send):
        pass

    def seconds_to_wait(self, path, client):
        """Returns 0 if a request passes, or the header Retry-After."""
        try:
            asyncio.run(self.limits({"path": path, "state": {"client": client}}, None, None))
        except HTTPException as error:
            return int(error.headers["retry-after"])
        return 0


def test_the_window_of_a_rate_moves():
    clock = Clock(searches=3, images=1)
    image = f"/image/{'0' * 16}"
    assert [clock.seconds_to_wait("/search", "x") for _ in range(4)] == [0, 0, 0, 60]
    assert clock.seconds_to_wait(image, "x") == clock.seconds_to_wait("/search", "y") == 0
    assert clock.seconds_to_wait(image, "x") == 60
    clock.now += 59.5
    assert clock.seconds_to_wait("/search", "x") == 1
    clock.now += 1
    assert clock.seconds_to_wait("/search", "x") == 0


def test_clients_that_make_no_more_requests_are_forgotten():
    clock = Clock()

    async def ask(clients):
        for client in clients:
            await clock.limits({"path": "/thumbnail/0", "state": {"client": client}}, None, None)

    asyncio.run(ask(f"10.0.{number // 256}.{number % 256}" for number in range(2000)))
    assert len(clock.limits.times) == 2000
    clock.now += 61
    asyncio.run(ask(["x"] * 1000))
    assert len(clock.limits.times) == 1


def test_a_clock_set_back_blocks_nobody(monkeypatch):
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * next(hours))
    clock = Clock(searches=1)
    assert [clock.seconds_to_wait("/search", "x") for _ in range(2)] == [0, 60]
    clock.now += 61
    assert clock.seconds_to_wait("/search", "x") == 0


def test_the_requests_of_a_client_at_the_same_time_are_bounded():
    async def scenario():
        go, passed = asyncio.Event(), []

        async def app(scope, receive, send):
            passed.append(scope["state"]["client"])
            await go.wait()

        limits = RateLimits(app, Settings(at_once=2))

        def ask(client):
            return asyncio.ensure_future(limits({"path": "/health", "state": {"client": client}}, None, None))

        tasks = [ask("x"), ask("x"), ask("y")]
        await asyncio.sleep(0)
        with pytest.raises(HTTPException) as error:
            await ask("x")
        assert error.value.status_code == 429
        go.set()
        await asyncio.gather(*tasks)
        await ask("x")
        assert passed == ["x", "x", "y", "x"]

    asyncio.run(scenario())


def test_the_requests_of_a_client_behind_a_proxy_are_bounded(running, collection, few):
    settings = dataclasses.replace(few, at_once=2, bodies=100, body_seconds=60, proxies=("127.0.0.1",))

    def health(client):
        return served.ask("/health", headers={"X-Forwarded-For": client})[0]

    with running(collection, settings) as served, contextlib.ExitStack() as clients:
        slow = [clients.enter_context(served.socket()) for _ in range(3)]
        for connection in slow:
            connection.sendall(post("1000", "X-Forwarded-For: 192.0.2.1"))
        assert statuses_of_refused(slow) == [429]
        assert health("192.0.2.1") == 429
        assert health("192.0.2.2") == 200
        clients.close()
        until(lambda: health("192.0.2.1") == 200)


def statuses_of_refused(connections):
    """Returns the statuses of the connections that were answered first."""
    return [status_of(connection.recv(1000)) for connection in select.select(connections, [], [], 60)[0]]


# Bodies


@pytest.fixture(scope="module")
def small(running, collection):
    """A server that takes bodies of 1 MB, within a second."""
    with running(collection, dataclasses.replace(OPEN, photo_mb=1, body_seconds=1)) as served:
        yield served


def test_a_body_that_is_announced_too_large_is_not_read(small):
    answer = raw(small, post("20000000"))
    assert status_of(answer) == 413
    assert b"1 MB" in answer
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    "parts",
    [[post("1000"), b"x" * 10], [post("1000"), *[b"x"] * 30]],
    ids=["no more", "slowly"],
)
def test_a_slow_body_is_given_up(small, parts):
    assert status_of(raw(small, *parts, wait=0.1)) == 408


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "1, 2", "１"])
def test_a_length_that_is_not_a_number_is_refused(small, length):
    assert status_of(raw(small, post(length), b"x")) == 400


def test_a_huge_length_is_refused(small):
    assert status_of(raw(small, post("9" * 400), b"x")) in (400, 413)


def test_a_body_of_get_is_refused(small):
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    assert status_of(raw(small, request + b"Content-Length: 5\r\n\r\nhello")) == 400


def test_a_refused_body_ends_the_connection(small):
    """Otherwise a client could keep it open by sending, slowly, a body that nobody reads."""
    for path in ("/nothing", "/health"):
        assert b"connection: close" in raw(small, post("1000", path=path), b"x").lower()


@pytest.mark.parametrize("sizes", [(1,) * 5, (999_999, 999_999, 3)], ids=["number", "memory"])
def test_the_number_and_the_memory_of_bodies_are_bounded(running, collection, few, sizes):
    """Sends one body or one byte more than is allowed; the one that arrives last is refused, and nothing is unread."""
    with running(collection, dataclasses.replace(few, body_seconds=60)) as served, contextlib.ExitStack() as clients:
        slow = [clients.enter_context(served.socket()) for _ in sizes]
        for connection, size in zip(slow, sizes, strict=True):
            connection.sendall(post("1000000") + bytes(size))
        assert statuses_of_refused(slow) == [503]
        clients.close()
        until(lambda: served.ask("/search", method="POST", body=b"x" * 900_000)[0] == 422)


def test_the_bodies_of_a_client_are_bounded(running, collection, few):
    settings = dataclasses.replace(few, bodies=5, bodies_each=2, body_seconds=60, proxies=("127.0.0.1",))
    with running(collection, settings) as served, contextlib.ExitStack() as clients:
        slow = [clients.enter_context(served.socket()) for _ in range(3)]
        for connection in slow:
            connection.sendall(post("1000", "X-Forwarded-For: 192.0.2.1"))
        assert statuses_of_refused(slow) == [429]
        other = {"X-Forwarded-For": "192.0.2.2"}
        assert served.ask("/search", method="POST", body=b"x", headers=other)[0] == 422


def test_a_client_cannot_take_the_memory_for_all_bodies(running, collection, few):
    settings = dataclasses.replace(few, bodies=9, bodies_mb=4, body_seconds=60, proxies=("127.0.0.1",))
    with running(collection, settings) as served, contextlib.ExitStack() as clients:
        slow = [clients.enter_context(served.socket()) for _ in range(3)]
        for connection in slow:
            connection.sendall(post("1000000", "X-Forwarded-For: 192.0.2.1") + bytes(999_990))
        assert statuses_of_refused(slow) == [503]
        other = {"X-Forwarded-For": "192.0.2.2"}
        assert served.ask("/search", method="POST", body=b"x" * 900_000, headers=other)[0] == 422


CHUNKED = post("", "Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    "head",
    [
        CHUNKED,
        post("5", "Transfer-Encoding: chunked"),
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + CHUNKED,
    ],
    ids=["alone", "with a length", "after another request"],
)
@pytest.mark.parametrize("body", [b"0\r\n\r\n", b"1\r\nx\r\n" * 3000 + b"no chunk"], ids=["whole", "damaged"])
def test_a_body_in_chunks_is_refused_and_not_parsed(small, head, body):
    """Parsing the smallest chunks would keep all other clients waiting for seconds."""
    answer = raw(small, head + body)
    assert b"HTTP/1.1 411" in answer and b"HTTP/1.1 400" not in answer

"""What gets past the guard and what does not: attacks over a real connection."""

import dataclasses
import json
import socket

import pytest
from starlette.responses import FileResponse, PlainTextResponse

from cib_jax.web import framing, routes
from tests.web import fake
from tests.web.conftest import MANY, raw, running, status_of

ID = "0123456789abcdef"


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
def test_behind_a_proxy_that_asks_by_another_name_the_page_can_post(named, headers, status):
    headers = {name: value.format(port=named.port) for name, value in headers.items()}
    assert named.ask("/search", method="POST", body=fake.encoded(fake.picture(1)), headers=headers)[0] == status


@pytest.fixture(scope="module")
def named(photos):
    with running(fake.FakeCollection(photos), dataclasses.replace(MANY, hosts=("photos.example",))) as found:
        yield found


def test_only_pages_that_are_named_may_frame_the_page(photos):
    def page(app, collection):
        app.add_route("/config", lambda request: PlainTextResponse("x", headers={"X-Frame-Options": "ALLOWALL"}))

    with running(fake.FakeCollection(photos), page=page) as served:
        headers = served.ask("/config")[1]
        assert headers["x-frame-options"] == "SAMEORIGIN"
        assert headers["content-security-policy"].endswith("; frame-ancestors 'self'")
    origins = ("https://notebook.example", "https://*.frames.example", "http://localhost:*")
    with running(fake.FakeCollection(photos), dataclasses.replace(MANY, frames=origins), page=page) as served:
        headers = served.ask("/config")[1]
        assert headers["content-security-policy"].endswith(f"; frame-ancestors 'self' {' '.join(origins)}")
        assert "x-frame-options" not in headers
        for path in ("/health", "/nothing", f"/image/{served.collection._photos[0].id}"):  # no page
            headers = served.ask(path)[1]
            assert headers["x-frame-options"] == "SAMEORIGIN"
            assert "frame-ancestors 'self';" in headers["content-security-policy"]


@pytest.mark.parametrize(
    "origin",
    [
        "*", "https://*", "https://*.example", "https://a.*.example", "notebook.example", "file://x", "data:", "'none'",
        "https://a.example/path", "https://a.example; script-src *", "https://a.example\r\nX: y",
        "https://a.example b.c", "https://a.example,https://b.example", "https://u@a.example", "https://a.example:",
        "https://", "",
    ],
)  # fmt: skip
def test_what_is_no_origin_cannot_frame(origin):
    with pytest.raises(framing.FrameError, match=r"^--frames: .* is no origin of a page; give for example"):
        framing.ancestors([origin])


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
    with running(fake.FakeCollection(photos), dataclasses.replace(MANY, hosts=("*",)), loopback=False) as served:
        assert served.ask("/health", headers={"Host": "anything.example"})[0] == 200


def test_on_a_network_addresses_and_its_own_name_are_known(photos):
    with running(fake.FakeCollection(photos), loopback=False) as served:
        for host in ("192.0.2.1:7860", "[2001:db8::1]:7860", socket.gethostname(), "localhost"):
            assert served.ask("/health", headers={"Host": host})[0] == 200
        for host in ("evil.example", "192.0.2.1.nip.io", "1.2.3", "0x7f.1", ""):
            assert served.ask("/health", headers={"Host": host})[0] == 421


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

"""ASGI middleware around the search app: clients, rates, hosts, routes, origins, bodies, errors and headers.

`protect` puts one class per concern around the app. Each passes a request on to the next, or refuses it by raising an
HTTPException, which `ErrorResponses` turns into JSON. A refusal closes the connection, because the rest of the request
is not read.
"""

# ruff: noqa: D102

import asyncio
import collections
import ipaddress
import math
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cib_jax.web.settings import Settings

SEARCH, IMAGE, OTHER = "search", "image", "other"
"""Kinds of requests that are counted separately by `RateLimits`."""

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_GET = ("GET", "HEAD")
_FILE = r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/){0,6}[A-Za-z0-9_-][A-Za-z0-9._-]*"  # no part begins with a dot
_NOT_FOUND = "This address does not exist."
_MULTIPART = 16_384  # bytes that multipart/form-data may add to a photo


class Route(NamedTuple):
    """An address that may be requested."""

    path: re.Pattern[str]
    methods: tuple[str, ...]
    kind: str  # the rate limit by which it is counted
    page: bool  # whether Gradio answers it


# Only these routes exist for clients. Gradio's own server offers many more. Its page computes in the browser and calls
# none of them, so they stay closed, each for a reason:
# - /gradio_api/queue/*, run/*, api/*, call/*, cancel, reset: call Python functions; a file named in the arguments is
#   fetched, also from other servers, and kept on disk.
# - /gradio_api/upload, upload_progress, stream/*, process_recording: keep on disk what they receive.
# - /gradio_api/file=*, file/*, custom_component/*, deep_link and /pwa_icon: read files by path, or decode them.
# - /gradio_api/proxy=*: requests other servers.
# - /gradio_api/component_server, dev/reload, vibe-*, mcp, openapi.json, info: run or describe code.
# - /gradio_api/heartbeat/*: keeps a connection open without end, for a session that does not exist here.
# - /monitoring*, /profiling/*, /gradio_api/runs, /run-history/*: show what other users did.
# - /login*, /logout, /user, /token: there are no accounts.
ROUTES = (
    Route(re.compile(r"/search"), (*_GET, "POST"), SEARCH, False),
    Route(re.compile(r"/image/[0-9a-f]{16}"), _GET, IMAGE, False),
    Route(re.compile(r"/thumbnail/[0-9a-f]{16}"), _GET, OTHER, False),
    Route(re.compile(r"/(health|docs)"), _GET, OTHER, False),
    Route(re.compile(r"/photo"), _GET, OTHER, False),
    Route(re.compile(r"/"), _GET, OTHER, True),
    Route(re.compile(r"/(config|favicon\.ico|manifest\.json|robots\.txt|theme\.css)/?"), _GET, OTHER, True),
    Route(re.compile(r"/gradio_api/(theme\.css|startup-events|app_id)"), _GET, OTHER, True),
    Route(re.compile(rf"/(assets|static|svelte)/{_FILE}"), _GET, OTHER, True),
)


def find_route(path: str) -> Route | None:
    """Returns the route of a path with its escapes undone, or None if there is none."""
    return next((route for route in ROUTES if route.path.fullmatch(path)), None)


def protect(app: ASGIApp, settings: Settings, *, loopback: bool, name: str = "localhost") -> ASGIApp:
    """Returns an app behind all middleware of this module, for a server that listens at the host or address `name`."""
    guarded: ASGIApp = BodyLimits(PageErrors(app), settings)
    guarded = KnownRoutes(SameOrigin(guarded, settings.hosts))
    guarded = KnownHosts(guarded, settings.hosts, name=name, any_address=not loopback and not settings.hosts)
    guarded = ClientNames(RateLimits(guarded, settings), TrustedProxies(settings.proxies))
    guarded = SecurityHeaders(ErrorResponses(guarded), settings.frames)

    async def protected(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})
            await guarded(scope, receive, send)
        elif scope["type"] == "lifespan":
            await app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    return protected


def refusal(status: int, detail: str, headers: dict[str, str] | None = None) -> HTTPException:
    """Returns an error that closes the connection, for a request that is not read to its end."""
    return HTTPException(status, detail, {"connection": "close"} | (headers or {}))


def error_response(error: Exception) -> Response:
    """Returns an error as JSON; of an unexpected one, it discloses nothing."""
    if not isinstance(error, HTTPException):
        error = refusal(500, "The server could not answer; its log has the reason.")
    headers = {"cache-control": "no-store"} | dict(error.headers or {})
    return JSONResponse({"error": error.detail}, error.status_code, headers)


class ErrorResponses:
    """Turns exceptions into JSON, {"error": sentence}, without a traceback or a path of this machine."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except ClientDisconnect:
            pass
        except (Exception, asyncio.CancelledError) as error:
            if started:
                raise  # uvicorn logs it and closes the connection
            if isinstance(error, asyncio.CancelledError):  # by uvicorn, when it stops and requests are still open
                error = refusal(503, "The server is stopping.")
            elif not isinstance(error, HTTPException):
                traceback.print_exc()
            await error_response(error)(scope, receive, send)


class SecurityHeaders:
    """Sets the headers by which browsers isolate the server's answers, in place of whatever the app set."""

    # Gradio's page has its configuration in an inline script and compiles the JavaScript of its events.
    _PAGE_POLICY = (
        "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; manifest-src 'self'; "
        "worker-src 'self' blob:; base-uri 'self'; form-action 'none'; frame-ancestors 'self'"
    )
    _COMMON = {  # noqa: RUF012
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cross-origin-opener-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
    }
    _API = _COMMON | {
        "content-security-policy": "default-src 'none'; frame-ancestors 'self'; sandbox",
        "x-frame-options": "SAMEORIGIN",
    }

    def __init__(self, app: ASGIApp, frames: Iterable[str]) -> None:
        self._app = app
        self._page = self._COMMON | {"content-security-policy": " ".join((self._PAGE_POLICY, *frames))}
        if not frames:  # for browsers without CSP; this header cannot name other origins
            self._page["x-frame-options"] = "SAMEORIGIN"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [(key.lower(), value) for key, value in message.get("headers", ())]}
                headers = MutableHeaders(raw=message["headers"])
                for name in list(headers):
                    if name.startswith("access-control-") or name in (*self._API, "server"):
                        del headers[name]
                page = scope["state"].get("page") and message["status"] < 400
                headers.update(self._page if page else self._API)
            await send(message)

        await self._app(scope, receive, send_secured)


class TrustedProxies:
    """Reverse proxies that may name the client on whose behalf they send a request."""

    def __init__(self, proxies: Iterable[str]) -> None:
        self._networks = [ipaddress.ip_network(proxy, strict=False) for proxy in proxies]

    def __contains__(self, peer: str) -> bool:
        address = _parse_address(peer)
        return address is not None and any(address in network for network in self._networks)

    def client_of(self, peer: str, forwarded: Iterable[str]) -> str:
        """Returns the name by which a client is counted: its IPv4 address, or the /64 network of its IPv6 address.

        Of the values of X-Forwarded-For, only what trusted proxies appended counts: the last address that is not a
        proxy's own. uvicorn's ProxyHeadersMiddleware would name a client by any text that a proxy passed on, and does
        not recognize an IPv4 proxy on a socket that listens to IPv6.
        """
        if peer in self:
            for entry in reversed([entry for value in forwarded for entry in value.split(",")]):
                if _parse_address(entry) is None:
                    break
                if entry not in self:
                    return _client_name(entry)
        return _client_name(peer)


def _parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    text = text.strip()
    if text.startswith("["):  # [2001:db8::1]:4711
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:  # 192.0.2.1:4711
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def _client_name(text: str) -> str:
    address = _parse_address(text)
    # A provider gives a household at least one /64 network of IPv6 addresses, so that is the unit that rates count.
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address) if address else "unknown"


class ClientNames:
    """Sets `scope["state"]["client"]`, and removes forwarding headers that a trusted proxy did not send."""

    # Gradio would take its own address from them.
    _FORWARDING = (b"x-forwarded", b"x-real-ip", b"forwarded", b"x-direct-url", b"x-gradio")

    def __init__(self, app: ASGIApp, proxies: TrustedProxies) -> None:
        self._app, self._proxies = app, proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = (scope.get("client") or ("", 0))[0]
        forwarded = Headers(scope=scope).getlist("x-forwarded-for")
        scope["state"]["client"] = self._proxies.client_of(peer, forwarded)
        if peer not in self._proxies:
            scope["headers"] = [pair for pair in scope["headers"] if not pair[0].startswith(self._FORWARDING)]
        await self._app(scope, receive, send)


class RateLimits:
    """Bounds the requests of each client, in any 60 seconds and at the same time."""

    # The package `limits` counts by the time of day: with a clock set back an hour, clients would wait for an hour.

    def __init__(self, app: ASGIApp, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._at_once, self._clock = app, settings.at_once, clock
        self._amounts = {SEARCH: settings.searches, IMAGE: settings.images, OTHER: settings.others}
        self.times: dict[tuple[str, str], collections.deque[float]] = {}
        """Times of the last requests, up to the number allowed, by kind and client."""
        self._open: collections.Counter[str] = collections.Counter()
        self._count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope["state"]["client"]
        if self._open[client] >= self._at_once:
            raise refusal(429, "Too many requests at once; wait for earlier answers.", {"retry-after": "1"})
        self._open[client] += 1
        try:
            route = find_route(scope["path"])
            if seconds := self._seconds_to_wait(route.kind if route else OTHER, client):
                detail = f"Too many requests; try again in {seconds} s."
                raise refusal(429, detail, {"retry-after": str(seconds)})
            await self._app(scope, receive, send)
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]

    def _seconds_to_wait(self, kind: str, client: str) -> int:
        """Counts a request and returns 0, or returns the seconds after which the client may try again."""
        now = self._clock()
        self._count += 1
        if self._count % 1000 == 0:
            self.times = {key: times for key, times in self.times.items() if times[-1] > now - 60}
        times = self.times.setdefault((kind, client), collections.deque(maxlen=self._amounts[kind]))
        if len(times) == times.maxlen and times[0] > now - 60:
            return math.ceil(times[0] + 60 - now)
        times.append(now)
        return 0


class KnownHosts:
    """Refuses requests under a name that is not the server's, which a foreign page could have made (DNS rebinding)."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str], *, name: str, any_address: bool) -> None:
        self._app, self._any_address = app, any_address
        self._hosts = {name.lower(), *LOCAL_HOSTS, *(host.lower() for host in hosts)}
        if any_address:
            own = socket.gethostname().lower()
            self._hosts |= {own, f"{own}.local", socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        # From a trusted proxy, which may pass on what a client sent; Gradio's page would load its scripts from there.
        forwarded = ",".join(headers.getlist("x-forwarded-host") + headers.getlist("x-gradio-server"))
        named = hosts + (forwarded.split(",") if forwarded else [])
        if len(hosts) != 1 or not all(map(self._is_known, named)):
            raise refusal(421, "This host name is not the server's; use its address, or start it with --names.")
        await self._app(scope, receive, send)

    def _is_known(self, url: str) -> bool:
        # Nothing beside the host, of which browsers would make another one than Python.
        netloc = re.fullmatch(r"(?:https?://)?([\w.:\[\]%-]+)/?", url.strip(), re.ASCII)
        host = (_split_url(f"//{netloc[1]}").hostname or "").lower() if netloc else ""
        # An address as the host cannot be the result of rebinding: no name server was asked.
        return "*" in self._hosts or host in self._hosts or (self._any_address and _is_address(host))


def _split_url(url: str) -> SplitResult:
    """Returns the parts of a URL, all of them empty if it is not valid."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


class KnownRoutes:
    """Refuses what is not in `ROUTES`, and sets `scope["state"]["page"]`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = find_route(scope["path"])
        if route is None:
            raise refusal(404, _NOT_FOUND)
        if scope["method"] not in route.methods:
            allowed = ", ".join(route.methods)
            raise refusal(405, f"Only {allowed} are allowed here.", {"allow": allowed})
        scope["state"]["page"] = route.page
        await self._app(scope, receive, send)


class SameOrigin:
    """Refuses POST from pages of other origins. Programs, which send no origin, are allowed."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app, self._hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in _GET and not self._is_same(Headers(scope=scope)):
            raise refusal(403, "Pages of other origins may not send requests here.")
        await self._app(scope, receive, send)

    def _is_same(self, headers: Headers) -> bool:
        if not {"same-origin", "none"}.issuperset(headers.getlist("sec-fetch-site")):
            return False
        # The scheme is not compared: it differs behind a proxy with TLS. A proxy that also changes the host name, for
        # example to localhost, serves the page under a name that the settings list.
        own = {value.lower() for value in headers.getlist("host")[:1]} | self._hosts
        return all(_split_url(origin).netloc.lower() in own for origin in headers.getlist("origin"))


class BodyLimits:
    """Reads the body of a request before the app is called, within bounds of size, time, number and total memory.

    The bodies of a client take at most as much memory as they leave free, so that no client takes all of it.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._most = settings.photo_mb * 1_000_000 + _MULTIPART
        self._memory = max(settings.bodies_mb * 1_000_000, 2 * self._most)
        self._bodies: collections.Counter[str] = collections.Counter()  # by client
        self._bytes: collections.Counter[str] = collections.Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        lengths = headers.getlist("content-length")  # at most one, and a number: h11 refuses others
        if "transfer-encoding" in headers:  # never parsed: a program could send it in chunks of a byte
            raise refusal(411, "A request must have a Content-Length, and no Transfer-Encoding.")
        if scope["method"] != "POST":
            if lengths not in ([], ["0"]):
                raise refusal(400, "Only POST requests may have a body.")
            await self._app(scope, receive, send)
            return
        if lengths and int(lengths[0]) > self._most:
            raise self._too_large()
        client = scope["state"].get("client", "")
        if self._bodies[client] >= self._settings.bodies_each:
            raise refusal(429, "Too many photos at once; wait for earlier answers.", {"retry-after": "1"})
        if self._bodies.total() >= self._settings.bodies:
            raise _too_many()
        self._bodies[client] += 1
        chunks: list[bytes] = []
        try:
            await self._read(scope, receive, client, chunks)
            chunks[:] = [b"".join(chunks)]
            messages: list[Message] = [{"type": "http.request", "body": chunks[0], "more_body": False}]

            async def replay() -> Message:
                return messages.pop() if messages else await receive()

            await self._app(scope, replay, send)
        finally:
            self._bodies[client] -= 1
            if not self._bodies[client]:
                del self._bodies[client], self._bytes[client]
            else:
                self._bytes[client] -= sum(map(len, chunks))

    async def _read(self, scope: Scope, receive: Receive, client: str, chunks: list[bytes]) -> None:
        """Appends a body to `chunks`; all that is appended is counted."""
        started, size, more = time.monotonic(), 0, True
        while more:
            deadline = started + self._settings.body_seconds + size / self._settings.body_rate
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise refusal(408, "The photo was received too slowly; try again.") from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._most:
                raise self._too_large()
            if self._bytes[client] + len(chunk) > self._memory - self._bytes.total() - len(chunk):
                raise _too_many()
            chunks.append(chunk)
            self._bytes[client] += len(chunk)
            more = message.get("more_body", False)

    def _too_large(self) -> HTTPException:
        return refusal(413, f"The photo is larger than {self._settings.photo_mb} MB; make it smaller.")


def _too_many() -> HTTPException:
    return refusal(503, "Too many photos are being received; try again in a moment.", {"retry-after": "2"})


class PageErrors:
    """Replaces the error pages of Gradio, which are meant for developers and may contain paths."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def send_unless_error(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start" and scope["state"]["page"]:
                status = message["status"]
            if status < 400:
                await send(message)

        await self._app(scope, receive, send_unless_error)
        if status >= 400:
            raise HTTPException(status, _NOT_FOUND if status < 500 else "The server could not answer.")

"""What every request passes before anything answers it, and every answer before it leaves."""

import asyncio
import ipaddress
import json
import socket
import traceback
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from cib_jax.web import framing, routes
from cib_jax.web.bodies import Bodies, Body, BodyError, GoneError
from cib_jax.web.clients import CLIENT, Clients, Rates
from cib_jax.web.limits import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_MULTIPART = 16_384  # what multipart/form-data may add to a photo

# Gradio's page holds its config in a script, and turns the functions of its events into programs in the browser.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; manifest-src 'self'; "
    "worker-src 'self' blob:; base-uri 'self'; form-action 'none'; "
)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
_OWN_FRAMES = (b"x-frame-options", b"SAMEORIGIN")
_API_HEADERS = ((b"content-security-policy", b"default-src 'none'; frame-ancestors 'self'; sandbox"), _OWN_FRAMES)
# Gradio allows other origins to read, and an answer of ours allows none.
_DROPPED = frozenset({*(name for name, _ in (*_HEADERS, _OWN_FRAMES)), b"content-security-policy", b"server"})


class _RefusedError(Exception):
    def __init__(self, status: int, sentence: str, *, after: int = 0, allow: str = "", close: bool = False) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.close = status, sentence, close
        self.headers = [(b"retry-after", str(after).encode())] if after else []
        self.headers += [(b"allow", allow.encode())] if allow else []


class Guard:
    """ASGI middleware: only what `routes` names, within `limits`, from a page of the same origin.

    Errors are JSON, {"error": a sentence}, with no traceback and no path of this machine.
    """

    def __init__(self, app: App, limits: Limits, *, loopback: bool, name: str = "localhost") -> None:
        """Stands before an app.

        Args:
          app: any of ASGI.
          limits: of what is taken.
          loopback: whether the server can be reached from this machine alone.
          name: under which it listens, and may be asked.

        Raises:
          ProxyError: a proxy is no address.
          FrameError: what may frame the page is no origin.
        """
        self._app, self._limits = app, limits
        self._hosts = {name.lower(), *LOCAL_HOSTS, *(host.lower() for host in limits.hosts)}
        self._addresses = not loopback and not limits.hosts
        if self._addresses:
            own = socket.gethostname().lower()
            self._hosts |= {own, f"{own}.local", socket.getfqdn().lower()}
        self._page_headers = [(b"content-security-policy", (_PAGE_POLICY + framing.ancestors(limits.frames)).encode())]
        if not limits.frames:  # the older header, for older browsers, can name no origin
            self._page_headers.append(_OWN_FRAMES)
        self._clients = Clients(limits.proxies)
        amounts = {routes.SEARCH: limits.searches, routes.IMAGE: limits.images, routes.OTHER: limits.others}
        self._rates = Rates(amounts, limits.at_once)
        self._bodies = Bodies(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, by the app or with an error."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        peer = (scope.get("client") or ("", 0))[0]
        client = self._clients.name(peer, _values(scope, b"x-forwarded-for"))
        if not self._rates.enter(client):
            told = "Too many requests at once; wait for the answers to some."
            await _refuse(send, _RefusedError(429, told, after=1, close=True), head=scope["method"] == "HEAD")
            return
        body: Body | None = None
        begun = False

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            route = self._checked(scope, client)
            if not self._clients.is_proxy(peer):
                _forget_forwarding(scope)
            if scope["method"] == "POST":
                if _values(scope, b"transfer-encoding") and _values(scope, b"content-length"):
                    raise _RefusedError(400, "A body has a length or comes in chunks, not both.", close=True)
                length = next(iter(_values(scope, b"content-length")), None)
                body = await self._bodies.read(receive, length, self._limits.photo_mb * 1_000_000 + _MULTIPART)
            elif _values(scope, b"transfer-encoding") or _values(scope, b"content-length") not in ([], ["0"]):
                raise _RefusedError(400, "A request of this kind has no body.", close=True)
            scope["state"] = {**scope.get("state", {}), CLIENT: client}
            await self._answer(route, scope, _replayed(body, receive), noted)
        except _RefusedError as refused:
            await _refuse(send, refused, head=scope["method"] == "HEAD")
        except BodyError as error:
            # What is still to come is not read, so nothing else can come over this connection.
            await _refuse(send, _RefusedError(error.status, error.sentence, close=True), head=False)
        except GoneError:
            return
        except asyncio.CancelledError:  # only as the server ends
            if begun:
                raise
            await _refuse(send, _RefusedError(503, "The server is stopping.", close=True), head=False)
        finally:
            if body is not None:
                body.release()
            self._rates.leave(client)

    def _checked(self, scope: Scope, client: str) -> routes.Route:
        """Returns the route of a request.

        Raises:
          _RefusedError: it is not answered.
        """
        route = routes.find(scope["path"])
        if wait := self._rates.seconds_to_wait(route.kind if route else routes.OTHER, client):
            raise _RefusedError(429, f"Too many requests; try again in {wait} s.", after=wait, close=True)
        if not self._is_known(_host(scope)):
            told = "This server does not know the name it was asked by; ask by its address, or start it with --names."
            raise _RefusedError(421, told, close=True)
        if route is None:
            raise _RefusedError(404, "There is nothing here.")
        if scope["method"] not in route.methods:
            allowed = ", ".join(route.methods)
            raise _RefusedError(405, f"Only {allowed} are answered here.", allow=allowed, close=True)
        if scope["method"] not in ("GET", "HEAD") and not _same_origin(scope, self._limits.hosts):
            raise _RefusedError(403, "A page of another origin may not ask for this.", close=True)
        return route

    def _is_known(self, host: str) -> bool:
        # No name server can make an address point elsewhere.
        return host in self._hosts or "*" in self._hosts or (self._addresses and _is_address(host))

    async def _answer(self, route: routes.Route, scope: Scope, receive: Receive, send: Send) -> None:
        begun, silent = False, False

        async def guarded(message: Any) -> None:
            nonlocal begun, silent
            if message["type"] == "http.response.start":
                begun = True
                if route.page and message["status"] >= 400:
                    # Written by Gradio, for whoever develops a page, and maybe with paths.
                    silent = True
                    told = "There is nothing here." if message["status"] < 500 else "The server could not answer."
                    await _refuse(send, _RefusedError(message["status"], told), head=scope["method"] == "HEAD")
                    return
                of_page = self._page_headers if route.page else _API_HEADERS
                message = {**message, "headers": _secured(message.get("headers", ()), of_page)}
            if not silent:
                await send(message)

        try:
            await self._app(scope, receive, guarded)
        except Exception:
            traceback.print_exc()  # for whoever runs the server
            if begun:
                raise  # which closes the connection
            raise _RefusedError(500, "The server could not answer; whoever runs it finds why in its log.") from None


def _replayed(body: Body | None, receive: Receive) -> Receive:
    if body is None:
        return receive
    first = True

    async def replay() -> Any:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body.content, "more_body": False}
        return await receive()

    return replay


async def _refuse(send: Send, refused: _RefusedError, *, head: bool) -> None:
    content = json.dumps({"error": refused.sentence}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"cache-control", b"no-store"),
        *refused.headers,
        *([(b"connection", b"close")] if refused.close else []),
    ]
    headers = _secured(headers, _API_HEADERS)
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if head else content})


def _secured(headers: Any, of_kind: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    kept = [
        (name, value)
        for name, value in ((bytes(name).lower(), bytes(value)) for name, value in headers)
        if name not in _DROPPED and not name.startswith(b"access-control-")
    ]
    return [*kept, *_HEADERS, *of_kind]


def _forget_forwarding(scope: Scope) -> None:
    """Removes what only a proxy may say: Gradio would take its own address from it."""
    scope["headers"] = [
        (name, value)
        for name, value in scope["headers"]
        if not name.startswith((b"x-forwarded", b"x-real-ip", b"forwarded", b"x-direct-url", b"x-gradio"))
    ]


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for found, value in scope["headers"] if found == name]


def _host(scope: Scope) -> str:
    values = _values(scope, b"host")
    if len(values) != 1:
        return ""
    try:
        return (urlsplit(f"//{values[0]}").hostname or "").lower()
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _same_origin(scope: Scope, names: Iterable[str]) -> bool:
    """Returns whether a page of this server asks, by its address or a name, or no page at all, such as a program."""
    sites = _values(scope, b"sec-fetch-site")
    if any(site not in ("same-origin", "none") for site in sites):
        return False
    origins, hosts = _values(scope, b"origin"), _values(scope, b"host")
    if not hosts:
        return not origins
    # By name and port alone: behind a proxy that does TLS, the scheme is another here. One that also asks by another
    # name than it was asked by, such as localhost, serves the page under a name that was given.
    own = {name.lower() for name in names}
    return all(_netloc(origin) == hosts[0].lower() or _netloc(origin) in own for origin in origins)


def _netloc(origin: str) -> str:
    """Returns name and port of an origin; "" where it is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""

"""HTTP server of a photo collection, which runs until SIGTERM or SIGINT. TLS and passwords need a reverse proxy."""

import asyncio
import collections
import contextlib
import errno
import ipaddress
import logging
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import fastapi
import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from cib_jax.errors import UserError, WebError
from cib_jax.web import api
from cib_jax.web.api import Collection
from cib_jax.web.decode_pool import DecodePool
from cib_jax.web.middleware import TrustedProxies, protect
from cib_jax.web.settings import Settings, flag_error

Page = Callable[[fastapi.FastAPI, Collection], None]
"""Function that adds the search page to the app, behind the API's routes."""


def serve(
    collection: Collection,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    page: Page | None = None,
    renew: Callable[[Any], Collection] | None = None,
    settings: Settings | None = None,
    print_line: Callable[[str], None] = print,
) -> None:
    """Serves a collection until the process receives SIGTERM or SIGINT, after which it ends within seconds.

    `page` adds the search page to the API. `renew` returns the collection with what was indexed meanwhile; it is called
    twice a minute. Port 0 is any free port; the hosts "0.0.0.0" and "::" are all addresses of this machine.

    Raises:
      WebError: The port is in use, or the host is not an address of this machine.
      DecoderError: No decode process can be started.
    """
    settings = settings or Settings()
    with listening(host, port) as listener, DecodePool(settings) as decoders:
        loopback = is_loopback(listener)
        app = api.create_app(collection, settings, decoders)
        try:
            if page is not None:
                page(app, collection)
            server = create_server(protect(app, settings, loopback=loopback, name=host), settings)
            for line in format_startup(listener, collection):
                print_line(line)
            with _quiet_shutdown(), renewing(app.state.api, renew, print_line):
                server.run([listener])
        finally:
            app.state.api.close()


@contextlib.contextmanager
def renewing(
    served: api.Api,
    renew: Callable[[Any], Collection] | None,
    print_line: Callable[[str], None],
    *,
    seconds: float = 30.0,
) -> Iterator[None]:
    """Replaces the collection that an API serves, at intervals and when a read fails, by what `renew` returns for it.

    Changes are printed, and a lasting error once. `renew` returns the same object if nothing changed. If it is None,
    nothing is done.
    """
    if renew is None:
        yield
        return
    ended, lock, printed = threading.Event(), threading.Lock(), ""

    def renew_now(known: Collection) -> None:
        nonlocal printed
        with lock:
            if served.collection is not known:
                return  # another thread has replaced it
            try:
                collection, message = renew(known), ""
                if collection is not known:
                    served.replace(collection)
                    print_line(f"{api.format_count(collection)} now")
            except UserError as error:
                message = f"The index cannot be read again, so changes are not served: {error}"
                if message != printed:
                    print_line(message)
            except Exception:  # a temporary failure must not end this thread
                message = printed
                traceback.print_exc()
            printed = message

    def watch() -> None:
        while not ended.wait(seconds):
            renew_now(served.collection)

    served.renew = renew_now
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        served.renew = None
        thread.join(1)


_MOST_HEAD = 16_384
"""Largest head of a request, in bytes."""


def create_server(app: ASGIApp, settings: Settings) -> uvicorn.Server:
    """Returns a server that bounds the number of connections, and the time that a client may keep one idle."""
    shared = {
        "settings": settings,
        "proxies": TrustedProxies(settings.proxies),
        "open": collections.Counter(),
        "made": collections.Counter(),
    }
    config = uvicorn.Config(
        app,
        http=type("Protocol", (_BoundedProtocol,), shared),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.connections,
        h11_max_incomplete_event_size=_MOST_HEAD,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=3,
        backlog=256,
    )
    return uvicorn.Server(config)


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yields a listening socket; raises a WebError if the host or the port cannot be used."""
    if not 0 <= port <= 65_535:
        raise flag_error("port", f"from 1 to 65535, or 0 for any free port, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise _unusable_host(host, "unknown name") from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(256)
        except OSError as error:
            allowed = {
                errno.EADDRINUSE: f"free, but {port} is in use; give another one, or end the program that uses it",
                errno.EACCES: f"at least 1024 for users without special rights, got {port}",
            }.get(error.errno or 0)
            if allowed is None:
                raise _unusable_host(host, str(error.strerror)) from None
            raise flag_error("port", allowed) from None
        yield listener


def _unusable_host(host: str, reason: str) -> WebError:
    return flag_error("host", f"an address of this machine, got {host!r} ({reason}); try 127.0.0.1")


def is_loopback(listener: socket.socket) -> bool:
    """Returns whether a socket can be reached from this machine only."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def format_startup(listener: socket.socket, collection: Collection) -> list[str]:
    """Returns the lines that are printed at the start: the address and, on a network, a warning."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host = _network_address(listener.family) or host
    name = f"[{host}]" if ":" in host else host
    lines = [f"{api.format_count(collection)} at http://{name}:{port}/ ; Ctrl-C ends."]
    if not is_loopback(listener):
        lines.append(
            f"Everyone who can reach this machine can search and see all photos under {collection.root}, unencrypted "
            "and without a password: use a reverse proxy with TLS, or leave --host at 127.0.0.1."
        )
    return lines


def _network_address(family: int) -> str:
    """Returns the address under which other machines probably reach this one, "" if there is none."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        # Nothing is sent; connecting only selects a route. Both addresses are for documentation (RFC 5737, RFC 3849).
        probe.connect(("192.0.2.1" if family == socket.AF_INET else "2001:db8::1", 9))
        return str(probe.getsockname()[0])
    return ""


@contextlib.contextmanager
def _quiet_shutdown() -> Iterator[None]:
    """Swallows the signals that uvicorn re-raises on shutdown, and its cancellation messages."""
    logging.getLogger("uvicorn.error").addFilter(lambda record: not str(record.msg).startswith("Cancel "))
    with contextlib.ExitStack() as restored:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                restored.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        yield


def _count_down(counter: "collections.Counter[str]", name: str) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]


class _Connection(h11.Connection):
    """Parser of requests that never reads a body in chunks, which `BodyLimits` refuses.

    Parsing 256 KB of the smallest chunks would take a second, for which all other clients would wait.
    """

    in_chunks = False
    """Whether the last request has such a body."""

    def next_event(self) -> Any:
        event = h11.NEED_DATA if self.in_chunks else super().next_event()
        if isinstance(event, h11.Request):
            self.in_chunks = any(name == b"transfer-encoding" for name, _ in event.headers)
        return event


class _BoundedProtocol(H11Protocol):
    """Closes a connection of a client that has too many, is slow to send a request, or does not read its answer."""

    conn: _Connection
    settings: Settings
    proxies: TrustedProxies
    open: "collections.Counter[str]"
    """Open connections of each client."""
    made: "collections.Counter[str]"
    """Connections of each client that were accepted in the last second: a refused client may connect anew at once."""
    _client_name: str | None = None
    _last_cycle: Any = None
    """uvicorn's state of the request that was received last."""

    def __init__(self, config: uvicorn.Config, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self.conn = _Connection(h11.SERVER, _MOST_HEAD)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._close_after("head", self.settings.head_seconds)
        peer = self.client[0] if self.client else ""
        if peer not in self.proxies:
            self._client_name = self.proxies.client_of(peer, ())
            self.open[self._client_name] += 1
            most = self.settings.at_once
            if self.open[self._client_name] > most or self.made[self._client_name] >= max(
                most, self.settings.others // 60
            ):
                self.connections.discard(self)  # or it would count as one of all connections until the next turn
                transport.abort()
            else:
                self.made[self._client_name] += 1
                self.loop.call_later(1, _count_down, self.made, self._client_name)

    def connection_lost(self, exc: Exception | None) -> None:
        self._close_after("head", None)
        self._close_after("write", None)
        if self._client_name is not None:
            _count_down(self.open, self._client_name)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.in_chunks:
            self.transport.pause_reading()
        if self.cycle is not self._last_cycle:  # the head of a request is complete
            self._close_after("head", None)
            self._last_cycle = self.cycle

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        self._last_cycle = self.cycle
        if self.cycle is answered:  # otherwise the head of the next request is complete already
            # Also between two requests; for an idle connection, uvicorn has a shorter timer of its own.
            self._close_after("head", self.settings.head_seconds)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._close_after("write", self.settings.taking_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._close_after("write", None)

    def _close_after(self, awaited: str, seconds: float | None) -> None:
        """Closes the connection unless the head of a request or the end of a write comes in time; None cancels this."""
        if timer := self._timers.pop(awaited, None):
            timer.cancel()
        if seconds is not None:
            self._timers[awaited] = self.loop.call_later(seconds, self.transport.abort)

"""A collection served over HTTP, until SIGTERM or SIGINT ends it. TLS and passwords are a reverse proxy's."""

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
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cib_jax.errors import UserError
from cib_jax.web import api
from cib_jax.web.answers import Collection
from cib_jax.web.clients import Clients
from cib_jax.web.guard import Guard
from cib_jax.web.limits import Limits

Page = Callable[[fastapi.FastAPI, Collection], None]
"""Adds the search page to the app, behind the API's routes."""

_HEAD = 16_384
_KEEP_ALIVE = 10
_GRACE = 3
_RENEW_EVERY = 30.0


class BindError(UserError):
    """The server cannot listen where it was told to."""


def serve(
    collection: Collection,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    page: Page | None = None,
    renew: Callable[[Collection], Collection] | None = None,
    limits: Limits | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Serves a collection until the process gets SIGTERM or SIGINT, which it takes seconds to follow.

    Args:
      collection: what is searched.
      host: name or address to listen at; "0.0.0.0" and "::" are all of this machine.
      port: 0 takes one that is free.
      page: adds the search page.
      renew: returns the collection as it is now, asked twice a minute; None: it never changes.
      limits: of what is taken; None: the defaults.
      tell: is told, in a few lines, where the server is and what that means.

    Raises:
      BindError: the port is in use, or the host is none of this machine.
      ProxyError: of `limits.proxies`, one is no address.
      FrameError: of `limits.frames`, one is no origin.
      DecoderError: no process that decodes can be started.
    """
    limits = limits or Limits()
    with listening(host, port) as listener:
        loopback = _is_loopback(listener)
        app = api.create(collection, limits)
        try:
            if page is not None:
                page(app, collection)
            server = server_of(Guard(app, limits, loopback=loopback, name=host), limits)
            for line in told(listener, collection, loopback=loopback):
                tell(line)
            with _quiet_ending(), _renewing(app.state.api, renew, tell):
                server.run([listener])
        finally:
            app.state.api.close()


@contextlib.contextmanager
def _renewing(
    served: api.Api, renew: Callable[[Collection], Collection] | None, tell: Callable[[str], None]
) -> Iterator[None]:
    """Has what is indexed meanwhile served, too, while the context lasts."""
    ended = threading.Event()

    def watch(renew: Callable[[Collection], Collection]) -> None:
        while not ended.wait(_RENEW_EVERY):
            try:
                collection = renew(served.collection)
            except UserError as error:
                tell(f"What was indexed meanwhile is not served yet: {error}")
                continue
            except Exception:  # else nothing would be renewed any more
                traceback.print_exc()
                continue
            if collection is not served.collection:
                served.take(collection)
                tell(f"{len(collection):,} photos now")

    watching = threading.Thread(target=watch, args=(renew,), daemon=True) if renew else None
    if watching:
        watching.start()
    try:
        yield
    finally:
        ended.set()
        if watching:
            watching.join(1)


def server_of(app: Any, limits: Limits) -> uvicorn.Server:
    """Returns a server whose connections are bounded in number, and in how long they may say nothing."""
    shared = {"limits": limits, "clients": Clients(limits.proxies), "held": collections.Counter()}
    protocol = type("Protocol", (_Impatient,), shared)
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        h11_max_incomplete_event_size=_HEAD,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
        backlog=256,
    )
    return uvicorn.Server(config)


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yields a socket that is bound.

    Raises:
      BindError: it cannot be.
    """
    if not 0 <= port <= 65_535:
        raise BindError(f"--port: {port} is none; give one from 1 to 65535, or 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise BindError(f"--host: {host!r} is not known; give an address of this machine, such as 127.0.0.1") from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(256)
        except OSError as error:
            raise BindError(_why(error, host, port)) from None
        yield listener


def check_free(host: str, port: int) -> None:
    """Checks, before anything is prepared, that the server can listen there.

    Raises:
      BindError: it cannot.
    """
    with listening(host, port):
        pass


def told(listener: socket.socket, collection: Collection, *, loopback: bool) -> list[str]:
    """Returns what is told at the start."""
    host, port = listener.getsockname()[:2]
    everywhere = ipaddress.ip_address(host.partition("%")[0]).is_unspecified
    host = _outward(listener.family) or host if everywhere else host
    name = f"[{host}]" if ":" in host else host
    lines = [f"{len(collection):,} photos at http://{name}:{port}/ ; Ctrl-C ends."]
    if not loopback:
        lines.append(
            f"Everyone who can reach this machine can search and see all photos under {collection.root}, unencrypted "
            "and without a password: put a reverse proxy with TLS before it, or leave the host at 127.0.0.1."
        )
    return lines


def _outward(family: int) -> str:
    """Returns the address by which others reach this machine, as far as it can tell; "" where it cannot."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        # Nothing is sent: only the way there is looked up. Both are kept for documentation (RFC 5737, RFC 3849).
        probe.connect(("192.0.2.1" if family == socket.AF_INET else "2001:db8::1", 9))
        return str(probe.getsockname()[0])
    return ""


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port: {port} is in use by another program; give another port, or end that program"
    if error.errno == errno.EACCES:
        return f"--port: {port} may be used by the system's own programs alone; give one from 1024 on"
    return f"--host: {host!r} is no address of this machine ({error.strerror}); give one, such as 127.0.0.1"


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


@contextlib.contextmanager
def _quiet_ending() -> Iterator[None]:
    """Lets signals end the server and nothing else: it sends them again once it has ended, and tells of all it cut."""
    logging.getLogger("uvicorn.error").addFilter(_says_more_than_that_it_ends)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _says_more_than_that_it_ends(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Cancel ")


class _Impatient(H11Protocol):
    """Closes connections of a client who has too many, sends no whole head in time, or takes no answer."""

    limits: Limits
    clients: Clients
    held: "collections.Counter[str]"
    _whose: str | None = None
    _head: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None
    _seen: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        peer = self.client[0] if self.client else ""
        self._await_head()
        if not self.clients.is_proxy(peer):
            self._whose = self.clients.name(peer, ())
            self.held[self._whose] += 1
            if self.held[self._whose] > self.limits.at_once:
                transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._head)
        _stop(self._taking)
        if self._whose is not None:
            self.held[self._whose] -= 1
            if not self.held[self._whose]:
                del self.held[self._whose]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not self._seen:  # a head has come
            _stop(self._head)
            self._seen = self.cycle

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()
        self._seen = self.cycle
        if self.cycle is answered:  # else the next head had come already
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        _stop(self._taking)
        self._taking = self.loop.call_later(self.limits.taking_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._taking)

    def _await_head(self) -> None:
        # Runs also while nothing comes between two requests, for which the server has its own, shorter time.
        _stop(self._head)
        self._head = self.loop.call_later(self.limits.head_seconds, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()

"""Servers in a thread of the test's own process, on a free port of the loopback interface."""

import contextlib
import dataclasses
import functools
import http.client
import json
import select
import socket
import sys
import threading
import time

import pytest

from cib_jax.web import api, server
from cib_jax.web.decode_pool import DecodePool
from cib_jax.web.middleware import protect
from cib_jax.web.settings import Settings
from tests.web import fake

OPEN = Settings(searches=10**6, images=10**6, others=10**6, decode_processes=2)
"""Settings for tests of other things than rates."""
HOSTILE = (sys.executable, "-P", "-m", "tests.web.hostile_worker")
"""Command of a decode process that does what a photo says."""


class Served:
    """A server that runs, and requests to it."""

    def __init__(self, port, api, collection, server):
        self.port, self.api, self.collection, self.server = port, api, collection, server

    def connection(self, timeout=120):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def socket(self):
        return socket.create_connection(("127.0.0.1", self.port), 120)

    def ask(self, path, method="GET", body=None, headers=()):
        """Returns status, headers and content of one request over a connection of its own."""
        connection = self.connection()
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def json(self, path, **request):
        status, _, content = self.ask(path, **request)
        return status, json.loads(content)


def raw(served, *parts: bytes, wait: float = 0.0) -> bytes:
    """Returns all that the server answers to bytes, which are sent with pauses until it closes the connection."""
    received = b""
    with served.socket() as connection:
        try:
            for part in parts:
                connection.sendall(part)
                # Read at once: when the server resets the connection, what was not read before is lost.
                if select.select([connection], [], [], wait)[0]:
                    received += connection.recv(1 << 16)
            while more := connection.recv(1 << 16):
                received += more
        except (ConnectionResetError, BrokenPipeError):
            pass
    return received


def until(condition, seconds: float = 60) -> None:
    """Returns when `condition()` is true; fails if it stays false."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def status_of(answer: bytes) -> int:
    """Returns the status of an answer, 0 for a connection that was closed without one."""
    return int(answer.split(b" ", 2)[1]) if answer else 0


@contextlib.contextmanager
def run_server(collection, settings=OPEN, *, decoders, page=None, loopback=True):
    with server.listening("127.0.0.1", 0) as listener:
        app = api.create_app(collection, settings, decoders)
        if page is not None:
            page(app, collection)
        running = server.create_server(protect(app, settings, loopback=loopback), settings)
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        until(lambda: running.started)
        try:
            yield Served(listener.getsockname()[1], app.state.api, collection, running)
        finally:
            running.should_exit = True
            thread.join()
            app.state.api.close()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    fake.fill(root)
    return root


@pytest.fixture(scope="session")
def collection(photos):
    """A collection that no test changes."""
    return fake.FakeCollection(photos)


@pytest.fixture(scope="session")
def decoders():
    with DecodePool(OPEN) as decoders:
        yield decoders


@pytest.fixture(scope="session")
def hostile_decoders():
    """One process that does what a photo says."""
    settings = Settings(decode_processes=1, decode_seconds=2, decode_memory_mib=1024)
    with DecodePool(settings, worker=HOSTILE) as decoders:
        yield decoders


@pytest.fixture(scope="session")
def running(decoders):
    """Context manager of a server for a collection; all servers share their decode processes."""
    return functools.partial(run_server, decoders=decoders)


@pytest.fixture(scope="module")
def served(running, collection):
    with running(collection) as served:
        yield served


@pytest.fixture
def few():
    """Limits small enough to reach."""
    return dataclasses.replace(OPEN, photo_mb=1, bodies=4, bodies_mb=2, body_seconds=1)

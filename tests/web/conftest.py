"""Servers in a thread of the test's own process, on a free port of the loopback."""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time

import pytest

from cib_jax.web import api, server
from cib_jax.web.decoding import Decoding
from cib_jax.web.guard import Guard
from cib_jax.web.limits import Limits
from tests.web import fake

MANY = Limits(searches=10**6, images=10**6, others=10**6)
"""For tests of something else than rates."""


class Running:
    def __init__(self, port, app, collection, guard, serving):
        self.port, self.app, self.collection, self.guard, self.serving = port, app, collection, guard, serving

    def connection(self, timeout=120):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, path, method="GET", body=None, headers=()):
        """Returns status, headers and content of one request over a connection of its own."""
        connection = self.connection()
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def json(self, path, **how):
        status, _, content = self.ask(path, **how)
        return status, json.loads(content)


def raw(served, *parts: bytes, wait: float = 0.0, timeout: float = 120) -> bytes:
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


def until(holds, seconds: float = 60) -> None:
    """Returns when `holds()`, as what a server has come to is seen from outside; fails where it does not."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def status_of(said: bytes) -> int:
    return int(said.split(b" ", 2)[1]) if said else 0


@contextlib.contextmanager
def running(collection, limits=MANY, *, page=None, work="", loopback=True):
    with server.listening("127.0.0.1", 0) as listener:
        app = api.create(collection, limits, work=work)
        if page is not None:
            page(app, collection)
        guard = Guard(app, limits, loopback=loopback)
        serving = server.server_of(guard, limits)
        thread = threading.Thread(target=serving.run, args=([listener],))
        thread.start()
        until(lambda: serving.started)
        try:
            yield Running(listener.getsockname()[1], app, collection, guard, serving)
        finally:
            serving.should_exit = True
            thread.join()
            app.state.api.close()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    fake.fill(root)
    return root


@pytest.fixture(scope="module")
def served(photos):
    with running(fake.FakeCollection(photos)) as found:
        yield found


@pytest.fixture
def few():
    """Limits small enough to reach."""
    return dataclasses.replace(MANY, photo_mb=1, bodies=4, bodies_mb=2, body_seconds=1, decoding=Decoding(processes=1))

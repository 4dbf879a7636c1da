"""Bounds on bodies, connections and rates, tried over real connections."""

import asyncio
import dataclasses
import json
import socket
import threading

import pytest
from starlette.responses import PlainTextResponse

from cib_jax.web.decoding import BusyError, Decoding
from cib_jax.web.threads import Threads
from tests.web import fake
from tests.web.conftest import MANY, raw, running, status_of, until


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
        until(lambda: status_of(raw(served, post("5", "Connection: close"), b"hello")) == 503)
        for connection in slow:
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
            connection.close()
        full = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(3)]
        for connection in full[:2]:
            connection.sendall(post("1000000") + bytes(900_000))
        until(lambda: served.guard._bodies._bytes == 1_800_000)
        full[2].sendall(post("1000000") + bytes(900_000))
        assert full[2].recv(100).startswith(b"HTTP/1.1 503")
        for connection in full:
            connection.close()
        until(lambda: not served.guard._bodies._count)
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
        until(lambda: len(served.serving.server_state.connections) == 5)
        assert raw(served, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
        for connection in idle:
            connection.close()
        until(lambda: not served.serving.server_state.connections)
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


def test_one_client_behind_a_proxy_has_so_many_requests_at_once(photos, few):
    limits = dataclasses.replace(few, at_once=2, bodies=100, body_seconds=60, proxies=("127.0.0.1",))
    slow = post("1000", "X-Forwarded-For: 192.0.2.1")
    with running(fake.FakeCollection(photos), limits) as served:
        held = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(2)]
        for connection in held:
            connection.sendall(slow)
        until(lambda: served.guard._bodies._count == 2)
        assert served.ask("/health", headers={"X-Forwarded-For": "192.0.2.1"})[0] == 429
        assert served.ask("/health", headers={"X-Forwarded-For": "192.0.2.2"})[0] == 200
        for connection in held:
            connection.close()
        until(lambda: not served.guard._bodies._count)
        assert served.ask("/health", headers={"X-Forwarded-For": "192.0.2.1"})[0] == 200


def test_what_cannot_be_done_now_is_told_at_once(photos):
    collection = fake.FakeCollection(photos)
    limits = dataclasses.replace(MANY, threads=1, waiting=0)
    content, first = fake.encoded(fake.picture(1)), []
    with running(collection, limits) as served:
        with collection.encoding:
            asking = threading.Thread(
                target=lambda: first.append(served.ask("/search", method="POST", body=content)[0])
            )
            asking.start()
            until(lambda: not served.app.state.api._searches._free)
            status, headers, told = served.ask("/search", method="POST", body=content)
            assert (status, headers["retry-after"]) == (503, "2")
            assert "too much to do" in json.loads(told)["error"]
            assert served.ask("/search?k=1")[0] == 200  # what needs no encoder goes on
        asking.join()
        assert first == [200]


def test_a_client_that_takes_no_answer_is_cut_off(photos):
    def page(app, collection):
        app.add_route("/config", lambda request: PlainTextResponse(bytes(50_000_000)))

    limits = dataclasses.replace(MANY, taking_seconds=1)
    with running(fake.FakeCollection(photos), limits, page=page) as served:
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(b"GET /config HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until(lambda: served.serving.server_state.connections)
            until(lambda: not served.serving.server_state.connections)
            came = 0
            try:
                while more := connection.recv(1 << 20):
                    came += len(more)
            except ConnectionResetError:
                pass
        assert came < 50_000_000
        assert len(served.ask("/config")[2]) == 50_000_000  # who takes it gets it all


def test_one_client_with_many_slow_photos_keeps_no_other_waiting(photos):
    decoding = Decoding(processes=1, seconds=1)
    limits = dataclasses.replace(MANY, decoding=decoding, proxies=("127.0.0.1",))
    done, content = [], fake.encoded(fake.picture(1))
    with running(fake.FakeCollection(photos), limits, work="tests.web.hostile:by_content") as served:

        def send(client, body):
            status = served.ask("/search", method="POST", body=body, headers={"X-Forwarded-For": client})[0]
            done.append((client, status))

        slow = [threading.Thread(target=send, args=("192.0.2.1", b"hang ")) for _ in range(4)]
        for thread in slow:
            thread.start()
        until(lambda: served.app.state.api._decoding._count >= 3)
        send("192.0.2.2", content)
        assert done[-1] == ("192.0.2.2", 200)
        assert len(done) <= 3  # after the one that was being decoded, not after all four
        for thread in slow:
            thread.join()
        assert sorted(done) == [("192.0.2.1", 422)] * 4 + [("192.0.2.2", 200)]


def test_threads_are_given_to_clients_in_turn():
    """Against the order that rounds over the clients give, with one thread and a call that holds it."""

    async def ordered():
        threads, order, go = Threads(1, 10, "test", patience=5), [], threading.Event()
        first = asyncio.ensure_future(threads.run("a", go.wait))
        await asyncio.sleep(0.01)
        calls = [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("c", 1), ("b", 2)]
        waiting = [asyncio.ensure_future(threads.run(client, order.append, (client, n))) for client, n in calls]
        await asyncio.sleep(0.01)
        waiting.pop(1).cancel()  # who is gone takes no turn
        go.set()
        await asyncio.gather(first, *waiting)
        assert (threads._free, threads._count, len(threads._waiting)) == (1, 0, 0)
        threads.close()
        return order

    assert asyncio.run(ordered()) == [("a", 1), ("b", 1), ("c", 1), ("a", 3), ("b", 2)]


def test_who_waits_too_long_for_a_thread_is_sent_away():
    async def told():
        threads, go = Threads(1, 1, "test", patience=0.05), threading.Event()
        first = asyncio.ensure_future(threads.run("a", go.wait))
        await asyncio.sleep(0.01)
        second = asyncio.ensure_future(threads.run("b", int))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await threads.run("c", int)
        with pytest.raises(BusyError):
            await second
        go.set()
        await first
        assert await threads.run("c", int) == 0
        threads.close()

    asyncio.run(told())

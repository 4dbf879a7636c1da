"""Who a client is, and the window in which what it asks for is counted."""

import time

import pytest

from cib_jax.web.clients import Clients, ProxyError, Rates


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
    with pytest.raises(ProxyError, match="--proxies: 'nginx' is no address or network"):
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


def test_who_asks_no_more_is_forgotten(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    rates = Rates({"a": 10**9}, at_once=2)
    for number in range(5000):
        rates.seconds_to_wait("a", f"10.0.{number // 256}.{number % 256}")
    assert len(rates._storage.events) == 5000
    now[0] += 61
    deadline = time.monotonic() + 20
    while len(rates._storage.events) > 1 and time.monotonic() < deadline:
        for _ in range(1000):
            rates.seconds_to_wait("a", "x")
        time.sleep(0.02)
    assert len(rates._storage.events) == 1

"""Who a client is, and how much one may ask for."""

import collections
import ipaddress
import math
import time
from collections.abc import Iterable

import limits as limits_lib
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from cib_jax.errors import UserError

CLIENT = "client"
"""Under which a request's state holds who asks."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_TIDY_EVERY = 1000
_NEIGHBOURS = 64  # one house has a whole /64 of IPv6


class ProxyError(UserError):
    """What is named as a proxy is no address."""


class Clients:
    """Tells clients apart by their addresses."""

    def __init__(self, proxies: Iterable[str]) -> None:
        """Takes the addresses or networks of reverse proxies.

        Raises:
          ProxyError: one is none.
        """
        self._proxies: list[Network] = []
        for proxy in proxies:
            try:
                self._proxies.append(ipaddress.ip_network(proxy, strict=False))
            except ValueError:
                raise ProxyError(
                    f"--proxies: {proxy!r} is no address or network; give for example 10.0.0.2 or 10.0.0.0/24"
                ) from None

    def is_proxy(self, peer: str) -> bool:
        """Returns whether the address is that of a proxy that may be believed."""
        address = _address(peer)
        return address is not None and any(address in network for network in self._proxies)

    def name(self, peer: str, forwarded: Iterable[str]) -> str:
        """Returns by what a client is known: its address, of IPv6 the first half.

        Args:
          peer: the address that is connected.
          forwarded: values of X-Forwarded-For, each maybe a list; of them, only what proxies added themselves counts:
            the last address that is no proxy's.
        """
        if not self.is_proxy(peer):
            return _name(peer)
        through = [one.strip() for value in forwarded for one in value.split(",")]
        for one in reversed(through):
            if _address(one) is None:
                break
            if not self.is_proxy(one):
                return _name(one)
        return _name(peer)


class Rates:
    """Counts what clients ask for, by kind, in a window that moves."""

    def __init__(self, per_minute: dict[str, int], at_once: int) -> None:
        self._items = {kind: limits_lib.RateLimitItemPerMinute(amount) for kind, amount in per_minute.items()}
        self._storage = MemoryStorage()
        self._strategy = MovingWindowRateLimiter(self._storage)
        self._hits, self._at_once = 0, at_once
        self._now: collections.Counter[str] = collections.Counter()

    def seconds_to_wait(self, kind: str, client: str) -> int:
        """Returns 0, and counts the request, or the seconds after which the client may ask again."""
        item = self._items[kind]
        self._hits += 1
        if self._hits % _TIDY_EVERY == 0:
            self._forget_idle()
        if self._strategy.hit(item, kind, client):
            return 0
        reset, _ = self._strategy.get_window_stats(item, kind, client)
        return max(1, math.ceil(reset - time.time()))

    def _forget_idle(self) -> None:
        # The library empties what it counted of a client but keeps the client, and goes through all of them each time.
        storage = self._storage
        for key in [key for key, events in storage.events.copy().items() if not events]:
            storage.clear(key)

    def enter(self, client: str) -> bool:
        """Returns whether a request may begin; if so, `leave` must follow."""
        if self._now[client] >= self._at_once:
            return False
        self._now[client] += 1
        return True

    def leave(self, client: str) -> None:
        """Tells that a request is over."""
        self._now[client] -= 1
        if not self._now[client]:
            del self._now[client]


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    text = text.strip()
    if text.startswith("["):  # [2001:db8::1]:4711
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:  # 192.0.2.1:4711
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


def _name(text: str) -> str:
    address = _address(text)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, _NEIGHBOURS), strict=False))
    return str(address) if address else "unknown"

"""Settings of the server: the limits that it sets its clients, and the names that it trusts."""

import dataclasses
import ipaddress
import os
import re

from cib_jax.errors import WebError

# A host-source of CSP (level 3, section 2.3.1) with a scheme and without a path. A star stands for the first labels of
# a name of at least two more, or for any port. Nothing that matches can end a CSP directive or a header.
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_ORIGIN = re.compile(rf"https?://(?:\*\.{_LABEL}\.)?{_LABEL}(?:\.{_LABEL})*(?::(?:[0-9]{{1,5}}|\*))?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the server. The defaults suit a small machine on an open network.

    Raises:
      WebError: A number is below 1, a proxy is not an address, or a framing page is not an origin.
    """

    photo_mb: int = 20
    """Largest photo that a client may send, in millions of bytes."""
    megapixels: int = 50
    """Largest photo that a client may send, in millions of pixels."""
    shown_mb: int = 200
    """Largest indexed file that `/image` shows, in millions of bytes."""
    shown_megapixels: int = 178
    """Largest indexed photo that `/image` shows, in millions of pixels."""
    shown_side: int = 2048
    """Longer side of the JPEG that `/image` returns, in pixels."""

    decode_processes: int = dataclasses.field(default_factory=lambda: min(4, max(2, os.cpu_count() or 1)))
    """Number of processes that decode photos."""
    decode_seconds: float = 10.0
    """Time limit for decoding one photo."""
    decode_memory_mib: int = 2048
    """Memory that a decode process may take beyond what it has at its start."""

    bodies: int = 128
    """Number of request bodies that may be received or waiting for their answer at the same time."""
    bodies_each: int = 16
    """Number of them that may be of one client."""
    bodies_mb: int = 256
    """Memory for all of them, in millions of bytes; those of one client take at most half of what others leave."""
    body_seconds: float = 10.0
    """Time limit for a request body, extended by one second for each `body_rate` bytes received."""
    body_rate: int = 65_536
    """Bytes per second that a client has to send at least."""

    searches: int = 120
    """Searches per client and minute."""
    images: int = 240
    """Whole photos per client and minute."""
    others: int = 6000
    """All other requests per client and minute, as for thumbnails; a 60th of it new connections in a second."""
    at_once: int = 100
    """Simultaneous requests per client, and simultaneous connections per client."""
    connections: int = 512
    """Simultaneous connections of all clients."""
    head_seconds: float = 15.0
    """Time limit for the head of a request, counted from the connection or from the previous answer."""
    taking_seconds: float = 120.0
    """Time after which a client that does not read its answer is disconnected."""

    threads: int = 32
    """Threads that answer searches with a photo; each waits for the encoder."""
    waiting: int = 200
    """Requests that may wait for a thread of any one kind."""
    patience: float = 20.0
    """Seconds that a request waits for a thread."""
    thumbnails_mb: int = 64
    """Memory for cached thumbnails, in millions of bytes."""

    proxies: tuple[str, ...] = ()
    """Addresses or networks of reverse proxies, from which X-Forwarded-For is trusted."""
    hosts: tuple[str, ...] = ()
    """Host names under which the server may be requested, beside localhost; "*" allows any.

    If empty, the server answers to its own names and, on a network, to any address. The check prevents DNS rebinding:
    a foreign page with a name that resolves to this server would otherwise count as the server's own page.
    """
    frames: tuple[str, ...] = ()
    """Origins of pages that may show the search page in a frame, such as "http://localhost:*"."""

    def __post_init__(self) -> None:
        """Validates what a user can set on the command line."""
        for name in ("searches", "photo_mb", "megapixels"):
            if getattr(self, name) < 1:
                raise flag_error(name, f"at least 1, got {getattr(self, name)}")
        for proxy in self.proxies:
            try:
                ipaddress.ip_network(proxy, strict=False)
            except ValueError:
                allowed = f"addresses or networks, got {proxy!r}; try 10.0.0.2 or 10.0.0.0/24"
                raise flag_error("proxies", allowed) from None
        for origin in self.frames:
            if not _ORIGIN.fullmatch(origin):
                example = "https://notebook.example.org or http://localhost:*"
                raise flag_error("frames", f"origins of web pages, got {origin!r}; try {example}")


def flag_error(name: str, allowed: str) -> WebError:
    """Returns the error for an invalid value of a command-line flag, given what it must be."""
    return WebError(f"--{name} must be {allowed}", field=f"--{name}")

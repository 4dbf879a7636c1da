"""What a server takes from its clients: every number that can be set, once."""

import dataclasses

from cib_jax.web.decoding import Decoding


@dataclasses.dataclass(frozen=True)
class Limits:
    """The defaults suit a small machine on a network of people who are not known."""

    photo_mb: int = 20
    """Of a photo that is sent, in millions of bytes."""
    decoding: Decoding = dataclasses.field(default_factory=Decoding)
    """What decoding one may take."""
    shown_megapixels: int = 178
    """Of an indexed photo that is shown."""
    shown_mb: int = 200
    """Of its file, in millions of bytes."""
    shown_side: int = 2048
    """Longer side at which it is shown, in pixels."""

    bodies: int = 128
    """Photos that may be on their way in at once."""
    bodies_mb: int = 256
    """Memory for all of them, in millions of bytes."""
    body_seconds: float = 15.0
    """For a photo to come in, plus a second for each `body_rate` bytes that came."""
    body_rate: int = 65_536
    """Bytes a second."""

    searches: int = 120
    """Of one client a minute."""
    images: int = 240
    """Whole photos that one client is shown a minute."""
    others: int = 6000
    """All else that one client asks for a minute: thumbnails, the page's files."""
    at_once: int = 100
    """Requests of one client at the same time, and connections."""
    connections: int = 512
    """Of all clients."""
    head_seconds: float = 15.0
    """For a request's head to come in, from the connection or the last answer on."""
    taking_seconds: float = 120.0
    """For a client to take some of an answer that waits for it."""

    threads: int = 32
    """That answer searches: each waits for a process that decodes, then for the encoder."""
    waiting: int = 200
    """Requests that may wait for a thread."""
    thumbnails_mb: int = 64
    """Of thumbnails kept in memory, in millions of bytes."""

    proxies: tuple[str, ...] = ()
    """Addresses or networks of reverse proxies, whose X-Forwarded-For is believed."""
    hosts: tuple[str, ...] = ()
    """Names under which it may be asked, beside localhost; "*": any. None: its own, and on a network any address.

    A page of a stranger whose name was made to point here would else read everything as its own.
    """
    frames: tuple[str, ...] = ()
    """Origins of pages that may show the search page in a frame, beside its own."""

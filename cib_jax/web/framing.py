"""Which pages may show the search page in a frame of theirs: none but its own, until some are named."""

import re
from collections.abc import Iterable

from cib_jax.errors import UserError

# A scheme, a name or an IPv4 address, and a port: a host-source of CSP (level 3, section 2.3.1), without a path. A star
# stands for the first parts of a name that has two more, or for any port. Nothing in it ends a directive or a header.
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_ORIGIN = re.compile(rf"https?://(?:\*\.{_LABEL}\.)?{_LABEL}(?:\.{_LABEL})*(?::(?:[0-9]{{1,5}}|\*))?", re.IGNORECASE)


class FrameError(UserError):
    """What is named as a page that may frame this one is no origin."""


def ancestors(frames: Iterable[str]) -> str:
    """Returns the directive of a content policy by which browsers frame the page within these origins alone.

    Args:
      frames: origins, such as "https://notebook.example.org", "https://*.example.org" or "http://localhost:*", beside
        the page's own. Of frames within frames, all are to be named.

    Raises:
      FrameError: one is no origin.
    """
    for origin in frames:
        if not _ORIGIN.fullmatch(origin):
            raise FrameError(
                f"--frames: {origin!r} is no origin of a page; give for example https://notebook.example.org or "
                "http://localhost:*"
            )
    return " ".join(("frame-ancestors", "'self'", *frames))

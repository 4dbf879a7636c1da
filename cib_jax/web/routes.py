"""What may be asked for at all, and by which limit it is counted. Everything else is not there.

Of Gradio's server only the files of the page are open. Its page computes in the browser, so nothing needs a function
called, and these stay closed, each for its reason:

- `/gradio_api/queue/*`, `/run/*`, `/api/*`, `/call/*`, `/cancel`, `/reset`: call functions; a file named in what is
  sent is fetched, also from other servers, and kept on disk.
- `/gradio_api/upload`, `/upload_progress`, `/stream/*`, `/process_recording`: keep on disk what they are sent.
- `/gradio_api/file=*`, `/file/*`, `/custom_component/*`, `/deep_link`, `/pwa_icon`: read files by path, or decode them.
- `/gradio_api/proxy=*`: asks other servers.
- `/gradio_api/component_server`, `/dev/reload`, `/vibe-*`, `/mcp`, `/openapi.json`, `/info`: run or tell of code.
- `/gradio_api/heartbeat/*`: a connection for ever; there is no session that it would keep.
- `/monitoring*`, `/profiling/*`, `/gradio_api/runs`, `/run-history/*`: tell of other users.
- `/login*`, `/logout`, `/user`, `/token`: nobody logs in.
"""

import re
from typing import NamedTuple

SEARCH, IMAGE, OTHER = "search", "image", "other"

_FILE = r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/){0,6}[A-Za-z0-9_-][A-Za-z0-9._-]*"  # no part begins with a dot
_GET = ("GET", "HEAD")


class Route(NamedTuple):
    """One kind of address."""

    path: re.Pattern[str]
    methods: tuple[str, ...]
    kind: str
    page: bool
    """Whether it belongs to the page, whose answers are not this package's own."""


API = (
    Route(re.compile(r"/search"), (*_GET, "POST"), SEARCH, False),
    Route(re.compile(r"/image/[0-9a-f]{16}"), _GET, IMAGE, False),
    Route(re.compile(r"/thumbnail/[0-9a-f]{16}"), _GET, OTHER, False),
    Route(re.compile(r"/health"), _GET, OTHER, False),
    Route(re.compile(r"/photo"), _GET, OTHER, False),
)
PAGE = (
    Route(re.compile(r"/"), _GET, OTHER, True),
    Route(re.compile(r"/(config|favicon\.ico|manifest\.json|robots\.txt|theme\.css)/?"), _GET, OTHER, True),
    Route(re.compile(r"/gradio_api/(theme\.css|startup-events|app_id)"), _GET, OTHER, True),
    Route(re.compile(rf"/(assets|static|svelte)/{_FILE}"), _GET, OTHER, True),
)


def find(path: str) -> Route | None:
    """Returns the route of a path, after its escapes are undone; None where it is not there."""
    return next((route for route in (*API, *PAGE) if route.path.fullmatch(path)), None)

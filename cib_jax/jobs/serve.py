"""A search page for an index, and its JSON API, until the process is ended."""

import functools
import pathlib
from typing import Any

import rich.console

from cib_jax import web
from cib_jax.collection.collection import Collection
from cib_jax.errors import WebError
from cib_jax.jobs.presenting import say


def serve(
    uri: pathlib.Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    below: str = "",
    console: rich.console.Console | None = None,
    **limits: Any,
) -> None:
    """Serves an index until SIGTERM or Ctrl-C; what is indexed meanwhile appears within a minute.

    Args:
      uri: of the index.
      host: address to listen at; "0.0.0.0" is all of this machine.
      port: 0 takes one that is free.
      below: the folder, such as "/photos", from which a reverse proxy passes on what is asked below it.
      console: where to report.
      limits: Fields of `web.settings.Settings`.

    Raises:
      WebError: The extra `web` is not installed, or a setting is invalid.
      TableError, SavedError: there is no index, or it cannot be read.
      SearchError: FAISS is not installed.
      DecoderError: No decode process can be started.
    """
    web.check_installed()
    from cib_jax.web import page, server
    from cib_jax.web.settings import Settings

    console = console or rich.console.Console()
    if below and not below.startswith("/"):
        raise WebError(f"--below must be a path that begins with a slash, got {below!r}; try /photos", field="--below")
    settings = Settings(**limits)
    with server.listening(host, port):
        pass  # an address that cannot be used is refused before the index is opened
    say(console, f"Opening {uri}")
    collection = Collection.open(uri)

    def renewed(_: object) -> Collection:
        nonlocal collection
        collection = collection.renewed()
        return collection

    say(console, f"Preparing to search {len(collection):,} photos of {collection.root}")
    server.serve(
        collection,
        host=host,
        port=port,
        page=functools.partial(page.mount, settings=settings, root_path=below or None),
        renew=renewed,
        settings=settings,
        print_line=lambda sentence: say(console, sentence),
    )

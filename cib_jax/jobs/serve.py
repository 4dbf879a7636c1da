"""A search page for an index, and its JSON API, until the process is ended."""

import functools
import pathlib
from typing import Any

import rich.console

from cib_jax import web
from cib_jax.collection.collection import Collection
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
      limits: fields of `web.limits.Limits`, of which `megapixels` is a photo's.

    Raises:
      WebError: the extra `web` is not installed.
      TableError, SavedError: there is no index, or it cannot be read.
      SearchError: FAISS is not installed.
      BindError, ProxyError, FrameError, DecoderError: as `web.server.serve`.
    """
    web.check_installed()
    from cib_jax.web import framing, page, server
    from cib_jax.web.clients import Clients
    from cib_jax.web.decoding import Decoding
    from cib_jax.web.limits import Limits

    console = console or rich.console.Console()
    for name in ("searches", "photo_mb", "megapixels"):
        if limits.get(name, 1) < 1:
            raise web.WebError(f"--{name}: {limits[name]} must be 1 or more")
    if below and not below.startswith("/"):
        raise web.WebError(f"--below: {below!r} is no folder of a server; give it with its slash, such as /photos")
    decoding = Decoding(megapixels=limits.pop("megapixels", Decoding.megapixels))
    chosen = Limits(decoding=decoding, **limits)
    Clients(chosen.proxies)  # told now, not once all is loaded
    framing.ancestors(chosen.frames)
    server.check_free(host, port)
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
        page=functools.partial(page.mount, limits=chosen, root_path=below or None),
        renew=renewed,
        limits=chosen,
        tell=lambda sentence: say(console, sentence),
    )

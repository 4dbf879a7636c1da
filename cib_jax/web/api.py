"""The JSON API of a collection: search, thumbnails, and the photos themselves, by id alone.

| ask | and get |
| --- | --- |
| `GET /search?id=ID` or `?code=HEX`, with `&k=` and `&radius=` | the nearest; without both, of a random photo |
| `POST /search?k=`, a photo's bytes or a form with one file | the nearest to that photo, of which nothing is kept |
| `GET /photo?id=ID` | path and size of a photo, as a search tells them of its results |
| `GET /thumbnail/ID`, `GET /image/ID` | a JPEG; the second at most 2,048 pixels long, made anew, without metadata |
| `GET /health` | how many photos there are |
"""

import collections
import contextlib
import hashlib
import json
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import fastapi
from starlette.requests import Request
from starlette.responses import Response

from cib_jax.data.photos import BadPhotoError, DecodedPhoto
from cib_jax.web import indexed_file, upload
from cib_jax.web.answers import Answers, Collection, Photo, QueryError, UnknownError, check, shown
from cib_jax.web.clients import CLIENT
from cib_jax.web.decoding import BusyError, DecoderError, Decoders
from cib_jax.web.indexed_file import ChangedError
from cib_jax.web.limits import Limits
from cib_jax.web.threads import Threads

_DAY = 86_400


def create(collection: Collection, limits: Limits, *, work: str = "") -> fastapi.FastAPI:
    """Returns the app, at `state.api` of which the `Api` is; `guard.Guard` must stand before it on a network.

    Args:
      collection: what is searched.
      limits: of what is taken.
      work: in place of `decoder.work`, "module:function".

    Raises:
      DecoderError: no process that decodes can be started.
    """
    api = Api(collection, limits, work=work)

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            api.close()

    app = fastapi.FastAPI(title="cib_jax", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.api = api
    app.add_route("/search", _told(api.search), methods=["GET", "POST"])
    app.add_route("/photo", _told(api.photo), methods=["GET"])
    app.add_route("/thumbnail/{id}", _told(api.thumbnail), methods=["GET"])
    app.add_route("/image/{id}", _told(api.image), methods=["GET"])
    app.add_route("/health", _told(api.health), methods=["GET"])
    return app


class Api:
    """What the routes do."""

    def __init__(self, collection: Collection, limits: Limits, *, work: str = "") -> None:
        self.collection, self._limits = collection, limits
        self.decoders = Decoders(limits.decoding, work)
        try:
            self.answers = Answers(lambda: self.collection)
        except BaseException:
            self.decoders.close()
            raise
        self._searches = Threads(limits.threads, limits.waiting, "search")
        self._lookups = Threads(4, limits.waiting, "lookup")
        # As many as processes, so that photos wait here, where clients take turns.
        self._decoding = Threads(limits.decoding.processes, limits.waiting, "decode", patience=limits.decoding.patience)
        self._thumbnails = _Kept(limits.thumbnails_mb * 1_000_000)
        self._closed = False

    def take(self, collection: Collection) -> None:
        """Answers from another collection of the same encoder from now on."""
        self.collection, self._thumbnails = collection, _Kept(self._limits.thumbnails_mb * 1_000_000)

    def close(self) -> None:
        """Ends threads and processes; more than once does no harm."""
        if self._closed:
            return
        self._closed = True
        for threads in (self._searches, self._lookups, self._decoding):
            threads.close()
        self.decoders.close()
        self.answers.close()

    async def health(self, request: Request) -> Response:
        """Tells that the server answers."""
        return _json({"status": "ok", "photos": len(self.collection), "bits": self.collection.bits})

    async def search(self, request: Request) -> Response:
        """Answers by an id, a code, a photo, or by chance."""
        asked = request.query_params
        if strange := set(asked) - {"id", "code", "k", "radius"}:
            raise QueryError(f"{min(strange)[:20]!r} is none of id, code, k and radius.")
        k = _whole(asked, "k", 20)
        radius = _whole(asked, "radius", -1) if "radius" in asked else None
        if request.method == "POST":
            check(k, radius)
            body, kind = await request.body(), request.headers.get("content-type", "")
            seen = await self._decoding.run(_client(request), self._seen, body, kind)
            answer = await self._searches.run(
                _client(request), lambda: self.answers.by_photo(seen.square, k, radius=radius)
            )
            return _json(answer)
        if "id" in asked and "code" in asked:
            raise QueryError("id, code: give one of them.")

        def answered() -> dict[str, Any]:
            if "id" in asked:
                return self.answers.by_id(asked["id"], k, radius=radius)
            if "code" in asked:
                return self.answers.by_code(asked["code"], k, radius=radius)
            return self.answers.random(k, radius=radius)

        return _json(await self._lookups.run(_client(request), answered))

    async def photo(self, request: Request) -> Response:
        """Tells of a photo what a result of a search tells."""
        id = request.query_params.get("id", "")
        found = await self._lookups.run(_client(request), self.answers.photo, id)
        return _json({"id": found.id, "path": shown(found.path), "width": found.width, "height": found.height})

    async def thumbnail(self, request: Request) -> Response:
        """Shows a photo's thumbnail out of the index."""
        id = request.path_params["id"]
        kept = self._thumbnails.get(id)
        if kept is None:
            kept = await self._lookups.run(_client(request), self._thumbnail, id)
        tag, content = kept
        return _picture(request, tag, content)

    async def image(self, request: Request) -> Response:
        """Shows a photo itself, decoded and encoded again."""
        photo = await self._lookups.run(_client(request), self.answers.photo, request.path_params["id"])
        tag = _tag(photo, "image")
        known = _known(request, tag)
        content = b"" if known else await self._decoding.run(_client(request), self._image, photo)
        return _picture(request, tag, content)

    def _seen(self, body: bytes, kind: str) -> DecodedPhoto:
        return self.decoders.see(upload.photo_of(body, kind), self.collection.side)

    def _thumbnail(self, id: str) -> tuple[str, bytes]:
        # First, so that a photo of the collection before is not kept for the one that may come meanwhile.
        thumbnails = self._thumbnails
        photo = self.answers.photo(id, thumbnail=True)
        found = (_tag(photo, "thumbnail"), photo.thumbnail)
        thumbnails.keep(id, found)
        return found

    def _image(self, photo: Photo) -> bytes:
        content = indexed_file.read(self.collection.root, photo, self._limits.shown_mb * 1_000_000)
        limits = self._limits
        return self.decoders.reduced(content, limits.shown_side, max_megapixels=limits.shown_megapixels)


class _Kept:
    """Thumbnails that were asked for last, up to so many bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._found: collections.OrderedDict[str, tuple[str, bytes]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, id: str) -> tuple[str, bytes] | None:
        with self._lock:
            if id in self._found:
                self._found.move_to_end(id)
            return self._found.get(id)

    def keep(self, id: str, found: tuple[str, bytes]) -> None:
        with self._lock:
            if id in self._found:
                return
            self._found[id] = found
            self._bytes += len(found[1])
            while self._bytes > self._most:
                _, (_, content) = self._found.popitem(last=False)
                self._bytes -= len(content)


_STATUS: Mapping[type[Exception], int] = {
    QueryError: 400,
    UnknownError: 404,
    ChangedError: 410,
    BadPhotoError: 422,
    BusyError: 503,
    DecoderError: 503,
}


def _told(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Returns a route that tells in a sentence what it cannot answer."""

    async def route(request: Request) -> Response:
        try:
            return await answer(request)
        except tuple(_STATUS) as error:
            # What a process for decoding ended with is for the log of whoever runs the server.
            told = "No photo can be decoded now." if isinstance(error, DecoderError) else str(error)
            return _json({"error": told}, next(code for kind, code in _STATUS.items() if isinstance(error, kind)))
        except Exception:
            traceback.print_exc()  # for whoever runs the server
            return _json({"error": "The server could not answer; whoever runs it finds why in its log."}, 500)

    return route


def _client(request: Request) -> str:
    return getattr(request.state, CLIENT, "")


def _json(content: dict[str, Any], status: int = 200) -> Response:
    headers = {"cache-control": "no-store"} | ({"retry-after": "2"} if status == 503 else {})
    return Response(json.dumps(content), status, headers, "application/json")


def _picture(request: Request, tag: str, content: bytes) -> Response:
    headers = {"etag": tag, "cache-control": f"private, max-age={_DAY}"}
    if _known(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type="image/jpeg")


def _known(request: Request, tag: str) -> bool:
    return tag in [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]


def _tag(photo: Photo, what: str) -> str:
    known = f"{what} {photo.id} {photo.size} {photo.modified_ns}"
    return f'"{hashlib.sha256(known.encode()).hexdigest()[:32]}"'


def _whole(asked: Mapping[str, str], name: str, default: int) -> int:
    """Returns a whole number of the query.

    Raises:
      QueryError: it is none.
    """
    given = asked.get(name, str(default))
    digits = given.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 9):
        raise QueryError(f"{name}: wanted a whole number, got {given[:20]!r}.")
    return int(given)

"""JSON API of a photo index: search, thumbnails, and the photos themselves, by id only.

| request | answer |
| --- | --- |
| `GET /search?id=ID` or `?code=HEX`, with `&k=` and `&radius=` | the nearest photos; without both, of a random photo |
| `POST /search?k=`, with a photo as the body, or as the only file of a form | the nearest to it; it is not kept |
| `GET /photo?id=ID` | path and size of a photo, as in the results of a search |
| `GET /thumbnail/ID`, `GET /image/ID` | a JPEG; the second encoded anew, at most 2,048 pixels long, without metadata |
| `GET /health` | the number of photos; 503 if the index cannot be read |
| `GET /docs` | this text |

A search returns {"query": {"id", "code"}, "bits", "results": [{"id", "path", "distance", "code", "width", "height",
"thumbnail", "image"}]}, an error {"error": "one sentence"}. Paths are relative to the indexed folder;
\\udc80 to \\udcff in them are bytes that are not UTF-8, as in Python's os.fsdecode.
"""

import asyncio
import collections
import contextlib
import functools
import hashlib
import os
import re
import secrets
import stat
import threading
import traceback
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol, TypeVar

import fastapi
import numpy as np
from jaxtyping import UInt8
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, QueryParams, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from cib_jax.codes import byte_count
from cib_jax.data.photos import BadPhotoError
from cib_jax.errors import IndexFolderError
from cib_jax.files import count, dump_json, modified_ns, path_as_utf8
from cib_jax.web.concurrency import EncodeBatcher, FairExecutor, unavailable
from cib_jax.web.decode_pool import DecodePool, DecoderError
from cib_jax.web.middleware import error_response
from cib_jax.web.settings import Settings

MAX_RESULTS = 1000
"""Largest number of results of one search."""

_ID = re.compile(r"[0-9a-f]{16}")
_GONE = "The index was deleted, replaced or damaged, or cannot be reached; the server's log has more. Try again later."
_CHANGED = "The photo's file was changed since it was indexed"

T = TypeVar("T")


class Photo(Protocol):
    """An indexed photo, such as `cib_jax.storage.collection.Photo`."""

    id: str
    path: str
    size: int
    modified_ns: int
    width: int
    height: int
    thumbnail: bytes


class Collection(Protocol):
    """What is searched, such as `cib_jax.Collection`."""

    @property
    def root(self) -> str: ...  # noqa: D102
    @property
    def bits(self) -> int: ...  # noqa: D102
    @property
    def side(self) -> int: ...  # noqa: D102
    @property
    def codes(self) -> UInt8[np.ndarray, "n bytes"]: ...  # noqa: D102
    def __len__(self) -> int: ...
    def encode(self, squares: UInt8[np.ndarray, "n side side 3"], /) -> UInt8[np.ndarray, "n bytes"]: ...  # noqa: D102
    def nearest(self, codes: UInt8[np.ndarray, "q bytes"], k: int, /) -> Any: ...  # noqa: D102
    def photos(self, numbers: Any, /, *, thumbnails: bool = True) -> Any: ...  # noqa: D102
    def number_of(self, id: str, /) -> int | None: ...  # noqa: D102


def format_count(collection: Collection) -> str:
    """Returns the number of photos in words, such as "1 photo"."""
    return count(len(collection), "photo")


def create_app(collection: Collection, settings: Settings, decoders: DecodePool) -> fastapi.FastAPI:
    """Returns the app, with the `Api` at `state.api`, which must be closed before `decoders`.

    On a network, it needs `middleware.protect` around it.
    """
    handlers: dict[Any, Any] = {HTTPException: _handle_error, Exception: _handle_error}
    app = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None, exception_handlers=handlers)
    api = app.state.api = Api(collection, settings, decoders)
    app.add_route("/search", api.search, methods=["GET", "POST"])
    app.add_route("/photo", api.photo, methods=["GET"])
    app.add_route("/thumbnail/{id}", api.thumbnail, methods=["GET"])
    app.add_route("/image/{id}", api.image, methods=["GET"])
    app.add_route("/health", api.health, methods=["GET"])
    app.add_route("/docs", lambda _: PlainTextResponse(__doc__), methods=["GET"])
    return app


async def _handle_error(_: Request, error: Exception) -> Response:
    return error_response(error)


class Api:
    """Endpoints of the API, and the threads that they use. Close it."""

    def __init__(self, collection: Collection, settings: Settings, decoders: DecodePool) -> None:
        """Compiles the encoder, which takes some seconds."""
        self.collection = collection
        """The collection that is searched now."""
        self.renew: Callable[[Collection], None] | None = None
        """Function that calls `replace` if the index is another one than this collection by now; see `renewing`."""
        self._settings, self._decoders = settings, decoders
        self._batcher = EncodeBatcher(collection.encode, collection.side)

        executor = functools.partial(FairExecutor, waiting=settings.waiting, patience=settings.patience)
        self._searches, self._lookups = executor(settings.threads, name="search"), executor(4, name="lookup")
        # As many threads as processes, so that photos wait here, where clients take turns, and not in the pool.
        self.decoding = executor(settings.decode_processes, name="decode")
        self._thumbnails = _ThumbnailCache(settings.thumbnails_mb * 1_000_000)

    def replace(self, collection: Collection) -> None:
        """Answers from another collection with the same encoder from now on."""
        self.collection, self._thumbnails = collection, _ThumbnailCache(self._settings.thumbnails_mb * 1_000_000)

    def close(self) -> None:
        """Ends all threads."""
        for executor in (self._searches, self._lookups, self.decoding):
            executor.close()
        self._batcher.close()

    async def health(self, request: Request) -> Response:
        """Returns the number of photos, which also shows that the server is alive and the index readable."""
        # With its thumbnail, which no memory of earlier reads has.
        await self._read(request, lambda: self.collection.photos(range(min(1, len(self.collection))), thumbnails=True))
        return _json({"status": "ok", "photos": len(self.collection), "bits": self.collection.bits})

    async def search(self, request: Request) -> Response:
        """Returns the nearest photos to an indexed photo, a code, the photo in the body, or a random photo."""
        query = request.query_params
        if unknown := set(query) - {"id", "code", "k", "radius"}:
            raise HTTPException(400, f"Parameters must be among id, code, k and radius, got {min(unknown)[:20]!r}.")
        k = _integer(query, "k", 20, 1, MAX_RESULTS)
        radius = _integer(query, "radius", 0, 0) if "radius" in query else None
        if request.method == "POST":
            body, content_type = await request.body(), request.headers.get("content-type", "")
            square = await self._decode(request, self._square, body, content_type)
            found = await self._read(request, self._search_photo, square, k, radius, executor=self._searches)
        elif "id" in query and "code" in query:
            raise HTTPException(400, "Only one of id and code can be given.")
        elif "code" in query:
            found = await self._read(request, self._search_code, query["code"], k, radius)
        else:
            found = await self._read(request, self._search_id, query.get("id"), k, radius)
        return _json(found)

    async def photo(self, request: Request) -> Response:
        """Returns one photo's metadata in the format of a search result."""
        photo = await self._read(request, self._photo, request.query_params.get("id", ""))
        return _json(_metadata(photo))

    async def thumbnail(self, request: Request) -> Response:
        """Returns a photo's thumbnail from the index."""
        id = request.path_params["id"]
        found = self._thumbnails.get(id)
        if found is None:
            found = await self._read(request, self._thumbnail, id)
        return _jpeg(request, *found)

    async def image(self, request: Request) -> Response:
        """Returns a photo, decoded and encoded anew."""
        photo = await self._read(request, self._photo, request.path_params["id"])
        tag = _etag(photo, "image")
        cached = _is_cached(request, tag)
        return _jpeg(request, tag, b"" if cached else await self._decode(request, self._image, photo))

    async def _read(
        self, request: Request, function: Callable[..., T], *arguments: Any, executor: FairExecutor | None = None
    ) -> T:
        """Returns the result of a function that reads the collection, of a newer one if its files are gone."""

        def read() -> T:
            collection = self.collection
            try:
                return function(*arguments)
            except IndexFolderError:
                if self.renew is not None:
                    self.renew(collection)
                if self.collection is not collection:
                    with contextlib.suppress(IndexFolderError):
                        return function(*arguments)
            raise unavailable(_GONE)

        return await (executor or self._lookups).run(_client(request), read)

    async def _decode(self, request: Request, function: Callable[..., T], *arguments: Any) -> T:
        """Returns the result of a function that uses the decoders."""
        try:
            return await self.decoding.run(_client(request), function, *arguments)
        except BadPhotoError as error:
            raise HTTPException(422, str(error)) from None
        except DecoderError:
            traceback.print_exc()  # not a matter of the photo
            raise unavailable("Photos cannot be decoded now; try again in a moment.") from None

    def _square(self, body: bytes, content_type: str) -> UInt8[np.ndarray, "side side 3"]:
        return self._decoders.decode(_uploaded_photo(body, content_type), self.collection.side).square

    def _image(self, photo: Photo) -> bytes:
        settings = self._settings
        content = _read_indexed_file(self.collection.root, photo, settings.shown_mb * 1_000_000)
        return self._decoders.reduced(content, settings.shown_side, max_megapixels=settings.shown_megapixels)

    def _photo(self, id: str) -> Photo:
        collection = self.collection
        (photo,) = collection.photos([_number(collection, id)], thumbnails=False)
        return photo

    def _thumbnail(self, id: str) -> tuple[str, bytes]:
        # Taken first: if the collection is replaced meanwhile, its thumbnail must not enter the next one's cache.
        thumbnails, collection = self._thumbnails, self.collection
        (photo,) = collection.photos([_number(collection, id)], thumbnails=True)
        found = (_etag(photo, "thumbnail"), photo.thumbnail)
        thumbnails.put(id, found)
        return found

    def _search_photo(self, square: UInt8[np.ndarray, "side side 3"], k: int, radius: int | None) -> dict[str, Any]:
        return _search(self.collection, self._batcher.submit(square).result(), k, radius, None)

    def _search_code(self, code: str, k: int, radius: int | None) -> dict[str, Any]:
        collection = self.collection
        digits = 2 * byte_count(collection.bits)
        if not re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", code):
            raise HTTPException(400, f"code must be {digits} hexadecimal digits, for {collection.bits} bits.")
        return _search(collection, np.frombuffer(bytes.fromhex(code), np.uint8), k, radius, None)

    def _search_id(self, id: str | None, k: int, radius: int | None) -> dict[str, Any]:
        collection = self.collection
        if id is not None:
            return _search(collection, collection.codes[_number(collection, id)], k, radius, id)
        if not len(collection):
            raise HTTPException(404, "The index has no photo yet.")
        number = secrets.randbelow(len(collection))
        (photo,) = collection.photos([number], thumbnails=False)
        return _search(collection, collection.codes[number], k, radius, photo.id)


class _ThumbnailCache:
    """The thumbnails that were requested last, up to a number of bytes. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._found: collections.OrderedDict[str, tuple[str, bytes]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, id: str) -> tuple[str, bytes] | None:
        with self._lock:
            if id in self._found:
                self._found.move_to_end(id)
            return self._found.get(id)

    def put(self, id: str, found: tuple[str, bytes]) -> None:
        with self._lock:
            if id in self._found:
                return
            self._found[id] = found
            self._bytes += len(found[1])
            while self._bytes > self._most:
                _, (_, content) = self._found.popitem(last=False)
                self._bytes -= len(content)


def _number(collection: Collection, id: str) -> int:
    number = collection.number_of(id) if _ID.fullmatch(id) else None
    if number is None:
        raise HTTPException(404, "No photo has this id.")
    return number


def _search(
    collection: Collection, code: UInt8[np.ndarray, " bytes"], k: int, radius: int | None, id: str | None
) -> dict[str, Any]:
    # A search by radius is one for the k nearest, cut off: on its own, it could return the whole collection.
    hits = collection.nearest(code[None], min(k, len(collection)))[0] if len(collection) else []
    near = {hit.number: int(hit.distance) for hit in hits if radius is None or hit.distance <= radius}
    if id is not None:  # the photo itself comes before others with its code
        near = {_number(collection, id): 0} | near
    numbers = list(near)[:k]
    photos = collection.photos(numbers, thumbnails=False) if numbers else []
    return {
        "query": {"id": id, "code": code.tobytes().hex()},
        "bits": collection.bits,
        "results": [
            {
                **_metadata(photo),
                "distance": near[number],
                "code": collection.codes[number].tobytes().hex(),
                "thumbnail": f"/thumbnail/{photo.id}",
                "image": f"/image/{photo.id}",
            }
            for number, photo in zip(numbers, photos, strict=True)
        ],
    }


def _metadata(photo: Photo) -> dict[str, Any]:
    return {"id": photo.id, "path": path_as_utf8(photo.path), "width": photo.width, "height": photo.height}


def _client(request: Request) -> str:
    return getattr(request.state, "client", "")


def _integer(query: QueryParams, name: str, default: int, least: int, most: int | None = None) -> int:
    """Returns an integer parameter of the query."""
    text = query.get(name, str(default))
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) <= 9 and least <= int(text) <= (most or int(text)):
        return int(text)
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise HTTPException(400, f"{name} must be an integer {allowed}, got {text[:20]!r}.")


def _json(content: dict[str, Any]) -> Response:
    return Response(dump_json(content), headers={"cache-control": "no-store"}, media_type="application/json")


def _jpeg(request: Request, tag: str, content: bytes) -> Response:
    headers = {"etag": tag, "cache-control": "private, max-age=86400"}
    if _is_cached(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type="image/jpeg")


def _is_cached(request: Request, tag: str) -> bool:
    return tag in [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]


def _etag(photo: Photo, kind: str) -> str:
    known = f"{kind} {photo.id} {photo.size} {photo.modified_ns}"
    return f'"{hashlib.sha256(known.encode()).hexdigest()[:32]}"'


class _InMemoryParser(MultiPartParser):
    """A parser of forms that never writes a file to disk; `BodyLimits` bounds its memory."""

    spool_max_size = 1 << 40

    def close(self) -> None:
        """Closes all files, also one that a cut form did not finish."""
        for file in self._files_to_close_on_error:
            file.close()


def _uploaded_photo(body: bytes, content_type: str) -> bytes:
    """Returns the photo in a request's body: the body itself or, if that is a form, its only file."""
    kind, options = parse_options_header(content_type)
    photo = body
    if kind == b"multipart/form-data":
        # Only the client's boundary is used: with its charset, Python's slower codecs could be chosen.
        boundary = options.get(b"boundary", b"").decode("latin-1")
        headers = Headers({"content-type": f'multipart/form-data; boundary="{boundary}"'})
        with contextlib.closing(_InMemoryParser(headers, _chunks(body), max_files=1, max_fields=15)) as parser:
            try:
                form = asyncio.run(parser.parse())
            except (MultiPartException, ValueError):
                problem = "The form is damaged; send the photo's bytes, or a form with one file."
                raise HTTPException(400, problem) from None
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            photo = files[0].file.read() if files else b""
    if not photo:
        raise HTTPException(400, "The request has no photo; send its bytes, or a form with one file.")
    return photo


async def _chunks(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


def _read_indexed_file(root: str, photo: Photo, most: int) -> bytes:
    """Returns the content of a photo's file, at most `most` bytes, if it is still the file that was indexed.

    The file is opened first, and what was opened is examined, so that it cannot be replaced in between. It must be a
    regular file of the size and time that were indexed. With all links resolved, it must be inside the indexed folder;
    a file elsewhere that a list named must be in the folder that the list gave.
    """
    path = os.path.join(root, photo.path)
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError):
        raise HTTPException(410, f"{_CHANGED}: it cannot be opened.") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or not _is_inside(root, path, found):
            raise HTTPException(410, f"{_CHANGED}: it is somewhere else now.")
        if (found.st_size, modified_ns(found)) != (photo.size, photo.modified_ns):
            raise HTTPException(410, f"{_CHANGED}; index the photos again.")
        if found.st_size > most:
            raise HTTPException(410, f"The photo's file is larger than {most // 1_000_000} MB, too large to show.")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(found.st_size)
    except OSError:
        raise HTTPException(410, "The photo's file cannot be read now.") from None
    finally:
        os.close(descriptor)


def _is_inside(root: str, path: str, found: os.stat_result) -> bool:
    """Returns whether an opened file is the one that `path`, with links resolved, names inside `root` now."""
    if not os.path.abspath(path).startswith(os.path.join(os.path.abspath(root), "")):
        root = os.path.dirname(path)
    try:
        real, folder = os.path.realpath(path, strict=True), os.path.realpath(root, strict=True)
        there = os.stat(real, follow_symlinks=False)
        return os.path.commonpath([real, folder]) == folder and os.path.samestat(there, found)
    except (OSError, ValueError):
        return False

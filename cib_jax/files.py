"""Atomic writes, foreign files, locks, texts and names, optional packages, misspelled names, and threads."""

import codecs
import collections
import concurrent.futures
import contextlib
import difflib
import errno
import fcntl
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import stat
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import IO, Any

from cib_jax.errors import UserError

MAX_JSON_BYTES = 2**28


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path whose file replaces `path` atomically when the context ends without an error.

    If the file cannot be written, an OSError is raised and an earlier file at `path` is unchanged.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # network file systems report a full disk only here
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file atomically; if several processes write it at once, the content of one of them remains."""
    with replacing(path) as part:
        part.write_bytes(content)


def open_regular(path: pathlib.Path, *, links: bool = True) -> io.BufferedReader:
    """Opens a regular file of somebody else for reading; without `links`, not even by a symbolic link.

    An OSError is raised for anything else: a pipe, for example, would wait for its writer.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return file


def read_json(path: pathlib.Path) -> Any:
    """Returns the content of a JSON file of somebody else; raises an OSError or ValueError if it cannot be read."""
    with open_regular(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextlib.contextmanager
def locked(path: pathlib.Path, *, shared: bool = False, wait: bool = True) -> Iterator[IO[str]]:
    """Holds an advisory lock on a file, which is created if necessary, while the context lasts.

    The file is left behind: removing it would let two processes hold locks of the same name. Other holders of a
    `shared` lock are admitted. If the lock is held and `wait` is False, a BlockingIOError is raised; if the file system
    does not support locks, an OSError.
    """
    # Not blocking: with a pipe of that name, it would wait for somebody to read it.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK
    with os.fdopen(os.open(path, flags, 0o666), "a") as lock:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield lock


def count(number: int, noun: str, plural: str = "") -> str:
    """Returns a number with its noun, such as "1 photo" or "2,000 photos"; `plural` is the noun with an s if empty."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def printable(name: str) -> str:
    """Returns a file name as valid Unicode: a byte that is not part of valid UTF-8 is written as `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode()


def path_as_utf8(path: str) -> str:
    """Returns a path of this process as UTF-8 text, whatever the locale; U+DC80 to U+DCFF are bytes that are not UTF-8.

    `path_as_utf8(path).encode("utf-8", "surrogateescape")` are the bytes of the path.
    """
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def dump_json(content: Any, *, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Returns JSON that is valid Unicode: in a path by `path_as_utf8`, the byte E9 is the escape `\\udce9`."""
    # Of a character that is not valid Unicode, `printable` makes the escape that JSON has for it.
    return printable(json.dumps(content, ensure_ascii=ensure_ascii, indent=indent))


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Returns the text of a file in UTF-8, or in UTF-16 if it begins with a byte order mark, without that mark.

    Raises:
      UnicodeDecodeError: The text is in another encoding; `errors` may name another treatment of its bytes.
    """
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if marked else "utf-8-sig", errors)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class if there is none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


REINSTALL = "install it again or, if memory is limited (ulimit -v), raise the limit"
"""Advice for a library that is installed and cannot be loaded."""


def is_installed(package: str) -> bool:
    """Returns whether a package can be imported; a folder without code, as an uninstall may leave, cannot."""
    return getattr(importlib.util.find_spec(package), "origin", None) is not None


def import_optional(name: str, missing: UserError) -> ModuleType:
    """Returns an optional package.

    Raises:
      UserError: `missing` if it is not installed, else one of the same class with the reason.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise missing from None
        message = f"{name} is installed but cannot be loaded ({first_line(error)}); {REINSTALL}"
        raise type(missing)(message, missing.field) from error


def install_command(extra: str) -> str:
    """Returns the pip command that adds an extra to this installation: a clone, or a package from a URL or an index."""
    clone = pathlib.Path(__file__).parents[1]
    if (clone / "pyproject.toml").is_file():
        return f"pip install -e '{'.' if clone == pathlib.Path.cwd() else clone}[{extra}]'"
    origin = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        origin = json.loads(importlib.metadata.distribution("cib-jax").read_text("direct_url.json") or "{}")
    scheme = f"{origin['vcs_info']['vcs']}+" if "vcs_info" in origin else ""
    return f"pip install 'cib-jax[{extra}]" + (f" @ {scheme}{origin['url']}'" if origin else "'")


def did_you_mean(name: str, choices: Iterable[str], *, most: int = 1) -> str:
    """Returns "did you mean X? " for the choices that resemble a misspelled name, "" if none does."""
    near = difflib.get_close_matches(name, list(choices), most)
    return f"did you mean {' or '.join(near)}? " if near else ""


def core_count() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yields (item, function(item)) in order, computed by one thread per core, a few results ahead of their use."""
    threads = core_count()
    waiting: collections.deque[tuple[Any, concurrent.futures.Future[Any]]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        # Pillow warns about EXIF data, palettes and large images; what matters is reported as an error of the photo.
        warnings.simplefilter("ignore")
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > 4 * threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def modified_ns(status: os.stat_result) -> int:
    """Returns the time of a file's last change in nanoseconds since 1970, at most what 64 bits hold: the year 2262.

    A broken clock or a damaged file system can give any time.
    """
    return min(max(status.st_mtime_ns, -(2**63) + 1), 2**63 - 1)


def short_reason(error: BaseException) -> str:
    """Returns the operating system's reason in lower case for an OSError, else the first line of the message."""
    return error.strerror.lower() if isinstance(error, OSError) and error.strerror else first_line(error)

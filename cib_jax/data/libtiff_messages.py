"""Messages of libtiff about a file, which it would print without its name, by the thread that decodes the file."""

import contextlib
import ctypes
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import PIL.Image  # noqa: F401 - loads libtiff

_MAPS = pathlib.Path("/proc/self/maps")
_MOST = 20  # messages about one file; a damaged fax has one for each line
_LONGEST = 300

_current = threading.local()
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Yields a list, to which the messages of libtiff in this thread are appended while the context lasts.

    Only on Linux, where Pillow's libtiff can be found: elsewhere they are printed on standard error, as by default.
    """
    _current.messages = messages = list[str]()
    try:
        yield messages
    finally:
        del _current.messages


def _handle(module: bytes | None, form: bytes | None, arguments: int | None) -> None:
    """Takes a message as C's vprintf does, in the thread that called libtiff."""
    messages = getattr(_current, "messages", None)
    if messages is None:  # somebody else's file
        if _previous:
            _previous(module, form, arguments)
        return
    if len(messages) >= _MOST or form is None:
        return
    text = ctypes.create_string_buffer(_LONGEST)
    _libc.vsnprintf(text, ctypes.c_size_t(_LONGEST), ctypes.c_char_p(form), ctypes.c_void_p(arguments))
    name = "" if module in (None, b"tempfile.tif") else f"{(module or b'').decode(errors='replace')}: "
    messages.append((name + text.value.decode(errors="replace")).strip().rstrip("."))


def _install() -> tuple[Any, Any]:
    """Replaces libtiff's error handler; returns the new and the previous one, None for both if there is no libtiff."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        path = next(path for path in (line.partition("/")[2] for line in lines) if "libtiff" in path)
        handler = _HANDLER(_handle)
        set_handler = ctypes.CDLL(f"/{path}").TIFFSetErrorHandler
    except (OSError, StopIteration, AttributeError):
        return None, None
    set_handler.restype, set_handler.argtypes = _HANDLER, [_HANDLER]
    return handler, set_handler(handler)


_libc = ctypes.CDLL(None)
_handler, _previous = _install()  # kept, since libtiff calls the handler until the process ends

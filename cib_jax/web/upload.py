"""The photo in the body of a request: the body itself, or the one file of a form. Nothing is written to disk."""

import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from cib_jax.web.answers import QueryError

_FORM = b"multipart/form-data"


def photo_of(body: bytes, content_type: str) -> bytes:
    """Returns a photo's bytes.

    Args:
      body: of the request.
      content_type: the header; what is not `multipart/form-data` is the photo itself, whatever it says.

    Raises:
      QueryError: it is empty, or a form without exactly one file.
    """
    kind, options = parse_options_header(content_type)
    photo = _of_form(body, options.get(b"boundary", b"")) if kind == _FORM else body
    if not photo:
        raise QueryError("There is no photo in the request; send its bytes, or a form with one file.")
    return photo


def _of_form(body: bytes, boundary: bytes) -> bytes:
    files: list[list[bytes]] = []
    name, value, is_file = bytearray(), bytearray(), False

    def begin_part() -> None:
        nonlocal is_file
        is_file = False

    def end_header() -> None:
        nonlocal is_file
        if bytes(name).lower() == b"content-disposition" and b"filename" in parse_options_header(bytes(value))[1]:
            is_file = True
            files.append([])
        name.clear()
        value.clear()

    def data(content: bytes, start: int, end: int) -> None:
        if is_file:
            files[-1].append(content[start:end])

    callbacks: python_multipart.multipart.MultipartCallbacks = {
        "on_part_begin": begin_part,
        "on_header_field": lambda content, start, end: name.extend(content[start:end]),
        "on_header_value": lambda content, start, end: value.extend(content[start:end]),
        "on_header_end": end_header,
        "on_part_data": data,
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise QueryError("The form is damaged; send the photo's bytes, or a form with one file.") from None
    if len(files) != 1:
        raise QueryError(f"The form has {len(files)} files; send one photo.")
    return b"".join(files[0])

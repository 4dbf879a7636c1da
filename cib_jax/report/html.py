"""HTML page of a report: one file with all its pictures."""

import base64
import importlib.resources
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jinja2


class Picture(NamedTuple):
    """A picture: name of its files without .png and .pdf, alternative text, and a caption on how it was made."""

    name: str
    png: bytes
    title: str
    note: str = ""
    pdf: bytes = b""


class Section(NamedTuple):
    """Pictures under a heading."""

    heading: str
    pictures: Sequence[Picture]


class Grid(NamedTuple):
    """A table; the first entry of a row is its heading."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


_TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    (importlib.resources.files("cib_jax") / "report" / "page.html.jinja").read_text(encoding="utf-8")
)


def render(
    title: str,
    lead: str,
    grids: Sequence[Grid],
    sections: Sequence[Section],
    *,
    notes: Sequence[str],
    config: str,
    wide: Collection[str] = (),
) -> str:
    """Returns the page as HTML; all arguments are shown as text, never interpreted as markup.

    `lead` is a sentence below the title, `notes` are paragraphs on how the results were made, and `wide` are the names
    of pictures that take the whole width.
    """
    pictures = (picture for section in sections for picture in section.pictures)
    encoded = {picture.name: base64.b64encode(picture.png).decode() for picture in pictures}
    return _TEMPLATE.render(
        title=title, lead=lead, grids=grids, sections=sections, notes=notes, config=config, wide=wide, encoded=encoded
    )

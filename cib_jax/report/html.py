"""The page of a report: one HTML file that holds all its pictures."""

import base64
import importlib.resources
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jinja2


class Picture(NamedTuple):
    """A PNG with its place in the page."""

    name: str
    """Of its file, without .png."""
    png: bytes
    title: str
    """What is seen, for readers who cannot see it too."""
    note: str = ""
    """How it was made."""


class Section(NamedTuple):
    """Pictures under a heading."""

    heading: str
    pictures: Sequence[Picture]


class Grid(NamedTuple):
    """A table; a row's first entry is its heading."""

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
    """Returns the page as HTML; whatever it is given is shown as text, never taken as markup.

    Args:
      title: of the page.
      lead: one sentence below it.
      grids: the tables.
      sections: the pictures.
      notes: about how they were made.
      config: of the run, as text.
      wide: names of pictures that take the whole width.
    """
    encoded = {
        picture.name: base64.b64encode(picture.png).decode() for section in sections for picture in section.pictures
    }
    return _TEMPLATE.render(
        title=title, lead=lead, grids=grids, sections=sections, notes=notes, config=config, wide=wide, encoded=encoded
    )

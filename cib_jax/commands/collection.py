"""Index of photos as an object: made, searched, and looked through for copies in one line each."""

import pathlib
from typing import Any, Self

import rich.console

from cib_jax.commands import search
from cib_jax.commands.duplicates import duplicates
from cib_jax.commands.index import index as index_photos
from cib_jax.console import bar_console
from cib_jax.errors import DataError
from cib_jax.storage import collection as storage
from cib_jax.storage.collection import Photo


class Collection(storage.Collection):
    """The photos of an index and the encoder that made their codes. Any number of threads may search at once.

    Examples:
      >>> import cib_jax as cib
      >>> collection = cib.Collection.open("INDEX")
      >>> [(distance, photo.path) for distance, photo in collection.search("PHOTOS/red.png", k=1)]
      [(0, 'red.png')]
      >>> collection.duplicates(radius=0)
      []
    """

    @classmethod
    def create(cls, index: pathlib.Path | str, images: pathlib.Path | str, **options: Any) -> Self:
        """Indexes photos, or updates their index, and returns it; takes all arguments of `cib_jax.index_photos`."""
        index_photos(index, images, **options)
        return cls.open(index)

    def search(self, photo: pathlib.Path | str, k: int = search.K) -> list[tuple[int, Photo]]:
        """Returns the photos nearest to one on disk with their distances in bits, as `cib_jax.search_photos` does."""
        if pathlib.Path(photo).expanduser().is_dir():
            raise DataError(f"photo must be a file, got the folder {photo}; use cib_jax.search_photos", "photo")
        return search.search(self, photo, k=k, console=rich.console.Console(quiet=True))[0].hits

    def duplicates(
        self,
        radius: int | None = None,
        confirm: bool = True,
        reference: pathlib.Path | str | None = None,
        *,
        progress: bool = True,
    ) -> list[list[tuple[int, Photo]]]:
        """Returns groups of copies of one picture, as `cib_jax.find_duplicates` does.

        `progress` shows bars in terminals and notebooks.
        """
        quiet, bars = rich.console.Console(quiet=True), bar_console(progress)
        return duplicates(self, radius=radius, confirm=confirm, reference=reference, console=quiet, bars=bars)

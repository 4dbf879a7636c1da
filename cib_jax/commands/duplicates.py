"""Copies of pictures among the photos of an index: candidates by codes and hashes, confirmed by their pixels."""

import collections
import csv
import datetime
import functools
import hashlib
import itertools
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.table
import threadpoolctl
from jaxtyping import Int64, UInt8

from cib_jax.commands import search
from cib_jax.commands.search import Output
from cib_jax.console import bar_console, format_text, print_json, print_message, progress_bar
from cib_jax.data.photos import decode
from cib_jax.files import count, map_in_order, modified_ns, open_regular, path_as_utf8, printable
from cib_jax.report.contact_sheet import Tile
from cib_jax.retrieval import near_duplicates
from cib_jax.retrieval.index import Index
from cib_jax.retrieval.picture_match import ORIENTATIONS, Picture, is_copy, is_framed, perceptual_hashes
from cib_jax.storage.collection import Collection, Photo

FORMATS = ("table", "json", "csv")
PAGE = 500  # photos that are read at a time
BY_CODE = 8  # candidates of each photo by code
BY_BOTH = 8  # by code and hash together
BY_HASH = 2  # by the hash in each orientation
HASH_BITS = 12  # bits, of 64, in which the hash of a copy may differ
KEPT_BYTES = 1 << 30  # thumbnails that are kept in memory
KEPT_FEATURES = 8_000  # features of pictures, 160 KB each
KEPT_PIXELS = 250  # decoded thumbnails, half a megabyte each


def duplicates(
    index: pathlib.Path | str | Collection,
    *,
    radius: int | None = None,
    confirm: bool = True,
    reference: pathlib.Path | str | None = None,
    format: str = "table",
    show: pathlib.Path | str | None = None,
    console: rich.console.Console | None = None,
    bars: rich.console.Console | None = None,
) -> list[list[tuple[int, Photo]]]:
    """Prints and returns groups of photos that are copies of one picture, the largest group first. Deletes nothing.

    Copies may differ in format, size, compression, light and color, and be cropped, framed, marked, turned or mirrored.
    Candidates have near codes or near perceptual hashes; whether two of them are copies is decided by their pixels,
    aligned to each other (`retrieval.picture_match`). The first photo of a group is the one worth keeping: it has the
    most pixels, among equals the most bytes, then the oldest date; a photo to which a border or a caption was added
    does not come first. Each comes with its distance in bits from the first. `Photo.digest` is the same for photos with
    equal bytes.

    Args:
      index: Folder or other address of the index, or the opened collection.
      radius: Maximum distance in bits between the codes of two copies; None: any. Without `confirm`, that of two
        neighbors in a chain; None: a sixteenth of the code's bits.
      confirm: Whether pixels must agree; False groups photos of similar content, connected by chains of near codes.
      reference: Folder of photos, or a photo: groups are then those of its photos with their copies in the index.
      format: "table", or one line for each photo in "json" or "csv".
      show: PNG file for a contact sheet.
      console: Console for the results.
      bars: Console for progress bars; None: `console`, or with "json" and "csv" stderr if it is a terminal.

    Raises:
      IndexFolderError, SavedHasherError: There is no index, or it cannot be read.
      ConfigError: The format is unknown, or the contact sheet cannot be written.
      DataError: No photo of the reference can be read.
      SearchError: FAISS or OpenCV is not installed, or the radius is negative.

    Examples:
      >>> import rich.console
      >>> import cib_jax as cib
      >>> cib.find_duplicates("INDEX", radius=0, console=rich.console.Console(quiet=True))
      []
    """
    output = search.open_output(format, show, console, FORMATS)
    search.validate_radius(radius)
    collection = search.open_collection(index)
    bars = bars or (bar_console() if output.for_scripts else output.console)
    others = _read_reference(reference, collection, output, bars) if reference is not None else None
    items = _Items(collection, others)
    if not confirm:
        radius = collection.bits // 16 if radius is None else radius
        with progress_bar(bars, "Comparing codes", len(items), unit="codes", delay=1) as advance:
            groups = _near_codes(items, radius, advance)
    else:
        groups = _confirmed(items, radius, bars)
    ordered = sorted((items.by_worth(group, confirm) for group in groups), key=len, reverse=True)
    results = [[(items.distance(group[0].number, one.number), one.photo) for one in group] for group in ordered]
    _print_groups(output, items, ordered, results)
    kind = "copies of one picture" if confirm else "photos of similar content"
    if not output.for_scripts:
        print_message(output.console, _summary(items, ordered, kind, None if confirm else radius))
    rows: list[tuple[Tile | None, list[Tile]]] = []
    for group, result in zip(ordered[: search.ROWS] if output.sheet else (), results, strict=False):
        pairs = zip(group[: search.COLUMNS], result, strict=False)
        rows.append((None, [items.tile(one.number, distance) for one, (distance, _) in pairs]))
    cut = len(ordered) > search.ROWS or any(len(group) > search.COLUMNS for group in ordered)
    note = f", the first {search.ROWS} groups, {search.COLUMNS} photos of each at most" if cut else ""
    search.write_sheet(output, f"Groups of {kind}", rows, note)
    return results


# Photos


class _Reference(NamedTuple):
    """Photos of a folder that is compared with the index."""

    photos: list[Photo]
    codes: UInt8[np.ndarray, "photos bytes"]


class _Member(NamedTuple):
    """A photo of a group."""

    number: int
    photo: Photo
    role: str
    """"keep", "reference", "exact copy" of one before it, or "similar"."""


def _read_reference(
    place: pathlib.Path | str, collection: Collection, output: Output, console: rich.console.Console
) -> _Reference:
    found = search.find_photos(str(place), collection, "--reference")
    photos: list[Photo] = []

    def squares() -> Iterator[UInt8[np.ndarray, "side side 3"]]:
        for name, decoded in search.read_photos(found, output, "--reference"):
            path = os.path.abspath(os.path.expanduser(name))  # the paths of the index are relative to its own root
            status, size = os.stat(path), (decoded.width, decoded.height)
            photos.append(Photo("", path, status.st_size, modified_ns(status), *size, decoded.thumbnail))
            yield decoded.square

    stream, batch = squares(), collection.hasher.batch_size
    batches = iter(lambda: list(itertools.islice(stream, batch)), [])
    with progress_bar(console, "Reading the reference", len(found.names)) as advance:
        codes = collection.hasher.encode_batches(map(np.stack, batches), advance, size=batch)
    return _Reference(photos, codes)


class _Items:
    """The photos of an index, followed by those of a reference, by number."""

    def __init__(self, collection: Collection, reference: _Reference | None):
        self.collection, self.reference = collection, reference
        self.indexed = len(collection)
        codes = [collection.codes, reference.codes] if reference else [collection.codes]
        self.codes = np.ascontiguousarray(np.concatenate(codes))
        self._thumbnails: dict[int, bytes] = {}
        self._free, self._lock = KEPT_BYTES, threading.Lock()
        self.looks = np.zeros((0, ORIENTATIONS, 8), np.uint8)
        self.picture = functools.lru_cache(KEPT_FEATURES)(self._picture)
        self.pixels = functools.lru_cache(KEPT_PIXELS)(self._pixels)

    def __len__(self) -> int:
        return len(self.codes)

    def distance(self, one: int, other: int) -> int:
        return int(np.bitwise_count(self.codes[one] ^ self.codes[other]).sum())

    def photos(self, numbers: Sequence[int], *, thumbnails: bool = False) -> list[Photo]:
        """Returns the metadata of photos, in the order of `numbers`."""
        indexed = [number for number in numbers if number < self.indexed]
        read = iter(self.collection.photos(indexed, thumbnails=thumbnails))
        others = self.reference.photos if self.reference else []
        return [next(read) if number < self.indexed else others[number - self.indexed] for number in numbers]

    def look(self, console: rich.console.Console) -> dict[bytes, list[int]]:
        """Computes the perceptual hashes of all thumbnails, and returns the photos of each thumbnail by its digest."""
        same: dict[bytes, list[int]] = collections.defaultdict(list)
        hashes: list[np.ndarray] = []

        def page(start: int) -> list[tuple[np.ndarray, bytes]]:
            numbers = range(start, min(start + PAGE, len(self)))
            found = []
            for number, photo in zip(numbers, self.photos(numbers, thumbnails=True), strict=True):
                self._keep(number, photo.thumbnail)
                digest = hashlib.blake2b(photo.thumbnail, digest_size=16).digest()
                found.append((perceptual_hashes(decode(photo.thumbnail, 0)), digest))
            return found

        with progress_bar(console, "Looking at photos", len(self)) as advance:
            for _, found in map_in_order(page, range(0, len(self), PAGE)):
                for looks, digest in found:
                    same[digest].append(len(hashes))
                    hashes.append(looks)
                advance(len(found))
        self.looks = np.array(hashes, np.uint8).reshape(-1, ORIENTATIONS, 8)
        return same

    def _keep(self, number: int, thumbnail: bytes) -> None:
        with self._lock:
            if self._free >= len(thumbnail):
                self._free -= len(thumbnail)
                self._thumbnails[number] = thumbnail

    def _picture(self, number: int) -> Picture:
        return Picture(functools.partial(self.pixels, number), self.looks[number])

    def _pixels(self, number: int) -> UInt8[np.ndarray, "height width 3"]:
        thumbnail = self._thumbnails.get(number)
        return decode(thumbnail or self.photos([number], thumbnails=True)[0].thumbnail, 0)

    def tile(self, number: int, distance: int) -> Tile:
        """Returns a photo's tile in a contact sheet."""
        (photo,) = self.photos([number], thumbnails=True)
        return Tile(decode(photo.thumbnail, 0), search.format_bits(distance), note=printable(photo.path))

    def by_worth(self, group: Sequence[int], copies: bool) -> list[_Member]:
        """Returns the photos of a group with their roles, the one worth keeping first, those of a reference before.

        Of `copies`, the first is none to which a border or a bar was added.
        """
        photos = dict(zip(group, self.photos(group), strict=True))

        def rank(number: int) -> tuple[bool, int, int, int, str]:
            photo = photos[number]
            return number < self.indexed, -photo.width * photo.height, -photo.size, photo.modified_ns, photo.path

        def framed(number: int) -> bool:
            pixels = photos[number].width * photos[number].height
            smaller = [other for other in group if pixels / 2 <= photos[other].width * photos[other].height < pixels]
            return any(is_framed(self.picture(number), self.picture(other)) for other in smaller)

        ordered = sorted(group, key=rank)
        if copies and not self.reference:
            keep = next((number for number in ordered if not framed(number)), ordered[0])
            ordered.insert(0, ordered.pop(ordered.index(keep)))
        sizes = collections.Counter(photo.size for photo in photos.values())
        members: list[_Member] = []
        seen: set[str] = set()
        for number in ordered:
            photo = photos[number]
            if sizes[photo.size] > 1:
                photo = photo._replace(digest=_digest(os.path.join(self.collection.root, photo.path)))
            if number >= self.indexed:
                role = "reference"
            elif photo.digest and photo.digest in seen:
                role = "exact copy"
            else:
                role = "similar" if members else "keep"
            seen.add(photo.digest)
            members.append(_Member(number, photo, role))
        return members


def _digest(path: str) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits, "" if it cannot be read."""
    try:
        with open_regular(pathlib.Path(path)) as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError:
        return ""


# Groups


def _near_codes(items: _Items, radius: int, advance: Callable[[int], None]) -> list[list[int]]:
    """Returns the groups that are connected by chains of codes within the radius."""
    if not len(items):
        return []
    groups = [group.tolist() for group in near_duplicates.groups(items.codes, radius, advance)]
    return [group for group in groups if items.reference is None or _crosses(group, items.indexed)]


def _crosses(group: Sequence[int], indexed: int) -> bool:
    return min(group) < indexed <= max(group)


def _confirmed(items: _Items, radius: int | None, console: rich.console.Console) -> list[list[int]]:
    """Returns the groups of photos that are connected by pairs of copies."""
    if len(items) < 2:
        return []
    same = items.look(console)
    parent = np.arange(len(items))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = int(parent[parent[number]])
        return number

    # Equal thumbnails show the same pixels.
    for numbers in same.values():
        for number in numbers[1:]:
            if radius is None or items.distance(number, numbers[0]) <= radius:
                parent[root(number)] = root(numbers[0])
    candidates = _neighbors_together(_candidates(items, console), len(items)).tolist()
    pairs = [pair for pair in candidates if radius is None or items.distance(*pair) <= radius]

    def compare(pair: list[int]) -> bool:
        # Pairs that others have connected meanwhile need no comparison.
        return root(pair[0]) != root(pair[1]) and is_copy(*map(items.picture, pair))

    # Small products in each thread: BLAS's own threads would take ten times as long.
    one_thread = threadpoolctl.threadpool_limits(1, "blas")
    with one_thread, progress_bar(console, "Comparing photos", len(pairs), unit="pairs") as advance:
        for (one, other), copies in map_in_order(compare, pairs):
            if copies:
                parent[root(other)] = root(one)
            advance(1)
    members: dict[int, list[int]] = collections.defaultdict(list)
    for number in range(len(items)):
        members[root(number)].append(number)
    found = [group for group in members.values() if len(group) > 1]
    return [group for group in found if items.reference is None or _crosses(group, items.indexed)]


def _candidates(items: _Items, console: rich.console.Console) -> Int64[np.ndarray, "pairs 2"]:
    """Returns pairs of photos that may be copies, each once, by the first photo's number.

    A crop has a near code, but a far hash; among hundreds of scanned pages with one code, the hash finds the copy, and
    so it does for a picture with writing across it; a copy turned by quarters or mirrored has the hash of another
    orientation.
    """
    turned = np.ascontiguousarray(items.looks.swapaxes(0, 1))
    plain = turned[0]
    both = np.concatenate([items.codes, plain], axis=1)
    searches = [
        (items.codes, items.codes, BY_CODE, items.collection.bits // 4),
        (both, both, BY_BOTH, 8 * both.shape[1]),
    ]
    searches += [(plain, hashes, BY_HASH, HASH_BITS) for hashes in turned]
    database = slice(0, items.indexed)
    # With a reference, its photos alone are queries, so that no two photos of the index are compared.
    queries = np.arange(items.indexed if items.reference else 0, len(items))
    found, total = [], len(searches) * len(queries)
    with progress_bar(console, "Finding candidates", total, unit="searches", delay=1) as advance:
        for codes, wanted, k, most in searches:
            index = Index.of(codes[database])
            for start in range(0, len(queries), PAGE):
                some = queries[start : start + PAGE]
                distances, ids = index.search(wanted[some], min(k + 1, len(index)))
                one = np.broadcast_to(some[:, None], ids.shape)
                near = (distances <= most) & (ids != one)
                found.append(np.sort(np.stack([one[near], ids[near]], axis=1), axis=1))
                advance(len(some))
    return np.unique(np.concatenate(found), axis=0)


def _neighbors_together(pairs: Int64[np.ndarray, "pairs 2"], photos: int) -> Int64[np.ndarray, "pairs 2"]:
    """Returns the pairs in an order in which those of one photo, and of its neighbors, follow one another.

    A photo whose features were computed for one pair is then mostly still in memory for its others: with memory for a
    twentieth of 2,000 photos, features are computed twice for a photo, and ten times by the order of the numbers.
    """
    from scipy import sparse  # takes a quarter of a second, which other commands would wait for
    from scipy.sparse import csgraph

    graph = sparse.coo_array((np.ones(len(pairs), np.bool_), pairs.T), shape=(photos, photos)).tocsr()
    place = np.argsort(csgraph.reverse_cuthill_mckee(graph + graph.T, symmetric_mode=True))
    first, second = np.sort(place[pairs], axis=1).T
    return pairs[np.lexsort((second, first))]


# Output

COLUMNS = ("group", "role", "root", "path", "distance", "id", "width", "height", "bytes", "modified", "sha256")


def _print_groups(
    output: Output, items: _Items, groups: Sequence[list[_Member]], results: Sequence[list[tuple[int, Photo]]]
) -> None:
    root = path_as_utf8(items.collection.root)
    writer = _csv_writer(output) if output.format == "csv" else None  # with a header even if there is no group
    for number, (group, result) in enumerate(zip(groups, results, strict=True), 1):
        if not output.for_scripts:
            _print_table(output.console, f"Group {number}: {len(group)} photos", root, group, result)
            continue
        for member, (distance, photo) in zip(group, result, strict=True):
            record: dict[str, Any] = {"group": number, "role": member.role, "root": root}
            record |= {"path": path_as_utf8(photo.path), "distance": distance, "id": photo.id}
            record |= {"width": photo.width, "height": photo.height, "bytes": photo.size}
            record |= {"modified": _date(photo), "sha256": photo.digest}
            if writer is None:
                print_json(output.console, record)
            else:
                # A spreadsheet would take such a name for a formula.
                path = re.sub(r"^(?=[=+\-@\t\r])", "./", photo.path)
                writer.writerow(record | {"root": printable(items.collection.root), "path": printable(path)})


def _csv_writer(output: Output) -> "csv.DictWriter[str]":
    writer = csv.DictWriter(output.console.file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    return writer


def _date(photo: Photo) -> str:
    """Returns when a file was changed, in UTC; "" for a time that the calendar lacks."""
    try:
        return datetime.datetime.fromtimestamp(photo.modified_ns // 10**9, datetime.UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return ""


def _print_table(
    console: rich.console.Console,
    title: str,
    root: str,
    group: Sequence[_Member],
    result: Sequence[tuple[int, Photo]],
) -> None:
    print_message(console, title)
    table = rich.table.Table()
    table.add_column("")
    table.add_column("bits", justify="right")
    table.add_column(format_text(f"photo in {root}"), overflow="fold")
    table.add_column("pixels", justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("changed", no_wrap=True)
    for member, (distance, photo) in zip(group, result, strict=True):
        size = f"{photo.width} × {photo.height}", f"{photo.size:,}"
        table.add_row(member.role, str(distance), format_text(photo.path), *size, _date(photo)[:10])
    console.print(table)


def _summary(items: _Items, groups: Sequence[list[_Member]], kind: str, radius: int | None) -> str:
    members = [member for group in groups for member in group]
    text = f"{count(len(groups), 'group')} of {kind}, {count(len(members), 'photo')} of {len(items):,}"
    if radius is not None:
        return f"{text}; codes of neighbors differ in at most {search.format_bits(radius)}"
    exact = sum(member.role == "exact copy" for member in members)
    spare = sum(member.photo.size for member in members if member.role not in ("keep", "reference"))
    if members:
        text += f", {count(exact, 'exact copy', 'exact copies')} among them; "
        text += f"all but the first of each group take {spare / 1e6:,.1f} MB; "
        text += "nothing was deleted"
    return text

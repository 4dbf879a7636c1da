"""Search, against plain loops over all codes."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import rich.console

from cib_jax.commands.duplicates import duplicates
from cib_jax.commands.search import search
from cib_jax.data import photo_folder, photos
from cib_jax.data.dataset import Unreadable
from cib_jax.errors import ConfigError, DataError, IndexFolderError, SearchError
from cib_jax.inference.hasher import Hasher
from cib_jax.models.encoder import plain_features
from cib_jax.report.contact_sheet import SIDE
from cib_jax.retrieval import index
from cib_jax.storage.collection import Collection
from cib_jax.storage.photo_table import IndexMetadata, PhotoTable, key_of
from tests.command_line import ROOT
from tests.commands import indexing
from tests.data import pictures

COUNT = 130


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An index of more photos than are ordered anew, with 8 bits, so that many are equally far; some copies."""
    folder = tmp_path_factory.mktemp("search")
    indexing.save_hasher(folder / "encoder", bits=8)
    for number in range(COUNT):
        image = pictures.colored(number, 40) if number % 2 else pictures.smooth(40, 30, seed=number)
        pictures.write(folder / "photos" / f"{number % 3}" / f"{number:03}.png", image)
    (folder / "photos" / "broken.png").write_bytes(b"no picture")
    pictures.write(folder / "photos" / "[red]:cat:\x1b[31m.png", pictures.smooth(20, 10, seed=500))
    for number in range(5):
        pictures.write(folder / "queries" / f"{number}.jpg", pictures.smooth(50, 60, seed=900 + number))
    indexing.run(folder / "i", folder / "photos", workdir=folder / "encoder")
    return folder


@pytest.fixture(scope="module")
def hasher(place):
    return Hasher.load(place / "encoder")


@pytest.fixture(scope="module")
def known(place, hasher):
    """Path and code of every photo, in the order of ties."""
    held = indexing.expected(place / "photos", hasher)
    codes = {name: values[2] for name, values in held.items() if not isinstance(values, str)}
    return sorted(codes.items(), key=lambda pair: key_of(pair[0]))


def ask(place, query, *, width=100, **options):
    console = rich.console.Console(file=io.StringIO(), width=width)
    found = search(place / "i", query, console=console, **options)
    return found, console.file.getvalue()


def apart(a, b):
    return sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True))


def plainly(known, code):
    """All photos by distance, ties by key."""
    return sorted(((apart(code, other), path) for path, other in known), key=lambda pair: pair[0])


def pairs(found):
    return [(distance, photo.path) for distance, photo in found.hits]


def code_of(hasher, path):
    return hasher.encode(photos.decode(path, hasher.side)[None])[0].tobytes()


def direction(hasher, path):
    """The features of a photo in floating point, scaled to length 1."""
    square = photos.decode(path, hasher.side)[None]
    feature = np.asarray(plain_features(hasher.encoder, hasher.params, hasher.frozen, square), np.float64)[0]
    return feature / np.linalg.norm(feature)


@pytest.fixture(scope="module")
def directions(place, hasher, known):
    return {path: direction(hasher, place / "photos" / path) for path, _ in known}


def check(one, expected, hasher, directions):
    """Compares a query's hits with the first of `expected`, ordered by distance and then by cosine."""
    query = direction(hasher, one.query)
    cosines = {path: float(query @ directions[path]) for _, path in expected}
    ordered = sorted((distance, -cosines[path]) for distance, path in expected)[: len(one.hits)]
    assert set(pairs(one)) <= set(expected)
    # Those of the index are rounded to bytes.
    np.testing.assert_allclose([(distance, -cosines[path]) for distance, path in pairs(one)], ordered, atol=0.01)


def test_a_truncated_query_is_searched_and_told(place, tmp_path, capsys):
    (tmp_path / "cut.jpg").write_bytes((place / "queries" / "1.jpg").read_bytes()[:-20])
    found, _ = ask(place, tmp_path / "cut.jpg", k=3)
    whole, _ = ask(place, place / "queries" / "1.jpg", k=3)
    assert len(found[0].hits) == 3 and apart(found[0].code.tobytes(), whole[0].code.tobytes()) <= 4
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and str(tmp_path / "cut.jpg") in printed[0]


def test_only_photos_of_one_folder_are_searched(place, hasher, known, directions):
    found, _ = ask(place, place / "queries" / "1.jpg", k=20, folder="1")
    inside = [(path, code) for path, code in known if path.startswith("1/")]
    assert len(found[0].hits) == 20
    check(found[0], plainly(inside, found[0].code), hasher, directions)
    with pytest.raises(SearchError) as error:
        ask(place, place / "queries" / "1.jpg", before="1999")
    assert error.value.field == "--before"


@pytest.mark.parametrize("options", [{}, {"k": 1}, {"k": 7}, {"k": 10_000}])
def test_the_nearest_are_those_of_a_plain_loop(place, hasher, known, directions, options):
    found, _ = ask(place, place / "queries", **options)
    assert [one.query for one in found] == [str(place / "queries" / f"{number}.jpg") for number in range(5)]
    for one in found:
        assert one.code.tobytes() == code_of(hasher, one.query)
        assert len(one.hits) == min(options.get("k", 20), len(known))
        check(one, plainly(known, one.code.tobytes()), hasher, directions)


@pytest.mark.parametrize(("radius", "k"), [(0, None), (2, None), (2, 3), (99, None)])
def test_within_a_radius_all_are_found(place, hasher, known, directions, radius, k):
    found, _ = ask(place, place / "queries" / "0.jpg", radius=radius, k=k)
    near = [pair for pair in plainly(known, found[0].code.tobytes()) if pair[0] <= radius]
    assert len(found[0].hits) == len(near[:k])
    check(found[0], near, hasher, directions)


@pytest.mark.parametrize("k", [5, 100, 125])
@pytest.mark.parametrize("radius", [None, 3])
def test_hits_are_ordered_anew_by_the_cosine_of_features(place, hasher, known, directions, k, radius):
    found, told = ask(place, place / "queries", k=k, radius=radius, rerank=True)
    assert "ordered by the network's features" in told
    for one in found:
        query = direction(hasher, one.query)
        cosines = {path: float(query @ directions[path]) for path, _ in known}
        near = [pair for pair in plainly(known, one.code.tobytes()) if radius is None or pair[0] <= radius]
        expected = sorted((cosines[path] for _, path in near), reverse=True)[:k]
        assert [cosines[path] for _, path in pairs(one)] == pytest.approx(expected, abs=0.01)
        assert set(pairs(one)) <= set(near)


@pytest.mark.parametrize("rerank", [False, True])
def test_a_photo_itself_comes_first_among_equal_codes(place, rerank):
    """Codes of 8 bits are shared by many of the photos."""
    for number in range(0, COUNT, 20):
        name = f"{number % 3}/{number:03}.png"
        found, _ = ask(place, place / "photos" / name, k=1, rerank=rerank)
        assert pairs(found[0]) == [(0, name)]


def test_a_printed_path_can_be_given_back_and_the_table_names_its_folder(place):
    found, told = ask(place, place / "photos" / "1" / "004.png", k=1, width=200)
    path = found[0].hits[0][1].path
    assert path in told and f"photo in {place / 'photos'}" in told
    again, _ = ask(place, path, k=1)
    assert again[0].query == str(place / "photos" / path) and again[0].hits[0][0] == 0


def test_what_is_told_of_a_photo_is_true(place):
    found, _ = ask(place, place / "photos" / "1" / "004.png", k=1)
    distance, photo = found[0].hits[0]
    assert distance == 0
    path = place / "photos" / photo.path
    width, height = PIL.Image.open(path).size
    assert (photo.width, photo.height, photo.size) == (width, height, path.stat().st_size)
    assert (photo.modified_ns, photo.thumbnail) == (path.stat().st_mtime_ns, b"")


def test_lines_of_json_say_what_is_returned(place):
    shutil.copytree(place / "queries", place / "mixed", dirs_exist_ok=True)
    (place / "mixed" / "0.jpg").write_bytes(b"no picture")
    found, told = ask(place, place / "mixed", k=3, format="json", width=20)
    lines = [json.loads(line) for line in told.splitlines()]
    assert lines[0] == {
        "query": str(place / "mixed" / "0.jpg"),
        "error": "not a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC image",
    }
    assert len(lines) == 5 and len(found) == 4
    for line, one in zip(lines[1:], found, strict=True):
        assert (line["query"], bytes.fromhex(line["code"])) == (one.query, one.code.tobytes())
        assert [(hit["distance"], hit["path"]) for hit in line["hits"]] == pairs(one)
        assert [(hit["id"], hit["width"]) for hit in line["hits"]] == [(photo.id, photo.width) for _, photo in one.hits]


def test_the_table_shows_strange_names_as_they_are_and_commands_no_terminal(place):
    name = "[red]:cat:\x1b[31m.png"
    _, told = ask(place, place / "photos" / name, k=10_000)
    assert told.count("[red]:cat:\\x1b[31m.png") == 2 and "\x1b" not in told and "20 × 10" in told
    _, told = ask(place, place / "queries" / "0.jpg", k=3, width=40)
    assert told.splitlines()[0] == str(place / "queries" / "0.jpg"), "on one line, to be copied"
    assert max(map(len, told.splitlines()[1:])) <= 40
    _, told = ask(place, place / "photos" / name, k=1, radius=0, kind="exact")
    assert "nothing was found" not in told


def test_names_that_are_not_utf_8_come_back_to_the_byte(place, tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    for name, content in ((b"\xe9.png", pictures.content(pictures.smooth(9, 9), "PNG")), (b"\xe8.png", b"no picture")):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    indexing.run(tmp_path / "i", os.fsdecode(folder), workdir=place / "encoder")
    _, told = ask(tmp_path, os.fsdecode(folder), format="json")
    failed, found = (json.loads(line) for line in told.splitlines())
    assert os.fsencode(failed["query"]) == os.path.join(folder, b"\xe8.png") and failed["error"]
    assert os.fsencode(found["query"]) == os.path.join(folder, b"\xe9.png")
    assert os.fsencode(found["root"]) == folder and os.fsencode(found["hits"][0]["path"]) == b"\xe9.png"


def test_a_folder_in_the_query_that_cannot_be_entered_is_told(place, monkeypatch):
    walk = photo_folder.walk_folder

    def closed(directory, exclude):
        return walk(directory, exclude)._replace(closed=[Unreadable("secret", "permission denied")])

    monkeypatch.setattr(photo_folder, "walk_folder", closed)
    _, told = ask(place, place / "queries", k=1, format="json")
    name = str(place / "queries" / "secret")
    assert json.loads(told.splitlines()[0]) == {"query": name, "error": "permission denied"}
    _, told = ask(place, place / "queries", k=1)
    assert f"{name} cannot be read: permission denied" in told


def test_an_unreadable_photo_of_a_folder_is_told_and_left_out(place):
    shutil.copytree(place / "queries", place / "some", dirs_exist_ok=True)
    (place / "some" / ":cat:.jpg").write_bytes(b"")
    found, told = ask(place, place / "some", k=1)
    assert len(found) == 5 and f"{place / 'some' / ':cat:.jpg'} cannot be read: 0 bytes" in told


def test_what_is_the_systems_fault_is_told_of_the_query(place, monkeypatch):
    def see(path, size, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(photos, "decode_with_thumbnail", see)
    for query in (place / "queries", place / "queries" / "0.jpg"):
        with pytest.raises(DataError, match=r"^--query: .*0\.jpg cannot be read now \(input/output error\)"):
            ask(place, query)


def test_a_contact_sheet_has_a_row_for_each_query(place, tmp_path):
    sheet = tmp_path / "ü b" / "sheet.PNG"
    sheet.parent.mkdir()
    _, told = ask(place, place / "queries", k=3, show=sheet)
    image = PIL.Image.open(sheet)
    step = SIDE + 8
    line = step + 20 + 16  # with the distance and the name
    assert image.format == "PNG" and image.size == (8 + step + 24 + 3 * step, 30 + 5 * line)
    assert f"Drawn in {sheet}" in told and [path.name for path in sheet.parent.iterdir()] == ["sheet.PNG"]
    # The query itself stands before what it finds.
    (found,), _ = ask(place, place / "photos" / "0" / "000.png", radius=0, show=sheet)
    rows = np.asarray(PIL.Image.open(sheet).convert("RGB")).astype(int)
    # Other photos may have the same code, and come first in the index.
    own = [photo.path for _, photo in found.hits].index("0/000.png")
    corners = (30, 8), (30 + own // 10 * line, 8 + step + 24 + own % 10 * step)
    query, itself = (rows[top : top + SIDE, left : left + SIDE] for top, left in corners)
    assert np.abs(query - itself).mean() < 40
    wide, _ = ask(place, place / "queries" / "0.jpg", radius=8, show=sheet)
    # Twenty, ten in a line.
    assert len(wide[0].hits) == COUNT + 1 and PIL.Image.open(sheet).size == (8 + step + 24 + 10 * step, 30 + 2 * line)
    _, told = ask(place, place / "queries", k=1, format="json", show=sheet)
    assert "Drawn" not in told


@pytest.mark.parametrize(("kind", "settings"), [("hnsw", {}), ("ivf", {"nlist": 16, "nprobe": 2}), ("mih", {})])
def test_the_printed_recall_of_an_approximate_kind_is_true(place, known, kind, settings):
    words = " ".join([kind, *(f"{name}={value}" for name, value in settings.items())])
    found, told = ask(place, place / "queries", k=5, kind=words)
    collection = Collection.open(place / "i", kind=kind, settings=settings)
    hits = [row[:5] for row in collection.nearest(collection.codes, 500)]  # as many as a search orders by features
    shares = []
    for code, row in zip(collection.codes, hits, strict=True):
        farthest = plainly(known, code.tobytes())[4][0]
        shares.append(sum(hit.distance <= farthest for hit in row) / 5)
    assert f"recall@5 {np.mean(shares):.3f}, measured by {COUNT // 1 + 1} codes" in told
    for one in found:
        codes = dict(known)
        assert all(apart(one.code.tobytes(), codes[path]) == distance for distance, path in pairs(one))


def test_an_index_made_anew_by_another_encoder_is_not_searched_by_the_old_one(place, tmp_path):
    shutil.copytree(place / "i", tmp_path / "i")
    collection = Collection.open(tmp_path / "i")
    shutil.rmtree(tmp_path / "i")
    indexing.save_hasher(tmp_path / "other", bits=8, seed=1)
    indexing.run(tmp_path / "i", place / "queries", workdir=tmp_path / "other")
    with pytest.raises(IndexFolderError, match=r"--index: .* was made anew by another encoder, .* open it again"):
        collection.renewed()


def test_an_empty_index_is_refused(tmp_path, place):
    hasher = Hasher.load(place / "encoder")
    from cib_jax.storage.collection import encoder_identity, hasher_bytes

    PhotoTable.create(str(tmp_path / "i"), IndexMetadata("/x", encoder_identity(hasher)), hasher_bytes(hasher))
    with pytest.raises(SearchError, match=r"^--index: .*--mode=index"):
        search(tmp_path / "i", place / "queries")
    empty = Collection.open(tmp_path / "i")
    codes = np.zeros((2, 1), np.uint8)
    assert empty.nearest(codes, 3) == empty.within(codes, 3) == [[], []] and empty.groups(1) == []


@pytest.mark.parametrize(
    ("options", "error", "field"),
    [
        ({"k": 0}, SearchError, "--k"),
        ({"radius": -1}, SearchError, "--radius"),
        ({"kind": "hsnw"}, SearchError, "--kind"),
        ({"kind": "ivf x"}, SearchError, "--kind"),
        ({"kind": "ivf links=3"}, SearchError, "links"),
        ({"kind": "ivf", "radius": 3}, SearchError, "--radius"),
        ({"format": "xml"}, ConfigError, "--format"),
        ({"show": "x.jpg"}, ConfigError, "--show"),
        ({"show": "/nowhere/x.png"}, ConfigError, "--show"),
        ({"query": "nowhere"}, DataError, "--query"),
        ({"query": "empty"}, DataError, "--query"),
        ({"query": "broken.png"}, DataError, "--query"),
        ({"query": "bad"}, DataError, "--query"),
    ],
)
def test_mistakes_are_refused(place, tmp_path, options, error, field):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    for path in ("broken.png", "bad/x.png"):
        (tmp_path / path).write_bytes(b"no picture")
    options = dict(options)
    query = options.pop("query", None)
    given = place / "queries" if query is None else query if query == "nowhere" else tmp_path / query
    with pytest.raises(error, match=rf"^{field}\b"):
        ask(place, given, **options)
    if options.keys() & {"radius", "format", "show"} and "kind" not in options:
        with pytest.raises(error, match=rf"^{field}\b"):
            duplicates(place / "i", **options)


def test_a_search_for_one_photo_imports_what_it_needs_alone(place):
    heavy = {"orbax", "tensorflow_datasets", "grain", "matplotlib", "sklearn", "optuna", "lancedb", "flax", "optax"}
    program = (
        "import sys, rich.console, cib_jax.runs.processes; from cib_jax.commands.search import search; "
        "found = search(sys.argv[1], sys.argv[2], k=3, console=rich.console.Console(quiet=True)); "
        f"print(len(found[0].hits), {heavy | {'pandas'}} & {{*sys.modules}})"
    )
    command = [sys.executable, "-c", program, place / "i", place / "queries" / "1.jpg"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "3 set()"


def test_an_index_that_is_not_there_is_refused(place, tmp_path):
    with pytest.raises(IndexFolderError, match=r"^--index"):
        search(tmp_path / "none", place / "queries")


def test_more_queries_than_a_batch_are_all_answered(place, known):
    count = 101  # a batch of the encoder, and one more
    for number in range(count):
        pictures.write(place / "many" / f"{number:03}.png", pictures.smooth(9, 8, seed=number))
    found, _ = ask(place, place / "many", k=4, format="json")
    assert len(found) == count
    for one in found:
        near = plainly(known, one.code.tobytes())
        assert [distance for distance, _ in pairs(one)] == [distance for distance, _ in near[:4]]
        assert set(pairs(one)) <= set(near)


def test_words_name_a_kind_and_its_settings():
    assert index.parse_kind("exact") == ("exact", {}) and index.parse_kind("") == ("", {})
    assert index.parse_kind(" ivf  nlist=64 nprobe=7") == ("ivf", {"nlist": 64, "nprobe": 7})
    for word in ("x", "m", "m=", "m=-1", "m=1.5", "=m", "kind=1", "codes=1", "progress=1"):
        with pytest.raises(SearchError, match=r"^--kind\b"):
            index.parse_kind(f"ivf {word}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mode=search", "--query={queries}"],
        ["--mode=search", "--query={queries}/0.jpg", "--format=json"],
        ["--mode=duplicates"],
        ["--mode=duplicates", "--noconfirm", "--format=csv"],
    ],
)
def test_a_pipe_that_nobody_reads_any_more_ends_a_command_without_a_word(place, run_cli, monkeypatch, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        flags = [argument.format(queries=place / "queries") for argument in arguments]
        ended = run_cli(f"--index={place / 'i'}", *flags)
        closed.write("more")
    assert (ended.code, ended.error) == (141, "")

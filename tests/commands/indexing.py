"""A tiny saved encoder, folders of generated photos, and what an index of them must hold."""

import io
import os
import pathlib

import jax
import rich.console

import cib_jax
from cib_jax.commands.index import index
from cib_jax.data import photos
from cib_jax.storage import photo_table
from cib_jax.storage.photo_table import key_of
from configs import index as index_config
from tests.data import pictures


def save_hasher(folder, bits=12, seed=0):
    """Saves an encoder with random weights, whose codes tell photos apart as well as need be."""
    made = cib_jax.create_encoder(jax.random.key(seed), backbone="convnet", bits=bits, image_size=16, hidden=16)
    cib_jax.Hasher(*made).save(folder)


def fill(folder, count):
    for number in range(count):
        extension = ("jpg", "png", "webp")[number % 3]
        image = pictures.smooth(60 + number, 90 - number, seed=number)
        pictures.write(folder / "abc"[number % 3] / f"{number:02}.{extension}", image)


def config(**fields):
    made = index_config.get_config()
    made.encode_batch = 7
    for name, value in fields.items():
        made.update_from_flattened_dict({name.replace("__", "."): value})
    return made


def run(uri, images=None, *, workdir=None, settings=None, **options):
    """Returns what the job returned, and what it printed."""
    console = rich.console.Console(file=io.StringIO(), width=100)
    done = index(uri, images, workdir=workdir, config=settings or config(), console=console, **options)
    return done, console.file.getvalue()


def held(uri):
    """All that an index holds, by path: (size, time, code, width, height), or the reason why there is no code."""
    table = photo_table.PhotoTable.open(str(uri))
    snapshot = table.snapshot()
    columns = ["path", "raw_path", "size", "modified", "width", "height"]
    found = {}
    for number, row in table.read(snapshot, range(len(snapshot.keys)), columns).items():
        path = row["path"] if row["raw_path"] is None else os.fsdecode(row["raw_path"])
        assert path not in found and key_of(path) == snapshot.keys[number]
        found[path] = (row["size"], row["modified"], snapshot.codes[number].tobytes(), row["width"], row["height"])
    unreadable = dict(table.unreadable())
    assert len(table) == len(found) + len(unreadable) and not set(found) & set(unreadable)
    return found | unreadable


def expected(folder, hasher, names=None):
    """The same, of what a folder holds, one photo after the other."""
    known = {}
    for path in sorted(pathlib.Path(folder).rglob("*")):
        name, is_photo = str(path.relative_to(folder)), path.is_file() and path.suffix in photos.EXTENSIONS
        if not is_photo or (names is not None and name not in names):
            continue
        try:
            square, upright = photos.decode(path, hasher.side), photos.decode(path, 0)
        except photos.BadPhotoError as error:
            known[name] = str(error)
            continue
        stat = path.stat()
        code = hasher.encode(square[None])[0].tobytes()
        known[name] = (stat.st_size, stat.st_mtime_ns, code, upright.shape[1], upright.shape[0])
    return known

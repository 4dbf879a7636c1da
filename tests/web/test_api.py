"""The JSON API: results as a plain loop over the codes finds them, and pictures without metadata."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import tempfile
import threading

import numpy as np
import PIL.Image
import pytest

from cib_jax.data import photos as photos_lib
from cib_jax.web.decode_pool import DecodePool
from tests.web import fake, hostile
from tests.web.conftest import HOSTILE, OPEN, run_server, until

PHOTO = fake.encoded(fake.picture(1))


def expected(collection, code, k):
    """Returns (id, distance) of the nearest photos, found by a loop."""
    return [(collection.indexed[hit.number].id, hit.distance) for hit in fake.nearest(collection.codes, code)[:k]]


def found(answer):
    """Returns (id, distance) of the results."""
    return [(result["id"], result["distance"]) for result in answer["results"]]


def test_search_by_id_and_by_code(served):
    for number in (0, 7, 19):
        photo, code = served.collection.indexed[number], served.collection.codes[number]
        status, by_id = served.json(f"/search?id={photo.id}&k=9")
        assert status == 200
        assert found(by_id) == expected(served.collection, code, 9)
        assert by_id["query"] == {"id": photo.id, "code": bytes(code).hex()}
        assert by_id["bits"] == 64
        by_code = served.json(f"/search?code={bytes(code).hex()}&k=9")[1]
        assert by_code["query"]["id"] is None
        assert by_code["results"] == by_id["results"]
        first = by_id["results"][0]
        assert first == {
            "id": photo.id, "path": photo.path, "distance": 0, "code": bytes(code).hex(), "width": photo.width,
            "height": photo.height, "thumbnail": f"/thumbnail/{photo.id}", "image": f"/image/{photo.id}",
        }  # fmt: skip


def test_a_photo_comes_before_others_with_its_code(tmp_path, running):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(PHOTO)
    with running(fake.FakeCollection(tmp_path)) as served:
        for photo in served.collection.indexed:
            results = served.json(f"/search?id={photo.id}&k=2")[1]["results"]
            assert len(results) == 2 and results[0]["id"] == photo.id


def test_paths_that_are_not_utf_8_come_back_to_the_byte(tmp_path, running):
    names = [b"caf\xe9.png", "café.png".encode(), b"caf\\udce9.png"]
    for number, name in enumerate(names):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(fake.encoded(fake.picture(number)))
    with running(fake.FakeCollection(tmp_path)) as served:
        results = served.json("/search?k=3")[1]["results"]
        assert {os.fsencode(result["path"]) for result in results} == set(names)
        for result in results:
            assert served.json(f"/photo?id={result['id']}")[1]["path"] == result["path"]
            assert served.ask(result["image"])[0] == 200


def test_the_server_lists_its_requests(served):
    status, headers, text = served.ask("/docs")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    for path in ("/search?id=", "/photo?id=", "/thumbnail/", "/image/", "/health"):
        assert path in text.decode()


def test_search_within_a_radius(served):
    code = served.collection.codes[3]
    for radius in (0, 24, 64):
        wanted = [pair for pair in expected(served.collection, code, 1000) if pair[1] <= radius]
        assert found(served.json(f"/search?code={bytes(code).hex()}&k=1000&radius={radius}")[1]) == wanted


def test_search_by_photo_as_bytes_and_in_a_form(served):
    content = fake.encoded(fake.picture(77, 90, 50), "JPEG")
    code = served.collection.encode(photos_lib.decode_with_thumbnail(content, fake.SIDE).square[None])[0]
    status, answer = served.json("/search?k=5", method="POST", body=content)
    assert status == 200
    assert answer["query"] == {"id": None, "code": bytes(code).hex()}
    assert found(answer) == expected(served.collection, code, 5)
    form = (
        b'--x\r\nContent-Disposition: form-data; name="k"\r\n\r\n7\r\n'
        b'--x\r\nContent-Disposition: form-data; name="photo"; filename="../../etc/passwd"\r\n'
        b"Content-Type: text/html\r\n\r\n" + content + b"\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert served.json("/search?k=5", method="POST", body=form, headers=headers) == (200, answer)


def test_a_search_without_a_query_starts_at_a_random_photo(served):
    starts = {served.json("/search?k=1")[1]["query"]["id"] for _ in range(40)}
    assert len(starts) > 3
    assert starts <= {photo.id for photo in served.collection.indexed}


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("/search?k=0", 400, "k "),
        ("/search?k=1001", 400, "k "),
        ("/search?k=ten", 400, "k "),
        ("/search?k=1e3", 400, "k "),
        ("/search?k=%D9%A1", 400, "k "),
        ("/search?k=" + "9" * 5000, 400, f"'{'9' * 20}'"),
        ("/search?radius=-1", 400, "radius "),
        ("/search?where=x", 400, "'where'"),
        ("/search?id=ffffffffffffffff", 404, "id"),
        ("/search?id=../../etc/passwd", 404, "id"),
        ("/search?id=", 404, "id"),
        ("/search?id=%00", 404, "id"),
        ("/search?code=ff", 400, "code must be 16 "),
        ("/search?code=zzzzzzzzzzzzzzzz", 400, "code "),
        ("/search?code=00000000%20%20000000", 400, "code "),
        ("/search?code=0000000000000000&id=0000000000000000", 400, "id and code"),
        ("/thumbnail/ffffffffffffffff", 404, "id"),
        ("/image/ffffffffffffffff", 404, "id"),
        ("/photo", 404, "id"),
        ("/photo?id=", 404, "id"),
        ("/photo?id=..%2f..", 404, "id"),
        (f"/photo?id={'0' * 16}", 404, "id"),
    ],
)
def test_an_invalid_request_is_answered_with_a_sentence(served, path, status, word):
    answered, answer = served.json(path)
    assert answered == status
    assert list(answer) == ["error"]
    assert word in answer["error"]
    assert answer["error"].endswith(".")


# The decode pool has tests of all hostile files.
@pytest.mark.parametrize("name", ["nothing", "HTML", "truncated", "text that unpacks to 200 MB", "noise"])
def test_a_file_that_is_not_a_photo_is_refused(served, name):
    content = hostile.REFUSED[name]()
    status, answer = served.json("/search", method="POST", body=content)
    assert status == (422 if content else 400)
    assert list(answer) == ["error"]
    assert answer["error"].endswith(".")
    assert "/" not in answer["error"]


FILE = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\nb\r\n'


@pytest.mark.parametrize(
    "body",
    [
        b"--x\r\n",
        b"--x--\r\n",
        b"no boundary",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nno file\r\n--x--\r\n',
        FILE * 2 + b"--x--\r\n",
        FILE.replace(b"b\r\n", b"\r\n") + b"--x--\r\n",
        FILE,  # without an end
        FILE.replace(b'name="a"; ', b"") + b"--x--\r\n",
        FILE.replace(b'; filename="a"', b"") * 200 + FILE + b"--x--\r\n",
        b"--x\r\n" + b"A: b\r\n" * 10_000,
        b"--x\r\n" + b"A" * 100_000,
        FILE.replace(b'; filename="a"', b"") * 16 + FILE.replace(b"b\r\n", PHOTO + b"\r\n") + b"--x--\r\n",
    ],
)
@pytest.mark.parametrize("parameters", ["boundary=x", 'boundary="x"; charset=punycode'])
def test_a_form_without_exactly_one_file_is_refused(served, body, parameters):
    headers = {"Content-Type": f"multipart/form-data; {parameters}"}
    status, answer = served.json("/search", method="POST", body=body, headers=headers)
    assert (status, list(answer)) == (400, ["error"])


@pytest.mark.parametrize("parameters", ["", "; boundary=", '; boundary="', "; boundary=y", "; boundary=\xff"])
def test_a_form_without_its_boundary_is_refused(served, parameters):
    headers = {"Content-Type": f"multipart/form-data{parameters}"}
    assert served.ask("/search", method="POST", body=FILE + b"--x--\r\n", headers=headers)[0] == 400


def test_a_large_photo_in_a_form_is_not_written_to_disk(served, monkeypatch):
    """Files that the parser could write to are in memory, whatever their size."""
    rolled = []
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", rolled.append)
    content = fake.encoded(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8), "BMP")
    body = FILE.replace(b"b\r\n", content + b"\r\n") + b"--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert served.ask("/search", method="POST", body=body, headers=headers)[0] == 200
    assert rolled == []


def test_thumbnails_are_those_of_the_index_and_may_be_cached(served):
    for photo in served.collection.indexed[:5]:
        status, headers, content = served.ask(f"/thumbnail/{photo.id}")
        assert (status, content, headers["content-type"]) == (200, photo.thumbnail, "image/jpeg")
        assert "max-age=86400" in headers["cache-control"]
        again = served.ask(f"/thumbnail/{photo.id}", headers={"If-None-Match": headers["etag"]})
        assert (again[0], again[2]) == (304, b"")
        assert served.ask(f"/thumbnail/{photo.id}", method="HEAD")[::2] == (200, b"")


def test_the_metadata_of_a_photo_are_those_of_its_result(served):
    (result,) = served.json("/search?k=1")[1]["results"]
    known = {name: result[name] for name in ("id", "path", "width", "height")}
    assert served.json(f"/photo?id={result['id']}") == (200, known)


def test_an_image_is_encoded_anew_without_metadata(served, photos):
    for photo in served.collection.indexed[:3]:
        assert b"SECRET-PLACE" in (photos / photo.path).read_bytes()
        status, headers, content = served.ask(f"/image/{photo.id}")
        assert (status, headers["content-type"]) == (200, "image/jpeg")
        assert b"SECRET" not in content
        assert b"Exif" not in content
        with PIL.Image.open(io.BytesIO(content)) as shown, PIL.Image.open(photos / photo.path) as original:
            assert shown.size == original.size
            difference = np.asarray(shown).astype(int) - np.asarray(original.convert("RGB"))
            assert np.abs(difference).mean() < 3
        assert served.ask(f"/image/{photo.id}", headers={"If-None-Match": headers["etag"]})[0] == 304


def replace_file(kind: str, path: pathlib.Path, outside: pathlib.Path) -> None:
    """Puts something else in the place of an indexed file."""
    before = path.stat()
    if kind == "other content":
        path.write_bytes(fake.encoded(fake.picture(99), "JPEG"))
        return
    if kind == "touched":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        return
    copy = outside / "secret.jpg"
    shutil.copy2(path, copy)  # of the same size and time
    path.unlink()
    if kind == "symlink":
        path.symlink_to(copy)
    elif kind == "folder through a symlink":
        shutil.move(path.parent, outside / "folder")
        shutil.copy2(copy, outside / "folder" / path.name)
        path.parent.symlink_to(outside / "folder")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "nothing":
        pass


@pytest.mark.parametrize(
    "kind",
    ["other content", "touched", "symlink", "folder through a symlink", "loop", "pipe", "device", "folder", "nothing"],
)
def test_a_file_that_is_not_the_one_that_was_indexed_is_not_shown(running, tmp_path, kind):
    root, outside = tmp_path / "photos", tmp_path / "outside"
    outside.mkdir()
    fake.fill(root, 4)
    collection = fake.FakeCollection(root)
    with running(collection) as served:
        photo = collection.indexed[0]
        assert served.ask(f"/image/{photo.id}")[0] == 200
        replace_file(kind, root / photo.path, outside)
        status, answer = served.json(f"/image/{photo.id}")
        assert status == 410
        assert list(answer) == ["error"]
        assert str(tmp_path) not in answer["error"]
        assert served.ask(f"/thumbnail/{photo.id}")[0] == 200  # which the index holds itself
        other = next(other for other in collection.indexed if pathlib.Path(other.path).parts[0] != "f0")
        assert served.ask(f"/image/{other.id}")[0] == 200


def test_a_link_inside_the_folder_is_followed(running, tmp_path):
    root = tmp_path / "photos"
    fake.fill(root, 4)
    (root / "link.jpg").symlink_to("f0/0.jpg")
    (tmp_path / "same").symlink_to(root)
    collection = fake.FakeCollection(tmp_path / "same")
    photo = next(photo for photo in collection.indexed if photo.path == "link.jpg")
    with running(collection) as served:
        assert served.ask(f"/image/{photo.id}")[0] == 200


def test_a_file_outside_that_a_list_named_is_shown_unless_it_is_a_link(running, tmp_path):
    root, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    fake.fill(root, 2)
    fake.fill(elsewhere, 2)
    collection = fake.FakeCollection(root)
    for number, name in enumerate((str(elsewhere / "f0" / "0.jpg"), "../elsewhere/f1/1.jpg")):
        found = (root / name).stat()
        known = {"path": name, "size": found.st_size, "modified_ns": found.st_mtime_ns}
        collection.indexed[number] = collection.indexed[number]._replace(**known)
    with running(collection) as served:
        paths = [f"/image/{photo.id}" for photo in collection.indexed]
        assert [served.ask(path)[0] for path in paths] == [200, 200]
        (elsewhere / "f0" / "0.jpg").rename(tmp_path / "0.jpg")
        (elsewhere / "f0" / "0.jpg").symlink_to(tmp_path / "0.jpg")
        assert [served.ask(path)[0] for path in paths] == [410, 200]


def test_a_photo_that_breaks_its_decoder_is_refused_and_the_next_is_served(collection, hostile_decoders):
    settings = dataclasses.replace(OPEN, decode_processes=1)
    with run_server(collection, settings, decoders=hostile_decoders) as served:
        status, answer = served.json("/search", method="POST", body=b"crash ")
        assert (status, list(answer)) == (422, ["error"])
        assert served.json("/search", method="POST", body=PHOTO)[0] == 200


def test_without_decode_processes_the_rest_is_served(collection):
    with DecodePool(dataclasses.replace(OPEN, decode_processes=1)) as decoders:
        pass
    with run_server(collection, decoders=decoders) as served:
        status, headers, _ = served.ask("/search", method="POST", body=PHOTO)
        assert (status, headers["retry-after"]) == (503, "2")
        assert served.ask("/search?k=1")[0] == 200


def test_one_client_with_many_slow_photos_does_not_delay_another(collection, tmp_path):
    settings = dataclasses.replace(OPEN, decode_processes=1, decode_seconds=60, proxies=("127.0.0.1",))
    done = []
    with (
        DecodePool(settings, worker=HOSTILE) as decoders,
        run_server(collection, settings, decoders=decoders) as served,
    ):

        def send(client, body):
            status = served.ask("/search", method="POST", body=body, headers={"X-Forwarded-For": client})[0]
            done.append((client, status))

        body = b"slow " + os.fsencode(tmp_path / "go")
        threads = [threading.Thread(target=send, args=("192.0.2.1", body)) for _ in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: served.api.decoding.waiting == 5)
        threads.append(threading.Thread(target=send, args=("192.0.2.2", PHOTO)))
        threads[-1].start()
        until(lambda: served.api.decoding.waiting == 6)
        (tmp_path / "go").touch()
        for thread in threads:
            thread.join()
    assert sorted(done) == [("192.0.2.1", 422)] * 6 + [("192.0.2.2", 200)]
    assert done.index(("192.0.2.2", 200)) < 6  # not after all six


def test_a_busy_server_refuses_at_once_and_answers_what_needs_no_encoder(running, photos):
    collection = fake.FakeCollection(photos)
    answers = []
    with running(collection, dataclasses.replace(OPEN, threads=1, waiting=0)) as served:
        while collection.arrived.acquire(blocking=False):
            pass

        def send():
            answers.append(served.ask("/search", method="POST", body=PHOTO)[0])

        with collection.encoding:
            first = threading.Thread(target=send)
            first.start()
            collection.arrived.acquire()
            status, headers, _ = served.ask("/search", method="POST", body=PHOTO)
            assert (status, headers["retry-after"]) == (503, "2")
            assert served.ask("/search?k=1")[0] == 200
        first.join()
    assert answers == [200]


def test_an_empty_collection(running, tmp_path):
    with running(fake.FakeCollection(tmp_path)) as served:
        assert served.json("/health") == (200, {"status": "ok", "photos": 0, "bits": 64})
        assert served.json("/search")[0] == 404
        status, answer = served.json("/search", method="POST", body=PHOTO)
        assert (status, answer["results"]) == (200, [])


def test_an_unexpected_error_is_logged_and_not_disclosed(running, photos, caplog):
    collection = fake.FakeCollection(photos)
    collection.nearest = lambda codes, k: json.loads("/root/.ssh/id_rsa")
    with running(collection) as served:
        status, answer = served.json("/search")
        assert (status, list(answer)) == (500, ["error"])
        assert "JSON" not in answer["error"]
        assert "ssh" not in answer["error"]
    assert "JSONDecodeError" in caplog.text


def test_a_thumbnail_of_a_replaced_collection_is_not_cached_for_the_next(running, photos):
    before, after = fake.FakeCollection(photos), fake.FakeCollection(photos)
    after.indexed = [photo._replace(thumbnail=b"\xff\xd8\xffnew") for photo in after.indexed]
    original = before.photos
    with running(before) as served:

        def replace_meanwhile(numbers, *, thumbnails=True):
            found = original(numbers, thumbnails=thumbnails)
            served.api.replace(after)
            return found

        before.photos = replace_meanwhile
        path = f"/thumbnail/{after.indexed[0].id}"
        served.ask(path)
        assert served.ask(path)[2] == b"\xff\xd8\xffnew"


def test_the_memory_of_cached_thumbnails_is_bounded(running, photos):
    """Thumbnails that were requested last are answered without the collection."""
    collection = fake.FakeCollection(photos)
    sizes = [len(photo.thumbnail) for photo in collection.indexed]
    original, read = collection.photos, []

    def counted(numbers, *, thumbnails=True):
        read.extend(numbers)
        return original(numbers, thumbnails=thumbnails)

    collection.photos = counted
    collection.indexed = [
        photo._replace(thumbnail=photo.thumbnail + bytes(400_000 - size))
        for photo, size in zip(collection.indexed, sizes, strict=True)
    ]
    with running(collection, dataclasses.replace(OPEN, thumbnails_mb=1)) as served:
        for number in (0, 1, 0, 2, 0, 1):  # two fit; 2 replaces 1
            served.ask(f"/thumbnail/{collection.indexed[number].id}")
    assert read == [0, 1, 2, 1]

"""The JSON API: answers as a plain loop over the codes gives them, pictures without their secrets."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import threading

import numpy as np
import PIL.Image
import pytest

from cib_jax.data.photos import decode_with_thumbnail
from tests.web import fake, hostile
from tests.web.conftest import MANY, running


def expected(collection, code, k):
    """Returns (id, distance) of the nearest, by a loop."""
    return [(collection._photos[hit.number].id, hit.distance) for hit in fake.nearest(collection.codes, code)[:k]]


def found(answer):
    return [(result["id"], result["distance"]) for result in answer["results"]]


def test_search_by_id_and_by_code(served):
    for number in (0, 7, 19):
        photo, code = served.collection._photos[number], served.collection.codes[number]
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


def test_search_within_a_radius(served):
    code = served.collection.codes[3]
    for radius in (0, 24, 64):
        wanted = [pair for pair in expected(served.collection, code, 1000) if pair[1] <= radius]
        assert found(served.json(f"/search?code={bytes(code).hex()}&k=1000&radius={radius}")[1]) == wanted


def test_search_by_photo_as_bytes_and_in_a_form(served):
    content = fake.encoded(fake.picture(77, 90, 50), "JPEG")
    code = served.collection.encode(decode_with_thumbnail(content, fake.SIDE).square[None])[0]
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


def test_nothing_asked_is_a_random_start(served):
    starts = {served.json("/search?k=1")[1]["query"]["id"] for _ in range(40)}
    assert len(starts) > 3
    assert starts <= {photo.id for photo in served.collection._photos}


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/search?k=0", 400, "k: wanted a whole number from 1 to 1000, got 0."),
        ("/search?k=1001", 400, "k: wanted a whole number from 1 to 1000, got 1001."),
        ("/search?k=ten", 400, "k: wanted a whole number, got 'ten'."),
        ("/search?k=1e3", 400, "k: wanted a whole number, got '1e3'."),
        ("/search?k=%D9%A1", 400, "k: wanted a whole number, got '١'."),
        ("/search?k=" + "9" * 5000, 400, f"k: wanted a whole number, got '{'9' * 20}'."),
        ("/search?radius=-1", 400, "radius: wanted a whole number of bits, 0 or more, got -1."),
        ("/search?id=ffffffffffffffff", 404, "There is no photo with this id."),
        ("/search?id=../../etc/passwd", 404, "There is no photo with this id."),
        ("/search?id=%00", 404, "There is no photo with this id."),
        ("/search?code=ff", 400, "code: wanted 16 hexadecimal digits, for 64 bits."),
        ("/search?code=zzzzzzzzzzzzzzzz", 400, "code: wanted 16 hexadecimal digits, for 64 bits."),
        ("/search?code=00000000%20%20000000", 400, "code: wanted 16 hexadecimal digits, for 64 bits."),
        ("/search?code=0000000000000000&id=0000000000000000", 400, "id, code: give one of them."),
        ("/thumbnail/ffffffffffffffff", 404, "There is no photo with this id."),
        ("/image/ffffffffffffffff", 404, "There is no photo with this id."),
    ],
)
def test_what_makes_no_sense_is_told_in_a_sentence(served, path, status, told):
    assert served.json(path) == (status, {"error": told})


@pytest.mark.parametrize("name", hostile.REFUSED)
def test_a_hostile_photo_is_refused(served, name):
    status, answer = served.json("/search", method="POST", body=hostile.REFUSED[name])
    assert status == (422 if hostile.REFUSED[name] else 400)
    assert list(answer) == ["error"]
    assert answer["error"].endswith(".")
    assert "/" not in answer["error"].replace(str(fake.SIDE), "")


@pytest.mark.parametrize(
    "body",
    [
        b"--x\r\n",
        b"--x--\r\n",
        b"no boundary",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nno file\r\n--x--\r\n',
        (b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\nb\r\n' * 2) + b"--x--\r\n",
        b"--x\r\n" + b"A: b\r\n" * 10_000,
        b"--x\r\n" + b"A" * 100_000,
    ],
)
def test_a_damaged_form_is_refused(served, body):
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    status, answer = served.json("/search", method="POST", body=body, headers=headers)
    assert status == 400
    assert "one file" in answer["error"] or "one photo" in answer["error"]


def test_photos_that_come_together_are_encoded_together(photos):
    collection = fake.FakeCollection(photos)
    contents = [fake.encoded(fake.picture(n), "JPEG") for n in range(24)]
    answers = {}
    with running(collection) as served:
        assert collection.batches[1:] == [1, 4, 16]  # the programs, before the first question
        threads = [
            threading.Thread(target=lambda n=n: answers.setdefault(n, served.json("/search?k=3", method="POST",
                                                                                    body=contents[n])))
            for n in range(24)
        ]  # fmt: skip
        with collection.encoding:  # while one is being encoded, the others gather
            for thread in threads:
                thread.start()
            while served.app.state.api.answers._batches._waiting.qsize() < 20:
                pass
        for thread in threads:
            thread.join()
    assert set(collection.batches[1:]) == {1, 4, 16}
    assert len(collection.batches) < 4 + 8
    for n in range(24):
        code = collection.encode(decode_with_thumbnail(contents[n], fake.SIDE).square[None])[0]
        assert answers[n][0] == 200
        assert found(answers[n][1]) == expected(collection, code, 3)


def test_thumbnails_are_those_of_the_index_and_may_be_kept(served):
    for photo in served.collection._photos[:5]:
        status, headers, content = served.ask(f"/thumbnail/{photo.id}")
        assert (status, content, headers["content-type"]) == (200, photo.thumbnail, "image/jpeg")
        assert "max-age=86400" in headers["cache-control"]
        again = served.ask(f"/thumbnail/{photo.id}", headers={"If-None-Match": headers["etag"]})
        assert (again[0], again[2]) == (304, b"")
        assert served.ask(f"/thumbnail/{photo.id}", method="HEAD")[::2] == (200, b"")


def test_a_photo_is_told_of_by_its_id(served):
    (result,) = served.json("/search?k=1")[1]["results"]
    known = {name: result[name] for name in ("id", "path", "width", "height")}
    assert served.json(f"/photo?id={result['id']}") == (200, known)
    for path in ("/photo", "/photo?id=", "/photo?id=..%2f..", f"/photo?id={'0' * 16}"):
        assert served.json(path) == (404, {"error": "There is no photo with this id."})


def test_an_image_is_made_anew_without_what_is_not_pixels(served, photos):
    for photo in served.collection._photos[:3]:
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


def swapped_by(kind, path: pathlib.Path, outside: pathlib.Path) -> None:
    """Puts something else where an indexed file was."""
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
def test_a_file_that_is_not_what_was_indexed_is_not_shown(tmp_path, kind):
    root, outside = tmp_path / "photos", tmp_path / "outside"
    outside.mkdir()
    fake.fill(root, 4)
    collection = fake.FakeCollection(root)
    with running(collection) as served:
        photo = collection._photos[0]
        assert served.ask(f"/image/{photo.id}")[0] == 200
        swapped_by(kind, root / photo.path, outside)
        status, answer = served.json(f"/image/{photo.id}")
        assert status == 410
        assert "since it was indexed" in answer["error"]
        assert str(tmp_path) not in answer["error"]
        assert served.ask(f"/thumbnail/{photo.id}")[0] == 200  # which the index holds itself
        other = next(other for other in collection._photos if pathlib.Path(other.path).parts[0] != "f0")
        assert served.ask(f"/image/{other.id}")[0] == 200


def test_a_link_inside_the_folder_is_followed(tmp_path):
    root = tmp_path / "photos"
    fake.fill(root, 4)
    (root / "link.jpg").symlink_to("f0/0.jpg")
    (tmp_path / "same").symlink_to(root)
    collection = fake.FakeCollection(tmp_path / "same")
    photo = next(photo for photo in collection._photos if photo.path == "link.jpg")
    with running(collection) as served:
        assert served.ask(f"/image/{photo.id}")[0] == 200


def test_a_photo_that_a_list_names_elsewhere_is_shown_unless_it_is_a_link(tmp_path):
    root, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    fake.fill(root, 2)
    fake.fill(elsewhere, 2)
    collection = fake.FakeCollection(root)
    for number, name in enumerate((str(elsewhere / "f0" / "0.jpg"), "../elsewhere/f1/1.jpg")):
        found = (root / name).stat()
        known = {"path": name, "size": found.st_size, "modified_ns": found.st_mtime_ns}
        collection._photos[number] = collection._photos[number]._replace(**known)
    with running(collection) as served:
        paths = [f"/image/{photo.id}" for photo in collection._photos]
        assert [served.ask(path)[0] for path in paths] == [200, 200]
        (elsewhere / "f0" / "0.jpg").rename(tmp_path / "0.jpg")
        (elsewhere / "f0" / "0.jpg").symlink_to(tmp_path / "0.jpg")
        assert [served.ask(path)[0] for path in paths] == [410, 200]


def test_names_that_are_no_text_are_shown_all_the_same(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xfe.jpg"
    with open(name, "wb") as file:
        file.write(fake.encoded(fake.picture(1), "JPEG"))
    with running(fake.FakeCollection(tmp_path)) as served:
        (result,) = served.json("/search?k=3")[1]["results"]
        assert result["path"] == "��.jpg"
        assert served.ask(result["image"])[0] == 200


def test_a_photo_that_breaks_its_decoder_is_refused_and_the_next_is_served(photos):
    limits = dataclasses.replace(MANY, decoding=dataclasses.replace(MANY.decoding, seconds=1, processes=1))
    with running(fake.FakeCollection(photos), limits, work="tests.web.hostile:by_content") as served:
        for word in (b"crash ", b"hang ", b"memory "):
            status, answer = served.json("/search", method="POST", body=word)
            assert (status, list(answer)) == (422, ["error"])
            assert served.json("/search", method="POST", body=fake.encoded(fake.picture(1)))[0] == 200


def test_an_empty_collection(tmp_path):
    with running(fake.FakeCollection(tmp_path)) as served:
        assert served.json("/health") == (200, {"status": "ok", "photos": 0, "bits": 64})
        assert served.json("/search")[0] == 404
        status, answer = served.json("/search", method="POST", body=fake.encoded(fake.picture(1)))
        assert (status, answer["results"]) == (200, [])


def test_what_breaks_inside_is_not_told_outside(photos, capfd):
    collection = fake.FakeCollection(photos)
    with running(collection) as served:
        collection.nearest = lambda codes, k: json.loads("/root/.ssh/id_rsa")
        status, answer = served.json("/search")
    assert (status, answer) == (500, {"error": "The server could not answer; whoever runs it finds why in its log."})
    assert "JSONDecodeError" in capfd.readouterr().err

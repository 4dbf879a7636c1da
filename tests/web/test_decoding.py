"""Decoding in processes of their own: what comes back, what a crafted photo can do, and what it cannot."""

import io
import os
import threading
import time

import numpy as np
import PIL.Image
import pytest

from cib_jax.data import photos
from cib_jax.data.photos import BadPhotoError
from cib_jax.web import decoding
from cib_jax.web.decoding import BusyError, DecoderError, Decoders, Decoding
from tests.web import hostile
from tests.web.fake import encoded, picture


@pytest.fixture(scope="module")
def decoders():
    with Decoders(Decoding(seconds=10)) as decoders:
        yield decoders


@pytest.fixture(scope="module")
def taken_over():
    decoding = Decoding(processes=1, seconds=1, memory_mib=1024)
    with Decoders(decoding, "tests.web.hostile:by_content") as decoders:
        yield decoders


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_photo_is_decoded_as_in_this_process(decoders, form):
    content = encoded(picture(3, 500, 300), form)
    seen, expected = decoders.see(content, 24), photos.decode_with_thumbnail(content, 24)
    assert np.array_equal(seen.square, expected.square)
    assert seen[1:] == expected[1:]


@pytest.mark.parametrize("name", hostile.REFUSED)
def test_what_is_no_photo_or_a_bomb_is_refused_in_a_sentence(decoders, name):
    with pytest.raises(BadPhotoError, match=r"^(The photo|Decoding the photo) .*[a-z)]\.$") as told:
        decoders.see(hostile.REFUSED[name], 24)
    assert "data." not in str(told.value)
    assert len(decoders.see(encoded(picture(1)), 24).square) == 24  # and goes on


def test_of_a_file_that_is_a_picture_and_more_the_picture_is_taken(decoders):
    for content in hostile.taken_as_pictures().values():
        seen = decoders.see(content, 24)
        assert (seen.width, seen.height) == (60, 40)
        assert b"script" not in seen.thumbnail
        assert b"alert" not in seen.thumbnail
        assert b"PK" not in seen.thumbnail[-200:]


def test_too_many_pixels_are_told_in_the_users_words(decoders):
    with pytest.raises(BadPhotoError, match="has 9000 × 6000 pixels, more than 50 megapixels: make it smaller"):
        decoders.see(encoded(np.zeros((6000, 9000), np.uint8)), 24)


def test_what_is_shown_is_small_and_says_nothing_of_place_or_owner(decoders):
    exif = PIL.Image.Exif()
    exif[0x010E] = "SECRET"
    exif[0x0112] = 6  # lying on its side
    content = encoded(picture(5, 3000, 1500), "JPEG", exif=exif.tobytes(), comment=b"SECRET")
    shown = decoders.reduced(content, 2048, max_megapixels=50)
    assert b"SECRET" not in shown
    assert b"Exif" not in shown
    with PIL.Image.open(io.BytesIO(shown)) as image:
        assert (image.format, image.size) == ("JPEG", (1024, 2048))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (b"hang", "not decoded within 1 seconds"),
        (b"crash", "broke the program that decodes it"),
        (b"exit", "broke the program that decodes it"),
        (b"memory", "takes more than 1,024 MiB"),
        (b"many", "broke the program that decodes it"),
        (b"lie", "cannot be decoded"),
        (b"lies", "cannot be decoded"),
    ],
)
def test_a_photo_that_takes_a_process_over_harms_that_process_alone(taken_over, word, told):
    with pytest.raises(BadPhotoError, match=told):
        taken_over.see(word + b" ", 16)
    assert taken_over.see(encoded(picture(1)), 16).width == 60


def test_such_a_photo_writes_no_file(taken_over, tmp_path):
    with pytest.raises(BadPhotoError, match="broke the program"):
        taken_over.see(b"file " + os.fsencode(tmp_path / "file"), 16)
    assert not (tmp_path / "file").exists() or not (tmp_path / "file").stat().st_size


def test_a_process_knows_nothing_of_the_servers_environment(taken_over, monkeypatch):
    with pytest.raises(BadPhotoError, match="broke the program"):
        taken_over.see(b"crash ", 16)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(BadPhotoError, match="PYTHONPATH") as told:
        taken_over.see(b"environment ", 16)
    assert "SECRET" not in str(told.value)


def test_who_waits_too_long_or_behind_too_many_is_sent_away():
    decoding = Decoding(processes=1, seconds=3, waiting=1, patience=0.5)
    with Decoders(decoding, "tests.web.hostile:by_content") as decoders:
        told = []

        def hang() -> None:
            try:
                decoders.see(b"hang ", 16)
            except (BadPhotoError, BusyError) as error:
                told.append(type(error))

        first = threading.Thread(target=hang)
        first.start()
        while decoders._free:
            time.sleep(0.01)
        second = threading.Thread(target=hang)
        second.start()
        while not decoders._waiting:
            time.sleep(0.01)
        with pytest.raises(BusyError, match="Too many photos are waiting"):
            decoders.see(encoded(picture(1)), 16)
        second.join()
        first.join()
        assert told == [BusyError, BadPhotoError]
        assert decoders.see(encoded(picture(1)), 16).width == 60


def test_closing_ends_those_at_work():
    decoders = Decoders(Decoding(processes=1, seconds=60), "tests.web.hostile:by_content")
    told = []

    def hang() -> None:
        try:
            decoders.see(b"hang ", 16)
        except (BadPhotoError, BusyError) as error:  # the second, where it had not begun
            told.append(str(error))

    waiting = threading.Thread(target=hang)
    waiting.start()
    while decoders._free:
        time.sleep(0.01)
    (process,) = decoders._all
    decoders.close()
    waiting.join()
    assert len(told) == 1
    assert not process.alive()
    with pytest.raises(BusyError, match="stopping"):
        decoders.see(encoded(picture(1)), 16)


def test_processes_that_cannot_be_started_are_not_counted(monkeypatch):
    decoders = Decoders(Decoding(processes=1), "tests.web.hostile:by_content")
    monkeypatch.setattr(decoding, "_STARTING", 0.0)
    for _ in range(3):
        with pytest.raises((BadPhotoError, DecoderError)):
            decoders.see(b"crash ", 16)
    assert len(decoders._all) <= 1
    monkeypatch.undo()
    assert decoders.see(encoded(picture(1)), 16).width == 60
    decoders.close()


def test_many_threads_at_once(decoders):
    contents = [encoded(picture(n), "JPEG") for n in range(40)]
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.setdefault(n, decoders.see(contents[n], 8).square)) for n in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[n], photos.decode_with_thumbnail(contents[n], 8).square) for n in range(40))

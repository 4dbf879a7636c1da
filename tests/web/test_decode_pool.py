"""The pool of decode processes: what it returns, and what a crafted photo can do."""

import contextlib
import io
import os
import pathlib
import socket
import threading
import time

import numpy as np
import PIL.Image
import pytest

from cib_jax.data import photos
from cib_jax.data.photos import BadPhotoError
from cib_jax.web.decode_pool import DecodePool, DecoderError, receive_message, send_message
from cib_jax.web.settings import Settings
from tests.data import pictures
from tests.web import hostile
from tests.web.conftest import HOSTILE, until
from tests.web.fake import encoded, picture

PHOTO = encoded(picture(1))
PHOTO_JPEG = encoded(picture(1), "JPEG")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"])
def test_a_photo_is_decoded_as_in_this_process(decoders, form):
    content = pictures.content(PIL.Image.fromarray(picture(3, 500, 300)), form)
    seen, expected = decoders.decode(content, 24), photos.decode_with_thumbnail(content, 24)
    assert np.array_equal(seen.square, expected.square)
    assert seen[1:] == expected[1:]


@pytest.mark.parametrize("name", hostile.REFUSED)
def test_a_file_that_is_not_a_photo_or_is_a_bomb_is_refused_in_a_sentence(decoders, name):
    with pytest.raises(BadPhotoError, match=r"^[A-Z][^\n]*\.$") as error:
        decoders.decode(hostile.REFUSED[name](), 24)
    assert "data." not in str(error.value)  # a client does not know the configuration
    assert decoders.decode(PHOTO, 24).square.shape == (24, 24, 3)


def test_reasons_that_are_for_the_host_are_not_for_clients(decoders, hostile_decoders):
    with pytest.raises(BadPhotoError, match=r"^The photo is truncated; send it whole\.$"):
        decoders.decode(PHOTO_JPEG[:-100], 24)
    with pytest.raises(BadPhotoError, match="format that this server does not read") as error:
        hostile_decoders.decode(b"reader ", 24)
    assert "/srv" not in str(error.value)


def test_of_a_file_with_two_meanings_only_the_picture_is_used(decoders):
    for content in hostile.polyglots().values():
        seen = decoders.decode(content, 24)
        assert (seen.width, seen.height) == (60, 40)
        for other in (b"script", b"alert", b"PK\x03\x04"):
            assert other not in seen.thumbnail


def test_too_many_pixels_are_refused(decoders):
    with pytest.raises(BadPhotoError, match=r"9000 × 6000 pixels, more than 50 megapixels"):
        decoders.decode(encoded(np.zeros((6000, 9000), np.uint8)), 24)


def test_a_reduced_photo_is_small_and_without_metadata(decoders):
    exif = PIL.Image.Exif()
    exif[0x010E] = "SECRET"
    exif[0x0112] = 6  # rotated
    content = encoded(picture(5, 600, 300), "JPEG", exif=exif.tobytes(), comment=b"SECRET")
    reduced = decoders.reduced(content, 400, max_megapixels=50)
    assert b"SECRET" not in reduced
    assert b"Exif" not in reduced
    with PIL.Image.open(io.BytesIO(reduced)) as image:
        assert (image.format, image.size) == ("JPEG", (200, 400))


@pytest.mark.parametrize("word", [b"hang", b"crash", b"exit", b"memory", b"width", b"script", b"short", b"nested"])
def test_a_photo_that_takes_over_a_process_harms_only_that_process(hostile_decoders, word):
    with pytest.raises(BadPhotoError):
        hostile_decoders.decode(word + b" ", 16)
    assert hostile_decoders.decode(PHOTO, 16).width == 60


def test_a_process_does_not_have_the_servers_environment(hostile_decoders, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(BadPhotoError):
        hostile_decoders.decode(b"exit ", 16)  # the next process starts in this environment
    with pytest.raises(BadPhotoError, match="PYTHONPATH") as error:
        hostile_decoders.decode(b"environment ", 16)
    assert "SECRET" not in str(error.value)


def test_threads_share_the_processes(decoders):
    contents = [encoded(picture(n), "JPEG") for n in range(20)]
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.setdefault(n, decoders.decode(contents[n], 8).square))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[n], photos.decode_with_thumbnail(contents[n], 8).square) for n in range(20))


def children() -> set[int]:
    """Returns the processes that this one has started and that still run."""
    found = set()
    for task in pathlib.Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def test_closing_ends_processes_also_those_at_work(tmp_path):
    before, errors = children(), []
    decoders = DecodePool(Settings(decode_processes=1, decode_seconds=60), worker=HOSTILE)
    (process,) = children() - before

    def decode(content):
        try:
            decoders.decode(content, 16)
        except (BadPhotoError, DecoderError) as error:
            errors.append(error)

    contents = (b"hang " + os.fsencode(tmp_path / "file"), PHOTO)
    threads = [threading.Thread(target=decode, args=(content,)) for content in contents]
    threads[0].start()
    until((tmp_path / "file").exists)
    threads[1].start()  # waits for the process
    decoders.close()
    for thread in threads:
        thread.join(60)
    assert len(errors) == 2
    assert process not in children()
    with pytest.raises(DecoderError):
        decoders.decode(PHOTO, 16)


def test_processes_that_cannot_be_started_leave_nothing_behind(tmp_path):
    """The worker's command does not start while a file exists."""
    before, file = children(), tmp_path / "file"
    with DecodePool(Settings(decode_processes=1), worker=[*HOSTILE, str(file)]) as decoders:
        file.touch()
        with pytest.raises(BadPhotoError):
            decoders.decode(b"exit ", 16)
        for _ in range(2):
            with pytest.raises(DecoderError):
                decoders.decode(PHOTO, 16)
        assert children() == before
        with pytest.raises(DecoderError):
            DecodePool(Settings(decode_processes=2), worker=[*HOSTILE, str(file)])
        file.unlink()
        assert decoders.decode(PHOTO, 16).width == 60
    with pytest.raises(DecoderError):
        DecodePool(Settings(), worker=["/not/there"])
    assert children() == before


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"\0\0\0\4\0\0\0\0{", b"\0\0\0\2\0\0\0\1{}", b"\0\0\0\2\0\0\0\0[]", b"\0\0\0\2\0\0\0\0\xff{",
        b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\2\xff\xff\xff\xff{}",
    ],
)  # fmt: skip
def test_what_is_not_a_message_is_an_error(answer):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError):
            receive_message(ours)


def test_messages_arrive_as_they_were_sent_or_in_time():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        content = os.urandom(100_000)
        sender = threading.Thread(target=send_message, args=(theirs, {"a": [1, "é"]}, content))
        sender.start()
        assert receive_message(ours) == ({"a": [1, "é"]}, content)
        sender.join()
        with pytest.raises(TimeoutError):
            receive_message(ours, deadline=time.monotonic() + 0.01)
        with pytest.raises(TimeoutError):
            send_message(ours, {}, bytes(1 << 24), deadline=time.monotonic() + 0.01)

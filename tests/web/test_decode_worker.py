"""Privileges of a decode process."""

import os

import pytest

from cib_jax.data.photos import BadPhotoError
from tests.web.fake import encoded, picture


def test_a_process_cannot_write_a_file(hostile_decoders, tmp_path):
    with pytest.raises(BadPhotoError):
        hostile_decoders.decode(b"file " + os.fsencode(tmp_path / "file"), 16)
    assert not (tmp_path / "file").exists() or not (tmp_path / "file").stat().st_size


def test_a_process_cannot_open_many_files(hostile_decoders):
    with pytest.raises(BadPhotoError) as error:
        hostile_decoders.decode(b"files ", 16)
    assert "opened" not in str(error.value)


def test_a_process_cannot_take_more_memory_than_allowed(hostile_decoders):
    with pytest.raises(BadPhotoError, match=r"1,024 MiB"):
        hostile_decoders.decode(b"memory ", 16)
    assert hostile_decoders.decode(encoded(picture(1)), 16).width == 60

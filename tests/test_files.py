"""Atomic writes, locks, names and the ordered thread map."""

import importlib.metadata
import json
import os
import pathlib
import threading
import types

import pytest

from cib_jax import files
from cib_jax.errors import MissingExtraError


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    with pytest.raises(RuntimeError), files.replacing(path) as part:
        part.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_lock_keeps_others_out_and_shared_ones_admit_each_other(tmp_path):
    path = tmp_path / "lock"
    shared = (files.locked(path, shared=True), files.locked(path, shared=True, wait=False))
    with shared[0], shared[1], pytest.raises(BlockingIOError), files.locked(path, wait=False):
        pass
    with files.locked(path, wait=False), pytest.raises(BlockingIOError), files.locked(path, shared=True, wait=False):
        pass


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_text(encoding):
    assert files.decode_text("aé日\u2028".encode(encoding)) == "aé日\u2028"
    assert files.decode_text(b"\xfe\xff\0a") == "a"


def test_other_encodings_are_refused_or_keep_their_bytes():
    with pytest.raises(UnicodeDecodeError):
        files.decode_text(b"caf\xe9")
    assert os.fsencode(files.decode_text(b"caf\xe9", "surrogateescape")) == b"caf\xe9"


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_names_in_json_come_back_to_the_byte(ensure_ascii):
    names = [b"caf\xe9.jpg", "café 日.jpg".encode(), b"caf\\udce9.jpg", b'\xff\xfe\n"\x01', b"\xed\xa0\x80.jpg"]
    content = {"paths": [files.path_as_utf8(os.fsdecode(name)) for name in names]}
    text = files.dump_json(content, ensure_ascii=ensure_ascii)
    assert [os.fsencode(path) for path in json.loads(text.encode("utf-8"))["paths"]] == names
    assert ensure_ascii or "café 日" in text


def test_names_that_are_not_unicode_are_printable():
    assert files.printable(b"caf\xe9.jpg".decode("utf-8", "surrogateescape")) == "caf\\udce9.jpg"
    assert files.printable("café.jpg") == "café.jpg"


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError("one\ntwo"), "one"), (ValueError(), "ValueError"), (OSError("\n a"), "a")]
)
def test_the_first_line_of_an_error(error, line):
    assert files.first_line(error) == line


def test_a_hint_names_what_is_alike():
    assert files.did_you_mean("bit", ["bits", "beta"]) == "did you mean bits? "
    assert files.did_you_mean("xyz", ["bits", "beta"]) == ""


def test_results_come_in_order_and_an_error_stops_the_map():
    assert list(files.map_in_order(lambda n: n * n, range(50))) == [(n, n * n) for n in range(50)]
    taken = []

    def items():
        for n in range(10_000):
            taken.append(n)
            yield n

    with pytest.raises(ZeroDivisionError):
        list(files.map_in_order(lambda n: 1 // (5 - n), items()))
    assert len(taken) < 10_000


def test_the_map_uses_as_many_threads_as_there_are_cores():
    barrier = threading.Barrier(files.core_count())
    assert len(list(files.map_in_order(lambda n: barrier.wait(timeout=60), range(files.core_count())))) > 0


def test_an_optional_package_that_cannot_be_loaded_is_not_called_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    missing = MissingExtraError("not installed", field="--mode")
    (tmp_path / "cib_damaged.py").write_text("raise ImportError('libx.so: failed to map segment')")
    (tmp_path / "cib_incomplete.py").write_text("import cib_not_there")
    (tmp_path / "cib_intact.py").write_text("")
    for name, part in (("cib_damaged", "failed to map segment"), ("cib_incomplete", "cib_not_there")):
        with pytest.raises(MissingExtraError) as error:
            files.import_optional(name, missing)
        assert error.value is not missing and part in str(error.value) and error.value.field == "--mode"
    with pytest.raises(MissingExtraError) as error:
        files.import_optional("cib_not_there", missing)
    assert error.value is missing
    assert files.import_optional("cib_intact", missing).__name__ == "cib_intact"


@pytest.mark.parametrize("links", [True, False])
def test_only_regular_files_are_opened(tmp_path, links):
    os.mkfifo(tmp_path / "pipe")
    for link, target in (("link", "regular"), ("to a pipe", "pipe"), ("to itself", "to itself")):
        (tmp_path / link).symlink_to(target)
    (tmp_path / "regular").write_bytes(b"text")
    for name in ("pipe", "to a pipe", "to itself", ".", "absent", "/dev/zero", *([] if links else ["link"])):
        with pytest.raises(OSError):
            files.open_regular(tmp_path / name, links=links)
    for name in ("regular", *(["link"] if links else [])):
        with files.open_regular(tmp_path / name, links=links) as file:
            assert file.read() == b"text"


def test_json_that_cannot_be_read_is_one_of_two_errors(tmp_path):
    (tmp_path / "file").write_text('{"a": [1]}')
    assert files.read_json(tmp_path / "file") == {"a": [1]}
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError):
            files.read_json(tmp_path / "file")


def test_the_command_for_an_extra_suits_the_installation(tmp_path, monkeypatch):
    """A clone, from inside and from elsewhere; packages from an index, from GitHub and from a folder."""
    monkeypatch.chdir(root := pathlib.Path(files.__file__).parents[1])
    assert files.install_command("search") == "pip install -e '.[search]'"
    monkeypatch.chdir(tmp_path)
    assert files.install_command("search") == f"pip install -e '{root}[search]'"
    monkeypatch.setattr(files, "__file__", str(tmp_path / "cib_jax" / "files.py"))
    github = "https://github.com/cib-jax/cib_jax"
    for origin, expected in (
        (None, "cib-jax[search]"),
        ({"url": github, "vcs_info": {"vcs": "git"}}, f"cib-jax[search] @ git+{github}"),
        ({"url": "file:///clone", "dir_info": {}}, "cib-jax[search] @ file:///clone"),
    ):
        found = types.SimpleNamespace(read_text=lambda name, origin=origin: origin and json.dumps(origin))
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name, found=found: found)
        assert files.install_command("search") == f"pip install '{expected}'"


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 photos"), (1, "1 photo"), (2, "2 photos"), (1_000_000, "1,000,000 photos")]
)
def test_a_count_agrees_with_its_noun(number, words):
    assert files.count(number, "photo") == words
    assert files.count(number, "class", "classes") == words.replace("photos", "classes").replace("photo", "class")


def test_a_folder_that_an_uninstall_has_left_is_no_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "left_over" / "__pycache__").mkdir(parents=True)
    (tmp_path / "present.py").write_text("")
    assert files.is_installed("present")
    assert not files.is_installed("left_over") and not files.is_installed("never_there")

"""What a process of several leaves where it ends: word in the workdir, and nothing in the folder it was started in."""

import multiprocessing
import pathlib
import sys
import threading
import types
import zlib

import jax
import pytest
from jax._src import compilation_cache

from cib_jax.distributed import multihost
from cib_jax.errors import DistributedError, UserError
from cib_jax.files import write_bytes
from cib_jax.runs import processes


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def second(monkeypatch, tmp_path):
    """Makes this process the second of several; returns how it ends, in an empty folder, where an error meets it."""

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(multihost, "is_distributed", lambda: True)
    monkeypatch.setattr(multihost, "is_first_process", lambda: False)
    monkeypatch.setattr(processes, "_ENDING", processes.threading.Event())
    monkeypatch.setattr(processes.os, "_exit", leave)
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def ends(error, workdir):
        with pytest.raises(Ended) as ended, processes.exit_on_error("", str(workdir)):
            raise error
        assert not list((tmp_path / "here").iterdir())
        return ended.value.args[0]

    return ends


def test_what_it_refuses_is_left_in_the_workdir(second, tmp_path):
    assert second(UserError("it is so"), tmp_path) == 2
    assert (tmp_path / ".last-words").read_text() == "2 it is so"


def test_without_a_workdir_it_leaves_nothing(second):
    assert second(UserError("--workdir: several processes need one folder"), "") == 2
    assert second(KeyboardInterrupt(), "") == 130


def test_who_lost_another_leaves_no_word(second, tmp_path, capsys):
    assert second(RuntimeError("Gloo AllGather failed: Connection reset by peer"), tmp_path) == 75
    assert "another process of this run ended: it was killed" in capsys.readouterr().err
    assert not (tmp_path / ".last-words").exists()


def test_what_breaks_in_the_background_is_told_in_a_line_but_for_reads_given_up(monkeypatch, capsys):
    for place, hook in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(place, hook, getattr(place, hook))
    processes.install_background_hooks()

    async def read():
        pass

    given_up = read()
    for error, thrower in (
        (RuntimeError("Event loop is closed"), None),
        (ValueError("of an array"), given_up),
        (OSError("disk\nfull"), None),
    ):
        sys.unraisablehook(types.SimpleNamespace(exc_type=type(error), exc_value=error, object=thrower))
    given_up.close()
    assert capsys.readouterr().err == "run.py: in the background: OSError: disk\n"


def _write_and_break(folder, send):
    for number in range(200):
        write_bytes(pathlib.Path(folder) / "table.csv", b"csv" * 1000)
        write_bytes(pathlib.Path(folder) / "table.md", b"md" * 1000)
        assert set((pathlib.Path(folder) / "table.csv").read_bytes()) == set(b"csv"), number
    send("written")
    if multiprocessing.parent_process() is not None:
        raise RuntimeError("out of luck")


def test_workers_do_not_mix_the_files_they_write_and_one_that_breaks_down_is_reported(tmp_path):
    received = []
    with pytest.raises(DistributedError):
        processes.run(_write_and_break, (str(tmp_path),), 2, lambda *message: received.append(message))
    assert sorted(received) == [(0, "written"), (1, "written")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.md"]


def test_workers_are_as_many_as_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr(processes.files, "core_count", lambda: 16)
    for free, workers in ((64, 8), (9, 2), (1, 1)):
        monkeypatch.setattr(processes, "_free_bytes", lambda free=free: free << 30)
        assert processes.worker_count(0) == workers and processes.worker_count(3) == 3


class Unchecked:
    """A library for compression without checksums, as JAX uses zstandard."""

    ZstdCompressor = ZstdDecompressor = compress = decompress = classmethod(lambda cls, content=None: content or cls)


@pytest.mark.parametrize("library", ["zstd", "zstandard"])
def test_compiled_programs_that_are_kept_have_checksums(tmp_path, monkeypatch, library):
    monkeypatch.setattr(compilation_cache, library, Unchecked)
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        processes.set_compilation_cache(str(tmp_path))
        kept = bytearray(compilation_cache.compress_executable(bytes(range(256))))
        assert compilation_cache.decompress_executable(bytes(kept)) == bytes(range(256))
        for place in range(2, len(kept)):  # after the header
            kept[place] ^= 1
            with pytest.raises(zlib.error):
                compilation_cache.decompress_executable(bytes(kept))
            kept[place] ^= 1
    finally:
        jax.config.update("jax_compilation_cache_dir", before)

"""Encoders of indexes are exported once; `tests/storage/test_search_copy.py` tests what is exported."""

import pathlib

import pytest

from cib_jax.inference.hasher import Hasher


@pytest.fixture(scope="session", autouse=True)
def exported_once():
    """Copies the exported encoder of an index where an earlier index has the same one, by the weights in its name."""
    export, written = Hasher.export, {}

    def export_once(hasher, path):
        key = (pathlib.Path(path).name, hasher.encoder, hasher.side, hasher.batch_size)
        if key not in written:
            export(hasher, path)
            written[key] = pathlib.Path(path).read_bytes()
        else:
            pathlib.Path(path).write_bytes(written[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Hasher, "export", export_once)
        yield

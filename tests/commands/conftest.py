"""Encoders of indexes are exported once; `tests/storage/test_search_copy.py` tests the export itself."""

import pathlib

import pytest

from cib_jax.inference.hasher import Hasher

WRITTEN = {}


@pytest.fixture(scope="module", autouse=True)
def exported_once():
    """Copies the exported encoder of an index where an earlier index has the same one, by the weights in its name."""
    export = Hasher.export

    def export_once(hasher, path):
        key = (pathlib.Path(path).name, hasher.encoder, hasher.side, hasher.batch_size)
        if key not in WRITTEN:
            export(hasher, path)
            WRITTEN[key] = pathlib.Path(path).read_bytes()
        else:
            pathlib.Path(path).write_bytes(WRITTEN[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Hasher, "export", export_once)
        yield

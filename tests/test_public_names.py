"""The names of `import cib_jax`: imported on first use; old names and paths work with a warning."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

import cib_jax as cib

INIT = pathlib.Path(cib.__file__)


@pytest.mark.parametrize("name", cib.__all__)
def test_every_name_can_be_imported(name):
    assert callable(getattr(cib, name)) and name in dir(cib)


def test_other_names_are_not_listed():
    assert dir(cib) == sorted(cib.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        cib.nothing  # noqa: B018


def test_an_import_loads_no_library():
    program = "import sys; import cib_jax; print({'jax', 'numpy', 'flax', 'rich'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=INIT.parents[1]
    )
    assert done.stdout.strip() == "set()"


def test_old_names_and_paths_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match="resize_and_normalize"):
        assert cib.resize_and_normalise is cib.resize_and_normalize
    from cib_jax.jobs import beside_notebook, duplicates, train

    for module, old, new in ((train, "train", "train"), (duplicates, "duplicates", "find_duplicates"),
                             (beside_notebook, "serve", "serve_notebook")):  # fmt: skip
        with pytest.warns(DeprecationWarning, match="cib_jax.commands"):
            assert getattr(module, old) is getattr(cib, new)
    from cib_jax.data.unzipped import unzip

    assert unzip is cib.unzip_photos


def test_windows_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    spec = importlib.util.spec_from_file_location("cib_jax_on_windows", INIT)
    with pytest.raises(ImportError, match="WSL") as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "\n" not in str(caught.value)

"""The teacher of a run: a run of its own, resumed anywhere to the same bits, and independent of labels."""

import contextlib
import json

import jax
import numpy as np
import pytest
import rich.console
import sklearn.datasets

import cib_jax as cib
from cib_jax.commands.train import COORDINATES_FILE, train
from cib_jax.config import build
from cib_jax.distributed import multihost
from cib_jax.inference.hasher import Hasher
from cib_jax.inference.serialization import restore_best
from tests import small

pytestmark = pytest.mark.usefixtures("compiled_to_run", "few_digits")


def config(**fields):
    """A split that looks at no label, and a teacher as small as the codes."""
    own = {"image_size": 8, "teacher__bits": 16, "teacher__dimensions": 8, "teacher__neighbours": 5, "epochs": 2}
    split = {"data__train_per_class": 0, "data__train_images": 130}
    return small.config(**(small.FEW_DIGITS | {"objective": "diffusion"} | own | split | fields))


def codes_of(workdir):
    return {path.name: np.load(path) for path in (workdir / "codes").glob("*codes.npy")}


def quiet():
    return rich.console.Console(quiet=True)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("taught") / "run"
    train(config(), workdir, console=quiet())
    return workdir


def test_the_teacher_is_a_run_of_its_own_without_a_code(taught):
    fields = json.loads((taught / "teacher" / "config.json").read_text())
    assert (fields["objective"], fields["bits"], fields["temperature"], fields["epochs"]) == ("naive_cl", 16, 0.2, 2)
    assert not (taught / "teacher" / "codes").exists()
    assert Hasher.load(taught / "teacher").encoder.bits == 16


def test_coordinates_are_those_of_the_teachers_embeddings_of_the_training_images(taught):
    hasher = Hasher.load(taught / "teacher")
    images = build.draw_splits(config()).train.images
    teacher = cib.Teacher(neighbours=5, dimensions=8)
    logits = hasher.logits(np.stack([images[i] for i in range(len(images))]))
    expected = teacher.coordinates(*teacher.neighbors(logits))
    kept = np.load(taught / "teacher" / COORDINATES_FILE)
    # Up to the sign of a mode, and what another batch size rounds otherwise.
    np.testing.assert_allclose(kept @ kept.T, expected @ expected.T, atol=1e-2)


def test_other_labels_give_the_same_codes(taught, tmp_path, monkeypatch):
    """Without a teacher: tests/end_to_end/test_data_sets.py."""
    digits = sklearn.datasets.load_digits()
    other = np.random.default_rng(0).permutation(digits.target)
    digits.target = other
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: digits)
    train(config(), tmp_path / "other", console=quiet())
    labels = [np.load(workdir / "codes" / "database_labels.npy") for workdir in (taught, tmp_path / "other")]
    assert not np.array_equal(*labels)
    mine, others = codes_of(taught), codes_of(tmp_path / "other")
    assert mine.keys() == others.keys() and len(mine) == 2
    assert all(np.array_equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize("after", [3, 11])
def test_a_run_stopped_in_its_teacher_or_after_goes_on_to_the_same(taught, tmp_path, monkeypatch, after):
    """Four steps an epoch, two epochs of each: in the teacher and in the codes."""
    asked = iter([False] * (after - 1) + [True])
    with monkeypatch.context() as patched:
        patched.setattr(
            "cib_jax.distributed.multihost.sigterm_flag", lambda: contextlib.nullcontext(lambda: next(asked))
        )
        with pytest.raises(multihost.Preempted):
            train(config(), tmp_path / "run", console=quiet())
    if after == 11:
        # What is damaged is made again, from the teacher's checkpoint.
        (tmp_path / "run" / "teacher" / COORDINATES_FILE).write_bytes(b"no array")
    train(config(), tmp_path / "run", console=quiet())
    ends = [restore_best(at, build.encoder(config())[1], config())[0] for at in (tmp_path / "run", taught)]
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, ends), strict=True))


def test_a_teacher_is_not_validated_by_labels(tmp_path):
    validated = config(data__validation="query_half", train__validate_every=1)
    train(validated, tmp_path / "run", console=quiet())
    lines = {
        part: [json.loads(line) for line in (tmp_path / "run" / part / "metrics.jsonl").read_text().splitlines()]
        for part in (".", "teacher")
    }
    assert all("validation_map" in line for line in lines["."])
    assert not any("validation_map" in line for line in lines["teacher"])

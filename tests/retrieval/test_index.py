"""Index of codes: every kind, ties, threads, reranking and invalid arguments."""

import subprocess
import sys
import threading

import numpy as np
import pytest

import cib_jax as cib
from cib_jax.errors import SearchError, UserError
from cib_jax.retrieval import index
from tests.retrieval.reference import clustered_codes, distances_of, random_codes

APPROXIMATE = ("hnsw", "ivf", "mih")


@pytest.mark.parametrize("width", [1, 512])
def test_extremes(width):
    zeros, ones = np.zeros((1, width), np.uint8), np.full((1, width), 255, np.uint8)
    index = cib.Index.of(np.concatenate([ones, zeros, ones]))
    distances, ids = index.search(zeros, 3)
    assert (distances.tolist(), ids.tolist()) == ([[0, 8 * width, 8 * width]], [[1, 0, 2]])
    assert (len(index), index.bits) == (3, 8 * width)
    assert [hits.ids.tolist() for hits in index.within(zeros, 8 * width - 1)] == [[1]]
    assert [members.tolist() for members in index.groups(0)] == [[0, 2]]
    assert [members.tolist() for members in index.groups(8 * width)] == [[0, 1, 2]]


@pytest.mark.parametrize("kind", ["exact", *APPROXIMATE])
def test_one_code(kind):
    """And the index is printed in one line."""
    index = cib.Index.of(np.full((1, 2), 7, np.uint8), kind)
    assert str(index) == f"Index(1 code of 16 bits, {kind})"
    distances, ids = index.search(np.full((2, 2), 7, np.uint8), 1)
    assert (distances.tolist(), ids.tolist()) == ([[0], [0]], [[0], [0]])


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_approximate_kinds_find_most_of_the_nearest(kind):
    """Of more codes than are added at a time."""
    codes, queries = clustered_codes(9000, 8, centers=180), clustered_codes(50, 8, 0, centers=180)
    index = cib.Index.of(codes, kind)
    distances, ids = index.search(queries, 5)
    np.testing.assert_array_equal(distances, np.bitwise_count(queries[:, None] ^ codes[ids]).sum(-1))
    assert (np.diff(distances) >= 0).all()
    assert (np.diff(ids)[np.diff(distances) == 0] > 0).all()
    farthest = np.sort(distances_of(queries, codes), axis=1)[:, 4:5]
    assert (distances <= farthest).mean() > 0.9
    np.testing.assert_array_equal(index.codes, codes)
    exact = cib.Index.of(codes)
    for mine, theirs in zip(index.within(queries, 9), exact.within(queries, 9), strict=True):
        np.testing.assert_array_equal(mine.ids, theirs.ids)


@pytest.mark.parametrize(
    ("kind", "settings"), [("ivf", {"nlist": 16, "nprobe": 16}), ("mih", {"nhash": 2, "b": 4, "nflip": 4})]
)
def test_looking_everywhere_is_exact(kind, settings):
    codes, queries = random_codes(500, 2), random_codes(20, 2, 1)
    distances, _ = cib.Index.of(codes, kind, **settings).search(queries, 10)
    np.testing.assert_array_equal(distances, np.sort(distances_of(queries, codes), axis=1)[:, :10])


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_an_approximate_index_is_built_alike_twice(kind):
    codes, queries = random_codes(2000, 4), random_codes(30, 4, 1)
    first, second = (cib.Index.of(codes, kind).search(queries, 7) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize("width", [1, 3, 512])
@pytest.mark.parametrize("kind", APPROXIMATE)
def test_approximate_kinds_take_any_length(kind, width):
    codes = random_codes(40, width)
    distances, ids = cib.Index.of(codes, kind).search(codes, 1)
    np.testing.assert_array_equal(distances, 0)
    np.testing.assert_array_equal(codes[ids[:, 0]], codes)


def test_missing_hits_have_id_minus_one():
    codes = np.array([[0, 0, 0, 0], [255, 255, 255, 255]], np.uint8)
    index = cib.Index.of(codes, "mih", nhash=2, b=8, nflip=0)
    distances, ids = index.search(codes[:1], 2)
    assert (distances.tolist(), ids.tolist()) == ([[0, 2**31 - 1]], [[0, -1]])
    reranked = index.rerank(np.full((1, 32), -1.0, np.float32), ids)
    assert (reranked[0].tolist(), reranked[1].tolist()) == ([[0, np.inf]], [[0, -1]])


@pytest.mark.parametrize("kind", ["exact", *APPROXIMATE])
def test_threads_may_search_at_once(kind):
    codes, queries = clustered_codes(20_000, 8), clustered_codes(64, 8, 1)
    index = cib.Index.of(codes, kind)
    expected, found = index.search(queries, 9)[1], {}

    def ask(name):
        found[name] = np.concatenate([index.search(queries[row : row + 8], 9)[1] for row in range(0, 64, 8)])

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for ids in found.values():
        np.testing.assert_array_equal(ids, expected)


def test_exact_codes_are_held_once_and_may_be_a_memory_map(tmp_path):
    codes = clustered_codes(1000, 8)
    codes.tofile(tmp_path / "codes")
    mapped = np.memmap(tmp_path / "codes", np.uint8, "r", shape=codes.shape)
    index = cib.Index.of(mapped)
    assert np.shares_memory(index.codes, mapped)
    assert not index.codes.flags.writeable
    strided = cib.Index.of(np.repeat(codes, 2, axis=0)[::2])
    for other in (index, strided):
        np.testing.assert_array_equal(other.search(codes[:4], 5)[1], cib.rank(codes[:4], codes, 5))
    assert codes.flags.writeable


def test_rerank_is_the_sum_of_contradicted_logits():
    rng = np.random.default_rng(0)
    codes, logits = random_codes(300, 4), rng.normal(size=(6, 32)).astype(np.float32)
    index = cib.Index.of(codes)
    _, ids = index.search(np.asarray(cib.pack_bits(logits)), 40)
    distances, ranked = index.rerank(logits, ids)
    for row in range(len(logits)):
        wanted = []
        for place, i in enumerate(ids[row]):
            bits = np.unpackbits(codes[i])
            contradicted = [abs(logit) for logit, bit in zip(logits[row], bits, strict=True) if (logit > 0) != bit]
            wanted.append((sum(contradicted), place, i))
        wanted.sort()
        assert ranked[row].tolist() == [i for _, _, i in wanted]
        np.testing.assert_allclose(distances[row], [distance for distance, _, _ in wanted], rtol=1e-5, atol=1e-6)


def test_rerank_of_equally_sure_bits_changes_nothing():
    codes, queries = clustered_codes(500, 3), clustered_codes(9, 3, 1)
    index = cib.Index.of(codes)
    hamming, ids = index.search(queries, 25)
    distances, ranked = index.rerank(np.asarray(cib.unpack_bits(queries)), ids)
    np.testing.assert_array_equal(ranked, ids)
    np.testing.assert_array_equal(distances, hamming)


CODES = np.zeros((5, 4), np.uint8)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: cib.Index.of(CODES.astype(np.float32)), "codes"),
        (lambda: cib.Index.of(CODES[0]), "codes"),
        (lambda: cib.Index.of(CODES[:0]), "codes"),
        (lambda: cib.Index.of(CODES, "lsh"), "kind"),
        (lambda: cib.Index.of(CODES, nlist=2), "nlist"),
        (lambda: cib.Index.of(CODES, "mih", nlist=2), "nlist"),
        (lambda: cib.Index.of(CODES, "hnsw", m=0), "m"),
        (lambda: cib.Index.of(CODES, "hnsw", m=1), "m"),
        (lambda: cib.Index.of(CODES, "ivf", nprobe=1.5), "nprobe"),
        (lambda: cib.Index.of(CODES, "ivf", nlist=6), "nlist"),
        (lambda: cib.Index.of(CODES, "ivf", nlist=2, nprobe=3), "nprobe"),
        (lambda: cib.Index.of(CODES, "mih", nhash=3, b=11), "nhash"),
        (lambda: cib.Index.of(CODES, "mih", b=4, nflip=5), "nflip"),
        (lambda: cib.Index.of(CODES).search(CODES, 0), "k"),
        (lambda: cib.Index.of(CODES).search(CODES, 6), "k"),
        (lambda: cib.Index.of(CODES, "mih").search(CODES, 6), "k"),
        (lambda: cib.Index.of(CODES).search(CODES[:, :3], 1), "queries"),
        (lambda: cib.Index.of(CODES).search(CODES[:0], 1), "queries"),
        (lambda: cib.Index.of(CODES).search(CODES.astype(int), 1), "queries"),
        (lambda: cib.Index.of(CODES).within(CODES, -1), "radius"),
        (lambda: cib.Index.of(CODES).within(CODES[:, :1], 1), "queries"),
        (lambda: cib.Index.of(CODES).groups(0.5), "radius"),
        (lambda: cib.Index.of(CODES).rerank(np.zeros((1, 33)), [[0]]), "logits"),
        (lambda: cib.Index.of(CODES).rerank(np.full((1, 32), np.nan), [[0]]), "logits"),
        (lambda: cib.Index.of(CODES).rerank(np.zeros((1, 32)), [[0], [1]]), "ids"),
        (lambda: cib.Index.of(CODES).rerank(np.zeros((1, 32)), [[5]]), "ids"),
        (lambda: index.parse_kind("ivf nlist"), "--kind"),
        (lambda: index.parse_kind("ivf nlist=-1"), "--kind"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_invalid_arguments_are_refused(call, field):
    with pytest.raises(UserError) as refused:
        call()
    assert refused.value.field == field


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SearchError, match=r"\[search\]"):
        cib.Index.of(CODES)


def test_importing_the_package_does_not_import_faiss():
    program = "import sys, cib_jax; cib_jax.Index; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

import importlib.util
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.sparse import csgraph
from scipy.spatial.distance import cdist

import cib_jax as cib
from cib_jax.errors import SearchError
from cib_jax.retrieval import exact_search, near_duplicates

APPROXIMATE = ("hnsw", "ivf", "mih")


def distances_of(queries, codes):
    """SciPy's, of unpacked bits."""
    return cdist(np.unpackbits(queries, axis=1), np.unpackbits(codes, axis=1), "cityblock").astype(int)


def nearest_by_sorting(queries, codes, k):
    distances = distances_of(queries, codes)
    order = [sorted(range(len(codes)), key=lambda i, row=row: (row[i], i))[:k] for row in distances]
    return np.take_along_axis(distances, np.array(order), 1), order


def random_codes(n, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, width), np.uint8)


def clustered_codes(n, width, seed=0, centers=8):
    """A sixteenth of the bits around a few centers turned, so that ties and near neighbors abound."""
    rng = np.random.default_rng(seed)
    flips = rng.integers(0, 256, (4, n, width), np.uint8)
    return random_codes(centers, width, seed)[rng.integers(0, centers, n)] ^ np.bitwise_and.reduce(flips)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few codes, so that a small database goes through every stage of a large one."""
    monkeypatch.setattr(exact_search, "_FIRST", 4)
    monkeypatch.setattr(exact_search, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(exact_search, "_ROWS", 2)
    monkeypatch.setattr(exact_search, "_TASK", 8)
    monkeypatch.setattr(exact_search, "_COUNTED_BYTES", 7)
    monkeypatch.setattr(exact_search, "_HITS_AT_ONCE", 2)
    monkeypatch.setattr(near_duplicates, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(near_duplicates, "_MOST_PAIRS", 5)


@st.composite
def code_pairs(draw):
    """Queries, codes of the same width, from few byte values, and k."""
    width = draw(st.sampled_from([1, 2, 3, 5, 8, 9, 16, 20, 32]))
    byte = st.sampled_from([0, 1, 3, 255])
    queries = draw(hnp.arrays(np.uint8, (draw(st.integers(1, 5)), width), elements=byte))
    codes = draw(hnp.arrays(np.uint8, (draw(st.integers(1, 70)), width), elements=byte))
    return queries, codes, draw(st.integers(1, len(codes)))


@pytest.mark.usefixtures("small_blocks")
class TestInSmallBlocks:
    # The fixture sets constants; they are the same for every example.
    relaxed = settings(suppress_health_check=list(settings.get_profile("default").suppress_health_check), deadline=None)

    @relaxed
    @given(code_pairs())
    def test_exact_search_is_a_stable_sort(self, pair):
        queries, codes, k = pair
        distances, ids = cib.Index.of(codes).search(queries, k)
        expected = nearest_by_sorting(queries, codes, k)
        np.testing.assert_array_equal(distances, expected[0])
        np.testing.assert_array_equal(ids, expected[1])
        assert (distances.dtype, ids.dtype) == (np.int32, np.int64)

    @relaxed
    @given(code_pairs(), st.integers(0, 300))
    def test_within_finds_all_in_order(self, pair, radius):
        queries, codes, _ = pair
        found = cib.Index.of(codes).within(queries, radius)
        assert len(found) == len(queries)
        for hits, row in zip(found, distances_of(queries, codes), strict=True):
            expected = sorted((row[i], i) for i in range(len(codes)) if row[i] <= radius)
            assert list(zip(hits.distances, hits.ids, strict=True)) == expected

    @relaxed
    @given(code_pairs(), st.integers(0, 80))
    def test_groups_are_the_components_of_all_pairs(self, pair, radius):
        _, codes, _ = pair
        check_groups(codes, radius)

    @pytest.mark.parametrize("n", [1, 3, 4, 5, 17, 33, 200])
    def test_one_query_is_shared_by_all_cores(self, n, monkeypatch):
        monkeypatch.setattr(exact_search, "cores", lambda: 7)
        codes = clustered_codes(n, 2)
        for k in {1, min(n, 9), n}:
            _, ids = cib.Index.of(codes).search(codes[:1], k)
            np.testing.assert_array_equal(ids, nearest_by_sorting(codes[:1], codes, k)[1])
        (hits,) = cib.Index.of(codes).within(codes[:1], 3)
        np.testing.assert_array_equal(np.sort(hits.ids), np.flatnonzero(distances_of(codes[:1], codes)[0] <= 3))


def check_groups(codes, radius):
    labels = csgraph.connected_components(distances_of(codes, codes) <= radius, directed=False)[1]
    expected = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    found = [members.tolist() for members in cib.Index.of(codes).groups(radius)]
    assert found == sorted(members for members in expected if len(members) > 1)


@pytest.mark.parametrize("width", [1, 2, 8, 20, 64, 512])
def test_exact_search_is_the_rank_of_the_protocol(width):
    codes, queries = clustered_codes(40_000 if width < 64 else 20_000, width), clustered_codes(5, width, 1)
    for k in (1, 20, 5000):
        distances, ids = cib.Index.of(codes).search(queries, k)
        np.testing.assert_array_equal(ids, cib.rank(queries, codes, k))
        expected = np.bitwise_count(queries[:, None] ^ codes[ids]).sum(-1)
        np.testing.assert_array_equal(distances, expected)


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
    distances, ids = cib.Index.of(np.full((1, 2), 7, np.uint8), kind).search(np.full((2, 2), 7, np.uint8), 1)
    assert (distances.tolist(), ids.tolist()) == ([[0], [0]], [[0], [0]])


def test_equal_codes_come_in_database_order():
    codes = np.zeros((50_000, 3), np.uint8)
    distances, ids = cib.Index.of(codes).search(codes[:3], 30_000)
    np.testing.assert_array_equal(ids, np.tile(np.arange(30_000), (3, 1)))
    assert not distances.any()
    (members,) = cib.Index.of(codes).groups(0)
    np.testing.assert_array_equal(members, np.arange(50_000))


@pytest.mark.parametrize(("width", "radius"), [(2, 1), (4, 2), (8, 0), (8, 3), (8, 9), (20, 5), (512, 40)])
def test_groups_match_scipy(width, radius):
    """The bits of 2 and 8 bytes fall into pieces that do not end with a byte; 9 of 64 compares all pairs."""
    codes = np.concatenate([clustered_codes(150, width, centers=30), random_codes(150, width, 1)])
    check_groups(codes, radius)


def test_a_chain_is_one_group():
    """Each code one bit from the next, the ends as far apart as codes can be."""
    codes = np.packbits(np.tri(65, 64, -1, dtype=np.uint8), axis=1)
    (members,) = cib.Index.of(codes[::-1]).groups(1)
    assert members.tolist() == list(range(65))
    assert cib.Index.of(codes[::2]).groups(1) == []


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_approximate_kinds_find_most_of_the_nearest(kind):
    codes, queries = clustered_codes(3000, 8, centers=60), clustered_codes(50, 8, 0, centers=60)
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
    np.testing.assert_array_equal(distances, nearest_by_sorting(queries, codes, 10)[0])


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


def test_what_is_not_found_is_told():
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
    ("call", "told"),
    [
        (lambda: cib.Index.of(CODES.astype(np.float32)), "codes must be uint8"),
        (lambda: cib.Index.of(CODES[0]), "codes must be uint8"),
        (lambda: cib.Index.of(CODES[:0]), "codes is empty"),
        (lambda: cib.Index.of(CODES, "lsh"), "kind: 'lsh' is not one of exact, hnsw, ivf, mih"),
        (lambda: cib.Index.of(CODES, nlist=2), "nlist: an index of kind 'exact' has no settings"),
        (lambda: cib.Index.of(CODES, "mih", nlist=2), "nlist: an index of kind 'mih' has no such setting"),
        (lambda: cib.Index.of(CODES, "hnsw", m=0), "m: 0 is no whole number from 1 on"),
        (lambda: cib.Index.of(CODES, "hnsw", m=1), "m: 1 link makes no graph"),
        (lambda: cib.Index.of(CODES, "ivf", nprobe=1.5), "nprobe: 1.5 is no whole number"),
        (lambda: cib.Index.of(CODES, "ivf", nlist=6), "nlist: 6 lists are more than there are codes, 5"),
        (lambda: cib.Index.of(CODES, "ivf", nlist=2, nprobe=3), "nprobe: 3 lists are more than nlist, 2"),
        (lambda: cib.Index.of(CODES, "mih", nhash=3, b=11), "3 tables of 11 bits do not fit 32 bits"),
        (lambda: cib.Index.of(CODES, "mih", b=4, nflip=5), "nflip: 5 bits are more than b, 4"),
        (lambda: cib.Index.of(CODES).search(CODES, 0), "k is 0"),
        (lambda: cib.Index.of(CODES).search(CODES, 6), "k is 6, but the database holds 5"),
        (lambda: cib.Index.of(CODES, "mih").search(CODES, 6), "k is 6, but the database holds 5"),
        (lambda: cib.Index.of(CODES).search(CODES[:, :3], 1), "the same number of bytes per code"),
        (lambda: cib.Index.of(CODES).search(CODES[:0], 1), "queries is empty"),
        (lambda: cib.Index.of(CODES).search(CODES.astype(int), 1), "queries must be uint8"),
        (lambda: cib.Index.of(CODES).within(CODES, -1), "radius is -1"),
        (lambda: cib.Index.of(CODES).within(CODES[:, :1], 1), "the same number of bytes per code"),
        (lambda: cib.Index.of(CODES).groups(0.5), "radius is 0.5"),
        (lambda: cib.Index.of(CODES).rerank(np.zeros((1, 31)), [[0]]), r"floats of shape \[queries, 32\]"),
        (lambda: cib.Index.of(CODES).rerank(np.full((1, 32), np.nan), [[0]]), "not finite"),
        (lambda: cib.Index.of(CODES).rerank(np.zeros((1, 32)), [[0], [1]]), r"whole numbers of shape \[1, k\]"),
        (lambda: cib.Index.of(CODES).rerank(np.zeros((1, 32)), [[5]]), "ids go from 5 to 5"),
    ],
)
def test_what_cannot_work_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SearchError, match=r"pip install 'cib-jax\[search\]'"):
        cib.Index.of(CODES)


def test_importing_the_package_does_not_import_faiss():
    program = "import sys, cib_jax; cib_jax.Index; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

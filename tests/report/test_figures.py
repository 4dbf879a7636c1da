"""Figures: numbers in titles and drawn data against values worked out by hand; extremes."""

import itertools
import re

import matplotlib
import numpy as np
import pytest

from cib_jax.report import figures
from cib_jax.retrieval import code_quality
from cib_jax.retrieval.metrics import curves


def drawn(figure):
    """Lays the figure out, as rendering does, and returns its title."""
    figure.draw_without_rendering()
    return figure.get_suptitle()


def numbers(figure):
    """The numbers in the title of a figure, as text."""
    return re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?%?", drawn(figure))


def heights(figure, axis=0):
    return [bar.get_height() for bar in figure.axes[axis].patches]


@pytest.fixture
def ranking():
    """Two queries of classes 0 and 1 on four images, of which the first two are of class 0."""
    codes = np.array([[0b00000000], [0b00000001], [0b11110000], [0b11111111]], np.uint8)
    labels = np.array([0, 0, 1, 1])
    return curves(codes[[0, 3]], codes, labels[[0, 3]], labels, 4)


def test_figures_of_a_perfect_ranking(ranking):
    assert numbers(figures.map_against_k(ranking)) == ["1.000", "1", "1.000", "4"]
    assert numbers(figures.precision_against_returned(ranking, ranking.chance)) == ["4", "50%"]
    # Query 1 finds itself and one more, both relevant; query 2 itself. Within radius 4, query 1 finds a wrong one, too.
    figure = figures.precision_within_radius(ranking)
    assert numbers(figure) == ["2", "1.00", "0%"]
    assert heights(figure)[:5] == pytest.approx([1, 1, 1, 1, (2 / 3 + 1) / 2])
    # Relevant pairs lie 0, 1, 0 and 4 bits apart, irrelevant ones 4, 8, 8 and 7.
    figure = figures.distances(ranking.relevant, ranking.irrelevant)
    assert numbers(figure) == ["1.2", "6.8", "25%"]
    assert heights(figure)[:9] == [0.5, 0.25, 0, 0, 0.25, 0, 0, 0, 0]


def test_precision_recall_interpolates_between_radii():
    figure = figures.precision_recall(np.array([1.0, 0.8, 0.2]), np.array([0.0, 0.4, 0.6]), 0.1)
    assert numbers(figure) == ["0.5", "0.50", "0.10"]


def test_titles_of_rankings_without_a_middle():
    few = figures.precision_recall(np.array([0.0, 0.3]), np.array([0.0, 0.3]), 0.1)
    assert numbers(few) == ["0.30", "0.30", "0.10"]
    none = figures.distances(np.zeros(9), np.eye(9)[4])
    assert numbers(none) == ["4.0"]


def test_names_are_shown_letter_by_letter():
    points = np.random.default_rng(0).normal(size=(4, 2))
    names = ["$_$", "_hidden", b"caf\xe9".decode("utf-8", "surrogateescape"), "a_b^c"]
    figure = figures.embedding(points, np.arange(4), names, 0.5)
    drawn(figure)
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert shown == [r"\$_\$", " _hidden", r"caf\udce9", "a_b^c"]
    mean = np.array([[0.1], [0.2]])
    drawn(figures.methods(["$x", "y$"], [8], mean, 0 * mean, score="MAP"))
    drawn(figures.parameters({"data.name": ["$a", "_b"]}, np.array([0.1, 0.2]), score="MAP"))


def test_long_names_leave_room_for_the_axes():
    row = "CIBHash (train.validate_by=separation train.validate_every=1 train.patience=60 head_dropout=0.5)"
    names, values = [row, "ITQ", 150 * "x"], np.array([[0.1], [0.3], [0.2]])
    made = [
        figures.methods(names, [16], values, 0 * values, score="MAP"),
        figures.parameters({"objective": names, "beta": [0.1, 0.2, 0.3]}, values[:, 0], score="MAP"),
        figures.embedding(np.random.default_rng(0).normal(size=(3, 2)), np.arange(3), names, 0.5),
    ]
    for figure in made:
        drawn(figure)  # Matplotlib's warning of axes without room is an error
        for axis in figure.axes:
            assert axis.get_window_extent().width > 0.25 * figure.bbox.width / len(figure.axes)
            assert axis.get_window_extent().height > 0.25 * figure.bbox.height


def test_long_codes_and_images_without_labels():
    assert numbers(figures.occupancy(np.ones(5, int), 4096)) == ["5", "5", "100%", "1"]
    assert figures.classes(np.full(4, -1), []).names == []
    assert figures.classes(np.zeros((4, 3)), ["a", "b", "c"]).labels.tolist() == [-1] * 4


def test_bits():
    assert numbers(figures.bit_balance([0.5, 0.25, 1.0])) == ["25%", "100%", "1"]
    dead = np.zeros((9, 1), np.uint8)
    assert numbers(figures.bit_correlation(code_quality.bit_correlation(dead))) == []
    packed = np.array([[0b11], [0b11], [0b00], [0b00]], np.uint8)
    assert numbers(figures.bit_correlation(code_quality.bit_correlation(packed))) == ["1.00", "1.00"]


def test_occupancy():
    figure = figures.occupancy(np.array([3, 2, 1, 1]), 8)
    assert numbers(figure) == ["7", "4", "29%", "3"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [3, 2, 1, 1]
    assert numbers(figures.occupancy(np.array([1]), 64)) == ["1", "1", "100%", "1"]
    items = figures.occupancy(np.array([120, 80, 60]), 8, "items")
    assert "image" not in drawn(items) + items.axes[0].get_ylabel()
    assert len(items.axes[0].get_yticks()) > 2


@pytest.mark.parametrize("validated", ["", "validation_map", "separation"])
def test_training(validated):
    records = [{"epoch": e, "contrast": 4.0 - e, "kl": 2.0 * e, "loss": 4.0} for e in (1, 2)]
    if validated:
        records[1][validated] = 0.5
    figure = figures.training(records)
    assert numbers(figure) == ["3.00", "2.00", "2", "4.00"]
    assert [axis.lines[0].get_ydata()[-1] for axis in figure.axes] == [2.0, 4.0, 4.0, *([0.5] if validated else [])]
    assert numbers(figures.training(records[:1])) == ["3.00", "3.00", "1", "2.00"]


def test_training_draws_the_terms_of_an_objective_of_the_users_own():
    records = [{"epoch": e, "step": 9 * e, "contrast": 1.0, "loss": 2.0, "balance_": 0.5 / e} for e in (1, 2)]
    last = figures.training(records).axes[-1]
    assert last.get_ylabel() == "balance_" and last.lines[0].get_ydata().tolist() == [0.5, 0.25]


def test_a_heat_map_leaves_out_what_was_not_tried():
    values = np.array([[0.1, np.nan], [0.3, 0.2]])
    figure = figures.heat_map([0.2, 0.4], [1e-4, 1e-3], values, names=("τ", "β"), score="validation MAP")
    assert numbers(figure) == ["0.300", "0.2", "0.001", "0.200"]
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["0.100", "0.200", "0.300"]


def test_methods_are_sorted_and_gaps_left_open():
    mean = np.array([[0.1, 0.2], [0.5, np.nan], [0.3, 0.4]])
    unmeasured = np.array([[0.1, np.nan], [0.5, np.nan]])
    figure = figures.methods(["a", "b"], [16, 32], unmeasured, 0 * unmeasured, score="MAP")
    assert drawn(figure).startswith("b is best") and numbers(figure) == ["16"]
    figure = figures.methods(["a", "b", "c"], [16, 32], mean, np.zeros((3, 2)), score="MAP")
    assert drawn(figure).startswith("b and c are best") and numbers(figure) == ["16", "32"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "c", "b"]


def test_search_and_parameters():
    values = np.array([0.1, 0.4, 0.3])
    assert numbers(figures.search([1, 2, 4], values, score="MAP")) == ["2", "4", "0.400", "0.300"]
    drawn_from = {"beta": [1e-5, 1e-2, 1e-1], "augment": ["a", "b", "a"], "train.views": [2, 4, 8]}
    title = drawn(figures.parameters(drawn_from, values, score="MAP"))
    assert all(f"{name} {value}" in title for name, value in (("beta", 0.01), ("augment", "b"), ("train.views", 4)))
    figure = figures.rank_correlations({"entropy": 0.5, "contrast": -1.0}, of="test MAP", trials=9)
    assert "entropy" in drawn(figure) and numbers(figure) == ["9", "0.50"]


def test_nothing_is_covered_and_ticks_are_whole(ranking):
    """Legends are outside of the axes; epochs and trials are whole; a single seed has no error bar."""
    values = np.array([[0.1, 0.2], [0.5, 0.3]])
    records = [{"epoch": epoch, "contrast": 4.0} for epoch in (1, 2)]
    made = [
        figures.precision_against_returned(ranking, 0.5),
        figures.precision_within_radius(ranking),
        figures.methods(["a", "b"], [16, 32], values, np.array([[0.1, 0], [0, 0]]), score="MAP"),
        figures.search([1, 2], values[0], score="MAP"),
        figures.parameters({"epochs": [1, 2], "objective": ["a_long_name", "another"]}, values[0], score="MAP"),
        figures.training(records),
    ]
    for figure in made:
        drawn(figure)
        for legend in figure.legends:
            assert legend.get_window_extent().y1 <= min(axis.get_tightbbox().y0 for axis in figure.axes)
    assert [len(figure.legends) for figure in made] == [1, 1, 1, 1, 0, 0]
    assert [container.has_xerr for container in made[2].axes[0].containers] == [True, False]
    for figure in made[3:]:
        assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_ticks_of_hyperparameters_do_not_collide():
    fields = {"learning_rate": [1e-4, 5e-4, 3e-3], "batch_size": [64, 128, 256], "temperature": [0.1, 0.3, 0.6]}
    figure = figures.parameters(fields | {"beta": [2.34e-5, 2.1e-4, 3.83e-3]}, np.array([0.1, 0.5, 0.3]), score="MAP")
    drawn(figure)
    for axis in figure.axes:
        low, high = axis.get_xlim()
        labels = zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
        seen = [label.get_window_extent() for tick, label in labels if low <= tick <= high]
        assert len(seen) > 2 and all(one.x1 < other.x0 for one, other in itertools.pairwise(seen))


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    figures.bit_balance([0.5])
    assert dict(matplotlib.rcParams) == before


def test_classes_differ_in_more_than_color():
    assert len(set(figures.MARKS)) == len(set(figures.COLORS)) == figures.CLASSES


def test_points_keep_clusters_together():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 15)
    packed = generator.integers(0, 256, (3, 8), np.uint8)[labels]
    packed ^= (1 << generator.integers(0, 8, (45, 8))).astype(np.uint8)
    packed[1] = packed[0]
    points = figures.points(packed, 0)
    np.testing.assert_array_equal(points, figures.points(packed, 0))
    assert 0 < np.linalg.norm(points[0] - points[1]) < 0.05 * np.ptp(points)  # equal codes are both seen
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(45)
    assert (labels[apart.argmin(axis=1)] == labels).mean() > 0.95
    assert figures.agreement(packed, labels) == 1.0


def test_codes_that_are_all_the_same_have_no_map():
    assert figures.points(np.zeros((100, 2), np.uint8), 0) is None
    assert figures.points(np.arange(3, dtype=np.uint8)[:, None], 0) is None


def test_the_ten_most_frequent_classes_are_shown():
    labels = np.repeat(np.arange(12), np.arange(12) + 1)
    shown = figures.classes(labels, [f"c{n}" for n in range(12)])
    assert shown.names == [f"c{n}" for n in range(2, 12)]
    assert (shown.labels == np.where(labels >= 2, labels - 2, -1)).all()
    hot = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0]])
    shown = figures.classes(hot, ["often", "seldom"])
    assert (shown.names, shown.labels.tolist()) == (["often", "seldom"], [0, 1, 1, -1])


def test_agreement_counts_any_shared_label():
    packed = np.array([[0], [1], [128], [192]], np.uint8)
    hot = np.array([[1, 0], [1, 1], [0, 1], [0, 1]], bool)
    # 0's nearest other is 1 (shares), 1's is 0 (shares), 2's is 0 (none), 3's is 2 (shares).
    assert figures.agreement(packed, hot) == 0.75

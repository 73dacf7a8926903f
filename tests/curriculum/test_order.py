import collections
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from effscale.curriculum.order import Clusters, GrowingOrder, fold_in, next_draws, permute


def keys(count, seed=0):
    return fold_in(np.full(count, seed, np.uint64), np.arange(count))


@hypothesis.given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    places = np.arange(size)
    got = permute(places, np.full(size, size), np.full(size, key, np.uint64))
    assert sorted(got.tolist()) == list(range(size))


def test_permute_is_a_permutation_of_every_small_size_all_at_once():
    """Elements of one call have sizes and keys of their own."""
    sizes = np.repeat(np.arange(1, 70), np.arange(1, 70))
    places = np.concatenate([np.arange(size) for size in range(1, 70)])
    got = permute(places, sizes, keys(70)[sizes])
    for size in range(1, 70):
        assert sorted(got[sizes == size].tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**31 - 1, 2**40 + 5, 10**15])
def test_permute_of_large_sizes_stays_in_range_and_distinct(size):
    places = np.concatenate([np.arange(2000), size - 1 - np.arange(2000)])
    got = permute(places, np.full(4000, size), np.full(4000, 3, np.uint64))
    assert len(np.unique(got)) == 4000
    assert got.min() >= 0
    assert got.max() < size
    assert abs(got.mean() / size - 0.5) < 0.02


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_permutations_are_equally_likely(size):
    """Chi-squared with a generous limit: the mean is the number of cells, the deviation the root of twice that."""
    count = 30_000
    columns = [permute(np.full(count, i), np.full(count, size), keys(count)) for i in range(size)]
    seen = collections.Counter(map(tuple, np.stack(columns, 1).tolist()))
    cells = math.factorial(size)
    expected = count / cells
    statistic = sum(
        (seen[cell] - expected) ** 2 / expected for cell in itertools.permutations(range(size))
    )
    assert statistic < cells + 5 * math.sqrt(2 * cells)


def test_places_and_neighbours_are_spread_evenly():
    size, rounds = 1000, 300
    got = np.stack(
        [permute(np.arange(size), np.full(size, size), np.full(size, k)) for k in keys(rounds)]
    )
    tenths = got * 10 // size
    where = np.stack([np.bincount(tenths[:, i::10].ravel(), minlength=10) for i in range(10)])
    pairs = np.bincount((tenths[:, :-1] * 10 + tenths[:, 1:]).ravel(), minlength=100)
    for table in (where.ravel(), pairs):
        expected = table.sum() / 100
        assert ((table - expected) ** 2 / expected).sum() < 99 + 5 * math.sqrt(2 * 99)


def test_values_are_fixed():
    """Another order would make old runs impossible to resume."""
    got = permute(np.arange(12), np.full(12, 12), np.full(12, 7, np.uint64))
    assert got.tolist() == [7, 4, 10, 2, 3, 8, 11, 0, 5, 1, 6, 9]
    order = GrowingOrder(Clusters(np.array([0, 1, 0, 2, 1, 0]), 3, 5), [0, 4, 8])
    assert walk(order, 20).tolist() == [5, 2, 0, 5, 0, 1, 2, 0, 4, 3, 4, 5, 2, 5, 1, 0, 1, 2, 3, 5]


def walk(order, stop, step=10**9):
    """The order from the start, in calls that do not cross the opening of a cluster."""
    starts = order._starts.tolist()
    cuts = sorted({*range(0, stop, step), *(start for start in starts if start < stop), stop})
    return np.concatenate([order(a, b - a) for a, b in itertools.pairwise(cuts)])


@st.composite
def growths(draw):
    """Sizes of clusters and how long each stage but the last is."""
    num = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 12), min_size=num, max_size=num))
    lengths = draw(st.lists(st.integers(1, 40), min_size=num - 1, max_size=num - 1))
    return sizes, np.cumsum([0, *lengths]).tolist(), draw(st.integers(0, 10))


def build(growth):
    sizes, starts, seed = growth
    rng = np.random.default_rng(seed)
    stage = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return GrowingOrder(Clusters(stage, len(sizes), seed), starts), stage, starts


def slowly(order, starts, stop):
    """One draw after another, always the one that is due first; in plain Python."""
    clusters = order.clusters
    sizes = clusters.sizes.tolist()
    opened, drawn, result = [], [], []
    for position in range(stop):
        if position in starts:
            k = len(opened)
            stretch = position - starts[k - 1] if k else 0
            opened.append(opened[-1] + stretch / sum(sizes[:k]) if k else 0.0)
            drawn.append(0)

        def due(c):
            args = np.array([c]), np.array([drawn[c]]), np.array([opened[c]])
            return clusters.due(*args).item()

        chosen = min(range(len(opened)), key=due)
        result.append(clusters.sample(np.array([chosen]), np.array([drawn[chosen]])).item())
        drawn[chosen] += 1
    return result


@hypothesis.given(growths())
def test_draws_come_in_the_order_in_which_they_are_due(growth):
    order, _, starts = build(growth)
    stop = starts[-1] + 30
    assert walk(order, stop, 7).tolist() == slowly(order, starts, stop)


@hypothesis.given(growths())
def test_random_access_equals_iteration(growth):
    order, _, starts = build(growth)
    stop = starts[-1] + 40
    whole = walk(order, stop)
    np.testing.assert_array_equal(walk(order, stop, 2), whole)
    np.testing.assert_array_equal(walk(order, stop, 5), whole)
    again, _, _ = build(growth)
    for position in reversed(range(0, stop, 9)):
        assert again(position, 1).item() == whole[position]


@hypothesis.given(growths())
def test_nothing_is_drawn_before_it_is_available(growth):
    order, stage, starts = build(growth)
    drawn = walk(order, starts[-1] + 30)
    assert (np.asarray(starts)[stage[drawn]] <= np.arange(len(drawn))).all()


@hypothesis.given(growths())
def test_no_sample_comes_again_before_all_of_its_cluster_have_come(growth):
    order, stage, starts = build(growth)
    drawn = walk(order, starts[-1] + 100)
    for cluster in range(len(starts)):
        stream, size = drawn[stage[drawn] == cluster].tolist(), int((stage == cluster).sum())
        for begin in range(0, len(stream), size):
            one_pass = stream[begin : begin + size]
            assert len(set(one_pass)) == len(one_pass)


@hypothesis.given(growths())
def test_visits_are_as_many_as_expected(growth):
    """Each sample's visits against the sum of its chances, at every position."""
    order, stage, starts = build(growth)
    drawn = walk(order, starts[-1] + 100)
    pools = np.cumsum(order.clusters.sizes)
    visits, expected, off = np.zeros(len(stage)), np.zeros(len(stage)), 0.0
    for position, sample in enumerate(drawn):
        k = np.searchsorted(starts, position, side="right") - 1
        visits[sample] += 1
        expected[stage <= k] += 1 / pools[k]
        off = max(off, np.abs(visits - expected).max())
    assert off < 2


def test_every_stretch_holds_the_clusters_in_proportion():
    sizes = np.array([500, 300, 150, 50])
    stage = np.repeat(np.arange(4), sizes)
    order = GrowingOrder(Clusters(stage, 4, 0), [0, 1000, 2000, 3000])
    drawn = stage[walk(order, 8000)][3000:]
    for length in (20, 200):
        stretches = drawn.reshape(-1, length)
        counts = np.stack([(stretches == c).sum(1) for c in range(4)], 1)
        assert np.abs(counts - length * sizes / 1000).max() < 4
        # Better than independent draws, whose variance this is.
        share = sizes / 1000
        assert (counts.var(0) < 0.8 * length * share * (1 - share)).all()


def test_a_single_cluster_is_shuffled_again_in_each_round():
    order = GrowingOrder(Clusters(np.zeros(50, np.int64), 1, 3), [0])
    rounds = walk(order, 500).reshape(10, 50)
    for one in rounds:
        assert sorted(one.tolist()) == list(range(50))
    assert len(set(map(tuple, rounds.tolist()))) == 10


@pytest.mark.parametrize("position", [10**6, 10**12, 10**15])
def test_far_positions_are_exact(position):
    """Rounds stay permutations where the numbers have become large."""
    stage = np.repeat(np.arange(3), [30, 20, 10])
    order = GrowingOrder(Clusters(stage, 3, 1), [0, 64, 128])
    drawn = np.concatenate([order(position + 6 * i, 6) for i in range(40)])
    np.testing.assert_array_equal(order(position, 240), drawn)
    for cluster in range(3):
        visits = np.bincount(drawn, minlength=60)[stage == cluster]
        assert visits.max() - visits.min() <= 2
        assert abs(visits.mean() - 4) < 0.3


def test_seeds_and_clusters_have_orders_of_their_own():
    stage = np.repeat(np.arange(2), 40)
    streams = [
        Clusters(stage, 2, seed).sample(np.full(40, cluster), np.arange(40)) - 40 * cluster
        for seed in (0, 1)
        for cluster in (0, 1)
    ]
    assert len({tuple(stream.tolist()) for stream in streams}) == 4


def test_samples_in_no_cluster_are_never_drawn():
    stage = np.array([0, 9, 1, 9, 0])
    order = GrowingOrder(Clusters(stage, 2, 0), [0, 6])
    assert set(walk(order, 60).tolist()) == {0, 2, 4}


def test_a_clusters_debt_is_kept():
    """A tiny cluster of which each stage wants less than a draw is drawn all the same."""
    num = 40
    sizes = [1, *([50] * (num - 1))]
    clusters = Clusters(np.repeat(np.arange(num), sizes), num, 0)
    starts = [0, *(10 + 20 * i for i in range(num - 1))]
    order = GrowingOrder(clusters, starts)
    drawn = walk(order, starts[-1])
    pools = np.cumsum(sizes)
    expected = sum(20 / pools[k] for k in range(1, num - 1)) + 10
    assert abs((drawn == 0).sum() - expected) < 2


def test_where_draws_are_looked_for_first_does_not_matter(monkeypatch):
    stage = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 9, 40))
    clusters = Clusters(stage, 40, 0)
    starts = [7 * i for i in range(40)]
    expected = walk(GrowingOrder(clusters, starts), 500)
    for margin in (1e-3, 0.3, 50.0):
        monkeypatch.setattr("effscale.curriculum.order._MARGIN", margin)
        np.testing.assert_array_equal(walk(GrowingOrder(clusters, starts), 500, 1), expected)


def test_next_draws_says_what_came_before():
    clusters = Clusters(np.repeat(np.arange(3), [5, 3, 2]), 3, 0)
    opened, drawn = np.zeros(3), np.array([2, 1, 1])
    cluster, draw, before = next_draws(clusters, opened, drawn, 0.4, 0, 30)
    assert before.tolist() == drawn.tolist()
    later, later_draw, before = next_draws(clusters, opened, drawn, 0.4, 13, 17)
    np.testing.assert_array_equal(later, cluster[13:])
    np.testing.assert_array_equal(later_draw, draw[13:])
    np.testing.assert_array_equal(before, drawn + np.bincount(cluster[:13], minlength=3))

"""The order in which samples are drawn from growing pools, and the permutation behind it."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64, Integer, UInt64

from effscale.curriculum.ranking import blocks
from effscale.curriculum.shared_table import SharedTable

# How far, in draws, around their average due time the wanted draws are searched first. It only decides how
# often a search succeeds at the first attempt.
_MARGIN = 2.0


class Clusters:
    """Samples in groups that become available one after another.

    Each cluster is an endless stream: all of its samples once in random order, then again in another order, and so on. Any
    position of a stream is computed directly from the seed. The ids of the samples are in a table that worker processes share.

    Attributes:
        sizes: The number of samples in each cluster.
        sizes: How many samples each cluster has.
    """

    def __init__(self, stage: Integer[np.ndarray, " n"], num_stages: int, seed: int):
        """Group samples.

        Args:
            stage: The cluster of each sample; ``num_stages`` or more means none.
            num_stages: The number of clusters.
            seed: The seed of the order in each cluster and between them.
        """
        self.sizes = count_stages(stage, num_stages)[:num_stages]
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._table = SharedTable(int(self.sizes.sum()), np.min_scalar_type(len(stage)))
        self._fill(stage)
        first, second = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        number = np.arange(num_stages)
        self._order_keys = fold_in(np.full(num_stages, first), number)
        self._time_keys = fold_in(np.full(num_stages, second), number)

    @property
    def samples(self) -> Integer[np.ndarray, " m"]:
        """The ids of all samples, cluster after cluster, in ascending order within each."""
        return self._table.values

    def _fill(self, stage: Integer[np.ndarray, " n"]) -> None:
        """Sort the samples stably by stage, block by block; each block continues where the previous one stopped."""
        ends = self._starts.copy()
        for block in blocks(len(stage)):
            # NumPy sorts 8 and 16-bit numbers in linear time.
            order = np.argsort(stage[block], kind="stable")
            counts = np.bincount(stage[block], minlength=len(ends))[: len(ends)]
            order = order[: counts.sum()]
            places = np.arange(len(order)) + np.repeat(ends - np.cumsum(counts) + counts, counts)
            self.samples[places] = order + block.start
            ends += counts

    def sample(
        self, cluster: Int64[np.ndarray, " m"], draw: Int64[np.ndarray, " m"]
    ) -> Int64[np.ndarray, " m"]:
        """Return the ids of the samples drawn from clusters; the draws of a cluster count from 0."""
        size = self.sizes[cluster]
        number, place = np.divmod(draw, size)
        place = permute(place, size, fold_in(self._order_keys[cluster], number))
        return self.samples[self._starts[cluster] + place].astype(np.int64)

    def due(
        self,
        cluster: Int64[np.ndarray, " m"],
        draw: Int64[np.ndarray, " m"],
        opened: Float64[np.ndarray, " m"],
    ) -> Float64[np.ndarray, " m"]:
        r"""When draws are due: at $\text{opened} + (\text{draw} + u) / \text{size}$, $u$ random in [0, 1).

        Time is in visits: one unit of it draws each available sample once.
        """
        bits = fold_in(self._time_keys[cluster], draw) >> np.uint64(11)
        return opened + (draw + bits * 2.0**-53) / self.sizes[cluster]


def count_stages(
    stage: Integer[np.ndarray, " n"], num_stages: int
) -> Int64[np.ndarray, " at_least_num_stages"]:
    """Count the samples of each stage; returns at least ``num_stages`` numbers, more if greater stages occur."""
    counts = np.zeros(num_stages, np.int64)
    for block in blocks(len(stage)):
        here = np.bincount(stage[block], minlength=len(counts))
        counts = np.pad(counts, (0, len(here) - len(counts))) + here
    return counts


def next_draws(
    clusters: Clusters,
    opened: Float64[np.ndarray, " open"],
    drawn: Int64[np.ndarray, " open"],
    now: float,
    skip: int,
    count: int,
) -> tuple[Int64[np.ndarray, " count"], Int64[np.ndarray, " count"], Int64[np.ndarray, " open"]]:
    """Draw from the open clusters, in the order in which they are due.

    The draws of a cluster are due at a rate proportional to its size. So every part of the result contains the clusters in
    proportion to their sizes, with the draws of each cluster in order. The work does not depend on ``skip``.

    Args:
        clusters: The clusters; the first ``len(opened)`` of them are open.
        opened: When each was opened.
        drawn: The number of draws from each until ``now``.
        now: The time.
        skip: The number of draws to skip first.
        count: The number of draws to return, at least 1.

    Returns:
        The clusters, the draws, and the number of draws from each cluster before the first of them.
    """
    sizes = clusters.sizes[: len(drawn)]
    total = int(sizes.sum())
    margin = _MARGIN * (1 + math.sqrt(len(drawn)))
    while True:
        low = now + (skip - margin) / total
        high = now + (skip + count + margin) / total
        # All draws before `begin` are due before `low`, and all from `end` on after `high`.
        begin = np.maximum(drawn, np.floor((low - opened) * sizes).astype(np.int64) - 1)
        end = np.maximum(begin, np.floor((high - opened) * sizes).astype(np.int64) + 2)
        lengths = end - begin
        cluster = np.repeat(np.arange(len(drawn)), lengths)
        draw = np.arange(len(cluster)) + np.repeat(begin - np.cumsum(lengths) + lengths, lengths)
        times = clusters.due(cluster, draw, opened[cluster])
        order = np.argsort(times, kind="stable")
        first = skip - int((begin - drawn).sum())
        if first >= 0 and first + count <= len(order):
            chosen = order[first : first + count]
            if times[chosen[0]] >= low and times[chosen[-1]] <= high:
                before = begin + np.bincount(cluster[order[:first]], minlength=len(drawn))
                return cluster[chosen], draw[chosen], before
        margin *= 2


class GrowingOrder:
    """The order of a curriculum with clusters that open at known positions.

    While ``P`` samples are available each is expected ``1 / P`` times at every position, so a sample that becomes available
    at position ``x`` is expected ``sum(1 / P(i) for i in range(x, y))`` times until ``y``; its actual visits
    are within 2 of that. Samples of one cluster never differ by more than 1.
    """

    def __init__(self, clusters: Clusters, starts: Sequence[int]):
        """Create the order.

        Args:
            clusters: The clusters, none of them empty.
            starts: The position at which each opens, increasing from 0.
        """
        self.clusters = clusters
        self._starts = np.asarray(starts, np.int64)
        pools = np.cumsum(clusters.sizes)
        self._opened = np.zeros(len(starts))
        self._drawn = [np.zeros(1, np.int64)]
        for k in range(len(starts) - 1):
            length = starts[k + 1] - starts[k]
            self._opened[k + 1] = self._opened[k] + length / pools[k]
            _, _, drawn = self._draws(k, length, 1)
            self._drawn.append(np.append(drawn, 0))

    def __call__(self, first: int, count: int) -> Int64[np.ndarray, " count"]:
        """Return the samples at positions ``first`` to ``first + count - 1``, between which no cluster may open."""
        k = int(np.searchsorted(self._starts, first, side="right")) - 1
        cluster, draw, _ = self._draws(k, first - int(self._starts[k]), count)
        return self.clusters.sample(cluster, draw)

    def _draws(self, k: int, skip: int, count: int):
        return next_draws(
            self.clusters, self._opened[: k + 1], self._drawn[k], self._opened[k], skip, count
        )


# With fewer rounds, permutations of five to seven elements are measurably uneven.
_ROUNDS = 8
_STEP = np.uint64(0x9E3779B97F4A7C15)


def scramble(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Apply a fixed permutation of the 64-bit numbers that decorrelates neighboring numbers.

    References:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014): the finalizer of SplitMix64.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold_in(
    key: UInt64[np.ndarray, "*shape"], number: Int64[np.ndarray, "*shape"]
) -> UInt64[np.ndarray, "*shape"]:
    """Return a new key for each number, like `jax.random.fold_in` but on the host and vectorized."""
    return scramble(key + _STEP * (number.astype(np.uint64) + np.uint64(1)))


def permute(
    place: Int64[np.ndarray, " n"], size: Int64[np.ndarray, " n"], key: UInt64[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """Return the element at a position of a random permutation of ``range(size)``, with a separate permutation per element.

    A Feistel network over a grid of about ``sqrt(size)`` rows and columns, with at least ``size`` cells: it rotates
    each row by an amount that depends on the column and each column by one that depends on the row, several times. If
    the result is outside the range it is applied again, which keeps it a permutation (cycle walking).

    Args:
        place: The position, from 0 to ``size - 1``.
        size: The size of the permutation, at least 1.
        key: Selects the permutation.

    References:
        Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002).

    >>> ten = np.arange(10)
    >>> sorted(permute(ten, np.full(10, 10), np.full(10, 7, np.uint64)).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    size = size.astype(np.uint64)
    # An even number of rows, as rotations of an odd number of cells generate only even permutations.
    num_rows = np.uint64(2) * np.ceil(np.sqrt(size) / 2).astype(np.uint64)
    num_columns = (size + num_rows - np.uint64(1)) // num_rows
    keys = [fold_in(key, np.full(key.shape, i)) for i in range(2 * _ROUNDS)]
    cell = place.astype(np.uint64)
    walking = np.arange(len(cell))
    while len(walking):
        rows, columns = num_rows[walking], num_columns[walking]
        row, column = np.divmod(cell[walking], columns)
        for i in range(0, 2 * _ROUNDS, 2):
            row = (row + scramble(keys[i][walking] + column) % rows) % rows
            column = (column + scramble(keys[i + 1][walking] + row) % columns) % columns
        cell[walking] = row * columns + column
        walking = walking[cell[walking] >= size[walking]]
    return cell.astype(np.int64)

"""Random permutations of any size, computed element by element without a table."""

import numpy as np
from jaxtyping import Int64, UInt64

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

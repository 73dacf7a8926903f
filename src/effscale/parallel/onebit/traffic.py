"""Formulas for the bytes that a mean over workers sends, compressed or not."""

from typing import Any

import jax
import jax.numpy as jnp

from effscale.parallel.onebit.exchange import Scales
from effscale.parallel.onebit.layout import tensor_layouts


def mean_bytes(tree: Any, num_workers: int, *, specs: Any = None) -> float:
    """Return the bytes that a device sends for the uncompressed mean of a tree over workers, around a ring.

    Args:
        tree: Arrays, or objects with a shape and a dtype.
        num_workers: Number of workers; a single worker sends nothing.
        specs: As in ``effscale.parallel.compressed_mean``.

    >>> mean_bytes(jnp.zeros(1000), 4)
    6000.0
    """
    layouts = tensor_layouts(tree, num_workers, specs)
    sizes = [
        layout.size * jnp.dtype(x.dtype).itemsize
        for layout, x in zip(layouts, jax.tree.leaves(tree), strict=True)
    ]
    return 2 * (num_workers - 1) / num_workers * sum(sizes)


def compressed_mean_bytes(
    tree: Any, num_workers: int, *, scales: Scales = "tensor", specs: Any = None
) -> float:
    r"""Return the bytes that a device sends in one ``compressed_mean``.

    With $B$ bytes of a server's part of all tensors and S scales of four bytes, $2 (W - 1) (B + 4 S)$: about
    1/32 of what float32 takes.

    Args:
        tree: Arrays, or objects with a shape and a dtype.
        num_workers: Number of workers; a single worker sends nothing.
        scales: As in ``effscale.parallel.compressed_mean``.
        specs: As in ``effscale.parallel.compressed_mean``.

    >>> compressed_mean_bytes(jnp.zeros(1000), 4)  # 32 bytes of signs for each server, and a scale
    216.0
    """
    layouts = tensor_layouts(tree, num_workers, specs)
    groups: dict[frozenset[str], int] = {}
    for layout in layouts:
        groups[frozenset(layout.axes)] = groups.get(frozenset(layout.axes), 0) + 1
    numbers = len(groups) if scales == "tree" else len(layouts)
    return 2.0 * (num_workers - 1) * (sum(layout.bytes for layout in layouts) + 4 * numbers)

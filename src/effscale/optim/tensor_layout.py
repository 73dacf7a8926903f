"""How the 1-bit mean divides a tensor, into shards over mesh axes and each shard into one part per server, and the bytes it sends."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from effscale.parallel.placement import shardings

Scales = Literal["tensor", "tree"]
"""``tensor``: one scale per tensor. ``tree``: one scale for the whole tree, as in 1-bit LAMB."""


class TensorLayout(NamedTuple):
    """How one tensor is divided: into shards over other mesh axes, and each shard into one part per server."""

    shape: tuple[int, ...]
    spec: P
    axes: tuple[str, ...]
    shards: int
    servers: int

    @property
    def size(self) -> int:
        """The number of elements of a shard."""
        return math.prod(self.shape) // self.shards

    @property
    def bytes(self) -> int:
        """Bytes of a server's part of a shard."""
        return -(-self.size // (8 * self.servers))

    @property
    def shard_spec(self) -> P:
        """How [shards, ...] is sharded."""
        return P(self.axes) if self.axes else P()

    @property
    def group(self) -> frozenset[str]:
        """The axes it is divided over: tensors with the same ones are sent together."""
        return frozenset(self.axes)


def tensor_layouts(tree: Any, num_workers: int, specs: Any = None) -> list[TensorLayout]:
    """Return the layout of each tensor on the current mesh."""
    leaves, mesh = jax.tree.leaves(tree), jax.sharding.get_abstract_mesh()
    if mesh.empty:
        flat = [P()] * len(leaves)
    elif specs is None:
        flat = [sharding.spec for sharding in jax.tree.leaves(shardings(tree, mesh))]
    else:
        flat = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P))
        if len(flat) != len(leaves):
            raise ValueError(
                f"specs must have one entry for each of {len(leaves)} arrays, got {len(flat)}"
            )
    return [
        _layout(jnp.shape(x), spec, mesh, num_workers) for x, spec in zip(leaves, flat, strict=True)
    ]


def _layout(shape: tuple[int, ...], spec: P, mesh: Any, num_workers: int) -> TensorLayout:
    shards, axes = 1, []
    for size, entry in zip(shape, spec, strict=False):
        names = axis_names(entry)
        if unknown := [name for name in names if name not in mesh.shape]:
            raise ValueError(
                f"specs: {spec} for an array of shape {shape} names {unknown[0]!r}, which is not an axis of the current mesh: "
                f"{', '.join(mesh.shape)}"
            )
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise ValueError(f"specs: an array of shape {shape} cannot be divided as {spec}")
        axes.extend(names)
        shards *= parts
    entries = tuple(spec)
    while entries and entries[-1] is None:  # specs with the same meaning compare unequal otherwise
        entries = entries[:-1]
    return TensorLayout(tuple(shape), P(*entries), tuple(axes), shards, num_workers)


def axis_names(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes that an entry of a ``jax.P`` names."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def check_real(tree: Any) -> None:
    """Raise a ``ValueError`` for arrays of a dtype that one bit per number and one scale cannot represent."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            advice = (
                "train its real and imaginary part as two arrays, as optax.contrib.split_real_and_imaginary(optimizer) does"
                if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)
                else "exclude it from training (optax.partition, or make_train_step(trainable=))"
            )
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"the array{f' {name!r}' if name else ''} has the dtype {jnp.result_type(x)}, but only real floating-point numbers "
                f"can be trained or sent in one bit each: {advice}"
            )


def mean_bytes(tree: Any, num_workers: int, *, specs: Any = None) -> float:
    """Return the bytes that a device sends for the uncompressed mean of a tree over workers, around a ring.

    Args:
        tree: Arrays, or objects with a shape and a dtype.
        num_workers: Number of workers; a single worker sends nothing.
        specs: As in ``effscale.optim.compressed_mean``.

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
        scales: As in ``effscale.optim.compressed_mean``.
        specs: As in ``effscale.optim.compressed_mean``.

    >>> compressed_mean_bytes(jnp.zeros(1000), 4)  # 32 bytes of signs for each server, and a scale
    216.0
    """
    layouts = tensor_layouts(tree, num_workers, specs)
    groups = {layout.group for layout in layouts}
    numbers = len(groups) if scales == "tree" else len(layouts)
    return 2.0 * (num_workers - 1) * (sum(layout.bytes for layout in layouts) + 4 * numbers)

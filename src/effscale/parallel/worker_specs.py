"""Helpers for a custom ``jax.shard_map`` in place of ``per_worker``: specs and conversion of a state with ``PerWorker``."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from effscale.parallel.workers import PerWorker, as_local, is_per_worker


def worker_specs(tree: Any) -> Any:
    """Return the ``in_specs`` and ``out_specs`` of a state: the workers' axis for arrays in a ``PerWorker``, ``P()`` for all others.

    They name only the workers' axis, for a ``jax.shard_map`` that is manual over it (``axis_names={axis_name}``). For the
    placement on all axes of a mesh, for ``jax.device_put`` and ``jax.jit``, use ``effscale.parallel.shardings``.

    Args:
        tree: A state between steps, or its shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> specs = worker_specs({"mu": jnp.ones(3), "error": PerWorker(jnp.ones((2, 3)), "data")})
        >>> specs["mu"] == P(), specs["error"].value == P("data")
        (True, True)
    """

    def visit(node: Any) -> Any:
        spec = P(node.axis_name) if is_per_worker(node) else P()
        return jax.tree.map(lambda _: spec, node)

    return jax.tree.map(visit, tree, is_leaf=is_per_worker)


def unstack_workers(tree: Any) -> Any:
    """Return a state as a worker sees it: each ``PerWorker`` without its leading dimension. Call it first in a ``jax.shard_map``.

    Args:
        tree: The state as ``worker_specs`` passes it in: the leading dimension of a ``PerWorker`` has size 1.

    Example:
        >>> import jax.numpy as jnp
        >>> unstack_workers(PerWorker(jnp.ones((1, 3)), "data")).value.shape
        (3,)
    """
    return _map_per_worker(lambda x, axis_name: x[0], tree)


def stack_workers(tree: Any) -> Any:
    """Invert ``unstack_workers``. Call it last in the body of a ``jax.shard_map``.

    Example:
        >>> import jax.numpy as jnp
        >>> stack_workers(PerWorker(jnp.ones(3), "data")).value.shape
        (1, 3)
    """
    return _map_per_worker(lambda x, axis_name: as_local(x, axis_name)[None], tree)


def _map_per_worker(function: Callable[[Any, str], Any], tree: Any) -> Any:
    def visit(node: Any) -> Any:
        if not is_per_worker(node):
            return node
        value = jax.tree.map(lambda x: function(x, node.axis_name), node.value)
        return PerWorker(value, node.axis_name)

    return jax.tree.map(visit, tree, is_leaf=is_per_worker)

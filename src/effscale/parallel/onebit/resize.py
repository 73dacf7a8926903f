"""Change the number of workers: the state that each worker kept is redistributed so that nothing is lost."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from effscale.parallel.onebit.error_feedback import ErrorFeedback, Residual
from effscale.parallel.workers import PerWorker, is_per_worker


def resize_workers(tree: Any, num_workers: int) -> Any:
    """Return the tree with the contents of each ``PerWorker`` converted to another number of workers.

    The mean over workers is preserved: each new worker gets the mean of the old workers' arrays and errors. The servers'
    errors are errors of the mean, in parts, and are divided again. So the pending error of the exchange, the mean error of
    the workers plus the servers' errors, carries over to the new workers. With the same number of workers, the tree is
    returned unchanged.

    Args:
        tree: A state between steps: the arrays of a ``PerWorker`` have the workers as their first dimension.
        num_workers: The new number of workers. A single worker sends nothing, so it never uses the pending error.

    Raises:
        ValueError: ``num_workers`` is less than 1.

    Example:
        >>> resize_workers(PerWorker(jnp.array([[1.0], [3.0]]), "data"), 3).value.tolist()
        [[2.0], [2.0], [2.0]]
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")

    def share(x: Any) -> Any:
        mean = jnp.mean(x, axis=0, keepdims=True)
        return jnp.broadcast_to(mean, (num_workers, *x.shape[1:]))

    def feedback(errors: ErrorFeedback) -> ErrorFeedback:
        is_residual = lambda node: isinstance(node, Residual)
        worker = jax.tree.map(
            lambda r: _start(share(r.error), r, num_workers), errors.worker, is_leaf=is_residual
        )
        server = jax.tree.map(
            lambda w, s: _start(_cut(w, s, num_workers), s, num_workers),
            errors.worker,
            errors.server,
            is_leaf=is_residual,
        )
        return ErrorFeedback(worker, server)

    def visit(node: Any) -> Any:
        if not is_per_worker(node) or _workers(node) == num_workers:
            return node
        is_feedback = lambda inner: isinstance(inner, ErrorFeedback)
        value = jax.tree.map(
            lambda inner: feedback(inner) if is_feedback(inner) else share(inner),
            node.value,
            is_leaf=is_feedback,
        )
        return PerWorker(value, node.axis_name)

    return jax.tree.map(visit, tree, is_leaf=is_per_worker)


def _workers(node: PerWorker) -> int | None:
    leaves = jax.tree.leaves(node)
    return leaves[0].shape[0] if leaves else None


def _start(error: jax.Array, like: Residual, num_workers: int) -> Residual:
    """Return a residual with the given error."""
    return Residual(error, jnp.zeros((num_workers,), jnp.float32), like.spec)


def _cut(worker: Residual, server: Residual, num_workers: int) -> jax.Array:
    """Divide the servers' errors of each shard, without padding, into parts for the new servers."""
    size = worker.corrected[0].size // server.corrected.shape[1]
    shards = jnp.moveaxis(server.error, 1, 0)
    number = shards.shape[0]
    flat = shards.reshape(number, math.prod(shards.shape[1:]))[:, :size]
    width = -(-size // (8 * num_workers))
    padded = jnp.pad(flat, ((0, 0), (0, 8 * width * num_workers - size)))
    return jnp.moveaxis(padded.reshape(number, num_workers, 8, width), 0, 1)

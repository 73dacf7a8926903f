"""Keep weights in host memory until they are needed."""

from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")
HOST = "pinned_host"


def to_host_memory(tree: Tree) -> Tree:
    """Move the arrays of a tree to the memory of their devices' hosts, with the same sharding.

    Use it for models that are needed only now and then, such as the reference and the reward model of reinforcement
    learning. On a CPU, where both memories are the same, it works but saves nothing.

    Args:
        tree: Any pytree; NumPy arrays are moved to the host of the default device.

    Example:
        >>> import jax.numpy as jnp
        >>> to_host_memory(jnp.ones(2)).sharding.memory_kind
        'pinned_host'
    """
    return jax.tree.map(lambda x: _move(x, HOST), tree)


def on_devices(tree: Tree) -> Tree:
    """Copy the arrays of a tree that are in host memory to the devices; the others are returned unchanged.

    Example:
        >>> import jax.numpy as jnp
        >>> waiting = to_host_memory(jnp.ones(2))
        >>> on_devices(waiting).sharding.memory_kind != 'pinned_host'
        True
    """
    waits = lambda x: isinstance(x, jax.Array) and x.sharding.memory_kind == HOST
    default = lambda x: next(iter(x.sharding.device_set)).default_memory().kind
    return jax.tree.map(lambda x: _move(x, default(x)) if waits(x) else x, tree)


def _move(x: Any, kind: str) -> Any:
    array = jax.numpy.asarray(x)
    return jax.device_put(array, array.sharding.with_memory_kind(kind))

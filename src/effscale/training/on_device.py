"""Check that the inputs a step reads at every call are on its devices."""

from typing import Any, TypeVar

import jax
import numpy as np

from effscale.training.partition import named_leaves

Tree = TypeVar("Tree")


def check_on_device(frozen: Tree, state: Any) -> Tree:
    """Return ``frozen`` unchanged, after checking that its arrays need no transfer to the devices of the state at every step.

    Raises:
        ValueError: An array is on the host, or on fewer devices than the state.
    """
    wanted = max((_num_devices(x) for x in jax.tree.leaves(state)), default=1)
    for name, x, *_ in named_leaves(frozen):
        found = _num_devices(x)
        if np.ndim(x) == 0 or found >= wanted:
            continue
        where = f"on {found} of the state's {wanted} devices" if found else "on the host"
        place = "jax.device_put(frozen)" if wanted == 1 else "effscale.parallel.shard(frozen, mesh)"
        raise ValueError(
            f"{name} of frozen is {where}, so it would be copied at every step. Place it once with {place}."
        )
    return frozen


def _num_devices(x: Any) -> int:
    return len(x.sharding.device_set) if isinstance(x, jax.Array) else 0

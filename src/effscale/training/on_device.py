"""What a step reads at every call must lie where the step runs."""

from typing import Any, TypeVar

import jax
import numpy as np

from effscale.training.partition import named_leaves

Tree = TypeVar("Tree")


def check_on_device(frozen: Tree, state: Any) -> Tree:
    """``frozen`` as it is, if none of its arrays would have to travel to the devices of the state at every step.

    Raises:
        ValueError: An array lies on the host, or on fewer devices than the state.
    """
    wanted = max((_num_devices(x) for x in jax.tree.leaves(state)), default=1)
    for name, x, *_ in named_leaves(frozen):
        found = _num_devices(x)
        if np.ndim(x) == 0 or found >= wanted:
            continue
        where = f"on {found} of the state's {wanted} devices" if found else "on the host"
        place = "jax.device_put(frozen)" if wanted == 1 else "effscale.parallel.shard(frozen, mesh)"
        raise ValueError(
            f"{name} of frozen lies {where}, so it would be copied at every step; place it once: {place}"
        )
    return frozen


def _num_devices(x: Any) -> int:
    return len(x.sharding.device_set) if isinstance(x, jax.Array) else 0

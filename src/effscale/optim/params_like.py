"""Control which parts of an optimizer's state `optax.tree.map_params` treats as copies of the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def unlike_params(params: Any, make: Callable[[], Any]) -> Any:
    """Create a part of a state that is a tree like the parameters, but with arrays of other shapes.

    `optax.tree.map_params` initializes the state again with a placeholder that contains no arrays. Where the placeholder
    is returned, it maps over a copy of the parameters; where a single array is returned, the whole part is passed to
    ``transform_non_params``. So without parameters this part is an empty array.

    Args:
        params: The parameters.
        make: Creates the part.

    Example:
        >>> unlike_params({"w": jnp.ones(3)}, lambda: {"w": jnp.zeros(1)})["w"].shape, unlike_params((), tuple).shape
        ((1,), (0,))
    """
    return make() if jax.tree.leaves(params) else jnp.zeros((0,), jnp.float32)

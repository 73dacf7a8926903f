"""Balance without a loss: a bias of the choice alone, which moves towards an even load after each step."""

from typing import Any

import jax
import optax
from jaxtyping import Array, Float

from effscale.training.partition import map_named

NAME = "balance_bias"

# The gradient is only asked for its sign. It is so small that it weighs nothing in the norm by which all gradients are clipped.
SCALE = 1e-6


def nudge(bias: Float[Array, "experts"], load: Float[Array, "experts"]) -> Float[Array, ""]:
    """Zero, with a gradient that says by its sign which experts have more than their share.

    Added to the auxiliary loss, it makes the load known to the optimizer: over micro-batches and devices signs are those of the whole
    batch, as gradients are summed.
    """
    excess = jax.lax.stop_gradient(load - 1 / load.shape[0])
    value = SCALE * (bias * excess).sum()
    return value - jax.lax.stop_gradient(value)


def with_balance_bias(
    optimizer: optax.GradientTransformation, rate: float = 1e-3
) -> optax.GradientTransformation:
    r"""An optimizer that moves the routers' balance biases by a fixed step, and leaves all else to another optimizer.

    $$b_e \leftarrow b_e - \gamma\, \mathrm{sign}(f_e - 1/E)$$

    with the load $f$ of the step. It needs routers with ``RouterConfig(balance_by_bias=True)``.

    Args:
        optimizer: For all other parameters.
        rate: The step, $\gamma$; DeepSeek-V3 takes 0.001, and 0 at the end of the training.

    References:
        Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = with_balance_bias(optax.sgd(0.1))
        >>> params = {"router": {"balance_bias": jnp.zeros(2)}, "kernel": jnp.ones(3)}
        >>> gradients = {"router": {"balance_bias": jnp.array([3e-7, -1e-7])}, "kernel": jnp.ones(3)}
        >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        >>> print(updates["router"]["balance_bias"])
        [-0.001  0.001]
    """

    def labels(params: Any) -> Any:
        return map_named(lambda leaf: NAME if leaf.name.endswith(NAME) else "rest", params)

    return optax.multi_transform({NAME: optax.sign_sgd(rate), "rest": optimizer}, labels)

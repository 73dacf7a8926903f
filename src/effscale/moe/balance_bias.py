"""Load balancing without a loss: a bias used only for the choice, which moves towards an even load after each step."""

from typing import Any

import jax
import optax
from jaxtyping import Array, Float

from effscale.training.partition import map_named

NAME = "balance_bias"

# Only the sign of the gradient is used. It is so small that it does not matter in the norm for gradient clipping.
SCALE = 1e-6


def nudge(bias: Float[Array, "experts"], load: Float[Array, "experts"]) -> Float[Array, ""]:
    """Return zero, with a gradient whose signs indicate which experts have more than their share.

    Added to the auxiliary loss, it passes the load to the optimizer. As gradients are summed over micro-batches and devices, the
    signs are those of the whole batch.
    """
    excess = jax.lax.stop_gradient(load - 1 / load.shape[0])
    value = SCALE * (bias * excess).sum()
    return value - jax.lax.stop_gradient(value)


def with_balance_bias(
    optimizer: optax.GradientTransformation, rate: float = 1e-3
) -> optax.GradientTransformation:
    r"""Return an optimizer that moves the routers' balance biases by a fixed step, and passes the rest to another optimizer.

    $$b_e \leftarrow b_e - \gamma\, \mathrm{sign}(f_e - 1/E)$$

    with the load $f$ of the step. It needs routers with ``RouterConfig(balance_by_bias=True)``.

    Args:
        optimizer: The optimizer of all other parameters.
        rate: The step, $\gamma$; DeepSeek-V3 takes 0.001, and 0 at the end of the training.

    References:
        Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (2024). https://arxiv.org/abs/2408.15664

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

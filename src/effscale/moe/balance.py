"""Balance the load of a router: losses, a bias that needs no loss, and statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from effscale.moe.routing import ExpertChoice, Routing
from effscale.training.partition import map_named


def load_balance(
    probs: Float[Array, "tokens experts"],
    experts: Int[Array, "tokens choices"],
    used: Bool[Array, "tokens"] | None = None,
) -> Float[Array, ""]:
    r"""Return the load-balancing loss: 1 if the load is even, up to E if one expert gets everything.

    $$L = E \sum_e f_e P_e$$

    with $f_e$ the share of all choices that fell on expert e and $P_e$ its mean probability. Choices count before any is
    dropped; gradients flow only through $P$.

    transformers instead sums $f$ over the k choices, which makes the loss k times as large, and counts the tokens of all layers
    together.

    Args:
        probs: The probabilities of the experts, float32.
        experts: The choices that count. DeepSpeed and GShard count first choices for k = 2, and all choices for more.
        used: False at padding, which does not count.

    References:
        Fedus et al., "Switch Transformers" (2021), equation 4. https://arxiv.org/abs/2101.03961

    Example:
        >>> import jax.numpy as jnp
        >>> print(load_balance(jnp.full((4, 2), 0.5), jnp.array([[0], [1], [0], [1]])))
        1.0
    """
    num_experts = probs.shape[1]
    chosen = jax.nn.one_hot(experts, num_experts).mean(1)
    return num_experts * (_mean(chosen, used) * _mean(probs, used)).sum()


def z_loss(
    logits: Float[Array, "tokens experts"], used: Bool[Array, "tokens"] | None = None
) -> Float[Array, ""]:
    r"""Return the router's z-loss, the mean of $(\log \sum_e e^{l_e})^2$, which keeps its logits small.

    References:
        Zoph et al., "ST-MoE" (2022), equation 5; its coefficient is 0.001. https://arxiv.org/abs/2202.08906

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{z_loss(jnp.zeros((3, 8))):.4f}")  # (ln 8)^2
        4.3241
    """
    return _mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))[:, None], used)[0]


def router_statistics(
    probs: Float[Array, "tokens experts"],
    routing: Routing,
    used: Bool[Array, "tokens"] | None = None,
) -> dict[str, Any]:
    """Return statistics of a router to monitor.

    Returns:
        ``load``: the share of all choices that fell on each expert, 1 / E each if it is even; ``dropped``: the share of choices
        without a place; ``router_entropy``: the mean entropy of the probabilities in nats, ln E if the router has no preference.
    """
    choices = routing.sizes.sum()
    dropped = (choices - routing.kept.sum()) / jnp.maximum(choices, 1)
    return _statistics(probs, routing.sizes, dropped, used)


def expert_choice_statistics(
    probs: Float[Array, "tokens experts"],
    choice: ExpertChoice,
    used: Bool[Array, "tokens"] | None = None,
) -> dict[str, Any]:
    """Return the same statistics if experts choose; ``dropped`` is the share of tokens that no expert chose."""
    left = (choice.counts() == 0).astype(jnp.float32)
    return _statistics(probs, choice.sizes, _mean(left[:, None], used)[0], used)


def _statistics(probs: Array, sizes: Array, dropped: Array, used: Array | None) -> dict[str, Any]:
    surprise = -jnp.where(probs > 0, probs * jnp.log(jnp.where(probs > 0, probs, 1.0)), 0.0)
    found = {
        "load": sizes / jnp.maximum(sizes.sum(), 1),
        "dropped": dropped,
        "router_entropy": _mean(surprise.sum(-1, keepdims=True), used)[0],
    }
    return jax.tree.map(lambda a: jax.lax.stop_gradient(a.astype(jnp.float32)), found)


def _mean(values: Float[Array, "tokens n"], used: Array | None) -> Float[Array, "n"]:
    if used is None:
        return values.mean(0)
    return jnp.where(used[:, None], values, 0.0).sum(0) / jnp.maximum(
        used.astype(jnp.float32).sum(), 1
    )


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

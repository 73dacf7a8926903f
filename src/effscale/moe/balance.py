"""Losses that balance the load of a router, and statistics of the load."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effscale.moe.expert_choice import ExpertChoice
from effscale.moe.routing import Routing


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

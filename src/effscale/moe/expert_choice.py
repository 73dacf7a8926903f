"""Routing the other way round: experts choose their tokens, so that the load is even without a loss, and nothing else is dropped.

A token may be chosen by several experts or by none. Whether it is depends on all tokens of its group, later ones too, so this is for
encoders and for models that read whole inputs; a causal model that is trained so cannot be decoded.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@typing.no_type_check  # JAX makes it of shapes and placeholders, too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """An assignment of tokens to experts, told by expert.

    Attributes:
        tokens: The tokens that each expert chose, the most probable first; ``num_tokens`` in rows that padding would have filled.
        weights: What the expert's output for each is weighted by, float32; 0 in such rows.
        sizes: How many tokens each expert has.
        num_tokens: Tokens that there are.
    """

    tokens: Int[Array, "experts capacity"]
    weights: Float[Array, "experts capacity"]
    sizes: Int[Array, "experts"]
    num_tokens: int = dataclasses.field(metadata={"static": True})

    def counts(self) -> Int[Array, "tokens"]:
        """How many experts chose each token."""
        zeros = jnp.zeros(self.num_tokens, jnp.int32)
        return zeros.at[self.tokens.reshape(-1)].add(1, mode="drop")


def expert_choice(
    probs: Float[Array, "tokens experts"],
    capacity: int,
    *,
    used: Bool[Array, "tokens"] | None = None,
) -> ExpertChoice:
    r"""Each expert takes the tokens with the highest probability of it.

    $$y_t = \sum_{e:\, t \in \mathrm{TopK}(S^\top_e, C)} S_{t e}\, E_e(x_t)$$

    Args:
        probs: The probability of each expert for each token, S, float32. Gradients flow through the weights.
        capacity: Tokens that an expert takes, C; :func:`effscale.moe.expert_capacity` makes it of the mean number of experts of a token.
        used: False at padding, which no expert takes.

    Returns:
        The assignment.

    Raises:
        ValueError: The capacity is above the number of tokens.

    References:
        Zhou et al., "Mixture-of-Experts with Expert Choice Routing", 2022, section 3.2.

    Example:
        >>> import jax.numpy as jnp
        >>> choice = expert_choice(jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]), capacity=2)
        >>> choice.tokens.tolist(), choice.counts().tolist()
        ([[0, 1], [2, 1]], [1, 2, 1])
    """
    num_tokens, _ = probs.shape
    if not 1 <= capacity <= num_tokens:
        raise ValueError(
            f"capacity={capacity}: must be from 1 to the number of tokens, {num_tokens}"
        )
    by = jax.lax.stop_gradient(probs)
    if used is not None:
        by = jnp.where(used[:, None], by, -jnp.inf)
    scores, tokens = jax.lax.top_k(by.T, capacity)
    taken = scores > -jnp.inf
    weights = jnp.where(taken, jnp.take_along_axis(probs.T, tokens, axis=1), 0.0)
    tokens = jnp.where(taken, tokens, num_tokens).astype(jnp.int32)
    return ExpertChoice(tokens, weights, taken.sum(1, dtype=jnp.int32), num_tokens)

"""Expert-choice routing: experts choose their tokens, so that the load is even without a loss.

A token can be chosen by several experts or by none. This depends on all tokens of its group, including later ones. So use
it only for encoders and for models that read whole inputs; a causal model trained with it cannot be decoded.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@typing.no_type_check  # JAX also creates it from shapes and placeholders
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """An assignment of tokens to experts, by expert.

    Attributes:
        tokens: The tokens that each expert chose, the most probable first; ``num_tokens`` in rows that would contain padding.
        weights: The weight of the expert's output for each, float32; 0 in such rows.
        sizes: The number of tokens of each expert.
        num_tokens: The total number of tokens.
    """

    tokens: Int[Array, "experts capacity"]
    weights: Float[Array, "experts capacity"]
    sizes: Int[Array, "experts"]
    num_tokens: int = dataclasses.field(metadata={"static": True})

    def counts(self) -> Int[Array, "tokens"]:
        """Count the experts that chose each token."""
        zeros = jnp.zeros(self.num_tokens, jnp.int32)
        return zeros.at[self.tokens.reshape(-1)].add(1, mode="drop")


def expert_choice(
    probs: Float[Array, "tokens experts"],
    capacity: int,
    *,
    used: Bool[Array, "tokens"] | None = None,
) -> ExpertChoice:
    r"""Assign to each expert the tokens with the highest probability for it.

    $$y_t = \sum_{e:\, t \in \mathrm{TopK}(S^\top_e, C)} S_{t e}\, E_e(x_t)$$

    Args:
        probs: The probability of each expert for each token, S, float32. Gradients flow through the weights.
        capacity: The number of tokens per expert, C; ``effscale.moe.expert_capacity`` computes it from the mean number of
            experts per token.
        used: False at padding, which no expert chooses.

    Returns:
        The assignment.

    Raises:
        ValueError: The capacity is above the number of tokens.

    References:
        Zhou et al., "Mixture-of-Experts with Expert Choice Routing" (2022), section 3.2. https://arxiv.org/abs/2202.09368

    Example:
        >>> import jax.numpy as jnp
        >>> choice = expert_choice(jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]), capacity=2)
        >>> choice.tokens.tolist(), choice.counts().tolist()
        ([[0, 1], [2, 1]], [1, 2, 1])
    """
    num_tokens, _ = probs.shape
    if not 1 <= capacity <= num_tokens:
        raise ValueError(
            f"capacity must be from 1 to the number of tokens, {num_tokens}, got {capacity}"
        )
    by = jax.lax.stop_gradient(probs)
    if used is not None:
        by = jnp.where(used[:, None], by, -jnp.inf)
    scores, tokens = jax.lax.top_k(by.T, capacity)
    taken = scores > -jnp.inf
    weights = jnp.where(taken, jnp.take_along_axis(probs.T, tokens, axis=1), 0.0)
    tokens = jnp.where(taken, tokens, num_tokens).astype(jnp.int32)
    return ExpertChoice(tokens, weights, taken.sum(1, dtype=jnp.int32), num_tokens)

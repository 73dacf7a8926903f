"""Move tokens to experts and back if experts chose them: gather, then add up."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from effscale.moe.expert_choice import ExpertChoice


def dispatch(
    x: Float[Array, "tokens d_model"], choice: ExpertChoice
) -> Float[Array, "experts capacity d_model"]:
    """Return the tokens in the buffers of their experts; empty rows are zero."""
    return x.at[choice.tokens].get(mode="fill", fill_value=0)


def combine(
    y: Float[Array, "experts capacity d_model"], choice: ExpertChoice
) -> Float[Array, "tokens d_model"]:
    """Return the weighted sum of the experts' outputs for each token."""
    weighted = y * choice.weights[..., None].astype(y.dtype)
    zeros = jnp.zeros((choice.num_tokens, y.shape[-1]), y.dtype)
    return zeros.at[choice.tokens].add(weighted, mode="drop")

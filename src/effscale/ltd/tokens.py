"""Take kept tokens out of the residual stream and put them back."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int, Shaped

from effscale.models import Context

PROMISES: dict[str, Any] = {
    "mode": "promise_in_bounds",
    "indices_are_sorted": True,
    "unique_indices": True,
}


def take_tokens(
    x: Shaped[Array, "rows seq *features"], kept: Int[Array, "batch kept"]
) -> Shaped[Array, "batch kept *features"]:
    """Return ``x[row, kept[row]]`` for each row.

    Args:
        x: Rows of tokens; a single row is used for all.
        kept: Positions, in increasing order in each row. They are not checked to be within the sequence.

    Example:
        >>> import jax.numpy as jnp
        >>> take_tokens(jnp.array([[10, 11, 12]]), jnp.array([[0, 2], [1, 2]])).tolist()
        [[10, 12], [11, 12]]
    """
    # Mapped over rows, so that the compiler knows the batch dimension and moves no row between devices.
    take = lambda row, kept: row.at[kept].get(**PROMISES)
    if x.shape[0] == 1:
        return jax.vmap(take, (None, 0))(x[0], kept)
    return jax.vmap(take)(x, kept)


def put_tokens(
    x: Shaped[Array, "batch seq *features"],
    kept: Int[Array, "batch kept"],
    y: Shaped[Array, "batch kept *features"],
) -> Shaped[Array, "batch seq *features"]:
    """Return ``x`` with ``y`` at the kept tokens; the other tokens are unchanged.

    Example:
        >>> import jax.numpy as jnp
        >>> put_tokens(jnp.array([[10, 11, 12]]), jnp.array([[0, 2]]), jnp.array([[7, 8]])).tolist()
        [[7, 11, 8]]
    """
    put = lambda row, kept, y: row.at[kept].set(y, **PROMISES)
    return jax.vmap(put)(x, kept, y)


def take_context(context: Context, kept: Int[Array, "batch kept"]) -> Context:
    """Return the context of only the kept tokens, with their positions, segments and padding mask.

    Positions are increasing, so a causal layer can rely on the order of slots.
    """

    def take(value: Any) -> Any:
        return jax.tree.map(lambda x: take_tokens(x, kept), value)

    positions, segments = take(context.positions), take(context.segments)
    valid = take(context.valid)
    return dataclasses.replace(
        context,
        positions=positions,
        key_positions=positions,
        valid=valid,
        key_valid=valid,
        segments=segments,
        key_segments=segments,
        angles=take(context.angles),
    )

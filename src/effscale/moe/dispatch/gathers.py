"""Move rows by gathers in both directions: the gradient of one gather is the other, where differentiation would produce a scatter."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def rows_of_items(
    x: Float[Array, "tokens width"], slots: Int[Array, "tokens k"], items: Int[Array, "rows"]
) -> Float[Array, "rows width"]:
    """Return the token of the item in each row.

    Args:
        x: The tokens.
        slots: The row of each item; ``rows`` or more if it has none.
        items: The item of each row, ``token * k + choice``; ``tokens * k`` if the row is empty, which gives zeros.
    """
    return _take(x, items // slots.shape[1])


rows_of_items.defvjp(
    lambda x, slots, items: (rows_of_items(x, slots, items), slots),
    lambda slots, g: (_take(g, slots).sum(1), None, None),
)


@jax.custom_vjp
def items_of_rows(
    y: Float[Array, "rows width"], slots: Int[Array, "tokens k"], items: Int[Array, "rows"]
) -> Float[Array, "tokens k width"]:
    """Return the row of each item, with zeros for items without a row. Arguments as in ``rows_of_items``."""
    return _take(y, slots)


items_of_rows.defvjp(
    lambda y, slots, items: (items_of_rows(y, slots, items), items),
    lambda items, g: (_take(g.reshape(-1, g.shape[-1]), items), None, None),
)


def _take(a: Array, index: Array) -> Array:
    """Return rows of ``a``, with zeros for indices beyond the last."""
    inside = (index < a.shape[0])[..., None]
    return jnp.where(inside, a[jnp.minimum(index, a.shape[0] - 1)], 0)

"""Updates that apply only if the result is finite, and otherwise leave the state unchanged bit for bit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Update = Callable[[Any], Any]
Everywhere = Callable[[jax.Array], jax.Array]
Check = Callable[[Any, Any], jax.Array]


def update_if(
    condition: jax.Array, update: Update, old: Any, everywhere: Everywhere | None = None
) -> tuple[Any, jax.Array]:
    """Return ``update(old)`` if the condition holds and the update keeps everything finite, else ``old``.

    A finite gradient does not guarantee a finite update: a learning rate, a weight or a moment can overflow. So the update
    is computed and checked before it is applied.

    Args:
        condition: A scalar, the same on all devices.
        update: A function from a tree to a tree with the same structure, without side effects.
        old: The tree; it may be donated.
        everywhere: Returns whether a condition holds on all workers, if ``update`` communicates between them.

    Returns:
        The tree, and whether the update was applied (a bool scalar, the same on all workers).
    """

    def keeps_finite(new: Any, old: Any) -> jax.Array:
        kept = ~loses_finite(new, old)
        return kept if everywhere is None else everywhere(kept)

    if everywhere is not None:
        # `by_branch` would communicate twice.
        return by_selection(condition, update, keeps_finite, old)
    return jax.lax.platform_dependent(
        condition,
        old,
        cpu=lambda condition, old: by_branch(condition, update, keeps_finite, old),
        default=lambda condition, old: by_selection(condition, update, keeps_finite, old),
    )


def loses_finite(new: Any, old: Any) -> jax.Array:
    """Return whether any number that was finite in ``old`` is infinite or NaN in ``new``.

    Values that were not finite before are allowed to stay so: optimizers use an infinity for "no best value yet".
    """
    lost = jnp.zeros((), bool)
    for after, before in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        if jnp.issubdtype(jnp.result_type(after), jnp.inexact):
            lost |= jnp.any(~jnp.isfinite(after) & jnp.isfinite(before))
    return lost


def by_branch(
    condition: jax.Array, update: Update, check: Check, old: Any
) -> tuple[Any, jax.Array]:
    """Compute ``update_if`` with control flow, for CPU.

    A branch lets XLA update the moments in place. The update is computed twice, the first time only for the check. With
    AdamW this took a third of the time, and less than half the memory, of keeping both states and selecting one.
    """
    condition = jax.lax.cond(
        condition, lambda old: check(update(old), old), lambda old: jnp.zeros((), bool), old
    )
    return jax.lax.cond(condition, update, lambda old: old, old), condition


def by_selection(
    condition: jax.Array, update: Update, check: Check, old: Any
) -> tuple[Any, jax.Array]:
    """Compute ``update_if`` by elementwise selection, for accelerators, where a branch would wait for the host.

    XLA fuses the update into the check, and again into the selection, which writes in place.
    """
    new = update(old)
    condition = condition & check(new, old)
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old), condition

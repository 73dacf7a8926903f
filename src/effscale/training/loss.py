"""What a loss function returns: sums, so that means over any split of a batch are true means."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    r"""The sum of a loss over tokens (or examples), with the sum of their weights.

    The mean, $\sum_i w_i \ell_i / \sum_i w_i$, is ``total / weight``. Keeping the two sums apart is what
    makes gradient accumulation and evaluation exact when micro-batches hold unequal numbers of tokens.

    Attributes:
        total: Scalar, the weighted sum of the loss.
        weight: Scalar, the sum of the weights.
        metrics: Further scalars or arrays, each a weighted SUM like ``total``; they are reported divided by ``weight``,
            an array entry by entry (the loads of experts, say).

    >>> loss = Loss(jnp.float32(6.0), jnp.float32(3.0), {"accuracy": jnp.float32(1.5)})
    >>> float(loss.mean()), float(loss.means()["accuracy"])
    (2.0, 0.5)
    """

    # No array types here: the same class also holds gradients, shapes and None while it is mapped over.
    total: Any
    weight: Any
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def mean(self) -> jax.Array:
        """``total / weight``; zero where there is no weight at all."""
        return self.total / safe_weight(self.weight)

    def means(self) -> dict[str, jax.Array]:
        """Each of ``metrics`` divided by the weight."""
        return {name: value / safe_weight(self.weight) for name, value in self.metrics.items()}

    def in_float32(self) -> "Loss":
        """The same sums in float32, the type in which they are added up."""
        return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), self)


def safe_weight(weight: Any) -> jax.Array:
    """The weight, or one where it is zero, so that an empty batch divides to zero and not to NaN."""
    weight = jnp.asarray(weight, jnp.float32)
    return jnp.where(weight == 0, jnp.ones_like(weight), weight)

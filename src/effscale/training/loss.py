"""The result of a loss function: sums, so that means over any split of a batch are exact."""

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
    makes gradient accumulation and evaluation exact when micro-batches have different numbers of tokens.

    Attributes:
        total: The weighted sum of the loss, a scalar.
        weight: The sum of the weights, a scalar.
        metrics: Further scalars or arrays, each a weighted SUM like ``total``. They are reported divided by ``weight``,
            arrays entry by entry (the loads of experts, for instance).

    >>> loss = Loss(jnp.float32(6.0), jnp.float32(3.0), {"accuracy": jnp.float32(1.5)})
    >>> float(loss.mean()), float(loss.means()["accuracy"])
    (2.0, 0.5)
    """

    # No array types here: under tree maps the class also contains gradients, shapes and None.
    total: Any
    weight: Any
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def mean(self) -> jax.Array:
        """Return ``total / weight``, or zero if the weight is zero."""
        return self.total / safe_weight(self.weight)

    def means(self) -> dict[str, jax.Array]:
        """Return each of ``metrics`` divided by the weight."""
        return {name: value / safe_weight(self.weight) for name, value in self.metrics.items()}

    def in_float32(self) -> "Loss":
        """Return the same sums in float32, the type in which they are accumulated."""
        return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), self)


def safe_weight(weight: Any) -> jax.Array:
    """Return the weight, or one if it is zero, so that the mean of an empty batch is zero instead of NaN."""
    weight = jnp.asarray(weight, jnp.float32)
    return jnp.where(weight == 0, jnp.ones_like(weight), weight)

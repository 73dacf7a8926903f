"""Dense layers, embeddings, norms and dropout.

Each module computes in the dtype of its input; parameters keep their own dtype (float32 when initialized). Norms compute
in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effscale.models.activations import Activation
from effscale.models.weights import Affine, matmul, matmuls, take, transpose
from effscale.parallel import constrain

Axes = tuple[str | None, ...]


class Dense(nnx.Module):
    """A dense layer: ``y = x W + b`` for any weight ``W`` of shape ``(d_in, d_out)``.

    Args:
        d_in: Width of the input.
        d_out: Width of the output.
        rngs: Random streams for the initial values.
        bias: Whether to add ``b``.
        std: Standard deviation of the initial ``W``.
        axes: Logical names of the two dimensions of ``W``.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> Dense(4, 8, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 4))).shape
        (2, 3, 8)
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        rngs: nnx.Rngs,
        bias: bool = True,
        std: float = 0.02,
        axes: Axes = (None, None),
    ):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (d_in, d_out)), axes=axes)
        self.bias = nnx.Param(jnp.zeros(d_out), axes=axes[-1:]) if bias else None

    def __call__(
        self,
        x: Float[Array, "*batch d_in"],
        activation: Activation | None = None,
        *,
        point: str | None = None,
    ) -> Float[Array, "*batch d_out"]:
        """Compute the product in the dtype of ``x``, then the activation; ``point`` names the value before the activation."""
        return matmuls(x, self.affine(activation, point=point))[0]

    def affine(self, activation: Activation | None = None, *, point: str | None = None) -> Affine:
        """Return the layer's weight and bias with an activation, for ``effscale.models.matmuls``."""
        bias = None if self.bias is None else self.bias.get_value()
        return Affine(self.kernel.get_value(), bias, activation, point)


class Embedding(nnx.Module):
    """A table of vectors, which a tied head also multiplies by its transpose."""

    def __init__(
        self,
        num: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        std: float = 0.02,
        axes: Axes = ("vocab", "embed"),
    ):
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (num, width)), axes=axes)

    def __call__(
        self, ids: Int[Array, "*batch"], dtype: Any = jnp.float32
    ) -> Float[Array, "*batch width"]:
        """Look up the rows ``ids``; an id out of range uses the nearest row."""
        table = self.embedding.get_value()
        if jax.sharding.get_abstract_mesh().manual_axes:
            # XLA's partitioner crashes on a lookup in a sharded table if other mesh axes are manual.
            table = jax.tree.map(lambda a: constrain(a, *[None] * a.ndim), table)
        return take(table, ids).astype(dtype)

    def attend(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch num"]:
        """Compute logits over the rows of the table: ``x E^T``."""
        return matmul(x, transpose(self.embedding.get_value()))


class LayerNorm(nnx.Module):
    """Layer normalization over the last dimension, in float32 with the biased variance."""

    def __init__(self, width: int, *, epsilon: float = 1e-5, scale: bool = True, bias: bool = True):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,)) if scale else None
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,)) if bias else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalize the features; the result has the dtype of ``x``."""
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return _affine(y, self.scale, self.bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization over the last dimension, in float32."""

    def __init__(
        self, width: int, *, epsilon: float = 1e-6, scale: bool = True, bias: bool = False
    ):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,)) if scale else None
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,)) if bias else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalize the features; the result has the dtype of ``x``."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return _affine(y, self.scale, self.bias).astype(x.dtype)


def _affine(x: Array, scale: nnx.Param | None, bias: nnx.Param | None) -> Array:
    lead = (None,) * (x.ndim - 1)
    if scale is not None:
        x = x * scale.get_value().astype(x.dtype)[lead]
    return x if bias is None else x + bias.get_value().astype(x.dtype)[lead]


def dropout(
    x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None
) -> Float[Array, "*shape"]:
    """Set each element to zero with probability ``rate`` and scale up the others; without a key, return ``x``."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))

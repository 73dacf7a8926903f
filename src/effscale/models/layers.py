"""Dense layers, embeddings, norms, dropout and activations: the smallest modules.

Each computes in the type of its input; parameters keep their own type (float32 as made). Norms compute in float32.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effscale.models.weights import take, transpose
from effscale.parallel import constrain

Axes = tuple[str | None, ...]

Activation = Literal[
    "gelu",
    "gelu_tanh",
    "gelu_fast",
    "gelu_bloom",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "leaky_relu",
    "silu",
    "mish",
    "tanh",
    "sigmoid",
    "linear",
]


def _tanh_gelu(root: float) -> Callable[[Array], Array]:
    """The tanh approximation with its own rounding of sqrt(2/pi): trained models carry several."""

    def gelu(x: Array) -> Array:
        return 0.5 * x * (1.0 + jnp.tanh(root * x * (1.0 + 0.044715 * x * x)))

    return gelu


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": _tanh_gelu(0.7978845608028654),
    "gelu_fast": _tanh_gelu(0.7978845608),
    "gelu_bloom": _tanh_gelu(0.79788456),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.01),
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}


class Dense(nnx.Module):
    """``y = x W + b`` for any weight ``W`` of shape ``(d_in, d_out)``.

    Args:
        d_in: Width of the input.
        d_out: Width of the output.
        bias: Whether ``b`` is there.
        std: Standard deviation of the initial ``W``.
        axes: Logical names of the two dimensions of ``W``.
        rngs: Source of the initial values.

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

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """The product, in the type of ``x``."""
        # One large matrix product: XLA's CPU backend runs the same over three dimensions at a third of the speed.
        y = x.reshape(-1, x.shape[-1]) @ self.kernel.get_value().astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(x.dtype)[None]
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Embedding(nnx.Module):
    """A table of vectors, and the product with its transpose for a tied head."""

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
        """The rows ``ids``; an id out of range takes the nearest row."""
        table = self.embedding.get_value()
        if jax.sharding.get_abstract_mesh().manual_axes and isinstance(table, jax.Array):
            # XLA's partitioner dies of looking up in a divided table where other axes are manual.
            table = constrain(table, None, None)
        return take(table, ids).astype(dtype)

    def attend(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch num"]:
        """Logits over the table's rows: ``x E^T``."""
        y = x.reshape(-1, x.shape[-1]) @ transpose(self.embedding.get_value().astype(x.dtype))
        return y.reshape(*x.shape[:-1], y.shape[-1])


class LayerNorm(nnx.Module):
    """Layer normalization over the last dimension, in float32 with the biased variance."""

    def __init__(self, width: int, *, epsilon: float = 1e-5, scale: bool = True, bias: bool = True):
        self.scale = nnx.Param(jnp.ones(width), axes=(None,)) if scale else None
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,)) if bias else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """The normalized features, in the type of ``x``."""
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
        """The normalized features, in the type of ``x``."""
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
    """Zeroes each element with probability ``rate`` and scales the others up; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))

r"""Low-rank adaptation: a weight plus the trained product of two thin matrices.

$$x W' = x W + s\,(x A) B, \qquad A \in R^{in \times r},\ B \in R^{r \times out}$$

References:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.
        https://arxiv.org/abs/2106.09685
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effscale.models.activations import Activation
from effscale.models.weights import (
    dense,
    finish,
    is_kernel,
    map_weights,
    matmul,
    take,
    transpose,
)

Model = TypeVar("Model")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX also builds it from shapes, shardings and placeholders
class LoRA:
    """A base weight and its low-rank update, usable as a weight itself.

    Attributes:
        base: Any weight of shape ``(..., in, out)``; it may be packed.
        a: Matrix of shape ``(..., in, rank)``.
        b: Matrix of shape ``(..., rank, out)``, initialized to zero so that the model starts unchanged.
        scale: The factor ``s``; ``alpha / rank`` in the paper's notation.
    """

    base: Any
    a: Float[Array, "*stack d_in rank"]
    b: Float[Array, "*stack rank d_out"]
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base weight."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The dtype in which the weight computes."""
        return self.a.dtype

    @property
    def T(self) -> "LoRA":
        """The transpose: ``W'^T = W^T + s B^T A^T``."""
        return LoRA(transpose(self.base), self.b.mT, self.a.mT, self.scale)

    def matmul(
        self, x: Array, bias: Array | None, activation: Activation | None
    ) -> Float[Array, "rows d_out"]:
        """Compute ``activation(x W' + b)`` without forming ``W'``."""
        return finish(matmul(x, self.base) + (x @ self.a) @ self.b * self.scale, bias, activation)

    def astype(self, dtype: Any) -> "LoRA":
        """Return the same pair computing in ``dtype``."""
        return LoRA(self.base.astype(dtype), self.a.astype(dtype), self.b.astype(dtype), self.scale)

    def take(self, indices: Int[Array, "*rows"]) -> Array:
        """Return rows of ``W'``, in the dtype of the rows of the base."""
        return _add(
            take(self.base, indices),
            jnp.take(self.a, indices, axis=0, mode="clip") @ self.b * self.scale,
        )

    def dense(self) -> Array:
        """Return ``W'`` itself, in the dtype of the base."""
        return _add(dense(self.base), self.a @ self.b * self.scale)

    def partition(self, axes: tuple[str | None, ...]) -> "LoRA":
        """Return the logical axes of each part, from those of the dense weight."""
        base = self.base.partition(axes) if hasattr(self.base, "partition") else axes
        *stack, d_in, d_out = axes
        return LoRA(base, (*stack, d_in, None), (*stack, None, d_out), self.scale)  # pyrefly: ignore[bad-argument-type]


def _add(base: Array, update: Array) -> Array:
    """Return the sum in the dtype of the base; if the pair has another dtype, the sum is rounded once from float32."""
    if base.dtype == update.dtype:
        return base + update
    return (base.astype(jnp.float32) + update.astype(jnp.float32)).astype(base.dtype)


def add_lora(
    model: Model,
    *,
    rank: int,
    key: PRNGKeyArray,
    alpha: float | None = None,
    where: str | Callable[[str], bool] = is_kernel,
) -> Model:
    """Add a LoRA pair to the chosen weights of a model; the outputs do not change until you train it.

    Args:
        model: Any NNX module.
        rank: Inner width of the pair, at least 1.
        key: Key for ``A``, which is drawn uniformly from ``±1/sqrt(in)``.
        alpha: Sets the scale to ``alpha / rank``; by default ``alpha = rank``.
        where: Which weights to adapt, as in ``effscale.models.map_weights``.

    Returns:
        The adapted model. Train it with ``trainable=is_adapter`` to keep the base fixed.

    Raises:
        ValueError: ``rank < 1``, a chosen weight already has a pair, or nothing matches.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from effscale.models import Dense
        >>> layer = add_lora(Dense(4, 8, rngs=nnx.Rngs(0)), rank=2, key=jax.random.key(0))
        >>> layer.kernel.get_value().a.shape
        (4, 2)
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    keys = iter(range(2**31))

    def adapt(weight: Any) -> LoRA:
        if isinstance(weight, LoRA):
            raise ValueError(
                "a chosen weight already has a LoRA pair. Call merge_lora on the model first"
            )
        *stack, d_in, d_out = weight.shape
        a = jax.random.uniform(
            jax.random.fold_in(key, next(keys)),
            (*stack, d_in, rank),
            weight.dtype,
            -(d_in**-0.5),
            d_in**-0.5,
        )
        b = jnp.zeros((*stack, rank, d_out), weight.dtype)
        return LoRA(weight, a, b, (rank if alpha is None else alpha) / rank)

    return map_weights(model, adapt, where)


def merge_lora(model: Model) -> Model:
    """Merge every LoRA pair into a dense weight; a model without pairs is returned unchanged."""
    return map_weights(model, lambda w: w.dense() if isinstance(w, LoRA) else w, lambda path: True)


def unmerge_lora(model: Model) -> Model:
    """Remove every LoRA pair and return the base weights, bitwise identical to those before ``add_lora``."""
    return map_weights(model, lambda w: w.base if isinstance(w, LoRA) else w, lambda path: True)


def is_adapter(path: str) -> bool:
    """Return whether a path names one of the two matrices of a LoRA pair; pass it as ``trainable`` of a train state."""
    return path.endswith((".a", ".b"))

"""Pruning masks: keep the parts of a matrix with the highest scores."""

import dataclasses
import fractions
import functools
import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effscale.options import Bounds, Options, PositiveInt, check

Structure = Literal["sparse", "row", "head"]
"""The unit that is kept or pruned: ``sparse``, single values; ``row``, an output of the kernel with its bias (a row of PyTorch's matrix);
``head``, the inputs of the kernel that come from one attention head (the kernel must be an output projection of attention)."""

Method = Literal["l1", "topk"]
"""Where the scores come from: ``l1``, magnitudes of the weights; ``topk``, separate trained parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning(Options):
    """What to prune from a matrix, and when.

    Example:
        >>> Pruning(structure="row", dense_ratio=0.3).num_kept(64)
        20
    """

    structure: Structure = "sparse"
    """The unit that is kept or pruned: ``sparse``, ``row`` or ``head``."""
    dense_ratio: Annotated[float, Bounds(above=0, at_most=1)]
    """The fraction to keep: ``ceil(dense_ratio * n)`` of n units in each matrix."""
    method: Method = "l1"
    """Where the scores come from: ``l1`` (magnitudes) or ``topk`` (trained)."""
    num_heads: PositiveInt | None = None
    """Number of heads among the inputs, for ``structure="head"``; None in a ``PruneRule`` uses that of the model's config."""
    offset: Annotated[int, Bounds(at_least=0, below=2**31)] = 0
    """Optimizer steps before pruning begins."""

    def __post_init__(self):
        super().__post_init__()
        fits = self.num_heads is None or self.structure == "head"
        check(self, fits, "num_heads", "None unless structure='head'")

    def num_kept(self, count: int) -> int:
        """Return how many of ``count`` units are kept, using the ratio in decimal, so that 0.07 of 100 is 7."""
        return math.ceil(fractions.Fraction(str(self.dense_ratio)) * count)


def top_k_mask(scores: Float[Array, "*shape"], num_kept: int) -> Float[Array, "*shape"]:
    """Return one at the highest scores and zero elsewhere; the gradient passes straight through to the scores.

    Of equal scores the first are kept, so that the number kept is always the same. If weights are multiplied by the
    mask, the gradient of a score is the gradient of the masked weight times the weight: the score rises where a
    larger weight would lower the loss.

    Args:
        scores: Scores of one matrix.
        num_kept: How many to keep.

    Example:
        >>> top_k_mask(jnp.array([0.5, 2.0, -1.0, 2.0]), 2).tolist()
        [0.0, 1.0, 0.0, 1.0]
        >>> w = jnp.array([3.0, -1.0, 1.0, 1.0])
        >>> jax.grad(lambda s: (top_k_mask(s, 2) * w).sum())(jnp.arange(4.0)).tolist()
        [3.0, -1.0, 1.0, 1.0]
    """
    return scheduled_mask(scores, jnp.bool_(True), num_kept)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def scheduled_mask(scores: Array, active: Array, num_kept: int) -> Array:
    """Return ``top_k_mask`` if active, or ones everywhere."""
    found = highest(scores, num_kept).astype(scores.dtype)
    return jnp.where(active, found, jnp.ones_like(scores))


@scheduled_mask.defjvp
def _scheduled_mask_jvp(num_kept: int, primals: Any, tangents: Any) -> Any:
    return scheduled_mask(*primals, num_kept), tangents[0]


@jax.jit
def highest(scores: Float[Array, "*shape"], num_kept: Any) -> Bool[Array, "*shape"]:
    """Return whether each score is among the highest; of equal scores the first are kept.

    The lowest kept score is found bit by bit, in 32 passes over the scores; sorting them takes far longer.
    """
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    bits = jnp.where(scores == 0, 0, bits)  # also -0.0
    # Map to integers with the same order as the floats.
    flipped = jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31)))
    keys = jax.lax.bitcast_convert_type(flipped, jnp.uint32)

    def one_bit(i: Array, least: Array) -> Array:
        higher = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(keys >= higher) >= num_kept, higher, least)

    least = jax.lax.fori_loop(0, 32, one_bit, jnp.uint32(0))
    above, ties = keys > least, keys == least
    place = jnp.cumsum(ties.reshape(-1), dtype=jnp.int32).reshape(ties.shape)
    return above | (ties & (place <= num_kept - jnp.sum(above)))


def magnitudes(kernel: Float[Array, "d_in d_out"], pruning: Pruning) -> Float[Array, "*units"]:
    """Return the mean magnitude of each unit: its L1 norm divided by its size.

    Example:
        >>> magnitudes(jnp.array([[1.0, -2.0], [3.0, 0.0]]), Pruning(structure="row", dense_ratio=0.5)).tolist()
        [2.0, 1.0]
    """
    size = jnp.abs(kernel)
    if pruning.structure == "row":
        return jnp.mean(size, 0)
    if pruning.structure == "head":
        return jnp.mean(size.reshape(pruning.num_heads, -1), 1)
    return size


def over_kernel(mask: Float[Array, "*units"], shape: tuple[int, ...], pruning: Pruning) -> Array:
    """Reshape a mask, or a stack of masks, to broadcast against a kernel of this shape."""
    if pruning.structure == "row":
        return mask[..., None, :]
    if pruning.structure == "head":
        return jnp.repeat(mask, shape[-2] // mask.shape[-1], axis=-1)[..., :, None]
    return mask


def units_shape(shape: tuple[int, ...], pruning: Pruning) -> tuple[int, ...]:
    """Return the shape of the masks of a kernel of this shape.

    Raises:
        ValueError: The kernel has no such units.
    """
    if len(shape) < 2:
        raise ValueError(f"only matrices can be pruned, got an array of shape {shape}")
    *stack, d_in, d_out = shape
    if pruning.structure == "sparse":
        return shape
    if pruning.structure == "row":
        return (*stack, d_out)
    if pruning.num_heads is None:
        raise ValueError("Pruning.num_heads must be set, got None: it cannot be inferred here")
    if d_in % pruning.num_heads:
        raise ValueError(
            f"num_heads must divide the number of inputs, {d_in}, got {pruning.num_heads}"
        )
    return (*stack, pruning.num_heads)

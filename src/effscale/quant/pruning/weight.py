r"""Weights with a mask.

$$y = x (M \odot W) + m \odot b$$

with m the mask of the rows, if there is one, and M the mask of the matrix.
"""

import dataclasses
import functools
import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effscale.models import finish
from effscale.models.activations import Activation
from effscale.models.weights import dense
from effscale.quant.pruning.masks import (
    Pruning,
    highest,
    magnitudes,
    over_kernel,
    scheduled_mask,
    units_shape,
)

NEVER = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX makes it of shapes, shardings and placeholders, too
class PrunedWeight:
    """A float matrix with a mask, created by ``prune_weight``; implements ``effscale.models.Weight``.

    Pruned values get no gradient. Neither mask nor scores have an effect before the offset, but scores are already
    trained.

    Attributes:
        latent: The matrix, ``(..., in, out)``: an array, or a pruned weight, whose mask then applies as well.
        mask: Whether each value (``sparse``, in the shape of the matrix), output (``row``, ``(..., out)``) or head
            (``head``, ``(..., num_heads)``) is kept; None with method ``topk``.
        scores: Trained scores in the same shape, with method ``topk``; the mask keeps the highest. None with ``l1``.
        step: Optimizer steps completed, int32, ``(...)``; set by ``at_step``.
        pruning: What is pruned, and when.
        is_transposed: Whether it represents the transpose.
        compute: The dtype of the result; None uses that of ``latent``.
    """

    latent: Any
    mask: Bool[Array, "*units"] | None
    scores: Float[Array, "*units"] | None
    step: Int[Array, "*stack"]
    pruning: Pruning = dataclasses.field(metadata={"static": True})
    is_transposed: bool = dataclasses.field(default=False, metadata={"static": True})
    compute: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        *stack, d_in, d_out = self.latent.shape
        return (*stack, d_out, d_in) if self.is_transposed else (*stack, d_in, d_out)

    @property
    def dtype(self) -> Any:
        """Dtype of the result."""
        return self.latent.dtype if self.compute is None else self.compute

    @property
    def T(self) -> "PrunedWeight":
        """The transpose."""
        return dataclasses.replace(self, is_transposed=not self.is_transposed)

    @property
    def num_kept(self) -> int:
        """The number of units of each matrix that are kept after the offset."""
        units = units_shape(self.latent.shape, self.pruning)
        return self.pruning.num_kept(math.prod(units[len(self.latent.shape) - 2 :]))

    def astype(self, dtype: Any) -> "PrunedWeight":
        """Return the same weight with results in another dtype."""
        return dataclasses.replace(self, compute=jnp.dtype(dtype))

    def kept(self) -> Float[Array, "*units"]:
        """Return the current mask, one for kept and zero for pruned units, with a gradient to the scores."""
        active = self.step >= self.pruning.offset
        if self.mask is not None:
            active = active.reshape(active.shape + (1,) * (self.mask.ndim - active.ndim))
            return (self.mask | ~active).astype(self.latent.dtype)
        count = self.num_kept
        one = lambda scores, active: scheduled_mask(scores, active, count)
        for _ in self.step.shape:
            one = jax.vmap(one)
        return one(self.scores, active).astype(self.latent.dtype)

    def dense(self) -> Float[Array, "*shape"]:
        """Return the matrix with zeros for pruned values."""
        kernel = dense(self.latent)
        kernel = kernel * over_kernel(self.kept(), kernel.shape, self.pruning)
        kernel = kernel.astype(self.dtype)
        return kernel.mT if self.is_transposed else kernel

    def masked_bias(self, bias: Float[Array, "*stack d_out"]) -> Float[Array, "*stack d_out"]:
        """Return a bias with zeros where rows are pruned."""
        if isinstance(self.latent, PrunedWeight):
            bias = self.latent.masked_bias(bias)
        if self.pruning.structure != "row" or self.is_transposed:
            return bias
        return bias * self.kept().astype(bias.dtype)

    def take(self, indices: Int[Array, "*rows"]) -> Float[Array, "*rows width"]:
        """Return rows of the masked matrix."""
        return jnp.take(self.dense(), indices, axis=0, mode="clip")

    def matmul(
        self,
        x: Float[Array, "rows d_in"],
        bias: Float[Array, "d_out"] | None,
        activation: Activation | None,
    ) -> Float[Array, "rows d_out"]:
        """Return ``activation(x W + b)`` for the masked matrix and bias."""
        bias = None if bias is None else self.masked_bias(bias)
        return finish(x @ self.dense(), bias, activation)

    def at_step(self, step: Any) -> "PrunedWeight":
        """Return the same weight after ``step`` optimizer steps; a magnitude mask is computed when the offset is reached."""
        latent = self.latent
        if isinstance(latent, PrunedWeight):
            latent = latent.at_step(step)
        step = jnp.broadcast_to(jnp.asarray(step, jnp.int32), self.step.shape)
        new = dataclasses.replace(self, latent=latent, step=step)
        if self.scores is not None or self.pruning.offset == 0:
            return new
        reached = (self.step < self.pruning.offset) & (step >= self.pruning.offset)
        mask = _mask_once(self.mask, dense(latent), jnp.any(reached), self.pruning)
        return dataclasses.replace(new, mask=mask)

    def check_finished(self) -> None:
        """Raise a ``ValueError`` if the offset has not been reached, so that nothing is pruned. A traced step is not checked."""
        if isinstance(self.latent, PrunedWeight):
            self.latent.check_finished()
        if first_step(self.step) < self.pruning.offset:
            raise ValueError(
                f"at step {first_step(self.step)} it is not pruned yet; pruning begins at step {self.pruning.offset}. Train until then, or "
                f"use at_step(model, {self.pruning.offset}) and check the loss"
            )

    def partition(self, axes: tuple[str | None, ...]) -> "PrunedWeight":
        """Return the logical axes of each part, given those of the dense array."""
        *stack, d_in, d_out = axes[:-2] + axes[:-3:-1] if self.is_transposed else axes
        own = (*stack, d_in, d_out)
        units = {"sparse": own, "row": (*stack, d_out), "head": (*stack, None)}
        of = lambda array: None if array is None else units[self.pruning.structure]
        inner = hasattr(self.latent, "partition")
        return dataclasses.replace(
            self,
            latent=self.latent.partition(own) if inner else own,
            mask=of(self.mask),
            scores=of(self.scores),
            step=tuple(stack),
        )


def prune_weight(weight: Any, pruning: Pruning) -> PrunedWeight:
    """Return a weight with a pruning mask.

    Trained scores (``topk``) start as the magnitudes that ``l1`` uses. DeepSpeed initializes them at random, so that
    at the offset random parts of a trained matrix are lost.

    Args:
        weight: A float kernel ``(..., in, out)``, or a pruned weight.
        pruning: What to prune, and when.

    Returns:
        The weight at step 0.

    Raises:
        ValueError: The matrix has no such units.

    Example:
        >>> w = jnp.array([[1.0, -2.0, 0.5], [0.25, 0.5, 4.0]])
        >>> prune_weight(w, Pruning(dense_ratio=0.5)).dense().tolist()
        [[1.0, -2.0, 0.0], [0.0, 0.0, 4.0]]
        >>> rows = prune_weight(w, Pruning(structure="row", dense_ratio=0.3))
        >>> rows.matmul(jnp.ones((1, 2)), jnp.ones(3), None).tolist()  # x W + b
        [[0.0, 0.0, 5.5]]
    """
    shape = units_shape(weight.shape, pruning)
    step = jnp.zeros(weight.shape[:-2], jnp.int32)
    if pruning.method == "topk":
        scores = _of_each(lambda w: magnitudes(w, pruning), dense(weight))
        return PrunedWeight(weight, None, scores, step, pruning)
    if pruning.offset > 0:
        mask = jnp.ones(shape, bool)
    else:
        mask = mask_by_magnitude(dense(weight), pruning)
    return PrunedWeight(weight, mask, None, step, pruning)


def first_step(step: Int[Array, "*stack"]) -> int:
    """Return the smallest of a weight's steps; if they are traced, a step that is never reached, so that checks pass."""
    return NEVER if isinstance(step, jax.core.Tracer) else int(step.min())


def mask_by_magnitude(
    kernel: Float[Array, "*stack d_in d_out"], pruning: Pruning
) -> Bool[Array, "*units"]:
    """Compute the mask of method ``l1`` for one kernel or a stack of kernels."""

    def one(kernel: Array) -> Array:
        scores = magnitudes(kernel, pruning)
        return highest(scores, pruning.num_kept(scores.size))

    return _of_each(one, kernel)


@functools.partial(jax.jit, static_argnums=3)
def _mask_once(mask: Array, kernel: Array, reached: Array, pruning: Pruning) -> Array:
    """Return a new magnitude mask if the offset is reached, or else the old one."""
    return jax.lax.cond(reached, lambda: mask_by_magnitude(kernel, pruning), lambda: mask)


def _of_each(function: Any, kernel: Array) -> Array:
    """Apply a function of one kernel to each kernel of a stack."""
    for _ in kernel.shape[:-2]:
        function = jax.vmap(function)
    return function(kernel)

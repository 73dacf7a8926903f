"""Clipping of the gradient by its global norm."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from effscale.options import is_finite

ClipBy = Literal["synchronized", "local"]
"""Whose norm decides if several workers have separate gradients.

``synchronized``: the root mean square of the workers' norms, one number for all of them, whether or not they average
their gradients. It is at least the norm of the mean gradient, and larger by up to the square root of the number of
workers where noise dominates. ``local``, as in DeepSpeed: the norm of the mean gradient while gradients are averaged, and
each worker's own norm once only momenta are averaged. Each worker's own norm is larger, so if it exceeds the limit, steps
become smaller when compression begins.
"""


@dataclasses.dataclass(frozen=True)
class Clip:
    """Gradient clipping: scale the gradient so that its global norm is at most ``norm``.

    Attributes:
        norm: The maximum norm. It may be a traced array, so that a schedule can set it.
        by: Whose norm decides, see `ClipBy`. It matters only if workers have separate gradients, within
            ``effscale.parallel.per_worker``.

    Raises:
        ValueError: ``norm`` is not a positive, finite number, or ``by`` is unknown.

    Example:
        >>> Clip(1.0)
        Clip(norm=1.0, by='synchronized')
    """

    norm: ArrayLike
    by: ClipBy = "synchronized"

    def __post_init__(self):
        norm: Any = self.norm
        if not isinstance(norm, jax.core.Tracer):
            is_array = isinstance(norm, jax.Array | np.ndarray) and norm.ndim == 0
            number = float(norm) if is_array else norm
            if not (is_finite(number) and number > 0):
                raise ValueError(
                    f"norm must be a positive, finite number, got Clip(norm={norm!r}). Use clip=None to disable clipping."
                )
        if self.by not in get_args(ClipBy):
            raise ValueError(f"by must be one of {', '.join(get_args(ClipBy))}, got {self.by!r}")

    def factor(self, norm: Float[Array, ""]) -> Float[Array, ""]:
        """Return the factor, at most 1, by which to multiply a gradient of this norm."""
        largest = jnp.asarray(self.norm, jnp.float32)
        return largest / jnp.maximum(norm, largest)


def check_clip(clip: object) -> None:
    """Raise a ``ValueError`` unless this is a `Clip` or None: a number, for instance."""
    if clip is not None and not isinstance(clip, Clip):
        raise ValueError(f"clip must be a Clip or None, got {clip!r}. Use clip=Clip({clip!r}).")

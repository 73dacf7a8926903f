"""Clipping of the gradient by its global norm."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from effscale.models.validation import is_finite

ClipBy = Literal["synchronised", "local"]
"""Whose norm decides where several workers hold gradients of their own.

``synchronised``: the root mean square of the workers' norms, one number for all of them, whether or not they average their
gradients. It is at least the norm of the mean gradient, and up to the square root of the number of workers more where noise
dominates. ``local``, as in DeepSpeed: the norm of the mean gradient while gradients are averaged, and each worker's own norm once
only momenta are. Each worker's own norm is larger, so where it binds, steps become smaller when compression begins.
"""


@dataclasses.dataclass(frozen=True)
class Clip:
    """Scale the gradient so that its global norm is at most ``norm``.

    Attributes:
        norm: The greatest norm. May be a traced array, so that a schedule can set it.
        by: Whose norm decides, see `ClipBy`. It makes a difference only for workers that hold gradients of their own, within
            `effscale.parallel.per_worker`.

    Raises:
        ValueError: ``norm`` is not a positive, finite number, or ``by`` is unknown.

    Example:
        >>> Clip(1.0)
        Clip(norm=1.0, by='synchronised')
    """

    norm: ArrayLike
    by: ClipBy = "synchronised"

    def __post_init__(self):
        norm: Any = self.norm
        if not isinstance(norm, jax.core.Tracer):
            is_array = isinstance(norm, jax.Array | np.ndarray) and norm.ndim == 0
            number = float(norm) if is_array else norm
            if not (is_finite(number) and number > 0):
                raise ValueError(
                    f"Clip(norm={norm!r}): norm must be a positive, finite number; clip=None does not clip"
                )
        if self.by not in get_args(ClipBy):
            raise ValueError(f"by={self.by!r} is unknown; one of {', '.join(get_args(ClipBy))}")

    def factor(self, norm: Float[Array, ""]) -> Float[Array, ""]:
        """What a gradient of this norm is multiplied by: at most 1."""
        largest = jnp.asarray(self.norm, jnp.float32)
        return largest / jnp.maximum(norm, largest)


def check_clip(clip: object) -> None:
    """Raise a ``ValueError`` unless this is a `Clip` or None: a number, for instance."""
    if clip is not None and not isinstance(clip, Clip):
        raise ValueError(f"clip={clip!r}: give the object, clip=Clip({clip!r})")

"""The default optimizer, from a config."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from effscale.options import NonNegativeFloat, Options, PositiveFloat, ProperFraction
from effscale.training.partition import decay_mask
from effscale.training.schedules import scale_by_learning_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig(Options):
    """AdamW as in ``optax.adamw``, with weight decay only on matrices.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), ICLR. https://arxiv.org/abs/1711.05101

    >>> optimizer = AdamWConfig(weight_decay=0.1).build(1e-3)
    """

    b1: ProperFraction = 0.9
    """Decay of the first moment."""
    b2: ProperFraction = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Number added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""

    def build(
        self,
        learning_rate: float | Callable[[Any], Any] | optax.GradientTransformation,
        mask: Callable[[Any], Any] | None = decay_mask,
    ) -> optax.GradientTransformationExtraArgs:
        """Build the optimizer.

        Args:
            learning_rate: A number, an optax schedule, a ``Schedule`` (which can count tokens), or the final transformation,
                such as ``effscale.curriculum.steps_then_tokens``.
            mask: A function from the trained leaves to a tree of bools, True where weight decay applies; None decays everything.

        Returns:
            An optax transformation that accepts extra arguments.

        Raises:
            ValueError: ``learning_rate`` is a number that is not finite, or none of the above.
        """
        return optax.chain(
            optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps),
            optax.add_decayed_weights(self.weight_decay, mask),
            scale_by_learning_rate(learning_rate),
        )

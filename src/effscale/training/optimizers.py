"""The default optimizer, from a config."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from effscale.models.validation import check, is_finite
from effscale.training.partition import decay_mask
from effscale.training.schedules import scale_by_learning_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW as in ``optax.adamw``, with weight decay only on matrices.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), ICLR. https://arxiv.org/abs/1711.05101

    >>> optimizer = AdamWConfig(weight_decay=0.1).build(1e-3)
    """

    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Number added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""

    def __post_init__(self):
        for name in ("b1", "b2"):
            value = getattr(self, name)
            check(self, is_finite(value) and 0 <= value < 1, name, "a number in [0, 1)")
        eps, decay = self.eps, self.weight_decay
        check(self, is_finite(eps) and eps > 0, "eps", "positive and finite; 1e-8 is usual")
        wanted = "finite and not negative; 0 turns it off"
        check(self, is_finite(decay) and decay >= 0, "weight_decay", wanted)

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

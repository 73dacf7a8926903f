"""Weight decay that needs the parameters only if it is not zero."""

from typing import Any

import optax


def decayed_weights(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """Return ``optax.add_decayed_weights``, or a transformation that does not need the parameters if the decay is known to be zero."""
    if is_zero(weight_decay):
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)


def is_zero(weight_decay: Any) -> bool:
    """Return whether a weight decay is known to be zero; an injected one never is."""
    return isinstance(weight_decay, int | float) and weight_decay == 0

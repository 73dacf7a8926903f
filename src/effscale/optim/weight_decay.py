"""Weight decay that asks for the parameters only where there is any."""

from typing import Any

import optax


def decayed_weights(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """``optax.add_decayed_weights``, which does not ask for the parameters where the decay is known to be zero."""
    if is_zero(weight_decay):
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)


def is_zero(weight_decay: Any) -> bool:
    """Return whether a weight decay is known to be zero; one that is injected never is."""
    return isinstance(weight_decay, int | float) and weight_decay == 0

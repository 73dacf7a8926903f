"""Random layerwise token dropping (random-LTD): the middle layers train on a random subset of each row's tokens."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.ltd.accounting import layer_token_average, training_flops
    from effscale.ltd.runner import token_dropping
    from effscale.ltd.schedule import RandomLTD, mslg
    from effscale.ltd.tokens import put_tokens, sample_kept, take_tokens

__all__ = [
    "RandomLTD",
    "layer_token_average",
    "mslg",
    "put_tokens",
    "sample_kept",
    "take_tokens",
    "token_dropping",
    "training_flops",
]

lazy_package(__name__)

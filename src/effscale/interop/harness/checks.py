"""Check which models the harness can evaluate, and how many tokens they read."""

from typing import Any

from effscale.interop.harness.codec import Codec
from effscale.models import Transformer
from effscale.moe import MoEConfig

MAX_LENGTH = 2048
"""The default for the maximum number of tokens that a model reads, as in the harness."""


def check_model(model: Any) -> None:
    """Raise an error for a Transformer that does not predict the next token, or whose rows depend on other rows of the batch.

    Raises:
        ValueError: The model cannot be evaluated; the message says what to do.
    """
    if not isinstance(model, Transformer):
        return
    if not (model.config.causal and "lm" in model.heads):
        raise ValueError(
            f"the harness needs a causal model with a head named 'lm', got heads {list(model.heads)}"
        )
    for number, block in enumerate(model.config.layers):
        part = block.feed_forward
        capacity = part.router.eval_capacity_factor if isinstance(part, MoEConfig) else None
        if capacity is not None:
            raise ValueError(
                f"the experts of layer {number} have eval_capacity_factor={capacity}, so the rows of a batch would compete for them. "
                "Evaluate the model with RouterConfig(eval_capacity_factor=None); effscale.models.with_config changes it."
            )


def length_of(model: Any, codec: Codec, given: int | None) -> int:
    """Return the maximum number of tokens that a model reads: as given, or by its files, its positions or its tokenizer.

    Raises:
        ValueError: ``given`` is below 1 or above the number of positions of the model.
    """
    positions = model.config.max_length if isinstance(model, Transformer) else None
    if given is None:
        known = (length for length in (codec.max_length, positions) if length is not None)
        return min(known, default=MAX_LENGTH)
    if given < 1 or (positions is not None and given > positions):
        most = "" if positions is None else f", and at most the model's {positions} positions"
        raise ValueError(f"max_length must be at least 1{most}, got {given}")
    return given

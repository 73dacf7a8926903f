"""Which models the harness can ask, and how much they read at once."""

from typing import Any

from effscale.evaluation.harness.codec import Codec
from effscale.models import Transformer

MAX_LENGTH = 2048
"""Tokens that a model reads at once where nothing says how many, as in the harness."""


def check_model(model: Any) -> None:
    """Refuse a Transformer that predicts no next token, or whose rows depend on the other rows of their batch.

    Raises:
        ValueError: It says what would do.
    """
    if not isinstance(model, Transformer):
        return
    if not (model.config.causal and "lm" in model.heads):
        raise ValueError(
            f"the harness asks causal models with a head named 'lm', and this one's heads are {list(model.heads)}"
        )
    for number, block in enumerate(model.config.layers):
        # By name, as a technique is not known here.
        router = getattr(block.feed_forward, "router", None)
        capacity = getattr(router, "eval_capacity_factor", None)
        if capacity is not None:
            raise ValueError(
                f"the experts of layer {number} have eval_capacity_factor={capacity}, for which the rows of a batch would compete: "
                "evaluate the model with RouterConfig(eval_capacity_factor=None); effscale.models.with_config changes it"
            )


def length_of(model: Any, codec: Codec, given: int | None) -> int:
    """Tokens that a model reads at once: as given, or as its files, its positions or its tokenizer say.

    Raises:
        ValueError: ``given`` is below 1 or more than the model's positions.
    """
    positions = model.config.max_length if isinstance(model, Transformer) else None
    if given is None:
        known = (length for length in (codec.max_length, positions) if length is not None)
        return min(known, default=MAX_LENGTH)
    if given < 1 or (positions is not None and given > positions):
        most = "" if positions is None else f", and at most the model's {positions} positions"
        raise ValueError(f"max_length must be at least 1{most}, got {given}")
    return given

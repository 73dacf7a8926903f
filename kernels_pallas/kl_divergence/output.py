"""The parts of a model's distribution over the vocabulary."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Output(NamedTuple):
    """Logits, represented by the product that computes them: ``hidden @ vocab_weight.T + bias``.

    Attributes:
        hidden: Final hidden states, float32 or bfloat16.
        vocab_weight: The output projection in the layout of an embedding table.
        bias: Bias of the logits, or None.
    """

    hidden: Float[Array, "tokens d"]
    vocab_weight: Float[Array, "vocab d"]
    bias: Float[Array, " vocab"] | None = None

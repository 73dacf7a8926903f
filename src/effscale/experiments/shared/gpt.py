"""The GPT that several experiments train from scratch."""

import dataclasses
from typing import Literal

from effscale.models import TransformerConfig, gpt2
from effscale.models.config import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A GPT-2 of any size; the vocabulary is the tokenizer's."""

    num_layers: int = 4
    """Number of layers."""
    d_model: int = 224
    """Width of the residual stream."""
    num_heads: int = 4
    """Number of attention heads."""
    dropout: float = 0.0
    """Dropout rate of embeddings, attention and residuals."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products."""
    remat: Remat = "dots"
    """What the backward pass recomputes to save memory: none, dots (everything except matrix products) or full."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""

    def build(self, vocab_size: int, length: int) -> TransformerConfig:
        """Return the config of the transformer."""
        config = gpt2(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            vocab_size=vocab_size,
            max_length=length,
            dropout=self.dropout,
        )
        return dataclasses.replace(
            config, dtype=self.dtype, remat=self.remat, init_std=self.init_std
        )

"""The BERT that several experiments pretrain."""

import dataclasses
from typing import Literal

from effscale.models import LMHead, NormConfig, TransformerConfig, bert
from effscale.models.config import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A BERT of any size; the vocabulary is the tokenizer's plus the mask token."""

    num_layers: int = 6
    """Number of layers; random-LTD needs at least 3."""
    d_model: int = 128
    """Width of the residual stream."""
    num_heads: int = 4
    """Number of attention heads."""
    dropout: float = 0.0
    """Dropout rate of embeddings, attention and residuals."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products."""
    remat: Remat = "none"
    """What the backward pass recomputes to save memory: none, dots (everything except matrix products) or full."""

    def build(self, vocab_size: int, length: int) -> TransformerConfig:
        """Return the config of the transformer, with a masked-token head."""
        head = LMHead(name="mlm", bias=True, transform="gelu", norm=NormConfig(epsilon=1e-12))
        config = bert(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            vocab_size=vocab_size,
            max_length=length,
            dropout=self.dropout,
            pooler=False,
            heads=(head,),
        )
        return dataclasses.replace(config, dtype=self.dtype, remat=self.remat)

"""Output heads: vocabulary logits, masked-word logits, class scores and values."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from effscale.models.activations import Activation
from effscale.models.config import NormConfig, TokenInputs, TransformerConfig
from effscale.models.inputs import TokenEmbedding
from effscale.models.layers import Dense, dropout
from effscale.models.weights import matmul, transpose
from effscale.options import Options, PositiveInt, ProperFraction

Pool = Literal["first", "pooled", "last", "mean", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMHead(Options):
    """Logits over the vocabulary for every token."""

    name: str = "lm"
    """The key of the output."""
    tied: bool = True
    """Whether the projection is the transposed embedding."""
    bias: bool = False
    """Whether to add a bias to the logits."""
    transform: Activation | None = None
    """Activation of BERT's masked-word head, which applies a dense layer, this activation and a norm first; None: no transform."""
    norm: NormConfig = dataclasses.field(default_factory=NormConfig)
    """Norm of the transform."""

    def build(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> "VocabularyHead":
        """Build the module."""
        return VocabularyHead(self, config, rngs=rngs)


class VocabularyHead(nnx.Module):
    """Logits over the vocabulary for every token."""

    def __init__(self, config: LMHead, model: TransformerConfig, *, rngs: nnx.Rngs):
        if not isinstance(model.inputs, TokenInputs):
            raise ValueError("LMHead needs token inputs. Use ClassHead for images")
        width = model.hidden_width
        transform = config.transform is not None
        self.transform = (
            Dense(width, width, std=model.init_std, axes=("embed", None), rngs=rngs)
            if transform
            else None
        )
        self.norm = config.norm.build(width) if transform else None
        vocab, axes = model.inputs.vocab_size, ("embed", "vocab")
        self.project = (
            None
            if config.tied
            else Dense(width, vocab, bias=False, std=model.init_std, axes=axes, rngs=rngs)
        )
        self.bias = nnx.Param(jnp.zeros(vocab), axes=("vocab",)) if config.bias else None
        self.activation = config.transform

    def linear(
        self, hidden: Float[Array, "*batch d_model"], embed: TokenEmbedding
    ) -> tuple[Float[Array, "*batch width"], Any, Array | None]:
        """Return the parts of the last affine map, for a loss that never holds all logits.

        Returns:
            Its input, its weight of shape ``(vocab, width)`` (any weight; see ``effscale.models.weights.dense``), and its bias
            or None.
        """
        if self.transform is not None and self.norm is not None and self.activation is not None:
            hidden = self.norm(self.transform(hidden, self.activation))
        bias = None if self.bias is None else self.bias.get_value()
        if self.project is not None:
            return hidden, transpose(self.project.kernel.get_value()), bias
        return hidden, embed.tokens.embedding.get_value(), bias

    def __call__(self, hidden, pooled, embed, valid, key=None) -> Float[Array, "batch seq vocab"]:
        """Return the logits of ``(batch, seq, width)`` hidden states; ``embed`` holds the table of a tied head."""
        del pooled, valid, key
        x, weight, bias = self.linear(hidden, embed)
        return matmul(x, transpose(weight), bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassHead(Options):
    """Class scores for each row, or a value for each token."""

    num_classes: PositiveInt
    """Number of scores per row; 1 for a reward or a value."""
    name: str = "classes"
    """The key of the output."""
    pool: Pool = "first"
    """Which vector represents the row: the ``first`` token's, the pooler's (``pooled``), the ``last`` real token's, or the
    ``mean`` over real tokens. ``none`` computes scores for every token."""
    bias: bool = True
    """Whether to add a bias."""
    dropout: ProperFraction = 0.0
    """Probability of dropping a feature of that vector in training."""

    def build(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> "ClassifierHead":
        """Build the module."""
        if self.pool == "pooled" and not config.pooler:
            raise ValueError(
                "ClassHead.pool='pooled' needs a pooler. Set TransformerConfig.pooler=True"
            )
        return ClassifierHead(self, config, rngs=rngs)


class ClassifierHead(nnx.Module):
    """A dense layer over the vector of each row or token."""

    def __init__(self, config: ClassHead, model: TransformerConfig, *, rngs: nnx.Rngs):
        self.dense = Dense(
            model.hidden_width,
            config.num_classes,
            bias=config.bias,
            std=model.init_std,
            axes=("embed", None),
            rngs=rngs,
        )
        self.pool = config.pool
        self.dropout = config.dropout

    def __call__(
        self, hidden, pooled, embed, valid, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch classes"] | Float[Array, "batch seq classes"]:
        """Return the scores of ``(batch, seq, width)`` hidden states; ``valid`` is True at real tokens."""
        del embed
        x = pooled if self.pool == "pooled" else pool(hidden, valid, self.pool)
        return self.dense(dropout(x, self.dropout, key))


def pool(
    hidden: Float[Array, "batch seq d_model"], valid: Bool[Array, "batch seq"] | None, kind: Pool
) -> Float[Array, "batch d_model"] | Float[Array, "batch seq d_model"]:
    """Return the vector that represents each row; see ``effscale.models.ClassHead``."""
    if kind == "none":
        return hidden
    if kind == "first":
        return hidden[:, 0]
    if valid is None:
        return hidden[:, -1] if kind == "last" else hidden.mean(1)
    if kind == "last":
        last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    weights = valid.astype(hidden.dtype)
    return jnp.einsum("bsd,bs->bd", hidden, weights) / jnp.maximum(weights.sum(1), 1)[:, None]

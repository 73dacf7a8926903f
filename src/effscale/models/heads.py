"""What comes out of a model: vocabulary logits, masked-word logits, classes, values."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from effscale.models.activations import Activation
from effscale.models.config import NormConfig, TokenInputs, TransformerConfig
from effscale.models.inputs import TokenEmbedding
from effscale.models.layers import Dense, dropout
from effscale.models.validation import check, choice
from effscale.models.weights import matmul, transpose

Pool = Literal["first", "pooled", "last", "mean", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMHead:
    """Logits over the vocabulary at every token."""

    name: str = "lm"
    """Key of the output."""
    tied: bool = True
    """Whether the embedding's transpose is the projection."""
    bias: bool = False
    """Whether a bias is added to the logits."""
    transform: Activation | None = None
    """BERT's masked-word head: a dense layer, this activation and a norm come first; None: nothing does."""
    norm: NormConfig = dataclasses.field(default_factory=NormConfig)
    """The transform's norm."""

    def build(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> "VocabularyHead":
        """The module."""
        return VocabularyHead(self, config, rngs=rngs)


class VocabularyHead(nnx.Module):
    """Logits over the vocabulary at every token."""

    def __init__(self, config: LMHead, model: TransformerConfig, *, rngs: nnx.Rngs):
        if not isinstance(model.inputs, TokenInputs):
            raise ValueError("an LMHead needs token inputs; give a ClassHead for images")
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
        """The last affine map taken apart, for a loss that never holds all logits.

        Returns:
            Its input, its weight of shape ``(vocab, width)`` (any weight: see ``effscale.models.dense``), and its
            bias or None.
        """
        if self.transform is not None and self.norm is not None and self.activation is not None:
            hidden = self.norm(self.transform(hidden, self.activation))
        bias = None if self.bias is None else self.bias.get_value()
        if self.project is not None:
            return hidden, transpose(self.project.kernel.get_value()), bias
        return hidden, embed.tokens.embedding.get_value(), bias

    def __call__(self, hidden, pooled, embed, valid, key=None) -> Float[Array, "batch seq vocab"]:
        """Logits of ``(batch, seq, width)`` hidden states; ``embed`` holds a tied head's table."""
        del pooled, valid, key
        x, weight, bias = self.linear(hidden, embed)
        return matmul(x, transpose(weight), bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassHead:
    """Scores of classes for each row, or a value for each token."""

    num_classes: int
    """Scores a row; 1 for a reward or a value."""
    name: str = "classes"
    """Key of the output."""
    pool: Pool = "first"
    """Which vector stands for the row: the first token's; the pooler's; the last real token's; the mean over real
    tokens; ``none``: every token keeps its own."""
    bias: bool = True
    """Whether a bias is added."""
    dropout: float = 0.0
    """Probability that a feature of that vector is dropped in training."""

    def __post_init__(self):
        check(self, self.num_classes >= 1, "num_classes", "at least 1")
        check(self, 0 <= self.dropout < 1, "dropout", "in [0, 1)")
        choice(self, "pool", ("first", "pooled", "last", "mean", "none"))

    def build(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> "ClassifierHead":
        """The module."""
        if self.pool == "pooled" and not config.pooler:
            raise ValueError("ClassHead.pool='pooled' needs TransformerConfig.pooler=True")
        return ClassifierHead(self, config, rngs=rngs)


class ClassifierHead(nnx.Module):
    """A dense layer over the row's vector (or each token's)."""

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
        """Scores of ``(batch, seq, width)`` hidden states; ``valid`` is True at real tokens."""
        del embed
        x = pooled if self.pool == "pooled" else pool(hidden, valid, self.pool)
        return self.dense(dropout(x, self.dropout, key))


def pool(
    hidden: Float[Array, "batch seq d_model"], valid: Bool[Array, "batch seq"] | None, kind: Pool
) -> Float[Array, "batch d_model"] | Float[Array, "batch seq d_model"]:
    """The vector that stands for each row; see ``ClassHead``."""
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

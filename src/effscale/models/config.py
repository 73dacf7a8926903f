"""What a transformer is made of, as small frozen dataclasses that check themselves when made.

``TransformerConfig`` holds the parts; ``effscale.models.families`` writes it for each family and
``effscale.models.presets`` for each published size. A part that a technique brings (a mixture of experts in
place of ``effscale.models.MLPConfig``) only needs the same ``build``.
"""

import dataclasses
import math
import typing
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from effscale.models.activations import ACTIVATIONS, Activation
from effscale.models.layers import LayerNorm, RMSNorm
from effscale.models.points import POINTS, check_points
from effscale.models.positions import Alibi, LearnedPositions, Positions, Rotary
from effscale.models.validation import check, choice

if TYPE_CHECKING:
    from flax import nnx

Residual = Literal["pre", "pre_normed", "post", "parallel", "parallel_shared"]
Remat = Literal["none", "full", "dots", "dots_no_batch"]
AttentionImplementation = Literal["blocks", "splash", "cudnn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Layer normalization or its root-mean-square form."""

    kind: Literal["layer", "rms"] = "layer"
    """``layer`` subtracts the mean; ``rms`` does not."""
    epsilon: float = 1e-5
    """Added to the variance."""
    scale: bool = True
    """Whether a trained factor follows."""
    bias: bool = True
    """Whether a trained summand follows."""

    def __post_init__(self):
        choice(self, "kind", ("layer", "rms"))
        check(self, 0 < self.epsilon < math.inf, "epsilon", "above 0, and finite")

    def build(self, width: int) -> "LayerNorm | RMSNorm":
        """The module, over ``width`` features."""
        kind = LayerNorm if self.kind == "layer" else RMSNorm
        return kind(width, epsilon=self.epsilon, scale=self.scale, bias=self.bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head attention; with ``num_kv_heads`` below ``num_heads``, grouped queries."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads, each shared by a group of query heads; None: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; None: d_model / num_heads."""
    bias: bool = True
    """Biases of the query, key and value projections."""
    out_bias: bool | None = None
    """Bias of the output projection; None: as ``bias``."""
    scale: float | None = None
    """What scores are multiplied by; None: ``head_dim**-0.5``."""
    window: int | None = None
    """A token sees itself and the ``window - 1`` before it, by their positions; None: all before it. Layers with a window are
    computed in blocks, as the fused kernels have none."""
    qk_norm: NormConfig | None = None
    """Norm of queries and keys, each with its own factor, before they are rotated; None: none."""
    qk_norm_over: Literal["head", "all"] = "head"
    """What is normalized together: the features of a head, all heads with one factor (Qwen3); or those of all heads (OLMoE)."""
    dropout: float = 0.0
    """Probability that an attention weight is dropped in training."""

    def __post_init__(self):
        check(self, self.num_heads >= 1, "num_heads", "at least 1")
        kv = self.kv_heads
        check(
            self,
            kv >= 1 and self.num_heads % kv == 0,
            "num_kv_heads",
            f"a divisor of num_heads={self.num_heads}",
        )
        check(self, self.head_dim is None or self.head_dim >= 1, "head_dim", "at least 1")
        fits = self.scale is None or 0 < self.scale < math.inf
        check(self, fits, "scale", "above 0 and finite, or None")
        check(self, self.window is None or self.window >= 1, "window", "at least 1, or None")
        choice(self, "qk_norm_over", ("head", "all"))
        check(self, 0 <= self.dropout < 1, "dropout", "in [0, 1)")

    @property
    def kv_heads(self) -> int:
        """Key and value heads, with the default resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def width(self, d_model: int) -> int:
        """Width of a head in a model of ``d_model`` features."""
        if self.head_dim is not None:
            return self.head_dim
        if d_model % self.num_heads:
            # Only those nearby: finding all divisors of a very large width would not end.
            near = min(self.num_heads, d_model)
            fits = [n for n in range(max(1, near - 64), near + 65) if d_model % n == 0]
            raise ValueError(
                f"num_heads={self.num_heads} does not divide d_model={d_model}; "
                + (f"choose one of {fits} or " if fits else "")
                + "give head_dim"
            )
        return d_model // self.num_heads


@runtime_checkable
class FeedForwardConfig(Protocol):
    """The place of a block's feed-forward: anything with this ``build`` may stand there.

    The built module maps ``(x, context, key)`` to ``(y, report)``: ``x`` and ``y`` of shape ``(batch, seq, d_model)``;
    ``context`` the ``effscale.models.Context`` of these tokens, which says what is padding and whether there is a
    cache; ``key`` a PRNG key in training, else None; ``report`` a dict of arrays that the model hands on, stacked over
    layers. Objectives add its entry ``aux_loss``, a scalar, to the loss; its other scalars and vectors become metrics.

    A config may name points of its module in an attribute ``points``; see ``effscale.models.points``.
    """

    def build(self, d_model: int, *, std: float, out_std: float, rngs: "nnx.Rngs") -> Any:
        """The module."""
        ...


@runtime_checkable
class HeadConfig(Protocol):
    """A head: a name for its output, and a ``build``."""

    @property
    def name(self) -> str:
        """Key of the output."""
        ...

    def build(self, config: "TransformerConfig", *, rngs: "nnx.Rngs") -> Any:
        """The module; it maps ``(hidden, pooled, embed, valid, key)`` to the output."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One layer: attention and feed-forward around a residual stream."""

    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    norm: NormConfig = NormConfig()
    residual: Residual = "pre"
    """Where the norms stand: ``pre`` before each part; ``post`` after each sum; ``parallel`` both parts from the same
    stream, each with its norm; ``parallel_shared`` the same with one norm; ``pre_normed`` like ``pre`` with the normed
    stream as the residual (BLOOM's apply_residual_connection_post_layernorm)."""
    dropout: float = 0.0
    """Probability that a feature of either part's output is dropped in training."""

    def __post_init__(self):
        choice(self, "residual", typing.get_args(Residual))
        check(self, 0 <= self.dropout < 1, "dropout", "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Like blocks that are stacked and scanned: ``blocks`` in their order, ``repeat`` times over."""

    blocks: tuple[BlockConfig, ...]
    """Usually one; a (dense, expert) pair where every second layer differs."""
    repeat: int
    """How often."""

    def __post_init__(self):
        check(self, self.repeat >= 1, "repeat", "at least 1")
        check(self, len(self.blocks) >= 1, "blocks", "at least one block")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """Token ids as input."""

    vocab_size: int
    """Rows of the embedding."""
    d_embed: int | None = None
    """Width of the embedding where it differs from d_model; a projection leads in, another leads back out."""
    type_vocab_size: int = 0
    """Kinds of token (BERT's sentences A and B); 0: none."""
    norm: NormConfig | None = None
    """Norm right after the sum of embeddings (BLOOM, BERT)."""
    dropout: float = 0.0
    """Probability that a feature of the embedding is dropped in training."""

    def __post_init__(self):
        check(self, self.vocab_size >= 1, "vocab_size", "at least 1")
        check(self, self.d_embed is None or self.d_embed >= 1, "d_embed", "at least 1")
        check(self, self.type_vocab_size >= 0, "type_vocab_size", "0 or more")
        check(self, 0 <= self.dropout < 1, "dropout", "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchInputs:
    """Images as input, cut into square patches, with a leading class token (Dosovitskiy et al., 2020)."""

    image_size: int
    """Height and width of the image, in pixels."""
    patch_size: int
    """Height and width of a patch, in pixels."""
    channels: int = 3
    """Channels of a pixel."""
    dropout: float = 0.0
    """Probability that a feature of the embedding is dropped in training."""

    def __post_init__(self):
        check(self, self.image_size >= 1, "image_size", "at least 1")
        check(
            self,
            self.patch_size >= 1 and self.image_size % self.patch_size == 0,
            "patch_size",
            f"a divisor of image_size={self.image_size}",
        )
        check(self, self.channels >= 1, "channels", "at least 1")
        check(self, 0 <= self.dropout < 1, "dropout", "in [0, 1)")

    @property
    def num_tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A whole model.

    Example:
        >>> from effscale.models import preset
        >>> preset("gpt2").d_model
        768
    """

    d_model: int
    """Width of the residual stream."""
    groups: tuple[Group, ...]
    """The layers, in order."""
    inputs: TokenInputs | PatchInputs
    """What comes in."""
    positions: Positions
    """How the model knows where a token stands; None: not at all."""
    heads: tuple[HeadConfig, ...] = ()
    """What comes out; none: hidden states."""
    causal: bool = True
    """Whether a token sees only those before it."""
    final_norm: NormConfig | None = NormConfig()
    """Norm after the last layer; None where blocks end in one (post-norm)."""
    pooler: bool = False
    """BERT's pooler: a dense layer and an activation on the first token."""
    pooler_activation: Activation = "tanh"
    """The pooler's activation."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of activations and products. Parameters keep their own (float32 as made); softmax, norms and loss are in
    float32."""
    remat: Remat | tuple[str, ...] = "none"
    """What the backward pass computes again to save memory: nothing (``none``), everything in a layer (``full``), all but
    matrix products (``dots``), or all but the products without a batch dimension (``dots_no_batch``). A tuple names the
    points of a layer that are kept, such as ``("query", "key", "value", "attention_mixed")``; see ``points``."""
    attention_implementation: AttentionImplementation | None = None
    """How attention is computed: ``blocks`` of queries with their scores in float32, anywhere; ``splash``, JAX's fused kernel
    for TPUs; ``cudnn``, for Hopper GPUs; None: ``splash`` in programs for TPUs where it can serve, otherwise ``blocks``.
    A name that cannot serve is an error. With a cache it is always ``blocks``."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    scale_residual_init: bool = True
    """Whether projections into the residual stream start smaller, by ``1/sqrt(2 num_layers)``."""

    def __post_init__(self):
        check(self, self.d_model >= 1, "d_model", "at least 1")
        check(self, len(self.groups) >= 1, "groups", "at least one group")
        choice(self, "dtype", ("float32", "bfloat16", "float16"))
        if isinstance(self.remat, str):
            choice(self, "remat", typing.get_args(Remat))
        else:
            check(
                self, isinstance(self.remat, tuple), "remat", "a policy's name or a tuple of points"
            )
            check_points(self.remat, self.points, f"TransformerConfig.remat={self.remat!r}")
        if self.attention_implementation is not None:
            choice(self, "attention_implementation", typing.get_args(AttentionImplementation))
        choice(self, "pooler_activation", tuple(ACTIVATIONS))
        check(self, 0 < self.init_std < math.inf, "init_std", "above 0, and finite")
        widths = {block.attention.width(self.d_model) for block in self.blocks}
        if isinstance(self.positions, Rotary):
            check(
                self,
                len(widths) == 1,
                "groups",
                f"of one head_dim with rotary positions, not {widths}",
            )
            width = min(widths)
            dim = width if self.positions.dim is None else self.positions.dim
            wanted = f"rotary over an even dim of at most head_dim={width}"
            check(self, dim <= width and dim % 2 == 0, "positions", wanted)
        if isinstance(self.inputs, PatchInputs) and isinstance(self.positions, LearnedPositions):
            check(
                self,
                self.positions.num == self.inputs.num_tokens and self.positions.offset == 0,
                "positions",
                f"num={self.inputs.num_tokens} for these images, without an offset",
            )
        names = [head.name for head in self.heads]
        check(self, len(set(names)) == len(names), "heads", "of different names")
        reserved = {"hidden", "pooled"} & set(names)
        check(
            self,
            not reserved,
            "heads",
            f"of names other than {reserved}, which are outputs already",
        )
        if isinstance(self.positions, Alibi):
            check(
                self,
                self.causal,
                "causal",
                "True with Alibi, whose bias supposes that keys come before the query",
            )
        if any(block.attention.window is not None for block in self.blocks):
            check(
                self, self.causal, "causal", "True with a window, which reaches back from a token"
            )

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """Every kind of block, once for each place in its group."""
        return tuple(block for group in self.groups for block in group.blocks)

    @property
    def layers(self) -> tuple[BlockConfig, ...]:
        """The block of each layer, in the order in which they run."""
        return tuple(block for group in self.groups for block in group.blocks * group.repeat)

    @property
    def num_layers(self) -> int:
        """Layers in all."""
        return sum(len(group.blocks) * group.repeat for group in self.groups)

    @property
    def points(self) -> tuple[str, ...]:
        """Names of the points of its layers, those that feed-forwards bring included."""
        own = (name for b in self.blocks for name in getattr(b.feed_forward, "points", ()))
        return tuple(dict.fromkeys((*POINTS, *own)))

    @property
    def hidden_width(self) -> int:
        """Width of the hidden states that come out: d_model, or that of a narrower embedding."""
        narrow = self.inputs.d_embed if isinstance(self.inputs, TokenInputs) else None
        return self.d_model if narrow is None else narrow

    @property
    def max_length(self) -> int | None:
        """The longest sequence; None: no limit but memory."""
        return self.positions.num if isinstance(self.positions, LearnedPositions) else None

"""The parts of a transformer, as small frozen dataclasses that validate themselves when created.

``TransformerConfig`` holds the parts. ``effscale.models.families`` builds it for each family and
``effscale.models.presets`` for each published size. A part provided by a technique, such as a mixture of experts in
place of ``effscale.models.MLPConfig``, only needs the same ``build``.
"""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

from effscale.models.activations import Activation
from effscale.models.layers import LayerNorm, RMSNorm
from effscale.models.points import POINTS, check_points
from effscale.models.positions import Alibi, LearnedPositions, Positions, Rotary
from effscale.options import (
    Bounds,
    NonNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    ProperFraction,
    check,
)

if TYPE_CHECKING:
    from flax import nnx

Residual = Literal["pre", "pre_normed", "post", "parallel", "parallel_shared"]
Remat = Literal["none", "full", "dots", "dots_no_batch"]
AttentionImplementation = Literal["blocks", "splash", "cudnn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig(Options):
    """Layer normalization or root-mean-square normalization."""

    kind: Literal["layer", "rms"] = "layer"
    """``layer`` subtracts the mean; ``rms`` does not."""
    epsilon: PositiveFloat = 1e-5
    """Constant added to the variance."""
    scale: bool = True
    """Whether to multiply by a learned scale."""
    bias: bool = True
    """Whether to add a learned bias."""

    def build(self, width: int) -> "LayerNorm | RMSNorm":
        """Build the module for ``width`` features."""
        kind = LayerNorm if self.kind == "layer" else RMSNorm
        return kind(width, epsilon=self.epsilon, scale=self.scale, bias=self.bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(Options):
    """Multi-head attention, or grouped-query attention if ``num_kv_heads`` is below ``num_heads``."""

    num_heads: PositiveInt
    """Number of query heads."""
    num_kv_heads: PositiveInt | None = None
    """Number of key and value heads, each shared by a group of query heads; None: the same as ``num_heads``."""
    head_dim: PositiveInt | None = None
    """Width of a head; None: ``d_model / num_heads``."""
    bias: bool = True
    """Whether the query, key and value projections have biases."""
    out_bias: bool | None = None
    """Whether the output projection has a bias; None: the same as ``bias``."""
    scale: PositiveFloat | None = None
    """Factor that multiplies the scores; None: ``head_dim**-0.5``."""
    window: PositiveInt | None = None
    """Sliding window: a token attends to itself and the ``window - 1`` positions before it; None: to all earlier positions.
    Layers with a window are computed in blocks, because the fused kernels do not support windows."""
    qk_norm: NormConfig | None = None
    """Norm of the queries and keys, each with its own scale, applied before rotation; None: no norm."""
    qk_norm_over: Literal["head", "all"] = "head"
    """What to normalize over: the features of each ``head``, with one scale shared by all heads (Qwen3), or the features of
    ``all`` heads together (OLMoE)."""
    dropout: ProperFraction = 0.0
    """Probability of dropping an attention weight in training."""

    def __post_init__(self):
        super().__post_init__()
        shared = self.num_heads % self.kv_heads == 0
        check(self, shared, "num_kv_heads", f"a divisor of num_heads={self.num_heads}")

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads, with the default resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def width(self, d_model: int) -> int:
        """Return the width of a head in a model with ``d_model`` features."""
        if self.head_dim is not None:
            return self.head_dim
        if d_model % self.num_heads:
            # Search only nearby values: finding all divisors of a very large width would take too long.
            near = min(self.num_heads, d_model)
            fits = [n for n in range(max(1, near - 64), near + 65) if d_model % n == 0]
            raise ValueError(
                f"num_heads must divide d_model={d_model}, got {self.num_heads}. "
                + (f"Use one of {fits}, or set head_dim" if fits else "Set head_dim")
            )
        return d_model // self.num_heads


@runtime_checkable
class FeedForwardConfig(Protocol):
    """The interface of a block's feed-forward: any config with this ``build`` works.

    The module it builds maps ``(x, context, key)`` to ``(y, report)``:

    - ``x`` and ``y`` have the shape ``(batch, seq, d_model)``.
    - ``context`` is the ``effscale.models.Context`` of these tokens, which states which tokens are padding and whether there
      is a cache.
    - ``key`` is a PRNG key in training, otherwise None.
    - ``report`` is a dict of arrays, which the model stacks over the layers and returns. Objectives add its scalar entry
      ``aux_loss`` to the loss; its other scalars and vectors become metrics.

    A config may list named points of its module in an attribute ``points``; see ``effscale.models.points``. What else
    others ask of it are `CountsOperations` and `SaysWhetherCausal`.
    """

    def build(self, d_model: int, *, std: float, out_std: float, rngs: "nnx.Rngs") -> Any:
        """Build the module."""
        ...


@runtime_checkable
class CountsOperations(Protocol):
    """A feed-forward config that knows how much it computes."""

    def multiplications(self, d_model: int) -> int:
        """Return the multiplications of one token's forward pass."""
        ...


@runtime_checkable
class SaysWhetherCausal(Protocol):
    """A feed-forward config that may mix tokens; one that does not say so treats each token alone."""

    @property
    def causal(self) -> bool:
        """Whether the output at a token is independent of later tokens."""
        ...


@runtime_checkable
class HeadConfig(Protocol):
    """The interface of an output head: a name for its output, and ``build``."""

    @property
    def name(self) -> str:
        """The key of the output."""
        ...

    def build(self, config: "TransformerConfig", *, rngs: "nnx.Rngs") -> Any:
        """Build the module, which maps ``(hidden, pooled, embed, valid, key)`` to the output."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig(Options):
    """One transformer block: attention and feed-forward around a residual stream."""

    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    norm: NormConfig = NormConfig()
    residual: Residual = "pre"
    """Placement of the norms. ``pre``: before each part. ``post``: after each sum. ``parallel``: both parts read the same
    stream, each through its own norm. ``parallel_shared``: the same with one shared norm. ``pre_normed``: like ``pre``, but
    the normalized stream is the residual (BLOOM's ``apply_residual_connection_post_layernorm``)."""
    dropout: ProperFraction = 0.0
    """Probability of dropping a feature of the output of attention or feed-forward in training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group(Options):
    """Identical blocks that are stacked and scanned: ``blocks`` in order, ``repeat`` times."""

    blocks: Annotated[tuple[BlockConfig, ...], Bounds(at_least=1)]
    """The blocks of one repetition: usually one; a pair (dense, expert) if every second layer differs."""
    repeat: PositiveInt
    """Number of repetitions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenInputs(Options):
    """Token ids as input."""

    vocab_size: PositiveInt
    """Number of rows of the embedding."""
    d_embed: PositiveInt | None = None
    """Width of the embedding if it differs from ``d_model``; projections map it to ``d_model`` and back."""
    type_vocab_size: NonNegativeInt = 0
    """Number of token types, such as BERT's sentences A and B; 0: none."""
    norm: NormConfig | None = None
    """Norm applied to the sum of the embeddings (BLOOM, BERT)."""
    dropout: ProperFraction = 0.0
    """Probability of dropping a feature of the embedding in training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchInputs(Options):
    """Images as input, split into square patches after a class token.

    References:
        Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020). https://arxiv.org/abs/2010.11929
    """

    image_size: PositiveInt
    """Height and width of an image, in pixels."""
    patch_size: PositiveInt
    """Height and width of a patch, in pixels."""
    channels: PositiveInt = 3
    """Number of channels per pixel."""
    dropout: ProperFraction = 0.0
    """Probability of dropping a feature of the embedding in training."""

    def __post_init__(self):
        super().__post_init__()
        whole = self.image_size % self.patch_size == 0
        check(self, whole, "patch_size", f"a divisor of image_size={self.image_size}")

    @property
    def num_tokens(self) -> int:
        """The number of patches plus the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(Options):
    """A complete model.

    Example:
        >>> from effscale.models import preset
        >>> preset("gpt2").d_model
        768
    """

    d_model: PositiveInt
    """Width of the residual stream."""
    groups: Annotated[tuple[Group, ...], Bounds(at_least=1)]
    """The groups of layers, in order."""
    inputs: TokenInputs | PatchInputs
    """The inputs: token ids or images."""
    positions: Positions
    """Position encoding; None: no position encoding."""
    heads: tuple[HeadConfig, ...] = ()
    """The output heads; if empty, the model returns hidden states."""
    causal: bool = True
    """Whether a token attends only to itself and earlier tokens."""
    final_norm: NormConfig | None = NormConfig()
    """Norm after the last layer; None if the blocks already end in a norm (post-norm)."""
    pooler: bool = False
    """BERT's pooler: a dense layer and an activation on the first token."""
    pooler_activation: Activation = "tanh"
    """Activation of the pooler."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of activations and matrix products. Parameters keep their own dtype (float32 when initialized); softmax, norms
    and loss are computed in float32."""
    remat: Remat | tuple[str, ...] = "none"
    """What the backward pass recomputes to save memory: nothing (``none``), everything in a layer (``full``), everything
    except matrix products (``dots``), or everything except products without a batch dimension (``dots_no_batch``). A tuple
    names the points of a layer to keep, such as ``("query", "key", "value", "attention_mixed")``; see ``points``."""
    attention_implementation: AttentionImplementation | None = None
    """How to compute attention. ``blocks``: blocks of queries with scores in float32, on any platform. ``splash``: JAX's fused
    kernel for TPUs. ``cudnn``: the fused kernel for Hopper GPUs. None: ``splash`` on TPUs if it supports the model, otherwise
    ``blocks``. A named implementation that does not support the model raises an error. With a cache, ``blocks`` is always
    used."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights."""
    scale_residual_init: bool = True
    """Whether to initialize projections into the residual stream with a smaller deviation, by ``1/sqrt(2 num_layers)``."""

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.remat, tuple):
            check_points(self.remat, self.points, f"TransformerConfig.remat={self.remat!r}")
        widths = {block.attention.width(self.d_model) for block in self.blocks}
        if isinstance(self.positions, Rotary):
            check(
                self,
                len(widths) == 1,
                "groups",
                f"groups with the same head_dim if positions are rotary (here {widths})",
            )
            width = min(widths)
            dim = width if self.positions.dim is None else self.positions.dim
            wanted = f"rotary over an even number of at most head_dim={width} dimensions"
            check(self, dim <= width and dim % 2 == 0, "positions", wanted)
        if isinstance(self.inputs, PatchInputs) and isinstance(self.positions, LearnedPositions):
            check(
                self,
                self.positions.num == self.inputs.num_tokens and self.positions.offset == 0,
                "positions",
                f"learned with num={self.inputs.num_tokens} and offset=0 for these images",
            )
        names = [head.name for head in self.heads]
        check(self, len(set(names)) == len(names), "heads", "heads with different names")
        reserved = {"hidden", "pooled"} & set(names)
        check(
            self,
            not reserved,
            "heads",
            f"heads with names other than {reserved}, which are already outputs",
        )
        if isinstance(self.positions, Alibi):
            check(
                self,
                self.causal,
                "causal",
                "True with Alibi, whose bias assumes that keys precede the query",
            )
        if any(block.attention.window is not None for block in self.blocks):
            check(
                self,
                self.causal,
                "causal",
                "True with a window, which covers earlier positions only",
            )

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """All kinds of blocks, each once per place in its group."""
        return tuple(block for group in self.groups for block in group.blocks)

    @property
    def layers(self) -> tuple[BlockConfig, ...]:
        """The block of each layer, in the order in which they run."""
        return tuple(block for group in self.groups for block in group.blocks * group.repeat)

    @property
    def num_layers(self) -> int:
        """The total number of layers."""
        return sum(len(group.blocks) * group.repeat for group in self.groups)

    @property
    def points(self) -> tuple[str, ...]:
        """The names of the points in the layers, including those added by feed-forwards."""
        own = (name for b in self.blocks for name in getattr(b.feed_forward, "points", ()))
        return tuple(dict.fromkeys((*POINTS, *own)))

    @property
    def hidden_width(self) -> int:
        """The width of the returned hidden states: ``d_model``, or the width of a narrower embedding."""
        narrow = self.inputs.d_embed if isinstance(self.inputs, TokenInputs) else None
        return self.d_model if narrow is None else narrow

    @property
    def max_length(self) -> int | None:
        """The maximum sequence length; None: limited only by memory."""
        return self.positions.num if isinstance(self.positions, LearnedPositions) else None

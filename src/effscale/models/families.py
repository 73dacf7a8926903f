"""Each model family as a config of the common Transformer.

There is one function per family. Its arguments are what differs between members; everything else is fixed by the
family. Dropout rates that are None default to ``dropout``.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, ParamSpec

from effscale.models.config import (
    Activation,
    AttentionConfig,
    BlockConfig,
    Group,
    HeadConfig,
    NormConfig,
    PatchInputs,
    TokenInputs,
    TransformerConfig,
)
from effscale.models.grouping import group_layers
from effscale.models.heads import ClassHead, LMHead
from effscale.models.mlp import MLPConfig
from effscale.models.positions import Alibi, LearnedPositions, Rotary
from effscale.models.rotary_scaling import RotaryScaling

Arguments = ParamSpec("Arguments")
Limit = tuple[Callable[[Any], bool], str]

_SIZE: Limit = (lambda size: size >= 1, "at least 1")
_RATE: Limit = (lambda rate: 0 <= rate < 1, "in [0, 1)")
# Arguments that are stored in fields with other names, so their errors would name what the user did not write.
_LIMITS: dict[str, Limit] = {
    "num_layers": _SIZE,
    "d_model": _SIZE,
    "num_heads": _SIZE,
    "max_length": _SIZE,
    "dropout": _RATE,
    "attention_dropout": _RATE,
    "embed_dropout": _RATE,
    "rotary_dim": (lambda dim: dim >= 2 and dim % 2 == 0, "an even number above 0, or None"),
    "rotary_fraction": (lambda fraction: 0 < fraction <= 1, "above 0 and at most 1"),
    "rotary_base": (lambda base: 0 < base < math.inf, "above 0"),
}


def _family(
    build: Callable[Arguments, TransformerConfig],
) -> Callable[Arguments, TransformerConfig]:
    """Make the function of a family report invalid values under the names of its own arguments."""

    @functools.wraps(build)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> TransformerConfig:
        for name, (holds, wanted) in _LIMITS.items():
            value: Any = kwargs.get(name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {wanted}, got {value!r}")
        return build(*args, **kwargs)

    return checked


def _or(rate: float | None, default: float) -> float:
    return default if rate is None else rate


@_family
def gpt2(
    *,
    num_layers: int,
    d_model: int,
    num_heads: int,
    vocab_size: int = 50257,
    max_length: int = 1024,
    d_ff: int | None = None,
    dropout: float = 0.0,
    attention_dropout: float | None = None,
    embed_dropout: float | None = None,
    activation: Activation = "gelu_tanh",
    epsilon: float = 1e-5,
    tied: bool = True,
    scale_attention: bool = True,
    scale_by_layer: bool = False,
) -> TransformerConfig:
    """Build a GPT-2 or GPT-3 config: pre-norm, learned positions, tied head.

    Without ``scale_attention``, scores are not divided by the square root of the head width. With ``scale_by_layer``, the
    scores of layer ``i`` are also divided by ``i + 1`` (``scale_attn_by_inverse_layer_idx`` of the Mistral GPT-2 models). The
    layers then differ and each is a separate group, so compile time grows with depth.

    References:
        Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
            https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
        Brown et al., "Language Models are Few-Shot Learners" (2020). https://arxiv.org/abs/2005.14165

    Example:
        >>> gpt2(num_layers=12, d_model=768, num_heads=12).num_layers
        12
    """
    norm = NormConfig(epsilon=epsilon)
    attention = AttentionConfig(
        num_heads=num_heads,
        scale=None if scale_attention else 1.0,
        dropout=_or(attention_dropout, dropout),
    )
    block = BlockConfig(
        attention=attention,
        feed_forward=MLPConfig(d_ff=4 * d_model if d_ff is None else d_ff, activation=activation),
        norm=norm,
        dropout=dropout,
    )
    groups = (Group(blocks=(block,), repeat=num_layers),)
    if scale_by_layer:
        scale = attention.width(d_model) ** -0.5 if scale_attention else 1.0
        unlike = (replace(attention, scale=scale / (i + 1)) for i in range(num_layers))
        groups = tuple(Group(blocks=(replace(block, attention=a),), repeat=1) for a in unlike)
    return TransformerConfig(
        d_model=d_model,
        groups=groups,
        inputs=TokenInputs(vocab_size=vocab_size, dropout=_or(embed_dropout, dropout)),
        positions=LearnedPositions(num=max_length),
        heads=(LMHead(tied=tied),),
        final_norm=norm,
    )


@_family
def opt(
    *,
    num_layers: int,
    d_model: int,
    num_heads: int,
    d_ff: int | None = None,
    vocab_size: int = 50272,
    max_length: int = 2048,
    d_embed: int | None = None,
    post_norm: bool = False,
    bias: bool = True,
    norm_affine: bool = True,
    activation: Activation = "relu",
    dropout: float = 0.0,
    attention_dropout: float | None = None,
    final_norm: bool = True,
    tied: bool = True,
) -> TransformerConfig:
    """Build an OPT config: pre-norm, ReLU, and positions that start at row 2; the 350M member is post-norm.

    A post-norm member has no final norm. Set ``final_norm=False`` for a pre-norm model without one, as in early conversions
    of the weights (``_remove_final_layer_norm``).

    References:
        Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (2022). https://arxiv.org/abs/2205.01068
    """
    norm = NormConfig(scale=norm_affine, bias=norm_affine)
    block = BlockConfig(
        attention=AttentionConfig(
            num_heads=num_heads, bias=bias, dropout=_or(attention_dropout, dropout)
        ),
        feed_forward=MLPConfig(
            d_ff=4 * d_model if d_ff is None else d_ff, activation=activation, bias=bias
        ),
        norm=norm,
        residual="post" if post_norm else "pre",
        dropout=dropout,
    )
    return TransformerConfig(
        d_model=d_model,
        groups=(Group(blocks=(block,), repeat=num_layers),),
        inputs=TokenInputs(vocab_size=vocab_size, d_embed=d_embed),
        positions=LearnedPositions(num=max_length, offset=2),
        heads=(LMHead(tied=tied),),
        final_norm=norm if final_norm and not post_norm else None,
    )


@_family
def bloom(
    *,
    num_layers: int,
    d_model: int,
    num_heads: int,
    vocab_size: int = 250880,
    normed_residual: bool = False,
    dropout: float = 0.0,
    attention_dropout: float | None = None,
    epsilon: float = 1e-5,
    tied: bool = True,
) -> TransformerConfig:
    """Build a BLOOM config: ALiBi, a norm after the embedding, tied head.

    References:
        Le Scao et al., "BLOOM: A 176B-Parameter Open-Access Multilingual Language Model" (2022), section 3.2.
            https://arxiv.org/abs/2211.05100
    """
    norm = NormConfig(epsilon=epsilon)
    block = BlockConfig(
        attention=AttentionConfig(num_heads=num_heads, dropout=_or(attention_dropout, dropout)),
        feed_forward=MLPConfig(d_ff=4 * d_model, activation="gelu_bloom"),
        norm=norm,
        residual="pre_normed" if normed_residual else "pre",
        dropout=dropout,
    )
    return TransformerConfig(
        d_model=d_model,
        groups=(Group(blocks=(block,), repeat=num_layers),),
        inputs=TokenInputs(vocab_size=vocab_size, norm=norm),
        positions=Alibi(),
        heads=(LMHead(tied=tied),),
        final_norm=norm,
    )


@_family
def gptj(
    *,
    num_layers: int,
    d_model: int,
    num_heads: int,
    rotary_dim: int | None = 64,
    d_ff: int | None = None,
    vocab_size: int = 50400,
    dropout: float = 0.0,
    attention_dropout: float | None = None,
    embed_dropout: float | None = None,
    activation: Activation = "gelu_tanh",
    epsilon: float = 1e-5,
    tied: bool = False,
) -> TransformerConfig:
    """Build a GPT-J config: parallel residual with one norm, interleaved rotary on part of each head, untied head with bias.

    References:
        Wang and Komatsuzaki, "GPT-J-6B: A 6 Billion Parameter Autoregressive Language Model" (2021).
            https://github.com/kingoflolz/mesh-transformer-jax
    """
    norm = NormConfig(epsilon=epsilon)
    block = BlockConfig(
        attention=AttentionConfig(
            num_heads=num_heads, bias=False, dropout=_or(attention_dropout, dropout)
        ),
        feed_forward=MLPConfig(d_ff=4 * d_model if d_ff is None else d_ff, activation=activation),
        norm=norm,
        residual="parallel_shared",
        dropout=dropout,
    )
    return TransformerConfig(
        d_model=d_model,
        groups=(Group(blocks=(block,), repeat=num_layers),),
        inputs=TokenInputs(vocab_size=vocab_size, dropout=_or(embed_dropout, dropout)),
        positions=Rotary(dim=rotary_dim, interleaved=True),
        heads=(LMHead(tied=tied, bias=True),),
        final_norm=norm,
    )


@_family
def neox(
    *,
    num_layers: int,
    d_model: int,
    num_heads: int,
    d_ff: int | None = None,
    vocab_size: int = 50432,
    rotary_fraction: float = 0.25,
    rotary_base: float = 10000.0,
    rotary_scaling: RotaryScaling | None = None,
    parallel: bool = True,
    bias: bool = True,
    dropout: float = 0.0,
    attention_dropout: float | None = None,
    activation: Activation = "gelu",
    epsilon: float = 1e-5,
    tied: bool = False,
) -> TransformerConfig:
    """Build a GPT-NeoX or Pythia config: parallel residual with two norms, half-split rotary on part of each head, untied head.

    References:
        Black et al., "GPT-NeoX-20B: An Open-Source Autoregressive Language Model" (2022), section 2.
            https://arxiv.org/abs/2204.06745
    """
    norm = NormConfig(epsilon=epsilon)
    attention = AttentionConfig(
        num_heads=num_heads, bias=bias, dropout=_or(attention_dropout, dropout)
    )
    rotary_dim = int(attention.width(d_model) * rotary_fraction)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(
            f"rotary_fraction must make an even number above 0 of the {d_model // num_heads} dimensions of a head, "
            f"got {rotary_fraction!r}, which makes {rotary_dim}"
        )
    block = BlockConfig(
        attention=attention,
        feed_forward=MLPConfig(d_ff=4 * d_model if d_ff is None else d_ff, activation=activation),
        norm=norm,
        residual="parallel" if parallel else "pre",
        dropout=dropout,
    )
    return TransformerConfig(
        d_model=d_model,
        groups=(Group(blocks=(block,), repeat=num_layers),),
        inputs=TokenInputs(vocab_size=vocab_size, dropout=dropout),
        positions=Rotary(dim=rotary_dim, base=rotary_base, scaling=rotary_scaling),
        heads=(LMHead(tied=tied),),
        final_norm=norm,
    )


@_family
def llama(
    *,
    num_layers: int,
    d_model: int,
    num_heads: int,
    d_ff: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int = 32000,
    rotary_base: float = 10000.0,
    rotary_scaling: RotaryScaling | None = None,
    epsilon: float = 1e-5,
    bias: bool = False,
    out_bias: bool | None = None,
    mlp_bias: bool = False,
    qk_norm: Literal["head", "all"] | None = None,
    window: int | tuple[int | None, ...] | None = None,
    activation: Activation = "silu",
    dropout: float = 0.0,
    attention_dropout: float | None = None,
    tied: bool = False,
) -> TransformerConfig:
    """Build a Llama config: RMS norms, rotary positions, SwiGLU, no biases, grouped queries in the larger models.

    Related families differ only in a few arguments:

    - Mistral: layers with a ``window``; a tuple sets it for each layer.
    - Qwen2: biases only in the query, key and value projections, ``bias=True, out_bias=False``.
    - Qwen3: each head of queries and keys is normalized, ``qk_norm="head"``.
    - OLMoE: all heads are normalized together, ``qk_norm="all"``.

    References:
        Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023). https://arxiv.org/abs/2302.13971
        Jiang et al., "Mistral 7B" (2023). https://arxiv.org/abs/2310.06825
        Yang et al., "Qwen2 Technical Report" (2024). https://arxiv.org/abs/2407.10671
        Muennighoff et al., "OLMoE: Open Mixture-of-Experts Language Models" (2024). https://arxiv.org/abs/2409.02060

    Example:
        >>> mistral = llama(num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, d_ff=14336, window=4096)
        >>> mistral.num_layers
        32
    """
    norm = NormConfig(kind="rms", epsilon=epsilon, bias=False)
    block = BlockConfig(
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            bias=bias,
            out_bias=out_bias,
            qk_norm=None if qk_norm is None else norm,
            qk_norm_over=qk_norm or "head",
            window=None if isinstance(window, tuple) else window,
            dropout=_or(attention_dropout, dropout),
        ),
        feed_forward=MLPConfig(d_ff=d_ff, activation=activation, gated=True, bias=mlp_bias),
        norm=norm,
        dropout=dropout,
    )
    if isinstance(window, tuple):
        if len(window) != num_layers:
            raise ValueError(
                f"window must have one entry for each of the {num_layers} layers, got {len(window)} entries"
            )
        of = {w: replace(block, attention=replace(block.attention, window=w)) for w in set(window)}
        groups = group_layers([of[w] for w in window])
    else:
        groups = (Group(blocks=(block,), repeat=num_layers),)
    return TransformerConfig(
        d_model=d_model,
        groups=groups,
        inputs=TokenInputs(vocab_size=vocab_size, dropout=dropout),
        positions=Rotary(base=rotary_base, scaling=rotary_scaling),
        heads=(LMHead(tied=tied),),
        final_norm=norm,
    )


@_family
def bert(
    *,
    num_layers: int,
    d_model: int,
    num_heads: int,
    d_ff: int | None = None,
    vocab_size: int = 30522,
    max_length: int = 512,
    type_vocab_size: int = 2,
    dropout: float = 0.0,
    attention_dropout: float | None = None,
    activation: Activation = "gelu",
    epsilon: float = 1e-12,
    pooler: bool = True,
    heads: tuple[HeadConfig, ...] = (),
) -> TransformerConfig:
    """Build a BERT config: a post-norm encoder; without heads it returns hidden states and the pooled vector.

    For pretraining, pass ``heads=bert_pretraining_heads()``; for classification,
    ``heads=(ClassHead(num_classes=n, pool="pooled"),)``.

    References:
        Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2018).
            https://arxiv.org/abs/1810.04805
    """
    norm = NormConfig(epsilon=epsilon)
    block = BlockConfig(
        attention=AttentionConfig(num_heads=num_heads, dropout=_or(attention_dropout, dropout)),
        feed_forward=MLPConfig(d_ff=4 * d_model if d_ff is None else d_ff, activation=activation),
        norm=norm,
        residual="post",
        dropout=dropout,
    )
    return TransformerConfig(
        d_model=d_model,
        groups=(Group(blocks=(block,), repeat=num_layers),),
        inputs=TokenInputs(
            vocab_size=vocab_size, type_vocab_size=type_vocab_size, norm=norm, dropout=dropout
        ),
        positions=LearnedPositions(num=max_length),
        heads=heads,
        causal=False,
        final_norm=None,
        pooler=pooler,
        scale_residual_init=False,
    )


def bert_pretraining_heads(
    *, activation: Activation = "gelu", epsilon: float = 1e-12, tied: bool = True
) -> tuple[HeadConfig, ...]:
    """Return BERT's two pretraining heads: masked words (``mlm``) and next sentence (``nsp``)."""
    norm = NormConfig(epsilon=epsilon)
    return (
        LMHead(name="mlm", tied=tied, bias=True, transform=activation, norm=norm),
        ClassHead(name="nsp", num_classes=2, pool="pooled"),
    )


@_family
def vit(
    *,
    num_layers: int,
    d_model: int,
    num_heads: int,
    d_ff: int | None = None,
    image_size: int = 224,
    patch_size: int = 16,
    channels: int = 3,
    num_classes: int | None = 1000,
    qkv_bias: bool = True,
    activation: Activation = "gelu",
    epsilon: float = 1e-12,
    pooler: bool = False,
    pooler_activation: Activation = "tanh",
    dropout: float = 0.0,
    attention_dropout: float | None = None,
) -> TransformerConfig:
    """Build a ViT config: a pre-norm encoder of image patches with a class token.

    References:
        Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale" (2020).
            https://arxiv.org/abs/2010.11929
    """
    norm = NormConfig(epsilon=epsilon)
    block = BlockConfig(
        attention=AttentionConfig(
            num_heads=num_heads,
            bias=qkv_bias,
            out_bias=True,
            dropout=_or(attention_dropout, dropout),
        ),
        feed_forward=MLPConfig(d_ff=4 * d_model if d_ff is None else d_ff, activation=activation),
        norm=norm,
        dropout=dropout,
    )
    inputs = PatchInputs(
        image_size=image_size, patch_size=patch_size, channels=channels, dropout=dropout
    )
    return TransformerConfig(
        d_model=d_model,
        groups=(Group(blocks=(block,), repeat=num_layers),),
        inputs=inputs,
        positions=LearnedPositions(num=inputs.num_tokens),
        heads=() if num_classes is None else (ClassHead(num_classes=num_classes),),
        causal=False,
        final_norm=norm,
        pooler=pooler,
        pooler_activation=pooler_activation,
        scale_residual_init=False,
    )

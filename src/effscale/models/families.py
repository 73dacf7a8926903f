"""Each family of models as a config of the one Transformer.

A function a family, with the arguments that its members differ in; whatever else is fixed by the family.
Dropouts that are None are as ``dropout``.
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
# Arguments that become fields of other names, whose errors would speak of what the user did not write.
_LIMITS: dict[str, Limit] = {
    "num_layers": _SIZE,
    "d_model": _SIZE,
    "num_heads": _SIZE,
    "max_length": _SIZE,
    "dropout": _RATE,
    "attention_dropout": _RATE,
    "embed_dropout": _RATE,
    "rotary_dim": (lambda dim: dim >= 2 and dim % 2 == 0, "an even number above 0, or None"),
    "rotary_fraction": (lambda fraction: 0 < fraction <= 1, "above 0, at most 1"),
    "rotary_base": (lambda base: 0 < base < math.inf, "above 0"),
}


def _family(
    build: Callable[Arguments, TransformerConfig],
) -> Callable[Arguments, TransformerConfig]:
    """A family's function that refuses impossible values under the names of its own arguments."""

    @functools.wraps(build)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> TransformerConfig:
        for name, (holds, wanted) in _LIMITS.items():
            value: Any = kwargs.get(name)
            if value is not None and not holds(value):
                raise ValueError(f"{name}={value!r}: must be {wanted}")
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
    """GPT-2 and GPT-3: pre-norm, learned positions, tied head (Radford et al., 2019; Brown et al., 2020).

    Without ``scale_attention`` scores are not divided by the root of a head's width. With ``scale_by_layer`` those of
    layer ``i`` are divided by ``i + 1`` as well (``scale_attn_by_inverse_layer_idx`` of the Mistral GPT-2s). Its layers
    are then unlike and each is a group of its own, so that compile time grows with depth.

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
    """OPT: pre-norm with ReLU and positions that begin at row 2; the 350M member is post-norm (Zhang et al., 2022).

    A post-norm member has no final norm; without ``final_norm`` a pre-norm one has none either, as early conversions
    of the weights (``_remove_final_layer_norm``).
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
    """BLOOM: ALiBi, a norm after the embedding, tied head (Le Scao et al., 2022, section 3.2)."""
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
    """GPT-J: parallel residual with one norm, interleaved rotary on part of each head, untied head with a bias.

    Source: Wang and Komatsuzaki, "GPT-J-6B", 2021.
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
    """GPT-NeoX and Pythia: parallel residual with two norms, half-split rotary on part of each head, untied head.

    Source: Black et al., "GPT-NeoX-20B", 2022, section 2.
    """
    norm = NormConfig(epsilon=epsilon)
    attention = AttentionConfig(
        num_heads=num_heads, bias=bias, dropout=_or(attention_dropout, dropout)
    )
    rotary_dim = int(attention.width(d_model) * rotary_fraction)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(
            f"rotary_fraction={rotary_fraction!r}: must make an even number above 0 of the {d_model // num_heads} "
            f"dimensions of a head, not {rotary_dim}"
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
    """Llama: RMS norms, rotary positions, SwiGLU, no biases, grouped queries in the larger ones (Touvron et al., 2023).

    Its relatives differ in little. Mistral's layers have a ``window`` (Jiang et al., 2023); a tuple gives each layer its own.
    Qwen2 has biases at query, key and value alone: ``bias=True, out_bias=False`` (Yang et al., 2024). Qwen3 normalizes each head
    of queries and keys, ``qk_norm="head"``, and OLMoE all heads together, ``qk_norm="all"`` (Muennighoff et al., 2024).

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
                f"window has {len(window)} entries: must have one for each of {num_layers} layers"
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
    """BERT: a post-norm encoder; without heads it gives hidden states and the pooled vector (Devlin et al., 2018).

    For pretraining, ``heads=bert_pretraining_heads()``; for classes, ``heads=(ClassHead(num_classes=n, pool="pooled"),)``.
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
    """BERT's two: masked words (``mlm``) and next sentence (``nsp``)."""
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
    """ViT: a pre-norm encoder of image patches with a class token (Dosovitskiy et al., 2020)."""
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

"""Models that ``effscale.plan`` knows by name, with their training losses."""

import dataclasses
from collections.abc import Callable
from typing import Any

from effscale.models import PRESETS, LMHead, MLPConfig, NormConfig, TransformerConfig, bert, preset
from effscale.options import did_you_mean


def _bert(num_layers: int, d_model: int, num_heads: int) -> TransformerConfig:
    """Return a BERT with the masked-token head of its pretraining."""
    return bert(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        vocab_size=30522,
        max_length=512,
        pooler=False,
        heads=(LMHead(name="mlm", bias=True, transform="gelu", norm=NormConfig(epsilon=1e-12)),),
    )


def _with_128_experts() -> TransformerConfig:
    """Return 1.3B+MoE-128: 128 experts in every second layer, 52 billion parameters (Rajbhandari et al., 2022, table 1)."""
    from effscale.moe import MoEConfig, with_experts

    dense = preset("gpt3-1.3b")
    expert = dense.blocks[0].feed_forward
    assert isinstance(expert, MLPConfig)
    return with_experts(dense, MoEConfig(num_experts=128, expert=expert))


MODELS: dict[str, Callable[[], TransformerConfig]] = {
    "bloom-176b": PRESETS["bloom"],
    "gpt3-1.3b-moe-128": _with_128_experts,
    "bert-base": lambda: _bert(12, 768, 12),
    "bert-large": lambda: _bert(24, 1024, 16),
}
"""Models in addition to those of ``effscale.models.PRESETS``, or replacing them."""


def known_model(name: str) -> TransformerConfig:
    """Return the config of a model.

    Args:
        name: A name in ``MODELS`` or in ``effscale.models.PRESETS``.

    Raises:
        ValueError: The model is unknown, or it is not a text model.

    Example:
        >>> known_model("bert-large").heads[0].name, known_model("gpt3-1.3b").heads[0].name
        ('mlm', 'lm')
    """
    known = {**PRESETS, **MODELS}
    if name not in known:
        raise ValueError(f"model={name!r}: {did_you_mean(name, known)}")
    config = known[name]()
    if not any(head.name in ("lm", "mlm") for head in config.heads):
        raise ValueError(
            f"model must be a text model that predicts tokens, such as bloom-176b, gpt3-1.3b or bert-large, got {name!r}"
        )
    return config


def num_experts(config: TransformerConfig) -> tuple[int, ...]:
    """Return the distinct numbers of experts of a model's layers; empty for a dense model."""
    found = {getattr(block.feed_forward, "num_experts", None) for block in config.layers}
    return tuple(sorted(count for count in found if count is not None))


def loss_of(config: TransformerConfig) -> Callable[..., Any]:
    """Return the loss: of the next token, or of masked tokens if the model is bidirectional."""
    from effscale.training import masked_token_loss, next_token_loss

    return next_token_loss if config.causal else masked_token_loss


def check_mesh(name: str, config: TransformerConfig, sizes: dict[str, int]) -> None:
    """Raise if a mesh does not divide a model; otherwise its arrays would silently be replicated.

    Args:
        name: Name of the model.
        config: The model.
        sizes: Sizes of the mesh by axis.

    Raises:
        ValueError: A mesh axis does not divide a size of the model; the message names both.

    Example:
        >>> check_mesh("gpt2", known_model("gpt2"), {"fsdp": 8, "expert": 1, "tensor": 4})
    """
    parts = [("fsdp", config.d_model, "width")]
    for block in config.layers:
        inner = getattr(block.feed_forward, "expert", block.feed_forward)
        parts.append(("tensor", block.attention.num_heads, "heads"))
        parts.append(("tensor", getattr(inner, "d_ff", 0), "inner width"))
    parts += [("expert", count, "experts") for count in num_experts(config)]
    for axis, size, what in dict.fromkeys(parts):
        if size % sizes[axis]:
            mesh = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise ValueError(
                f"the mesh ({mesh}) does not divide the model {name}: its {what} of {size} is not a multiple of {axis}={sizes[axis]}, "
                "so each chip would hold all of it. Change the size of one of the axes"
            )


def computing(config: TransformerConfig, **changes: Any) -> TransformerConfig:
    """Return the model with the training settings used here, computing in bfloat16."""
    return dataclasses.replace(config, dtype="bfloat16", **changes)

"""What a training step costs when layers drop tokens: layer tokens and floating-point operations."""

from effscale.ltd.layers import dropping_layers
from effscale.models import BlockConfig, LMHead, PatchInputs, TransformerConfig
from effscale.models.attention import CAUSAL_BLOCKS, MIN_CAUSAL_BLOCK


def layer_token_average(length: int, kept: int, num_layers: int, num_ltd_layers: int) -> int:
    r"""Tokens of a row that a layer processes on average, rounded down.

    $$\lfloor (S (L - L_{ltd}) + r L_{ltd}) / L \rfloor$$

    Args:
        length: Tokens of the row, as the batch has it.
        kept: Tokens that dropping layers keep; ``length`` or more: all.
        num_layers: Layers of the model.
        num_ltd_layers: Layers that drop tokens.

    Returns:
        The average.

    Source: Li et al., "DeepSpeed Data Efficiency", 2022, section 3.2; rounded as Megatron-DeepSpeed counts.

    Example:
        >>> layer_token_average(2048, 128, 24, 22)
        288
    """
    kept = min(kept, length)
    return (length * (num_layers - num_ltd_layers) + kept * num_ltd_layers) // num_layers


def training_flops(
    config: TransformerConfig,
    length: int,
    kept: int | None = None,
    layers: tuple[int, ...] | None = None,
) -> int:
    """Floating-point operations of a row's forward and backward pass.

    Counted are matrix products, a multiplication and an addition as two: projections, feed-forward, attention scores and
    mixing, the embedding of patches, the projections of a narrower embedding, and heads over the vocabulary at every
    token. The backward pass counts twice the forward pass. Causal attention counts the scores that the model computes,
    masked ones included. Softmax, norms, activations, products on one vector per row, and what is computed again to
    save memory are not counted.

    Args:
        config: The model's. A feed-forward config of your own needs the method ``multiplications(d_model)`` that
            :class:`effscale.models.MLPConfig` has: those of one token's forward pass.
        length: Tokens of a row.
        kept: Tokens that dropping layers keep; None: no layer drops.
        layers: Numbers of the layers that drop tokens; None: all but the first and the last.

    Returns:
        Operations.

    Raises:
        ValueError: A feed-forward's operations are not known; or see :func:`effscale.ltd.dropping_layers`.

    Example:
        >>> from effscale.models import preset
        >>> config = preset("gpt3-1.3b")
        >>> round(1 - training_flops(config, 2048, kept=1024) / training_flops(config, 2048), 3)
        0.446
    """
    dropping = () if kept is None else dropping_layers(config, layers)
    blocks = [b for group in config.groups for _ in range(group.repeat) for b in group.blocks]
    products = _ends(config, length)
    for number, block in enumerate(blocks):
        tokens = length if kept is None or number not in dropping else min(kept, length)
        products += _layer(block, config.d_model, tokens, config.causal)
    return 3 * 2 * products


def _layer(block: BlockConfig, d_model: int, tokens: int, causal: bool) -> int:
    """Multiplications of a layer's forward pass."""
    attention, feed_forward = block.attention, block.feed_forward
    counted = getattr(feed_forward, "multiplications", None)
    if counted is None:
        raise ValueError(
            f"feed_forward is a {type(feed_forward).__name__}, whose operations are not known: give it a method "
            "multiplications(d_model), those of one token's forward pass"
        )
    width = attention.width(d_model)
    projections = 2 * d_model * width * (attention.num_heads + attention.kv_heads)
    scores_and_mixing = 2 * attention.num_heads * width * _scores(tokens, causal)
    return tokens * (projections + counted(d_model)) + scores_and_mixing


def _scores(tokens: int, causal: bool) -> int:
    """Scores that a head computes: causal ones in blocks of queries, each against the keys up to its end."""
    if causal and tokens % CAUSAL_BLOCKS == 0 and tokens >= CAUSAL_BLOCKS * MIN_CAUSAL_BLOCK:
        return tokens**2 * (CAUSAL_BLOCKS + 1) // (2 * CAUSAL_BLOCKS)
    return tokens**2


def _ends(config: TransformerConfig, length: int) -> int:
    """Multiplications before the first layer and after the last."""
    inputs = config.inputs
    if isinstance(inputs, PatchInputs):
        return (length - 1) * inputs.patch_size**2 * inputs.channels * config.d_model
    width = config.hidden_width
    products = 0 if inputs.d_embed is None else 2 * length * width * config.d_model
    for head in config.heads:
        if isinstance(head, LMHead):
            transform = 0 if head.transform is None else width
            products += length * width * (inputs.vocab_size + transform)
    return products

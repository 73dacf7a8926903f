"""The cost of a training step when layers drop tokens: layer tokens and floating-point operations."""

from effscale.ltd.layers import dropping_layers
from effscale.models import BlockConfig, LMHead, PatchInputs, TransformerConfig
from effscale.models.attention import CAUSAL_BLOCKS, MIN_CAUSAL_BLOCK
from effscale.models.config import CountsOperations


def layer_token_average(length: int, kept: int, num_layers: int, num_ltd_layers: int) -> int:
    r"""Return the average number of tokens of a row that a layer processes, rounded down.

    $$\lfloor (S (L - L_{ltd}) + r L_{ltd}) / L \rfloor$$

    Args:
        length: The number of tokens of the row in the batch.
        kept: The number of tokens that dropping layers keep; ``length`` or more means all.
        num_layers: The number of layers of the model.
        num_ltd_layers: The number of layers that drop tokens.

    Returns:
        The average.

    References:
        Li et al., "DeepSpeed Data Efficiency" (2022), section 3.2; rounded as in Megatron-DeepSpeed.
            https://arxiv.org/abs/2212.03597

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
    """Return the floating-point operations of the forward and backward pass of a row.

    Matrix products are counted, with a multiplication and an addition as two operations: projections, feed-forward, attention
    scores and mixing, the embedding of patches, the projections of a narrower embedding, and heads over the vocabulary at every
    token. The backward pass counts twice the forward pass. Causal attention counts the scores that the model computes,
    including masked ones. Softmax, norms, activations, products on one vector per row, and recomputation to
    save memory are not counted.

    Args:
        config: The config of the model. A custom feed-forward config needs a method ``multiplications(d_model)`` like that of
            ``effscale.models.MLPConfig``: the multiplications of one token's forward pass.
        length: The number of tokens in a row.
        kept: The number of tokens that dropping layers keep; None means that no layer drops tokens.
        layers: The numbers of the layers that drop tokens; None means all except the first and the last.

    Returns:
        The number of operations.

    Raises:
        ValueError: The operations of a feed-forward are unknown, or as for ``effscale.ltd.dropping_layers``.

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
    """Return the multiplications of a layer's forward pass."""
    attention, feed_forward = block.attention, block.feed_forward
    if not isinstance(feed_forward, CountsOperations):
        raise ValueError(
            f"the operations of feed_forward are unknown, got a {type(feed_forward).__name__}. Add a method "
            "multiplications(d_model) that returns those of one token's forward pass."
        )
    width = attention.width(d_model)
    projections = 2 * d_model * width * (attention.num_heads + attention.kv_heads)
    scores_and_mixing = 2 * attention.num_heads * width * _scores(tokens, causal)
    return tokens * (projections + feed_forward.multiplications(d_model)) + scores_and_mixing


def _scores(tokens: int, causal: bool) -> int:
    """Return the scores that a head computes. Causal ones are computed in blocks of queries, each against the keys up to its end."""
    if causal and tokens % CAUSAL_BLOCKS == 0 and tokens >= CAUSAL_BLOCKS * MIN_CAUSAL_BLOCK:
        return tokens**2 * (CAUSAL_BLOCKS + 1) // (2 * CAUSAL_BLOCKS)
    return tokens**2


def _ends(config: TransformerConfig, length: int) -> int:
    """Return the multiplications before the first layer and after the last."""
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

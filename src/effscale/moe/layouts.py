"""Place experts in the layers of a model: in every second layer, or as a pyramid."""

import dataclasses
from collections.abc import Sequence

from effscale.models import TransformerConfig, group_layers
from effscale.moe.layer import MoEConfig


def with_experts(
    config: TransformerConfig,
    moe: MoEConfig,
    num_experts: Sequence[int] | None = None,
    *,
    every: int = 2,
) -> TransformerConfig:
    """Return the config with a mixture of experts in every second layer.

    Args:
        config: A model without experts.
        moe: The mixture.
        num_experts: The number of experts in each layer that has them, first to last, for instance of a pyramid:
            ``[32] * 10 + [64] * 2`` for the 12 of 24 layers of 350M+PR-MoE-32/64. A 0 leaves a layer unchanged. None means
            ``moe.num_experts`` in each.
        every: Layers ``every``, ``2 * every``, ..., counted from 1, have experts; 1 means all.

    Returns:
        The config. Layers that alternate regularly form one group, whose compile time does not grow with their number.

    Raises:
        ValueError: The length of ``num_experts`` differs from the number of layers with experts.

    References:
        Rajbhandari et al., "DeepSpeed-MoE" (2022), section 4.1 (PR-MoE: ``shared`` in the config makes the residual part).
            https://arxiv.org/abs/2201.05596

    Example:
        >>> from effscale.models import MLPConfig, gpt2
        >>> from effscale.moe import MoEConfig
        >>> dense = gpt2(num_layers=6, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> expert = MLPConfig(d_ff=64)
        >>> pyramid = with_experts(dense, MoEConfig(num_experts=4, expert=expert, shared=expert), [4, 4, 8])
        >>> [getattr(block.feed_forward, "num_experts", 0) for block in pyramid.layers]
        [0, 4, 0, 4, 0, 8]
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    blocks = list(config.layers)
    places = range(every - 1, len(blocks), every)
    counts = [moe.num_experts] * len(places) if num_experts is None else list(num_experts)
    if len(counts) != len(places):
        raise ValueError(
            f"num_experts must have one entry for each of the {len(places)} layers with experts (every={every}, {len(blocks)} layers), got {len(counts)}"
        )
    for place, count in zip(places, counts, strict=True):
        if count:
            mixture = dataclasses.replace(moe, num_experts=count)
            blocks[place] = dataclasses.replace(blocks[place], feed_forward=mixture)
    return dataclasses.replace(config, groups=group_layers(blocks))

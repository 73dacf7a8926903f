"""Give the layers of a model experts: in every second layer, as a pyramid, or as copies of a trained feed-forward."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effscale.models import Transformer, TransformerConfig, take_layers
from effscale.models.grouping import group_layers
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


def upcycle(
    model: Transformer,
    moe: MoEConfig,
    num_experts: Sequence[int] | None = None,
    *,
    every: int = 2,
    rngs: nnx.Rngs,
) -> Transformer:
    """Create a mixture from a trained dense model: experts and the shared part are copies of its feed-forward, routers are new.

    The new model computes the same as the old one, so that training continues from there, if three conditions hold: the
    weights of a token sum to 1 (``normalize`` of ``kept`` or ``chosen``, so k of 2 or more), nothing is dropped, and
    there is no shared part or a ``weighted`` one. With k = 1 the experts' outputs are multiplied by a probability, from
    which the model has to recover.

    Args:
        model: A model without experts in the layers that will get them.
        moe: The mixture; its ``expert`` must be the model's feed-forward, and ``shared`` the same or None.
        num_experts: As in ``effscale.moe.with_experts``.
        every: As in ``effscale.moe.with_experts``.
        rngs: The source of the routers' weights.

    Returns:
        The new model, which shares everything except the layers with experts with the old one.

    Raises:
        ValueError: The config of the expert differs from the model's feed-forward.

    References:
        Komatsuzaki et al., "Sparse Upcycling" (2022). https://arxiv.org/abs/2212.05055

    Example:
        >>> from effscale.models import gpt2
        >>> from effscale.moe import RouterConfig
        >>> dense = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> model = Transformer(dense, rngs=nnx.Rngs(0))
        >>> router = RouterConfig(k=2, capacity_factor=None, eval_capacity_factor=None)
        >>> moe = MoEConfig(num_experts=4, expert=dense.blocks[0].feed_forward, router=router)
        >>> sparse = upcycle(model, moe, rngs=nnx.Rngs(1))
        >>> ids = jnp.arange(8, dtype=jnp.int32)[None]
        >>> bool(jnp.allclose(sparse(ids), model(ids), atol=1e-5))
        True
    """
    config = with_experts(model.config, moe, num_experts, every=every)
    new = Transformer(config, rngs=rngs)
    first = 0
    for group, stacked in zip(config.groups, new.groups, strict=True):
        width = len(group.blocks)
        for place, (block, target) in enumerate(zip(group.blocks, stacked.blocks, strict=True)):
            numbers = [first + place + width * turn for turn in range(group.repeat)]
            source = take_layers(model, numbers)
            (kind,), (old,) = source.config.groups[0].blocks, source.groups[0].blocks
            trained = old.feed_forward
            if isinstance(block.feed_forward, MoEConfig):
                _check(block.feed_forward, kind.feed_forward, numbers)
                experts = block.feed_forward.num_experts
                mixture: Any = target.feed_forward
                repeat = lambda a, n=experts: jnp.repeat(a[:, None], n, axis=1)
                mixture.experts = _filled(mixture.experts, jax.tree.map(repeat, trained))
                if mixture.shared is not None:
                    mixture.shared = _filled(mixture.shared, trained)
                old.feed_forward = mixture
            stacked.blocks[place] = old
        first += width * group.repeat
    for name in ("embed", "final_norm", "pooler", "heads"):
        setattr(new, name, getattr(model, name))
    return new


def _filled(module: Any, values: Any) -> Any:
    """Return the module with other arrays and its own metadata."""
    return jax.tree.unflatten(jax.tree.structure(module), jax.tree.leaves(values))


def _check(moe: MoEConfig, own: Any, numbers: Sequence[int]) -> None:
    for name, part in (("expert", moe.expert), ("shared", moe.shared)):
        if part is not None and part != own:
            raise ValueError(
                f"MoEConfig.{name} must be the feed-forward of layers {list(numbers)}, {own}, got {part}"
            )

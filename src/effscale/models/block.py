"""A layer, and a stacked group of like layers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from effscale.models.attention import Attention, LayerCache
from effscale.models.config import BlockConfig, Group, Remat, TransformerConfig
from effscale.models.context import Context
from effscale.models.layers import dropout
from effscale.parallel import constrain

Report = dict[str, Array]


class Block(nnx.Module):
    """Attention and feed-forward around a residual stream, arranged as ``config.residual`` says."""

    def __init__(self, config: BlockConfig, model: TransformerConfig, *, rngs: nnx.Rngs):
        std = model.init_std
        out_std = std * (2 * model.num_layers) ** -0.5 if model.scale_residual_init else std
        parts = {"std": std, "out_std": out_std, "rngs": rngs}
        self.attention_norm = config.norm.build(model.d_model)
        self.attention = Attention(
            config.attention, model.d_model, positions=model.positions, **parts
        )
        self.feed_forward_norm = (
            None if config.residual == "parallel_shared" else config.norm.build(model.d_model)
        )
        self.feed_forward = config.feed_forward.build(model.d_model, **parts)
        self.residual = config.residual
        self.dropout = config.dropout

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        context: Context,
        cache: LayerCache | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], LayerCache | None, Report]:
        """The stream after this layer, the layer's updated cache, and what the feed-forward reports."""
        keys = (None,) * 4 if key is None else tuple(jax.random.split(key, 4))
        drop = partial(dropout, rate=self.dropout)

        def attend(y):
            y, new_cache = self.attention(y, context, cache, keys[0])
            return drop(y, key=keys[1]), new_cache

        def feed(y):
            y, report = self.feed_forward(y, keys[2])
            return drop(y, key=keys[3]), report

        norm_1 = self.attention_norm
        norm_2 = norm_1 if self.feed_forward_norm is None else self.feed_forward_norm
        if self.residual == "post":
            y, cache = attend(x)
            x = norm_1(x + y)
            y, report = feed(x)
            x = norm_2(x + y)
        elif self.residual in ("parallel", "parallel_shared"):
            normed = norm_1(x)
            y, cache = attend(normed)
            z, report = feed(normed if norm_2 is norm_1 else norm_2(x))
            x = x + y + z
        else:
            normed = norm_1(x)
            y, cache = attend(normed)
            x = (normed if self.residual == "pre_normed" else x) + y
            normed = norm_2(x)
            y, report = feed(normed)
            x = (normed if self.residual == "pre_normed" else x) + y
        return constrain(x, "batch", "seq", "embed_act"), cache, report


class BlockGroup(nnx.Module):
    """Like layers with their parameters stacked, run by one scan: compile time does not grow with their number."""

    def __init__(self, config: Group, model: TransformerConfig, *, rngs: nnx.Rngs):
        def stack(block: BlockConfig) -> Block:
            return jax.vmap(lambda r: Block(block, model, rngs=r))(rngs.split(config.repeat))

        self.blocks = nnx.List([stack(block) for block in config.blocks])
        self.repeat = config.repeat
        self.remat = model.remat

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        context: Context,
        cache: tuple[LayerCache, ...] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[
        Float[Array, "batch seq d_model"], tuple[LayerCache, ...] | None, tuple[Report, ...]
    ]:
        """Runs all layers of the group.

        Args:
            x: The residual stream.
            context: Positions and masks.
            cache: Keys and values of each layer, in order; or None. With a cache the layers run one by one rather
                than in a loop, so that each layer's arrays are updated in place.
            key: For dropout; None: no dropout.

        Returns:
            The stream, the updated cache, and each block's reports with a leading layer dimension.
        """

        def layer(x, scanned):
            blocks, layer_key, caches = scanned
            new, reports = [], []
            for i, block in enumerate(blocks):
                block_key = None if layer_key is None else jax.random.fold_in(layer_key, i)
                x, block_cache, report = block(
                    x, context, None if caches is None else caches[i], block_key
                )
                new.append(block_cache)
                reports.append(report)
            return x, (None if caches is None else tuple(new), tuple(reports))

        keys = None if key is None else jax.random.split(key, self.repeat)
        layer = rematerialize(layer, self.remat, prevent_cse=self.repeat == 1)
        if cache is None and self.repeat > 1:
            x, (_, reports) = jax.lax.scan(layer, x, (self.blocks, keys, None))
            return x, None, reports
        new, reports, width = [], [], len(self.blocks)
        for index in range(self.repeat):
            blocks, layer_key = jax.tree.map(lambda a, index=index: a[index], (self.blocks, keys))
            caches = None if cache is None else cache[index * width : (index + 1) * width]
            x, (caches, report) = layer(x, (blocks, layer_key, caches))
            new.extend(caches or ())
            reports.append(report)
        return (
            x,
            None if cache is None else tuple(new),
            jax.tree.map(lambda *r: jnp.stack(r), *reports),
        )


def rematerialize(function: Any, remat: Remat, *, prevent_cse: bool = True) -> Any:
    """``function`` with a backward pass that computes anew what the policy does not keep.

    Args:
        function: Any function of arrays.
        remat: The policy; see :class:`TransformerConfig`.
        prevent_cse: Whether to keep the compiler from merging both computations again, which inside a scan it
            cannot do anyway.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return function
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_saveable,
        "dots_no_batch": policies.dots_with_no_batch_dims_saveable,
    }[remat]
    return jax.checkpoint(function, policy=policy, prevent_cse=prevent_cse)


def unstack(blocks: Any, index: int) -> Any:
    """Layer ``index`` of stacked modules or arrays, still with a leading dimension, of 1."""
    return jax.tree.map(lambda a: jnp.asarray(a[index : index + 1]), blocks)

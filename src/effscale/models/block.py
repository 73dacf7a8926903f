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
        self.attention = Attention(config.attention, model.d_model, positions=model.positions, **parts)
        self.feed_forward_norm = None if config.residual == "parallel_shared" else config.norm.build(model.d_model)
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

        norm_1, norm_2 = self.attention_norm, self.feed_forward_norm
        if self.residual == "post":
            y, cache = attend(x)
            x = norm_1(x + y)
            y, report = feed(x)
            x = norm_2(x + y)
        elif self.residual in ("parallel", "parallel_shared"):
            normed = norm_1(x)
            y, cache = attend(normed)
            z, report = feed(normed if norm_2 is None else norm_2(x))
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
        cache: Any = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], Any, tuple[Report, ...]]:
        """Runs all layers of the group.

        Args:
            x: The residual stream.
            context: Positions and masks.
            cache: For each block of the group, keys and values with a leading layer dimension; or None.
            key: For dropout; None: no dropout.

        Returns:
            The stream, the updated cache, and each block's reports with a leading layer dimension.
        """

        def layer(x, scanned):
            blocks, caches, layer_key = scanned
            new, reports = [], []
            for i, block in enumerate(blocks):
                block_key = None if layer_key is None else jax.random.fold_in(layer_key, i)
                x, block_cache, report = block(x, context, None if caches is None else caches[i], block_key)
                new.append(block_cache)
                reports.append(report)
            return x, (None if caches is None else tuple(new), tuple(reports))

        keys = None if key is None else jax.random.split(key, self.repeat)
        scanned = (self.blocks, cache, keys)
        layer = rematerialize(layer, self.remat)
        if self.repeat == 1:  # no loop: a cache is then updated in place
            x, out = layer(x, jax.tree.map(lambda a: a[0], scanned))
            cache, reports = jax.tree.map(lambda a: a[None], out)
        else:
            x, (cache, reports) = jax.lax.scan(layer, x, scanned)
        return x, cache, reports


def rematerialize(function: Any, remat: Remat) -> Any:
    """``function`` with a backward pass that computes anew what the policy does not keep."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return function
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_saveable,
        "dots_no_batch": policies.dots_with_no_batch_dims_saveable,
    }[remat]
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


def unstack(blocks: Any, index: int) -> Any:
    """Layer ``index`` of stacked modules or arrays, still with a leading dimension, of 1."""
    return jax.tree.map(lambda a: jnp.asarray(a[index : index + 1]), blocks)

"""A transformer block, and a stacked group of identical blocks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from effscale.models.attention import Attention, LayerCache
from effscale.models.config import BlockConfig, Group, Remat, TransformerConfig
from effscale.models.context import Context
from effscale.models.layers import dropout
from effscale.parallel import constrain

Report = dict[str, Array]
RunBlock = Callable[..., tuple[Array, LayerCache | None, Report]]


class Block(nnx.Module):
    """Attention and feed-forward around a residual stream, arranged as ``config.residual`` specifies."""

    def __init__(self, config: BlockConfig, model: TransformerConfig, *, rngs: nnx.Rngs):
        std = model.init_std
        out_std = std * (2 * model.num_layers) ** -0.5 if model.scale_residual_init else std
        parts = {"std": std, "out_std": out_std, "rngs": rngs}
        self.attention_norm = config.norm.build(model.d_model)
        self.attention = Attention(
            config.attention,
            model.d_model,
            positions=model.positions,
            implementation=model.attention_implementation,
            **parts,
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
        """Return the residual stream after this layer, the layer's updated cache, and the reports of its parts."""
        keys = (None,) * 4 if key is None else tuple(jax.random.split(key, 4))
        drop = partial(dropout, rate=self.dropout)

        report: Report = {}

        def point(name, y):
            y = checkpoint_name(y, name)
            report.update(context.captured(**{name: y}))
            return y

        def attend(y):
            y = point("attention_in", y)
            y, new_cache, found = self.attention(y, context, cache, keys[0])
            report.update(found)
            return drop(point("attention_out", y), key=keys[1]), new_cache

        def feed(y):
            y, found = self.feed_forward(point("feed_forward_in", y), context, keys[2])
            report.update(found)
            return drop(point("feed_forward_out", y), key=keys[3])

        x = point("layer_in", x)
        norm_1 = self.attention_norm
        norm_2 = norm_1 if self.feed_forward_norm is None else self.feed_forward_norm
        if self.residual == "post":
            y, cache = attend(x)
            x = norm_1(x + y)
            x = norm_2(x + feed(x))
        elif self.residual in ("parallel", "parallel_shared"):
            normed = norm_1(x)
            y, cache = attend(normed)
            z = feed(normed if norm_2 is norm_1 else norm_2(x))
            x = x + y + z
        else:
            normed = norm_1(x)
            y, cache = attend(normed)
            x = (normed if self.residual == "pre_normed" else x) + y
            normed = norm_2(x)
            x = (normed if self.residual == "pre_normed" else x) + feed(normed)
        x = point("layer_out", constrain(x, "batch", "seq", "embed_act"))
        return x, cache, report


class BlockGroup(nnx.Module):
    """Identical layers with stacked parameters, run by one scan: compile time does not grow with their number."""

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
        """Run all layers of the group.

        Args:
            x: The residual stream.
            context: Positions and masks.
            cache: Keys and values of each layer, in order; or None. With a cache, the layers run one by one instead of
                in a loop, so that each layer's arrays are updated in place.
            key: Key for dropout; None disables dropout.

        Returns:
            The residual stream, the updated cache, and the reports of each block with a leading layer dimension.
        """

        def run_block(block, x, cache, key, _):
            return block(x, context, cache, key)

        return self.run(run_block, x, cache, key)

    def run(
        self,
        run_block: RunBlock,
        x: Float[Array, "batch seq d_model"],
        cache: tuple[LayerCache, ...] | None = None,
        key: PRNGKeyArray | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
        inputs: tuple[Any, ...] | None = None,
    ) -> tuple[
        Float[Array, "batch seq d_model"], tuple[LayerCache, ...] | None, tuple[Report, ...]
    ]:
        """Run a range of the group's repetitions, calling ``run_block`` for each block.

        Args:
            run_block: Maps ``(block, x, cache, key, input)`` to ``(x, cache, report)``, like ``Block`` itself with a context.
            x: The residual stream.
            cache: Keys and values of the layers in the range, in order; or None.
            key: Key for dropout; None disables dropout. The key of a layer does not depend on the range.
            start: The first repetition.
            stop: One past the last repetition; None runs to the end.
            inputs: For each block, what ``run_block`` receives as ``input``: arrays with a leading dimension over the
                repetitions of the range, or None.

        Returns:
            The same as ``__call__``.
        """
        stop = self.repeat if stop is None else stop
        depth, width = stop - start, len(self.blocks)
        inputs = (None,) * width if inputs is None else inputs

        def layer(x, scanned):
            blocks, layer_key, caches, inputs = scanned
            new, reports = [], []
            for i, block in enumerate(blocks):
                block_key = None if layer_key is None else jax.random.fold_in(layer_key, i)
                x, block_cache, report = run_block(
                    block, x, None if caches is None else caches[i], block_key, inputs[i]
                )
                new.append(block_cache)
                reports.append(report)
            return x, (None if caches is None else tuple(new), tuple(reports))

        blocks, keys = self.blocks, None if key is None else jax.random.split(key, self.repeat)
        if depth < self.repeat:
            blocks, keys = jax.tree.map(lambda a: a[start:stop], (blocks, keys))
        layer = rematerialize(layer, self.remat, prevent_cse=depth == 1)
        if cache is None and depth > 1:
            x, (_, reports) = jax.lax.scan(layer, x, (blocks, keys, None, inputs))
            return x, None, reports
        new, reports = [], []
        for index in range(depth):
            one = jax.tree.map(lambda a, index=index: a[index], (blocks, keys, inputs))
            caches = None if cache is None else cache[index * width : (index + 1) * width]
            x, (caches, report) = layer(x, (one[0], one[1], caches, one[2]))
            new.extend(caches or ())
            reports.append(report)
        return (
            x,
            None if cache is None else tuple(new),
            jax.tree.map(lambda *r: jnp.stack(r), *reports),
        )


def rematerialize(
    function: Any, remat: Remat | tuple[str, ...], *, prevent_cse: bool = True
) -> Any:
    """Return ``function`` with a backward pass that recomputes what the policy does not keep.

    Args:
        function: Any function of arrays.
        remat: The policy, or the points to keep; see ``effscale.models.TransformerConfig``.
        prevent_cse: Whether to keep the compiler from merging the two computations again. Inside a scan it cannot
            do so anyway.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return function
    if isinstance(remat, tuple):
        policy = policies.save_only_these_names(*remat)
    else:
        policy = {
            "full": policies.nothing_saveable,
            "dots": policies.dots_saveable,
            "dots_no_batch": policies.dots_with_no_batch_dims_saveable,
        }[remat]
    return jax.checkpoint(function, policy=policy, prevent_cse=prevent_cse)

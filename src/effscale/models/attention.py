"""Multi-head attention with grouped queries, rotary or ALiBi positions, masks and a cache."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effscale.models.config import AttentionConfig, AttentionImplementation
from effscale.models.context import Context
from effscale.models.layers import Dense, dropout
from effscale.models.positions import Alibi, Positions, Rotary, alibi_slopes, rotate
from effscale.models.weights import matmuls
from effscale.parallel import constrain
from effscale.parallel.rules import current_rules
from kernels_pallas import attention
from kernels_pallas.attention import Alibi as AlibiBias
from kernels_pallas.dispatch import Unsupported

LayerCache = tuple[
    Float[Array, "batch kv_heads keys head_dim"], Float[Array, "batch kv_heads keys head_dim"]
]

# The queries of a causal sequence are split into this many blocks, and each block is compared only with the keys up to
# its end. This skips 3/8 of the scores, all of them masked. More blocks save little more and add overhead.
CAUSAL_BLOCKS = 4
MIN_CAUSAL_BLOCK = 32


class Attention(nnx.Module):
    """Softmax attention of one layer.

    Args:
        config: Heads, biases and dropout.
        d_model: Width of the residual stream.
        positions: How the model encodes positions.
        std: Standard deviation of the initial input projections.
        out_std: Standard deviation of the initial output projection.
        rngs: Random streams for the initial values.
        implementation: See ``effscale.models.TransformerConfig``.
    """

    def __init__(
        self,
        config: AttentionConfig,
        d_model: int,
        *,
        positions: Positions,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
        implementation: AttentionImplementation | None = None,
    ):
        width = config.width(d_model)
        inner = {"bias": config.bias, "std": std, "rngs": rngs}
        self.query = Dense(d_model, config.num_heads * width, axes=("embed", "heads"), **inner)
        self.key = Dense(d_model, config.kv_heads * width, axes=("embed", "kv_heads"), **inner)
        self.value = Dense(d_model, config.kv_heads * width, axes=("embed", "kv_heads"), **inner)
        norm, over_all = config.qk_norm, config.qk_norm_over == "all"
        of = lambda heads: None if norm is None else norm.build(width * (heads if over_all else 1))
        self.query_norm, self.key_norm = of(config.num_heads), of(config.kv_heads)
        out_bias = config.bias if config.out_bias is None else config.out_bias
        self.out = Dense(
            config.num_heads * width,
            d_model,
            bias=out_bias,
            std=out_std,
            axes=("heads", "embed"),
            rngs=rngs,
        )
        self.config = config
        self.positions = positions
        self.implementation = implementation
        self.head_dim = width
        self.scale = width**-0.5 if config.scale is None else config.scale

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        context: Context,
        cache: LayerCache | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], LayerCache | None, dict[str, Any]]:
        """Attend within ``x`` or, with a cache, write ``x`` into the cache and attend from ``x`` to the cache.

        Args:
            x: The residual stream, normalized if the block uses pre-norm.
            context: Positions and masks.
            cache: Keys and values of this layer, one slot per token.
            key: Key for dropout; None disables dropout.

        Returns:
            The output, the updated cache, and a report of the points that the context captures.
        """
        split = lambda y: rearrange(y, "b s (h d) -> b h s d", d=self.head_dim)
        projections = (self.query.affine(), self.key.affine(), self.value.affine())
        query, keys, values = matmuls(x, *projections)
        query, keys = self._normed(query, keys, "all")
        query, keys, values = map(split, (query, keys, values))
        query, keys = self._normed(query, keys, "head")
        if isinstance(self.positions, Rotary) and context.angles is not None:
            query, keys = (rotate(y, context.angles, self.positions) for y in (query, keys))
        query = constrain(query, "batch", "heads_act", "seq", None) * self.scale
        query, keys, values = map(checkpoint_name, (query, keys, values), ("query", "key", "value"))
        if cache is not None:
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                old, new.astype(old.dtype), context.start, axis=2
            )
            cache = (write(cache[0], keys), write(cache[1], values))
            keys, values = (c.astype(x.dtype) for c in cache)
        slopes = alibi_slopes(self.config.num_heads) if isinstance(self.positions, Alibi) else None
        y = self._mix(query, keys, values, context, slopes, key)
        y = checkpoint_name(rearrange(y, "b h s d -> b s (h d)"), "attention_mixed")
        report = context.captured(
            query=query,
            key=keys,
            value=values,
            attention_mixed=y,
            attention_scores=lambda: attention_scores(query, keys),
        )
        return self.out(y), cache, report

    def _normed(self, query: Array, keys: Array, over: str) -> tuple[Array, Array]:
        """Normalize queries and keys if the norm covers ``over``: each head separately or all heads together."""
        if self.query_norm is None or self.key_norm is None or self.config.qk_norm_over != over:
            return query, keys
        return self.query_norm(query), self.key_norm(keys)

    def _mix(self, query, keys, values, context: Context, slopes, key) -> Array:
        """Use a fused kernel if the target platform has one that supports these operands; otherwise compute in blocks."""
        rate = self.config.dropout
        window = self.config.window
        options = {"slopes": slopes, "window": window, "rate": rate, "key": key}
        blocks = partial(in_blocks, context=context, **options)
        if context.cached or self.implementation == "blocks":
            return blocks(query, keys, values)
        rules, reason = current_rules(), None
        if key is not None and rate > 0:
            reason = f"the kernels have no dropout of attention weights, and the layer's dropout is {rate}"
        elif window is not None:
            reason = f"the kernels do not support windows, and the layer's window is {window}"
        elif axes := rules.lookup("seq"):
            reason = (
                f"the kernels need whole sequences, and the sharding rules split them over {axes}"
            )
        if reason is not None and self.implementation is None:
            return blocks(query, keys, values)
        if reason is not None:
            raise Unsupported(
                f"attention_implementation={self.implementation!r} is not supported here: {reason}. Use None or 'blocks'"
            )
        return attention(
            query,
            keys,
            values,
            causal=context.causal,
            segments=with_padding(context.segments, context.key_valid),
            alibi=None if slopes is None else AlibiBias(slopes, context.key_positions),
            row_axes=rules.lookup("batch"),
            head_axes=rules.lookup("heads_act"),
            implementation=self.implementation,
            fallback=blocks,
        )


def in_blocks(
    query: Float[Array, "batch heads seq head_dim"],
    keys: Float[Array, "batch kv_heads keys head_dim"],
    values: Float[Array, "batch kv_heads keys head_dim"],
    context: Context,
    *,
    slopes: Float[np.ndarray, "heads"] | None = None,
    window: int | None = None,
    rate: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "batch heads seq head_dim"]:
    """Compute attention with scores in float32, splitting a causal sequence into ``CAUSAL_BLOCKS`` blocks of queries."""
    seq = query.shape[2]
    count = (
        CAUSAL_BLOCKS if context.causal and not context.cached and seq % CAUSAL_BLOCKS == 0 else 1
    )
    if seq < CAUSAL_BLOCKS * MIN_CAUSAL_BLOCK:
        count = 1
    outputs = []
    for i in range(count):
        first, last = i * seq // count, (i + 1) * seq // count
        end = last if count > 1 else keys.shape[2]
        bias = None
        if slopes is not None:
            # The bias relative to the query would differ by a constant per row, which softmax ignores.
            bias = jnp.asarray(slopes)[None, :, None, None] * context.key_positions[
                :, None, None, :end
            ].astype(jnp.float32)
        outputs.append(
            softmax_attention(
                query[:, :, first:last],
                keys[:, :, :end],
                values[:, :, :end],
                allowed=context.allowed(first, last, end, window),
                bias=bias,
                rate=rate,
                key=None if key is None else jax.random.fold_in(key, i),
            )
        )
    return outputs[0] if count == 1 else jnp.concatenate(outputs, 2)


def with_padding(
    segments: Int[Array, "batch seq"] | None, valid: Bool[Array, "batch seq"] | None
) -> Int[Array, "batch seq"] | None:
    """Return segments in which padding is a separate segment, so that no real token attends to it.

    Example:
        >>> with_padding(jnp.array([[1, 2, 2]]), jnp.array([[True, True, False]])).tolist()
        [[1, 2, -2147483648]]
    """
    if valid is None:
        return segments
    real = jnp.zeros_like(valid, jnp.int32) if segments is None else segments
    return jnp.where(valid, real, jnp.iinfo(jnp.int32).min)


def softmax_attention(
    query: Float[Array, "batch heads seq head_dim"],
    keys: Float[Array, "batch kv_heads keys head_dim"],
    values: Float[Array, "batch kv_heads keys head_dim"],
    *,
    allowed: Bool[Array, "rows 1 seq keys"] | Bool[Array, "rows 1 1 keys"] | None = None,
    bias: Float[Array, "bias_rows heads 1 keys"] | None = None,
    rate: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "batch heads seq head_dim"]:
    r"""Compute ``softmax(q k^T + bias) v`` with scores in float32; the caller has already scaled the query.

    The weights stay unnormalized and the output is divided instead. The result is the same, and it is cheaper because
    the output is narrower than the scores. A query without any visible key gets the mean of all values.
    """
    heads, kv_heads = query.shape[1], keys.shape[1]
    # Group the query heads by the key head they share, so that no key or value is copied.
    grouped = lambda y: rearrange(y, "b (k g) q d -> b k (g q) d", k=kv_heads)
    apart = lambda y: rearrange(y, "b k (g q) d -> b (k g) q d", g=heads // kv_heads)
    scores = apart(
        jnp.einsum("bhqd,bhkd->bhqk", grouped(query), keys, preferred_element_type=jnp.float32)
    )
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = jnp.where(allowed, scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    weights = dropout(weights, rate, key).astype(values.dtype)
    mixed = jnp.einsum(
        "bhqk,bhkd->bhqd", grouped(weights), values, preferred_element_type=jnp.float32
    )
    return (apart(mixed) / total).astype(query.dtype)


def attention_scores(
    query: Float[Array, "batch heads seq head_dim"],
    keys: Float[Array, "batch kv_heads keys head_dim"],
) -> Float[Array, "batch heads seq keys"]:
    """Return all scores ``q k^T`` of a scaled query in float32, before ALiBi's bias, masks and softmax."""
    keys = jnp.repeat(keys, query.shape[1] // keys.shape[1], axis=1)
    return jnp.einsum("bhqd,bhkd->bhqk", query, keys, preferred_element_type=jnp.float32)

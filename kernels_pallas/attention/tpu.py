"""TPU: JAX's splash attention.

Its two-kernel backward pass is called directly, with the residuals of the forward pass, because differentiating through
splash does not work in a ``jax.shard_map`` inside a checked one. The one-kernel backward pass keeps a query gradient for
each block of keys, which uses most of the memory that should be saved.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCKS = (512, 384, 256, 128)
# The largest width that was compiled, in float32.
_MAX_HEAD_DIM = 256
# Pallas supports v4 and later.
_TOO_OLD = ("TPU v2", "TPU v3")

Gradients = tuple[Array, Array, Array]


def why_not(query: Any, wide: int) -> str | None:
    """Return why splash does not support such a query, with heads of ``wide`` features, or None."""
    seq = query.shape[2]
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the query is {query.dtype}, and splash supports float32 and bfloat16"
    if seq % 128:
        return f"seq={seq} is not a multiple of 128; pad the rows to {seq + -seq % 128}"
    if wide > _MAX_HEAD_DIM:
        return (
            f"heads are {wide} features wide, and splash supports {_MAX_HEAD_DIM} (ALiBi adds six)"
        )
    if jax.default_backend() == "tpu" and jax.devices()[0].device_kind.startswith(_TOO_OLD):
        return f"{jax.devices()[0].device_kind} is older than v4"
    return _missing()


@functools.cache
def _missing() -> str | None:
    """Return what this version of JAX lacks of the names used here."""
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk

        names = list(inspect.signature(sk._splash_attention_bwd).parameters)
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} has moved a part of splash attention ({error})"
    if names[-2:] != ["res", "do"]:
        return f"the backward pass of splash attention in jax {jax.__version__} takes {names}"
    return None


def _kernel(num_heads: int, seq: int, causal: bool, interpret: bool = False) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as sm

    block = next(size for size in _BLOCKS if seq % size == 0)
    sizes = sk.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = (sm.CausalMask if causal else sm.FullMask)((seq, seq))
    return sk.make_splash_mha(
        sm.MultiHeadMask([mask] * num_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        save_residuals=True,
        interpret=interpret,
    )


def _segment_ids(segments: Array | None) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk

    return None if segments is None else sk.SegmentIds(segments, segments)


def forward(
    query: Float[Array, "batch heads seq wide"],
    keys: Float[Array, "batch kv_heads seq wide"],
    values: Float[Array, "batch kv_heads seq head_dim"],
    segments: Int[Array, "batch seq"] | None,
    *,
    causal: bool,
) -> tuple[Float[Array, "batch heads seq head_dim"], Float[Array, "batch heads seq"]]:
    """Return the output, and the float32 log normalizer of each row of scores."""
    kernel = _kernel(query.shape[1], query.shape[2], causal)

    def row(query, keys, values, segments):
        out, (normalizer,) = kernel(query, keys, values, _segment_ids(segments))
        return out, normalizer

    return jax.vmap(row)(query, keys, values, segments)


def backward(
    query: Float[Array, "batch heads seq wide"],
    keys: Float[Array, "batch kv_heads seq wide"],
    values: Float[Array, "batch kv_heads seq head_dim"],
    segments: Int[Array, "batch seq"] | None,
    out: Float[Array, "batch heads seq head_dim"],
    normalizer: Float[Array, "batch heads seq"],
    cotangent: Float[Array, "batch heads seq head_dim"],
    *,
    causal: bool,
) -> Gradients:
    """Return the gradients of query, keys and values."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk

    kernel = _kernel(query.shape[1], query.shape[2], causal)
    *options, _, _ = inspect.signature(sk._splash_attention_bwd).parameters
    backward_of_row: Any = functools.partial(
        sk._splash_attention_bwd, *(kernel.kwargs[name] for name in options)
    )

    def row(query, keys, values, segments, out, normalizer, cotangent):
        kept = (query, keys, values, _segment_ids(segments), None, out, normalizer)
        kept = (*kept, kernel.dq_mask_info, kernel.dkv_mask_info)
        return backward_of_row(kept, cotangent)[3:6]

    return jax.vmap(row)(query, keys, values, segments, out, normalizer, cotangent)

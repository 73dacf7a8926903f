"""Hopper GPUs: cuDNN's fused attention, through the primitives that implement ``jax.nn.dot_product_attention``.

The public function queries the capabilities of the host's device, so it cannot be traced on a host with only a CPU.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_MULTIPLE = 8
_MAX_HEAD_DIM = 256
# Bias, lengths and offsets of packed rows, and pages, all of which are unused.
_ABSENT = 7

Gradients = tuple[Array, Array, Array]


def why_not(query: Any, wide: int, segments: Any) -> str | None:
    """Return why cuDNN does not support such a query, with heads of ``wide`` features, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the query is {query.dtype}, and cuDNN supports bfloat16 and float16"
    if segments is not None:
        return "rows have padding or several segments, and cuDNN is used only for rows with one segment"
    if wide > _MAX_HEAD_DIM:
        return (
            f"heads are {wide} features wide, and cuDNN supports {_MAX_HEAD_DIM} (ALiBi adds six)"
        )
    return _missing()


@functools.cache
def _missing() -> str | None:
    """Return what this version of JAX lacks of the names used here."""
    try:
        _primitives()
        _options(True)
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} has moved a part of its cuDNN attention ({error})"
    return None


def _primitives() -> tuple[Any, Any]:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn._dot_product_attention_fwd_p_wrapper, cudnn._dot_product_attention_bwd_p_wrapper


def _options(causal: bool) -> dict[str, Any]:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    options = {
        "scale": 1.0,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # neither a bias nor its gradient
        "mask_type": cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    if "score_mod" in inspect.signature(cudnn._dot_product_attention_bwd_impl).parameters:
        options["score_mod"] = None  # since jax 0.12
    return options


def forward(
    query: Float[Array, "batch heads seq wide"],
    keys: Float[Array, "batch kv_heads seq wide"],
    values: Float[Array, "batch kv_heads seq head_dim"],
    segments: None,
    *,
    causal: bool,
) -> tuple[Float[Array, "batch heads seq head_dim"], Float[Array, "batch heads seq"]]:
    """Return the output, and the float32 log normalizer of each row of scores."""
    primitive, _ = _primitives()
    absent = [jnp.zeros(0, query.dtype)] * _ABSENT
    operands = [_laid_out(x, query) for x in (query, keys, values)]
    out, normalizer = primitive.bind(*operands, *absent, is_training=True, **_options(causal))
    return _as_given(out, values), normalizer


def backward(
    query: Float[Array, "batch heads seq wide"],
    keys: Float[Array, "batch kv_heads seq wide"],
    values: Float[Array, "batch kv_heads seq head_dim"],
    segments: None,
    out: Float[Array, "batch heads seq head_dim"],
    normalizer: Float[Array, "batch heads seq"],
    cotangent: Float[Array, "batch heads seq head_dim"],
    *,
    causal: bool,
) -> Gradients:
    """Return the gradients of query, keys and values."""
    _, primitive = _primitives()
    absent = [jnp.zeros(0, query.dtype)] * _ABSENT
    operands = [_laid_out(x, query) for x in (query, keys, values)]
    results = [_laid_out(x, query) for x in (out, cotangent)]
    found = primitive.bind(*operands, *absent, normalizer, *results, **_options(causal))
    d_query, d_keys, d_values = found
    return _as_given(d_query, query), _as_given(d_keys, keys), _as_given(d_values, values)


def _laid_out(x: Array, query: Array) -> Array:
    """Return ``x`` as [batch, seq, heads, width], as wide as the query and a multiple of eight."""
    wide = query.shape[-1] + -query.shape[-1] % _MULTIPLE
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, wide - x.shape[-1])))
    return x.transpose(0, 2, 1, 3)


def _as_given(x: Array, like: Array) -> Array:
    return x.transpose(0, 2, 1, 3)[..., : like.shape[-1]]

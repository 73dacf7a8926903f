"""Keys and values of earlier tokens, as a plain pytree that is passed in and returned."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effscale.models.config import TransformerConfig

Slots = Float[Array, "batch kv_heads slots head_dim"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX also builds it from shapes and placeholders
class KVCache:
    """The keys and values of the tokens seen so far.

    Attributes:
        layers: Keys and values of each layer, in the order in which the layers run.
        positions: Position of the token in each slot.
        valid: Whether a slot holds a real token: False for padding and for slots not yet written.
        length: Number of slots written so far, the same in every row.
    """

    layers: tuple[tuple[Slots, Slots], ...]
    positions: Int[Array, "batch slots"]
    valid: Bool[Array, "batch slots"]
    length: Int[Array, ""]


def empty_cache(config: TransformerConfig, batch: int, slots: int) -> KVCache:
    """Return a cache with room for ``slots`` tokens in each of ``batch`` rows.

    Its arrays have the model's compute dtype and hold ``2 * num_layers * batch * slots * kv_heads * head_dim`` numbers.

    Raises:
        ValueError: The model has fewer than ``slots`` positions.

    Example:
        >>> from effscale.models import empty_cache, preset
        >>> import jax
        >>> jax.eval_shape(lambda: empty_cache(preset("gpt2"), 2, 64)).positions.shape
        (2, 64)
    """
    if config.max_length is not None and slots > config.max_length:
        raise ValueError(
            f"slots must be at most the model's {config.max_length} positions, got {slots}"
        )

    def zeros(block):
        shape = (batch, block.attention.kv_heads, slots, block.attention.width(config.d_model))
        return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)

    return KVCache(
        layers=tuple(
            zeros(block)
            for group in config.groups
            for _ in range(group.repeat)
            for block in group.blocks
        ),
        positions=jnp.zeros((batch, slots), jnp.int32),
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """Return the cache with room for ``slots`` tokens, or the cache itself if it already has room."""
    more = slots - cache.valid.shape[1]
    if more <= 0:
        return cache
    pad = lambda a, axis: jnp.pad(a, [(0, more if i == axis else 0) for i in range(a.ndim)])
    return KVCache(
        layers=tuple((pad(k, 2), pad(v, 2)) for k, v in cache.layers),
        positions=pad(cache.positions, 1),
        valid=pad(cache.valid, 1),
        length=cache.length,
    )

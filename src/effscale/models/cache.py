"""Keys and values of earlier tokens, as a plain pytree that goes in and comes out."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effscale.models.config import TransformerConfig

Slots = Float[Array, "layers batch slots kv_heads head_dim"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What attention needs of the tokens seen so far.

    Attributes:
        groups: For each group of the model, for each of its blocks, keys and values.
        positions: Position of the token in each slot.
        valid: Whether a slot holds a real token: False for padding and for slots not yet written.
        length: Slots written so far, the same in every row.
    """

    groups: tuple[tuple[tuple[Slots, Slots], ...], ...]
    positions: Int[Array, "batch slots"]
    valid: Bool[Array, "batch slots"]
    length: Int[Array, ""]


def empty_cache(config: TransformerConfig, batch: int, slots: int) -> KVCache:
    """A cache with room for ``slots`` tokens in each of ``batch`` rows.

    Its arrays have the model's compute type: ``2 * num_layers * batch * slots * kv_heads * head_dim`` numbers.

    Raises:
        ValueError: If the model has fewer positions than ``slots``.

    Example:
        >>> from effscale.models import empty_cache, preset
        >>> import jax
        >>> jax.eval_shape(lambda: empty_cache(preset("gpt2"), 2, 64)).positions.shape
        (2, 64)
    """
    if config.max_length is not None and slots > config.max_length:
        raise ValueError(f"slots={slots}: the model has {config.max_length} positions")

    def zeros(group, block):
        heads, width = block.attention.kv_heads, block.attention.width(config.d_model)
        make = lambda: jnp.zeros((group.repeat, batch, slots, heads, width), config.dtype)
        return make(), make()

    return KVCache(
        groups=tuple(tuple(zeros(group, block) for block in group.blocks) for group in config.groups),
        positions=jnp.zeros((batch, slots), jnp.int32),
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )

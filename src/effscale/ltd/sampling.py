"""The random choice of the tokens that each layer keeps."""

import zlib

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Int, PRNGKeyArray

from effscale.parallel import constrain
from effscale.parallel.rules import current_rules

# A separate branch of the key, so that the same key can be used for dropout.
BRANCH = zlib.crc32(b"random-ltd")


def sample_kept(
    key: PRNGKeyArray, layers: tuple[int, ...], batch: int, length: int, kept: int
) -> Int[Array, "layers batch kept"]:
    """Draw the positions that each layer keeps in each row: uniform without replacement, independent, in increasing order.

    The positions of a layer depend on the key and the number of the layer, not on the other layers. If the compiler
    divides the batch over a mesh, they are those of a single device. Inside a `jax.shard_map` over batch axes, each shard
    draws separately along those axes; shards along other axes (``tensor``) agree.

    Args:
        key: The key of this forward pass. Each micro-batch needs a different key.
        layers: The numbers of the layers.
        batch: The number of rows.
        length: The number of tokens in a row.
        kept: The number of tokens to keep, at most ``length``.

    Returns:
        The positions. A layer that recomputes its forward pass uses these and does not draw again.

    References:
        Yao et al., "Random-LTD" (2022), section 3.1. https://arxiv.org/abs/2211.11586

    Example:
        >>> sample_kept(jax.random.key(0), (1, 2, 3), batch=4, length=8, kept=5).shape
        (3, 4, 5)
    """
    key = _own_to_shard(jax.random.fold_in(key, BRANCH))
    draw = lambda layer: jax.random.bits(jax.random.fold_in(key, layer), (batch, length), "uint32")
    bits = jax.vmap(draw)(jnp.asarray(layers, jnp.uint32))
    # Keep the tokens with the smallest random numbers. With the position in the low bits of a number, one sort of
    # plain integers is enough, four times as fast as an argsort. The other bits tie so rarely that the
    # probability of a position changes by less than 2^-15, even among 2^17 tokens.
    low = jnp.uint32((1 << (length - 1).bit_length()) - 1)
    numbers = (bits & ~low) | jnp.arange(length, dtype=jnp.uint32)[None, None]
    positions = jnp.sort(jnp.sort(numbers, -1)[..., :kept] & low, -1).astype(jnp.int32)
    return constrain(positions, None, "batch", None)


def _own_to_shard(key: PRNGKeyArray) -> PRNGKeyArray:
    """Return the key combined with the position of this shard along the batch axes of an enclosing `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(a for a in current_rules().lookup("batch") if types.get(a) == AxisType.Manual)
    return jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key

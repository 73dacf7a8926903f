"""Which tokens each layer keeps."""

import zlib

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Int, PRNGKeyArray

from effscale.parallel import constrain, current_rules

# Its own branch of the key, so that the same key may turn dropout on as well.
BRANCH = zlib.crc32(b"random-ltd")


def sample_kept(
    key: PRNGKeyArray, layers: tuple[int, ...], batch: int, length: int, kept: int
) -> Int[Array, "layers batch kept"]:
    """Positions that each layer keeps in each row: uniform without replacement, independent, rising.

    A layer's positions follow from the key and the layer's number, whichever layers are drawn beside it. Where the batch
    is divided over a mesh by the compiler, they are those of one device. Inside a `jax.shard_map` that takes batch axes
    into its own hands each shard has its own; shards along other axes (``tensor``) agree.

    Args:
        key: The key of this forward pass. Each micro-batch needs its own.
        layers: The layers' numbers.
        batch: Rows.
        length: Tokens a row.
        kept: Tokens that are kept, at most ``length``.

    Returns:
        The positions. A layer that recomputes its forward pass takes them from here and does not draw again.

    Source: Yao et al., "Random-LTD", 2022, section 3.1.

    Example:
        >>> sample_kept(jax.random.key(0), (1, 2, 3), batch=4, length=8, kept=5).shape
        (3, 4, 5)
    """
    key = _own_to_shard(jax.random.fold_in(key, BRANCH))
    draw = lambda layer: jax.random.bits(jax.random.fold_in(key, layer), (batch, length), "uint32")
    bits = jax.vmap(draw)(jnp.asarray(layers, jnp.uint32))
    # The kept tokens are those of the smallest random numbers. With the position in a number's low bits, one sort of
    # plain integers does it, four times as fast as an argsort. The other bits tie so seldom that no position's
    # chance moves by 2^-15, even among 2^17 tokens.
    low = jnp.uint32((1 << (length - 1).bit_length()) - 1)
    numbers = (bits & ~low) | jnp.arange(length, dtype=jnp.uint32)[None, None]
    positions = jnp.sort(jnp.sort(numbers, -1)[..., :kept] & low, -1).astype(jnp.int32)
    return constrain(positions, None, "batch", None)


def _own_to_shard(key: PRNGKeyArray) -> PRNGKeyArray:
    """Return the key with this shard's place along those batch axes that a `jax.shard_map` has taken over."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(a for a in current_rules().lookup("batch") if types.get(a) == AxisType.Manual)
    return jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key

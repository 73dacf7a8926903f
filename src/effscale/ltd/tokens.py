"""Choose the tokens to keep, take them out of the residual stream and put them back."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from effscale.models import Context
from effscale.parallel import constrain
from effscale.parallel.rules import current_rules

PROMISES: dict[str, Any] = {
    "mode": "promise_in_bounds",
    "indices_are_sorted": True,
    "unique_indices": True,
}


def take_tokens(
    x: Shaped[Array, "rows seq *features"], kept: Int[Array, "batch kept"]
) -> Shaped[Array, "batch kept *features"]:
    """Return ``x[row, kept[row]]`` for each row.

    Args:
        x: Rows of tokens; a single row is used for all.
        kept: Positions, in increasing order in each row. They are not checked to be within the sequence.

    Example:
        >>> import jax.numpy as jnp
        >>> take_tokens(jnp.array([[10, 11, 12]]), jnp.array([[0, 2], [1, 2]])).tolist()
        [[10, 12], [11, 12]]
    """
    # Mapped over rows, so that the compiler knows the batch dimension and moves no row between devices.
    take = lambda row, kept: row.at[kept].get(**PROMISES)
    if x.shape[0] == 1:
        return jax.vmap(take, (None, 0))(x[0], kept)
    return jax.vmap(take)(x, kept)


def put_tokens(
    x: Shaped[Array, "batch seq *features"],
    kept: Int[Array, "batch kept"],
    y: Shaped[Array, "batch kept *features"],
) -> Shaped[Array, "batch seq *features"]:
    """Return ``x`` with ``y`` at the kept tokens; the other tokens are unchanged.

    Example:
        >>> import jax.numpy as jnp
        >>> put_tokens(jnp.array([[10, 11, 12]]), jnp.array([[0, 2]]), jnp.array([[7, 8]])).tolist()
        [[7, 11, 8]]
    """
    put = lambda row, kept, y: row.at[kept].set(y, **PROMISES)
    return jax.vmap(put)(x, kept, y)


def take_context(context: Context, kept: Int[Array, "batch kept"]) -> Context:
    """Return the context of only the kept tokens, with their positions, segments and padding mask.

    Positions are increasing, so a causal layer can rely on the order of slots.
    """

    def take(value: Any) -> Any:
        return jax.tree.map(lambda x: take_tokens(x, kept), value)

    positions, segments = take(context.positions), take(context.segments)
    valid = take(context.valid)
    return dataclasses.replace(
        context,
        positions=positions,
        key_positions=positions,
        valid=valid,
        key_valid=valid,
        segments=segments,
        key_segments=segments,
        angles=take(context.angles),
    )


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

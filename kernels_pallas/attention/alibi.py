"""ALiBi without a bias array: six additional features of each query and key, whose product is the bias.

With a slope $m$ as the sum of three bfloat16 numbers, $m = m_1 + m_2 + m_3$, and a position
$p = h + l$ of a multiple of 256 and a rest, each of the six products $m_i h$ and $m_i l$ is of
two bfloat16 numbers, and kernels sum products in float32. So the bias is that of float32 whatever the type of the query.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

FEATURES = 6
# A multiple of 256 is exact in bfloat16 (8 bits) below this.
MAX_POSITION = 2**16


class Alibi(NamedTuple):
    """A bias of ``slopes[head] * positions[row, key]`` on the scores.

    The bias relative to the query would differ by a constant per row of scores, which softmax ignores.
    """

    slopes: Float[np.ndarray, " heads"]
    """Slope of each head, float32, known when the program is traced."""
    positions: Int[Array, "rows seq"]
    """Positions of the keys, below 65,536. A single row applies to all rows."""


def split_slopes(slopes: Float[np.ndarray, " heads"]) -> Float[np.ndarray, "heads 3"]:
    """Split each slope into three bfloat16 numbers, stored as float32, whose sum is the slope.

    Example:
        >>> split_slopes(np.asarray([0.5, 1 / 3], np.float32)).sum(1) == np.asarray([0.5, 1 / 3], np.float32)
        array([ True,  True])
    """
    pieces, rest = [], np.asarray(slopes, np.float32)
    for _ in range(3):
        pieces.append(rest.astype(jnp.dtype("bfloat16")).astype(np.float32))
        rest = rest - pieces[-1]
    return np.stack(pieces, -1)


def with_features(
    query: Float[Array, "batch heads seq head_dim"],
    keys: Float[Array, "batch kv_heads seq head_dim"],
    alibi: Alibi,
) -> tuple[Float[Array, "batch heads seq wide"], Float[Array, "batch kv_heads seq wide"]]:
    """Add six features to the query and the keys, whose product is the bias."""
    three = split_slopes(alibi.slopes)
    of_query = jnp.asarray(np.concatenate([three, three], -1))[None, :, None]
    positions = jnp.asarray(alibi.positions)
    high = positions // 256 * 256
    of_keys = jnp.stack([high] * 3 + [positions - high] * 3, -1)[:, None]
    return _widened(query, of_query), _widened(keys, of_keys)


def _widened(x: Array, features: Any) -> Array:
    shape = (*x.shape[:3], FEATURES)
    return jnp.concatenate([x, jnp.broadcast_to(features.astype(x.dtype), shape)], -1)

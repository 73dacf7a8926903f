"""Places of rows that are sorted by group: in a buffer for the even share of each group, or in a tile of the remaining rows.

With an even load, nearly all rows are in the buffers, which one batched operation processes. A loop over all rows of all
groups would take twice as long on a CPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul.reference import group_of_rows

LARGEST_TILE, SMALLEST_TILE = 64, 8


class Places:
    """The places of sorted rows.

    Args:
        sizes: Number of rows of each group.
        rows: Total number of rows; those after the last group have no place.
        share: Number of rows per buffer.
    """

    def __init__(self, sizes: Int[Array, " groups"], rows: int, share: int):
        tile = 1 << max(share // 8 - 1, 0).bit_length()  # an eighth of a buffer, as a power of two
        self.height = min(LARGEST_TILE, max(SMALLEST_TILE, tile))
        self.sizes, self.starts, self.share = sizes, jnp.cumsum(sizes) - sizes, share
        self.group = group_of_rows(sizes, rows)
        self.over = jnp.maximum(sizes - share, 0)
        self.tiles = -(-self.over // self.height)
        self.ends = jnp.cumsum(self.tiles)

    def buffers(self, rows: Float[Array, "rows width"]) -> Float[Array, "groups share width"]:
        """Return the first rows of each group, with zeros if it has fewer."""
        place = jnp.arange(self.share, dtype=jnp.int32)[None]
        at = jnp.minimum(self.starts[:, None] + place, rows.shape[0] - 1)
        return jnp.where((place < self.sizes[:, None])[..., None], rows[at], 0)

    def rows(self, buffers: Float[Array, "groups share width"]) -> Float[Array, "rows width"]:
        """Invert ``buffers``: return each row from its buffer, and zeros for rows that are in none."""
        count = self.sizes.shape[0]
        group = jnp.minimum(self.group, count - 1)
        place = jnp.arange(self.group.shape[0], dtype=jnp.int32) - self.starts[group]
        slot = group * self.share + jnp.minimum(place, self.share - 1)
        inside = (self.group < count) & (place < self.share)
        flat = buffers.reshape(-1, buffers.shape[-1])
        return jnp.where(inside[:, None], flat[slot], 0)

    def tile(self, number: Int[Array, ""]) -> tuple[Array, Array, Array]:
        """Return the group of a tile, its first row, and which of its rows belong to the group."""
        group = (number >= self.ends).sum(dtype=jnp.int32)
        done = (number - (self.ends - self.tiles)[group]) * self.height
        own = jnp.arange(self.height, dtype=jnp.int32) < self.over[group] - done
        return group, self.starts[group] + self.share + done, own[:, None]

    def loop(self, step: Callable[[Array, Any], Any], start: Any) -> Any:
        """Loop over all tiles in order; there are none if every row is in a buffer."""
        number = self.ends[-1]
        return jax.lax.fori_loop(jnp.zeros_like(number), number, step, start)

    def pad(self, rows: Float[Array, "rows width"]) -> Float[Array, "more width"]:
        """Add room for a tile that begins at the last row."""
        return jnp.pad(rows, ((0, self.height), (0, 0)))

    def cut(self, padded: Array, at: Array, own: Array) -> Array:
        """Return the rows of a tile, with zeros for those that do not belong to its group."""
        return jnp.where(own, jax.lax.dynamic_slice_in_dim(padded, at, self.height), 0)

    def put(self, padded: Array, found: Array, at: Array, own: Array) -> Array:
        """Return the rows with those of the tile replaced."""
        before = jax.lax.dynamic_slice_in_dim(padded, at, self.height)
        return jax.lax.dynamic_update_slice_in_dim(padded, jnp.where(own, found, before), at, 0)

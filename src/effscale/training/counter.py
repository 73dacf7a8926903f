"""A counter for the tokens seen, exact beyond 2^31 without 64-bit types."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counter:
    """A non-negative integer below 2^64 in two uint32 limbs, usable under ``jax.jit``.

    JAX has no 64-bit integers unless ``jax_enable_x64`` is set, an int32 overflows at 2.1 billion tokens, and a
    float32 cannot count single tokens beyond 16.8 million.

    >>> counter = Counter.of(2**32 - 1).add(2)
    >>> int(counter), float(counter.to_float32())
    (4294967297, 4294967296.0)
    """

    high: Any
    low: Any

    @classmethod
    def of(cls, value: int) -> "Counter":
        """Create a counter with the given value.

        Raises:
            ValueError: ``value`` is negative or does not fit into 64 bits.
        """
        if not 0 <= value < 2**64:
            raise ValueError(f"value must be in [0, 2**64), got {value}")
        return cls(jnp.uint32(value >> 32), jnp.uint32(value & 0xFFFFFFFF))

    def add(self, amount: Any) -> "Counter":
        """Return a counter increased by ``amount``, a non-negative integer below 2^32 (traced or not)."""
        low = self.low + jnp.asarray(amount).astype(jnp.uint32)
        return Counter(self.high + (low < self.low).astype(jnp.uint32), low)

    def to_float32(self) -> jax.Array:
        """Return the nearest float32, with a relative error up to 6e-8, for schedules."""
        return self.high.astype(jnp.float32) * jnp.float32(2.0**32) + self.low.astype(jnp.float32)

    def __int__(self) -> int:
        """Return the exact value as a Python integer; this waits for the device."""
        high, low = jax.device_get((self.high, self.low))
        return (int(high) << 32) | int(low)
